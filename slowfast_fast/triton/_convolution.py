"""The forward primitives of csrc/primitives.h on Triton kernels: convolve with an epilogue or with statistics,
normalise, copy. Arguments are checked when a plan is made, that is once for every geometry of the tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from triton import cdiv

from ._checks import Conv, check_rows, check_vector
from ._configs import Config, product_configs, reduction_tile, row_tile
from ._forward import finish_split, forward, merge_statistics, normalise
from ._launch import Launch, common_unit, geometry, in_units, passes_int32, strides, traced, wrap_triton
from ._tuning import choose

Plan = TypeVar("Plan")
# By everything that the launches of a primitive depend on but the alignment of the tensors.
_plans: dict[Any, Any] = {}
MOST_PLANS = 4096  # a process that sees more shapes than this starts over


class Statistics(NamedTuple):
    """Where the statistics of a convolution's output go, as BatchStats in csrc/primitives.h."""

    mean: Tensor
    invstd: Tensor
    unbiased_var: Tensor
    eps: float


def planned(
    kernel: Any,
    key: tuple[Any, ...],
    device: torch.device,
    candidates: Callable[[], Sequence[Config]],
    build: Callable[[Config], Plan],
    run: Callable[[Plan], object],
) -> None:
    """Run the primitive: ``build`` makes its launches for a configuration, ``run`` launches them. ``key`` is all that
    they depend on."""
    here = (key, torch.are_deterministic_algorithms_enabled())
    plan = None if traced(kernel) else _plans.get(here)
    if plan is None:
        # On disk, the devices of one kind share their choices.
        text = str(key).replace(f", {device!r}", "")
        prepare = None if traced(kernel) else lambda config: functools.partial(run, build(config))
        config, final = choose(text, candidates(), device, prepare)
        plan = build(config)
        if final and not traced(kernel):
            if len(_plans) >= MOST_PLANS:
                _plans.clear()
            _plans[here] = plan
    run(plan)


def packed(weight: Tensor) -> Tensor:
    """(K, C, taps) as (K, taps, C), so that the channels under a tap are adjacent. Small beside the activations."""
    k, c, taps, _, _ = weight.shape
    return weight if c == 1 or taps == 1 else weight.view(k, c, taps).transpose(1, 2).contiguous()


