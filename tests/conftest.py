"""What every test shares: fresh random numbers with a seed that can be given again, memory filled with garbage
before it is handed out, and the backends as parameters."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_host.build import SANITIZED, Harness

import slowfast_fast
from slowfast_fast.backend import BACKENDS, can_run

SEED_VARIABLE = "SLOWFAST_FAST_TEST_SEED"
SEED = int(os.environ.get(SEED_VARIABLE) or random.SystemRandom().randrange(2**32))
os.environ[SEED_VARIABLE] = str(SEED)  # for the workers of pytest-xdist, which start later

try:
    import hypothesis
except ImportError:  # the tests that draw their cases are skipped, and say so
    pass
else:
    # Compiling and instrumented code take long for one example, and how long says nothing about the code.
    hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
    hypothesis.settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "no_sanitizer: cannot run with instrumented kernels (torch.compile, new processes)"
    )
    config.addinivalue_line("markers", "gpu: runs on a CUDA device, and is skipped without one")
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(2)  # enough to take every path that threads take


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def pytest_report_header() -> str:
    return f"random inputs: {SEED_VARIABLE}={SEED}"


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seeds torch for the test. Another one each run, the same for the same test and SLOWFAST_FAST_TEST_SEED."""
    value = zlib.crc32(f"{SEED} {request.node.nodeid}".encode())
    torch.manual_seed(value)
    return value


def device_of(backend: str) -> str:
    """The device on which a backend is tested."""
    devices = BACKENDS[backend].devices
    return devices[0] if devices else "cpu"


def _parameters(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.gpu] if device_of(name) == "cuda" else []) for name in names]


@pytest.fixture(params=_parameters(name for name, b in BACKENDS.items() if b.library is not None))
def compiled_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend with kernels of its own in turn, otherwise as `backend`."""
    with forced(request):
        yield request.param


@pytest.fixture(params=_parameters(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn, forced; the test runs on the device that `device_of` gives for it. A backend is skipped
    only where this machine lacks its device or its compiler, and for a dtype that it never takes."""
    with forced(request):
        yield request.param


@contextlib.contextmanager
def forced(request: pytest.FixtureRequest) -> Iterator[None]:
    """The backend that is the parameter of a fixture, while its test runs."""
    name, dtypes = request.param, BACKENDS[request.param].dtypes
    dtype = request.node.callspec.params.get("dtype")
    if dtypes and dtype is not None and dtype not in dtypes:
        pytest.skip(f"{dtype} is not for the {name} backend")
    why_not = can_run(name, "temporal_conv", torch.empty(1, device=device_of(name)))
    if why_not is not None:
        assert device_of(name) != "cpu", why_not
        pytest.skip(why_not)
    with slowfast_fast.backend(name), tf32(False):
        yield


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 convolutions and products on a GPU, PyTorch's and ours, may round their factors to TF32."""
    settings = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [setting.allow_tf32 for setting in settings]
    try:
        for setting in settings:
            setting.allow_tf32 = allowed
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For networks and clips so small that a second thread has nothing to do but wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def in_threads(work: Callable[[Any], object], items: Collection[Any]) -> None:
    """``work`` of every item, in as many threads as there are items; what one of them raises is raised here."""
    with ThreadPoolExecutor(len(items)) as threads:
        list(threads.map(work, items))


M_PERTURB = -6  # mallopt: fill what malloc hands out with the complement of this byte, and what is freed with the byte


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialised memory is full of NaN (what PyTorch allocates: in half precision every other value of a kernel's
    output, in float64 huge numbers) or of huge numbers (what C++ allocates for itself), so that a value that was never
    written, or read where nothing belongs, shows."""
    libc = ctypes.CDLL(None)
    c10 = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libc10.so"))
    junk = ctypes.c_bool.in_dll(c10, "FLAGS_caffe2_cpu_allocator_do_junk_fill")
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    junk.value = True
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_PERTURB, 0x80)
    yield
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_PERTURB, 0)
    junk.value = False
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@pytest.fixture(scope="session")
def session_harness() -> Harness:
    """The CUDA kernels on the CPU (tests/cuda_host)."""
    return Harness(SANITIZED)


@pytest.fixture
def host(session_harness: Harness, poisoned: None) -> Iterator[Harness]:
    """Their ops under the random schedule, with outputs that are full of NaN at first."""
    session_harness.set_schedule("random")
    yield session_harness
    session_harness.skip_barrier("")
    session_harness.force_items(None)
    session_harness.force_grid(None)
