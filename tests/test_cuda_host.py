"""The kernels of csrc/cuda, run by the host compiler (tests/cuda_host), against float64; and what nvcc says of them.

This shows that the kernels compute the right thing and keep to their barriers and buffers. It shows nothing about a
GPU: neither its compiler's code generation nor its speed.
"""

import dataclasses
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cuda_host.build import ROOT, SCHEDULES, Harness, compiler

SANITIZED = os.environ.get("CUDA_HOST_SANITIZED") == "1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture(scope="session")
def session_harness() -> Harness:
    return Harness(SANITIZED)


@pytest.fixture
def host(session_harness: Harness) -> Iterator[Harness]:
    """The ops under the random schedule; torch.empty is filled with NaN as long as the test runs."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    session_harness.set_schedule("random")
    yield session_harness
    session_harness.skip_barrier("")
    torch.use_deterministic_algorithms(deterministic)


@dataclasses.dataclass(frozen=True)
class Case:
    n: int
    c: int
    k: int
    t: int
    h: int
    w: int
    kt: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    @property
    def window(self) -> tuple[int, int, int]:
        return self.stride, self.padding, self.dilation

    @property
    def t_out(self) -> int:
        return (self.t + 2 * self.padding - self.dilation * (self.kt - 1) - 1) // self.stride + 1

    def __str__(self) -> str:
        return "-".join(map(str, dataclasses.astuple(self)))


CASES = (
    Case(2, 8, 8, 4, 5, 7, 3, padding=1),  # a bottleneck of the fast pathway
    Case(1, 129, 70, 3, 3, 3, 3, padding=1),  # several tiles of both operands
    Case(1, 16, 32, 1, 7, 3, 5, padding=2),  # a clip shorter than the kernel
    Case(1, 8, 16, 17, 3, 3, 7, stride=8, padding=3),  # a lateral connection
    Case(2, 3, 17, 9, 1, 3, 5, stride=2, padding=4, dilation=3),
    Case(1, 5, 9, 2, 3, 31, 1, padding=1),  # frames that see nothing but padding
)
# A norm over very few values says more of their luck than of the arithmetic; these are for the exact test.
TINY_CASES = (Case(3, 1, 1, 1, 1, 1, 1), Case(1, 2, 1, 5, 1, 2, 3, dilation=2), Case(1, 1, 3, 3, 2, 1, 1, stride=2))


def conv(x: torch.Tensor, weight: torch.Tensor, case: Case) -> torch.Tensor:
    stride, padding, dilation = ((value, one, one) for value, one in zip(case.window, (1, 0, 1), strict=True))
    return F.conv3d(x, weight, None, stride, padding, dilation)


def channel(vector: torch.Tensor) -> torch.Tensor:
    return vector.view(1, -1, 1, 1, 1)


def rows(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last_3d)


@dataclasses.dataclass
class Inputs:
    """Random arguments of an op; v1 and v2 are scale and shift, or gamma and beta. Absent ones are None."""

    x: torch.Tensor
    weight: torch.Tensor
    v1: torch.Tensor | None
    v2: torch.Tensor | None
    residual: torch.Tensor | None
    grad: torch.Tensor
    relu: bool

    def leaves(self, dtype: torch.dtype) -> list[torch.Tensor | None]:
        given = (self.x, self.weight, self.v1, self.v2, self.residual)
        return [None if t is None else t.detach().clone().to(dtype).requires_grad_() for t in given]


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def random_inputs(case: Case, dtype: torch.dtype, full: bool, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    out = (case.n, case.k, case.t_out, case.h, case.w)
    vector = accumulation(dtype)
    return Inputs(
        x=rows(draw(case.n, case.c, case.t, case.h, case.w) + 0.5),
        weight=draw(case.k, case.c, case.kt, 1, 1) / (case.c * case.kt) ** 0.5,
        v1=draw(case.k).to(vector) + 1 if full else None,
        v2=draw(case.k).to(vector) if full else None,
        residual=rows(draw(*out)) if full else None,
        grad=rows(draw(*out)),
        relu=full,
    )


def stock(inputs: Inputs, case: Case, dtype: torch.dtype, bn: bool, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """The op as PyTorch computes it in `dtype`, with all gradients. The ReLU passes what it passed in `y`: whether a
    value next to 0 is cut off is a matter of rounding, and not what is compared."""
    x, weight, v1, v2, residual = leaves = inputs.leaves(dtype)
    out = conv(x, weight, case)
    if bn:
        out = F.batch_norm(out, None, None, v1, v2, training=True)
    elif v1 is not None:
        out = out * channel(v1) + channel(v2)
    if residual is not None:
        out = out + residual
    if inputs.relu:
        out = out * (y > 0)
    out.backward(inputs.grad.to(dtype))
    names = ("dx", "dweight", "dv1", "dv2", "dresidual")
    return {"y": out.detach()} | {name: t.grad for name, t in zip(names, leaves, strict=True) if t is not None}


def run_op(host: Harness, inputs: Inputs, case: Case, bn: bool) -> dict[str, torch.Tensor]:
    """The op and its backward; of the forward's results also what it saves."""
    i = inputs
    needs = (True, True, i.v1 is not None, i.v2 is not None, i.residual is not None)
    saved = {}
    if bn:
        y, *statistics = host.temporal_conv_bn(i.x, i.weight, i.v1, i.v2, i.residual, *case.window, 1e-5, i.relu)
        saved = dict(zip(("raw", "mean", "invstd", "unbiased_var"), statistics, strict=True))
        grads = host.temporal_conv_bn_backward(
            i.grad, i.x, i.weight, i.v1, i.v2, i.residual, *statistics[:3], *case.window, i.relu, *needs
        )
    else:
        y = host.temporal_conv(i.x, i.weight, i.v1, i.v2, i.residual, *case.window, i.relu)
        mask = y if i.relu else None
        grads = host.temporal_conv_backward(i.grad, i.x, i.weight, i.v1, mask, *case.window, *needs)
    names = ("dx", "dweight", "dv1", "dv2", "dresidual")
    for name, grad, need in zip(names, grads, needs, strict=True):
        assert need or grad.shape == (0,), f"{name} was not asked for"
    return {"y": y, **saved} | {name: grad for name, grad, need in zip(names, grads, needs, strict=True) if need}


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def assert_as_good_as_stock(
    value: torch.Tensor, own: torch.Tensor, exact: torch.Tensor, name: str, dtype: torch.dtype
) -> None:
    assert value.shape == exact.shape, name
    # float64 has no better judge here: two float64 computations differ by some hundred units in the last place at most.
    limit = 1e-13 if dtype == torch.float64 else 2 * error(own, exact)
    assert error(value, exact) <= limit, f"{name}: error {error(value, exact):.3g}, allowed {limit:.3g}"


