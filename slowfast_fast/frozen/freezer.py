"""From the blocks of nn/ to frozen layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _triple

from ..nn.bottleneck import BasicBlock, BottleneckBlock
from ..nn.fused import Parts, is_observed
from ..nn.head import ResNetBasicHead, ResNetRoIHead
from ..nn.lateral import FuseFastToSlow, FuseLaterals, only_moves_frames
from ..nn.net import MultiPathWayWithFuse, PoolConcatPathway
from ..nn.non_local import NonLocal
from ..nn.rearrange import ChannelToTime, RepeatFrames, SampleFrames, TimeToChannel
from ..nn.stage import ResBlock, ResStage, add
from ..nn.stem import ResNetBasicStem
from .blocks import (
    AsItIs,
    FrozenBlock,
    FrozenMaxPool,
    FrozenNonLocal,
    FrozenPathways,
    FrozenStage,
    FrozenStem,
    PartlyFrozen,
)
from .convolution import FrozenConv
from .folding import (
    OBSERVED,
    absent_as_none,
    as_plain,
    folded,
    not_conv,
    not_head,
    not_linear,
    not_norm,
    not_pools,
    not_relu,
    not_roi_head,
    not_transposed,
)
from .frame_max import FrozenFrameMax
from .head import FrozenHead, FrozenPools, FrozenRoIHead
from .joins import FrozenJoin, FrozenLaterals, Move
from .lateral import FrozenFrames, FrozenLateral


class Freezer:
    """Makes frozen layers of a dtype out of modules. Whatever it does not know it copies."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.exact = torch.promote_types(dtype, torch.float32)  # of shifts and the head

    def blocks(self, blocks: list[nn.Module]) -> list[nn.Module]:
        frozen: list[nn.Module] = []
        index = 0
        while index < len(blocks):
            block, after = blocks[index], blocks[index + 1] if index + 1 < len(blocks) else None
            if type(block) is MultiPathWayWithFuse and not is_observed(block):
                frozen.append(self.pathways(block))
            elif type(block) in (ResNetBasicStem, ResStage):
                frozen.append(cast(nn.Module, self.pathway(block)))
            elif type(block) is ResBlock:
                frozen.append(self.res_block(block))
            elif type(block) is nn.MaxPool3d:
                frozen.append(self.pool(block))
            elif type(block) is ResNetRoIHead:
                frozen.append(self.detector([], block)[1])
            elif type(block) is PoolConcatPathway and type(after) is ResNetRoIHead:
                before, head = self.detector([block], after)
                frozen += [*before, head]
                index += 1
            elif type(block) is ResNetBasicHead and not_linear(block) is None:
                frozen.append(self.head([block.pool], block))
            elif type(block) is PoolConcatPathway and not_pools(block) is None:
                if not_head(block, after) is None:
                    frozen.append(self.head(_pools(block), cast(ResNetBasicHead, after)))
                    index += 1
                else:
                    frozen.append(FrozenPools(self.copies(_pools(block)), block.retain_list))
            else:
                why_not = {PoolConcatPathway: not_pools, ResNetBasicHead: not_linear}.get(type(block))
                reason = None if why_not is None else why_not(block)
                frozen.append(self.as_it_is(block, reason or "no frozen layer stands for it"))
            index += 1
        return frozen

    def detector(self, blocks: list[nn.Module], head: nn.Module) -> tuple[list[nn.Module], nn.Module]:
        """The blocks that give features, and a head that takes these and boxes."""
        why_not = not_roi_head(head)
        if why_not is not None:
            return self.blocks(blocks), self.as_it_is(head, why_not)
        known = cast(ResNetRoIHead, head)
        pools: list[nn.Module | None] = [known.pool]
        last = blocks[-1] if blocks else None
        if known.pool is None and type(last) is PoolConcatPathway and not (last.retain_list or not_pools(last)):
            pools, blocks = _pools(last), blocks[:-1]
        roi = FrozenRoIHead(
            self.copies(pools),
            self.copy(cast(nn.Module, known.roi_layer)),
            None if known.pool_spatial is None else self.copy(known.pool_spatial),
            self.head([None], known),
        )
        return self.blocks(blocks), roi

    def pathways(self, module: MultiPathWayWithFuse) -> nn.Module:
        fusion = module.multipathway_fusion
        return FrozenPathways(
            [self.pathway(block) for block in module.multipathway_blocks],
            None if fusion is None or type(fusion) is nn.Identity else self.fusion(fusion),
        )

    def pathway(self, block: nn.Module | None) -> nn.Module | None:
        if block is None:
            return None
        if is_observed(block):
            return self.as_it_is(block, OBSERVED)
        if type(block) is ResNetBasicStem:
            pool = None if block.pool is None else self.pool(block.pool)
            return FrozenStem(self.conv(block.conv, block.norm, block.activation), pool)
        if type(block) is ResStage:
            return FrozenStage([self.res_block(part) for part in block.blocks()])
        if type(block) is nn.MaxPool3d:
            return self.pool(block)
        return self.as_it_is(block, f"{type(block).__name__} is neither a stem nor a stage")

    def res_block(self, block: nn.Module) -> nn.Module:
        if type(block) is NonLocal and not is_observed(block):
            return self.non_local(block)
        if type(block) is not ResBlock or type(block.branch2) not in (BottleneckBlock, BasicBlock):
            return self.as_it_is(block, "not a residual block around a bottleneck or a basic block")
        if block.branch_fusion is not add:
            return self.as_it_is(block, "its branch_fusion is not the sum")
        if is_observed(block) or is_observed(block.branch2):
            return self.as_it_is(block, OBSERVED)
        *inner, (conv, norm, _) = cast(BottleneckBlock, block.branch2).layers()
        layers = [self.conv(*layer) for layer in inner] + [self.conv(conv, norm, block.activation)]
        return FrozenBlock(
            None if block.branch1_conv is None else self.conv(block.branch1_conv, block.branch1_norm, None),
            layers[0],
            layers[1],
            layers[2] if len(layers) == 3 else None,
        )

    def non_local(self, block: NonLocal) -> nn.Module:
        pool = None if block.pool is None else self.pool(block.pool)
        keys, values = (self.conv(conv, None, None) for conv in (block.conv_phi, block.conv_g))
        if pool is not None and block.pools_projected:
            keys, values, pool = nn.Sequential(keys, pool), nn.Sequential(values, pool), None
        return FrozenNonLocal(
            pool=pool,
            theta=self.conv(block.conv_theta, None, None),
            phi=keys,
            g=values,
            attention=self.copy(block.attention),
            out=self.conv(block.conv_out, block.norm, None),
        )

    def fusion(self, fusion: nn.Module) -> nn.Module:
        if is_observed(fusion):
            return self.as_it_is(fusion, OBSERVED)
        if type(fusion) is FuseFastToSlow:
            frozen = self.lateral((fusion.conv_fast_to_slow, fusion.norm, fusion.activation), "concat", False)
            return self.as_it_is(fusion, frozen) if isinstance(frozen, str) else frozen
        if type(fusion) is not FuseLaterals:
            return self.as_it_is(fusion, "not a lateral connection")
        parts: list[nn.Module | None] = []
        for part, to_fast in ((fusion.fast_to_slow, False), (fusion.slow_to_fast, True)):
            if part is None:
                parts.append(None)
                continue
            layer: Parts = (part.transform, part.norm, part.activation)
            frozen = OBSERVED if is_observed(part) else self.lateral(layer, part.join, to_fast)
            if isinstance(frozen, str):
                return self.as_it_is(fusion, f"from {'slow to fast' if to_fast else 'fast to slow'}: {frozen}")
            parts.append(frozen)
        if parts[1] is None:
            return self.as_it_is(fusion, "it connects nothing") if parts[0] is None else parts[0]
        return FrozenLaterals(parts[0], cast(FrozenJoin, parts[1]))

    def lateral(self, layer: Parts, join: str, to_fast: bool) -> nn.Module | str:
        """One direction of a lateral connection, or why it cannot be frozen."""
        transform, norm, act = layer[0], absent_as_none(layer[1]), absent_as_none(layer[2])
        if (why_not := not_norm(norm) or not_relu(act)) is not None:
            return why_not
        relu = act is not None
        if isinstance(transform, (TimeToChannel, SampleFrames, ChannelToTime, RepeatFrames)):
            if is_observed(transform):
                return OBSERVED
            move = cast(Move, self.copy(transform))
            if only_moves_frames(transform, norm, act) and join == "concat":
                return FrozenFrames(cast("TimeToChannel | SampleFrames", move))
            if norm is None:
                after = None if act is None else self.as_it_is(act, "no op is an activation alone")
                return FrozenJoin(move, after, move.alpha, to_fast, join)
            sampled = isinstance(move, SampleFrames)
            scaled = self.scaled(norm, relu, move.alpha if sampled else 1)
            return FrozenJoin(None if sampled else move, scaled, move.alpha, to_fast, join)
        if to_fast:
            why_not = not_transposed(transform)
            return why_not or self.transposed(cast(nn.ConvTranspose3d, transform), norm, relu, join)
        if (why_not := not_conv(transform)) is not None:
            return why_not
        conv = self.fold(cast(nn.Conv3d, transform), norm, relu)
        if join == "concat" and conv.is_temporal() and conv.dilation[0] == 1:
            return FrozenLateral(conv)
        return FrozenJoin(None, conv, conv.stride[0], False, join)

    def scaled(self, norm: nn.Module, relu: bool, stride: int) -> FrozenConv:
        """A norm that follows no convolution, as one of each channel by itself, which takes every stride-th frame."""
        mean = cast(Tensor, cast(nn.BatchNorm3d, norm).running_mean)
        channels = mean.shape[0]
        weight, shift = folded(mean.new_ones(channels, 1, 1, 1, 1), None, norm)
        return self.frozen_conv(weight, shift, stride=(stride, 1, 1), groups=channels, relu=relu)

    def transposed(self, conv: nn.ConvTranspose3d, norm: nn.Module | None, relu: bool, join: str) -> FrozenJoin:
        alpha = conv.stride[0]
        weight, shift = folded(conv.weight.transpose(0, 1), conv.bias, norm)
        plain = as_plain(weight, alpha, cast(int, conv.padding[0]))
        layer = self.frozen_conv(plain, shift.repeat(alpha), padding=(plain.shape[2] // 2, 0, 0), relu=relu)
        return FrozenJoin(None, layer, alpha, True, join)

    def pool(self, pool: nn.Module) -> nn.Module:
        if type(pool) is nn.MaxPool3d and not is_observed(pool):
            kernel, stride, padding, dilation = (
                _triple(v) for v in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
            )
            square = all(v[1] == v[2] for v in (kernel, stride, padding))
            if square and dilation == (1, 1, 1) and not (pool.ceil_mode or pool.return_indices):
                if kernel[0] == 1:  # frames one by one
                    return FrozenMaxPool(kernel[1], stride[1], padding[1], stride[0])
                if (kernel[1], stride[1]) == (1, 1):
                    return FrozenFrameMax(kernel[0], stride[0], padding[0])
        return self.as_it_is(pool, "not a max pool over square windows in H and W, or over frames alone")

    def conv(self, conv: nn.Module, norm: nn.Module | None, act: nn.Module | None) -> nn.Module:
        """The layer ``act(norm(conv(x)) + residual)``: a FrozenConv, or what is left of it in a PartlyFrozen."""
        norm, act = absent_as_none(norm), absent_as_none(act)
        why_conv, why_norm, why_act = not_conv(conv), not_norm(norm), not_relu(act)
        if why_conv is not None:
            return PartlyFrozen(
                self.as_it_is(conv, why_conv),
                None if norm is None else self.as_it_is(norm, why_norm or "its convolution cannot be folded"),
                None if act is None else self.as_it_is(act, why_act or "its convolution cannot be folded"),
            )
        folds = why_norm is None
        relu = folds and act is not None and why_act is None
        frozen = self.fold(cast(nn.Conv3d, conv), norm if folds else None, relu)
        if folds and why_act is None:
            return frozen
        return PartlyFrozen(
            frozen,
            None if folds or norm is None else self.as_it_is(norm, str(why_norm)),
            None if act is None else self.as_it_is(act, why_act or "its norm cannot be folded"),
        )

    def fold(self, conv: nn.Conv3d, norm: nn.Module | None, relu: bool) -> FrozenConv:
        weight, shift = folded(conv.weight, conv.bias, norm)
        geometry = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}
        return self.frozen_conv(weight, shift, **geometry, relu=relu)

    def frozen_conv(self, weight: Tensor, shift: Tensor, **layer: Any) -> FrozenConv:
        """``weight`` and ``shift`` in the network's dtypes; ``layer``: what else FrozenConv takes."""
        return FrozenConv(weight.to(self.dtype).contiguous(), shift.to(self.exact), **layer)

    def head(self, pools: Sequence[nn.Module | None], head: ResNetBasicHead | ResNetRoIHead) -> FrozenHead:
        """What is behind ``pools``, which stand for those of the head."""
        proj = cast(nn.Linear, head.proj)
        bias = proj.weight.new_zeros(proj.out_features) if proj.bias is None else proj.bias
        return FrozenHead(
            proj.weight.detach().to(self.exact, copy=True),
            bias.detach().to(self.exact, copy=True),
            self.copies(pools),
            None if head.activation is None else self.copy(head.activation),
            head.output_pool is not None,
        )

    def as_it_is(self, module: nn.Module, reason: str) -> nn.Module:
        return AsItIs(self.copy(module), reason)

    def copies(self, modules: Sequence[nn.Module | None]) -> list[nn.Module | None]:
        return [None if module is None else self.copy(module) for module in modules]

    def copy(self, module: nn.Module) -> nn.Module:
        return copy.deepcopy(module).eval().requires_grad_(False).to(self.dtype)


def _pools(block: PoolConcatPathway) -> list[nn.Module | None]:
    """One for each pathway, or for every one that there is."""
    return [] if block.pool is None else list(block.pool)
