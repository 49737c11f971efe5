"""The detection networks with clips and boxes against plain PyTorch, and RoIAlign against its definition."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from family_reference import Plain, roi_align
from network_testing import distance, reasons
from test_freeze import enliven
from test_freeze_whole import ran
from torch import Tensor

import slowfast_fast
from slowfast_fast.frozen.head import OF_HEAD
from slowfast_fast.models import create_model
from slowfast_fast.models.registry import entry, list_models
from slowfast_fast.nn.roi_align import RoIAlign

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = [name for name in list_models() if entry(name).boxes]
# Of AVA's networks: res5 with stride 1 and dilation 2.
AVA: dict[str, Any] = {"strides": (1, 2, 2, 1), "dilations": (1, 1, 1, 2)}


def boxes(count: int, clips: int, size: float) -> Tensor:
    """Large and small ones, some beyond the edges, some without area, and one that is the whole clip."""
    corners = (torch.rand(count, 4, dtype=torch.float64) * 1.4 - 0.2) * size
    low, high = corners[:, :2], corners[:, 2:]
    drawn = torch.cat([torch.minimum(low, high), torch.maximum(low, high)], 1)
    drawn[0] = torch.tensor([0.0, 0.0, size, size])
    drawn[-1, 2:] = drawn[-1, :2]
    return torch.cat([torch.randint(clips, (count, 1)).double(), drawn], 1)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [0, 1, 3])
def test_roi_align(ratio: int, aligned: bool) -> None:
    """For boxes up to some times the features; the gradient of a box that nobody sees is 0."""
    for size, (height, width) in ((40.0, (5, 6)), (170.0, (7, 3)), (8.0, (1, 1))):
        x = torch.randn(3, 4, height, width, dtype=torch.float64, requires_grad=True)
        found = boxes(9, 2, size)
        found[1, 1:] = torch.tensor([-900.0, -900.0, -800.0, -800.0])
        layer = RoIAlign((3, 2), 1 / 8, ratio, aligned)
        out = layer(x, found)
        expected = roi_align(x, found, (3, 2), 1 / 8, ratio, aligned)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        grad = torch.randn_like(out)
        ours, theirs = (torch.autograd.grad(y, x, grad)[0] for y in (out, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert not ours[2].any()


def test_roi_align_of_one_size_lists_and_none() -> None:
    layer = RoIAlign(2, 0.25, 2)
    x = torch.randn(2, 3, 6, 5)
    found = boxes(6, 2, 20.0).float()
    found = found[found[:, 0].argsort()]
    by_clip = [found[found[:, 0] == clip, 1:] for clip in range(2)]
    assert torch.equal(layer(x, by_clip), layer(x, found))
    assert layer(x, found[:0]).shape == (0, 3, 2, 2)
    half = layer(x.half(), found)
    assert half.dtype == torch.float16
    assert distance(half.float(), layer(x, found)) < 2e-3
    for wrong in (found[:, :4], found[0], [found], 3):
        with pytest.raises(ValueError, match=r"boxes must be \(B, 5\) of \(clip, x1, y1, x2, y2\)"):
            layer(x, wrong)


@pytest.mark.no_sanitizer
def test_roi_align_in_a_graph() -> None:
    layer, x, found = RoIAlign(7, 1 / 16), torch.randn(2, 3, 6, 5), boxes(4, 2, 90.0).float()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, found), layer(x, found))


def small(name: str, **overrides: Any) -> torch.nn.Module:
    """The network with a block or two in each stage, narrow."""
    non_local = {"non_local": {4: (0,)}} if "nln" in name else {}
    narrow = {"model_depth": (1, 1, 2, 1), "width": 16, "beta": 1 / 4, "model_num_class": 6, "dropout_rate": 0.0}
    return create_model(name, **{**narrow, "frames": 2, **non_local, **overrides})


def narrow(**overrides: Any) -> torch.nn.Module:
    """The constructor's own, as small as it gets."""
    options: dict[str, Any] = {
        "model_depth": (1, 1, 1, 1),
        "stem_dim_outs": (16, 4),
        "slowfast_channel_reduction_ratio": 4,
        "model_num_class": 6,
        "head_pool_kernel_sizes": ((2, 1, 1), (8, 1, 1)),
    }
    return slowfast_fast.create_slowfast_with_roi_head(**{**options, **overrides})


def plain_of(name: str) -> Plain:
    non_local = {"non_local_pool": (2, 2, 2)} if "nln" in name else {}
    return Plain(weights={}, training=False, alpha=4, lateral="conv", **AVA, **non_local)


