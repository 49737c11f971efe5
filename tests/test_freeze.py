"""freeze(): the frozen network against the stock one, on many architectures, and its life as a module."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from network_testing import SMALL, clips, distance, pair
from torch import Tensor, nn

import slowfast_fast
from slowfast_fast import explain, freeze
from slowfast_fast.frozen.freezer import Freezer
from slowfast_fast.frozen.network import FrozenNetwork
from slowfast_fast.nn.net import MultiPathWayWithFuse
from slowfast_fast.reference.slowfast import SlowFast

pytestmark = pytest.mark.usefixtures("one_thread")

FP32 = 1e-5  # relative L2 against the stock network
EXACT = 1e-13  # the same in float64


def stock_and_frozen(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, FrozenNetwork]:
    """The stock network in evaluation mode, and ours, frozen, with the same weights and lively statistics."""
    ours = slowfast_fast.create_slowfast(**{**SMALL, **options}).to(dtype)
    enliven(ours)
    # Off the beaten track the fused network in evaluation, which test_slowfast_live.py holds against pytorchvideo's.
    stock = copy.deepcopy(ours)
    if set(options) <= {"model_depth", *SMALL}:
        stock = SlowFast(**{**SMALL, **options}).to(dtype)
        stock.load_state_dict(ours.state_dict())
    return stock.eval(), freeze(ours)


def enliven(model: nn.Module) -> None:
    """Parameters and statistics with which every branch counts."""
    for name, value in model.state_dict().items():
        if name.endswith("running_var") or (name.endswith("weight") and value.dim() == 1):
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point() and value.dim() == 1:
            value.normal_(0, 0.1)


@torch.no_grad()
def assert_same(stock: nn.Module, frozen: nn.Module, x: list[Tensor], limit: float = FP32) -> None:
    expected = stock(list(x))
    got = frozen(x)
    assert got.dtype == expected.dtype
    assert distance(got, expected) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_as_stock(poisoned: None, dtype: torch.dtype) -> None:
    stock, frozen = stock_and_frozen(dtype)
    for batch, size in ((1, 32), (3, 48), (2, 40)):
        assert_same(stock, frozen, clips(batch, size=size, dtype=dtype), EXACT if dtype == torch.float64 else FP32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_is_as_exact_as_stock(poisoned: None, dtype: torch.dtype) -> None:
    """Over several networks and clips: the error against float64 is at most twice that of stock in the same dtype."""
    ours = theirs = 0.0
    for _ in range(4):
        stock, _ = stock_and_frozen()
        model = slowfast_fast.create_slowfast(**SMALL)
        model.load_state_dict(stock.state_dict())
        x = [clip.to(dtype) for clip in clips(4, dtype=torch.float32)]
        with torch.no_grad():
            exact = copy.deepcopy(stock).double()([clip.double() for clip in x])
            ours += distance(freeze(model, dtype=dtype)(x).double(), exact) ** 2
            with torch.autocast("cpu", dtype):
                theirs += distance(stock([clip.float() for clip in x]).double(), exact) ** 2
    assert ours <= 4 * theirs


def test_the_original_is_left_alone() -> None:
    model = slowfast_fast.create_slowfast(**SMALL)
    model.blocks[0].multipathway_blocks[0].norm.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    frozen = freeze(model)
    x = clips(dtype=torch.float32)
    first = frozen(x)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    assert torch.equal(frozen(x), first)
    assert not any(tensor.requires_grad for tensor in frozen.state_dict().values())


def test_the_list_given_is_left_alone() -> None:
    _, frozen = stock_and_frozen()
    x = clips(dtype=torch.float32)
    given, values = list(x), [clip.clone() for clip in x]
    frozen(x)
    assert all(a is b for a, b in zip(x, given, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(x, values, strict=True))


# Sizes and shapes


@pytest.mark.parametrize("frames", [1, 3, 4])
def test_any_number_of_frames(frames: int) -> None:
    stock, frozen = stock_and_frozen(head_pool=nn.AdaptiveAvgPool3d)
    assert_same(stock, frozen, clips(frames=frames, dtype=torch.float32))


@pytest.mark.parametrize("size", [64, 75, 97])
def test_windows_of_the_head_that_slide(size: int) -> None:
    """A larger crop than the head's pool was made for: stock slides the window and averages the logits."""
    stock, frozen = stock_and_frozen(head_pool_kernel_sizes=((2, 1, 2), (8, 1, 2)))
    assert_same(stock, frozen, clips(2, size=size, dtype=torch.float32))


