"""Kernels of the forward: the convolution as a product over rows, its statistics, and normalisation."""

from __future__ import annotations

import triton
import triton.language as tl

from ._device import finish_tile, normalised, per_channel, relu_of, row_offset, tile_rows


@triton.jit
def forward(
    x, weight, scale, shift, residual, y, partial, workspace,
    N, T_in, T_out, P, x_n, x_t, x_p, r_n, r_t, r_p, y_n, y_t, y_p,
    C: tl.constexpr, K: tl.constexpr, FIRST: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr,
    PADDING: tl.constexpr, DILATION: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr, STATS: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, FRAMES: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y[row, k] = sum over d = tap * C + c of x[row + tap, c] * weight[k, d], weight packed as (K, taps, C).

    Taps and channels are one reduction. Where C is no multiple of BK (narrow layers: tl.dot takes no depth below 16) a
    slab holds several taps, so that 3 taps of 8 channels cost a depth of 32 rather than 48, and 8 adjacent channels
    are still one 16-byte read. SPLIT > 1: program_id(1) sums its share of the depth into ``workspace`` (SPLIT, rows,
    K), which `finish_split` adds up. FIRST is the channel of ``y`` in which the output begins.
    """
    DEPTH: tl.constexpr = TAPS * C
    K_TILES: tl.constexpr = (K + BN - 1) // BN
    SHARE: tl.constexpr = ((DEPTH + BK - 1) // BK + SPLIT - 1) // SPLIT * BK
    tile = tl.program_id(0) // K_TILES  # adjacent programs share rows of x, which are more than the weights
    k = tl.program_id(0) % K_TILES * BN + tl.arange(0, BN)
    n, t, p, valid = tile_rows(tile, N, T_out, P, BM, FRAMES, WIDE)
    position = (n * x_n + p * x_p)[:, None]
    first = (t * STRIDE - PADDING)[:, None]
    begin = tl.program_id(1) * SHARE
    acc = tl.zeros((BM, BN), tl.float32)
    for d0 in tl.range(begin, tl.minimum(begin + SHARE, DEPTH), BK):
        d = d0 + tl.arange(0, BK)
        if C % BK == 0:
            tap = d0 // C
            c = (d0 - tap * C + tl.arange(0, BK))[None, :]  # not d0 % C, of which Triton does not see what divides it
        else:
            tap = (d // C)[None, :]
            c = (d % C)[None, :]
        frame = first + tap * DILATION
        ok = valid[:, None] & (frame >= 0) & (frame < T_in) & (d < DEPTH)[None, :]
        a = tl.load(x + (position + frame * x_t) * UNIT + c, mask=ok, other=0.0)
        b = tl.load(weight + k[None, :] * DEPTH + d[:, None], mask=(k < K)[None, :] & (d < DEPTH)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if SPLIT == 1:
        finish_tile(
            acc,
            *(n, t, p, valid, k, tile, tl.num_programs(0) // K_TILES),
            *(scale, shift, residual, y, partial, r_n, r_t, r_p, y_n, y_t, y_p),
            *(K, FIRST, HAS_SCALE, HAS_SHIFT, HAS_RESIDUAL, RELU, STATS, UNIT),
        )
    else:
        row = ((tl.program_id(1) * N + n) * T_out + t) * P + p
        tl.store(workspace + row[:, None] * K + k[None, :], acc, mask=valid[:, None] & (k < K)[None, :])


@triton.jit
def finish_split(
    workspace, scale, shift, residual, y, partial,
    N, T, P, r_n, r_t, r_p, y_n, y_t, y_p,
    K: tl.constexpr, FIRST: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr, STATS: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Adds up the shares of `forward` in their order and finishes the tile as `forward` does without a split."""
    K_TILES: tl.constexpr = (K + BN - 1) // BN
    tile = tl.program_id(0) // K_TILES
    k = tl.program_id(0) % K_TILES * BN + tl.arange(0, BN)
    n, t, p, valid = tile_rows(tile, N, T, P, BM, 1, WIDE)
    inside = valid[:, None] & (k < K)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for share in range(SPLIT):
        row = ((share * N + n) * T + t) * P + p
        acc += tl.load(workspace + row[:, None] * K + k[None, :], mask=inside, other=0.0)
    finish_tile(
        acc,
        *(n, t, p, valid, k, tile, tl.num_programs(0) // K_TILES),
        *(scale, shift, residual, y, partial, r_n, r_t, r_p, y_n, y_t, y_p),
        *(K, FIRST, HAS_SCALE, HAS_SHIFT, HAS_RESIDUAL, RELU, STATS, UNIT),
    )


@triton.jit
def merge_statistics(
    partial, mean_out, invstd_out, unbiased_var_out,
    tiles, eps,
    K: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The statistics of the batch from those of its tiles, always in the same order. Merged as Chan, Golub and LeVeque
    (1979): never E[x^2] - E[x]^2, which cancels. Without any row the mean and the variances are 0."""
    k = tl.program_id(0) * BN + tl.arange(0, BN)
    count = tl.zeros((BN,), tl.float32)
    mean = tl.zeros((BN,), tl.float32)
    m2 = tl.zeros((BN,), tl.float32)
    for first in range(0, tiles, BT):
        tile = first + tl.arange(0, BT)
        inside = (tile < tiles)[:, None] & (k < K)[None, :]
        at = partial + tile[:, None] * K + k[None, :]
        counts = tl.load(at, mask=inside, other=0.0)
        means = tl.load(at + tiles * K, mask=inside, other=0.0)
        block_count = tl.maximum(tl.sum(counts, 0), 1.0)  # 0 for channels beyond K only
        total = count + block_count
        # Around the mean so far, so that large means cost no digits.
        centred = means - mean[None, :]
        block_delta = tl.sum(centred * (counts / block_count[None, :]), 0)
        centred -= block_delta[None, :]
        m2 += tl.sum(tl.load(at + 2 * tiles * K, mask=inside, other=0.0) + centred * centred * counts, 0)
        m2 += block_delta * block_delta * count * block_count / total
        mean += block_delta * block_count / total
        count += block_count
    rows = tl.maximum(count, 1.0)
    tl.store(mean_out + k, mean, mask=k < K)
    tl.store(invstd_out + k, tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(m2, rows) + eps)), mask=k < K)
    # A single row has no variance: NaN, unless there is none at all.
    tl.store(unbiased_var_out + k, tl.where(count > 0, tl.div_rn(m2, count - 1.0), 0.0), mask=k < K)


@triton.jit
def normalise(
    raw, mean, invstd, gamma, beta, residual, y,
    N, T, P, s_n, s_t, s_p, r_n, r_t, r_p, y_n, y_t, y_p,
    K: tl.constexpr, FIRST: tl.constexpr, NORM: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """y = act((raw - mean) * invstd * gamma + beta + residual); without NORM a copy of rows."""
    K_TILES: tl.constexpr = (K + BN - 1) // BN
    k = (tl.program_id(0) % K_TILES * BN + tl.arange(0, BN))[None, :]
    n, t, p, valid = tile_rows(tl.program_id(0) // K_TILES, N, T, P, BM, 1, WIDE)
    inside = valid[:, None] & (k < K)
    value = tl.load(raw + row_offset(n, t, p, s_n, s_t, s_p, UNIT)[:, None] + k, mask=inside, other=0.0)
    if NORM:
        value = normalised(
            value.to(tl.float32),
            per_channel(mean, k, K, True, 0.0),
            per_channel(invstd, k, K, True, 0.0),
            per_channel(gamma, k, K, HAS_GAMMA, 1.0),
            per_channel(beta, k, K, HAS_BETA, 0.0),
        )
        if HAS_RESIDUAL:
            offset = row_offset(n, t, p, r_n, r_t, r_p, UNIT)[:, None]
            value += tl.load(residual + offset + k, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            value = relu_of(value)
    offset = row_offset(n, t, p, y_n, y_t, y_p, UNIT)[:, None]
    tl.store(y + offset + FIRST + k, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def fold_statistics(
    mean, var, gamma, beta, scale, shift,
    eps,
    K: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """scale and shift that apply fixed statistics."""
    k = tl.program_id(0) * BN + tl.arange(0, BN)
    invstd = tl.div_rn(1.0, tl.sqrt_rn(tl.load(var + k, mask=k < K, other=1.0) + eps))
    of_scale = per_channel(gamma, k, K, HAS_GAMMA, 1.0) * invstd
    of_shift = per_channel(beta, k, K, HAS_BETA, 0.0) - tl.load(mean + k, mask=k < K, other=0.0) * of_scale
    tl.store(scale + k, of_scale, mask=k < K)
    tl.store(shift + k, of_shift, mask=k < K)


@triton.jit
def move_running_statistics(
    running_mean, running_var, batches, mean, unbiased_var,
    momentum,
    K: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_VAR: tl.constexpr, COUNTS: tl.constexpr, CUMULATIVE: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """running += factor * (batch - running), the factor being momentum or 1 / num_batches_tracked. One program, which
    counts the batch first. In float64, so that the average is rounded once."""
    if COUNTS:
        count = tl.load(batches) + 1
        tl.store(batches, count)
    factor = 1.0 / count.to(tl.float64) if CUMULATIVE else tl.cast(momentum, tl.float64)
    for first in range(0, K, BN):
        k = first + tl.arange(0, BN)
        if HAS_MEAN:
            move(running_mean + k, mean + k, factor, k < K)
        if HAS_VAR:
            move(running_var + k, unbiased_var + k, factor, k < K)


@triton.jit
def move(running, batch, factor, inside):
    old = tl.load(running, mask=inside, other=0.0).to(tl.float64)
    new = (1.0 - factor) * old + factor * tl.load(batch, mask=inside, other=0.0).to(tl.float64)
    # By way of float32: PTX has no conversion from float64 to bfloat16.
    tl.store(running, new.to(tl.float32).to(running.dtype.element_ty), mask=inside)
