"""How a library spells the ``state_dict`` keys of a SlowFast network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

# What a key stands for, in terms of the paper: ("stem", pathway), ("lateral", stage before it; 1 is the stem),
# ("block", stage 2 to 5, pathway, block, layer), ("nonlocal", stage, pathway, block, layer) or ("classifier",); then
# "conv" or "norm"; then the name of the tensor as PyTorch has it. Pathway 0 is the slow one.
Slot = tuple[str | int, ...]

TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Spelling:
    """Keys are a path and a tensor's name. Pairs are the paths of a convolution and of its norm.

    Attributes:
        name: as ``convert_state_dict`` takes it.
        pathways: what stands for ``{pathway}``, slow and fast.
        first_stage: what stands for ``{stage}`` at res2; the others count from there. ``{last}`` is any number.
        stem, lateral: pairs; None: it has no norm. ``lateral`` is after res2 to res4.
        stem_lateral: the same after the stem; unless given, ``lateral`` with the stage before res2.
        block: how the paths in a residual block begin; ``layers`` are pairs that go on: a shortcut, a, b and c.
        nonlocal_block: how the paths in the non-local block behind a residual block begin; ``nonlocal_layers`` go on.
        classifier: the path of the last linear layer.
        fast_first: the classifier's columns are [fast | slow] rather than [slow | fast].
        classifier_bias: whether the classifier has one.
        wrapper: the entry under which the library's checkpoints keep the state_dict; None: they are it.
        tensors: where the library does not name a convolution's or norm's tensors as PyTorch does, after the dot.
        given_up: keys that a file may hold and that belong to no network, as a regular expression.
    """

    name: str
    pathways: tuple[str, str]
    first_stage: int
    stem: tuple[str, str]
    lateral: tuple[str, str | None]
    block: str
    layers: Mapping[str, tuple[str, str]]
    classifier: str
    stem_lateral: tuple[str, str | None] | None = None
    nonlocal_block: str | None = None
    nonlocal_layers: Mapping[str, str] = field(default_factory=dict)
    fast_first: bool = False
    classifier_bias: bool = True
    wrapper: str | None = None
    tensors: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    given_up: str | None = None

    @cached_property
    def templates(self) -> list[tuple[Slot, str]]:
        """What a path stands for, with None for what the path tells, and the path with placeholders."""
        named: list[tuple[Slot, str | None]] = []
        for kind, pair in (
            ("stem", self.stem),
            ("stem_lateral", self.stem_lateral or (None, None)),
            ("lateral", self.lateral),
        ):
            named += [((kind, what), path) for what, path in zip(("conv", "norm"), pair, strict=True)]
        for layer, pair in self.layers.items():
            named += [
                (("block", layer, what), f"{self.block}{path}")
                for what, path in zip(("conv", "norm"), pair, strict=True)
            ]
        for layer, path in self.nonlocal_layers.items():
            what = "norm" if layer == "norm" else "conv"
            named.append((("nonlocal", layer, what), f"{self.nonlocal_block}{path}"))
        named.append((("classifier", "conv"), self.classifier))
        return [(slot, path) for slot, path in named if path is not None]

    @cached_property
    def _patterns(self) -> list[tuple[Slot, re.Pattern[str]]]:
        groups = {
            "pathway": f"(?P<pathway>{'|'.join(self.pathways)})",
            "stage": r"(?P<stage>\d+)",
            "block": r"(?P<block>\d+)",
            "last": r"\d+",
        }
        patterns = []
        for slot, path in self.templates:
            pattern = re.sub(r"\\{(\w+)\\}", lambda found: groups[found[1]], re.escape(path))
            names = "|".join(re.escape(name) for name in self._tensors(str(slot[-1])).values())
            patterns.append((slot, re.compile(f"{pattern}(?P<tensor>{names})")))
        return patterns

    def _tensors(self, what: str) -> Mapping[str, str]:
        return self.tensors.get(what) or {name: f".{name}" for name in TENSORS}

    def read(self, key: str) -> Slot | None:
        """What a key stands for; None if it is not one of this library's."""
        for (kind, *middle, what), pattern in self._patterns:
            found = pattern.fullmatch(key)
            if found is None:
                continue
            told = found.groupdict()
            names = {written: name for name, written in self._tensors(str(what)).items()}
            stage = int(told["stage"]) - self.first_stage + 2 if told.get("stage") else 1
            pathway = self.pathways.index(told["pathway"]) if told.get("pathway") else 0
            place: tuple[str | int, ...] = ()
            if kind == "stem":
                place = (pathway,)
            elif kind in ("lateral", "stem_lateral"):
                kind, place = "lateral", (stage,)
            elif kind in ("block", "nonlocal"):
                place = (stage, pathway, int(told["block"]), *middle)
            return (kind, *place, what, names[told["tensor"]])
        return None

    def write(self, slot: Slot) -> str | None:
        """The key that stands for ``slot``; None if this library has none."""
        kind, *place, what, tensor = slot
        told: dict[str, str] = {}
        middle: list[str | int] = []
        if kind == "stem":
            told["pathway"] = self.pathways[int(place[0])]
        elif kind == "lateral":
            told["stage"] = str(int(place[0]) - 2 + self.first_stage)
            if place[0] == 1 and self.stem_lateral is not None:
                kind = "stem_lateral"
        elif kind in ("block", "nonlocal"):
            stage, pathway, block, *middle = place
            told |= {
                "stage": str(int(stage) - 2 + self.first_stage),
                "pathway": self.pathways[int(pathway)],
                "block": str(block),
            }
        path = dict(self.templates).get((kind, *middle, what))
        name = self._tensors(str(what)).get(str(tensor))
        return None if path is None or name is None else path.format(**told) + name
