"""Builds the kernels of csrc/cuda with the host compiler and loads them as torch.ops.slowfast_fast_cuda_host."""

import ctypes
import fcntl
import hashlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
NAMESPACE = "slowfast_fast_cuda_host"
LIBRARY = "libcuda_host.so"
SCHEDULES = ("ascending", "descending", "random")
SANITIZED = os.environ.get("CUDA_HOST_SANITIZED") == "1"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # in the order of csrc/primitives.h
TILE_SIZES = ("wide", "tall", "small")
# Of layer.cpp; the other schemas are those of csrc/ops.cpp.
LAYER_BACKWARD = (
    "layer_backward(Tensor grad, Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, Tensor? raw, Tensor? mean, "
    "Tensor? invstd, Tensor(a!)? dx, Tensor(b!)? dx_residual, Tensor(c!)? dconv, Tensor(d!)? dweight, "
    "Tensor(e!)? dscale, Tensor(f!)? dshift, int stride, int padding, int dilation, bool relu, bool tf32) -> ()"
)
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def build_once(name: str, command: list[str], sources: Iterable[Path], fill: Callable[[Path], None]) -> Path:
    """A folder in build/NAME, which ``fill`` writes with ``command`` unless there is one of the same command, torch and
    ``sources``. Workers of pytest-xdist come together."""
    digest = hashlib.sha256(" ".join([*command, torch.__version__]).encode())
    for path in sorted(sources):
        digest.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / name / digest.hexdigest()[:16]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                fresh = folder.with_suffix(".tmp")
                shutil.rmtree(fresh, ignore_errors=True)
                fresh.mkdir()
                fill(fresh)
                fresh.rename(folder)
    return folder


def build(sanitize: bool) -> Path:
    """The path of the library, compiled unless build/ has one of the same sources, compiler flags and torch."""
    torch_dir = Path(torch.__file__).parent
    command = [*compiler(), "-std=c++17", "-O1", "-g1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    command += ["-U_FORTIFY_SOURCE"]  # its longjmp takes a fiber's stack for a mistake
    command += [f"-I{HERE}", f"-I{ROOT / 'csrc'}", "-isystem", str(torch_dir / "include")]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", *(SANITIZE if sanitize else [])]
    read = ((ROOT / "csrc", "*.h"), (ROOT / "csrc/cuda", "*.cuh"), (HERE, "*.h"), (HERE, "*.cpp"))
    sources = itertools.chain.from_iterable(folder.glob(pattern) for folder, pattern in read)
    return build_once("cuda_host", command, sources, lambda folder: _compile(command, folder)) / LIBRARY


def _compile(command: list[str], folder: Path) -> None:
    objects = {source: folder / f"{source.stem}.o" for source in sorted(HERE.glob("*.cpp"))}
    running = [subprocess.Popen([*command, "-c", str(source), "-o", str(out)]) for source, out in objects.items()]
    failed = [process.wait() for process in running]
    if any(failed):
        raise RuntimeError("the host compiler could not build csrc/cuda; its messages are above")
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu"]
    out = folder / LIBRARY
    subprocess.run([*command, "-shared", "-o", str(out), *map(str, objects.values()), *libraries], check=True)


class Harness:
    """The ops, as attributes, and the controls of cuda_host.h."""

    def __init__(self, sanitize: bool) -> None:
        library = build(sanitize)
        self._definitions = torch.library.Library(NAMESPACE, "DEF")
        for literals in re.findall(r'm\.def\(((?:\s*"[^"]*")+)\)', (ROOT / "csrc" / "ops.cpp").read_text()):
            self._definitions.define("".join(re.findall(r'"([^"]*)"', literals)))
        self._definitions.define(LAYER_BACKWARD)
        torch.ops.load_library(library)
        self._controls = ctypes.CDLL(str(library))
        self._controls.cuda_host_explain.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_bool, ctypes.c_bool]
        channels, flags = [ctypes.c_int64] * 3, [ctypes.c_bool] * 2
        self._controls.cuda_host_explain_bottleneck.argtypes = [*channels, ctypes.c_int, *flags]
        for name in ("items", "grid"):
            getattr(self._controls, f"cuda_host_force_{name}").argtypes = [ctypes.c_int64]
        for name in ("barriers_seen", "kernels_launched", "try", "explain", "explain_bottleneck"):
            getattr(self._controls, f"cuda_host_{name}").restype = ctypes.c_char_p

    def __getattr__(self, op: str):
        return getattr(getattr(torch.ops, NAMESPACE), op)

    def set_schedule(self, name: str) -> None:
        self._controls.cuda_host_set_schedule(SCHEDULES.index(name))

    def force_plan(self, size: str | None, parts: int = 1) -> None:
        """Makes the tiled kernels run in this size, their depth in so many parts; None: as they choose themselves."""
        self._controls.cuda_host_force_plan(-1 if size is None else TILE_SIZES.index(size), parts)

    def force_items(self, items: int | None) -> None:
        """Makes bottleneck cut its output for so many items, 1 for the largest that memory allows; None: its choice."""
        self._controls.cuda_host_force_items(-1 if items is None else items)

    def force_grid(self, most: int | None) -> None:
        """The most blocks of a grid along y and z; None: CUDA's limit."""
        self._controls.cuda_host_force_grid(-1 if most is None else most)

    def skip_barrier(self, name: str) -> None:
        """Lets threads pass the barrier or wait of this name, "file.cuh:12", as if it were not there; "" for none."""
        self._controls.cuda_host_skip_barrier(name.encode())

    def barriers(self, call: Callable[[], object]) -> set[str]:
        """The barriers and waits that threads come to in ``call``, by name."""
        self._controls.cuda_host_forget_launches()
        call()
        return set(self._controls.cuda_host_barriers_seen().decode().split())

    def attempt(self, kernel: str) -> str:
        """Runs one of the kernels of instructions.cpp. What went wrong, or ""."""
        return self._controls.cuda_host_try(kernel.encode()).decode()

    def kernels(self, call: Callable[[], object]) -> set[str]:
        """The names of the kernels that ``call`` launches."""
        self._controls.cuda_host_forget_launches()
        call()
        return set(self._controls.cuda_host_kernels_launched().decode().split())

    def explain(self, shape: tuple[int, ...], dtype: torch.dtype, tf32: bool = False, aligned: bool = True) -> str:
        """What csrc/cuda/explain.cuh says of a convolution, given as the members of ConvShape."""
        values = (ctypes.c_int64 * len(shape))(*shape)
        return self._controls.cuda_host_explain(values, DTYPES.index(dtype), tf32, aligned).decode()

    def explain_bottleneck(
        self, c: int, j: int, k: int, dtype: torch.dtype, tf32: bool = True, aligned: bool = True
    ) -> str:
        """Why csrc/cuda/bottleneck_launch.cuh takes the general kernel; "" if it does not."""
        return self._controls.cuda_host_explain_bottleneck(c, j, k, DTYPES.index(dtype), tf32, aligned).decode()
