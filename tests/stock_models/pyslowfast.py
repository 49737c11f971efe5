from __future__ import annotations

import torch
from family_reference import roi_align
from torch import Tensor, nn

from .plan import Block, Plan


class ResNetBasicStem(nn.Module):
    def __init__(self, plan: Plan, pathway: int) -> None:
        super().__init__()
        self.conv = plan.stem(pathway)
        self.bn = plan.make_norm(plan.width_of(pathway))
        self.relu = nn.ReLU(True)
        self.pool_layer = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.pool_layer(self.relu(self.bn(self.conv(x))))


class VideoModelStem(nn.Module):
    def __init__(self, plan: Plan) -> None:
        super().__init__()
        for pathway in range(plan.pathways):
            self.add_module(f"pathway{pathway}_stem", ResNetBasicStem(plan, pathway))

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        return [getattr(self, f"pathway{pathway}_stem")(clip) for pathway, clip in enumerate(x)]


class BottleneckTransform(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        for letter, conv in zip("abc", block.convolutions(), strict=True):
            setattr(self, letter, conv)
            setattr(self, f"{letter}_bn", block.plan.make_norm(conv.out_channels))
            if letter != "c":
                setattr(self, f"{letter}_relu", nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a_relu(self.a_bn(self.a(x)))
        x = self.b_relu(self.b_bn(self.b(x)))
        return self.c_bn(self.c(x))


class ResBlock(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        shortcut = block.shortcut()
        if shortcut is not None:
            self.branch1 = shortcut
            self.branch1_bn = block.plan.make_norm(shortcut.out_channels)
        self.branch2 = BottleneckTransform(block)
        self.relu = nn.ReLU(True)
        self._drop_connect_rate = 0.0

    def forward(self, x: Tensor) -> Tensor:
        branch = self.branch2(x)
        if self.training and self._drop_connect_rate > 0:
            keep = torch.rand(len(x), 1, 1, 1, 1, dtype=x.dtype) >= self._drop_connect_rate
            branch = branch * keep / (1 - self._drop_connect_rate)
        if hasattr(self, "branch1"):
            return self.relu(self.branch1_bn(self.branch1(x)) + branch)
        return self.relu(x + branch)


class Nonlocal(nn.Module):
    """Dot-product attention of every position to those that are left after a 1x2x2 max pool."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels // 2
        self.conv_theta, self.conv_phi, self.conv_g = (nn.Conv3d(channels, inner, 1) for _ in range(3))
        self.conv_out = nn.Conv3d(inner, channels, 1)
        self.bn = nn.BatchNorm3d(channels)
        self.pool = nn.MaxPool3d((1, 2, 2), (1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(x)
        n, inner = len(x), self.conv_theta.out_channels
        theta, phi, g = (
            conv(t).view(n, inner, -1)
            for conv, t in ((self.conv_theta, x), (self.conv_phi, pooled), (self.conv_g, pooled))
        )
        weights = torch.einsum("nct,ncp->ntp", theta, phi) / phi.shape[2]
        y = torch.einsum("ntg,ncg->nct", weights, g).view(n, inner, *x.shape[2:])
        return x + self.bn(self.conv_out(y))


class ResStage(nn.Module):
    def __init__(self, plan: Plan, stage: int) -> None:
        super().__init__()
        self.pathways = plan.pathways
        for pathway in range(plan.pathways):
            for index, block in enumerate(plan.stage(pathway, stage)):
                self.add_module(f"pathway{pathway}_res{index}", ResBlock(block))
                if pathway == 0 and (stage, index) in plan.nonlocal_blocks:
                    self.add_module(f"pathway0_nonlocal{index}", Nonlocal(block.dim_inner * 4))

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        out = list(x)
        for name, block in self.named_children():
            pathway = int(name[len("pathway")])
            out[pathway] = block(out[pathway])
        return out


class FuseFastToSlow(nn.Module):
    def __init__(self, plan: Plan, stage: int) -> None:
        super().__init__()
        self.conv_f2s = plan.lateral(stage)
        self.bn = plan.make_norm(self.conv_f2s.out_channels)
        self.relu = nn.ReLU(True)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        return [torch.cat([x[0], self.relu(self.bn(self.conv_f2s(x[1])))], 1), x[1]]


class ResNetBasicHead(nn.Module):
    def __init__(self, plan: Plan) -> None:
        super().__init__()
        for pathway, pool in enumerate(plan.pools()):
            self.add_module(f"pathway{pathway}_avgpool", pool)
        self.projection = nn.Linear(sum(plan.features), plan.classes, bias=plan.classifier_bias)
        self.act = nn.Softmax(dim=4)

    def forward(self, x: list[Tensor]) -> Tensor:
        pooled = [getattr(self, f"pathway{pathway}_avgpool")(tensor) for pathway, tensor in enumerate(x)]
        y = self.projection(torch.cat(pooled, 1).permute(0, 2, 3, 4, 1))
        if not self.training:
            y = self.act(y).mean([1, 2, 3])
        return y.view(y.shape[0], -1)


class ROIAlign(nn.Module):
    """detectron2's."""

    def __init__(self, output_size: int, spatial_scale: float, sampling_ratio: int, aligned: bool) -> None:
        super().__init__()
        self.output_size, self.spatial_scale = output_size, spatial_scale
        self.sampling_ratio, self.aligned = sampling_ratio, aligned

    def forward(self, x: Tensor, rois: Tensor) -> Tensor:
        size = (self.output_size, self.output_size)
        return roi_align(x, rois, size, self.spatial_scale, self.sampling_ratio, self.aligned)


class ResNetRoIHead(nn.Module):
    """Of boxes (B, 5), every pathway sampled by itself."""

    def __init__(self, plan: Plan, resolution: int = 3, scale_factors: tuple[float, ...] = (16.0, 16.0)) -> None:
        super().__init__()
        frames = (plan.frames, plan.frames * plan.alpha)
        self.num_pathways = plan.pathways
        for pathway in range(plan.pathways):
            self.add_module(f"s{pathway}_tpool", nn.AvgPool3d([frames[pathway], 1, 1], stride=1))
            align = ROIAlign(resolution, 1.0 / scale_factors[pathway], 0, True)
            self.add_module(f"s{pathway}_roi", align)
            self.add_module(f"s{pathway}_spool", nn.MaxPool2d(resolution, stride=1))
        self.dropout = nn.Dropout(0.5)
        self.projection = nn.Linear(sum(plan.features), plan.classes)
        self.act = nn.Sigmoid()

    def forward(self, x: list[Tensor], bboxes: Tensor) -> Tensor:
        pooled = []
        for pathway in range(self.num_pathways):
            frame = getattr(self, f"s{pathway}_tpool")(x[pathway])
            assert frame.shape[2] == 1
            cells = getattr(self, f"s{pathway}_roi")(frame.squeeze(2), bboxes)
            pooled.append(getattr(self, f"s{pathway}_spool")(cells))
        features = self.dropout(torch.cat(pooled, 1))
        return self.act(self.projection(features.view(features.shape[0], -1)))


class SlowFast(nn.Module):
    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.s1 = VideoModelStem(plan)
        for stage in range(5):
            if stage:
                self.add_module(f"s{stage + 1}", ResStage(plan, stage - 1))
            if stage < 4 and plan.pathways == 2:
                self.add_module(f"s{stage + 1}_fuse", FuseFastToSlow(plan, stage))
            if stage == 1:
                for pathway in range(plan.pathways):
                    self.add_module(f"pathway{pathway}_pool", nn.MaxPool3d(1, 1))
        self.head = ResNetBasicHead(plan)

    def forward(self, x: list[Tensor], bboxes: Tensor | None = None) -> Tensor:
        x = x[:]
        for stage in range(5):
            x = getattr(self, f"s{stage + 1}")(x)
            if hasattr(self, f"s{stage + 1}_fuse"):
                x = getattr(self, f"s{stage + 1}_fuse")(x)
            if stage == 1:
                x = [getattr(self, f"pathway{pathway}_pool")(tensor) for pathway, tensor in enumerate(x)]
        return self.head(x) if bboxes is None else self.head(x, bboxes)


ResNet = type("ResNet", (SlowFast,), {"__module__": __name__})  # what the library calls one pathway


def build(plan: Plan) -> nn.Module:
    """A list with a clip for each pathway -> logits in training, probabilities in evaluation."""
    return (SlowFast if plan.pathways == 2 else ResNet)(plan)