def clips(batch: int, frames: int, size: int) -> list[Tensor]:
    return [torch.randn(batch, 3, t, size, size + 16, dtype=torch.float64) for t in (frames, 4 * frames)]


@pytest.mark.parametrize("name", NAMES)
def test_clips_and_boxes(name: str) -> None:
    """Evaluation, frozen and not; a training step: scores, gradients and statistics."""
    compare = pytest.importorskip("test_family", reason="needs hypothesis").compare
    x = [clip.requires_grad_() for clip in clips(2, 2, 64)]
    compare(small(name).double(), x, plain_of(name), Plain.detection, boxes(5, 2, 64.0))


@torch.no_grad()
def test_at_full_depth() -> None:
    """The largest: R101 with non-local blocks."""
    name = NAMES[-1]
    model = create_model(name).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1 and not parameter.any():  # the last gammas of blocks, and all betas
            parameter.uniform_(0.05, 0.1)
    x = [clip.float() for clip in clips(1, 8, 48)]
    found = boxes(3, 1, 48.0).float()
    plain = replace(plain_of(name), weights={k.removeprefix("model."): v for k, v in model.state_dict().items()})
    expected = plain.detection(x, found)
    features = model.model(x)
    assert features.shape[2:] == (1, 3, 4), "res5 keeps the size of res4"
    assert distance(model(x, found), expected) < 1e-4
    assert distance(slowfast_fast.freeze(model)(x, found), expected) < 1e-4


def test_a_frozen_detector() -> None:
    """Its own dtype but boxes in pixels."""
    name = NAMES[0]
    model = small(name).eval()
    enliven(model)
    x, found = [clip.float() for clip in clips(6, 2, 64)], boxes(7, 6, 64.0).float()
    frozen = slowfast_fast.freeze(model)
    with torch.no_grad():
        expected = model(x, found)
        assert distance(frozen(x, found), expected) < 1e-5
        assert frozen(x, found[:0]).shape == (0, 6)
        half = slowfast_fast.freeze(model, dtype=torch.bfloat16)([clip.bfloat16() for clip in x], found)
        assert half.dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            stock = copy.deepcopy(model)(x, found).float()
        assert distance(half.float(), expected) < max(3 * distance(stock, expected), 2e-2)
    with pytest.raises(TypeError, match="bboxes"):
        model(x)


def test_explain_shows_the_head() -> None:
    class WithBoxes(torch.nn.Module):
        def __init__(self, model: torch.nn.Module, found: Tensor) -> None:
            super().__init__()
            self.model, self.found = model, found

        def forward(self, x: list[Tensor]) -> Tensor:
            return self.model(x, self.found)

    x, found = [clip.float() for clip in clips(1, 2, 64)], boxes(3, 1, 64.0).float()
    model = small(NAMES[0]).eval()
    rows = slowfast_fast.explain(WithBoxes(slowfast_fast.freeze(model), found), x, show=False).rows
    assert [row.what for row in rows][-7:] == [*["AvgPool3d"] * 2, "pools", "RoIAlign", "MaxPool2d", "head", "Sigmoid"]
    assert {row.reason for row in rows if row.backend == "torch"} == {OF_HEAD}
    model.detection_head.proj = torch.nn.Sequential(model.detection_head.proj, torch.nn.Identity())
    why = reasons(WithBoxes(slowfast_fast.freeze(model), found), x)
    assert [path.rpartition(".")[2] for path in why][-5:] == ["roi_layer", "pool_spatial", "0", "1", "activation"]
    reason = "the head's projection is Sequential, not a plain Linear"
    assert all(given.startswith(reason) for given in list(why.values())[-5:])


def heads() -> dict[str, dict[str, Any]]:
    return {
        "as on AVA": {},
        "average": {"head_output_with_global_average": True, "head_activation": None},
        "softmax": {"head_activation": torch.nn.Softmax, "head_spatial_resolution": (3, 5), "head_sampling_ratio": 2},
        "adaptive": {"head_pool": torch.nn.AdaptiveAvgPool3d, "head_spatial_resolution": (1, 1)},
    }


