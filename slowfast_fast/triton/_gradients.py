"""The backward primitive of csrc/primitives.h on Triton kernels."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv

from ._backward import add_chunks, add_splits, dgrad, gradient_sums, wgrad
from ._checks import Conv, check_rows, check_vector
from ._configs import WAVE, Config, product_configs, reduction_tile, row_tile, split_tile, wgrad_configs
from ._convolution import packed, planned, precision, row_tiles
from ._launch import Launch, common_unit, geometry, in_units, passes_int32, strides, wrap_triton


class OutputGradient(NamedTuple):
    """The gradient with respect to an op's output, and what it takes to bring it before ReLU and BatchNorm.

    Affine form: ``saved`` is the op's output (given with ReLU), ``factor`` scale. BatchNorm form (``mean`` given):
    ``saved`` is the raw output of the convolution, ``factor`` gamma.
    """

    grad: Tensor
    saved: Tensor | None
    residual: Tensor | None
    factor: Tensor | None
    mean: Tensor | None
    invstd: Tensor | None
    beta: Tensor | None
    relu: bool

    @property
    def norm(self) -> bool:
        return self.mean is not None

    def rows(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.grad, self.saved, self.residual

    def of(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """The tensors as kernel arguments; one that is absent is stood for by one that is only read."""
        return tuple(self.grad if tensor is None else tensor for tensor in tensors)

    def key(self) -> tuple[Any, ...]:
        return *map(geometry, self[:-1]), self.relu

    def check(self, conv: Conv) -> None:
        for name, rows in zip(("grad", "saved", "residual"), self.rows(), strict=True):
            check_rows(name, rows, conv.output, self.grad)
        for name in ("factor", "mean", "invstd", "beta"):
            check_vector(name, getattr(self, name), conv.k, self.grad)

    def flags(self) -> dict[str, bool]:
        return {"NORM": self.norm, "RELU": self.relu, "HAS_RESIDUAL": self.residual is not None}


def backward(
    g: OutputGradient,
    x: Tensor,
    weight: Tensor,
    conv: Conv,
    tf32: bool,
    need_x: bool,
    need_weight: bool,
    need_factor: bool,
    need_shift: bool,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, factor, shift (or beta) and residual; (0,) for those that are not needed."""

    def rows_like(shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)

    def vector() -> Tensor:
        return x.new_empty(conv.k, dtype=torch.float32)

    # Gradients of vectors that are not needed keep the shape here: the kernels of the BatchNorm form pass sums in them.
    sum_g, of_factor = vector(), vector()
    dx = rows_like(tuple(x.shape)) if need_x else x.new_empty(0)
    dweight = weight.new_empty(weight.shape) if need_weight else x.new_empty(0)
    dresidual = rows_like(conv.output) if need_residual else x.new_empty(0)
    if need_shift or need_residual or (g.norm and (need_x or need_weight or need_factor)):
        _sums(g, conv, sum_g, of_factor if g.norm else sum_g, dresidual if need_residual else None)
    if need_x:
        _dgrad(g, weight, conv, tf32, sum_g, of_factor, dx)
    if need_weight or (need_factor and not g.norm):
        _wgrad(g, x, weight, conv, tf32, sum_g, of_factor, dweight, need_weight, need_factor and not g.norm)
    # Results must not share memory, so what is not needed is fresh.
    return (
        dx,
        dweight,
        of_factor if need_factor else x.new_empty(0, dtype=torch.float32),
        sum_g if need_shift else x.new_empty(0, dtype=torch.float32),
        dresidual,
    )


class _SumLaunches(NamedTuple):
    main: Launch
    merge: Launch
    partial: tuple[int, ...]