def test_an_adaptive_pool_takes_what_a_fixed_one_refuses() -> None:
    fixed = ((2, 2, 2), (8, 2, 2))
    stock, frozen = stock_and_frozen(head_pool_kernel_sizes=fixed, head_pool=nn.AdaptiveAvgPool3d)
    x = clips(2, size=32, dtype=torch.float32)
    assert_same(stock, frozen, x)
    _, frozen = stock_and_frozen(head_pool_kernel_sizes=fixed)
    with pytest.raises(ValueError, match=r"average pool takes .* = \(2, 2, 2\) features at least.*AdaptiveAvgPool3d"):
        frozen(x)


def test_views_of_a_video_are_a_batch() -> None:
    stock, frozen = stock_and_frozen()
    x = clips(6, dtype=torch.float32)
    with torch.no_grad():
        one_by_one = torch.cat([frozen([clip[i : i + 1] for clip in x]) for i in range(6)])
    assert distance(frozen(x), one_by_one) < FP32
    assert_same(stock, frozen, x)
    assert frozen([clip[:0] for clip in x]).shape == (0, 7)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed"])
def test_any_memory_layout(layout: str) -> None:
    stock, frozen = stock_and_frozen()
    x = clips(dtype=torch.float32)
    if layout == "channels_last":
        x = [clip.contiguous(memory_format=torch.channels_last_3d) for clip in x]
    elif layout == "sliced":
        x = [torch.cat([clip, clip], 1)[:, 1:4] for clip in x]
    else:
        x = [clip.transpose(3, 4) for clip in x]
    assert_same(stock, frozen, x)


# Architectures

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "R50": {"model_depth": 50},
    "5 taps, alpha 8": {
        "slowfast_fusion_conv_kernel_size": (5, 1, 1),
        "slowfast_fusion_conv_stride": (8, 1, 1),
        "head_pool_kernel_sizes": ((1, 1, 1), (8, 1, 1)),
    },
    "grouped": {"stage_conv_b_num_groups": ((4, 4, 4, 4), (2, 2, 2, 2))},
    "dilated": {
        "stage_conv_b_dilations": (((1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 2, 2)),) * 2,
        "stage_spatial_strides": ((1, 2, 2, 1), (1, 2, 2, 1)),
    },
    "space and time": {"stage_conv_b_kernel_sizes": (((3, 3, 3),) * 4, ((3, 3, 3),) * 4)},
    "gray": {"input_channels": (1, 1)},
    "no norm": {"norm": None},
    "no activation": {"activation": None},
    "no pool in the stem": {"stem_pool": None},
    "softmax": {"head_activation": nn.Softmax},
    "no average": {"head_output_with_global_average": False},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(poisoned: None, name: str) -> None:
    stock, frozen = stock_and_frozen(**ARCHITECTURES[name])
    x = clips(dtype=torch.float32, size=48)
    if name == "gray":
        x = [clip[:, :1] for clip in x]
    if name == "5 taps, alpha 8":
        x[0] = x[0][:, :, :1]
    assert_same(stock, frozen, x)


POOLS_OVER_TIME: list[dict[str, Any]] = [
    {"kernel_size": (2, 1, 1)},
    {"kernel_size": (3, 1, 1), "stride": 1, "padding": (1, 0, 0)},
    {"kernel_size": (2, 1, 1), "stride": 1, "padding": (1, 0, 0)},
    {"kernel_size": (5, 1, 1), "stride": (3, 1, 1), "padding": (2, 0, 0)},
]


@pytest.mark.parametrize("options", POOLS_OVER_TIME, ids=str)
def test_max_pools_over_time(poisoned: None, options: dict[str, Any]) -> None:
    """Bit by bit, NaN included, for as many frames as fill the windows, one more and one less."""
    pool = nn.MaxPool3d(**options)
    frozen = Freezer(torch.float32).pool(pool)
    for frames in (5, 6, 7):
        x = torch.randn(2, 16, frames, 9, 7).contiguous(memory_format=torch.channels_last_3d)
        x[0, 3, 2, 4, 4] = torch.nan
        got = frozen(x)
        torch.testing.assert_close(got, pool(x), rtol=0, atol=0, equal_nan=True)
        assert got.is_contiguous(memory_format=torch.channels_last_3d)


