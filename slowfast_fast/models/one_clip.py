"""One clip in, whatever a network takes: the pathways' frames, views and their average, and features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._layout import as_rows
from ..pathways import Frames, pathway_frames
from .registry import ACTIVATIONS, check_activation

AVERAGES = ("scores", "probabilities")


class OneClip(nn.Module):
    """A network of one or two pathways as one that takes a clip, or views of a video.

    Args:
        model: called with [slow, fast], or with one clip where ``alpha`` is None: of ``create_slowfast``,
            ``create_model`` or another library, accelerated, frozen, compiled. It gives (N, classes).
        alpha: frames of the fast pathway for one of the slow one; None: a network of one pathway.
        tau: stride of the slow (or only) pathway over the clip; None: alpha, the clip being the fast pathway's.
        rule: the library whose frames these are, as :func:`slowfast_fast.pathway_frames` takes it.
        average: over views, of what the network gives ("scores") or of its ``activation`` ("probabilities", which a
            single view then gives too). Paper, section 4: the softmax scores of 30 views, averaged.
        activation: "softmax", or "sigmoid" where a clip may show several classes at a time (Charades).
        views_at_once: most clips in one call of the network; None: all.

    Raises ValueError for arguments that do not exist or do not fit.
    """

    explains_itself = True

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: int | None = 4,
        tau: int | None = None,
        rule: str = "pytorchvideo",
        average: str = "scores",
        activation: str = "softmax",
        views_at_once: int | None = None,
    ) -> None:
        super().__init__()
        check_activation(activation)
        if average not in AVERAGES:
            raise ValueError(f"average must be one of {', '.join(AVERAGES)}; got {average!r}")
        if views_at_once is not None and views_at_once < 1:
            raise ValueError(f"views_at_once must be at least 1 or None; got {views_at_once}")
        self.model = model
        self.alpha, self.tau, self.rule = alpha, tau, rule
        self.average, self.activation, self.views_at_once = average, activation, views_at_once
        longest = max(alpha or 1, tau or 1)
        pathway_frames(longest, alpha=alpha or 1, tau=tau, rule=rule)  # for its errors

    def forward(self, clip: Tensor) -> Tensor:
        """(N, 3, T, H, W), or M views of each video as (N, M, 3, T, H, W) -> (N, classes)."""
        scores = self._by_parts(clip, self.model)
        if scores.dim() != 2:
            raise ValueError(f"the model must give (N, classes); got shape {tuple(scores.shape)}")
        if self.average == "probabilities":
            scores = ACTIVATIONS[self.activation](scores)
        return _views(scores, clip).mean(1)

    def sample(self, clip: Tensor) -> list[Tensor] | Tensor:
        """What the network takes of (N, 3, T, H, W): [slow, fast], or the clip of the only pathway. Frames at equal
        distances are views into ``clip``."""
        slow, fast = pathway_frames(clip.shape[2], alpha=self.alpha or 1, tau=self.tau, rule=self.rule)
        if self.alpha is None:
            return _take(clip, fast)
        return [_take(clip, slow), _take(clip, fast)]

    def vector(self, clip: Tensor) -> Tensor:
        """What the classifier sees, as (N, 2304) for R50 (slow 2048, fast 256): the features behind the head's pools,
        averaged over positions and views. ``clip`` is as for ``forward``."""
        stages, pools = _taken_apart(self.model)

        def pooled(x: Any) -> Tensor:
            maps = _run(stages, x, self.model)
            # In float32: PyTorch has no average pool in half precision on the CPU.
            work = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in maps]
            parts = [part if pool is None else pool(part) for part, pool in zip(work, pools, strict=True)]
            return torch.cat([part.mean((2, 3, 4)) for part in parts], 1).to(maps[0].dtype)

        return _views(self._by_parts(clip, pooled), clip).mean(1)

    def maps(self, clip: Tensor) -> tuple[Tensor, ...]:
        """The features behind the last stage, (slow, fast), each (N, C, T', H', W'), or (N, M, C, T', H', W') for
        views; of one pathway a tuple of one."""
        stages, _ = _taken_apart(self.model)
        found = self._by_parts(clip, lambda x: _run(stages, x, self.model))
        return tuple(found) if clip.dim() == 5 else tuple(_views(part, clip) for part in found)

    def _by_parts(self, clip: Tensor, call: Any) -> Any:
        """``call`` on the views in turn; a tensor, or several, with a row for each view."""
        if not isinstance(clip, Tensor) or clip.dim() not in (5, 6):
            got = tuple(clip.shape) if isinstance(clip, Tensor) else type(clip).__name__
            raise ValueError(f"clip must be (N, 3, T, H, W), or with views (N, M, 3, T, H, W); got {got}")
        views = clip if clip.dim() == 5 else clip.flatten(0, 1)
        if self.views_at_once is None or len(views) <= self.views_at_once:
            return call(self.sample(views))
        parts = [call(self.sample(part)) for part in views.split(self.views_at_once)]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts)
        return [torch.cat(of_pathway) for of_pathway in zip(*parts, strict=True)]


def _views(rows: Tensor, clip: Tensor) -> Tensor:
    """(N, M, ...) of (N * M, ...)."""
    return rows.unsqueeze(1) if clip.dim() == 5 else rows.unflatten(0, clip.shape[:2])


def _take(clip: Tensor, frames: Frames) -> Tensor:
    step = frames[1] - frames[0] if len(frames) > 1 else 1
    if frames == tuple(range(0, len(frames) * step, step)):
        return clip[:, :, : frames[-1] + 1 : step]
    return clip.index_select(2, torch.tensor(frames, device=clip.device))


def _taken_apart(model: nn.Module) -> tuple[Sequence[nn.Module], list[nn.Module | None]]:
    """The blocks before the head, and the head's pools, one for each pathway. Told by their parts, as stock modules of
    pytorchvideo have them as well as ours; frozen heads hold the pools themselves."""
    blocks = list(getattr(getattr(model, "_orig_mod", model), "blocks", ()))
    head = blocks.pop() if blocks else None
    if head is not None and hasattr(head, "pools"):
        return blocks, list(head.pools)
    if blocks and hasattr(blocks[-1], "retain_list"):
        pool = blocks.pop().pool
        return blocks, [None, None] if pool is None else list(pool)
    if head is not None and hasattr(head, "proj"):
        return blocks, [head.pool]
    raise TypeError(
        "features are taken of networks of create_slowfast, create_resnet, create_model, pytorchvideo and freeze; "
        f"got {type(model).__name__}"
    )


def _run(stages: Sequence[nn.Module], x: Any, model: nn.Module) -> list[Tensor]:
    frozen = hasattr(getattr(model, "_orig_mod", model), "clips")
    out = as_rows(x, "clip") if isinstance(x, Tensor) else list(x)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        for stage in stages:
            out = stage(out)
    return [out] if isinstance(out, Tensor) else list(out)
