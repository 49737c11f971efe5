"""Blocks that another library built, run on the ops: told by the names of their parts, which compat/<library>.py knows.

A unit stands for all modules of one class. ``run`` does what that class's own ``forward`` does, from whatever the named
attributes hold at that moment, so that parts may be hooked, replaced, set to None or set to evaluation at any time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops._layout import as_rows
from .fused import Parts, Step, conv_norm_act_concat, has_global_hooks, is_observed
from .pooled import run_steps
from .residual import residual_block

UNIT = "_slowfast_fast_unit"  # the attribute of an accelerated class that holds its unit


@dataclass(frozen=True)
class Layer:
    """The attributes that hold a convolution, its norm and its activation. None, or nothing held: it has none."""

    conv: str
    norm: str | None = None
    act: str | None = None

    def parts(self, module: nn.Module) -> Parts:
        return getattr(module, self.conv), part(module, self.norm), part(module, self.act)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What every kind of block has.

    Attributes:
        stock_if: why this very module must run its own ``forward`` now, or None; for options that change what it
            computes.
    """

    stock_if: Callable[[nn.Module], str | None] | None = None

    def layers(self) -> tuple[Layer, ...]:
        """The layers made of the module's own attributes."""
        return ()

    def needed(self) -> tuple[str, ...]:
        """Attributes that must hold a module, beside the convolutions."""
        return ()

    def optional(self) -> tuple[Layer | str, ...]:
        """Attributes that may hold a module, and layers that may be there."""
        return ()

    def run(self, module: nn.Module, x: Any) -> Any:
        raise NotImplementedError

    def run_stock(self, module: nn.Module, x: Any) -> Any:
        """What ``run`` stands in for."""
        return stock_class(type(module)).forward(module, x)

    def example(self, module: nn.Module, generator: torch.Generator) -> Any:
        """A small input to try a module out on; None where there is nothing that could differ."""
        conv = next(part for part in module.modules() if isinstance(part, nn.Conv3d))
        return randn((2, conv.in_channels, 5, 9, 8), generator)

    def covered(self, module: nn.Module) -> list[Parts]:
        """The convolutions that ``run`` hands to the ops where they can take them, with what follows."""
        named = [*self.layers(), *self.needed(), *self.optional()]
        return [step for name in named for step in steps_of(module, name) if isinstance(step, tuple)]

    def unlike(self, module: nn.Module) -> str | None:
        """Why ``module`` is not built as this unit says; None where it is."""
        convolutions = [layer.conv for layer in self.layers()]
        for name in (*convolutions, *self.needed()):
            if not isinstance(part(module, name), nn.Module):
                return f"has no {name}"
        for name in convolutions:
            if not isinstance(part(module, name), nn.Conv3d):
                return f"{name} is a {type(part(module, name)).__name__}, not a Conv3d"
        known = set()
        for named in (*self.layers(), *self.needed(), *self.optional()):
            names = (named,) if isinstance(named, str) else (named.conv, named.norm, named.act)
            known |= {id(part(module, name.partition(".")[0])) for name in names if name is not None}
        unknown = [name for name, child in module.named_children() if id(child) not in known]
        unknown += [name for name, _ in module.named_parameters(recurse=False)]
        unknown += [name for name, _ in module.named_buffers(recurse=False)]
        return f"has {', '.join(unknown)} besides what is known" if unknown else None


@dataclass(frozen=True, kw_only=True)
class Chain(Unit):
    """Layers one after the other, then other modules: a stem, the branch of a residual block, a single layer."""

    chain: tuple[Layer, ...]
    then: tuple[str, ...] = ()

    def layers(self) -> tuple[Layer, ...]:
        return self.chain

    def optional(self) -> tuple[str, ...]:
        return self.then

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        """(N, C, T, H, W) -> (N, K, T', H', W')."""
        held = [part(module, name) for name in self.then]
        steps = [*(layer.parts(module) for layer in self.chain), *(step for step in held if step is not None)]
        return run_steps(x if any(isinstance(step, nn.MaxPool3d) for step in steps) else rows(x), steps)


