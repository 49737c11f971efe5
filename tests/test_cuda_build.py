"""What the compiler made of the CUDA kernels, for every architecture that they are meant for; needs no GPU."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from cuda_host.build import ROOT

from slowfast_fast.backend import KERNELS
from slowfast_fast.info import build_info

NVCC = shutil.which("nvcc")
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
SOURCES = ROOT / "csrc"

# What the code of a family of kernels must hold, by the beginning of an opcode. 16-byte loads go to registers
# (LDG.E.128) or straight to shared memory (LDGSTS.E.BYPASS.128); HMMA is a tensor core's product.
LOADS, COPIES, STORES, PRODUCTS = r"LDG\.E\.128", r"LDGSTS\.E\.BYPASS\.128", r"STG\.E\.128", r"HMMA"
FAMILIES = {
    r"::(normalise_rows|copy_rows)<": (LOADS, STORES),
    r"::pack_pathways_kernel<.*, [48]>": (STORES,),
    r"::gradient_sum_rows<": (LOADS,),
    r"::tile_(product|wgrad)_kernel<.*::TensorCores<": (COPIES, PRODUCTS),
    r"::tile_(product|wgrad)_kernel<.*::Fma": (COPIES, r"FFMA"),
    r"::tile_product_kernel<": (STORES,),
    r"::tile::finish_kernel<": (LOADS, STORES),
    r"::output_gradient<": (LOADS, STORES),
    r"::bottleneck_kernel<": (LOADS, STORES, PRODUCTS),
    r"::pack_weights<": (STORES,),
    r"::narrow_kernel<": (LOADS, PRODUCTS),
    r"::narrow_wgrad_kernel<": (COPIES, STORES, PRODUCTS),
}

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")


@dataclass
class Kernel:
    """One kernel of a source on one architecture. Frames hold spilled registers and arrays that ended up in local
    memory."""

    source: str
    name: str  # demangled
    architecture: str
    registers: int
    frame: int
    static_shared: int
    opcodes: Counter = field(default_factory=Counter)

    def has(self, opcode: str) -> bool:
        return any(re.match(opcode, found) for found in self.opcodes)


def compile_flags() -> list[str]:
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-Xptxas", "-v", f"-I{SOURCES}", "-DUSE_CUDA"]
    flags += ["-isystem", str(Path(torch.__file__).parent / "include"), "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    for architecture in ARCHITECTURES:
        flags += ["-gencode", f"arch={architecture.replace('sm', 'compute')},code={architecture}"]
    return flags


def digest(flags: list[str]) -> str:
    found = hashlib.sha256(" ".join([NVCC, *flags, torch.__version__]).encode())
    for path in sorted(itertools.chain(SOURCES.glob("*.h"), SOURCES.glob("cuda/*"))):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def compile_all() -> Path:
    """The folder with an object and what ptxas said (a .log) for each source that launches kernels; compiled unless
    build/ has one of the same sources."""
    flags = compile_flags()
    folder = ROOT / "build" / "cuda_objects" / digest(flags)
    if folder.is_dir():
        return folder
    fresh = folder.with_suffix(".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    running = {}
    for source in sorted((SOURCES / "cuda").glob("device_*.cu")):
        with open(fresh / f"{source.stem}.log", "w") as log:
            command = [NVCC, *flags, "-c", str(source), "-o", str(fresh / f"{source.stem}.o")]
            running[source.stem] = subprocess.Popen(command, stdout=log, stderr=log)
    failed = [name for name, process in running.items() if process.wait()]
    assert not failed, "\n".join((fresh / f"{name}.log").read_text()[-5000:] for name in failed)
    fresh.rename(folder)
    return folder


def find_cuobjdump() -> str | None:
    """Of the CUDA toolkit, else the one that triton brings."""
    spec = importlib.util.find_spec("triton")
    folders = spec.submodule_search_locations if spec else []
    beside = [str(Path(folder, "backends", "nvidia", "bin")) for folder in folders]
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=":".join(beside))


def demangle(text: str) -> str:
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


REPORT = re.compile(
    r"Compiling entry function '(?P<name>.+?)' for '(?P<architecture>\w+)'"
    r".*?(?P<frame>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    """Every kernel on every architecture, as ptxas reports it."""
    found = []
    for log in sorted(compile_all().glob("*.log")):
        for report in REPORT.finditer(demangle(log.read_text())):
            shared = re.search(r"(\d+) bytes smem", report["rest"])
            found.append(
                Kernel(
                    log.stem,
                    report["name"],
                    report["architecture"],
                    int(report["registers"]),
                    int(report["frame"]) + int(report["stores"]) + int(report["loads"]),
                    int(shared[1]) if shared else 0,
                )
            )
    assert {kernel.architecture for kernel in found} == set(ARCHITECTURES)
    return found


@pytest.fixture(scope="module")
def code(kernels: list[Kernel]) -> list[Kernel]:
    """The same with the opcodes of their machine code."""
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("there is no cuobjdump: it comes with the CUDA toolkit, and with triton")
    by_name = {(kernel.source, kernel.name, kernel.architecture): kernel for kernel in kernels}
    for compiled in sorted(compile_all().glob("*.o")):
        listing = subprocess.run([cuobjdump, "-sass", str(compiled)], capture_output=True, text=True, check=True).stdout
        for name, architecture, opcodes in functions(demangle(listing)):
            by_name[compiled.stem, name, architecture].opcodes = opcodes
    assert all(kernel.opcodes for kernel in kernels)
    return kernels


INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)")


def functions(listing: str) -> Iterator[tuple[str, str, Counter]]:
    """Name, architecture and opcodes of every function that cuobjdump lists."""
    architecture = ""
    for part in re.split(r"(?=^arch = |^\s*Function : )", listing, flags=re.MULTILINE):
        if part.startswith("arch = "):
            architecture = part.split()[2]
        elif part.lstrip().startswith("Function : "):
            first, *lines = part.lstrip().splitlines()
            matches = (INSTRUCTION.match(line) for line in lines)
            yield first.removeprefix("Function : ").strip(), architecture, Counter(m[1] for m in matches if m)


def test_nothing_spills(kernels: list[Kernel]) -> None:
    assert [(kernel.name, kernel.architecture, kernel.frame) for kernel in kernels if kernel.frame] == []


def test_every_kernel_is_made_for_every_architecture(kernels: list[Kernel]) -> None:
    names = Counter((kernel.source, kernel.name) for kernel in kernels)
    assert set(names.values()) == {len(ARCHITECTURES)}


def test_static_shared_memory(kernels: list[Kernel]) -> None:
    """Shared memory is asked for at the launch, where platform.cuh limits it: none may come on top."""
    assert [kernel for kernel in kernels if kernel.static_shared] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_instructions(code: list[Kernel], family: str, architecture: str) -> None:
    found = [kernel for kernel in code if re.search(family, kernel.name) and kernel.architecture == architecture]
    assert found, f"no kernel is named {family}"
    for kernel, opcode in itertools.product(found, FAMILIES[family]):
        assert kernel.has(opcode), f"{kernel.name}: no {opcode} among {sorted(kernel.opcodes)}"


def test_shared_memory_is_limited(tmp_path: Path) -> None:
    """A kernel whose shared memory does not fit the smallest architecture does not compile."""
    source = tmp_path / "kernel.cu"
    text = """#include "cuda/platform.cuh"
struct Layout { unsigned char bytes[SIZE]; };
__global__ void kernel() { slowfast_fast::cuda::shared_memory<Layout>().bytes[0] = 0; }
"""
    source.write_text(text)
    flags = ["-std=c++17", f"-I{SOURCES}", "-arch=sm_80", "-cubin", "-o", str(tmp_path / "kernel.cubin"), str(source)]
    for size, fits in ((163 * 1024, True), (163 * 1024 + 1, False)):
        done = subprocess.run([NVCC, f"-DSIZE={size}", *flags], capture_output=True, text=True)
        assert (done.returncode == 0) == fits, done.stderr
        assert fits or "kMostSharedBytes" in done.stderr


@pytest.mark.skipif(build_info()["cuda"] is None, reason="this installation was built without CUDA kernels")
def test_library_with_cuda_kernels_loads_under_any_torch() -> None:
    """It is loaded: also where torch has no CUDA. Every op but the one for whole blocks in training is registered for
    both devices."""
    both = {kernel for op, kernels in KERNELS.items() if op != "bottleneck_bn" for kernel in kernels}
    for kernel, device in itertools.product(both, ("CPU", "CUDA")):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"slowfast_fast::{kernel}", device), kernel
