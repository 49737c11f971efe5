from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .plan import Block, Plan


class Bottleneck(nn.Module):
    """Also r1c7's, which adds in place."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        norm = block.plan.make_norm
        for index, conv in enumerate(block.convolutions()):
            setattr(self, f"conv{index + 1}", conv)
            setattr(self, f"bn{index + 1}", norm(conv.out_channels))
        self.relu = nn.ReLU(inplace=True)
        shortcut = block.shortcut()
        self.downsample = None if shortcut is None else nn.Sequential(shortcut, norm(shortcut.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        y = self.relu(y)
        return self.nonlocal_block(y) if hasattr(self, "nonlocal_block") else y


class NonLocal(nn.Module):
    """Attention of every position to every other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.nonlocal_type, self.sub_sample, self.embed_dim = "gaussian", False, channels // 2
        self.theta, self.phi, self.g = (nn.Conv3d(channels, self.embed_dim, 1) for _ in range(3))
        self.W, self.bn = nn.Conv3d(self.embed_dim, channels, 1), nn.BatchNorm3d(channels)
        self.W_bn = nn.Sequential(self.W, self.bn)

    def forward(self, x: Tensor) -> Tensor:
        theta, phi, g = (conv(x).flatten(2) for conv in (self.theta, self.phi, self.g))
        attention = torch.bmm(theta.transpose(1, 2), phi * self.embed_dim**-0.5).softmax(dim=-1)
        y = torch.bmm(g, attention.transpose(1, 2)).view(len(x), self.embed_dim, *x.shape[2:])
        return self.W_bn(y) + x


class Pathways(nn.Module):
    """What r1c7's network has, too."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self._build_pathway(plan, 1, "fast")
        for index, name in enumerate(("p1", "res2", "res3", "res4")):
            self.add_module(f"lateral_{name}", self.build_lateral(plan, index))
        self._build_pathway(plan, 0, "slow")
        self.dp = nn.Dropout(0.0)
        self.fc = nn.Linear(sum(plan.features), plan.classes, bias=plan.classifier_bias)

    @staticmethod
    def build_lateral(plan: Plan, stage: int) -> nn.Module:
        conv = plan.lateral(stage)
        return nn.Sequential(conv, plan.make_norm(conv.out_channels), nn.ReLU(inplace=True))

    def _build_pathway(self, plan: Plan, pathway: int, name: str) -> None:
        self.add_module(f"{name}_conv1", plan.stem(pathway))
        self.add_module(f"{name}_bn1", plan.make_norm(plan.width_of(pathway)))
        self.add_module(f"{name}_relu", nn.ReLU(inplace=True))
        self.add_module(f"{name}_maxpool", nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)))
        for stage in range(4):
            self.add_module(f"{name}_res{stage + 2}", nn.Sequential(*map(Bottleneck, plan.stage(pathway, stage))))

    def features(self, slow: Tensor, fast: Tensor) -> Tensor:
        slow, fast = (
            getattr(self, f"{name}_maxpool")(
                getattr(self, f"{name}_relu")(getattr(self, f"{name}_bn1")(getattr(self, f"{name}_conv1")(clip)))
            )
            for name, clip in (("slow", slow), ("fast", fast))
        )
        for stage, name in enumerate(("p1", "res2", "res3", "res4")):
            slow = torch.cat([slow, getattr(self, f"lateral_{name}")(fast)], 1)
            slow, fast = (
                getattr(self, f"slow_res{stage + 2}")(slow),
                getattr(self, f"fast_res{stage + 2}")(fast),
            )
        return torch.cat([F.adaptive_avg_pool3d(y, 1).view(y.shape[0], -1) for y in (slow, fast)], 1)


class SlowFast(Pathways):
    def __init__(self, plan: Plan, slow_temporal_stride: int) -> None:
        super().__init__(plan)
        self.slow_temporal_stride = slow_temporal_stride
        self.feat_ext = False
        self.avg = nn.AdaptiveAvgPool3d(1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x[:, :, :: self.slow_temporal_stride // 2], x)
        return features if self.feat_ext else self.fc(self.dp(features))


class ResNet_SlowFast(nn.Module):
    """Slow-only."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.conv1, self.bn1 = plan.stem(0), plan.make_norm(plan.width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
        for stage in range(4):
            self.add_module(f"layer{stage + 1}", nn.Sequential(*map(Bottleneck, plan.stage(0, stage))))
        self.avg_pool = nn.AdaptiveAvgPool3d(1)
        self.fc = nn.Linear(sum(plan.features), plan.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.avg_pool(x)
        return self.fc(x.view(x.size(0), -1))


class I3D_ResNetV1(nn.Module):
    def __init__(self, plan: Plan) -> None:
        super().__init__()
        conv = nn.Conv3d(3, plan.width, (5, 7, 7), (2, 2, 2), (2, 3, 3), bias=False)
        pool = nn.MaxPool3d((1, 3, 3), (2, 2, 2), (0, 1, 1))
        self.first_stage = nn.Sequential(conv, plan.make_norm(plan.width), nn.ReLU(), pool)
        self.pool2 = nn.MaxPool3d((2, 1, 1), (2, 1, 1))
        self.res_layers = nn.Sequential(*(nn.Sequential(*map(Bottleneck, plan.stage(0, s))) for s in range(4)))
        for stage, index in plan.nonlocal_blocks:
            block = self.res_layers[stage][index]
            block.nonlocal_block = NonLocal(block.conv3.out_channels)
        self.st_avg, self.dp = nn.AdaptiveAvgPool3d(1), nn.Dropout(0.5)
        self.fc = nn.Linear(sum(plan.features), plan.classes)
        self.head = nn.Sequential(self.dp, self.fc)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first_stage(x)
        for index, stage in enumerate(self.res_layers):
            x = stage(x)
            if index == 0:
                x = self.pool2(x)
        return self.head(self.st_avg(x).view(len(x), -1))


def build(plan: Plan, slow_temporal_stride: int | None = None) -> nn.Module:
    """One clip -> logits. The slow pathway takes every ``slow_temporal_stride // 2``-th frame; alpha if not given."""
    if plan.pathways == 1:
        return ResNet_SlowFast(plan)
    return SlowFast(plan, slow_temporal_stride or 2 * plan.alpha)
