"""``python -m slowfast_fast tune --frozen``: measures which kernel is fastest for the layers and blocks of a frozen
SlowFast R50 8x8 on a device, for ``freeze`` to look up.

What a class takes is the sum over the layers that belong to it, and a layer's time is its least.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import choosing
from .backend import backend
from .bench.leg import Leg
from .bench.measure import CpuClock, CudaClock, Race, clock_for
from .bench.network import NETWORKS
from .bench.report import versions
from .freezing import freeze
from .frozen import choices
from .frozen.blocks import FrozenBlock
from .frozen.convolution import FrozenConv
from .models import create_slowfast
from .ops._common import allows_tf32
from .tune import fastest


class ProcessorClock(CpuClock):
    """Processor seconds of one call, which other programs on the machine hardly change; for one thread."""

    def time(self, call: Callable[[], object]) -> float:
        start = time.process_time()
        call()
        return time.process_time() - start


Calls = dict[str, Callable[[], object]]


def frozen_network(dtype: torch.dtype, device: torch.device) -> nn.Module:
    """R50 8x8 with random weights."""
    model = create_slowfast(**NETWORKS["R50 8x8"].arguments, head_pool=nn.AdaptiveAvgPool3d)
    return freeze(model, dtype=dtype).to(device)


def recorded(network: nn.Module, clips: list[Tensor]) -> list[tuple[Any, tuple[int, ...], bool]]:
    """Layers and blocks in the order of a call, with the shape of their input and whether something is added."""
    seen: list[tuple[Any, tuple[int, ...], bool]] = []

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        seen.append((module, tuple(given[0].shape), isinstance(module, FrozenConv) and len(given) > 1))

    parts = [module for module in network.modules() if isinstance(module, (FrozenConv, FrozenBlock))]
    hooks = [part.register_forward_pre_hook(note) for part in parts]
    with backend("cuda" if clips[0].is_cuda else "cpu"):  # so that every block runs layer by layer
        network(clips)
    for hook in hooks:
        hook.remove()
    return seen


def calls_of(module: FrozenConv | FrozenBlock, x: Tensor, adds: bool) -> tuple[str, Calls]:
    """The key of a layer or a block, and its candidates; none of a block that one kernel cannot compute."""
    if isinstance(module, FrozenBlock):
        return _calls_of_block(module, x)
    conv = module
    residual = torch.randn_like(conv.plain(x)) if adds else None
    kernels = {name: conv.prepared(name, x) for name in conv.candidates(x)}
    key = choices.layer_key(conv.weight.shape, conv.stride, x.dtype, allows_tf32(x))
    return key, {name: partial(run, x, residual, False) for name, run in kernels.items()}


def _calls_of_block(block: FrozenBlock, x: Tensor) -> tuple[str, Calls]:
    if block.geometry is None:
        return "", {}
    channels, stride = (x.shape[1], *block.channels()), block.geometry["stride"]
    key = choices.block_key(channels, stride, block.projection is not None, x.dtype, allows_tf32(x))
    return key, {choices.ONE_KERNEL: partial(block.as_one_kernel, x), choices.LAYERS: partial(block.by_layers, x)}


def least(calls: Calls, rounds: int, clock: CpuClock | CudaClock) -> dict[str, float]:
    """Microseconds of each call."""
    race = Race(calls, clock)
    race.warm_up(2)
    for _ in range(rounds):
        race.round()
    return {name: 1e6 * min(race.seconds[name]) for name in calls}


@contextmanager
def in_use(device: str, table: dict[str, str]) -> Iterator[None]:
    """``table`` as that of the device, while blocks are measured with their layers at their best."""
    before = choosing._tables.get(device)
    choosing._tables[device] = table
    choices._chosen.clear()
    yield
    choosing._tables.pop(device)
    choosing._tables |= {} if before is None else {device: before}
    choices._chosen.clear()


def tune_frozen(
    device: torch.device,
    *,
    precisions: tuple[str, ...] = ("float32",),
    batch: int = 1,
    crop: int = 224,
    rounds: int = 10,
    report: Callable[[str], None] = print,
    network: Callable[[torch.dtype, torch.device], nn.Module] = frozen_network,
) -> dict[str, Any]:
    """Measure, and return the content of a table, under the name that ``freeze`` looks for."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = ProcessorClock() if alone else clock_for(device)
    name = choices.device_name(device.type, device.index)
    totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def add(key: str, calls: Calls, times: int) -> None:
        if len(calls) < 2:
            return
        for candidate, microseconds in least(calls, rounds, clock).items():
            totals[key][candidate] += times * microseconds
        report(f"{key}: " + ", ".join(f"{candidate} {t:.0f}" for candidate, t in totals[key].items()) + " us")

    for precision in precisions:
        leg = Leg(precision, batch, crop)
        with leg.applied(), torch.no_grad():
            frozen = network(leg.dtype, device)
            frames = NETWORKS["R50 8x8"].slow_frames
            counts = (frames, frames * NETWORKS["R50 8x8"].alpha)
            clips = [torch.randn(batch, 3, t, crop, crop, dtype=leg.dtype, device=device) for t in counts]
            seen = recorded(frozen, clips)
            unlike = Counter((_likeness(module), shape, adds) for module, shape, adds in seen)
            first = {(_likeness(module), shape, adds): module for module, shape, adds in reversed(seen)}
            for part in (FrozenConv, FrozenBlock):
                with in_use(name, fastest(totals)):
                    for (likeness, shape, adds), times in unlike.items():
                        module = first[likeness, shape, adds]
                        if not isinstance(module, part):
                            continue
                        x = torch.randn(shape, dtype=leg.dtype, device=device)
                        x = x.contiguous(memory_format=torch.channels_last_3d)
                        key, calls = calls_of(module, x, adds)
                        add(key, calls, times)
    return {
        "device": name,
        "made": versions() | {"batch": str(batch), "crop": str(crop), "threads": str(torch.get_num_threads())},
        "fastest": fastest(totals),
        "microseconds": {key: {name: round(t, 1) for name, t in times.items()} for key, times in totals.items()},
    }


def _likeness(module: Any) -> str:
    """What layers share that take the same time on the same input."""
    if isinstance(module, FrozenConv):
        return module.extra_repr()
    return "; ".join("" if part is None else part.extra_repr() for part in module.children())
