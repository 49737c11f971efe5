"""From one library's ``state_dict`` keys to another's."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _caffe2
from ._accelerate import LIBRARIES
from ._spelling import Slot, Spelling

SPELLINGS: Mapping[str, Spelling] = {library.spelling.name: library.spelling for library in LIBRARIES}
SOURCES: Mapping[str, Spelling] = {**SPELLINGS, "caffe2": _caffe2.SPELLING}


class CheckpointError(ValueError):
    """A checkpoint, or a ``state_dict``, that is damaged, is refused, or does not fit."""


@dataclass(frozen=True)
class Conversion:
    """A ``state_dict``, and what was done to get it."""

    state_dict: dict[str, Tensor]
    source: str
    target: str
    mapped: Mapping[str, int]  # how many stems, lateral connections, ... there are
    changes: tuple[str, ...]
    activation: str | None = None  # what a file says makes probabilities of scores: "softmax", "sigmoid"

    def __str__(self) -> str:
        parts = ", ".join(f"{n} {kind}" for kind, n in self.mapped.items())
        head = f"{self.source} -> {self.target}: {len(self.state_dict)} tensors ({parts})"
        return "\n".join([head, *(f"  {change}" for change in self.changes)])


def convert_state_dict(state_dict: Mapping[str, Tensor], *, source: str, target: str) -> dict[str, Tensor]:
    """The same SlowFast network under another library's keys.

    Args:
        state_dict: of a two-pathway network, without wrappers' prefixes (``module.``).
        source: "pytorchvideo" (which ``create_slowfast`` follows), "pyslowfast", "mmaction2", "gluoncv", "r1c7", or
            "caffe2".
        target: one of the same but for "caffe2".

    Returns a new dict of the same tensors, not copies, except that

    - the classifier's columns are [fast | slow] in mmaction2 and [slow | fast] elsewhere;
    - a ``num_batches_tracked`` that is missing is 0;
    - a classifier without a bias (r1c7) gets one of 0, and one of 0 is left out for r1c7.

    Lateral connections without norm and ReLU (r1c7, mmaction2's default) stay so: the network has to be built without,
    for ``create_slowfast`` with a ``fusion_builder``.

    Raises CheckpointError, a ValueError, that lists every key left over on either side: what the target has no place
    for, and what it needs and was not given.
    """
    return convert(state_dict, source, target).state_dict


def convert(state_dict: Mapping[str, Tensor], source: str, target: str) -> Conversion:
    """As :func:`convert_state_dict`, with what was done."""
    spelled, wanted = _spelling("source", source, SOURCES), _spelling("target", target, SPELLINGS)
    changes: list[str] = []
    slots: dict[Slot, Tensor] = {}
    keys: dict[Slot, str] = {}
    left: list[str] = []
    for key, tensor in state_dict.items():
        slot = spelled.read(key)
        if slot is not None:
            slots[slot], keys[slot] = _shaped(tensor, slot) if source == "caffe2" else tensor, key
        elif spelled.given_up is None or not re.fullmatch(spelled.given_up, key):
            left.append(key)
    _count_batches(slots, changes)
    if spelled.fast_first != wanted.fast_first:
        _roll(slots, spelled, changes)
    _fit_bias(slots, wanted, changes)
    written = {slot: wanted.write(slot) for slot in slots}
    left += [keys[slot] for slot, key in written.items() if key is None and slot in keys]
    missing = [wanted.write(slot) or str(slot) for slot in _needed(slots)]
    if left or missing:
        raise CheckpointError(left_over(f"{source} -> {target}", left, missing))
    result = {key: slots[slot] for slot, key in written.items() if key is not None}
    return Conversion(result, source, target, _count(slots), tuple(changes))


def detect(keys: Iterable[str]) -> str | None:
    """The spelling that most of the keys have; None where none has any."""
    keys = list(keys)
    known = {name: sum(spelling.read(key) is not None for key in keys) for name, spelling in SOURCES.items()}
    best = max(known, key=lambda name: known[name])
    return best if known[best] else None


def left_over(what: str, given: Iterable[str], needed: Iterable[str]) -> str:
    """The message of an error: every key left over on either side."""
    lines = [f"{what}: keys are left over"]
    for side, keys in (("given, but with no place", given), ("needed, but not given", needed)):
        listed = list(keys)
        if listed:
            lines += [f"  {side} ({len(listed)}):", *(f"    {key}" for key in listed)]
    return "\n".join(lines)


def _spelling(argument: str, name: str, known: Mapping[str, Spelling]) -> Spelling:
    if name not in known:
        raise ValueError(f"{argument} must be one of {', '.join(known)}; got {name!r}")
    return known[name]


def _count_batches(slots: dict[Slot, Tensor], changes: list[str]) -> None:
    means = [slot for slot in slots if slot[-1] == "running_mean"]
    missing = [
        (*slot[:-1], "num_batches_tracked") for slot in means if (*slot[:-1], "num_batches_tracked") not in slots
    ]
    slots.update((slot, torch.tensor(0)) for slot in missing)
    if missing:
        changes.append(f"{len(missing)} num_batches_tracked were missing and are 0")


def _roll(slots: dict[Slot, Tensor], spelled: Spelling, changes: list[str]) -> None:
    """The classifier's columns, whose order follows the pathways'."""
    weight = slots.get(("classifier", "conv", "weight"))
    if weight is None:
        return
    # A slot is ("block", stage, pathway, block, layer, "conv", "weight"); the last one of a pathway makes its features.
    blocks = sorted(slot for slot in slots if slot[0] == "block" and slot[4] != "shortcut" and slot[5] == "conv")
    last = {slot[2]: slot for slot in blocks}
    slow, fast = (len(slots[last[pathway]]) if pathway in last else 0 for pathway in (0, 1))
    if weight.shape[1] != slow + fast:
        raise CheckpointError(
            f"the classifier's {weight.shape[1]} columns are not those of {slow} slow and {fast} fast features"
        )
    first = fast if spelled.fast_first else slow
    slots["classifier", "conv", "weight"] = torch.cat([weight[:, first:], weight[:, :first]], 1)
    order = ("[fast | slow]", "[slow | fast]")
    changes.append(
        "the classifier's columns went from {} to {}".format(*(order if spelled.fast_first else order[::-1]))
    )


def _fit_bias(slots: dict[Slot, Tensor], wanted: Spelling, changes: list[str]) -> None:
    weight, place = slots.get(("classifier", "conv", "weight")), ("classifier", "conv", "bias")
    bias = slots.get(place)
    if wanted.classifier_bias and bias is None and weight is not None:
        slots[place] = weight.new_zeros(len(weight))
        changes.append("the classifier had no bias and has one of 0")
    elif not wanted.classifier_bias and bias is not None:
        if bias.count_nonzero():
            raise CheckpointError(f"{wanted.name}'s classifier has no bias, and this one's is not 0")
        del slots[place]
        changes.append("the classifier's bias was 0 and is left out")


def _needed(slots: Mapping[Slot, Tensor]) -> list[Slot]:
    """What is not there and must be, given what is: both pathways whole, and all of each norm."""
    places = defaultdict(set)
    for slot in slots:
        places[slot[:-1]].add(slot[-1])
    needed: list[Slot] = []
    for place, tensors in places.items():
        if place[-1] == "norm":
            affine = {"weight", "bias"} if tensors & {"weight", "bias"} else set()
            needed += [
                (*place, tensor) for tensor in sorted(affine | {"running_mean", "running_var"}) if tensor not in tensors
            ]
        conv = (*place[:-1], "conv", "weight")
        if place[0] != "nonlocal" and conv not in slots:
            needed.append(conv)
    for pathway in (0, 1):
        needed.append(("stem", pathway, "conv", "weight"))
        for stage in (2, 3, 4, 5):
            blocks = [int(place[3]) for place in places if place[:3] == ("block", stage, pathway)]
            for block in range(max(blocks, default=0) + 1):
                needed += [("block", stage, pathway, block, layer, "conv", "weight") for layer in ("a", "b")]
    needed += [("lateral", stage, "conv", "weight") for stage in (1, 2, 3, 4)]
    return list(dict.fromkeys(slot for slot in needed if slot not in slots))


def _count(slots: Iterable[Slot]) -> dict[str, int]:
    names = {
        "stem": "stems",
        "lateral": "lateral connections",
        "block": "residual blocks",
        "nonlocal": "non-local blocks",
    }
    lengths = {"stem": 2, "lateral": 2, "block": 4, "nonlocal": 4, "classifier": 1}
    places = {slot[: lengths[str(slot[0])]] for slot in slots}
    counts: dict[str, int] = defaultdict(int)
    for place in sorted(places, key=lambda place: list(lengths).index(str(place[0]))):
        counts[names.get(str(place[0]), "classifier")] += 1
    return dict(counts)


def _shaped(tensor: Tensor, slot: Slot) -> Tensor:
    """Caffe2 leaves out, or adds, dimensions of size 1 at the end."""
    if slot[-1] != "weight" or slot[-2] != "conv":
        return tensor
    rank = 2 if slot[0] == "classifier" else 5
    return tensor.reshape((*tensor.shape, 1, 1, 1)[:rank] if tensor.dim() < rank else tensor.shape[:rank])
