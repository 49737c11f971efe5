"""pack_pathways: the libraries' own chains of operators, from any layout, in every build of its kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cuda_host.build import Harness
from op_testing import Judgement, assert_dense, dtypes
from torch import Tensor

import slowfast_fast
from slowfast_fast import explain, ops, pathway_frames, reference

COLOURS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# (N, T, H, W), alpha
CASES = (
    ((2, 8, 5, 7), 4),
    ((1, 9, 4, 16), 2),  # rows of 48 bytes: packs of every width
    ((2, 4, 3, 8), 1),
    ((1, 3, 6, 11), 3),
    ((0, 8, 4, 4), 4),
)
cases = pytest.mark.parametrize("case", CASES, ids=str)


def decoded(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8)


def lay_out(frames: Tensor, layout: str) -> Tensor:
    """The same frames elsewhere in memory; every byte that does not belong to them is another one."""
    n, t, h, w, _ = frames.shape
    wide = torch.randint(0, 256, (2 * n + 1, 2 * t + 1, h + 2, w + 5, 3), dtype=torch.uint8)
    match layout:
        case "dense":
            return frames.contiguous()
        case "batch":
            return wide[1::2, :t, :h, :w].copy_(frames)
        case "time":
            return wide[:n, 1::2, :h, :w].copy_(frames)
        case "padded":  # rows that start at multiples of 16 bytes
            return torch.full((n, t, h, 16 * (w // 16 + 1), 3), 77, dtype=torch.uint8)[:, :, :, :w].copy_(frames)
        case "crop":
            return wide[:n, :t, 1 : 1 + h, 3 : 3 + w].copy_(frames)
    return frames.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1)


ROWS = ("dense", "batch", "time", "padded", "crop")
LAYOUTS = (*ROWS, "channels_first")


def assert_packed(packed: list[Tensor], frames: Tensor, alpha: int, dtype: torch.dtype) -> None:
    """Against PyTorch's operators in float64; and the slow pathway's frames are the fast one's, bit for bit."""
    slow_frames = list(pathway_frames(frames.shape[1], alpha=alpha)[0])
    options = {"slow_frames": slow_frames, **COLOURS}
    slow, fast = packed
    assert (slow.dtype, fast.dtype) == (dtype, dtype)
    assert_dense(slow)
    assert_dense(fast)
    assert torch.equal(slow, fast[:, :, slow_frames])
    exact, stock = (reference.pack_pathways(frames, dtype=d, **options)[1] for d in (torch.float64, dtype))
    assert fast.shape == exact.shape
    if frames.numel():
        judgement = Judgement()
        judgement.add(fast, stock, exact)
        assert judgement.ours <= judgement.allowed, judgement


@dtypes
@cases
@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_pytorch(poisoned: None, case: tuple, dtype: torch.dtype, layout: str) -> None:
    shape, alpha = case
    frames = lay_out(decoded(shape), layout)
    assert_packed(ops.pack_pathways(frames, alpha=alpha, dtype=dtype, **COLOURS), frames, alpha, dtype)


@dtypes
@cases
def test_cuda_kernels_on_the_host(host: Harness, case: tuple, dtype: torch.dtype) -> None:
    shape, alpha = case
    slow_frames = pathway_frames(shape[1], alpha=alpha)[0]
    scale = [1 / (255 * s) for s in COLOURS["std"]]
    shift = [-m / s for m, s in zip(*COLOURS.values(), strict=True)]
    for layout in ROWS:
        frames = lay_out(decoded(shape), layout)
        packed = host.pack_pathways(frames, slow_frames, scale, shift, dtype)
        assert_packed(list(packed), frames, alpha, dtype)


