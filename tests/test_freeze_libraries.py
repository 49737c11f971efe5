"""freeze() on the networks of other libraries, accelerated or not, against these networks in evaluation."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from golden_testing import golden, inputs, load_drawn, relative
from installed_pytorchvideo import pytorchvideo_slowfast
from library_testing import NETWORKS, SMALL, clips, run, stock
from network_testing import distance
from stock_models import gluoncv, pyslowfast
from test_accelerate import Detector, SubBatchNorm3d
from test_detection import boxes
from test_freeze import EXACT, FP32, enliven
from test_freeze_whole import PASSES, ran
from test_golden_libraries import build
from torch import Tensor, nn

import slowfast_fast
from slowfast_fast import explain, freeze
from slowfast_fast.frozen.blocks import FrozenBlock
from slowfast_fast.frozen.head import FrozenRoIHead
from slowfast_fast.frozen.network import FrozenNetwork

RECORDED = ("pyslowfast_r50_nln_8x8", "mmaction2_r50_4x16", "gluoncv_r50_4x16", "r1c7_resnet50")

pytestmark = pytest.mark.usefixtures("one_thread")


def lively(library: str, pathways: int = 2, **options: Any) -> tuple[nn.Module, Any]:
    """In float64, with statistics and parameters with which every branch counts; and what it takes."""
    plan = replace(SMALL, pathways=pathways, **options)
    model = stock(library, plan)
    enliven(model)
    return model, clips(library, plan, batch=6)


def to(x: Any, dtype: torch.dtype) -> Any:
    return [clip.to(dtype) for clip in x] if isinstance(x, list) else x.to(dtype)


@torch.no_grad()
def evaluated(model: nn.Module, x: Any, *others: Any) -> Any:
    return copy.deepcopy(model).eval()(list(x) if isinstance(x, list) else x, *others)


STOCK = [("pytorchvideo", 2, False), ("pyslowfast", 1, False), ("mmaction2", 2, False)]


@pytest.mark.parametrize(("library", "pathways", "accelerated"), [*((*n, True) for n in NETWORKS), *STOCK])
def test_as_the_library_s(library: str, pathways: int, accelerated: bool) -> None:
    """In float64 and float32; the model itself stays in training mode, with its classes and its numbers."""
    model, x = lively(library, pathways)
    expected = evaluated(model, x)
    if accelerated:
        slowfast_fast.accelerate(model)
    kinds = [type(module) for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    exact = run(freeze(model), x)
    assert exact.shape == expected.shape
    assert distance(exact, expected) < EXACT
    frozen = freeze(copy.deepcopy(model).float())
    assert distance(run(frozen, to(x, torch.float32)).double(), expected) < FP32
    assert model.training
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    shared = {tensor.data_ptr() for tensor in model.state_dict().values() if tensor.numel()}
    assert not shared & {tensor.data_ptr() for tensor in frozen.state_dict().values()}
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize(("library", "pathways"), NETWORKS)
def test_half_precision(library: str, pathways: int) -> None:
    """Weights are folded before they are rounded. Sums are kept in float32, so that the error is of a rounding a layer;
    PyTorch's own network in that dtype lacks pools on the CPU."""
    model, x = lively(library, pathways)
    for dtype in (torch.float16, torch.bfloat16):
        rounded = to(x, dtype)
        got = run(freeze(model, dtype=dtype), rounded)
        assert got.dtype == dtype
        assert distance(got.double(), evaluated(model, to(rounded, torch.float64))) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", RECORDED)
def test_golden(name: str) -> None:
    """Recorded results of the libraries themselves; test_freeze_any.py has those of pytorchvideo."""
    model = load_drawn(build(name).float())
    slowfast_fast.accelerate(model)
    got = run(freeze(model), inputs(name, torch.float32))
    assert relative(got.double().numpy(), golden(name)["eval_logits"]) < FP32