def _sums(g: OutputGradient, conv: Conv, sum_g: Tensor, sum_gx: Tensor, dresidual: Tensor | None) -> None:
    kernel = wrap_triton(gradient_sums, sum_g)

    def build(config: Config) -> _SumLaunches:
        g.check(conv)
        of_rows = *map(strides, g.rows()), strides(dresidual)
        unit = common_unit(*of_rows)
        k, k_tiles, tiles = conv.k, cdiv(conv.k, config.bn), cdiv(conv.rows, config.bm)
        share = cdiv(tiles, max(8 * WAVE // k_tiles, 1))
        chunks = cdiv(tiles, max(share, 1))
        main = Launch(
            (chunks * k_tiles,),
            (conv.n, conv.t_out, conv.positions, *in_units(unit, *of_rows), tiles, share),
            {
                **{"K": k, **g.flags(), "HAS_GAMMA": g.factor is not None, "HAS_BETA": g.beta is not None},
                **{"STORE": dresidual is not None, "BM": config.bm, "BN": config.bn},
                **{"UNIT": unit, "WIDE": passes_int32(*g.rows())},
            },
            config.warps,
        )
        bt, bn = reduction_tile(chunks, k)
        merge = Launch((cdiv(k, bn),), (chunks,), {"K": k, "NORM": g.norm, "BT": bt, "BN": bn}, 8)
        return _SumLaunches(main, merge, (2 if g.norm else 1, chunks, k))

    def run(plan: _SumLaunches) -> None:
        partial = sum_g.new_empty(plan.partial)
        vectors = g.of(g.mean, g.invstd, g.factor, g.beta)
        plan.main(kernel, *g.of(*g.rows()), *vectors, *g.of(dresidual), partial)
        plan.merge(wrap_triton(add_chunks, sum_g), partial, sum_g, sum_gx)

    bm, bn = row_tile(conv.k)
    key = ("sums", *g.key(), geometry(dresidual))
    planned(kernel, key, sum_g.device, lambda: [Config(bm, bn, 0, 8, 1)], build, run)


def _inverse_rows(conv: Conv) -> float:
    return 1.0 / max(conv.rows, 1)


def _dgrad(
    g: OutputGradient, weight: Tensor, conv: Conv, tf32: bool, sum_g: Tensor, sum_gx: Tensor, dx: Tensor
) -> None:
    kernel = wrap_triton(dgrad, dx)
    classes = min(conv.stride, conv.t_in)
    frames = cdiv(conv.t_in, conv.stride)  # of the longest residue class

    def build(config: Config) -> Launch:
        g.check(conv)
        of_rows = *map(strides, g.rows()), strides(dx)
        unit = common_unit(*of_rows)
        tiles = row_tiles(conv.n, frames, conv.positions, config)
        return Launch(
            (tiles * cdiv(conv.c, config.bn), classes),
            (conv.n, conv.t_in, conv.t_out, conv.positions, *in_units(unit, *of_rows), _inverse_rows(conv)),
            {
                **{"C": conv.c, "K": conv.k, "TAPS": conv.taps},
                **{"STRIDE": conv.stride, "PADDING": conv.padding, "DILATION": conv.dilation},
                **{"GCD": math.gcd(conv.stride, conv.dilation), **g.flags()},
                **{"HAS_FACTOR": g.factor is not None, "HAS_BETA": g.beta is not None},
                **{"BM": config.bm, "BN": config.bn, "BK": config.bk, "FRAMES": config.frames},
                **{"UNIT": unit, "WIDE": passes_int32(*g.rows(), dx), "PRECISION": precision(tf32)},
            },
            config.warps,
            config.stages,
        )

    def run(launch: Launch) -> None:
        vectors = (g.factor, g.mean, g.invstd, g.beta)
        launch(kernel, *g.of(*g.rows()), of_weight, *g.of(*vectors), sum_g, sum_gx, dx)

    def candidates() -> list[Config]:
        rows, taps = conv.n * frames * conv.positions, cdiv(conv.taps, conv.stride)
        return product_configs(rows, conv.c, conv.k, taps, frames, dx.element_size() * 8, backward=True)

    of_weight = packed(weight)
    key = ("dgrad", *g.key(), geometry(weight), geometry(dx), conv[-3:], tf32)
    planned(kernel, key, dx.device, candidates, build, run)


class _WeightLaunches(NamedTuple):
    main: Launch
    merge: Launch
    partial: tuple[int, ...]


def _wgrad(
    g: OutputGradient,
    x: Tensor,
    weight: Tensor,
    conv: Conv,
    tf32: bool,
    sum_g: Tensor,
    sum_gx: Tensor,
    dweight: Tensor,
    want_weight: bool,
    want_factor: bool,
) -> None:
    """dweight, and in the affine form the gradient of scale into ``sum_gx``."""
    kernel = wrap_triton(wgrad, x)
    depth = conv.taps * conv.c

    def build(config: Config) -> _WeightLaunches:
        conv.check(x, weight)
        g.check(conv)
        of_rows = *map(strides, g.rows()), strides(x)
        unit = common_unit(*of_rows)
        tiles = row_tiles(conv.n, conv.t_out, conv.positions, config)
        share = cdiv(tiles, config.split)
        splits = cdiv(tiles, max(share, 1))
        main = Launch(
            (cdiv(conv.k, config.bn) * cdiv(depth, config.bk) if splits else 0, splits),
            (
                *(conv.n, conv.t_in, conv.t_out, conv.positions, *in_units(unit, *of_rows)),
                *(_inverse_rows(conv), tiles, share),
            ),
            {
                **{"C": conv.c, "K": conv.k, "TAPS": conv.taps},
                **{"STRIDE": conv.stride, "PADDING": conv.padding, "DILATION": conv.dilation, **g.flags()},
                **{"HAS_GAMMA": g.factor is not None, "HAS_BETA": g.beta is not None},
                **{"BM": config.bm, "BN": config.bn, "BD": config.bk, "FRAMES": config.frames},
                **{"UNIT": unit, "WIDE": passes_int32(*g.rows(), x), "PRECISION": precision(tf32)},
            },
            config.warps,
            config.stages,
        )
        bs, bd = split_tile(splits, depth)
        merge = Launch(
            (conv.k,),
            (splits,),
            {
                **{"C": conv.c, "K": conv.k, "TAPS": conv.taps, "HAS_FACTOR": g.factor is not None},
                **{"WANT_WEIGHT": want_weight, "WANT_FACTOR": want_factor, "BS": bs, "BD": bd},
            },
        )
        return _WeightLaunches(main, merge, (splits, conv.k, depth))

    def run(plan: _WeightLaunches) -> None:
        partial = sum_g.new_empty(plan.partial)
        vectors = g.of(g.factor, g.mean, g.invstd, g.beta)
        plan.main(kernel, *g.of(*g.rows()), x, *vectors, sum_g, sum_gx, partial)
        plan.merge(wrap_triton(add_splits, x), partial, weight, *g.of(g.factor), dweight, sum_gx)

    def candidates() -> list[Config]:
        return wgrad_configs(conv.rows, conv.k, depth, x.element_size() * 8)

    key = ("wgrad", *g.key(), geometry(x), conv[-3:], conv.taps, tf32, want_weight, want_factor)
    planned(kernel, key, x.device, candidates, build, run)
