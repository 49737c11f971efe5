"""Checkpoint files of every library, read without running anything that they hold."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import _caffe2
from ._convert import SPELLINGS, CheckpointError, Conversion, convert, detect, left_over

WRAPPERS = ("model_state", "state_dict")  # PySlowFast and pytorchvideo; mmaction2, Lightning and others
PREFIXES = ("module.", "model.", "_orig_mod.")  # DistributedDataParallel; PTVSlowFast and Lightning; torch.compile


def load_checkpoint(path: str | PathLike[str], model: nn.Module) -> Conversion:
    """Load a checkpoint of any of the five libraries into a SlowFast model of any of them, ours included.

    Args:
        path: ``.pyth`` or ``.pth`` (``torch.save``, with a ``model_state``, a ``state_dict`` or bare), ``.safetensors``
            or a Caffe2 ``.pkl``. Prefixes ``module.``, ``model.`` and ``_orig_mod.`` of all keys do not count, neither
            there nor in the model.
        model: whose keys the file has, or, of a two-pathway network, whose keys ``convert_state_dict`` can give it.

    Every key and shape must fit. Returns what was done; ``str`` of it is a summary. Its ``activation`` is what the file
    says of the head, as PySlowFast's do (``HEAD_ACT`` of their ``cfg``) and those of ``examples/train.py``; else None.

    Files are read safely: ``torch.load`` with ``weights_only=True``, ``.pkl`` by an unpickler that admits numpy arrays
    and plain containers. Raises CheckpointError (a ValueError) for a file that is damaged, wants to run code, or does
    not fit, with every key left over on either side; ImportError where safetensors is needed and missing.
    """
    content = _read(path)
    given = _state_dict(path, content)
    wanted, prefix = _strip(model.state_dict())
    missing = wanted.keys() - given.keys()
    if given.keys() <= wanted.keys() and all(key.endswith("num_batches_tracked") for key in missing):
        state = {**given, **{key: torch.zeros_like(wanted[key]) for key in missing}}
        changes = (f"{len(missing)} num_batches_tracked were missing and are 0",) if missing else ()
        name = detect(given) or type(model).__name__
        done = Conversion(state, name, name, {}, changes)
    else:
        source, target = detect(given), detect(wanted)
        if source is None or target is None or target not in SPELLINGS:
            raise CheckpointError(left_over(str(path), sorted(given.keys() - wanted.keys()), sorted(missing)))
        try:
            done = convert(given, source, target)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
    unplaced, unmet = done.state_dict.keys() - wanted.keys(), wanted.keys() - done.state_dict.keys()
    if unplaced or unmet:
        raise CheckpointError(left_over(str(path), sorted(unplaced), sorted(unmet)))
    unfit = [
        f"{key}: {tuple(tensor.shape)} in the file, {tuple(wanted[key].shape)} in the model"
        for key, tensor in done.state_dict.items()
        if tensor.shape != wanted[key].shape
    ]
    if unfit:
        raise CheckpointError("\n    ".join([f"{path}: shapes differ", *unfit]))
    model.load_state_dict({prefix + key: tensor for key, tensor in done.state_dict.items()})
    return replace(done, activation=_activation(content))


def read_checkpoint(path: str | PathLike[str]) -> dict[str, Tensor]:
    """The ``state_dict`` in a file, without wrappers' prefixes. Errors as for :func:`load_checkpoint`."""
    return _state_dict(path, _read(path))


def _read(path: str | PathLike[str]) -> Any:
    """All that a file holds."""
    file = Path(path)
    try:
        if file.suffix == ".safetensors":
            return _safetensors().load_file(file)
        if file.suffix == ".pkl":
            return _caffe2.read_blobs(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, ImportError):
        raise
    except Exception as error:  # a damaged file may make its reader raise anything
        what = "is refused" if isinstance(error, pickle.UnpicklingError) else "cannot be read"
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise CheckpointError(f"{path} {what}: {reason}") from error


def _activation(content: Any) -> str | None:
    if not isinstance(content, Mapping):
        return None
    if isinstance(content.get("activation"), str):
        return content["activation"]
    # YAML, of which one line is wanted: a parser would be a dependency.
    found = re.search(r"^\s*HEAD_ACT:\s*['\"]?(\w+)", str(content.get("cfg", "")), re.MULTILINE)
    return found[1] if found else None


def _state_dict(path: str | PathLike[str], content: Any) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds no state_dict, but {type(content).__name__}")
    others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(
            f"{path} holds no state_dict: {', '.join(others[:5])} are no tensors; looked for {' and '.join(WRAPPERS)}"
        )
    return _strip(content)[0]


def write_checkpoint(path: str | PathLike[str], state_dict: Mapping[str, Tensor], spelling: str) -> None:
    """A file as the library ``spelling`` reads it: safetensors by its suffix, else by ``torch.save``."""
    wrapper = SPELLINGS[spelling].wrapper
    if Path(path).suffix == ".safetensors":
        _safetensors().save_file({key: tensor.contiguous() for key, tensor in state_dict.items()}, path)
    else:
        torch.save(dict(state_dict) if wrapper is None else {wrapper: dict(state_dict)}, path)


def _strip(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Without the prefixes that all keys have, and those."""
    keys, prefix = list(state_dict), ""
    while found := [p for p in PREFIXES if keys and all(key.startswith(prefix + p) for key in keys)]:
        prefix += found[0]
    return {key[len(prefix) :]: tensor for key, tensor in state_dict.items()}, prefix


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "safetensors files need the package safetensors, which is not installed: install slowfast-fast[checkpoints]"
        ) from error
    return safetensors.torch