@pytest.mark.parametrize(("library", "pathways"), [(*network,) for network in NETWORKS if "mmaction2" not in network])
def test_known_as_a_whole(library: str, pathways: int) -> None:
    """As our own networks: no pass is left of its own, and all that runs is frozen, but for the parts of heads."""
    blocks = {"nonlocal_blocks": ((1, 1), (2, 0))} if library == "pyslowfast" else {}
    model, x = lively(library, pathways, **blocks)
    frozen = freeze(model.float())
    assert isinstance(frozen, FrozenNetwork)
    x = to(x, torch.float32)
    counts = ran(frozen, x)
    assert not [name for name in PASSES if name in counts and name != "aten::add"]
    paths = [row.modules[0] for row in explain(frozen, x, show=False).rows if row.backend == "torch"]
    behind = tuple(f"blocks.{index}." for index in range(5, len(frozen.blocks)))
    assert all(path.startswith(behind) or path.endswith("attention") for path in paths)


# The libraries' own calls


def test_pyslowfast_s_probabilities_and_sliding_windows() -> None:
    """Its head applies softmax at every position, and averages."""
    model, _ = lively("pyslowfast")
    x = clips("pyslowfast", SMALL, batch=2, size=64)
    got = freeze(model)(x)
    torch.testing.assert_close(got.sum(1), torch.ones(2, dtype=torch.float64))
    assert distance(got, evaluated(model, x)) < EXACT
    for act in (nn.Sigmoid(), nn.Identity()):
        model.head.act = act
        assert distance(freeze(model)(x), evaluated(model, x)) < EXACT
    with pytest.raises(ValueError, match=r"pools must leave the pathways with the same \(T, H, W\); got \(3, 2, 2\)"):
        freeze(model)([x[0].repeat(1, 1, 2, 1, 1), x[1].repeat(1, 1, 2, 1, 1)])


def test_pyslowfast_s_detection() -> None:
    """Its head is not known; the boxes go on to it."""
    model = Detector(replace(SMALL, strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2))).double()
    enliven(model)
    x, found = clips("pyslowfast"), torch.tensor([[0, 0, 1, 0, 0], [1, 0, 1, 1, 1]])
    frozen = freeze(model)
    expected = evaluated(model, x, found)
    assert distance(frozen(x, found), expected) < EXACT
    assert distance(frozen(x, bboxes=found), expected) < EXACT


@pytest.mark.parametrize("alike", [True, False], ids=["alike", "each another size"])
def test_pyslowfast_s_detection_as_a_whole(alike: bool) -> None:
    """A head whose pathways are sampled alike is one of ours; else it is what the boxes go on to."""
    model, _ = lively("pyslowfast")
    model.head = pyslowfast.ResNetRoIHead(SMALL, scale_factors=(16.0, 16.0 if alike else 8.0)).double()
    x, found = clips("pyslowfast", size=64), boxes(5, 2, 64.0)
    expected = evaluated(model, x, found)
    frozen = freeze(model)
    assert isinstance(frozen, FrozenNetwork)
    assert isinstance(frozen.detection_head, FrozenRoIHead) == alike
    for got in (frozen(x, found), frozen(x, bboxes=found)):
        assert distance(got, expected) < EXACT
    if alike:  # PyTorch has no average pool in half precision on the CPU
        rounded = to(x, torch.bfloat16)
        got = freeze(model, dtype=torch.bfloat16)(rounded, found.float())
        exact = evaluated(model, to(rounded, torch.float64), found.float().double())
        assert distance(got.double(), exact) < 2 * torch.finfo(torch.bfloat16).eps


def test_pyslowfast_s_head_of_boxes_alone() -> None:
    """Within a network that calls it in its own way."""

    class Tracker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = pyslowfast.ResNetRoIHead(SMALL)

        def forward(self, x: list[Tensor], found: Tensor) -> Tensor:
            return self.head(x, found).flip(1)

    class Both(nn.Module):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone, self.tracker = backbone, Tracker().double()
            self.backbone.head = nn.Identity()

        def forward(self, x: list[Tensor], found: Tensor) -> Tensor:
            return self.tracker(self.backbone(x), found)

    network, _ = lively("pyslowfast")
    model = Both(network)
    x, found = clips("pyslowfast", size=64), boxes(4, 2, 64.0)
    frozen = freeze(model)
    assert isinstance(frozen.module.tracker.head, FrozenRoIHead)
    assert distance(frozen(x, found), evaluated(model, x, found)) < EXACT


