from __future__ import annotations

import torch
from torch import Tensor, nn

from .plan import Block, Plan


class ResNetBasicStem(nn.Module):
    def __init__(self, plan: Plan, pathway: int) -> None:
        super().__init__()
        self.conv = plan.stem(pathway)
        self.norm = plan.make_norm(plan.width_of(pathway))
        self.activation = plan.make_act()
        self.pool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.conv, self.norm, self.activation, self.pool):
            x = x if layer is None else layer(x)
        return x


class BottleneckBlock(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        for letter, conv in zip("abc", block.convolutions(), strict=True):
            setattr(self, f"conv_{letter}", conv)
            setattr(self, f"norm_{letter}", block.plan.make_norm(conv.out_channels))
            if letter != "c":
                setattr(self, f"act_{letter}", block.plan.make_act())

    def forward(self, x: Tensor) -> Tensor:
        for name in ("conv_a", "norm_a", "act_a", "conv_b", "norm_b", "act_b", "conv_c", "norm_c"):
            layer = getattr(self, name)
            x = x if layer is None else layer(x)
        return x


def _trivial_sum(x: Tensor, y: Tensor) -> Tensor:
    return x + y


class ResBlock(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        self.branch1_conv = block.shortcut()
        if self.branch1_conv is not None:
            self.branch1_norm = block.plan.make_norm(self.branch1_conv.out_channels)
        self.branch2 = BottleneckBlock(block)
        self.activation = block.plan.make_act()
        self.branch_fusion = _trivial_sum

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.branch1_conv is None else self.branch1_conv(x)
        if self.branch1_conv is not None and self.branch1_norm is not None:
            shortcut = self.branch1_norm(shortcut)
        x = self.branch_fusion(shortcut, self.branch2(x))
        return x if self.activation is None else self.activation(x)


class ResStage(nn.Module):
    def __init__(self, plan: Plan, pathway: int, stage: int) -> None:
        super().__init__()
        self.res_blocks = nn.ModuleList(map(ResBlock, plan.stage(pathway, stage)))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.res_blocks:
            x = block(x)
        return x


class FuseFastToSlow(nn.Module):
    def __init__(self, plan: Plan, stage: int) -> None:
        super().__init__()
        self.conv_fast_to_slow = plan.lateral(stage)
        self.norm = plan.make_norm(self.conv_fast_to_slow.out_channels) if plan.fusion_norm else None
        self.activation = plan.make_act() if plan.fusion_norm else None

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        fused = self.conv_fast_to_slow(x[1])
        for layer in (self.norm, self.activation):
            fused = fused if layer is None else layer(fused)
        return [torch.cat([x[0], fused], 1), x[1]]


class MultiPathWayWithFuse(nn.Module):
    def __init__(self, blocks: list[nn.Module], fusion: nn.Module) -> None:
        super().__init__()
        self.multipathway_blocks = nn.ModuleList(blocks)
        self.multipathway_fusion = fusion

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        for pathway, block in enumerate(self.multipathway_blocks):
            x[pathway] = block(x[pathway])  # the caller's list, as in the library
        return self.multipathway_fusion(x)


class PoolConcatPathway(nn.Module):
    def __init__(self, pools: list[nn.Module]) -> None:
        super().__init__()
        self.retain_list = False
        self.pool = nn.ModuleList(pools)

    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.cat([pool(pathway) for pool, pathway in zip(self.pool, x, strict=True)], 1)


class ResNetBasicHead(nn.Module):
    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.proj = nn.Linear(sum(plan.features), plan.classes, bias=plan.classifier_bias)
        self.output_pool = nn.AdaptiveAvgPool3d(1)

    def forward(self, x: Tensor) -> Tensor:
        if self.proj is not None:
            x = self.proj(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)
        x = self.output_pool(x)
        return x.view(x.shape[0], -1)


class Net(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: list[Tensor] | Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def build(plan: Plan) -> nn.Module:
    """[slow, fast] -> logits; of one pathway, its clip -> logits."""
    stems: list[nn.Module] = [ResNetBasicStem(plan, pathway) for pathway in range(plan.pathways)]
    stages = [[ResStage(plan, pathway, stage) for stage in range(4)] for pathway in range(plan.pathways)]
    if plan.pathways == 1:
        head = ResNetBasicHead(plan)
        head.output_pool = nn.Identity()
        return Net([*stems, *stages[0], nn.AdaptiveAvgPool3d(1), head])
    blocks = [
        MultiPathWayWithFuse(list(both), FuseFastToSlow(plan, index) if index < 4 else nn.Identity())
        for index, both in enumerate([stems, *zip(*stages, strict=True)])
    ]
    return Net([*blocks, PoolConcatPathway(plan.pools()), ResNetBasicHead(plan)])