@dataclass(frozen=True, kw_only=True)
class Residual(Unit):
    """``act(shortcut(x) + branch(x))``, then other modules.

    Attributes:
        branch: own layers, or names of modules that hold them.
        shortcut: the same for the shortcut; where nothing is held it is x itself.
        then: called afterwards, where they are there: non-local blocks.
        checkpointed: an attribute that, if true, asks for the activations of the block to be computed again in the
            backward (mmaction2's ``with_cp``).
    """

    branch: tuple[Layer | str, ...]
    shortcut: Layer | str
    act: str
    then: tuple[str, ...] = ()
    checkpointed: str | None = None

    def layers(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.branch if isinstance(layer, Layer))

    def needed(self) -> tuple[str, ...]:
        return tuple(name for name in self.branch if isinstance(name, str))

    def optional(self) -> tuple[Layer | str, ...]:
        return (self.shortcut, self.act, *self.then)

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        """(N, C, T, H, W) -> (N, K, T', H', W')."""
        x = rows(x)
        if self.checkpointed and getattr(module, self.checkpointed, False) and x.requires_grad:
            # The kind of checkpoint that the libraries take: the recomputation updates running statistics once more.
            x = cast(Tensor, checkpoint(self._block, module, x, use_reentrant=True))
        else:
            x = self._block(module, x)
        return _call_each(module, self.then, x)

    def _block(self, module: nn.Module, x: Tensor) -> Tensor:
        steps = [step for named in self.branch for step in steps_of(module, named)]
        return residual_block(x, steps, steps_of(module, self.shortcut), part(module, self.act))


@dataclass(frozen=True, kw_only=True)
class Lateral(Unit):
    """``[cat([slow, layer(fast)], 1), fast]`` from a list of both."""

    layer: Layer

    def layers(self) -> tuple[Layer, ...]:
        return (self.layer,)

    def example(self, module: nn.Module, generator: torch.Generator) -> list[Tensor]:
        conv = getattr(module, self.layer.conv)
        frames = 3 * int(conv.stride[0])
        fast = randn((2, conv.in_channels, frames, 4, 3), generator)
        empty = torch.empty(fast.shape, device="meta")
        slow_frames = F.conv3d(empty, conv.weight.to("meta"), None, conv.stride, conv.padding, conv.dilation).shape[2]
        return [randn((2, 3, slow_frames, 4, 3), generator), fast]

    def run(self, module: nn.Module, x: Sequence[Tensor]) -> list[Tensor]:
        """[slow (N, C, T, H, W), fast (N, C_fast, alpha * T, H, W)] -> [(N, C + K, T, H, W), fast], a new list."""
        slow, fast = x[0], x[1]
        return [conv_norm_act_concat(slow, fast, *self.layer.parts(module)), fast]


def stock_class(kind: type) -> Any:
    """The class that accelerated modules of class ``kind`` had before; of others, their own."""
    kinds = kind.__mro__
    return next((after for made, after in itertools.pairwise(kinds) if UNIT in made.__dict__), kind)


def forward_class(kind: type) -> type:
    """The class that the ``forward`` of modules of class ``kind``, before they were accelerated, is of."""
    return next(base for base in stock_class(kind).__mro__ if "forward" in base.__dict__ or base is nn.Module)


def part(module: nn.Module, name: str | None) -> Any:
    """What ``module`` holds under a name or dotted path; None where it holds nothing."""
    return None if name is None else reduce(lambda held, n: getattr(held, n, None), name.split("."), cast(Any, module))


def open_steps(child: nn.Module | None) -> list[Step]:
    """The layers that ``child`` is made of, where nobody could tell the difference to calling it; else itself."""
    if child is None:
        return []
    if is_observed(child) or has_global_hooks():
        return [child]
    unit = getattr(type(child), UNIT, None)
    if isinstance(unit, Chain):
        closed = any(part(child, name) is not None for name in unit.then)
        if closed or (unit.stock_if is not None and unit.stock_if(child) is not None):
            return [child]
        return [layer.parts(child) for layer in unit.chain]
    if type(child) is nn.Conv3d:
        return [(child, None, None)]
    if type(child) is nn.Sequential and 2 <= len(child) <= 3 and type(child[0]) is nn.Conv3d:
        return [(child[0], child[1], child[2] if len(child) == 3 else None)]
    return [child]


def steps_of(module: nn.Module, named: Layer | str) -> list[Step]:
    """What a named layer or module is made of, as it is now; nothing where it is not there."""
    if isinstance(named, str):
        return open_steps(part(module, named))
    return [named.parts(module)] if part(module, named.conv) is not None else []


def _call_each(module: nn.Module, names: Iterable[str], x: Tensor) -> Tensor:
    for name in names:
        called = part(module, name)
        x = x if called is None else called(x)
    return x


def randn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Of an ``example``, on the CPU."""
    return torch.randn(shape, generator=generator)


def rows(x: Tensor) -> Tensor:
    """``x`` as every op reads it: itself, or one visible copy. Raises ValueError unless it is (N, C, T, H, W)."""
    if x.dim() != 5:
        raise ValueError(f"x must be (N, C, T, H, W); got shape {tuple(x.shape)}")
    return as_rows(x, "x")