def row_tiles(n: int, frames: int, positions: int, config: Config) -> int:
    """How many tiles `_device.tile_rows` cuts the rows into."""
    if config.frames == 1:
        return cdiv(n * frames * positions, config.bm)
    return n * cdiv(frames, config.frames) * cdiv(positions, config.bm // config.frames)


def precision(tf32: bool) -> str:
    """Of tl.dot; it concerns float32 only."""
    return "tf32" if tf32 else "ieee"


class _Forward(NamedTuple):
    main: Launch
    finish: Launch | None
    merge: Launch | None
    partial: tuple[int, ...]
    workspace: tuple[int, ...]


def convolve(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    conv: Conv,
    relu: bool,
    tf32: bool,
    y: Tensor,
    first: int = 0,
    statistics: Statistics | None = None,
) -> None:
    """y[:, first : first + K] = act(scale * conv(x) + shift + residual), and the statistics of that where asked."""
    kernel = wrap_triton(forward, x)

    def build(config: Config) -> _Forward:
        conv.check(x, weight)
        check_rows("residual", residual, conv.output, x)
        check_vector("scale", scale, conv.k, x)
        check_vector("shift", shift, conv.k, x)
        return _forward_launches(
            x, residual, y, conv, relu, tf32, first, scale is not None, shift is not None, statistics, config
        )

    def run(plan: _Forward) -> None:
        # An absent tensor is stood for by one that is only read.
        vectors = (x if scale is None else scale, x if shift is None else shift, x if residual is None else residual)
        partial = y if plan.merge is None else x.new_empty(plan.partial, dtype=torch.float32)
        workspace = y if plan.finish is None else x.new_empty(plan.workspace, dtype=torch.float32)
        plan.main(kernel, x, of_weight, *vectors, y, partial, workspace)
        if plan.finish is not None:
            plan.finish(wrap_triton(finish_split, x), workspace, *vectors, y, partial)
        if plan.merge is not None:
            assert statistics is not None
            plan.merge(wrap_triton(merge_statistics, x), partial, *statistics[:3])

    of_weight = packed(weight)
    given = (scale, shift, residual, y)
    key = ("forward", geometry(x), geometry(weight), *map(geometry, given), conv[-3:], relu, tf32, first)
    key = (*key, None if statistics is None else statistics.eps)
    bits = x.element_size() * 8
    planned(
        kernel,
        key,
        x.device,
        lambda: product_configs(conv.rows, conv.k, conv.c, conv.taps, conv.t_out, bits),
        build,
        run,
    )


def _forward_launches(
    x: Tensor,
    residual: Tensor | None,
    y: Tensor,
    conv: Conv,
    relu: bool,
    tf32: bool,
    first: int,
    has_scale: bool,
    has_shift: bool,
    statistics: Statistics | None,
    config: Config,
) -> _Forward:
    k, positions = conv.k, conv.positions
    of_x, of_residual, of_y = strides(x), strides(residual), strides(y)
    unit = common_unit(of_x, of_residual, of_y)
    wide = passes_int32(x, residual, y) or config.split * conv.rows * k >= 2**31
    epilogue = {
        "HAS_SCALE": has_scale,
        "HAS_SHIFT": has_shift,
        "HAS_RESIDUAL": residual is not None,
        "RELU": relu,
        "STATS": statistics is not None,
        "SPLIT": config.split,
    }
    tiles = row_tiles(conv.n, conv.t_out, positions, config)
    main = Launch(
        (tiles * cdiv(k, config.bn), config.split),
        (conv.n, conv.t_in, conv.t_out, positions, *in_units(unit, of_x, of_residual, of_y)),
        {
            **{"C": conv.c, "K": k, "FIRST": first, "TAPS": conv.taps},
            **{"STRIDE": conv.stride, "PADDING": conv.padding, "DILATION": conv.dilation},
            **epilogue,
            **{"BM": config.bm, "BN": config.bn, "BK": config.bk, "FRAMES": config.frames},
            **{"UNIT": unit, "WIDE": wide, "PRECISION": precision(tf32)},
        },
        config.warps,
        config.stages,
    )
    finish = None
    if config.split > 1:
        bm, bn = row_tile(k)
        tiles = cdiv(conv.rows, bm)
        finish = Launch(
            (tiles * cdiv(k, bn),),
            (conv.n, conv.t_out, positions, *in_units(unit, of_residual, of_y)),
            {"K": k, "FIRST": first, **epilogue, "BM": bm, "BN": bn, "UNIT": unit, "WIDE": wide},
            8,
        )
    merge = None
    if statistics is not None:
        bt, bn = reduction_tile(tiles, k)
        merge = Launch((cdiv(k, bn),), (tiles, statistics.eps), {"K": k, "BT": bt, "BN": bn}, 8)
    return _Forward(main, finish, merge, (3, tiles, k), (config.split, conv.rows, k))


def normalise_rows(
    raw: Tensor,
    mean: Tensor,
    invstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    y: Tensor,
    first: int = 0,
) -> None:
    """y[:, first : first + K] = act((raw - mean) * invstd * gamma + beta + residual)."""
    _map_rows(raw, mean, invstd, gamma, beta, residual, True, relu, y, first)


def copy_rows(source: Tensor, y: Tensor) -> None:
    """y[:, : C] = source, which has C channels."""
    _map_rows(source, None, None, None, None, None, False, False, y, 0)


def _map_rows(
    raw: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    norm: bool,
    relu: bool,
    y: Tensor,
    first: int,
) -> None:
    kernel = wrap_triton(normalise, raw)
    n, k, t, h, w = raw.shape

    def build(config: Config) -> Launch:
        check_rows("raw", raw, raw.shape, y)
        check_rows("residual", residual, raw.shape, y)
        for name, vector in (("mean", mean), ("invstd", invstd), ("gamma", gamma), ("beta", beta)):
            check_vector(name, vector, k, y)
        of_rows = strides(raw), strides(residual), strides(y)
        unit = common_unit(*of_rows)
        return Launch(
            (cdiv(n * t * h * w, config.bm) * cdiv(k, config.bn),),
            (n, t, h * w, *in_units(unit, *of_rows)),
            {
                **{"K": k, "FIRST": first, "NORM": norm, "HAS_GAMMA": gamma is not None, "HAS_BETA": beta is not None},
                **{"HAS_RESIDUAL": residual is not None, "RELU": relu, "BM": config.bm, "BN": config.bn},
                **{"UNIT": unit, "WIDE": passes_int32(raw, residual, y)},
            },
            config.warps,
        )

    def run(launch: Launch) -> None:
        launch(kernel, raw, *(raw if v is None else v for v in (mean, invstd, gamma, beta, residual)), y)

    bm, bn = row_tile(k)
    key = ("rows", *map(geometry, (raw, mean, invstd, gamma, beta, residual, y)), norm, relu, first)
    planned(kernel, key, raw.device, lambda: [Config(bm, bn, 0, 8, 1)], build, run)
