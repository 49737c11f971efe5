"""Units of whole networks, and of modules that keep their own ``forward``; see units.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .fused import Parts, conv_norm_act_concat
from .pooled import run_steps
from .units import Layer, Unit, open_steps, part, randn, rows, steps_of, stock_class

# The slow and the fast pathway's frames of a clip; can be pickled.
Sampling = Callable[[Tensor], tuple[Tensor, Tensor]]
Stage = tuple[
    str | None, str, str
]  # the lateral connection before it (if any), the slow pathway's part, the fast one's


@dataclass(frozen=True)
class Every:
    """Every ``slow``-th and every ``fast``-th frame."""

    slow: int
    fast: int

    def __call__(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        return clip[:, :, :: self.slow], clip[:, :, :: self.fast]


@dataclass(frozen=True, kw_only=True)
class TwoPathways(Unit):
    """A whole network that samples both pathways from one clip; names may be dotted paths.

    Attributes:
        sampling: by which it takes frames; depends on the module.
        stems: the layers and modules of the slow pathway's stem and of the fast one's.
        stages: in order; may depend on the module.
        head: what is made of both pathways' features.
        head_blocks: the same as blocks of nn/ in a row, of which the first takes a list of both.
    """

    sampling: Callable[[Any], Sampling]
    stems: tuple[tuple[Layer | str, ...], tuple[Layer | str, ...]]
    stages: Callable[[Any], Iterable[Stage]]
    head: Callable[[Any, Tensor, Tensor], Any]
    head_blocks: Callable[[Any], list[nn.Module]]
    others: tuple[str, ...] = ()

    def layers(self) -> tuple[Layer, ...]:
        return tuple(layer for stem in self.stems for layer in stem if isinstance(layer, Layer))

    def needed(self) -> tuple[str, ...]:
        return tuple(name for stem in self.stems for name in stem if isinstance(name, str))

    def optional(self) -> tuple[str, ...]:
        return self.others

    def example(self, module: nn.Module, generator: torch.Generator) -> Tensor:
        # Two frames for the slow pathway that takes fewest (every 16th), and pixels that five strides leave one of, or
        # two where non-local blocks pool, too.
        conv = next(part for part in module.modules() if isinstance(part, nn.Conv3d))
        pools = sum(isinstance(part, nn.MaxPool3d) for part in module.modules())
        size = 16 if pools <= len(self.stems) else 32
        return randn((1, conv.in_channels, 32, size, size), generator)

    def unlike(self, module: nn.Module) -> str | None:
        reason = super().unlike(module)
        if reason is not None:
            return reason
        try:
            stages = list(self.stages(module))
        except AttributeError as error:
            return str(error)
        missing = [n for names in stages for n in names if n is not None and part(module, n) is None]
        return f"has no {', '.join(missing)}" if missing else None

    def covered(self, module: nn.Module) -> list[Parts]:
        laterals = [part(module, lateral) for lateral, _, _ in self.stages(module) if lateral is not None]
        steps = [step for lateral in laterals for step in open_steps(lateral)]
        return [*super().covered(module), *(step for step in steps if isinstance(step, tuple))]

    def run(self, module: nn.Module, x: Tensor) -> Any:
        """(N, C, T, H, W) -> what the network gives."""
        slow, fast = (
            _run_all(module, stem, rows(frames))
            for frames, stem in zip(self.sampling(module)(x), self.stems, strict=True)
        )
        for lateral, slow_stage, fast_stage in self.stages(module):
            if lateral is not None:
                slow = _concat(slow, fast, part(module, lateral))
            slow, fast = part(module, slow_stage)(slow), part(module, fast_stage)(fast)
        return self.head(module, slow, fast)


@dataclass(frozen=True, kw_only=True)
class Counterpart(Unit):
    """Runs the ``forward`` of a class of ours whose attributes have the same names."""

    ours: type[nn.Module]
    children: tuple[str, ...]

    def example(self, module: nn.Module, generator: torch.Generator) -> None:
        return None

    def optional(self) -> tuple[str, ...]:
        return self.children

    def run(self, module: nn.Module, x: Any) -> Any:
        return self.ours.forward(module, x)


@dataclass(frozen=True, kw_only=True)
class Contiguous(Unit):
    """Its own ``forward`` on NCDHW memory, which it takes ``view``s of; ``marks`` are attributes that it must have."""

    marks: tuple[str, ...]

    def example(self, module: nn.Module, generator: torch.Generator) -> None:
        return None

    def unlike(self, module: nn.Module) -> str | None:
        missing = [name for name in self.marks if part(module, name) is None]
        return f"has no {', '.join(missing)}" if missing else None

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        return stock_class(type(module)).forward(module, x.contiguous())


def _run_all(module: nn.Module, names: Iterable[Layer | str], x: Tensor) -> Tensor:
    return run_steps(x, (step for named in names for step in steps_of(module, named)))


def _concat(slow: Tensor, fast: Tensor, lateral: nn.Module) -> Tensor:
    steps = open_steps(lateral)
    if len(steps) == 1 and isinstance(steps[0], tuple):
        return conv_norm_act_concat(slow, fast, *steps[0])
    return torch.cat([slow, lateral(fast)], 1)
