"""Caffe2's ``.pkl`` files of SlowFast: how their blobs are named, and an unpickler that runs no code."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._spelling import Spelling

SPELLING = Spelling(
    name="caffe2",
    pathways=("", "t_"),
    first_stage=2,
    stem=("{pathway}conv1", "{pathway}res_conv1"),
    stem_lateral=("t_pool1_subsample", "t_pool1_subsample"),
    lateral=("t_res{stage}_{last}_branch2c_bn_subsample", "t_res{stage}_{last}_branch2c_bn_subsample"),
    block="{pathway}res{stage}_{block}_branch",
    layers={"shortcut": ("1", "1"), "a": ("2a", "2a"), "b": ("2b", "2b"), "c": ("2c", "2c")},
    nonlocal_block="nonlocal_conv{stage}_{block}",
    nonlocal_layers={"theta": "_theta", "phi": "_phi", "g": "_g", "out": "_out", "norm": ""},
    classifier="pred",
    tensors={
        "conv": {"weight": "_w", "bias": "_b"},
        "norm": {"weight": "_bn_s", "bias": "_bn_b", "running_mean": "_bn_rm", "running_var": "_bn_riv"},
    },
    given_up=r".*momentum.*|lr|model_iter|weight_order",  # of the optimizer
)


class _Encode:
    """Stands in for ``_codecs.encode``, by which numpy's arrays are pickled in protocol 2; takes nothing else."""

    __slots__ = ()

    def __call__(self, text: str, encoding: str) -> bytes:
        if not isinstance(text, str) or encoding != "latin1":
            raise pickle.UnpicklingError("it encodes something else than the bytes of an array")
        return text.encode("latin1")


class ArrayUnpickler(pickle.Unpickler):
    """Admits numpy arrays, scalars and dtypes, and dict, list, tuple, set, str, bytes and numbers. Anything else that a
    file names is not even imported: UnpicklingError."""

    def find_class(self, module: str, name: str) -> Any:
        import numpy as np

        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in ("_reconstruct", "scalar"):
            numpy: Any = np
            return getattr((numpy._core if hasattr(np, "_core") else numpy.core).multiarray, name)
        allowed: dict[tuple[str, str], Callable[..., Any]] = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("collections", "OrderedDict"): OrderedDict,
            ("_codecs", "encode"): _Encode(),
            ("builtins", "set"): set,  # in protocol 2; later ones have a way of their own
            ("__builtin__", "set"): set,
        }
        if (module, name) in allowed:
            return allowed[module, name]
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is neither an array nor a plain container")

    def persistent_load(self, _: Any) -> Any:
        raise pickle.UnpicklingError("it refers to an object outside of itself")


def read_blobs(path: Path) -> dict[str, Tensor]:
    """The blobs of a ``.pkl`` file by name. Raises UnpicklingError, or whatever unpickling a damaged file raises."""
    with path.open("rb") as file:
        content = ArrayUnpickler(file, encoding="latin1").load()
    blobs = content.get("blobs", content) if isinstance(content, dict) else None
    if not isinstance(blobs, dict) or not blobs:
        raise pickle.UnpicklingError("it holds no dict of blobs")
    return {str(name): torch.from_numpy(value) for name, value in blobs.items() if getattr(value, "shape", ())}
