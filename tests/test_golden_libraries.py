"""A network with each library's names against the library's recorded results, as it is and accelerated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_testing import INDEX, assert_exact_step, drawn, eval_logits, golden, inputs, load_drawn, relative
from stock_models import LIBRARIES, Plan
from torch import nn

import slowfast_fast

pytestmark = pytest.mark.usefixtures("one_thread")


def build(name: str) -> nn.Module:
    entry = INDEX[name]
    options: dict[str, Any] = {
        key: tuple(map(as_tuple, v)) if type(v) is list else v for key, v in entry["plan"].items()
    }
    model = LIBRARIES[entry["library"]].build(Plan(**options))
    if entry["library"] == "pyslowfast":
        model.head.act = nn.Identity()  # recorded without it
    return model


def as_tuple(value: Any) -> Any:
    return tuple(map(as_tuple, value)) if isinstance(value, list) else value


@pytest.mark.parametrize("name", INDEX)
def test_every_recorded_number(name: str) -> None:
    """Keys in order and shapes; evaluation and a training step of the plain network and of the accelerated one, in
    float64."""
    model, x = build(name).double(), inputs(name, torch.float64)
    state = drawn(model)
    assert list(state) == list(golden(name)["keys"])
    assert ["x".join(map(str, value.shape)) for value in state.values()] == list(golden(name)["shapes"])
    assert len(state) == INDEX[name]["keys"]
    model.load_state_dict(state)
    assert relative(eval_logits(model, x), golden(name)["eval_logits"]) < 1e-10
    assert_exact_step(model, name)
    model.load_state_dict(state)
    report = slowfast_fast.accelerate(model)
    as_modules = {row.reason for row in report.layers if row.reason}
    assert as_modules - {"no op covers the module it is in"} == {"spatial kernel", "spatial stride"}
    assert {row.kind for row in report.left} <= {"Nonlocal"}
    assert relative(eval_logits(model, x), golden(name)["eval_logits"]) < 1e-10
    assert_exact_step(model, name)


def test_mmaction2_s_backbone_gives_both_pathways() -> None:
    model = load_drawn(build("mmaction2_r50_4x16").double()).eval()
    slowfast_fast.accelerate(model)
    with torch.no_grad():
        maps = model.backbone(inputs("mmaction2_r50_4x16", torch.float64))
    assert isinstance(maps, tuple)
    for got, pathway in zip(maps, ("slow", "fast"), strict=True):
        assert relative(got.numpy(), golden("mmaction2_r50_4x16")[f"eval_{pathway}"]) < 1e-10
