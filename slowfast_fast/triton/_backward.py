"""Kernels of the backward: sums of the gradient, the gradient of the input (dgrad) and of the weight (wgrad)."""

from __future__ import annotations

import triton
import triton.language as tl

from ._device import before_factor, masked_gradient, per_channel, row_offset, tile_rows


@triton.jit
def gradient_sums(
    grad, saved, residual, mean, invstd, gamma, beta, dresidual, partial,
    N, T, P, g_n, g_t, g_p, s_n, s_t, s_p, r_n, r_t, r_p, d_n, d_t, d_p, tiles, share,
    K: tl.constexpr, NORM: tl.constexpr, RELU: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr, STORE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Per channel, the sums over ``share`` tiles of g and (NORM) of g * xhat into ``partial`` (2, chunks, K). g itself
    is the gradient of the residual and is stored on the way where that is wanted."""
    K_TILES: tl.constexpr = (K + BN - 1) // BN
    chunk = tl.program_id(0) // K_TILES
    k = (tl.program_id(0) % K_TILES * BN + tl.arange(0, BN))[None, :]
    of_g = tl.zeros((BM, BN), tl.float32)
    of_gx = tl.zeros((BM, BN), tl.float32)
    for tile in range(chunk * share, tl.minimum(chunk * share + share, tiles)):
        n, t, p, valid = tile_rows(tile, N, T, P, BM, 1, WIDE)
        inside = valid[:, None] & (k < K)
        g, xhat = masked_gradient(
            *(grad, saved, residual, mean, invstd, gamma, beta, n[:, None], t[:, None], p[:, None], k, inside),
            *(g_n, g_t, g_p, s_n, s_t, s_p, r_n, r_t, r_p),
            *(K, NORM, RELU, HAS_RESIDUAL, HAS_GAMMA, HAS_BETA, UNIT),
        )
        of_g += g
        if NORM:
            of_gx += g * xhat
        if STORE:
            offset = row_offset(n, t, p, d_n, d_t, d_p, UNIT)[:, None]
            tl.store(dresidual + offset + k, g.to(dresidual.dtype.element_ty), mask=inside)
    chunks = tl.num_programs(0) // K_TILES
    at = partial + chunk * K + k
    tl.store(at, tl.sum(of_g, 0)[None, :], mask=k < K)
    if NORM:
        tl.store(at + chunks * K, tl.sum(of_gx, 0)[None, :], mask=k < K)


@triton.jit
def add_chunks(partial, sum_g, sum_gx, chunks, K: tl.constexpr, NORM: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr):
    """The sums of `gradient_sums` over its chunks, always in the same order."""
    k = tl.program_id(0) * BN + tl.arange(0, BN)
    of_g = tl.zeros((BT, BN), tl.float32)
    of_gx = tl.zeros((BT, BN), tl.float32)
    for first in range(0, chunks, BT):
        chunk = first + tl.arange(0, BT)
        inside = (chunk < chunks)[:, None] & (k < K)[None, :]
        at = partial + chunk[:, None] * K + k[None, :]
        of_g += tl.load(at, mask=inside, other=0.0)
        if NORM:
            of_gx += tl.load(at + chunks * K, mask=inside, other=0.0)
    tl.store(sum_g + k, tl.sum(of_g, 0), mask=k < K)
    if NORM:
        tl.store(sum_gx + k, tl.sum(of_gx, 0), mask=k < K)


@triton.jit
def dgrad(
    grad, saved, residual, weight, factor, mean, invstd, beta, sum_g, sum_gx, dx,
    N, T_in, T_out, P, g_n, g_t, g_p, s_n, s_t, s_p, r_n, r_t, r_p, d_n, d_t, d_p, inverse_rows,
    C: tl.constexpr, K: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    DILATION: tl.constexpr, GCD: tl.constexpr, NORM: tl.constexpr, RELU: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_FACTOR: tl.constexpr, HAS_BETA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    FRAMES: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx[row, c] = sum over taps and k of gradient[row - tap, k] * weight[k, tap, c], weight packed as (K, taps, C).

    program_id(1) is a residue class: the input frames residue, residue + STRIDE, ... are all seen by the same taps,
    every STEP-th one from ``tap0`` on. The m-th of these taps sees the i-th of these frames in output frame
    i + base - m * BACK. So each class is a convolution of stride 1, and no stuffed zero is ever multiplied. ``factor``
    is scale or gamma, GCD is gcd(STRIDE, DILATION). m and k are one reduction, as in `forward`.
    """
    STEP: tl.constexpr = STRIDE // GCD
    BACK: tl.constexpr = DILATION // GCD
    C_TILES: tl.constexpr = (C + BN - 1) // BN
    c = tl.program_id(0) % C_TILES * BN + tl.arange(0, BN)
    residue = tl.program_id(1)
    tap0 = TAPS
    for back in tl.static_range(TAPS):
        tap = TAPS - 1 - back
        # TAPS * DILATION is added in multiples of STRIDE, to keep the dividend positive.
        if (residue + PADDING + (TAPS * STRIDE - tap) * DILATION) % STRIDE == 0:
            tap0 = tap
    depth = (TAPS - tap0 + STEP - 1) // STEP * K
    base = (residue + PADDING - tap0 * DILATION) // STRIDE  # divides evenly wherever depth > 0
    frames = (T_in - residue + STRIDE - 1) // STRIDE
    n, i, p, valid = tile_rows(tl.program_id(0) // C_TILES, N, frames, P, BM, FRAMES, WIDE)
    acc = tl.zeros((BM, BN), tl.float32)
    for d0 in tl.range(0, depth, BK):
        d = d0 + tl.arange(0, BK)
        if K % BK == 0:
            m = d0 // K
            of_k = d0 - m * K + tl.arange(0, BK)
            t = i[:, None] + base - m * BACK
        else:
            m = d // K
            of_k = d % K
            t = i[:, None] + base - (m * BACK)[None, :]
        k = of_k[None, :]
        ok = valid[:, None] & (t >= 0) & (t < T_out) & (d < depth)[None, :]
        g, xhat = masked_gradient(
            *(grad, saved, residual, mean, invstd, factor, beta, n[:, None], t, p[:, None], k, ok),
            *(g_n, g_t, g_p, s_n, s_t, s_p, r_n, r_t, r_p),
            *(K, NORM, RELU, HAS_RESIDUAL, HAS_FACTOR, HAS_BETA, UNIT),
        )
        g = before_factor(g, xhat, invstd, sum_g, sum_gx, k, ok, inverse_rows, K, NORM)
        if HAS_FACTOR:
            g = g * per_channel(factor, k, K, True, 1.0)
        of_weight = weight + ((of_k * TAPS + tap0 + m * STEP) * C)[:, None] + c[None, :]
        b = tl.load(of_weight, mask=(d < depth)[:, None] & (c < C)[None, :], other=0.0)
        acc = tl.dot(g.to(b.dtype), b, acc, input_precision=PRECISION)
    offset = row_offset(n, residue + i * STRIDE, p, d_n, d_t, d_p, UNIT)
    tl.store(dx + offset[:, None] + c[None, :], acc.to(dx.dtype.element_ty), mask=valid[:, None] & (c < C)[None, :])


@triton.jit
def wgrad(
    grad, saved, residual, x, gamma, mean, invstd, beta, sum_g, sum_gx, partial,
    N, T_in, T_out, P, g_n, g_t, g_p, s_n, s_t, s_p, r_n, r_t, r_p, x_n, x_t, x_p, inverse_rows, tiles, share,
    C: tl.constexpr, K: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    DILATION: tl.constexpr, NORM: tl.constexpr, RELU: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    FRAMES: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial[split, k, d] = sum over ``share`` tiles of rows of gradient[row, k] * x[row + tap, c], d = tap * C + c,
    but for the factor scale or gamma, which `add_splits` applies. program_id(1) is the split."""
    DEPTH: tl.constexpr = TAPS * C
    D_TILES: tl.constexpr = (DEPTH + BD - 1) // BD
    k = tl.program_id(0) // D_TILES * BN + tl.arange(0, BN)
    d = tl.program_id(0) % D_TILES * BD + tl.arange(0, BD)
    of_tap = (d // C * DILATION - PADDING)[None, :]
    c = (d % C)[None, :]
    split = tl.program_id(1)
    acc = tl.zeros((BN, BD), tl.float32)
    for tile in tl.range(split * share, tl.minimum(split * share + share, tiles)):
        n, t, p, valid = tile_rows(tile, N, T_out, P, BM, FRAMES, WIDE)
        ok = valid[:, None] & (k < K)[None, :]
        g, xhat = masked_gradient(
            *(grad, saved, residual, mean, invstd, gamma, beta, n[:, None], t[:, None], p[:, None], k[None, :], ok),
            *(g_n, g_t, g_p, s_n, s_t, s_p, r_n, r_t, r_p),
            *(K, NORM, RELU, HAS_RESIDUAL, HAS_GAMMA, HAS_BETA, UNIT),
        )
        g = before_factor(g, xhat, invstd, sum_g, sum_gx, k[None, :], ok, inverse_rows, K, NORM)
        frame = (t * STRIDE)[:, None] + of_tap
        in_x = valid[:, None] & (frame >= 0) & (frame < T_in) & (d < DEPTH)[None, :]
        b = tl.load(x + (n * x_n + p * x_p)[:, None] * UNIT + frame * x_t * UNIT + c, mask=in_x, other=0.0)
        acc = tl.dot(tl.trans(g.to(b.dtype)), b, acc, input_precision=PRECISION)
    at = (split * K + k)[:, None] * DEPTH + d[None, :]
    tl.store(partial + at, acc, mask=(k < K)[:, None] & (d < DEPTH)[None, :])


@triton.jit
def add_splits(
    partial, weight, factor, dweight, dfactor,
    splits,
    C: tl.constexpr, K: tl.constexpr, TAPS: tl.constexpr, HAS_FACTOR: tl.constexpr, WANT_WEIGHT: tl.constexpr,
    WANT_FACTOR: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Of output channel program_id(0): dweight = factor * w and dfactor = sum of weight * w, w being the sum of
    `wgrad`'s splits in their order. weight and dweight are (K, C, taps)."""
    DEPTH: tl.constexpr = TAPS * C
    k = tl.program_id(0)
    of_factor = tl.zeros((BD,), tl.float32)
    for first in range(0, DEPTH, BD):
        d = first + tl.arange(0, BD)
        w = tl.zeros((BS, BD), tl.float32)
        for split0 in range(0, splits, BS):
            split = split0 + tl.arange(0, BS)
            inside = (split < splits)[:, None] & (d < DEPTH)[None, :]
            w += tl.load(partial + (split * K + k)[:, None] * DEPTH + d[None, :], mask=inside, other=0.0)
        total = tl.sum(w, 0)
        at = k * DEPTH + d % C * TAPS + d // C
        if WANT_FACTOR:
            of_factor += total * tl.load(weight + at, mask=d < DEPTH, other=0.0).to(tl.float32)
        if WANT_WEIGHT:
            if HAS_FACTOR:
                total *= tl.load(factor + k)
            tl.store(dweight + at, total.to(dweight.dtype.element_ty), mask=d < DEPTH)
    if WANT_FACTOR:
        tl.store(dfactor + k, tl.sum(of_factor, 0))