@pytest.mark.parametrize("full", [False, True], ids=["bare", "full"])
@pytest.mark.parametrize("bn", [False, True], ids=["affine", "bn"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_pytorch(host: Harness, case: Case, dtype: torch.dtype, bn: bool, full: bool) -> None:
    inputs = random_inputs(case, dtype, full, seed=hash((case, bn)) % 2**31)
    got = run_op(host, inputs, case, bn)
    exact = stock(inputs, case, torch.float64, bn, got["y"])
    own = stock(inputs, case, dtype, bn, got["y"])
    for name in own:
        assert_as_good_as_stock(got[name], own[name], exact[name], name, dtype)
    assert got["y"].is_contiguous(memory_format=torch.channels_last_3d)
    assert got["dx"].is_contiguous(memory_format=torch.channels_last_3d)
    if full:
        assert (got["y"] >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[:2] + TINY_CASES, ids=str)
def test_small_integers_are_exact(host: Harness, case: Case, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(hash(case) % 2**31)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=generator).to(dtype)

    out = (case.n, case.k, case.t_out, case.h, case.w)
    inputs = Inputs(
        x=rows(draw(case.n, case.c, case.t, case.h, case.w)),
        weight=draw(case.k, case.c, case.kt, 1, 1),
        v1=draw(case.k).to(accumulation(dtype)),
        v2=draw(case.k).to(accumulation(dtype)),
        residual=rows(draw(*out)),
        grad=rows(draw(*out)),
        relu=True,
    )
    got = run_op(host, inputs, case, bn=False)
    exact = stock(inputs, case, torch.float64, False, got["y"])
    for name, value in exact.items():
        assert torch.equal(got[name], value.to(got[name].dtype)), name


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype).contiguous(memory_format=torch.channels_last_3d)


def slice_of_wider(t: torch.Tensor, slices: str) -> torch.Tensor:
    """t's values in a slice, in channels, time or batch, of a larger tensor of NaN."""
    n, c, frames, h, w = t.shape
    where = {
        "channels": (poisoned((n, c + 5, frames, h, w), t.dtype), lambda wide: wide[:, 3 : 3 + c]),
        "time": (poisoned((n, c, 2 * frames + 1, h, w), t.dtype), lambda wide: wide[:, :, 1::2]),
        "batch": (poisoned((2 * n + 1, c, frames, h, w), t.dtype), lambda wide: wide[1::2]),
    }
    wide, view = where[slices]
    view(wide).copy_(t)
    return view(wide)


@pytest.mark.parametrize("slices", ["channels", "time", "batch"])
@pytest.mark.parametrize("bn", [False, True], ids=["affine", "bn"])
def test_reads_slices_in_place(host: Harness, bn: bool, slices: str) -> None:
    case = Case(2, 3, 5, 4, 3, 2, 3, padding=1)
    inputs = random_inputs(case, torch.float32, True, seed=4)
    expected = run_op(host, inputs, case, bn)
    parts = {name: slice_of_wider(getattr(inputs, name), slices) for name in ("x", "residual", "grad")}
    got = run_op(host, dataclasses.replace(inputs, **parts), case, bn)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("bn", [False, True], ids=["affine", "bn"])
def test_each_gradient_alone_is_the_same(host: Harness, bn: bool) -> None:
    case = Case(2, 9, 5, 4, 3, 2, 3, stride=2, padding=1)
    i = random_inputs(case, torch.float32, True, seed=5)
    if bn:
        _, *saved, _ = host.temporal_conv_bn(i.x, i.weight, i.v1, i.v2, i.residual, *case.window, 1e-5, True)
        arguments = (i.grad, i.x, i.weight, i.v1, i.v2, i.residual, *saved, *case.window, True)
        backward = host.temporal_conv_bn_backward
    else:
        y = host.temporal_conv(i.x, i.weight, i.v1, i.v2, i.residual, *case.window, True)
        arguments = (i.grad, i.x, i.weight, i.v1, y, *case.window)
        backward = host.temporal_conv_backward
    together = backward(*arguments, *[True] * 5)
    for wanted in range(5):
        needs = [index == wanted for index in range(5)]
        assert torch.equal(backward(*arguments, *needs)[wanted], together[wanted]), wanted


@pytest.mark.parametrize("bn", [False, True], ids=["affine", "bn"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [1, 4])
def test_lateral_concat(host: Harness, alpha: int, dtype: torch.dtype, bn: bool) -> None:
    case = Case(2, 6, 12, 3 * alpha, 5, 3, 5, stride=alpha, padding=2)
    i = random_inputs(case, dtype, True, seed=alpha)
    i.residual = None
    slow = rows(
        torch.arange(case.n * 7 * case.t_out * case.h * case.w)
        .remainder(251)
        .view(case.n, 7, case.t_out, case.h, case.w)
        .to(dtype)
    )
    if bn:
        out, raw, mean, invstd, _ = host.lateral_concat_bn(slow, i.x, i.weight, i.v1, i.v2, alpha, 2, 1e-5, True)
    else:
        out = host.lateral_concat(slow, i.x, i.weight, i.v1, i.v2, alpha, 2, True)
    assert torch.equal(out[:, :7], slow)
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    lateral, grad = out[:, 7:], slice_of_wider(i.grad, "channels")
    if bn:
        arguments = (grad, i.x, i.weight, i.v1, i.v2, None, raw, mean, invstd, *case.window, True)
        grads = host.temporal_conv_bn_backward(*arguments, True, True, True, True, False)
    else:
        arguments = (grad, i.x, i.weight, i.v1, lateral, *case.window)
        grads = host.temporal_conv_backward(*arguments, True, True, True, True, False)
    got = dict(zip(("y", "dx", "dweight", "dv1", "dv2"), (lateral, *grads[:4]), strict=True))
    own, exact = (stock(i, case, precision, bn, lateral) for precision in (dtype, torch.float64))
    for name in own:
        assert_as_good_as_stock(got[name], own[name], exact[name], name, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_statistics(host: Harness, dtype: torch.dtype) -> None:
    """Blocks of several tiles each, and a mean that dwarfs the deviation. The judge is raw as stored, summed exactly.

    Chan, Golub and LeVeque (1983) bound the relative error of such a variance by a few eps times mean / deviation;
    E[x^2] - E[x]^2 has the square of that ratio, which float32 does not survive at 1000.
    """
    ratio = 1000
    generator = torch.Generator().manual_seed(10)
    x = rows((torch.randn(1, 2, 1, 261, 256, generator=generator) + ratio).to(dtype))
    weight = torch.eye(2).to(dtype).view(2, 2, 1, 1, 1)
    _, raw, mean, invstd, unbiased_var = host.temporal_conv_bn(x, weight, None, None, None, 1, 0, 1, 1e-5, False)
    assert torch.equal(raw, x)
    limit = 4 * torch.finfo(accumulation(dtype)).eps * ratio
    for k in range(2):
        values = x[:, k].flatten().tolist()
        exact_mean = math.fsum(values) / len(values)
        square = math.fsum((value - exact_mean) ** 2 for value in values)
        assert mean[k].item() == pytest.approx(exact_mean, abs=limit)
        assert invstd[k].item() == pytest.approx((square / len(values) + 1e-5) ** -0.5, rel=limit)
        assert unbiased_var[k].item() == pytest.approx(square / (len(values) - 1), rel=limit)


@pytest.mark.parametrize("bn", [False, True], ids=["affine", "bn"])
@pytest.mark.parametrize("shape", [(0, 3, 4, 2, 2), (2, 3, 4, 0, 2)], ids=str)
def test_without_rows(host: Harness, shape: tuple[int, ...], bn: bool) -> None:
    n, c, t, h, w = shape
    case = Case(n, c, 5, t, h, w, 3, padding=1)
    got = run_op(host, random_inputs(case, torch.float32, True, seed=0), case, bn)
    assert got["y"].shape == (n, 5, t, h, w)
    assert got["dx"].shape == shape
    assert got["dresidual"].shape == got["y"].shape
    for name in ("dweight", "dv1", "dv2", *(("mean", "unbiased_var") if bn else ())):
        assert torch.equal(got[name], torch.zeros_like(got[name])), name


def test_nan_passes_the_relu(host: Harness) -> None:
    case = Case(1, 2, 2, 3, 2, 2, 1)
    inputs = random_inputs(case, torch.float32, True, seed=6)
    inputs.x[0, 0, 1, 1, 1] = float("nan")
    y = host.temporal_conv(inputs.x, inputs.weight, None, None, None, 1, 0, 1, True)
    assert y[0, :, 1, 1, 1].isnan().all()
    assert y.isnan().sum() == 2
    needs = (False, False, False, False, True)
    grads = host.temporal_conv_backward(inputs.grad, inputs.x, inputs.weight, None, y, 1, 0, 1, *needs)
    assert torch.equal(grads[4], torch.ops.aten.threshold_backward(inputs.grad, y, 0))
    assert host.temporal_conv_bn(inputs.x, inputs.weight, None, None, None, 1, 0, 1, 1e-5, True)[0].isnan().all()


@pytest.mark.parametrize("running_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("batch_dtype", [torch.float32, torch.float64], ids=str)
def test_running_statistics(
    host: Harness, batch_dtype: torch.dtype, momentum: float | None, running_dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(9)
    mean, var = torch.rand(2, 300, dtype=batch_dtype, generator=generator)
    running_mean, running_var = torch.rand(2, 300, generator=generator).to(running_dtype)
    tracked = torch.tensor(2)
    factor = 1 / 3 if momentum is None else momentum
    exact = [(1 - factor) * a.double() + factor * b.double() for a, b in ((running_mean, mean), (running_var, var))]
    host.update_running_stats(running_mean, running_var, tracked, mean, var, momentum)
    assert tracked == 3
    for running, value in zip((running_mean, running_var), exact, strict=True):
        assert torch.equal(running, value.to(accumulation(running_dtype)).to(running_dtype))
    host.update_running_stats(None, None, tracked, mean, var, momentum)
    assert tracked == 4


def everything(host: Harness) -> list[torch.Tensor]:
    """Results of every kernel, at sizes that take each loop around a barrier at least twice."""
    case = Case(1, 9, 20, 8, 3, 3, 3, padding=1)
    results = []
    for bn in (False, True):
        results += run_op(host, random_inputs(case, torch.float32, True, seed=7), case, bn).values()
    i = random_inputs(case, torch.float32, True, seed=8)
    results.append(host.lateral_concat(i.grad, i.x, i.weight, i.v1, i.v2, 1, 1, True))
    running = torch.ones(case.k)
    host.update_running_stats(running, None, torch.tensor(0), i.v1, i.v2, None)
    return [*results, running]


def everything_under(host: Harness, schedule: str) -> list[torch.Tensor]:
    host.set_schedule(schedule)
    return everything(host)


def test_results_do_not_depend_on_the_schedule(host: Harness) -> None:
    results = [everything_under(host, schedule) for schedule in SCHEDULES]
    for values in zip(*results, strict=True):
        assert all(torch.equal(value, values[0]) for value in values)


def test_a_missing_barrier_is_noticed(host: Harness) -> None:
    """For each barrier of the kernels; so each of them is also needed."""
    expected = everything(host)
    assert {site.split(":")[0] for site in host.barriers_seen()} >= {"product.cuh", "forward.cuh", "moments.cuh"}
    for site in host.barriers_seen():
        host.skip_barrier(site)
        assert any(
            not torch.equal(value, right)
            for schedule in SCHEDULES
            for value, right in zip(everything_under(host, schedule), expected, strict=True)
        ), f"nothing changes without the barrier at {site}"


def test_a_divergent_barrier_is_an_error(host: Harness) -> None:
    assert "have diverged" in host.error_of_a_divergent_barrier()


@pytest.mark.skipif(SANITIZED, reason="this is the sanitised run")
def test_under_sanitizers(session_harness: Harness) -> None:
    """Part of this file again, with AddressSanitizer and UndefinedBehaviorSanitizer in the kernels and the harness."""
    runtimes = [
        subprocess.run(
            [*compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(Path(runtime).is_file() for runtime in runtimes):
        pytest.skip(f"{compiler()[0]} has no AddressSanitizer runtime")
    chosen = "(exact_as_pytorch and full and (float32 or bfloat16)) or slices or alone or without_rows or schedule"
    environment = os.environ | {
        "CUDA_HOST_SANITIZED": "1",
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__)), "-k", chosen]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert re.search(r"\d+ passed", done.stdout)
    assert "skipped" not in done.stdout


NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
@pytest.mark.skipif(SANITIZED, reason="nvcc is not sanitised")
def test_nvcc_compiles_without_spills(tmp_path: Path) -> None:
    """Every kernel for sm_80 and sm_90a, and to PTX. Spilled registers and arrays in local memory show as a frame."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("device_*.cu"))
    targets = ("code=sm_80,arch=compute_80", "code=sm_90a,arch=compute_90a", "code=compute_90,arch=compute_90")
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
    flags += ["-isystem", str(Path(torch.__file__).parent / "include"), "-DUSE_CUDA"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", *itertools.chain(*(("-gencode", t) for t in targets))]
    running = [
        subprocess.Popen(
            [NVCC, *flags, "-c", str(source), "-o", str(tmp_path / f"{source.stem}.o")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for source in sources
    ]
    for source, process in zip(sources, running, strict=True):
        said = process.communicate()[0]
        assert process.returncode == 0, said
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
        assert frames, f"{source.name} has no kernel"
        assert set(itertools.chain(*frames)) == {"0"}, said
        for architecture in ("sm_80", "sm_90a"):
            assert f"for '{architecture}'" in said