def test_mmaction2_s_backbone() -> None:
    """By itself it gives a tuple, by name as well; within a recognizer it is what is frozen."""
    model, x = lively("mmaction2")
    slowfast_fast.accelerate(model)
    expected = evaluated(model.backbone, x)
    frozen = freeze(model.backbone)
    assert isinstance(frozen, FrozenNetwork)
    for got in (frozen(x), frozen(x=x)):
        assert isinstance(got, tuple)
        assert all(distance(a, b) < EXACT for a, b in zip(got, expected, strict=True))
    whole = freeze(model)
    assert isinstance(whole.module.backbone, FrozenNetwork)
    left = {row.modules: row.reason for row in explain(whole, x, show=False).rows if row.backend == "torch"}
    assert left == {("module.cls_head.fc_cls",): "SlowFastHead runs as it did: no frozen layer stands for it"}


def test_gluoncv_s_features() -> None:
    model, x = lively("gluoncv")
    model.feat_ext = True
    assert distance(freeze(model)(x), evaluated(model, x)) < EXACT


def test_pytorchvideo_s_own_detector() -> None:
    slowfast = pytorchvideo_slowfast()
    model = slowfast.create_slowfast_with_roi_head(
        model_depth=18,
        stem_dim_outs=(16, 4),
        slowfast_channel_reduction_ratio=(4,),
        model_num_class=6,
        head_pool_kernel_sizes=((2, 1, 1), (8, 1, 1)),
    ).double()
    enliven(model)
    x, found = clips("pytorchvideo", size=64), boxes(5, 2, 64.0)
    slowfast_fast.accelerate(model)
    frozen = freeze(model)
    assert isinstance(frozen, FrozenNetwork)
    assert distance(frozen(x, found), evaluated(model, x, found)) < EXACT


NON_LOCAL = replace(SMALL, pathways=1, nonlocal_blocks=((1, 1), (2, 0), (3, 0)))


def assert_whole(model: nn.Module, within: str, x: Tensor, others: set[str]) -> None:
    """Exact, known as a whole but for the modules that are named, with and without ``accelerate`` before."""
    enliven(model)
    expected = evaluated(model, x)
    slowfast_fast.accelerate(model)
    frozen = freeze(model)
    assert distance(run(frozen, x), expected) < EXACT
    assert isinstance(frozen.get_submodule(within), FrozenNetwork)
    assert {row.what for row in explain(frozen, x, show=False).rows if row.backend == "torch"} == others


def test_gluoncv_s_i3d() -> None:
    """Its stem's pool takes every second frame, the pool behind res2 the larger one of two; attention in between."""
    model = gluoncv.I3D_ResNetV1(NON_LOCAL).double()
    x = torch.randn(5, 3, 16, 48, 48, dtype=torch.float64)
    assert_whole(model, "", x, {"Attention"})


@pytest.mark.parametrize("with_pool2", [False, True])
def test_mmaction2_s_backbone_of_one_pathway(with_pool2: bool) -> None:
    """mmcv's attention, whose keys and values are pooled behind their convolutions."""
    model = stock("mmaction2", NON_LOCAL)
    if with_pool2:
        model.backbone.with_pool2, model.backbone.pool2 = True, nn.MaxPool3d((2, 1, 1), (2, 1, 1))
    x = clips("mmaction2", NON_LOCAL, batch=5, size=48)
    assert_whole(model, "module.backbone", x, {"Attention", "Linear"})


def test_a_backbone_within_a_network_that_runs_its_stages() -> None:
    """The pathways of mmaction2's SlowFast are networks of their own kind, but never called."""
    model, x = lively("mmaction2")
    kind = type(model.backbone)

    class Halved(kind):  # type: ignore[misc,valid-type]
        def forward(self, x: Tensor) -> Any:
            return super().forward(x[:, :, ::2])

    model.backbone.__class__ = Halved
    assert distance(run(freeze(model), x), evaluated(model, x)) < EXACT