def test_clips_longer_than_one_launch(host: Harness) -> None:
    """The CUDA kernel learns of 256 frames at a time; here a slow frame is on either side, and one comes twice."""
    frames, slow_frames = decoded((1, 300, 1, 3)), [0, 255, 256, 256, 299]
    slow, fast = host.pack_pathways(frames, slow_frames, [1.0] * 3, [0.0] * 3, torch.float32)
    assert torch.equal(fast, frames.permute(0, 4, 1, 2, 3).float())
    assert torch.equal(slow, fast[:, :, slow_frames])
    for ours, theirs in zip(
        torch.ops.slowfast_fast.pack_pathways(frames, slow_frames, [1.0] * 3, [0.0] * 3, torch.float32),
        (slow, fast),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
@dtypes
@cases
def test_on_a_gpu(case: tuple, dtype: torch.dtype) -> None:
    shape, alpha = case
    if dtype == torch.float64:
        pytest.skip("the cuda backend has no float64")
    frames = decoded(shape)
    for layout in LAYOUTS:
        packed = ops.pack_pathways(lay_out(frames.cuda(), layout), alpha=alpha, dtype=dtype, **COLOURS)
        assert_packed([clip.cpu() for clip in packed], frames, alpha, dtype)


def test_every_byte_in_every_colour(poisoned: None) -> None:
    """All 256 values, exactly: with a standard deviation of 1 / 255 the result is byte - 255 * mean."""
    frames = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16, 1).expand(-1, -1, -1, -1, 3)
    for dtype in (torch.float32, torch.float16):
        fast = ops.pack_pathways(frames, alpha=1, mean=(0, 1 / 255, 1), std=1 / 255, dtype=dtype)[1]
        expected = torch.arange(256.0).view(16, 16) - torch.tensor([0.0, 1, 255]).view(3, 1, 1)
        torch.testing.assert_close(fast[0, :, 0].float(), expected, rtol=0, atol=1e-3)


def test_what_is_copied() -> None:
    class Pack(torch.nn.Module):
        explains_itself = True

        def forward(self, frames: Tensor) -> Tensor:
            return ops.pack_pathways(frames, alpha=2)[0]

    for layout in LAYOUTS:
        (row,) = explain(Pack(), lay_out(decoded((1, 4, 3, 7)), layout), show=False).rows
        assert row.what == "pack_pathways"
        assert row.backend == "cpu"
        assert ("copied frames" in row.reason) == (layout == "channels_first"), (layout, row.reason)


