"""Models by name: ``list_models``, ``create_model``, and the decorator that puts a constructor among them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Constructor = TypeVar("Constructor", bound=Callable[..., nn.Module])

# From scores (N, classes) to probabilities: of classes that exclude one another, and of such that do not.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": partial(torch.softmax, dim=1),
    "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True)
class Recipe:
    """How a model is trained unless something else is said.

    Attributes:
        batch: clips of a step.
        lr: learning rate.
        weight_decay: factor of the L2 penalty on all parameters.
        epochs: over the training set.
    """

    batch: int
    lr: float
    weight_decay: float
    epochs: int


@dataclass(frozen=True)
class Entry:
    """A named constructor, and what its networks take.

    Attributes:
        name: of the constructor.
        create: called with overrides.
        frames: of the (slow) clip.
        tau: of the video's frames, this clip has every tau-th one.
        alpha: frames of the fast clip over those of the slow one; None: the network takes one clip, not a list.
        gflops: published, of one clip at 256, multiply-adds in 10^9; None: none are.
        boxes: whether it takes boxes beside the clips.
        activation: what makes probabilities of its scores, a key of ``ACTIVATIONS``: "sigmoid" where a clip may show
            several classes at a time. Detection networks end with it, the others with scores.
        about: one line.
        recipe: how to train it by default; None: the training script's own defaults.
    """

    name: str
    create: Callable[..., nn.Module]
    frames: int
    tau: int
    alpha: int | None
    gflops: float | None
    boxes: bool
    activation: str
    about: str
    recipe: Recipe | None = None

    @property
    def keywords(self) -> Mapping[str, inspect.Parameter]:
        """What overrides there are."""
        return inspect.signature(self.create).parameters

    @property
    def takes_stock_keywords(self) -> bool:
        """Whether overrides include every keyword of ``create_slowfast`` or ``create_resnet``."""
        return any(parameter.kind is parameter.VAR_KEYWORD for parameter in self.keywords.values())

    def clips(self, crop: int = 256, batch: int = 1, device: torch.device | str | None = None) -> Any:
        """What the network takes, of zeros: [slow, fast] or one clip (batch, 3, frames, crop, crop)."""

        def clip(frames: int) -> Tensor:
            return torch.zeros(batch, 3, frames, crop, crop, device=device)

        return clip(self.frames) if self.alpha is None else [clip(self.frames), clip(self.frames * self.alpha)]


_entries: dict[str, Entry] = {}


def register(
    *,
    frames: int,
    tau: int,
    alpha: int | None = None,
    gflops: float | None = None,
    boxes: bool = False,
    activation: str = "softmax",
    recipe: Recipe | None = None,
) -> Callable[[Constructor], Constructor]:
    """Put a constructor among the models, under its name; it takes overrides as keywords.

    The arguments are those of :class:`Entry`, whose ``about`` is the first line of the docstring. Raises ValueError for
    a name that is taken and an activation that is unknown.
    """
    check_activation(activation)

    def put(create: Constructor) -> Constructor:
        name = create.__name__
        if name in _entries:
            raise ValueError(f"a model named {name!r} is registered already")
        about = (create.__doc__ or "").strip().partition("\n")[0]
        _entries[name] = Entry(name, create, frames, tau, alpha, gflops, boxes, activation, about, recipe)
        return create

    return put


def check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")


def list_models() -> list[str]:
    """The names that :func:`create_model` takes, in the order of the documentation."""
    return list(_entries)


def entry(name: str) -> Entry:
    """What is known of a model. Raises ValueError for a name that is not registered."""
    if name not in _entries:
        near: Sequence[str] = get_close_matches(name, _entries, 3) or list(_entries)
        raise ValueError(f"no model is named {name!r}; did you mean {', '.join(near)}? list_models() has all")
    return _entries[name]


def create_model(name: str, **overrides: Any) -> nn.Module:
    """The network of a name, with keywords of its constructor instead of what the name stands for.

    ``create_model("slowfast_r50_8x8", model_num_class=10, dropout_rate=0.0)``; a SlowFast network takes the keywords of
    :func:`slowfast_fast.models.slowfast_network` and of ``create_slowfast``, one of a single pathway those of
    :func:`slowfast_fast.models.single_pathway` and ``create_resnet``.

    Raises ValueError for a name that is not registered.
    """
    return entry(name).create(**overrides)