def test_mmaction2_s_attention_in_a_pathway() -> None:
    model, x = lively("mmaction2", nonlocal_blocks=((1, 1), (2, 0)))
    assert_whole(model, "module.backbone", x, {"Attention", "Linear"})


# What is watched, replaced or not known


@pytest.mark.parametrize(
    ("library", "watched"),
    [
        ("pyslowfast", "s3.pathway0_res1"),
        ("gluoncv", "slow_res3.1"),
        ("pytorchvideo", "blocks.2.multipathway_blocks.0.res_blocks.1"),
        ("mmaction2", "backbone.fast_path"),
        ("r1c7", ""),
    ],
)
def test_hooks_are_called(library: str, watched: str) -> None:
    """Of a block, a pathway that is never called, the model: every block but that one is frozen."""
    model, x = lively(library)
    expected = evaluated(model, x)
    seen: list[int] = []
    model.get_submodule(watched).register_forward_hook(lambda *_: seen.append(1))
    slowfast_fast.accelerate(model)
    frozen = freeze(model)
    assert distance(frozen(x), expected) < EXACT
    called = watched != "backbone.fast_path"
    assert len(seen) == called
    blocks = [module for module in frozen.modules() if isinstance(module, FrozenBlock)]
    assert len(blocks) == 2 * sum(SMALL.depths) - bool(called and watched)


def test_what_an_option_changes_runs_as_it_is() -> None:
    """Norms over parts of the batch, a block that drops its branch, another order of layers."""
    model, x = lively("pyslowfast", norm=SubBatchNorm3d)
    frozen = freeze(model)
    assert distance(frozen(x), evaluated(model, x)) < EXACT
    rows = explain(frozen, x, show=False).rows
    assert any("SubBatchNorm3d is not a plain BatchNorm3d" in row.reason for row in rows)
    model, x = lively("pyslowfast", nonlocal_blocks=((1, 0),))
    model.s3.pathway0_res1._drop_connect_rate = 0.5
    assert distance(freeze(model)(x), evaluated(model, x)) < EXACT
    model, x = lively("mmaction2")
    layer = model.backbone.fast_path.layer2[1].conv1
    layer.order = ("norm", "conv", "act")
    layer.bn = nn.BatchNorm3d(layer.conv.in_channels).double()
    assert distance(freeze(model)(x), evaluated(model, x)) < EXACT


def test_a_head_that_does_something_else_is_kept() -> None:
    model, x = lively("pyslowfast")
    kind = type(model.head)

    class ResNetBasicHead(kind):  # type: ignore[misc,valid-type]
        def forward(self, x: list[Tensor]) -> Tensor:
            return super().forward(x) / 2

    model.head.__class__ = ResNetBasicHead
    expected = evaluated(model, x)
    frozen = freeze(model)
    assert distance(frozen(x), expected) < EXACT
    reasons = {row.modules[0]: row.reason for row in explain(frozen, x, show=False).rows}
    assert "no frozen layer stands for it" in reasons["blocks.5.module.projection"]


@pytest.mark.parametrize("change", ["order", "sources", "groups", "clips"])
def test_a_namesake_that_flows_another_way_is_not_known_as_a_whole(change: str) -> None:
    """Its blocks are frozen by themselves, and its own forward goes on calling them."""
    model, x = lively("pyslowfast", nonlocal_blocks=((1, 1),))
    kind, stage = type(model), type(model.s3)

    class SlowFast(kind):  # type: ignore[misc,valid-type]
        def forward(self, x: list[Tensor]) -> Tensor:
            return super().forward([2 * x[0], x[1]] if change == "clips" else x)

    class ResStage(stage):  # type: ignore[misc,valid-type]
        def forward(self, x: list[Tensor]) -> list[Tensor]:
            slow, fast = x
            slow = self.pathway0_res0(slow)
            if change == "groups":  # PySlowFast's NONLOCAL.GROUP: attention within a part of the frames
                n, c, t, *size = slow.shape
                slow = self.pathway0_res1(slow).transpose(1, 2).reshape(n * t, 1, c, *size).transpose(1, 2)
                slow = self.pathway0_nonlocal1(slow).transpose(1, 2).reshape(n, t, c, *size).transpose(1, 2)
            elif change == "order":
                slow = self.pathway0_res1(self.pathway0_nonlocal1(slow))
            else:
                slow = self.pathway0_nonlocal1(self.pathway0_res1(slow) + slow)
            return [slow, self.pathway1_res1(self.pathway1_res0(fast))]

    if change == "clips":
        model.__class__ = SlowFast
    else:
        model.s3.__class__ = ResStage
    frozen = freeze(model)
    assert not isinstance(frozen, FrozenNetwork)
    assert distance(frozen(x), evaluated(model, x)) < EXACT