def test_dtype_follows_autocast() -> None:
    frames = decoded((1, 2, 2, 2))
    assert ops.pack_pathways(frames, alpha=2)[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.pack_pathways(frames, alpha=2)[0].dtype == torch.bfloat16
        assert ops.pack_pathways(frames, alpha=2, dtype=torch.float16)[0].dtype == torch.float16


def test_same_for_any_number_of_threads() -> None:
    frames = decoded((2, 5, 33, 17))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(ops.pack_pathways(frames, alpha=2, **COLOURS))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_one_pathway(host: Harness, poisoned: None) -> None:
    """Without an alpha there is one clip, the fast pathway's, and no slow one is written."""
    frames = decoded((2, 5, 6, 7))
    fast = ops.pack_pathways(frames, alpha=2, **COLOURS)[1]
    for backend in ("cpu", "reference"):
        with slowfast_fast.backend(backend):
            (clip,) = ops.pack_pathways(frames, alpha=None, **COLOURS)
        assert_dense(clip)
        torch.testing.assert_close(clip, fast)
    scale, shift = [0.5, 1.0, 2.0], [0.0, 1.0, -1.0]
    slow, clip = host.pack_pathways(frames, [], scale, shift, torch.float32)
    assert slow.shape == (2, 3, 0, 6, 7)
    (_, expected) = torch.ops.slowfast_fast.pack_pathways(frames, [], scale, shift, torch.float32)
    assert torch.equal(clip, expected)
    with pytest.raises(ValueError, match="rule must be one of"):
        ops.pack_pathways(frames, alpha=None, rule="c3d")


def test_reference_backend() -> None:
    frames = decoded((1, 6, 3, 4))
    with slowfast_fast.backend("reference"):
        packed = ops.pack_pathways(frames, alpha=3, dtype=torch.bfloat16, **COLOURS)
    assert_packed(packed, frames, 3, torch.bfloat16)


@pytest.mark.parametrize(
    ("frames", "options", "error", "message"),
    [
        (torch.rand(1, 4, 2, 2, 3), {}, TypeError, "frames must be uint8, as decoded; got torch.float32"),
        (decoded((1, 4, 2, 2))[0], {}, ValueError, r"frames must be \(N, T, H, W, 3\); got shape \(4, 2, 2, 3\)"),
        (decoded((1, 4, 0, 2)), {}, ValueError, "frames may be empty in N only"),
        (decoded((1, 4, 2, 2)), {"dtype": torch.int8}, TypeError, "dtype must be float32, .*; got torch.int8"),
        (
            decoded((1, 4, 2, 2)),
            {"mean": (0.5, 0.5)},
            ValueError,
            "mean must be a number, or one for each of 3 colours",
        ),
        (decoded((1, 4, 2, 2)), {"std": 0}, ValueError, "std must be positive; got 0"),
        (decoded((1, 4, 2, 2)), {"alpha": 8}, ValueError, "the clip is too short: 4 frames .* tau = 8"),
        (decoded((1, 4, 2, 2)), {"alpha": 2.0}, TypeError, "alpha must be an int; got float 2.0"),
        (decoded((1, 4, 2, 2)), {"rule": "c3d"}, ValueError, "rule must be one of pytorchvideo, .*; got 'c3d'"),
    ],
)
def test_wrong_arguments(frames: Tensor, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.pack_pathways(frames, **{"alpha": 2, **options})


def test_direct_calls_are_checked(host: Harness) -> None:
    for op in (torch.ops.slowfast_fast.pack_pathways, host.pack_pathways):
        frames, three = decoded((1, 4, 2, 5)), [1.0] * 3
        for given, message in (
            ((frames, [3, 1], three, three), "slow_frames must be in ascending order"),
            ((frames, [4], three, three), "among the 4 frames, got 4"),
            ((frames, [0], three[:2], three), "a value for each colour"),
            ((frames.transpose(2, 3), [0], three, three), "3 \\* W adjacent bytes"),
            ((frames.float(), [0], three, three), "frames must be uint8"),
        ):
            with pytest.raises(RuntimeError, match=message):
                op(*given, torch.float32)


@pytest.mark.no_sanitizer
def test_compile_and_export() -> None:
    frames = decoded((1, 8, 4, 6))
    expected = ops.pack_pathways(frames, alpha=4)

    class Pack(torch.nn.Module):
        def forward(self, frames: Tensor) -> list[Tensor]:
            return ops.pack_pathways(frames, alpha=4)

    run: Callable
    for run in (
        torch.compile(Pack(), backend="aot_eager", fullgraph=True),
        torch.export.export(Pack(), (frames,)).module(),
    ):
        assert all(torch.equal(a, b) for a, b in zip(run(frames), expected, strict=True))


def test_opcheck() -> None:
    arguments = (decoded((2, 4, 3, 5)), [0, 2, 2], [0.01] * 3, [-2.0] * 3, torch.bfloat16)
    torch.library.opcheck(torch.ops.slowfast_fast.pack_pathways.default, arguments)


@pytest.mark.parametrize(("alpha", "frames"), [(a, t) for a in (1, 3, 4, 8) for t in (8, 9, 31, 32, 64, 71, 128)])
def test_rules_are_the_libraries(alpha: int, frames: int) -> None:
    clip = torch.arange(frames)
    # pytorchvideo.transforms and the docs' PackPathway; PySlowFast's pack_pathway_output.
    evenly = torch.index_select(clip, 0, torch.linspace(0, frames - 1, frames // alpha).long())
    for rule in ("pytorchvideo", "pyslowfast"):
        slow, fast = pathway_frames(frames, alpha=alpha, rule=rule)
        assert (list(slow), list(fast)) == (evenly.tolist(), clip.tolist())
    for step in (1, 2):
        tau = step * alpha
        if frames < tau:
            continue
        images = clip.double().view(1, 1, -1, 1, 1)
        nearest = [
            F.interpolate(images, mode="nearest", scale_factor=(1.0 / n, 1.0, 1.0)).flatten() for n in (tau, step)
        ]
        slow, fast = pathway_frames(frames, alpha=alpha, tau=tau, rule="mmaction2")
        assert (list(slow), list(fast)) == tuple(indices.long().tolist() for indices in nearest)
        for rule in ("gluoncv", "r1c7"):
            slow, fast = pathway_frames(frames, alpha=alpha, tau=tau, rule=rule)
            assert (list(slow), list(fast)) == (clip[::tau].tolist(), clip[::step].tolist())


def test_uniform_subsampling_of_a_longer_clip() -> None:
    """pytorchvideo with tau 16, alpha 8: UniformTemporalSubsample(64 // 2), then PackPathway."""
    slow, fast = pathway_frames(64, alpha=8, tau=16)
    assert list(fast) == torch.linspace(0, 63, 32).long().tolist()
    assert list(slow) == [fast[i] for i in torch.linspace(0, 31, 4).long()]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": 0}, ValueError, "alpha must be at least 1; got 0"),
        ({"alpha": 4, "tau": 6}, ValueError, "tau must be a multiple of alpha = 4; got 6"),
        ({"alpha": 4, "tau": True}, TypeError, "tau must be an int; got bool True"),
    ],
)
def test_wrong_rules(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pathway_frames(32, **options)
