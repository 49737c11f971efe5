"""The checkpoint of a training run: for --resume, evaluate.py and `slowfast_fast classify`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from networks import NetworkOptions

PROGRESS = ("step", "epoch", "seen")  # the last one: clips of the epoch, by all processes


def save(
    path: Path, parts: Mapping[str, Any], progress: Mapping[str, int], options: NetworkOptions, classes: list[str]
) -> None:
    """Writes the state of ``parts`` (modules, optimizers, ..., by the key that each has in the file), and the rest."""
    states = {key: part.state_dict() for key, part in parts.items()}
    # The activation is that of the cross-entropy, for whoever classifies with these weights.
    write(path, {**states, **progress, "options": options.as_dict(), "classes": classes, "activation": "softmax"})


def restore(path: Path, parts: Mapping[str, Any], options: NetworkOptions, device: torch.device) -> dict[str, int]:
    """Loads what ``save`` wrote into ``parts``; the progress.

    Raises:
        ValueError: the file is of a network with other options.
    """
    saved = torch.load(path, map_location=device, weights_only=True)
    wanted = options.as_dict()
    for name, value in saved["options"].items():
        if wanted[name] != value:
            raise ValueError(f"--resume: {path} has {name} = {value}, got {wanted[name]}")
    for key, part in parts.items():
        part.load_state_dict(saved[key])
    return {name: saved[name] for name in PROGRESS}


def write(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """At once: whoever reads finds the old file or the new one, whenever this process is killed."""
    partial = path.with_suffix(".part")
    with open(partial, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