def test_within_another_model() -> None:
    """Ours, too."""

    class Normalised(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network
            self.shift = nn.Parameter(torch.tensor(0.1))

        def forward(self, slow: Tensor, *, fast: Tensor) -> dict[str, Tensor]:
            return {"scores": self.network([slow - self.shift, fast - self.shift])}

    ours = slowfast_fast.create_slowfast(model_depth=18, head_pool=nn.AdaptiveAvgPool3d).double()
    enliven(ours)
    theirs, x = lively("pyslowfast")
    for network in (ours, theirs):
        model = Normalised(network)
        frozen = freeze(model, dtype=torch.float64)
        with torch.no_grad():
            expected = copy.deepcopy(model).eval()(x[0], fast=x[1])["scores"]
        assert distance(frozen(x[0], fast=x[1])["scores"], expected) < EXACT


def test_refused() -> None:
    class FuseAudioToFastSlow(nn.Module):
        pass

    model = stock("pytorchvideo")
    model.blocks[4].multipathway_fusion = FuseAudioToFastSlow()
    with pytest.raises(TypeError, match=r"got Net: the model .Net.: audio-visual networks are left alone"):
        freeze(model)
    with pytest.raises(TypeError, match=r"got Conv3d: no block of a known library in Conv3d"):
        freeze(nn.Conv3d(2, 2, 1))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got list"):
        freeze([])  # type: ignore[arg-type]
    frozen, x = freeze(stock("mmaction2")), clips("mmaction2")
    with pytest.raises(TypeError, match=r"a clip, of shape .* must be torch.float64.*freeze the model with dtype"):
        frozen(x.float())
    with pytest.raises(ValueError, match="must be on cpu, as the network is; got meta"):
        frozen(x.to("meta"))
    with pytest.raises(ValueError, match="must not require a gradient"):
        frozen(x.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="a frozen network cannot train"):
        frozen.train()


# Life as a module


@pytest.mark.parametrize("library", ["pyslowfast", "mmaction2", "r1c7"])
def test_copies_pickles_and_weights(library: str) -> None:
    model, x = lively(library)
    other, _ = lively(library)
    frozen, loaded = freeze(model), freeze(other)
    expected = run(frozen, x)
    assert torch.equal(run(copy.deepcopy(frozen), x), expected)
    assert torch.equal(run(pickle.loads(pickle.dumps(frozen)), x), expected)
    file = io.BytesIO()
    torch.save(frozen.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(run(loaded, x), expected)
    assert frozen.to("cpu") is frozen
    single = run(frozen.float(), to(x, torch.float32))
    assert distance(single.double(), expected) < FP32


def test_graphs_warn_without_a_gpu() -> None:
    """Of a copy with frozen parts; an argument that may be another one the next time has no graph."""
    model, x = lively("mmaction2")
    expected = run(freeze(model), x)
    frozen = freeze(model, cuda_graph=True)
    with pytest.warns(RuntimeWarning, match="cuda_graph=True runs without a graph here: the clips are on cpu"):
        assert torch.equal(run(frozen, x), expected)
    assert torch.equal(run(frozen, x), expected)
    with pytest.warns(RuntimeWarning, match="graph here: the call has a dtype"), pytest.raises(TypeError):
        frozen(x, torch.float32)


@pytest.mark.no_sanitizer
@pytest.mark.parametrize("library", ["pyslowfast", "mmaction2", "gluoncv"])
def test_export(library: str) -> None:
    model, x = lively(library)
    expected = evaluated(model, x)
    program = torch.export.export(freeze(model), (x,))
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    assert distance(program.module()(x), expected) < EXACT
