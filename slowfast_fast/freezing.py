"""From a model to its frozen form: :func:`freeze`."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn

from .compat._accelerate import LIBRARIES, accelerate
from .compat._networks import Network, read_network
from .compat._reading import read
from .frozen.blocks import AsItIs, Connection, FrozenMaxPool, FrozenPathways, FrozenStem
from .frozen.convolution import FrozenConv
from .frozen.frame_max import FrozenFrameMax
from .frozen.freezer import Freezer
from .frozen.inference import FrozenModel
from .frozen.joins import FrozenLaterals
from .frozen.network import Clips, FrozenNetwork
from .nn.net import DetectionBBoxNetwork, MultiPathWayWithFuse, Net
from .nn.network_units import TwoPathways

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def freeze(
    model: nn.Module, *, dtype: torch.dtype | None = None, cuda_graph: bool = False
) -> FrozenNetwork | FrozenModel:
    """``model`` for inference: BatchNorm folded into the weights, every layer with its sum and ReLU one kernel.

    The model is left as it is, in whatever mode and on whatever device; the result has the same call, computes what
    the model does in evaluation mode, and shares no memory with it. Pieces that cannot be folded (another norm or
    activation, a module with hooks, a replaced head) run as they are, copied and in evaluation mode;
    :func:`slowfast_fast.explain` names them, and the kernel of every layer.

    Args:
        model: what ``create_slowfast``, ``create_slowfast_with_roi_head``, ``create_resnet`` or ``create_model`` made,
            with whatever weights; its head may be replaced or ``nn.Identity``. Or a model of a library that
            ``accelerate`` knows, accelerated or not; or any model that holds one of both.
        dtype: float32, float16, bfloat16 or float64, of weights, activations, clips and logits; sums are kept in
            float32 at least. None: that of the model.
        cuda_graph: on a CUDA device, replay a CUDA graph for every shape of clips, captured at the first call
            with it. Where that cannot be done, a warning says why, and the call runs without.

    Returns:
        A :class:`slowfast_fast.frozen.network.FrozenNetwork`; where the network is not known as a whole, a
        :class:`slowfast_fast.frozen.inference.FrozenModel`, whose ``module`` is a copy with frozen parts.

    Raises:
        TypeError: nothing in the model is known, or dtype is not as above.
    """
    model = cast(nn.Module, getattr(model, "_orig_mod", model))  # of torch.compile
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if dtype is None:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be float32, float16, bfloat16, float64 or None; got {dtype!r}")
    with torch.no_grad():
        network = read_network(model) if _is_ours(model) else None
        if network is not None:
            return _network(network, Freezer(dtype), cuda_graph)
        copied = copy.deepcopy(model).eval()
        known, why_not = _accelerated(copied)
        frozen: dict[int, nn.Module] = {}
        whole = _frozen(copied, Freezer(dtype), frozen) if known else None
        if isinstance(whole, FrozenNetwork):
            whole.cuda_graph = cuda_graph
            return whole
        if not frozen:
            raise TypeError(
                "model must be what slowfast_fast.create_slowfast, create_resnet or create_model makes, or hold blocks "
                f"of a library that slowfast_fast.accelerate knows; got {type(model).__name__}: {why_not}"
            )
        return FrozenModel(whole or copied, frozen.values(), dtype, cuda_graph)


def _is_ours(model: nn.Module) -> bool:
    return type(model) in (Net, DetectionBBoxNetwork)


def _accelerated(model: nn.Module) -> tuple[bool, str]:
    """Whether there are known blocks in ``model``, all of which are made known to ``read``; and why not."""
    try:
        report = accelerate(model)
    except ValueError as error:
        return any(_is_ours(module) for module in model.modules()), str(error)
    left = "; ".join(f"{row.path or 'the model'} ({row.kind}): {row.reason}" for row in report.left)
    return bool(report.accelerated), left


def _frozen(
    module: nn.Module, freezer: Freezer, found: dict[int, nn.Module], by_itself: bool = True
) -> nn.Module | None:
    """What stands for a module as a whole; None, after the same was done for its children, where nothing does.

    ``found`` has what was frozen, by the identity of what it stands for. ``by_itself``: it is called as a whole, so
    that it may be a network.
    """
    if id(module) not in found:
        network = read_network(module) if by_itself else None
        if network is not None:
            found[id(module)] = _network(network, freezer, cuda_graph=False)
        elif (block := read(module)) is not None:
            pieces = freezer.blocks(list(block) if type(block) is nn.Sequential else [block])
            found[id(module)] = pieces[0] if len(pieces) == 1 else nn.Sequential(*pieces)
        elif type(module) is nn.MaxPool3d and not isinstance(pool := freezer.pool(module), AsItIs):
            found[id(module)] = pool
        else:
            by_itself = by_itself and not _calls_parts_of_parts(module)
            for name, child in list(module._modules.items()):
                if child is not None and (stands := _frozen(child, freezer, found, by_itself)) is not None:
                    module._modules[name] = stands
    return found.get(id(module))


def _calls_parts_of_parts(module: nn.Module) -> bool:
    """Whether it is a network that runs its pathways by their stages."""
    units = (library.units.get(kind.__name__) for kind in type(module).__mro__ for library in LIBRARIES)
    return any(isinstance(unit, TwoPathways) for unit in units)


def _network(network: Network, freezer: Freezer, cuda_graph: bool) -> FrozenNetwork:
    head = None
    if network.detection_head is None:
        blocks = freezer.blocks(network.blocks)
    else:
        blocks, head = freezer.detector(network.blocks, network.detection_head)
    return FrozenNetwork(blocks, head, _clips(blocks, network), freezer.dtype, cuda_graph)


def _clips(blocks: list[nn.Module], network: Network) -> Clips:
    """What the network takes, as its stems and first lateral connection say."""
    given = network.blocks[0]
    alone = type(given) is not MultiPathWayWithFuse
    stems = [given] if alone else cast(MultiPathWayWithFuse, given).multipathway_blocks
    channels = tuple(getattr(getattr(stem, "conv", None), "in_channels", 0) for stem in stems)
    if not channels or 0 in channels:
        raise TypeError("the model's first block must hold a stem with a convolution for each pathway")
    if network.sampling is not None:
        return Clips(channels[:1], alone=True, sampling=network.sampling)
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
    convolutions = [(conv.weight.shape[2], conv.stride[0], conv.padding[0], conv.dilation[0]) for conv in layers]
    of_pools = [pool.frames() if isinstance(pool, (FrozenMaxPool, FrozenFrameMax)) else (1, 1, 0, 1) for pool in pools]
    slow, fast = zip(convolutions, of_pools, strict=True)
    return Clips(channels, frames=(slow, (*fast, lateral.window())))
