"""Which layers run as one op, which as module calls, and that nobody can tell the difference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from network_testing import (
    FUSED_SITES,
    FUSED_STEMS,
    LAYER_SITES,
    TOLERANCE,
    assert_as_exact_as_stock,
    assert_same_step,
    clips,
    distance,
    fused_sites,
    pair,
    reasons,
    statistics,
)
from torch import Tensor, nn
from torch.nn.utils import prune

import slowfast_fast
from slowfast_fast.nn import fused as fused_rules

pytestmark = pytest.mark.usefixtures("one_thread")


def test_explain_names_every_fused_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_rules, "FUSE_POINTWISE", False)
    fused, _ = pair()
    x = clips()
    before = statistics(fused)
    explanation = slowfast_fast.explain(fused, x, show=False)
    rows = [row for row in explanation.rows if row.backend != "torch"]
    assert {row.backend for row in rows} == {"cpu"}
    assert [row.modules for row in rows if row.what == "batch_norm_max_pool"] == [
        tuple(f"blocks.0.multipathway_blocks.{pathway}.{m}" for m in ("norm", "activation", "pool"))
        for pathway in (0, 1)
    ]
    assert [row.modules for row in rows if row.what == "stem_conv"] == [
        (f"blocks.0.multipathway_blocks.{pathway}.conv",) for pathway in (0, 1)
    ]
    laterals = [row for row in rows if row.what == "lateral_concat_bn"]
    assert [row.modules for row in laterals] == [
        tuple(f"blocks.{i}.multipathway_fusion.{m}" for m in ("conv_fast_to_slow", "norm", "activation"))
        for i in range(4)
    ]
    assert [row.modules for row in rows if row.what == "temporal_conv_bn"] == [
        tuple(
            f"blocks.{stage}.multipathway_blocks.{pathway}.res_blocks.0.branch2.{m}"
            for m in ("conv_a", "norm_a", "act_a")
        )
        for stage, pathway in ((1, 1), (2, 1), (3, 0), (3, 1), (4, 0), (4, 1))
    ]
    why = reasons(fused, x)
    assert why["blocks.1.multipathway_blocks.0.res_blocks.0.branch2.conv_b"].endswith("spatial kernel")
    assert why["blocks.1.multipathway_blocks.0.res_blocks.0.branch2.conv_a"] == (
        "no bottleneck_bn: a: pointwise convolution; pointwise convolution"
    )
    assert torch.equal(before, statistics(fused))
    assert "blocks.0.multipathway_fusion.{conv_fast_to_slow,norm,activation}" in str(explanation)


def test_clips_are_laid_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32: there PyTorch's spatial convolutions keep the layout; its 1x1x1 ones do not, and are replaced. In
    training not at all: the stems read them as they are, and what they return is rows."""
    monkeypatch.setattr(fused_rules, "FUSE_POINTWISE", True)
    fused, _ = pair(torch.float32)
    for training in (False, True):
        rows = slowfast_fast.explain(fused.train(training), clips(dtype=torch.float32), show=False).rows
        copies = [row.reason for row in rows if "copied" in row.reason]
        assert len(copies) == (0 if training else 1), copies
    rows = slowfast_fast.explain(fused.eval(), clips(dtype=torch.float32), show=False).rows
    (copies,) = [row.reason for row in rows if "copied" in row.reason]
    assert copies.count("copied") == 2
    assert "copied x (2, 3, 2, 32, 32)" in copies
    assert "copied x (2, 3, 8, 32, 32)" in copies


