"""The tile shapes that are tried. The first of each list is the heuristic one: it depends on the shape of the call
only, not on the device, so that results repeat where nothing is measured."""

from __future__ import annotations

from typing import NamedTuple

import triton

# Programs that fill a chip: the 132 multiprocessors of an H200 (SXM), near the 108 of an A100.
WAVE = 132
# From this many outputs and this depth on, tiles of 128 are filled.
WIDE_CHANNELS = 128


class Config(NamedTuple):
    """BM rows by BN outputs, a depth of BK at a time; FRAMES and SPLIT as `_forward.forward` explains them."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    frames: int = 1
    split: int = 1


def _at_least(size: int, fewest: int, most: int) -> int:
    return min(max(triton.next_power_of_2(int(size)), fewest), most)


def product_configs(
    rows: int, outputs: int, channels: int, taps: int, frames: int, bits: int, backward: bool = False
) -> list[Config]:
    """For ``rows`` rows, in clips of ``frames``, ``outputs`` outputs and a depth of ``taps`` * ``channels``."""
    depth = taps * channels
    slab = 64 if bits == 16 else 32  # 128 bytes: a whole line of a row
    if outputs >= WIDE_CHANNELS and depth >= WIDE_CHANNELS:
        if backward:
            return _wide_backward(slab)
        return [_split(config, rows, outputs, depth) for config in _wide(slab, bits)]
    bk = _at_least(depth if channels % slab else slab, 16, slab)
    bn = _at_least(outputs, 16, 64 if outputs <= 64 else 128)
    bm = _at_least(rows, 16, 128)
    # Narrow rows are read once per tap; frames in one tile let L1 answer all but the first read, and a read that goes
    # through asynchronous copies (more than one stage) would pass L1 by.
    several = _at_least(frames, 1, 8) if taps > 1 and bm >= 64 else 1
    return [
        Config(bm, bn, bk, 4, 1, several),
        Config(bm, bn, bk, 4, 3),
        Config(min(2 * bm, 256), bn, bk, 8, 1, several),
        Config(max(bm // 2, 16), bn, bk, 4, 3),
    ]


def _wide(slab: int, bits: int) -> list[Config]:
    return [
        Config(128, 128, slab, 8, 3),
        Config(128, 128, slab // 2, 8, 4),
        *([Config(128, 256, slab, 8, 3)] if bits == 16 else []),  # in TF32 its registers spill
        Config(64, 128, slab, 4, 4),
        Config(128, 64, slab, 4, 4),
    ]


def _wide_backward(slab: int) -> list[Config]:
    """dgrad brings up to three tensors through registers on their way to tl.dot, which leaves it fewer of them."""
    return [
        Config(128, 128, slab, 8, 3),
        Config(64, 64, slab, 4, 3),
        Config(64, 128, slab, 4, 3),
        Config(128, 64, slab, 8, 3),
    ]


def _split(config: Config, rows: int, outputs: int, depth: int) -> Config:
    """Split the depth where the tiles do not fill a chip, into shares that are still worth a launch."""
    tiles = triton.cdiv(rows, config.bm) * triton.cdiv(outputs, config.bn)
    split = min(WAVE // max(tiles, 1), depth // 512, 8)
    return config._replace(split=split) if split > 1 else config


def wgrad_configs(rows: int, outputs: int, depth: int, bits: int) -> list[Config]:
    """BM is the depth here (rows), BN by BK the tile of the weight's gradient, SPLIT the number of row shares."""
    bn, bk = _at_least(outputs, 16, 128), _at_least(depth, 16, 128)
    bm = 64 if bits == 16 else 32
    tiles = triton.cdiv(outputs, bn) * triton.cdiv(depth, bk)
    # Shares of at least 4 slabs, and a few programs to each multiprocessor where the gradient is small.
    split = max(1, min(triton.cdiv(4 * WAVE, tiles), triton.cdiv(rows, 4 * bm)))
    warps = 8 if bn * bk > 64 * 64 else 4
    return [
        Config(bm, bn, bk, warps, 3, 1, split),
        Config(bm, bn, bk, warps, 2, 1, split),
        Config(bm // 2, bn, bk, 8, 4, 1, split),
        Config(bm, min(bn, 64), min(bk, 64), 4, 4, 1, max(1, split // 4)),
    ]


def row_tile(channels: int) -> tuple[int, int]:
    """(rows, channels) of a tile that is only read, transformed and written: 4096 values."""
    bn = _at_least(channels, 8, 256)
    return 4096 // bn, bn


def reduction_tile(parts: int, channels: int) -> tuple[int, int]:
    """(parts, channels) of a tile of partial results. Few channels leave few programs, which then take many parts at
    once."""
    bn = _at_least(channels, 8, 32)
    return _at_least(parts, 16, 4096 // bn), bn


def split_tile(splits: int, depth: int) -> tuple[int, int]:
    """(splits, depth) of a tile of wgrad's partial results; one program takes the whole depth of an output channel."""
    bs = _at_least(splits, 1, 64)
    return bs, _at_least(depth, 16, 2048 // bs)