@pytest.mark.parametrize("head", heads())
def test_frozen_heads(poisoned: None, head: str) -> None:
    """Each part of the head in more than one form, without a cat; for boxes in another dtype and by name."""
    model = narrow(**heads()[head]).double().eval()
    enliven(model)
    x, found = clips(2, 2, 64), boxes(6, 2, 64.0)
    frozen = slowfast_fast.freeze(model)
    with torch.no_grad():
        expected = model(x, found)
        assert distance(frozen(x, bboxes=found), expected) < 1e-13
        assert "aten::cat" not in ran(frozen, x, found)
        single = slowfast_fast.freeze(model, dtype=torch.float32)([clip.float() for clip in x], found)
        assert single.dtype == torch.float32
        assert distance(single.double(), expected) < 1e-5
    for dtype in (torch.float16, torch.bfloat16):
        rounded = [clip.to(dtype) for clip in x]
        got = slowfast_fast.freeze(model, dtype=dtype)(rounded, found)
        with torch.no_grad():
            exact = model([clip.double() for clip in rounded], found)
        assert got.dtype == dtype
        assert distance(got.double(), exact) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("piece", ["proj", "pool_spatial", "roi_layer", "pool", "hook"])
def test_replaced_parts_of_the_head(piece: str) -> None:
    model = narrow().double().eval()
    enliven(model)
    head, seen = model.detection_head, []
    match piece:
        case "proj":
            head.proj = torch.nn.Sequential(head.proj, torch.nn.ReLU(), torch.nn.Linear(6, 2)).double()
        case "pool_spatial":
            head.pool_spatial, head.output_pool = None, torch.nn.AdaptiveAvgPool3d(1)
        case "roi_layer":
            head.roi_layer, head.output_pool = None, torch.nn.AdaptiveAvgPool3d(1)
        case "pool":
            head.pool, model.model.blocks[-1].pool = torch.nn.AdaptiveAvgPool3d((1, None, None)), None
            model.model.blocks[0].multipathway_blocks[1].conv.stride = (4, 2, 2)  # as many frames in both
            for block in model.model.blocks[:-1]:
                fusion = block.multipathway_fusion
                if not isinstance(fusion, torch.nn.Identity):
                    fusion.conv_fast_to_slow.stride = (1, 1, 1)
        case "hook":
            head.pool_spatial.register_forward_hook(lambda *_: seen.append(1))
    x, found = clips(2, 2, 64), boxes(6, 2, 64.0)
    with torch.no_grad():
        expected = model(x, found)
        seen.clear()
        frozen = slowfast_fast.freeze(model)
        assert distance(frozen(x, found), expected) < 1e-13
        assert "aten::cat" not in ran(frozen, x, found)
    assert len(seen) == (2 + 1 if piece == "hook" else 0)


@pytest.mark.no_sanitizer
def test_a_frozen_detector_in_a_graph() -> None:
    model = narrow().float().eval()
    enliven(model)
    x, found = [clip.float() for clip in clips(2, 2, 64)], boxes(4, 2, 64.0).float()
    frozen = slowfast_fast.freeze(model)
    with torch.no_grad():
        expected = model(x, found)
    program = torch.export.export(
        frozen, (x, found), dynamic_shapes=([None, None], {0: torch.export.Dim("boxes", min=2)})
    )
    assert not any("aten.cat" in str(node.target) for node in program.graph.nodes)
    assert distance(program.module()(x, found), expected) < 1e-5
    more = boxes(7, 2, 64.0).float()
    assert distance(program.module()(x, more), frozen(x, more)) < 1e-5


def test_what_a_frozen_detector_refuses() -> None:
    frozen, x = slowfast_fast.freeze(narrow().float()), [clip.float() for clip in clips(2, 2, 64)]
    with pytest.raises(TypeError, match="frozen from one that takes bboxes beside the clips"):
        frozen(x)
    with pytest.raises(TypeError, match="frozen from one that takes no bboxes beside the clips"):
        slowfast_fast.freeze(narrow().model)(x, boxes(2, 2, 64.0))
    with pytest.raises(ValueError, match=r"boxes must be \(B, 5\) of \(clip, x1, y1, x2, y2\)"):
        frozen(x, torch.zeros(3, 4))
    with pytest.raises(ValueError, match="sampled from one frame of features, but T is 2"):
        frozen([clip.repeat(1, 1, 2, 1, 1)[:, :, : clip.shape[2] + 1] for clip in x], boxes(2, 2, 64.0))


def test_a_detector_learns() -> None:
    """Which of two boxes holds the bright half of a clip."""
    model = small(NAMES[0], model_num_class=1).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x = [0.1 * torch.randn(4, 3, t, 32, 64) for t in (2, 8)]
    for clip in x:
        clip[..., :32] += 1
    found = torch.tensor([[n, left, 0.0, left + 32.0, 32.0] for n in range(4) for left in (0.0, 32.0)])
    labels = torch.tensor([[1.0], [0.0]] * 4)
    for _ in range(12):
        loss = F.binary_cross_entropy(model(x, found), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2
