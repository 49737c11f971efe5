from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .plan import Block, Plan


class ConvModule(nn.Module):
    """mmcv's; ``order`` may put the norm first."""

    def __init__(self, conv: nn.Conv3d, norm: nn.Module | None, act: nn.Module | None) -> None:
        super().__init__()
        self.order = ("conv", "norm", "act")
        self.conv = conv
        if norm is not None:
            self.bn = norm
        if act is not None:
            self.activate = act

    @property
    def norm(self) -> nn.Module | None:
        return getattr(self, "bn", None)

    def forward(self, x: Tensor, activate: bool = True, norm: bool = True) -> Tensor:
        for layer in self.order:
            if layer == "conv":
                x = self.conv(x)
            elif layer == "norm" and norm and self.norm is not None:
                x = self.norm(x)
            elif layer == "act" and activate and hasattr(self, "activate"):
                x = self.activate(x)
        return x


class _NonLocalNd(nn.Module):
    """mmcv's attention to the positions that are left after a 1x2x2 max pool of keys and values."""

    def __init__(self, channels: int, mode: str, use_scale: bool) -> None:
        super().__init__()
        self.inter_channels, self.mode, self.use_scale = channels // 2, mode, use_scale
        pool = nn.MaxPool3d((1, 2, 2))
        self.theta = ConvModule(nn.Conv3d(channels, self.inter_channels, 1), None, None)
        for name in ("g", "phi"):
            projection = ConvModule(nn.Conv3d(channels, self.inter_channels, 1), None, None)
            self.add_module(name, nn.Sequential(projection, pool))
        self.conv_out = ConvModule(nn.Conv3d(self.inter_channels, channels, 1), nn.BatchNorm3d(channels), None)

    def embedded_gaussian(self, theta: Tensor, phi: Tensor) -> Tensor:
        weights = torch.matmul(theta, phi)
        return (weights / theta.shape[-1] ** 0.5 if self.use_scale else weights).softmax(dim=-1)

    def dot_product(self, theta: Tensor, phi: Tensor) -> Tensor:
        weights = torch.matmul(theta, phi)
        return weights / weights.shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        g, theta, phi = (getattr(self, name)(x).flatten(2) for name in ("g", "theta", "phi"))
        y = torch.matmul(getattr(self, self.mode)(theta.transpose(1, 2), phi), g.transpose(1, 2))
        return x + self.conv_out(y.transpose(1, 2).reshape(len(x), self.inter_channels, *x.shape[2:]))


class NonLocal3d(_NonLocalNd):
    pass


