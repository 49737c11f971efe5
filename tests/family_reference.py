"""The family in plain PyTorch, as functions of a network's weights: what each keyword means, written down once more.

Nothing here knows the package but the names of the weights. Heads average over all positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Plain:
    """A network; the attributes are what its weights do not show, named as ``models.slowfast_network`` names them."""

    weights: Mapping[str, Tensor]  # parameters and buffers; the latter are updated in training
    training: bool
    alpha: int = 1
    lateral: str = "none"
    lateral_join: str = "concat"
    lateral_direction: str = "fast_to_slow"
    lateral_activation: bool = True
    non_local_kind: str = "dot_product"
    non_local_pool: tuple[int, int, int] = (1, 2, 2)
    strides: tuple[int, ...] = (1, 2, 2, 2)
    dilations: tuple[int, ...] = (1, 1, 1, 1)
    stem_stride: int = 1  # in time, of the convolution and of the pool of the only pathway
    pools_res2: bool = False  # pairs of frames

    def slowfast(self, clips: Sequence[Tensor]) -> Tensor:
        return self.classified(torch.cat([features.mean((2, 3, 4)) for features in self.pathways(clips)], 1))

    def detection(self, clips: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """Of each box the largest feature of 7 x 7 cells, at 1/16 of the clips' size, classes by themselves."""
        slow, fast = self.pathways(clips)
        sampled = roi_align(torch.cat([slow.mean(2), fast.mean(2)], 1), boxes, (7, 7), 1 / 16, 0)
        return self.classified(sampled.amax((2, 3))).sigmoid()

    def pathways(self, clips: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        slow, fast = (self.stem(f"blocks.0.multipathway_blocks.{p}.", clip) for p, clip in enumerate(clips))
        for stage in range(1, 5):
            slow, fast = self.joined(f"blocks.{stage - 1}.multipathway_fusion.", slow, fast)
            slow, fast = (
                self.stage(f"blocks.{stage}.multipathway_blocks.{p}.", x, stage) for p, x in ((0, slow), (1, fast))
            )
        return slow, fast

    def resnet(self, clip: Tensor) -> Tensor:
        x = self.stem("blocks.0.", clip, self.stem_stride)
        for stage in range(1, 5):
            # A pool is a block of its own.
            x = self.stage(f"blocks.{stage + (self.pools_res2 and stage > 1)}.", x, stage)
            if self.pools_res2 and stage == 1:
                x = F.max_pool3d(x, (2, 1, 1))
        return self.classified(x.mean((2, 3, 4)))

    def classified(self, features: Tensor) -> Tensor:
        path = next(key for key in self.weights if key.endswith("proj.weight")).removesuffix("weight")
        return features @ self.weights[path + "weight"].T + self.weights[path + "bias"]

    def stem(self, path: str, x: Tensor, stride: int = 1) -> Tensor:
        x = self.layer(path + "conv", path + "norm", x, (stride, 2, 2)).relu()
        return F.max_pool3d(x, (1, 3, 3), (stride, 2, 2), (0, 1, 1))

    def stage(self, path: str, x: Tensor, stage: int) -> Tensor:
        index, stride, dilation = 0, self.strides[stage - 1], self.dilations[stage - 1]
        while f"{path}res_blocks.{index}.branch2.conv_a.weight" in self.weights:
            x = self.block(f"{path}res_blocks.{index}.", x, 1 if index else stride, dilation)
            if f"{path}non_local.{index}.conv_g.weight" in self.weights:
                x = self.non_local(f"{path}non_local.{index}.", x)
            index += 1
        return x

    def block(self, path: str, x: Tensor, stride: int, dilation: int) -> Tensor:
        shortcut = x
        if path + "branch1_conv.weight" in self.weights:
            shortcut = self.layer(path + "branch1_conv", path + "branch1_norm", x, (1, stride, stride))
        bottleneck = path + "branch2.conv_c.weight" in self.weights
        strided = "b" if bottleneck else "a"
        for part in "abc" if bottleneck else "ab":
            step = (1, stride, stride) if part == strided else (1, 1, 1)
            x = self.layer(
                f"{path}branch2.conv_{part}", f"{path}branch2.norm_{part}", x, step, dilation if part == "b" else 1
            )
            x = (x + shortcut if part == ("c" if bottleneck else "b") else x).relu()
        return x

    def non_local(self, path: str, x: Tensor) -> Tensor:
        pooled = F.max_pool3d(x, self.non_local_pool)
        theta, phi, g = (
            self.layer(path + f"conv_{name}", None, source).flatten(2)
            for name, source in (("theta", x), ("phi", pooled), ("g", pooled))
        )
        products = torch.einsum("ncq,nck->nqk", theta, phi)
        if self.non_local_kind == "softmax":
            weights = (products / phi.shape[1] ** 0.5).softmax(2)
        else:
            weights = products / phi.shape[2]
        seen = torch.einsum("nqk,nck->ncq", weights, g).unflatten(2, x.shape[2:])
        return x + self.layer(path + "conv_out", path + "norm", seen)

    def joined(self, path: str, slow: Tensor, fast: Tensor) -> tuple[Tensor, Tensor]:
        if self.lateral == "none":
            return slow, fast
        if path + "conv_fast_to_slow.weight" in self.weights:  # the paper's connection has pytorchvideo's names
            seen = self.layer(path + "conv_fast_to_slow", path + "norm", fast, (self.alpha, 1, 1))
            return self.join(slow, seen), fast
        to_slow = self.lateral_direction != "slow_to_fast"
        to_fast = self.lateral_direction != "fast_to_slow"
        return (
            self.join(slow, self.to_slow(path + "fast_to_slow.", fast)) if to_slow else slow,
            self.join(fast, self.to_fast(path + "slow_to_fast.", slow)) if to_fast else fast,
        )

    def join(self, target: Tensor, seen: Tensor) -> Tensor:
        seen = seen.relu() if self.lateral_activation else seen
        return torch.cat([target, seen], 1) if self.lateral_join == "concat" else target + seen

    def to_slow(self, path: str, fast: Tensor) -> Tensor:
        if self.lateral == "conv":
            return self.layer(path + "transform", path + "norm", fast, (self.alpha, 1, 1))
        taps = 1 if self.lateral == "sampling" else self.alpha
        return self.normed(path + "norm", torch.cat([fast[:, :, tap :: self.alpha] for tap in range(taps)], 1))

    def to_fast(self, path: str, slow: Tensor) -> Tensor:
        if self.lateral == "conv":
            # Every slow frame, and alpha - 1 empty ones behind it, under the kernel turned around.
            spread = slow.new_zeros((*slow.shape[:2], slow.shape[2] * self.alpha, *slow.shape[3:]))
            spread[:, :, :: self.alpha] = slow
            weight = self.weights[path + "transform.weight"].transpose(0, 1).flip(2)
            seen = F.conv3d(spread, weight, padding=(weight.shape[2] // 2, 0, 0))
        elif self.lateral == "sampling":
            seen = torch.stack([slow] * self.alpha, 3).flatten(2, 3)
        else:
            seen = torch.stack(slow.chunk(self.alpha, 1), 3).flatten(2, 3)
        return self.normed(path + "norm", seen)

    def layer(
        self,
        conv: str,
        norm: str | None,
        x: Tensor,
        stride: tuple[int, int, int] = (1, 1, 1),
        dilation: int = 1,
    ) -> Tensor:
        weight = self.weights[conv + ".weight"]
        spread = (1, dilation, dilation)
        padding = [size // 2 * step for size, step in zip(weight.shape[2:], spread, strict=True)]
        x = F.conv3d(x, weight, self.weights.get(conv + ".bias"), stride, padding, spread)
        return x if norm is None else self.normed(norm, x)

    def normed(self, path: str, x: Tensor) -> Tensor:
        if path + ".weight" not in self.weights:
            return x
        names = ("running_mean", "running_var", "weight", "bias")
        values = [self.weights[f"{path}.{name}"] for name in names]
        return F.batch_norm(x, *values, training=self.training, momentum=0.1, eps=1e-5)


def roi_align(
    x: Tensor,
    boxes: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool = False,
) -> Tensor:
    """Sample after sample, as the paper and torchvision's kernel have it: x (N, C, H, W), boxes (B, 5)."""
    cells = []
    for clip, *corners in boxes.tolist():
        x1, y1, x2, y2 = (corner * spatial_scale - (0.5 if aligned else 0.0) for corner in corners)
        features = x[int(clip)]
        rows = _samples(y1, y2, output_size[0], sampling_ratio, aligned)
        columns = _samples(x1, x2, output_size[1], sampling_ratio, aligned)
        cells.append(torch.stack([torch.stack([_cell(features, ys, xs) for xs in columns], 1) for ys in rows], 1))
    return torch.stack(cells) if cells else x.new_zeros(0, x.shape[1], *output_size)


def _samples(first: float, last: float, cells: int, ratio: int, aligned: bool) -> list[list[float]]:
    """Where the samples of each cell lie, in one direction."""
    size = (last - first if aligned else max(last - first, 1.0)) / cells
    count = ratio or math.ceil(size)
    return [[first + cell * size + (i + 0.5) * size / count for i in range(count)] for cell in range(cells)]


def _cell(features: Tensor, ys: list[float], xs: list[float]) -> Tensor:
    """The mean of (C, H, W) over a grid of samples; those outside by more than a position count as 0."""
    total = 0 * features[:, 0, 0]
    height, width = features.shape[1:]
    for y in ys:
        for x in xs:
            if -1 <= y <= height and -1 <= x <= width:
                total = total + _interpolated(features, min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0))
    return total / max(len(ys) * len(xs), 1)


def _interpolated(features: Tensor, y: float, x: float) -> Tensor:
    top, left = int(y), int(x)
    bottom, right = min(top + 1, features.shape[1] - 1), min(left + 1, features.shape[2] - 1)
    up, beside = y - top, x - left
    upper = (1 - beside) * features[:, top, left] + beside * features[:, top, right]
    lower = (1 - beside) * features[:, bottom, left] + beside * features[:, bottom, right]
    return (1 - up) * upper + up * lower
