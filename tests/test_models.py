"""The registry: every name, what it costs against what the paper says, and pytorchvideo's networks of one pathway."""

from __future__ import annotations

import importlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from installed_pytorchvideo import pytorchvideo_slowfast
from network_testing import TOLERANCE, assert_same_step, distance
from torch import nn

import slowfast_fast
from slowfast_fast.bench.family import caption, speeds
from slowfast_fast.cli import main
from slowfast_fast.models import cost, entry, list_models, register
from slowfast_fast.models.costs import Cost, table
from slowfast_fast.models.registry import _entries

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def known_cost(name: str) -> Cost:
    return cost(name)


# Parameters of the libraries' networks of these names, counted there.
PARAMETERS = {
    "slowfast_r50_4x16": 34_480_216,
    "slowfast_r50_8x8": 34_566_488,
    "slowfast_r101_50_50_8x8": 53_774_808,
    "slowfast_r101_101_101_8x8": 62_826_968,
    "slowfast_r101_16x8": 53_774_808,
    "slowfast_r101_nln_16x8": 60_080_088,
    "slowfast_r50_ava": 33_828_888,
    "slowfast_r101_nln_ava": 59_342_488,
    "slowfast_r152_8x8": 85_736_792,
    "slow_r50_8x8": 32_454_096,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_libraries(name: str) -> None:
    assert known_cost(name).parameters == PARAMETERS[name]


def test_gflops_are_the_paper_s() -> None:
    published = {name: entry(name).gflops for name in list_models() if entry(name).gflops is not None}
    table_2 = {
        "slowfast_r50_4x16": 36.1,
        "slowfast_r50_8x8": 65.7,
        "slowfast_r101_50_50_8x8": 106,
        "slowfast_r101_16x8": 213,
        "slowfast_r101_nln_16x8": 234,
        "slow_r50_4x16": 27.3,
    }
    assert table_2.items() <= published.items()
    assert not {
        name: (known_cost(name).gflops, value)
        for name, value in published.items()
        if not abs(known_cost(name).gflops / value - 1) < 0.02
    }


@pytest.mark.parametrize(("beta", "gflops"), [(1 / 4, 54.5), (1 / 16, 30.6), (1 / 32, 28.6)])
def test_gflops_of_other_betas_are_the_paper_s(beta: float, gflops: float) -> None:
    assert cost("slowfast_r50_4x16", beta=beta).gflops == pytest.approx(gflops, rel=0.02)


def test_the_command_prints_the_table() -> None:
    result = CliRunner().invoke(main, ["models", "slowfast_r50_4x16", "slow_r50_4x16"])
    assert result.exit_code == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.output.splitlines()[2:]]
    assert [row[:5] for row in rows] == [
        ["`slowfast_r50_4x16`", "4 + 32", "34.48", "36.1", "36.1"],
        ["`slow_r50_4x16`", "4", "32.45", "27.3", "27.3"],
    ]
    result = CliRunner().invoke(main, ["models", "slowfast_r50_4x4"])
    assert result.exit_code == 2
    assert "no model is named 'slowfast_r50_4x4'; did you mean slowfast_r50_4x16" in re.sub(r"\s+", " ", result.output)


def test_the_page_has_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/models.md; `python -m slowfast_fast models --measured FILE` prints the table anew."""
    monkeypatch.setattr("slowfast_fast.models.costs.cost", lambda name, crop: known_cost(name))
    root = Path(__file__).parents[1]
    page = (root / "docs" / "models.md").read_text()
    run = json.loads((root / "benchmarks" / "results" / "amd-epyc-avx2-2threads-family.json").read_text())
    assert table(more=speeds(run)) in page
    assert caption(run) in page


def test_overrides_reach_the_constructor() -> None:
    with torch.device("meta"):
        model = slowfast_fast.create_model("slowfast_r50_4x16", model_num_class=7, norm=None)
    assert model.blocks[-1].proj.out_features == 7
    assert not any(isinstance(module, nn.BatchNorm3d) for module in model.modules())


def test_a_name_can_be_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slowfast_fast.models.registry._entries", dict(_entries))

    @register(frames=2, tau=1)
    def tiny(**overrides: Any) -> nn.Module:
        """A convolution."""
        return nn.Conv3d(3, **{"out_channels": 1, "kernel_size": 1, **overrides})

    assert list_models()[-1] == "tiny"
    assert entry("tiny").about == "A convolution."
    assert slowfast_fast.create_model("tiny", out_channels=5)(entry("tiny").clips(8)).shape == (1, 5, 2, 8, 8)
    with pytest.raises(ValueError, match="'tiny' is registered already"):
        register(frames=2, tau=1)(tiny)


SMALL: dict[str, Any] = {"stem_dim_out": 8, "model_num_class": 5, "dropout_rate": 0.0}
SINGLE = {
    "slow": {"stem_conv_kernel_size": (1, 7, 7), "head_pool_kernel_size": (4, 1, 1)},
    "i3d": {
        "stem_conv_kernel_size": (5, 7, 7),
        "stem_conv_stride": (2, 2, 2),
        "stage1_pool": nn.MaxPool3d,
        "stage_conv_a_kernel_size": ((3, 1, 1), [(3, 1, 1), (1, 1, 1)], (3, 1, 1), [(1, 1, 1), (3, 1, 1)]),
        "head_pool_kernel_size": (1, 1, 1),
    },
    "c2d": {"stage_conv_a_kernel_size": (1, 1, 1), "stage1_pool": nn.MaxPool3d, "head_pool": nn.AdaptiveAvgPool3d},
    "grouped, dilated": {
        "stage_conv_b_num_groups": (1, 2, 4, 1),
        "stage_conv_b_dilation": ((1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 2, 2)),
        "stage_spatial_h_stride": (1, 2, 2, 1),
        "stage_temporal_stride": (1, 2, 1, 1),
        "head": None,
    },
}


@pytest.mark.parametrize("name", SINGLE)
def test_one_pathway_is_pytorchvideo_s(name: str) -> None:
    pytorchvideo_slowfast()  # which finds a torchvision to import
    stock = importlib.import_module("pytorchvideo.models.resnet").create_resnet
    arguments = SMALL | SINGLE[name]
    models = []
    for create in (slowfast_fast.create_resnet, stock):
        torch.manual_seed(3)
        models.append(create(**arguments).double())
    fused, expected = models
    assert [(n, type(m).__name__) for n, m in fused.named_modules()] == [
        (n, type(m).__name__) for n, m in expected.named_modules()
    ]
    for key, value in expected.state_dict().items():
        assert torch.equal(fused.state_dict()[key], value), key
    for parameter in expected.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    fused.load_state_dict(expected.state_dict())
    clip = torch.randn(2, 3, 4, 33, 31, dtype=torch.float64)
    with torch.no_grad():
        assert distance(fused.eval()(clip), expected.eval()(clip)) < TOLERANCE
    fused.train(), expected.train()
    if arguments.get("head", True) is None:
        fused, expected = (nn.Sequential(model, nn.AdaptiveAvgPool3d(1), nn.Flatten()) for model in (fused, expected))
    assert_same_step(fused, expected, clip)  # type: ignore[arg-type]