@pytest.mark.parametrize("training", [False, True])
def test_pointwise_convolutions_can_be_switched_on(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rule decides; with it whole blocks are one op in training, and in evaluation shortcuts and the last
    convolutions with their sum and ReLU run on the op, too."""
    monkeypatch.setattr(fused_rules, "FUSE_POINTWISE", True)
    fused, stock = pair()
    x = clips()
    assert_same_step(fused.train(training), stock.train(training), x)
    assert fused_sites(fused, x) == (FUSED_SITES + FUSED_STEMS if training else LAYER_SITES)
    rows = [row for row in slowfast_fast.explain(fused, x, show=False).rows if row.backend != "torch"]
    sums = [row for row in rows if any(name.endswith("norm_c") for name in row.modules)]
    assert len(sums) == 8
    assert all(row.modules[-1].endswith("activation") for row in sums)
    assert {row.what for row in sums} == {"bottleneck_bn" if training else "temporal_conv"}


def test_convolution_bias() -> None:
    """Folded with fixed statistics; with those of the batch, the running mean must see it."""
    fused, stock = pair()
    paths = [
        "blocks.1.multipathway_blocks.1.res_blocks.0.branch2.conv_a",
        "blocks.1.multipathway_fusion.conv_fast_to_slow",
    ]
    for path in paths:
        bias = nn.Parameter(torch.randn(fused.get_submodule(path).out_channels, dtype=torch.float64))
        for model in (fused, stock):
            model.get_submodule(path).bias = nn.Parameter(bias.detach().clone())
    x = clips()
    assert_same_step(fused, stock, x)
    why = "convolution bias under batch statistics"
    assert reasons(fused, x)[paths[0]] == f"no bottleneck_bn: {why}; {why}"
    assert reasons(fused, x)[paths[1]] == why
    fused.eval()
    stock.eval()
    assert_same_step(fused, stock, x)
    assert fused_sites(fused, x) == LAYER_SITES


def test_folded_batch_norm() -> None:
    """torch.nn.utils.fuse_conv_bn_eval leaves a convolution with bias and nn.Identity in place of the norm."""
    fused, stock = pair()
    fused.eval()
    stock.eval()
    block = fused.get_submodule("blocks.1.multipathway_blocks.1.res_blocks.0.branch2")
    block.conv_a = nn.utils.fusion.fuse_conv_bn_eval(block.conv_a, block.norm_a)
    block.norm_a = nn.Identity()
    lateral = fused.get_submodule("blocks.0.multipathway_fusion")
    lateral.conv_fast_to_slow = nn.utils.fusion.fuse_conv_bn_eval(lateral.conv_fast_to_slow, lateral.norm)
    lateral.norm = nn.Identity()
    x = clips()
    assert distance(fused(x), stock(x)) < TOLERANCE
    assert fused_sites(fused, x) == LAYER_SITES


def test_channels_last_weights() -> None:
    fused, stock = pair()
    fused.to(memory_format=torch.channels_last_3d)
    assert_same_step(fused, stock, clips())


def forward_hook(module: nn.Module, called: list[str]) -> None:
    module.register_forward_hook(lambda *_: called.append("forward"))


def forward_hook_with_kwargs(module: nn.Module, called: list[str]) -> None:
    module.register_forward_hook(lambda *_: called.append("forward"), with_kwargs=True, always_call=True)


def forward_pre_hook(module: nn.Module, called: list[str]) -> None:
    module.register_forward_pre_hook(lambda *_: called.append("pre"))


def full_backward_hook(module: nn.Module, called: list[str]) -> None:
    module.register_full_backward_hook(lambda *_: called.append("backward"))


def full_backward_pre_hook(module: nn.Module, called: list[str]) -> None:
    module.register_full_backward_pre_hook(lambda *_: called.append("backward pre"))


def own_forward(module: nn.Module, called: list[str]) -> None:
    def forward(x: Tensor) -> Tensor:
        called.append("own")
        return type(module).forward(module, x)

    module.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize("role", ["conv_a", "norm_a", "act_a"])
@pytest.mark.parametrize(
    "observe",
    [forward_hook, forward_hook_with_kwargs, forward_pre_hook, full_backward_hook, full_backward_pre_hook, own_forward],
)
def test_every_kind_of_hook_is_called(observe: Callable[[nn.Module, list[str]], None], role: str) -> None:
    fused, stock = pair()
    block, called = "blocks.1.multipathway_blocks.1.res_blocks.0.branch2", []
    x = clips()
    observe(fused.get_submodule(f"{block}.{role}"), called)
    assert_same_step(fused, stock, x)
    assert len(called) == 1
    why = reasons(fused, x)
    assert "carries hooks" in why[f"{block}.conv_a"]
    assert fused_sites(fused, x) == FUSED_SITES + FUSED_STEMS - 2  # its a, and b, which only the block covers


def test_hooks_on_all_modules_of_the_process() -> None:
    fused, _ = pair()
    called: list[str] = []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, _: called.append(type(module).__name__))
    try:
        fused(clips())
        assert called.count("Conv3d") == 38
        assert called.count("BottleneckBlock") == 8
        assert "process-global module hooks" in reasons(fused, clips()).values()
    finally:
        handle.remove()
    assert fused_sites(fused, clips()) == FUSED_SITES + FUSED_STEMS


def test_parametrized_and_pruned_convolutions_run_as_modules() -> None:
    fused, stock = pair()
    block = "blocks.1.multipathway_blocks.1.res_blocks.0.branch2"
    lateral = "blocks.1.multipathway_fusion.conv_fast_to_slow"
    x = clips()
    for model in (fused, stock):
        nn.utils.parametrizations.weight_norm(model.get_submodule(f"{block}.conv_a"))
        prune.l1_unstructured(model.get_submodule(lateral), "weight", amount=0.5)
    assert distance(fused.eval()(x), stock.eval()(x)) < TOLERANCE
    why = reasons(fused, x)
    assert why[f"{block}.norm_a"] == "ParametrizedConv3d is not a plain Conv3d"
    assert "carries hooks" in why[lateral]


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_as_exact_as_stock(training: bool) -> None:
    assert_as_exact_as_stock(lambda: clips(batch=4, dtype=torch.float32), torch.float32, "cpu", training)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_spatial_layers_in_evaluation(bias: bool, adds: bool) -> None:
    """On spatial_conv in float32 where nobody wants a gradient, on modules everywhere else."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(40, 36, (1, 3, 3), padding=(0, 1, 1), bias=bias)
            self.norm, self.act = nn.BatchNorm3d(36), nn.ReLU()
            for tensor in (self.norm.weight, self.norm.running_mean, self.norm.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            nn.init.normal_(self.norm.bias)

        def forward(self, given: list[Tensor]) -> Tensor:
            return fused_rules.conv_norm_act(given[0], self.conv, self.norm, self.act, *given[1:])

        def stock(self, given: list[Tensor]) -> Tensor:
            return self.act(sum(given[1:], self.norm(self.conv(given[0]))))

    layer, like = Layer().eval(), {"memory_format": torch.channels_last_3d}
    given = [torch.randn(2, 40, 3, 7, 6).contiguous(**like)]
    given += [torch.randn(2, 36, 3, 7, 6).contiguous(**like)] if adds else []

    def ran() -> set[str]:
        return {row.what for row in slowfast_fast.explain(layer, given, show=False).rows}

    with torch.no_grad():
        assert ran() == {"spatial_conv"}
        ours, stock = layer(given), layer.stock(given)
        exact = layer.double().stock([tensor.double() for tensor in given])
        assert distance(ours, exact) <= 2 * distance(stock, exact)
        layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert "spatial_conv" not in ran()
        with slowfast_fast.backend("reference"):
            assert "spatial_conv" not in ran()
    assert layer(given).requires_grad
    layer.conv.dilation = (1, 2, 2)
    layer.conv.padding = (0, 2, 2)
    assert "spatial_conv" not in ran()
