"""What the compiler made of the CUDA kernels, for every architecture that they are meant for; needs no GPU."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from cuda_host.build import ROOT, build_once

from slowfast_fast._extension import LIBRARY
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
    # Of several channels at once; channels in other numbers are pooled one by one.
    r"::(pool_rows|pool_gradient)<[^,]+, [48]\b": (LOADS, STORES),
    r"::(pool_gradient_sums|statistic_rows)<[^,]+, [48]\b": (LOADS,),
    r"::narrow_kernel<": (LOADS, PRODUCTS),
    r"::narrow_wgrad_kernel<.*::TensorOctets<": (COPIES, STORES, PRODUCTS),
    r"::narrow_wgrad_kernel<.*::FmaOctets": (COPIES, STORES, r"LDS\.64", r"FFMA"),
}

# A line of machine code; a predicate may stand before the opcode.
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)")
RESERVED_SHARED = 1024  # bytes a block that CUDA keeps for itself from sm_90 on, which cuobjdump counts

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")


@dataclass
class Kernel:
    """One kernel on one architecture. Its frame holds spilled registers and arrays that ended up in local memory."""

    name: str  # demangled
    architecture: str
    frame: int
    static_shared: int
    opcodes: Counter = field(default_factory=Counter)

    def has(self, opcode: str) -> bool:
        return any(re.match(opcode, found) for found in self.opcodes)


def sources() -> list[Path]:
    return sorted(itertools.chain(SOURCES.glob("*.h"), SOURCES.glob("cuda/*")))


def built_architectures() -> list[str]:
    """Those that the package in use has machine code for, unless the sources have changed since."""
    built = LIBRARY.stat().st_mtime
    if any(path.stat().st_mtime > built for path in sources()):
        return []
    codes = (re.fullmatch(r"(\d+[af]?)(-real)?", arch) for arch in build_info()["cuda_archs"])
    return [f"sm_{code[1]}" for code in codes if code]


def compile_for(architectures: Sequence[str]) -> Path:
    """The folder with an object for each source that launches kernels, compiled unless build/ has one of the same
    sources."""
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC", f"-I{SOURCES}", "-DUSE_CUDA"]
    flags += ["-isystem", str(Path(torch.__file__).parent / "include"), "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    for architecture in architectures:
        flags += ["-gencode", f"arch={architecture.replace('sm', 'compute')},code={architecture}"]

    def compile_into(folder: Path) -> None:
        running = [
            subprocess.Popen([NVCC, *flags, "-c", str(source), "-o", str(folder / f"{source.stem}.o")])
            for source in sorted((SOURCES / "cuda").glob("device_*.cu"))
        ]
        failed = [process.wait() for process in running]
        assert not any(failed), "nvcc could not build csrc/cuda; its messages are above"

    return build_once("cuda_objects", [NVCC, *flags], sources(), compile_into)


def find_cuobjdump() -> str | None:
    """Of the CUDA toolkit, else the one that triton brings."""
    spec = importlib.util.find_spec("triton")
    folders = spec.submodule_search_locations if spec else []
    beside = [str(Path(folder, "backends", "nvidia", "bin")) for folder in folders]
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=":".join(beside))


def functions(listing: str) -> Iterator[tuple[str, str, list[str]]]:
    """Name, architecture and further lines of every function in what cuobjdump prints."""
    architecture = ""
    for part in re.split(r"(?=^arch = |^\s*Function :? ?)", listing, flags=re.MULTILINE):
        if part.startswith("arch = "):
            architecture = part.split()[2]
        elif part.lstrip().startswith("Function"):
            first, *lines = part.lstrip().splitlines()
            yield re.sub(r"^Function( :)? |:$", "", first).strip(), architecture, lines


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    """Every kernel on every architecture: of the package in use, and compiled for the architectures that it lacks."""
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("there is no cuobjdump: it comes with the CUDA toolkit, and with triton")

    def dump(what: str, binary: Path) -> Iterator[tuple[str, str, list[str]]]:
        listing = subprocess.run([cuobjdump, what, str(binary)], capture_output=True, text=True, check=True).stdout
        demangled = subprocess.run(["c++filt"], input=listing, capture_output=True, text=True, check=True).stdout
        return (found for found in functions(demangled) if found[1] in ARCHITECTURES)

    built = [architecture for architecture in ARCHITECTURES if architecture in built_architectures()]
    missing = [architecture for architecture in ARCHITECTURES if architecture not in built]
    binaries = [LIBRARY] * bool(built) + (sorted(compile_for(missing).glob("*.o")) if missing else [])
    found = []
    for binary in binaries:
        of_binary = {}
        for name, architecture, lines in dump("-res-usage", binary):
            used = {key: int(value) for key, value in re.findall(r"(STACK|SHARED|LOCAL):(\d+)", lines[0])}
            reserved = 0 if architecture == "sm_80" else RESERVED_SHARED
            of_binary[name, architecture] = Kernel(
                name, architecture, used["STACK"] + used["LOCAL"], used["SHARED"] - reserved
            )
        for name, architecture, lines in dump("-sass", binary):
            matches = (INSTRUCTION.match(line) for line in lines)
            of_binary[name, architecture].opcodes = Counter(match[1] for match in matches if match)
        found += of_binary.values()
    assert {kernel.architecture for kernel in found} == set(ARCHITECTURES)
    assert all(kernel.opcodes for kernel in found)
    return found


def test_nothing_spills(kernels: list[Kernel]) -> None:
    assert [(kernel.name, kernel.architecture, kernel.frame) for kernel in kernels if kernel.frame] == []


def test_every_kernel_is_made_for_every_architecture(kernels: list[Kernel]) -> None:
    made = {kernel.name: set[str]() for kernel in kernels}
    for kernel in kernels:
        made[kernel.name].add(kernel.architecture)
    assert {name: found for name, found in made.items() if found != set(ARCHITECTURES)} == {}


def test_static_shared_memory(kernels: list[Kernel]) -> None:
    """Shared memory is asked for at the launch, where platform.cuh limits it: none may come on top."""
    assert [kernel for kernel in kernels if kernel.static_shared] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_instructions(kernels: list[Kernel], family: str, architecture: str) -> None:
    found = [kernel for kernel in kernels if re.search(family, kernel.name) and kernel.architecture == architecture]
    assert found, f"no kernel is named {family}"
    for kernel, opcode in itertools.product(found, FAMILIES[family]):
        assert kernel.has(opcode), f"{kernel.name}: no {opcode} among {sorted(kernel.opcodes)}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_operands_are_not_read_byte_by_byte(kernels: list[Kernel], architecture: str) -> None:
    """As a copy from memory of unknown alignment would be."""
    products = [k for k in kernels if re.search(r"::(narrow|tile)_\w+<", k.name) and k.architecture == architecture]
    assert [kernel.name for kernel in products if kernel.has(r"LDS\.[US]8")] == []


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
    """It is loaded: also where torch has no CUDA. Every op but those for stems and 3x3 layers is registered for both
    devices."""
    cpu_only = ("stem_conv", "spatial_conv")
    both = {kernel for op, kernels in KERNELS.items() if op not in cpu_only for kernel in kernels}
    for kernel, device in itertools.product(both, ("CPU", "CUDA")):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"slowfast_fast::{kernel}", device), kernel