class Bottleneck3d(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        norm = block.plan.make_norm
        self.with_cp = False
        for index, conv in enumerate(block.convolutions()):
            act = None if index == 2 else nn.ReLU(inplace=True)
            setattr(self, f"conv{index + 1}", ConvModule(conv, norm(conv.out_channels), act))
        shortcut = block.shortcut()
        self.downsample = None if shortcut is None else ConvModule(shortcut, norm(shortcut.out_channels), None)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            identity = x if self.downsample is None else self.downsample(x)
            return self.conv3(self.conv2(self.conv1(x))) + identity

        if self.with_cp and x.requires_grad:
            y = self.relu(checkpoint(inner, x, use_reentrant=True))
        else:
            y = self.relu(inner(x))
        return self.non_local_block(y) if hasattr(self, "non_local_block") else y


class ResNet3d(nn.Module):
    """One pathway; as a network of its own it is Slow-only."""

    frozen_stages = -1
    norm_eval = False

    def __init__(self, plan: Plan, pathway: int = 0, lateral: bool = False) -> None:
        super().__init__()
        self.lateral = lateral
        conv = plan.stem(pathway)
        self.conv1 = ConvModule(conv, plan.make_norm(conv.out_channels), nn.ReLU(inplace=True))
        self.maxpool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
        self.res_layers = [f"layer{stage + 1}" for stage in range(4)]
        for stage, name in enumerate(self.res_layers):
            self.add_module(name, nn.Sequential(*map(Bottleneck3d, plan.stage(pathway, stage))))
        kinds = [("embedded_gaussian", False), ("embedded_gaussian", True), ("dot_product", True)]
        for kind, (stage, index) in zip(kinds, plan.nonlocal_blocks if pathway == 0 else (), strict=False):
            block = getattr(self, self.res_layers[stage])[index]
            block.non_local_block = NonLocal3d(block.conv3.conv.out_channels, *kind)
        self.lateral_connections = [f"{name}_lateral" for name in self.res_layers[:3]] if lateral else []
        for stage, name in enumerate(["conv1_lateral", *self.lateral_connections] if lateral else []):
            conv = plan.lateral(stage)
            norm = plan.make_norm(conv.out_channels) if plan.fusion_norm else None
            self.add_module(name, ConvModule(conv, norm, nn.ReLU(inplace=True) if plan.fusion_norm else None))

    with_pool2 = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.conv1(x))
        for index, name in enumerate(self.res_layers):
            x = getattr(self, name)(x)
            if index == 0 and self.with_pool2:
                x = self.pool2(x)
        return x

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        frozen = [self.conv1] if self.frozen_stages >= 0 else []
        frozen += [getattr(self, name) for name in self.res_layers[: max(self.frozen_stages, 0)]]
        frozen += [getattr(self, name) for name in self.lateral_connections[: max(self.frozen_stages, 0)]]
        for module in frozen:
            module.eval().requires_grad_(False)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


class ResNet3dPathway(ResNet3d):
    pass


class ResNet3dSlowFast(nn.Module):
    def __init__(self, plan: Plan, resample_rate: int) -> None:
        super().__init__()
        self.resample_rate, self.speed_ratio, self.channel_ratio = resample_rate, plan.alpha, plan.beta_inverse
        self.slow_path = ResNet3dPathway(plan, 0, lateral=True)
        self.fast_path = ResNet3dPathway(plan, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        slow = F.interpolate(x, mode="nearest", scale_factor=(1.0 / self.resample_rate, 1.0, 1.0))
        fast = F.interpolate(x, mode="nearest", scale_factor=(1.0 / (self.resample_rate // self.speed_ratio), 1.0, 1.0))
        slow = self.slow_path.maxpool(self.slow_path.conv1(slow))
        fast = self.fast_path.maxpool(self.fast_path.conv1(fast))
        laterals = ["conv1_lateral", *self.slow_path.lateral_connections]
        for lateral, layer in zip(laterals, self.slow_path.res_layers, strict=True):
            slow = torch.cat((slow, getattr(self.slow_path, lateral)(fast)), dim=1)
            slow, fast = getattr(self.slow_path, layer)(slow), getattr(self.fast_path, layer)(fast)
        return slow, fast


class SlowFastHead(nn.Module):
    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.fc_cls = nn.Linear(sum(plan.features), plan.classes, bias=plan.classifier_bias)

    def forward(self, x: tuple[Tensor, ...] | Tensor) -> Tensor:
        maps = reversed(x) if isinstance(x, tuple) else [x]
        pooled = torch.cat([F.adaptive_avg_pool3d(m, 1) for m in maps], 1)
        return self.fc_cls(pooled.view(pooled.size(0), -1))


class Recognizer3D(nn.Module):
    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.cls_head = backbone, head

    def forward(self, x: Tensor) -> Tensor:
        return self.cls_head(self.backbone(x))


def build(plan: Plan, resample_rate: int | None = None) -> nn.Module:
    """One clip -> logits. ``resample_rate`` is between the clip's frames and the slow pathway's; alpha if not given."""
    backbone = ResNet3dSlowFast(plan, resample_rate or plan.alpha) if plan.pathways == 2 else ResNet3d(plan)
    return Recognizer3D(backbone, SlowFastHead(plan))
