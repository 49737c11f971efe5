"""The frozen stem, residual and non-local block and stage, and a piece that runs as it is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from .. import ops
from ..explanation import because, note, recording
from ..ops._layout import as_rows
from . import bottleneck
from .choices import ONE_KERNEL
from .convolution import FrozenConv
from .joins import FrozenJoin, FrozenLaterals, grouped, ungrouped
from .lateral import FrozenFrames, FrozenLateral

# Connections of one direction.
Connection = FrozenLateral | FrozenFrames | FrozenJoin


class AsItIs(nn.Module):
    """A piece of the original that no frozen layer stands for, in evaluation mode; explain() shows ``reason``."""

    def __init__(self, module: nn.Module, reason: str) -> None:
        super().__init__()
        self.module = module
        self.reason = reason

    def forward(self, *args: Any) -> Any:
        if not recording():
            return self.module(*args)
        with because(self.reason):
            return self.module(*args)


class PartlyFrozen(nn.Module):
    """``act(norm(conv(x)) + residual)`` of which one part or more runs as it is; each but conv may be None."""

    def __init__(self, conv: nn.Module, norm: nn.Module | None, act: nn.Module | None) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm
        self.act = act

    def forward(self, x: Tensor, residual: Tensor | None = None, overwrite: bool = False) -> Tensor:
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        if residual is not None:
            x = x + residual
        return as_rows(x if self.act is None else self.act(x), "the result")


class FrozenMaxPool(nn.Module):
    """``ops.max_pool`` with windows of kernel x kernel, of every ``every``-th frame."""

    explains_itself = True

    def __init__(self, kernel: int, stride: int, padding: int, every: int) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"kernel": kernel, "stride": stride, "padding": padding}
        self.every = every

    def frames(self) -> tuple[int, int, int, int]:
        """Kernel, stride, padding and dilation in T."""
        return 1, self.every, 0, 1

    def forward(self, x: Tensor) -> Tensor:
        if recording():
            note((self,), "max_pool")
        return ops.max_pool(x[:, :, :: self.every], **self.options)


class FrozenStem(nn.Module):
    """Convolution, norm and activation in one, then the pool, if any."""

    def __init__(self, conv: nn.Module, pool: nn.Module | None) -> None:
        super().__init__()
        self.conv = conv
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) -> (N, K, T', H', W')."""
        x = self.conv(x)
        return x if self.pool is None else self.pool(x)

    def with_lateral(self, x: Tensor, source: Tensor, lateral: Connection) -> Tensor | None:
        """The result with what the source pathway gives beside it, in one tensor; None where the pool cannot write
        there."""
        if not isinstance(self.pool, FrozenMaxPool):
            return None
        x = self.conv(x)[:, :, :: self.pool.every]
        given = lateral.given(source, x.shape[2])
        if recording():
            note((self.pool, lateral), f"max_pool_{lateral.op}")
        op = getattr(ops, f"max_pool_{lateral.op}")
        wide = op(x=grouped(x, lateral.group), fast=given, **self.pool.options, **lateral.arguments())
        return ungrouped(wide, x.shape[2], lateral.group)


