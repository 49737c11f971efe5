"""Which kernel a frozen layer or block takes: the one that was fastest when the device was measured
(``tuned/frozen_<device>.json``, by ``python -m slowfast_fast tune --frozen``), elsewhere the one that ought to be. And
how many clips go through a network at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import choosing
from .._extension import cpu_capability

# What a block may run as.
ONE_KERNEL, LAYERS = "bottleneck", "layers"
# Clips of a large batch that a CPU takes at a time: enough work for its cores, and the activations of no more. Parts of
# one or two are no faster with two threads (docs/performance.md, "Frozen layers").
MOST_CLIPS = 4


def layer_key(weight_shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, tf32: bool) -> str:
    """The class of a convolution: channels as in choosing.py, kernel, whether it is strided."""
    k, c, *taps = weight_shape
    strided = " strided" if max(stride) > 1 else ""
    shape = f"{choosing.channel_class(c)}->{choosing.channel_class(k)} {'x'.join(map(str, taps))}{strided}"
    return choosing.table_key("layer", "fwd", dtype, tf32, shape)


def block_key(channels: Sequence[int], stride: int, projects: bool, dtype: torch.dtype, tf32: bool) -> str:
    """The class of a residual block by its channels C, J, K."""
    kind = "strided" if stride > 1 else "projecting" if projects else "identity"
    shape = "->".join(str(choosing.channel_class(count)) for count in channels)
    return choosing.table_key("block", "fwd", dtype, tf32, f"{shape} {kind}")


def device_name(device: str, ordinal: int | None) -> str:
    """What a table of frozen layers is named after: a GPU, or the instruction set of a CPU."""
    kind = choosing.cuda_device(ordinal)[0] if device == "cuda" else f"{device} {cpu_capability()}"
    return f"frozen {kind}"


_chosen: dict[tuple[object, ...], tuple[str, str]] = {}


def choose(able: tuple[str, ...], key: str, device: str, ordinal: int | None) -> tuple[str, str]:
    """One of ``able``, whose first one is that for a device or a class that was not measured, and why that one."""
    arguments = (able, key, device, ordinal)
    if arguments not in _chosen:
        name = device_name(device, ordinal)
        entry = choosing.table(name).get(key)
        measured = f"measured fastest for {key} on {name.removeprefix('frozen ')}"
        _chosen[arguments] = (entry, measured) if entry in able else (able[0], "not measured on this device")
    return _chosen[arguments]


# torch.compile keeps what it returned when it traced, as in choosing.py.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
