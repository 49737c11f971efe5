"""The fused network and the readable one against recorded float64 results of pytorchvideo's (see golden/README.md)."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from golden_testing import (
    INDEX,
    assert_exact_step,
    errors,
    eval_logits,
    golden,
    inputs,
    load_drawn,
    relative,
    training_step,
)
from torch import nn

import slowfast_fast
from slowfast_fast.reference.slowfast import SlowFast

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = [name for name, entry in INDEX.items() if entry["library"] == "pytorchvideo"]
NETWORKS = {"reference network": SlowFast, "fused": slowfast_fast.create_slowfast}


def build(name: str, network: str, dtype: torch.dtype) -> nn.Module:
    return load_drawn(NETWORKS[network](**INDEX[name]["kwargs"], dropout_rate=0.0).to(dtype))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", NAMES)
def test_state_dict_has_the_same_keys_in_order_and_shapes(name: str, network: str) -> None:
    with torch.device("meta"):
        model = NETWORKS[network](**INDEX[name]["kwargs"])
    state = model.state_dict()
    assert list(state) == list(golden(name)["keys"])
    assert ["x".join(map(str, value.shape)) for value in state.values()] == list(golden(name)["shapes"])
    assert len(state) == INDEX[name]["keys"]
    assert sum(p.numel() for p in model.parameters()) == INDEX[name]["parameters"]


# The reference backend has the ops' own tests; one network shows that it fits in.
@pytest.mark.parametrize(
    ("name", "network", "backend"),
    [("ptv_r18_8x8", "fused", "reference")]
    + [(name, *how) for name in NAMES for how in (("reference network", "auto"), ("fused", "cpu"))],
)
def test_float64(name: str, network: str, backend: str) -> None:
    model, x = build(name, network, torch.float64), inputs(name, torch.float64)
    with slowfast_fast.backend(backend):
        assert relative(eval_logits(model, x), golden(name)["eval_logits"]) < 1e-10
        assert_exact_step(model, name)


@pytest.mark.parametrize("name", NAMES)
def test_float32_errs_at_most_twice_as_much_as_stock(name: str) -> None:
    fused, stock = (build(name, network, torch.float32) for network in ("fused", "reference network"))
    exact = inputs(name, torch.float64)
    # A rounding error that flips one ReLU of the last stages moves all gradients before it by a thousandth, so that a
    # single run is a matter of luck. Each network gets several, from clips rounded to float32 one way and another,
    # and stock gets them in both memory layouts: our usual error is held against the largest of stock's own.
    runs: dict[str, list[dict[str, float]]] = {"fused": [], "stock": []}
    for noise in (0.0, 0.5, 0.5):
        half_units = [1 + noise * 2**-23 * (2 * torch.rand_like(clip) - 1) for clip in exact]
        x = [(clip * factor).float() for clip, factor in zip(exact, half_units, strict=True)]
        with slowfast_fast.backend("cpu"):
            model = copy.deepcopy(fused)
            assert relative(eval_logits(model, x), golden(name)["eval_logits"]) < 1e-5
            runs["fused"].append(errors(training_step(model, x), golden(name)))
        for layout in (torch.contiguous_format, torch.channels_last_3d):
            laid_out = [clip.contiguous(memory_format=layout) for clip in x]
            runs["stock"].append(errors(training_step(copy.deepcopy(stock), laid_out), golden(name)))
    # So is a single number. The loss is judged by those against all labels, and itself only by how far stock was off
    # when the files were recorded.
    assert all(run["loss"] < 2e-5 for run in runs["fused"])
    ratios = {
        quantity: np.median([run[quantity] for run in runs["fused"]]) / max(run[quantity] for run in runs["stock"])
        for quantity in runs["fused"][0]
        if quantity != "loss"
    }
    print({quantity: f"{ratio:.2f}" for quantity, ratio in ratios.items()})
    assert not {quantity: ratio for quantity, ratio in ratios.items() if not ratio <= 2}
