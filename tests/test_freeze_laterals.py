"""Frozen lateral connections of every kind, join and direction: the numbers, and what ran."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from family_reference import Plain
from network_testing import distance, reasons
from test_freeze import EXACT, FP32, enliven
from torch import Tensor, nn

import slowfast_fast
from slowfast_fast.models import slowfast_network
from slowfast_fast.nn.lateral import FuseLaterals, Lateral

pytestmark = pytest.mark.usefixtures("one_thread")

ALPHA = 4
WAYS = [
    pytest.param(*way, id="-".join(way))
    for way in itertools.product(
        ("conv", "time_to_channel", "sampling"), ("concat", "sum"), ("fast_to_slow", "slow_to_fast", "both")
    )
]
FOLLOWED = [pytest.param(*by, id=f"norm={by[0]}-act={by[1]}") for by in itertools.product((False, True), repeat=2)]


def network(kind: str, join: str, direction: str, norm: bool, act: bool) -> tuple[nn.Module, dict[str, Any]]:
    ways = {"lateral": kind, "lateral_join": join, "lateral_direction": direction, "lateral_activation": act}
    beta_inverse = {"conv": 4, "time_to_channel": ALPHA, "sampling": 1}[kind] if join == "sum" else 4
    small: dict[str, Any] = {"model_depth": (1, 1, 1, 1), "width": 16, "model_num_class": 5}
    model = slowfast_network(
        alpha=ALPHA, beta=1 / beta_inverse, lateral_norm=norm, head_pool=nn.AdaptiveAvgPool3d, **ways, **small
    )
    enliven(model.double().eval())
    return model, ways


def clips(batch: int = 2, frames: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(batch, 3, t, 20, 17, dtype=dtype) for t in (frames, ALPHA * frames)]


@pytest.mark.parametrize(("kind", "join", "direction"), WAYS)
@pytest.mark.parametrize(("norm", "act"), FOLLOWED)
@torch.no_grad()
def test_every_connection(poisoned: None, kind: str, join: str, direction: str, norm: bool, act: bool) -> None:
    model, ways = network(kind, join, direction, norm, act)
    x = clips()
    plain = Plain(weights=model.state_dict(), training=False, alpha=ALPHA, **ways)
    expected = plain.slowfast(x)
    assert distance(model(x), expected) < EXACT
    frozen = slowfast_fast.freeze(model)
    with torch.profiler.profile() as profile:
        result = frozen(x)
    assert distance(result, expected) < EXACT
    ran = {event.key for event in profile.key_averages()}
    assert not ran & {"aten::cat", "aten::conv_transpose3d", "aten::batch_norm", "aten::repeat_interleave"}
    if norm != act:
        return
    single = slowfast_fast.freeze(model, dtype=torch.float32)
    x = [clip.float() for clip in x]
    assert distance(single(x).double(), plain.slowfast([clip.double() for clip in x])) < FP32
    assert torch.equal(single(x), single(x)), "something that is needed again was overwritten"
    assert single([clip[:0] for clip in x]).shape == (0, 5)


IN_PLACE = "in place; no op adds"
# What PyTorch runs in each of the four connections (each direction once), and why.
UNFUSED: dict[tuple[str, str, str, bool, bool], list[str]] = {
    ("conv", "concat", "both", True, True): [],
    ("time_to_channel", "concat", "both", False, False): [],
    ("sampling", "concat", "both", False, False): [],
    ("sampling", "concat", "both", True, True): [],
    ("conv", "sum", "fast_to_slow", True, False): [],
    ("conv", "sum", "fast_to_slow", True, True): [f"{IN_PLACE} behind an activation"],
    ("conv", "sum", "slow_to_fast", True, True): [f"{IN_PLACE} frames that lie apart"],
    ("time_to_channel", "sum", "both", False, False): [f"{IN_PLACE} frames that lie apart"] * 2,
    ("time_to_channel", "concat", "fast_to_slow", True, True): ["no op moves frames for a norm or an activation"],
}


@pytest.mark.parametrize("way", UNFUSED, ids=str)
def test_explain_names_what_cannot_be_fused(way: tuple[str, str, str, bool, bool]) -> None:
    model, _ = network(*way)
    x = clips(dtype=torch.float32)
    rows = slowfast_fast.explain(slowfast_fast.freeze(model, dtype=torch.float32), x, show=False).rows
    assert [row.reason for row in rows if row.backend == "torch"] == UNFUSED[way] * 4
    if way[1] == "concat":  # of the one pathway that is not read by the other the last layer writes beside
        one = [row for row in rows if len(row.modules) == 2 and "fusion" in row.modules[1]]
        assert len(one) == 4
        assert one[0].what.startswith("max_pool_")
        assert {row.what.partition("_concat")[0] for row in one[1:]} <= {
            "temporal_conv_frames",
            "temporal_conv_lateral",
        }


@pytest.mark.parametrize(("kernel", "alpha"), [(5, 8), (7, 2), (3, 1), (1, 4), (9, 3)])
@torch.no_grad()
def test_transposed_convolutions(poisoned: None, kernel: int, alpha: int) -> None:
    """Frames of a group that no tap reaches, taps that reach over several frames, a bias."""
    conv = nn.ConvTranspose3d(
        *(16, 6, (kernel, 1, 1), (alpha, 1, 1), (kernel // 2, 0, 0)),
        output_padding=(alpha - kernel + kernel // 2 * 2, 0, 0),
    ).double()
    join = Lateral(conv, None, None, "concat")
    fused = slowfast_fast.frozen.freezer.Freezer(torch.float64).fusion(FuseLaterals(None, join))
    slow, fast = torch.randn(2, 16, 3, 4, 5).double(), torch.randn(2, 2, 3 * alpha, 4, 5).double()
    slow, fast = (x.contiguous(memory_format=torch.channels_last_3d) for x in (slow, fast))
    expected = torch.cat([fast, conv(slow)], 1)
    assert distance(fused.to_fast(fast, slow), expected) < EXACT


@pytest.mark.no_sanitizer
@pytest.mark.parametrize("way", [("conv", "concat"), ("time_to_channel", "sum")], ids=str)
@torch.no_grad()
def test_compiled_and_exported(way: tuple[str, str]) -> None:
    model, _ = network(*way, "both", way[0] == "conv", way[0] == "conv")
    frozen, x = slowfast_fast.freeze(model, dtype=torch.float32), clips(dtype=torch.float32)
    expected = frozen(x)
    compiled = torch.compile(frozen, backend="aot_eager", fullgraph=True)
    assert distance(compiled(x), expected) < FP32
    assert distance(torch.export.export(frozen, (x,)).module()(x), expected) < FP32


@torch.no_grad()
def test_life_as_a_module() -> None:
    way = ("conv", "concat", "both", True, True)
    (first, _), (second, _) = network(*way), network(*way)
    x = clips()
    frozen, other = slowfast_fast.freeze(first), slowfast_fast.freeze(second)
    expected = frozen(x)
    other(x)
    other.load_state_dict(frozen.state_dict())
    assert distance(other(x), expected) < EXACT
    assert distance(copy.deepcopy(frozen)(x), expected) < EXACT
    assert distance(first(x), expected) < EXACT


@pytest.mark.parametrize(("join", "direction", "frames"), [("concat", "slow_to_fast", 9), ("sum", "both", 7)])
def test_frames_that_do_not_fit(join: str, direction: str, frames: int) -> None:
    model, _ = network("conv", join, direction, True, True)
    frozen = slowfast_fast.freeze(model)
    slow, fast = clips()
    with pytest.raises(ValueError, match="for 2 slow frames it takes"):
        frozen([slow, torch.cat([fast, fast], 2)])
    with pytest.raises(ValueError, match=f"must have 4 times the frames of the slow one; got {frames} and 2"):
        frozen([slow, torch.cat([fast, fast], 2)[:, :, :frames]])


class Halved(nn.BatchNorm3d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


@torch.no_grad()
def test_what_cannot_be_folded_is_left_as_it_is() -> None:
    model, _ = network("conv", "concat", "both", True, True)
    fusion = model.blocks[0].multipathway_fusion
    fusion.slow_to_fast.norm = Halved(fusion.slow_to_fast.norm.num_features).double().eval()
    x = clips()
    frozen = slowfast_fast.freeze(model)
    assert distance(frozen(x), model(x)) < EXACT
    why = {reason for path, reason in reasons(frozen, x).items() if path.endswith("slow_to_fast.norm")}
    assert len(why) == 1
    assert why.pop().startswith("from slow to fast: Halved is not a plain BatchNorm3d")
