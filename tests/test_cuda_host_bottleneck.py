"""The bottleneck kernels (csrc/cuda/bottleneck*.cuh), on the host as in test_cuda_host.py."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda_host.build import Harness
from cuda_host.cases import far_apart, pitched, to_tf32
from cuda_host.schedules import assert_all_needed, assert_same_under_all
from op_testing import FEWEST_VALUES, Call, Judgement, dtypes, lay_out
from test_bottleneck import ODD, Shape, integer_call, random_call
from torch import Tensor

from slowfast_fast.ops.bottleneck import PARAMETERS

HALVES = (torch.float16, torch.bfloat16)
fast_dtypes = pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=lambda d: str(d).removeprefix("torch."))

# The fast pathway's blocks as they are but for few positions, whose numbers no warp's rows divide; then other kernel
# lengths, dilation, channels of x that fill no step of the depth, and clips shorter than the kernel.
BLOCKS = {
    "res2_first": Shape(n=1, c=8, j=8, k=32, t=4, h=7, w=9),
    "res2": Shape(n=2, c=32, j=8, k=32, t=3, h=5, w=7, shortcut=False),
    "res3_first": Shape(n=1, c=32, j=16, k=64, stride=2, h=7, w=6),
    "res3": Shape(n=1, c=64, j=16, k=64, h=5, w=3, shortcut=False),
    "res4_first": Shape(n=1, c=64, j=32, k=128, t=2, stride=2, h=3, w=5),
    "res4": Shape(n=1, c=128, j=32, k=128, t=2, h=3, w=3, shortcut=False),
    "res5_first": Shape(n=1, c=128, j=64, k=256, t=1, stride=2, h=3, w=4),
    "res5": Shape(n=1, c=256, j=64, k=256, t=2, h=2, w=1, shortcut=False),
    "kt1_dilation2": Shape(n=2, c=24, j=8, k=32, kt=1, dilation=2, h=6, w=5),
    "kt5_t2": Shape(n=1, c=40, j=16, k=96, kt=5, t=2, stride=2, dilation=2, h=9, w=4),
}
FEW = {name: BLOCKS[name] for name in ("res2", "res3_first")}
blocks = pytest.mark.parametrize("shape", BLOCKS.values(), ids=BLOCKS)
few_blocks = pytest.mark.parametrize("shape", FEW.values(), ids=FEW)


@pytest.fixture(autouse=True)
def few_items(host: Harness) -> None:
    """Each block of threads takes long here."""
    host.force_items(4)


def on_host(host: Harness, call: Call, tf32: bool = True, out: Tensor | None = None) -> Tensor:
    def function(x: Tensor, padding_a: int, stride: int, dilation: int, **others: Tensor) -> Tensor:
        arguments = (x, *(others.get(name) for name in PARAMETERS), padding_a, stride, dilation, tf32)
        y = host.bottleneck(*arguments) if out is None else host.bottleneck_out(out, *arguments)
        return out if y is None else y

    return call.run(function)["output"]


def run(
    host: Harness, call: Call, kernel: str = "bottleneck_kernel", tf32: bool = True, out: Tensor | None = None
) -> Tensor:
    """On the kernel that is expected."""
    results: list[Tensor] = []
    launched = host.kernels(lambda: results.append(on_host(host, call, tf32, out)))
    assert launched & {"bottleneck_kernel", "bottleneck_general_kernel"} == {kernel}
    return results[0]


def in_tf32(
    x: Tensor,
    weight_a: Tensor,
    weight_b: Tensor,
    weight_c: Tensor,
    padding_a: int,
    stride: int,
    dilation: int,
    **s: Any,
) -> Tensor:
    """The layers in float32 with the factors of each product rounded to TF32, as PyTorch computes them on a GPU."""

    def conv(x: Tensor, weight: Tensor, shift: Tensor, *geometry: Any) -> Tensor:
        return F.conv3d(to_tf32(x), to_tf32(weight), shift, *geometry)

    a = conv(x, weight_a, s["shift_a"], 1, (padding_a, 0, 0)).relu()
    step, around = (1, stride, stride), (0, dilation, dilation)
    y = conv(conv(a, weight_b, s["shift_b"], step, around, (1, dilation, dilation)).relu(), weight_c, s["shift_c"])
    residual = conv(x, s["shortcut_weight"], s["shortcut_shift"], step) if "shortcut_weight" in s else x
    return (y + residual).relu()


def assert_as_exact_as_pytorch(
    host: Harness, shape: Shape, dtype: torch.dtype, kernel: str = "bottleneck_kernel", tf32: bool = True
) -> None:
    judgement = Judgement()
    while judgement.values < FEWEST_VALUES:
        call = random_call(shape, dtype).to(layout="channels_last")
        own = call.run(in_tf32)["output"] if tf32 and dtype == torch.float32 else call.run_stock()["output"]
        y = run(host, call, kernel, tf32)
        assert y.shape == shape.out
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
        judgement.add(y, own, call.run_exact()["output"])
    assert judgement.ours <= judgement.allowed, str(judgement)


@pytest.mark.parametrize("items", [1, 9], ids=["full", "cut"])
@fast_dtypes
@blocks
def test_as_exact_as_pytorch(host: Harness, shape: Shape, dtype: torch.dtype, items: int) -> None:
    host.force_items(items)
    assert_as_exact_as_pytorch(host, shape, dtype)


@fast_dtypes
@blocks
def test_integers_are_exact(host: Harness, shape: Shape, dtype: torch.dtype) -> None:
    call = integer_call(shape, dtype).to(layout="channels_last")
    assert torch.equal(run(host, call), call.run_exact()["output"].to(dtype))


@pytest.mark.parametrize("items", [1, 20, None])
def test_any_bands_give_the_same_bits(host: Harness, items: int | None) -> None:
    """Also more rows than a block's warps take at once."""
    call = random_call(Shape(n=1, c=16, j=8, k=32, t=5, h=13, w=17), torch.bfloat16).to(layout="channels_last")
    host.force_items(4)
    expected = run(host, call)
    host.force_items(items)
    assert torch.equal(run(host, call), expected)


