"""What the kernels share: how a tile's rows are found, the epilogue, and the gradient on its way back.

Tensors are rows of channels (see csrc/primitives.h): row (n, t, p) starts at ``(n * s_n + t * s_t + p * s_p) * UNIT``.
Strides come divided by UNIT, a power of two known when the kernel is compiled, because Triton by itself sees no other
divisibility than 16: rows of 8 channels would be read 2 bytes at a time. Masked reads give 0.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_rows(tile, N, T, P, BM: tl.constexpr, FRAMES: tl.constexpr, WIDE: tl.constexpr):
    """(n, t, p, valid) of the BM rows of a tile.

    FRAMES 1: rows in the order of memory, so that images of any size fill the tile. More: a block of FRAMES frames by
    BM / FRAMES positions, in which the taps of a narrow convolution find each other's reads in L1.
    """
    r = tl.arange(0, BM)
    if WIDE:
        tile = tile + tl.full((), 0, tl.int64)
        r = r.to(tl.int64)
    if FRAMES == 1:
        row = tile * BM + r
        n = row // (T * P)
        t = row // P % T
        p = row % P
        valid = n < N
    else:
        positions: tl.constexpr = BM // FRAMES
        p_tiles = tl.cdiv(P, positions)
        t_tiles = tl.cdiv(T, FRAMES)
        n = tile // (p_tiles * t_tiles)
        t = tile // p_tiles % t_tiles * FRAMES + r // positions
        p = tile % p_tiles * positions + r % positions
        valid = (t < T) & (p < P)
    return n, t, p, valid


@triton.jit
def row_offset(n, t, p, s_n, s_t, s_p, UNIT: tl.constexpr):
    return (n * s_n + t * s_t + p * s_p) * UNIT


@triton.jit
def per_channel(vector, k, K, GIVEN: tl.constexpr, default: tl.constexpr):
    """The values of a vector for channels ``k``, or ``default`` where it is absent."""
    return tl.load(vector + k, mask=k < K, other=0.0) if GIVEN else tl.full(k.shape, default, tl.float32)


@triton.jit
def normalised(raw, mean, invstd, gamma, beta):
    """BatchNorm's result. The backward repeats it for the ReLU mask and must get the same bits, so the one multiply-add
    is spelled out instead of being left to the compiler."""
    return tl.fma((raw - mean) * invstd, gamma, beta)


@triton.jit
def relu_of(value):
    """NaN passes, as in PyTorch."""
    return tl.where(value <= 0, 0.0, value)


@triton.jit
def finish_tile(
    acc, n, t, p, valid, k, tile,
    tiles,
    scale, shift, residual, y, partial,
    r_n, r_t, r_p, y_n, y_t, y_p,
    K: tl.constexpr, FIRST: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr, STATS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """y = act(scale * acc + shift + residual), and with STATS the tile's (count, mean, M2) of each channel into
    ``partial`` (3, tiles, K): of the values as they are stored, since those are what gets normalised."""
    inside = valid[:, None] & (k < K)[None, :]
    if HAS_SCALE:
        acc = acc * tl.load(scale + k, mask=k < K, other=0.0)[None, :]
    if HAS_SHIFT:
        acc = acc + tl.load(shift + k, mask=k < K, other=0.0)[None, :]
    if HAS_RESIDUAL:
        offset = row_offset(n, t, p, r_n, r_t, r_p, UNIT)
        acc += tl.load(residual + offset[:, None] + k[None, :], mask=inside, other=0.0).to(tl.float32)
    if RELU:
        acc = relu_of(acc)
    stored = acc.to(y.dtype.element_ty)
    offset = row_offset(n, t, p, y_n, y_t, y_p, UNIT)
    tl.store(y + offset[:, None] + FIRST + k[None, :], stored, mask=inside)
    if STATS:
        values = tl.where(inside, stored.to(tl.float32), 0.0)
        count = tl.sum(valid.to(tl.float32), 0)
        mean = tl.sum(values, 0) / count
        deviation = tl.where(inside, values - mean[None, :], 0.0)
        # The mean once more, from the deviations: their sum is what rounding left in the first one.
        rest = tl.sum(deviation, 0) / count
        mean += rest
        m2 = tl.sum(deviation * deviation, 0) - rest * rest * count
        at = partial + tile * K + k
        tl.store(at, tl.zeros_like(mean) + count, mask=k < K)
        tl.store(at + tiles * K, mean, mask=k < K)
        tl.store(at + 2 * tiles * K, m2, mask=k < K)


@triton.jit
def masked_gradient(
    grad, saved, residual, mean, invstd, gamma, beta, n, t, p, k, ok,
    g_n, g_t, g_p, s_n, s_t, s_p, r_n, r_t, r_p,
    K: tl.constexpr, NORM: tl.constexpr, RELU: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """(g, xhat): the gradient past the ReLU, 0 where not ``ok``, and with NORM the normalised convolution output.

    ``saved`` is the output of the op (affine form, RELU only) or the raw output of the convolution (NORM). The mask is
    the sign of the output as it was stored; NaN passes. n, t, p are columns or tiles, k is a row or a tile.
    """
    g = tl.load(grad + row_offset(n, t, p, g_n, g_t, g_p, UNIT) + k, mask=ok, other=0.0).to(tl.float32)
    xhat = g
    if NORM or RELU:
        value = tl.load(saved + row_offset(n, t, p, s_n, s_t, s_p, UNIT) + k, mask=ok, other=0.0).to(tl.float32)
    if NORM:
        of_mean = per_channel(mean, k, K, True, 0.0)
        of_invstd = per_channel(invstd, k, K, True, 0.0)
        xhat = (value - of_mean) * of_invstd
        if RELU:
            of_gamma = per_channel(gamma, k, K, HAS_GAMMA, 1.0)
            of_beta = per_channel(beta, k, K, HAS_BETA, 0.0)
            value = normalised(value, of_mean, of_invstd, of_gamma, of_beta)
            if HAS_RESIDUAL:
                offset = row_offset(n, t, p, r_n, r_t, r_p, UNIT)
                value += tl.load(residual + offset + k, mask=ok, other=0.0).to(tl.float32)
            value = value.to(grad.dtype.element_ty).to(tl.float32)
    if RELU:
        g = tl.where(value <= 0, 0.0, g)
    return g, xhat


@triton.jit
def before_factor(g, xhat, invstd, sum_g, sum_gx, k, ok, inverse_rows, K: tl.constexpr, NORM: tl.constexpr):
    """The gradient with respect to the convolution's output, but for the factor scale or gamma."""
    if NORM:
        mean_g = per_channel(sum_g, k, K, True, 0.0) * inverse_rows
        mean_gx = per_channel(sum_gx, k, K, True, 0.0) * inverse_rows
        g = tl.where(ok, (g - mean_g - xhat * mean_gx) * per_channel(invstd, k, K, True, 0.0), 0.0)
    return g
