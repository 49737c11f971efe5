"""A frozen network's large batch on the CPU: which clips run together, and that nobody can tell by the result."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from network_testing import SMALL, clips, distance
from test_detection import boxes
from test_freeze import EXACT, enliven
from torch import Tensor, nn

import slowfast_fast
from slowfast_fast import explain, freeze
from slowfast_fast.frozen import choices
from slowfast_fast.frozen.blocks import FrozenStem

pytestmark = pytest.mark.usefixtures("one_thread")


def lively(**options: Any) -> nn.Module:
    model = slowfast_fast.create_slowfast(**{**SMALL, **options}).double()
    enliven(model)
    return model.eval()


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many clips came to the slow stem at a time, from now on."""
    seen: list[int] = []
    stem = FrozenStem.with_lateral

    def watched(self: FrozenStem, x: Tensor, source: Tensor, lateral: Any) -> Tensor | None:
        seen.append(len(x))
        return stem(self, x, source, lateral)

    monkeypatch.setattr(FrozenStem, "with_lateral", watched)
    return seen


def whole(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> Any:
    """The result where no batch is too large."""
    with monkeypatch.context() as patch:
        patch.setattr(choices, "MOST_CLIPS", 1000)
        return call()


@pytest.mark.parametrize(
    ("batch", "expected"), [(0, [0]), (1, [1]), (4, [4]), (5, [4, 1]), (8, [4, 4]), (11, [4, 4, 3])]
)
def test_four_clips_at_a_time(
    monkeypatch: pytest.MonkeyPatch, together: list[int], batch: int, expected: list[int]
) -> None:
    frozen, x = freeze(lively()), clips(batch)
    got = frozen(x)
    assert together == expected
    once = whole(monkeypatch, lambda: frozen(x))
    assert together == [*expected, batch]
    assert got.shape == once.shape
    assert distance(got, once) < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed"])
def test_other_dtypes_and_layouts(
    monkeypatch: pytest.MonkeyPatch, together: list[int], layout: str, dtype: torch.dtype
) -> None:
    frozen, x = freeze(lively(), dtype=dtype), clips(6, dtype=dtype)
    if layout == "channels_last":
        x = [clip.contiguous(memory_format=torch.channels_last_3d) for clip in x]
    elif layout == "sliced":
        x = [torch.cat([clip, clip])[::2] for clip in x]
    else:
        x = [clip.transpose(3, 4) for clip in x]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        got = frozen(x)
        once = whole(monkeypatch, lambda: frozen(x))
    assert together == [4, 2, 6]
    assert got.dtype == dtype
    assert distance(got.double(), once.double()) < (1e-5 if dtype == torch.float32 else 3e-2)


def test_explain_tells_the_parts() -> None:
    rows = explain(freeze(lively()), clips(5), show=False).rows
    told = [row.reason.split(";")[0] for row in rows]
    half = len(rows) // 2
    assert told == ["clips 0 to 3 of 5"] * half + ["clips 4 to 4 of 5"] * half
    assert "clips" not in str(explain(freeze(lively()), clips(4), show=False))


def test_features_keep_their_layout(monkeypatch: pytest.MonkeyPatch, together: list[int]) -> None:
    model = lively()
    model.blocks = nn.ModuleList([*model.blocks][:-2])
    frozen, x = freeze(model), clips(6)
    got, once = frozen(x), whole(monkeypatch, lambda: frozen(x))
    assert together == [4, 2, 6]
    for ours, expected in zip(got, once, strict=True):
        assert ours.stride() == expected.stride()
        assert distance(ours, expected) < EXACT


def test_positions_of_a_head_without_an_average(together: list[int]) -> None:
    model, x = lively(head_output_with_global_average=False), clips(6, size=64)
    with torch.no_grad():
        assert distance(freeze(model)(x), model(list(x))) < EXACT
    assert together == [4, 2]


def test_boxes_meet_the_features_of_all_clips(together: list[int]) -> None:
    model = slowfast_fast.create_slowfast_with_roi_head(**SMALL).double()
    enliven(model)
    model.eval()
    x, given = clips(6, size=64), boxes(9, 6, 64.0)
    with torch.no_grad():
        assert distance(freeze(model)(x, given), model(list(x), given)) < EXACT
    assert together == [4, 2]


# What must see the whole batch


class Centred(nn.Module):
    """An activation that mixes clips."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


def of_the_batch(num_features: int, **options: Any) -> nn.Module:
    return nn.BatchNorm3d(num_features, track_running_stats=False)


def softmax_of_clips() -> nn.Module:
    return nn.Softmax(0)


MIXING: dict[str, tuple[dict[str, Any], str]] = {
    "a module of the user's": ({"activation": Centred}, r"\(Centred\) may mix clips"),
    "a norm without statistics": ({"norm": of_the_batch}, r"\(BatchNorm3d\) takes the statistics of the batch"),
    "a head's activation": ({"head_activation": softmax_of_clips}, r"\(Softmax\) goes over dimension 0"),
}


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_clips_sees_all(together: list[int], name: str) -> None:
    options, reason = MIXING[name]
    model, x = lively(**options), clips(6)
    frozen = freeze(model)
    with torch.no_grad():
        assert distance(frozen(x), model(list(x))) < 1e-12
    assert set(together) <= {6}
    rows = explain(frozen, x, show=False).rows
    (told,) = {row.reason.split(";")[0] for row in rows}
    assert re.match(r"all 6 clips at once: blocks\.\d.*" + reason, told)


def test_hooks_on_a_part_see_all(together: list[int]) -> None:
    frozen, seen = freeze(lively()), []
    handle = frozen.blocks[2].register_forward_hook(lambda module, given, result: seen.append(len(result[0])))
    frozen(clips(6))
    assert seen == together == [6]
    handle.remove()
    frozen(clips(6))
    assert together == [6, 4, 2]


def test_a_graph_of_all_clips() -> None:
    frozen, x = freeze(lively()), clips(6)
    program = torch.export.export(frozen, (x,))
    stems = [node for node in program.graph.nodes if "max_pool_lateral_concat" in str(node.target)]
    assert len(stems) == 1
    assert distance(program.module()(x), frozen(x)) < EXACT


def test_no_graph_for_a_large_batch_on_the_cpu(together: list[int]) -> None:
    model, x = lively(), clips(6)
    with pytest.warns(RuntimeWarning, match="the clips are on cpu"):
        got = freeze(model, cuda_graph=True)(x)
    assert together == [4, 2]
    assert torch.equal(got, freeze(model)(x))