def test_tf32_rounds_its_operands(host: Harness) -> None:
    call = random_call(FEW["res3_first"], torch.float32).to(layout="channels_last")
    rounded = {name: to_tf32(t) if t.dim() == 5 else t for name, t in call.tensors.items()}
    rounded["x"] = rounded["x"].contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(run(host, call), run(host, replace(call, tensors=rounded)))


@pytest.mark.parametrize("layout", ["pitched", "time_slice", "batch_slice", "width_slice"])
@few_blocks
def test_reads_slices_in_place(host: Harness, shape: Shape, layout: str) -> None:
    call = random_call(shape, torch.float16).to(layout="channels_last")
    x = call.tensors["x"]
    sliced = replace(call, tensors=call.tensors | {"x": pitched(x) if layout == "pitched" else lay_out(x, layout)})
    assert torch.equal(run(host, sliced), run(host, call))


@few_blocks
def test_writes_a_channel_slice(host: Harness, shape: Shape) -> None:
    call = random_call(shape, torch.float16).to(layout="channels_last")
    n, k, *frame = shape.out
    wide = torch.full((n, k + 16, *frame), torch.nan, dtype=torch.float16).contiguous(
        memory_format=torch.channels_last_3d
    )
    expected = run(host, call)
    assert torch.equal(run(host, call, out=wide[:, 8 : 8 + k]), expected)
    assert wide[:, :8].isnan().all()
    assert wide[:, 8 + k :].isnan().all()
    assert torch.equal(run(host, call, "bottleneck_general_kernel", out=wide[:, 3 : 3 + k]).isnan(), expected.isnan())


def test_offsets_beyond_32_bits(host: Harness) -> None:
    for shape, kernel in ((FEW["res2"], "bottleneck_kernel"), (Shape(c=7), "bottleneck_general_kernel")):
        call = random_call(shape, torch.float16).to(layout="channels_last")
        far = replace(call, tensors=call.tensors | {"x": far_apart(call.tensors["x"])})
        assert torch.equal(run(host, far, kernel), run(host, call, kernel))


@few_blocks
def test_without_rows(host: Harness, shape: Shape) -> None:
    call = random_call(shape, torch.float16).to(layout="channels_last")
    call.tensors["x"] = call.tensors["x"][:0]
    names = ["x", *PARAMETERS]
    y = host.bottleneck(*(call.tensors.get(name) for name in names), *shape.options.values(), True)
    assert y.shape == replace(shape, n=0).out


GENERAL = ODD | {
    "real": Shape(n=1, c=32, j=8, k=32, h=6, w=5, shortcut=False),
    "kt5_dilation2": Shape(kt=5, t=2, stride=2, dilation=2, h=7),
    "kt1_identity": Shape(kt=1, shortcut=False, j=64),
}


@dtypes
@pytest.mark.parametrize("shape", GENERAL.values(), ids=GENERAL)
def test_general_kernel_is_as_exact_as_pytorch(host: Harness, shape: Shape, dtype: torch.dtype) -> None:
    """What tensor cores do not take: any channels, float32 without TF32, float64."""
    if dtype in HALVES and shape == GENERAL["real"]:
        shape = replace(shape, k=40, c=40)
    assert_as_exact_as_pytorch(host, shape, dtype, "bottleneck_general_kernel", tf32=False)


@pytest.mark.parametrize(
    ("c", "j", "k", "dtype", "options", "said"),
    [
        (32, 8, 32, torch.float16, {}, ""),
        (256, 64, 256, torch.float32, {}, ""),
        (8, 8, 32, torch.float32, {"tf32": False}, "tensor cores are not as exact"),
        (8, 8, 32, torch.float64, {}, "tensor cores are not as exact"),
        (8, 24, 96, torch.float16, {}, "only for 8, 16, 32 and 64"),
        (8, 8, 40, torch.float16, {}, "the output channels are no multiple of 32"),
        (8, 8, 4128, torch.float16, {}, "more than 4096 output channels"),
        (12, 8, 32, torch.float16, {}, "the channels are no multiple of 16 bytes"),
        (8, 8, 32, torch.float16, {"aligned": False}, "rows do not start at multiples of 16 bytes"),
    ],
)
def test_explains(host: Harness, c: int, j: int, k: int, dtype: torch.dtype, options: Any, said: str) -> None:
    reason = host.explain_bottleneck(c, j, k, dtype, **options)
    assert said in reason
    assert bool(said) == bool(reason)


def calls() -> list[Call]:
    chosen = (
        (FEW["res2"], torch.float16),
        (replace(FEW["res3_first"], n=2), torch.float32),
        (Shape(t=2), torch.float64),  # on the general kernel
    )
    return [random_call(shape, dtype).to(layout="channels_last") for shape, dtype in chosen]


def under_schedule(host: Harness, made: list[Call], schedule: str) -> list[Tensor]:
    host.set_schedule(schedule)
    return [on_host(host, call) for call in made]


def test_results_do_not_depend_on_the_schedule(host: Harness) -> None:
    assert_same_under_all(partial(under_schedule, host, calls()))


def test_a_missing_barrier_is_noticed(host: Harness) -> None:
    made, expected = calls(), []
    sites = host.barriers(lambda: expected.extend(under_schedule(host, made, "random")))
    sites = {site for site in sites if site.startswith("bottleneck")}
    assert len(sites) == 3
    assert_all_needed(host, sites, partial(under_schedule, host, made), expected)
