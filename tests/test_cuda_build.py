"""What nvcc says of the kernels, which needs no GPU."""

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_host.build import ROOT

NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
def test_compiles_without_spills(tmp_path: Path) -> None:
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