def test_too_few_frames_for_a_pool() -> None:
    pool = Freezer(torch.float32).pool(nn.MaxPool3d((2, 1, 1)))
    with pytest.raises(ValueError, match=r"a max pool takes 2 frames at least; got x of shape \(1, 8, 1, 3, 3\)"):
        pool(torch.zeros(1, 8, 1, 3, 3))


def test_stems_that_pool_over_time() -> None:
    def pooled(kernel_size: Any, stride: Any, padding: Any) -> nn.Module:
        return nn.MaxPool3d((2, 1, 1))

    stock, frozen = stock_and_frozen(stem_pool=(pooled, pooled))
    x = [torch.randn(1, 3, frames, 32, 32) for frames in (4, 16)]
    assert_same(stock, frozen, x)
    with pytest.raises(
        ValueError, match="where the pathways meet these are 2 and 3 frames; for 4 slow frames it takes"
    ):
        frozen([x[0], x[1].repeat(1, 1, 2, 1, 1)[:, :, :20]])


def test_pathways_that_pool_over_time() -> None:
    model, stock = pair(torch.float32)
    stock.eval()
    for network in (model, stock):
        blocks = [*network.blocks]
        pools = nn.ModuleList(nn.MaxPool3d((3, 1, 1), stride=1, padding=(1, 0, 0)) for _ in range(2))
        blocks.insert(2, MultiPathWayWithFuse(multipathway_blocks=pools, multipathway_fusion=None))
        network.blocks = nn.ModuleList(blocks)
    frozen = freeze(model)
    x = clips(dtype=torch.float32)
    assert_same(stock, frozen, x)
    rows = explain(frozen, x, show=False).rows
    assert [row.what for row in rows].count("frame_max") == 2
    assert not [row for row in rows if row.backend == "torch"]


class ScaledNorm(nn.BatchNorm3d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "ScaledNorm": {"norm": ScaledNorm},
    "SiLU": {"activation": nn.SiLU},
    "AvgPool3d": {"stem_pool": (nn.AvgPool3d, nn.MaxPool3d)},
}


@pytest.mark.parametrize("piece", UNSUPPORTED)
def test_unsupported_pieces_run_as_they_are(piece: str) -> None:
    stock, frozen = stock_and_frozen(**UNSUPPORTED[piece])
    x = clips(dtype=torch.float32)
    assert_same(stock, frozen, x)
    rows = [row for row in explain(frozen, x, show=False).rows if row.backend == "torch"]
    assert {row.what for row in rows} >= {piece}
    assert all(row.reason for row in rows if row.what == piece)
    assert any(row.backend == "onednn" for row in explain(frozen, x, show=False).rows)


def test_hooks_and_other_norms() -> None:
    model, stock = pair(torch.float32)
    stock.eval()
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    seen: list[str] = []
    stage = model.blocks[2].multipathway_blocks[0]
    stage.register_forward_hook(lambda *_: seen.append("stage"))
    frozen = freeze(model)
    x = clips(dtype=torch.float32)
    assert_same(stock, frozen, x)
    assert seen == ["stage"]
    rows = explain(frozen, x, show=False).rows
    assert any("carries hooks" in row.reason for row in rows)


@pytest.mark.parametrize("head", ["other classes", "identity", "features", "mlp", "no bias"])
def test_replaced_heads(head: str) -> None:
    model, stock = pair(torch.float32)
    stock.eval()
    channels = model.blocks[-1].proj.in_features
    for network in (model, stock):
        torch.manual_seed(1)
        match head:
            case "other classes":
                network.blocks[-1].proj = nn.Linear(channels, 3)
            case "identity":
                network.blocks[-1] = nn.Identity()
            case "features":
                network.blocks[-1].proj = nn.Identity()
            case "mlp":
                network.blocks[-1].proj = nn.Sequential(nn.Linear(channels, 5), nn.ReLU(), nn.Linear(5, 2))
            case "no bias":
                network.blocks[-1].proj = nn.Linear(channels, 3, bias=False)
    assert_same(stock, freeze(model), clips(dtype=torch.float32))


def test_what_cannot_be_frozen() -> None:
    with pytest.raises(TypeError, match=r"model must be what .*create_slowfast.* makes, or hold .*got Linear: no"):
        freeze(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"dtype must be float32, .*got torch\.int8"):
        freeze(slowfast_fast.create_slowfast(**SMALL), dtype=torch.int8)


