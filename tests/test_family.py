"""Every variant of the family, drawn at random, against plain PyTorch: evaluation, training, gradients, freezing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from family_reference import Plain
from golden_testing import INDEX, draw, errors, eval_logits, golden, inputs, relative, training_step
from network_testing import TOLERANCE, distance, reasons
from torch import Tensor, nn

import slowfast_fast
from slowfast_fast.models import create_model, single_pathway, slowfast_network

pytest.importorskip("hypothesis", reason="configurations are drawn by hypothesis, which is not installed")
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("one_thread")

INFLATIONS = st.one_of(
    st.sampled_from(["none", "3x1x1", "3x3x3"]), st.just(("3x1x1", "none")), st.just(("none", "3x3x3"))
)
# Networks with few blocks: basic ones and bottlenecks.
DEPTHS = {18: (2, 1, 1, 1), 50: (1, 2, 1, 1)}
COMMON: dict[str, Any] = {"model_num_class": 5, "dropout_rate": 0.0, "head_pool": nn.AdaptiveAvgPool3d}


@st.composite
def blocks(draw: st.DrawFn) -> dict[str, Any]:
    depth = draw(st.sampled_from(list(DEPTHS)))
    chosen: dict[str, Any] = {"depth": depth, "model_depth": DEPTHS[depth]}
    if draw(st.booleans()):
        chosen |= {
            "non_local": draw(st.sampled_from([{3: (0,)}, {2: (0,), 4: (0,)}])),
            "non_local_kind": draw(st.sampled_from(["dot_product", "softmax"])),
            "non_local_pool": draw(st.sampled_from([(1, 1, 1), (1, 2, 2), (2, 2, 2)])),
        }
    return chosen


@st.composite
def slowfasts(draw: st.DrawFn) -> dict[str, Any]:
    lateral = draw(st.sampled_from(["conv", "conv", "time_to_channel", "sampling", "none"]))
    join = draw(st.sampled_from(["concat", "sum"]))
    alpha, beta_inverse = draw(st.sampled_from([2, 4, 8])), draw(st.sampled_from([2, 4]))
    if join == "sum" and lateral != "none":  # which needs as many channels on both sides
        beta_inverse = {"conv": beta_inverse, "time_to_channel": alpha, "sampling": 1}[lateral]
    return draw(blocks()) | {
        "alpha": alpha,
        "beta": 1 / beta_inverse,
        "width": 8,
        "slow_inflation": draw(st.lists(INFLATIONS, min_size=4, max_size=4)),
        "fast_inflation": draw(st.lists(INFLATIONS, min_size=4, max_size=4)),
        "lateral": lateral,
        "lateral_kernel": draw(st.sampled_from([5, 7])),
        "lateral_ratio": draw(st.sampled_from([1, 2, 3])),
        "lateral_join": join,
        "lateral_direction": draw(st.sampled_from(["fast_to_slow", "slow_to_fast", "both"])),
        "lateral_norm": draw(st.booleans()),
        "lateral_activation": draw(st.booleans()),
    }


KNOWN_TO_PLAIN = (
    "alpha",
    "lateral",
    "lateral_join",
    "lateral_direction",
    "lateral_activation",
    "non_local_kind",
    "non_local_pool",
)


def compare(model: nn.Module, x: Any, plain: Plain, run: Callable[..., Tensor], *others: Tensor) -> None:
    """Evaluation, frozen and not; a training step: output, gradients and statistics. ``others``: boxes."""
    for parameter in model.parameters():  # gammas of 0 would hide what is behind them
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    tensors = [x] if isinstance(x, Tensor) else x
    # A detection network's body is a network in a network.
    plain = replace(plain, weights={k.removeprefix("model."): v for k, v in model.state_dict(keep_vars=True).items()})
    with torch.no_grad():
        expected = run(plain, x, *others)
        assert distance(model.eval()(x, *others), expected) < TOLERANCE
        assert distance(slowfast_fast.freeze(model)(x, *others), expected) < TOLERANCE
    weights = {key: value.clone() if "running" in key else value for key, value in plain.weights.items()}
    trained = replace(plain, weights=weights, training=True)
    outputs = model.train()(x, *others), run(trained, x, *others)
    assert distance(outputs[0], outputs[1]) < TOLERANCE
    grad = torch.randn_like(outputs[0])
    wanted = [*tensors, *model.parameters()]
    ours, theirs = (
        torch.cat([g.flatten() for g in torch.autograd.grad(y, wanted, grad, materialize_grads=True)]) for y in outputs
    )
    assert distance(ours, theirs) < TOLERANCE
    for key, value in model.named_buffers():
        if "running" in key:
            assert distance(value, weights[key.removeprefix("model.")]) < TOLERANCE, key


def clip(frames: int, height: int = 32, width: int = 33) -> Tensor:
    return torch.randn(2, 3, frames, height, width, dtype=torch.float64, requires_grad=True)


@given(slowfasts(), st.integers(0, 2**31))
@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@example({"width": 8, "beta": 1 / 4, "depth": 50, "model_depth": (1, 1, 1, 1)}, 0)
def test_random_slowfast(arguments: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    model = slowfast_network(**arguments, **COMMON).double()
    known = {name: arguments[name] for name in KNOWN_TO_PLAIN if name in arguments}
    plain = Plain(weights={}, training=False, **{"alpha": 4, "lateral": "conv"} | known)
    compare(model, [clip(2), clip(2 * plain.alpha)], plain, Plain.slowfast)


@given(
    blocks(),
    st.lists(INFLATIONS, min_size=4, max_size=4),
    st.sampled_from([1, 3, 5]),
    st.sampled_from([1, 2]),
    st.integers(0, 2**31),
)
@settings(max_examples=6, suppress_health_check=list(HealthCheck))
def test_random_single_pathway(
    arguments: dict[str, Any], inflation: list[Any], stem_frames: int, stem_stride: int, seed: int
) -> None:
    torch.manual_seed(seed)
    strides = {"stem_conv_stride": (stem_stride, 2, 2), "stem_pool_stride": (stem_stride, 2, 2)}
    model = single_pathway(
        width=8, inflation=inflation, stem_frames=stem_frames, **arguments, **strides, **COMMON
    ).double()
    known = {name: arguments[name] for name in KNOWN_TO_PLAIN if name in arguments}
    plain = Plain(weights={}, training=False, stem_stride=stem_stride, **known)
    compare(model, clip(8), plain, Plain.resnet)


NAME = "pyslowfast_r50_nln_8x8"


def test_pyslowfast_s_non_local_golden_by_our_own_network() -> None:
    """Its recorded numbers, with weights under its names brought to ours by convert_state_dict."""
    model = create_model(
        "slowfast_r50_8x8",
        lateral_kernel=5,
        dropout_rate=0.0,
        non_local={3: (1, 3), 4: (1, 3, 5)},
        head_pool_kernel_sizes=((8, 2, 2), (32, 2, 2)),
    ).double()
    keys, shapes = golden(NAME)["keys"], golden(NAME)["shapes"]
    theirs = {
        str(key): draw(str(key), tuple(int(n) for n in str(shape).split("x") if n))
        for key, shape in zip(keys, shapes, strict=True)
    }
    converted = slowfast_fast.convert_state_dict(theirs, source="pyslowfast", target="pytorchvideo")
    model.load_state_dict(converted)
    assert sum(parameter.numel() for parameter in model.parameters()) == INDEX[NAME]["parameters"]
    x = inputs(NAME, torch.float64)
    assert relative(eval_logits(model, x), golden(NAME)["eval_logits"]) < 1e-10
    frozen = slowfast_fast.freeze(model)
    assert relative(frozen(x).numpy(), golden(NAME)["eval_logits"]) < 1e-10
    # What is recorded of each parameter and statistic, in the order of their names.
    ours = {id(tensor): key for key, tensor in converted.items()}
    step = dict(training_step(model, x))
    for kind, quantities in {"param": ("grad_norm", "grad_head"), "buffer": ("buffer_norm", "buffer_head")}.items():
        rows = {key: row for row, key in enumerate(step[f"{kind}_keys"])}
        order = [rows[ours[id(theirs[key])]] for key in golden(NAME)[f"{kind}_keys"]]
        for quantity in quantities:
            step[quantity] = step[quantity][order]
    assert not {quantity: error for quantity, error in errors(step, golden(NAME)).items() if not error < 1e-8}


def test_explain_names_what_is_not_fused() -> None:
    model = create_model(
        "slowfast_r50_8x8", model_depth=(1, 1, 1, 1), width=16, lateral_direction="both", non_local={3: (0,)}, **COMMON
    ).eval()
    x = [torch.randn(1, 3, t, 32, 32) for t in (2, 8)]
    why = reasons(model, x)
    stem = "blocks.0.multipathway_fusion"
    assert why[f"{stem}.slow_to_fast.transform"] == "ConvTranspose3d is not a plain Conv3d"
    assert why["blocks.2.multipathway_blocks.0.non_local.0.attention"] == "no op of this package covers it"
    ran = {row.modules[0]: row.what for row in slowfast_fast.explain(model, x, show=False).rows}
    assert ran[f"{stem}.fast_to_slow.transform"].startswith("lateral_concat")
    assert ran["blocks.2.multipathway_blocks.0.non_local.0.conv_theta"] == "temporal_conv"
    assert ran["blocks.2.multipathway_blocks.0.non_local.0.conv_out"].startswith("temporal_conv")
    frozen = reasons(slowfast_fast.freeze(model), x)
    assert list(frozen) == ["blocks.2.multipathway_blocks.0.res_blocks.1.attention"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 77}, "depth must be one of 18, 34, 50, 101, 152, 200; got 77"),
        ({"beta": 0.3}, "beta must be 1 over a whole number; got 0.3"),
        ({"lateral": "gap"}, "kind must be one of conv, time_to_channel, sampling, none; got 'gap'"),
        ({"lateral_kernel": 4}, "kernel must be odd; got 4"),
        ({"lateral": "sampling", "lateral_join": "sum"}, "join='sum' needs as many channels .* gives 8 for 64"),
        (
            {"slow_inflation": ("none", "1x3x3", "none", "none")},
            "inflation must be of none, 3x1x1, 3x3x3.* got '1x3x3'",
        ),
        ({"non_local": {6: (0,)}}, "places must name stages of 2 to 5; got 6"),
        ({"non_local": {2: (3,)}}, "res2 has blocks 0 to 2; got 3"),
        ({"non_local": {2: (0,)}, "non_local_kind": "gauss"}, "kind must be one of dot_product, softmax; got 'gauss'"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        slowfast_network(**arguments)
