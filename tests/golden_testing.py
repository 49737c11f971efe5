"""Recorded float64 results of the libraries (golden/README.md): how numbers are drawn, and how far off a run is."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"
INDEX: dict[str, Any] = json.loads((GOLDEN / "index.json").read_text())


@cache
def golden(name: str) -> Mapping[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    arrays["losses"] = -F.log_softmax(torch.from_numpy(arrays["train_logits"]), 1).numpy()
    return arrays


def draw(name: str, shape: tuple[int, ...]) -> Tensor:
    """The values that belong to a name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if name.endswith("running_var") or (name.endswith(".weight") and len(shape) == 1):
        values = rng.uniform(0.5, 1.5, shape)
    elif name.endswith("running_mean") or (name.endswith(".bias") and len(shape) == 1):
        values = 0.1 * rng.standard_normal(shape)
    elif name.startswith("input"):
        values = rng.standard_normal(shape)
    else:
        values = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:])) * (0.02 if "nonlocal" in name else 1.0)
    return torch.from_numpy(np.asarray(values))


def drawn(model: nn.Module) -> dict[str, Tensor]:
    """A state_dict for ``model`` with every array drawn by its key."""
    return {key: draw(key, tuple(value.shape)) for key, value in model.state_dict().items()}


def load_drawn(model: nn.Module) -> nn.Module:
    model.load_state_dict(drawn(model))
    return model


def inputs(name: str, dtype: torch.dtype) -> list[Tensor] | Tensor:
    """[slow, fast], or the one clip of libraries that sample the pathways themselves."""
    entry = INDEX[name]
    if "input" in entry:
        return draw("input", tuple(entry["input"])).to(dtype)
    return [draw(f"input.{pathway}", tuple(entry[pathway])).to(dtype) for pathway in ("slow", "fast")]


def _head(tensor: Tensor) -> np.ndarray:
    """The first four values, padded with 0."""
    return F.pad(tensor.detach().double().flatten()[:4], (0, max(0, 4 - tensor.numel()))).numpy()


def _own(x: list[Tensor] | Tensor) -> list[Tensor] | Tensor:
    return list(x) if isinstance(x, list) else x  # pytorchvideo writes into the list that it is given


def eval_logits(model: nn.Module, x: list[Tensor] | Tensor) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(_own(x)).double().numpy()


def training_step(model: nn.Module, x: list[Tensor] | Tensor) -> dict[str, np.ndarray]:
    """What a golden file records of one step, under the same names; ``losses`` are those against every label."""
    model.train().zero_grad()
    logits = model(_own(x))
    loss = F.cross_entropy(logits, torch.arange(len(logits)))
    loss.backward()
    parameters = dict(model.named_parameters())
    statistics = {key: value for key, value in model.named_buffers() if not key.endswith("num_batches_tracked")}
    counters = [value for key, value in model.named_buffers() if key.endswith("num_batches_tracked")]
    assert all(counter == 1 for counter in counters)
    return {
        "train_logits": logits.detach().double().numpy(),
        "loss": loss.detach().double().numpy(),
        "losses": -F.log_softmax(logits.detach(), 1).double().numpy(),
        "param_keys": np.array(list(parameters)),
        "grad_norm": np.array([p.grad.double().norm().item() for p in parameters.values()]),
        "grad_head": np.array([_head(p.grad) for p in parameters.values()]),
        "buffer_keys": np.array(list(statistics)),
        "buffer_norm": np.array([s.double().norm().item() for s in statistics.values()]),
        "buffer_head": np.array([_head(s) for s in statistics.values()]),
    }


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def _apart(got: np.ndarray, expected: np.ndarray) -> float:
    """Absolute where nothing but rounding is expected: the gradient of a bias before a BatchNorm."""
    return float(np.linalg.norm(got)) if np.linalg.norm(expected) < 1e-10 else relative(got, expected)


def errors(step: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The relative error of each quantity of a step; of what each parameter or statistic has, the largest."""
    return {
        **{quantity: relative(step[quantity], expected[quantity]) for quantity in ("train_logits", "loss", "losses")},
        **{
            quantity: max(map(_apart, step[quantity], expected[quantity]))
            for quantity in ("grad_norm", "grad_head", "buffer_norm", "buffer_head")
        },
    }


def assert_exact_step(model: nn.Module, name: str) -> None:
    """A step in float64 gives what is recorded."""
    step = training_step(model, inputs(name, torch.float64))
    for keys in ("param_keys", "buffer_keys"):
        assert list(step[keys]) == list(golden(name)[keys])
    too_large = {quantity: error for quantity, error in errors(step, golden(name)).items() if not error < 1e-8}
    assert not too_large
