"""From a network to its frozen form: :func:`freeze`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _triple

from .frozen.blocks import (
    AsItIs,
    Connection,
    FrozenBlock,
    FrozenMaxPool,
    FrozenNonLocal,
    FrozenPathways,
    FrozenStage,
    FrozenStem,
    PartlyFrozen,
)
from .frozen.convolution import FrozenConv
from .frozen.folding import (
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
    not_transposed,
)
from .frozen.head import FrozenHead, FrozenPools
from .frozen.joins import FrozenJoin, FrozenLaterals, Move
from .frozen.lateral import FrozenFrames, FrozenLateral
from .frozen.network import Clips, FrozenNetwork
from .nn.bottleneck import BasicBlock, BottleneckBlock
from .nn.fused import Parts, is_observed
from .nn.head import ResNetBasicHead
from .nn.lateral import FuseFastToSlow, FuseLaterals, only_moves_frames
from .nn.net import DetectionBBoxNetwork, MultiPathWayWithFuse, Net, PoolConcatPathway
from .nn.non_local import NonLocal
from .nn.rearrange import ChannelToTime, RepeatFrames, SampleFrames, TimeToChannel
from .nn.stage import ResBlock, ResStage, add
from .nn.stem import ResNetBasicStem

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def freeze(model: nn.Module, *, dtype: torch.dtype | None = None, cuda_graph: bool = False) -> FrozenNetwork:
    """``model`` for inference: BatchNorm folded into the weights, every layer with its sum and ReLU one kernel.

    The model is left as it is, in whatever mode and on whatever device; the result has the same call, computes what
    the model does in evaluation mode, and shares no memory with it. Pieces that cannot be folded (another norm or
    activation, a module with hooks, a replaced head) run as they are, copied and in evaluation mode;
    :func:`slowfast_fast.explain` names them, and the kernel of every layer.

    Args:
        model: what ``create_slowfast``, ``create_slowfast_with_roi_head``, ``create_resnet`` or ``create_model`` made,
            with whatever weights; its head may be replaced or ``nn.Identity``.
        dtype: float32, float16, bfloat16 or float64, of weights, activations, clips and logits; sums are kept in
            float32 at least. None: that of the model.
        cuda_graph: on a CUDA device, replay a CUDA graph for every shape of clips, captured at the first call
            with it. Where that cannot be done, a warning says why, and the call runs without.

    Returns:
        A :class:`slowfast_fast.frozen.network.FrozenNetwork`.

    Raises:
        TypeError: the model is none of this package's, or dtype is not as above. A model of another library goes by
            its weights: see ``convert_state_dict``.
    """
    model = cast(nn.Module, getattr(model, "_orig_mod", model))  # of torch.compile
    head: nn.Module | None = None
    body = model
    if type(model) is DetectionBBoxNetwork:
        body, head = model.model, model.detection_head
    if type(body) is not Net:
        raise TypeError(
            "model must be what slowfast_fast.create_slowfast or create_slowfast_with_roi_head makes; got "
            f"{type(model).__name__}. To freeze a model of another library, accelerated or not, load its weights into "
            "such a network (slowfast_fast.convert_state_dict, or load_checkpoint from a file) and freeze that"
        )
    if dtype is None:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be float32, float16, bfloat16, float64 or None; got {dtype!r}")
    with torch.no_grad():
        freezer = _Freezer(dtype)
        blocks = freezer.blocks(list(body.blocks))
        frozen_head = None if head is None else freezer.as_it_is(head, "heads that take boxes are not frozen")
    return FrozenNetwork(blocks, frozen_head, _clips(blocks, body), dtype, cuda_graph)


class _Freezer:
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
            elif type(block) is nn.MaxPool3d:
                frozen.append(self.pool(block))
            elif type(block) is ResNetBasicHead and not_linear(block, [block]) is None:
                frozen.append(self.head([block.pool], block))
            elif (reason := not_head(block, after)) is None:
                pools = cast(PoolConcatPathway, block).pool
                frozen.append(self.head([None] if pools is None else list(pools), cast(ResNetBasicHead, after)))
                index += 1
            elif after is None and not_pools(block) is None:
                pools = cast(PoolConcatPathway, block).pool
                frozen.append(FrozenPools([self.copy(pool) for pool in cast(nn.ModuleList, pools)]))
            elif type(block) is PoolConcatPathway:
                frozen.append(self.as_it_is(block, reason))
            else:
                frozen.append(self.as_it_is(block, "no frozen layer stands for it"))
            index += 1
        return frozen

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
        return FrozenNonLocal(
            pool=None if block.pool is None else self.pool(block.pool),
            theta=self.conv(block.conv_theta, None, None),
            phi=self.conv(block.conv_phi, None, None),
            g=self.conv(block.conv_g, None, None),
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
            in_time = (kernel[0], stride[0], padding[0]) != (1, 1, 0)
            if square and not in_time and dilation == (1, 1, 1) and not (pool.ceil_mode or pool.return_indices):
                return FrozenMaxPool(kernel[1], stride[1], padding[1])
        return self.as_it_is(pool, "not a max pool over square windows in H and W")

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

    def head(self, pools: Sequence[nn.Module | None], head: ResNetBasicHead) -> nn.Module:
        proj = cast(nn.Linear, head.proj)
        bias = proj.weight.new_zeros(proj.out_features) if proj.bias is None else proj.bias
        return FrozenHead(
            proj.weight.detach().to(self.exact, copy=True),
            bias.detach().to(self.exact, copy=True),
            [None if p is None else self.copy(p) for p in pools],
            None if head.activation is None else self.copy(head.activation),
            head.output_pool is not None,
        )

    def as_it_is(self, module: nn.Module, reason: str) -> nn.Module:
        return AsItIs(self.copy(module), reason)

    def copy(self, module: nn.Module) -> nn.Module:
        return copy.deepcopy(module).eval().requires_grad_(False).to(self.dtype)


def _clips(blocks: list[nn.Module], body: Net) -> Clips:
    """What the network takes, as its stems and first lateral connection say."""
    alone = type(body.blocks[0]) is not MultiPathWayWithFuse
    stems = [body.blocks[0]] if alone else cast(MultiPathWayWithFuse, body.blocks[0]).multipathway_blocks
    channels = tuple(getattr(getattr(stem, "conv", None), "in_channels", 0) for stem in stems)
    if not channels or 0 in channels:
        raise TypeError("the model's first block must hold a stem with a convolution for each pathway")
    first = blocks[0]
    if not isinstance(first, FrozenPathways) or len(channels) != 2:
        return Clips(channels, alone)
    fusion = first.multipathway_fusion
    lateral = (fusion.to_slow or fusion.to_fast) if isinstance(fusion, FrozenLaterals) else fusion
    layers: list[Any] = [stem.conv for stem in first.multipathway_blocks if isinstance(stem, FrozenStem)]
    pools = [stem.pool for stem in first.multipathway_blocks if isinstance(stem, FrozenStem)]
    known = all(isinstance(layer, FrozenConv) for layer in layers) and len(layers) == 2
    if not (known and isinstance(lateral, Connection)) or any(isinstance(pool, AsItIs) for pool in pools):
        return Clips(channels)
    slow, fast = ((conv.weight.shape[2], conv.stride[0], conv.padding[0], conv.dilation[0]) for conv in layers)
    return Clips(channels, frames=((slow,), (fast, lateral.window())))