# What a call refuses


def bad_inputs() -> dict[str, tuple[Any, type[Exception], str]]:
    slow, fast = clips(dtype=torch.float32)
    return {
        "one tensor": (slow, ValueError, r"a list of 2 clips, \[slow, fast\]; got Tensor"),
        "one clip": ([slow], ValueError, "a list of 2 clips.*got 1 entries"),
        "channels": ([slow[:, :1], fast], ValueError, r"x\[0\], the slow clip, must be \(N, 3, T, H, W\)"),
        "dimensions": ([slow, fast[0]], ValueError, r"x\[1\], the fast clip, must be \(N, 3, T, H, W\)"),
        "no height": ([slow[..., :0, :], fast], ValueError, r"x\[0\].*T, H and W at least 1; got shape \(2, 3, 2, 0"),
        "dtype": ([slow, fast.double()], TypeError, r"x\[1\].* must be torch.float32.*freeze the model with dtype"),
        "no tensor": ([slow, fast.numpy()], TypeError, r"x\[1\].*must be a torch.Tensor; got ndarray"),
        "frames": (
            [slow, fast[:, :, :4]],
            ValueError,
            r"T = 2 and x\[1\] T = 4.*for 2 slow frames it takes 5 to 8 fast",
        ),
        "batch": ([slow, fast[:1]], ValueError, r"x\[1\].*must have N, H and W of x\[0\]"),
        "device": ([slow.to("meta"), fast.to("meta")], ValueError, "must be on cpu, as the network is; got meta"),
        "gradient": ([slow.clone().requires_grad_(), fast], ValueError, "must not require a gradient.*detach"),
    }


@pytest.mark.parametrize("name", bad_inputs())
def test_bad_input(name: str) -> None:
    x, error, message = bad_inputs()[name]
    _, frozen = stock_and_frozen()
    with pytest.raises(error, match=message):
        frozen(x)


def test_training_mode_is_refused() -> None:
    _, frozen = stock_and_frozen()
    assert frozen.eval() is frozen
    with pytest.raises(RuntimeError, match=r"cannot train: .*call slowfast_fast.freeze on that again"):
        frozen.train()


def test_autocast_is_ignored() -> None:
    _, frozen = stock_and_frozen()
    x = clips(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(x), frozen(x))
        assert frozen(x).dtype == torch.float32


# The life of a module


def test_save_and_load() -> None:
    _, frozen = stock_and_frozen()
    _, other = stock_and_frozen()
    x = clips(dtype=torch.float32)
    assert not torch.equal(other(x), frozen(x))
    file = io.BytesIO()
    torch.save(frozen.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), frozen(x))


def test_copies_and_pickles() -> None:
    _, frozen = stock_and_frozen()
    x = clips(dtype=torch.float32)
    expected = frozen(x)
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    for other in (copy.deepcopy(frozen), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), expected)


def test_moves() -> None:
    stock, frozen = stock_and_frozen()
    x = clips(dtype=torch.float32)
    expected = frozen(x)
    meta = copy.deepcopy(frozen).to("meta")
    assert next(meta.buffers()).is_meta
    assert frozen.to("cpu") is frozen
    assert torch.equal(frozen(x), expected)
    frozen.double()
    assert frozen.dtype == torch.float64
    with torch.no_grad():
        exact = stock.double()([clip.double() for clip in x])
    assert distance(frozen([clip.double() for clip in x]), exact) < FP32


def test_many_shapes_one_after_the_other() -> None:
    """More than a layer keeps prepared weights for."""
    stock, frozen = stock_and_frozen()
    for size in (32, 40, 48, 56, 64, 72, 32):
        assert_same(stock, frozen, clips(1, size=size, dtype=torch.float32))
    kept = [len(module._plans) for module in frozen.modules() if hasattr(module, "_plans")]
    assert max(kept) <= 4


def test_forced_backend() -> None:
    stock, frozen = stock_and_frozen()
    x = clips(dtype=torch.float32)
    for name in ("reference", "cpu", "auto"):
        with slowfast_fast.backend(name):
            assert_same(stock, frozen, x)
            ran = {row.backend for row in explain(frozen, x, show=False).rows}
        assert (name if name != "auto" else "onednn") in ran