class FrozenBlock(nn.Module):
    """A residual block: one kernel where that is faster, else its last layer adds the shortcut and applies the
    activation.

    ``projection`` is None where the shortcut is the block's input, ``conv_c`` in a basic block.
    """

    def __init__(
        self, projection: nn.Module | None, conv_a: nn.Module, conv_b: nn.Module, conv_c: nn.Module | None
    ) -> None:
        super().__init__()
        self.projection = projection
        self.conv_a = conv_a
        self.conv_b = conv_b
        self.conv_c = conv_c
        self.geometry = None if conv_c is None else bottleneck.geometry(projection, conv_a, conv_b, conv_c)

    def channels(self) -> tuple[int, int]:
        """Of what lies between its convolutions, and of the result."""
        parts: Any = (self.conv_a, self.conv_c)
        return parts[0].weight.shape[0], parts[1].weight.shape[0]

    def inner(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the last layer takes, and the shortcut."""
        shortcut = x if self.projection is None else self.projection(x)
        x = self.conv_a(x)
        return x if self.conv_c is None else self.conv_b(x), shortcut

    def last(self) -> nn.Module:
        """The layer that adds the shortcut."""
        return self.conv_b if self.conv_c is None else self.conv_c

    def forward(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """(N, dim_in, T, H, W) -> (N, dim_out, T', H', W'). ``overwrite``: nobody else needs x."""
        if self.geometry is None:
            return self.by_layers(x, overwrite)
        how, why = bottleneck.run_as(x, *self.channels(), self.geometry["stride"], self.projection is not None)
        run = self.as_one_kernel if how == ONE_KERNEL else partial(self.by_layers, overwrite=overwrite)
        if not recording():
            return run(x)
        with because(f"block as {how}: {why}"):
            return run(x)

    def as_one_kernel(self, x: Tensor) -> Tensor:
        """For a block that has a geometry."""
        parts: Any = (self.projection, self.conv_a, self.conv_b, self.conv_c)
        options: Any = self.geometry
        if recording():
            note([part for part in parts if part is not None], "bottleneck")
        return ops.bottleneck(x, **bottleneck.arguments(*parts), **options)

    def by_layers(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """``overwrite``: nobody else needs x."""
        inner, shortcut = self.inner(x)
        return self.last()(inner, shortcut, overwrite or self.projection is not None)


class FrozenNonLocal(nn.Module):
    """A non-local block, whose last convolution adds its input; parts as ``NonLocal`` has them."""

    def __init__(
        self,
        pool: nn.Module | None,
        theta: nn.Module,
        phi: nn.Module,
        g: nn.Module,
        attention: nn.Module,
        out: nn.Module,
    ) -> None:
        super().__init__()
        self.pool = pool
        self.theta = theta
        self.phi = phi
        self.g = g
        self.attention = attention
        self.out = out

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) -> the same."""
        pooled = x if self.pool is None else self.pool(x)
        return self.out(self.attention(self.theta(x), self.phi(pooled), self.g(pooled)), x)


class FrozenStage(nn.Module):
    """Residual blocks in a row."""

    def __init__(self, res_blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.res_blocks = nn.ModuleList(res_blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(N, dim_in, T, H, W) -> (N, dim_out, T', H', W')."""
        return self._through(x, self.res_blocks)

    def _through(self, x: Tensor, blocks: Any) -> Tensor:
        for index, block in enumerate(blocks):
            # The stage's input may be read by others; what its blocks hand on is its own.
            x = block(x, index > 0) if isinstance(block, FrozenBlock) else block(x)
        return x

    def with_lateral(self, x: Tensor, source: Tensor, lateral: Connection) -> Tensor | None:
        """The result with what the source pathway gives beside it, in one tensor; None where the last layer cannot
        write there."""
        last = self.res_blocks[-1]
        conv_c = last.last() if isinstance(last, FrozenBlock) else None
        if not (isinstance(last, FrozenBlock) and isinstance(conv_c, FrozenConv) and conv_c.is_temporal()):
            return None
        if lateral.group > 1 and conv_c.weight.shape[2] > 1:
            return None  # it sees frames of more than one group
        inner, shortcut = last.inner(self._through(x, self.res_blocks[:-1]))
        frames = shortcut.shape[2]
        given = lateral.given(source, frames)
        if recording():
            note((conv_c, lateral), f"temporal_conv_{lateral.op}")
        conv: dict[str, Any] = {
            "x": grouped(inner, lateral.group),
            "weight": conv_c.weight,
            "shift": conv_c.shift,
            "residual": grouped(shortcut, lateral.group),
            "relu": conv_c.relu,
        }
        conv.update(conv_c.temporal_geometry())
        wide = getattr(ops, f"temporal_conv_{lateral.op}")(fast=given, **conv, **lateral.arguments())
        return ungrouped(wide, frames, lateral.group)


class FrozenPathways(nn.Module):
    """One block for each pathway, then their fusion; a block or the fusion may be None."""

    def __init__(self, multipathway_blocks: Sequence[nn.Module | None], multipathway_fusion: nn.Module | None) -> None:
        super().__init__()
        self.multipathway_blocks = nn.ModuleList(multipathway_blocks)  # type: ignore[arg-type]
        self.multipathway_fusion = multipathway_fusion

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        """One (N, C, T, H, W) tensor for each pathway -> the same, a new list."""
        fusion = self.multipathway_fusion
        to_slow: Any = fusion if isinstance(fusion, Connection) else None
        to_fast: Any = None
        if isinstance(fusion, FrozenLaterals):
            to_slow, to_fast = fusion.to_slow, fusion.to_fast
        # A pathway that is joined waits for the other one, so that its last layer can write beside what that one gives.
        waiting = [pathway for pathway, lateral in ((0, to_slow), (1, to_fast)) if lateral is not None]
        out = [tensor if p in waiting else self._pathway(p, tensor) for p, tensor in enumerate(x)]
        if not waiting:
            return out if fusion is None else fusion(out)
        if to_fast is None:
            out[0] = self._joined(0, out[0], out[1], to_slow)
        elif to_slow is None:
            out[1] = self._joined(1, out[1], out[0], to_fast)
        else:
            out[:2] = self._both(x, to_slow, to_fast)
        return out

    def _pathway(self, pathway: int, x: Tensor) -> Tensor:
        block = self.multipathway_blocks[pathway] if pathway < len(self.multipathway_blocks) else None
        return x if block is None else block(as_rows(x, f"x[{pathway}]"))

    def _joined(self, pathway: int, x: Tensor, source: Tensor, lateral: Connection) -> Tensor:
        """The pathway's own part of ``x``, and what ``source``, the other one's result, gives it."""
        x = as_rows(x, f"x[{pathway}]")
        block = self.multipathway_blocks[pathway]
        if lateral.join == "concat" and isinstance(block, (FrozenStem, FrozenStage)):
            wide = block.with_lateral(x, source, lateral)
            if wide is not None:
                return wide
        own = x if block is None else block(x)
        return lateral(own, source, isinstance(block, (FrozenStem, FrozenStage)))

    def _both(self, x: Sequence[Tensor], to_slow: Connection, to_fast: FrozenJoin) -> list[Tensor]:
        fast = as_rows(self._pathway(1, x[1]), "x[1]")
        if to_slow.join == "concat":
            wide = self._joined(0, x[0], fast, to_slow)
            return [wide, to_fast(fast, wide[:, : wide.shape[1] - to_slow.gained(fast)])]
        slow = as_rows(self._pathway(0, x[0]), "x[0]")
        joined = to_fast(fast, slow)
        return [to_slow(slow, fast, isinstance(self.multipathway_blocks[0], (FrozenStem, FrozenStage))), joined]
