"""The build: what the binaries need and export, what wheel and sdist hold, what the environment variables switch."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import slowfast_fast
from slowfast_fast import _C, _extension

ROOT = Path(__file__).parents[1]
SWITCHES = ("SLOWFAST_FAST_CUDA", "SLOWFAST_FAST_CUDA_ARCHS", "SLOWFAST_FAST_SANITIZE", "DEBUG", "MAX_JOBS", "CUDACXX")


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the source tree with only the given build switches set; output and errors come as one text."""
    env = {name: value for name, value in os.environ.items() if name not in SWITCHES} | environment
    return subprocess.run(
        [str(word) for word in command], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def dynamic_section(binary: str | Path) -> str:
    result = run("readelf", "-d", binary)
    assert result.returncode == 0, result.stdout
    return result.stdout


def needed(binary: str | Path) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[(.*)]", dynamic_section(binary)))


def test_library_needs_libtorch_and_nothing_of_one_environment():
    libraries = needed(_extension.LIBRARY)
    assert {"libtorch.so", "libtorch_cpu.so"} <= libraries
    foreign = [
        name for name in libraries if re.match(r"libpython|libcuda|libtorch_cuda|libc10_cuda|libtorch_python", name)
    ]
    assert not foreign


@pytest.mark.parametrize("binary", [_extension.LIBRARY, _C.__file__], ids=["library", "_C"])
def test_no_search_path_into_the_build_environment(binary):
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic_section(binary))


def test_library_is_bound_to_no_python_version():
    symbols = run("nm", "-D", "--undefined-only", _extension.LIBRARY).stdout
    assert "aoti_torch" in symbols, "nm shows none of the symbols that every build imports"
    assert not re.search(r"\b_?Py[A-Z_]\w*", symbols)


def test_library_exports_only_its_c_functions():
    """Operators register themselves; a C++ symbol left visible could be bound to another library's."""
    symbols = run("nm", "-D", "--defined-only", _extension.LIBRARY).stdout
    exported = re.findall(r"^\w+ T (\w+)", symbols, re.MULTILINE)
    assert "slowfast_fast_cpu_capability" in exported
    assert all(name.startswith("slowfast_fast_") for name in exported), exported


def test_build_info():
    info = _C.build_info()
    assert info["version"] == slowfast_fast.__version__
    assert info["abi_target"] == "2.10"
    assert info["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", info["commit"])
    x86 = platform.machine() == "x86_64"
    assert info["cpu_instruction_sets"] == (["baseline", "avx2", "avx512"] if x86 else ["baseline"])
    assert bool(info["cuda"]) == bool(info["cuda_archs"])


def test_missing_library_says_what_to_run(tmp_path):
    shutil.copytree(
        Path(slowfast_fast.__file__).parent, tmp_path / "slowfast_fast", ignore=shutil.ignore_patterns("lib*.so")
    )
    code = f"import sys; sys.path[0] = {str(tmp_path)!r}; import slowfast_fast"
    result = run(sys.executable, "-c", code)
    assert result.returncode == 1
    last = result.stdout.splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert str(tmp_path / "slowfast_fast" / _extension.LIBRARY.name) in last
    assert "pip install ." in last
    assert "python setup.py build_ext --inplace" in last


def test_wheel(tmp_path):
    """Made in the incremental build folder of the checkout, so it compiles only what changed."""
    bdist = ["bdist_wheel", "--dist-dir", tmp_path, "--bdist-dir", tmp_path / "bdist"]
    egg_info = ["egg_info", "--egg-base", tmp_path]
    switches = {name: os.environ[name] for name in SWITCHES if name in os.environ}
    result = run(sys.executable, "setup.py", "-q", "build", "-b", tmp_path / "build", *egg_info, *bdist, **switches)
    assert result.returncode == 0, result.stdout
    (wheel,) = tmp_path.glob("*.whl")
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name.startswith(f"slowfast_fast-{slowfast_fast.__version__}-{python}-{python}-linux_")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"slowfast_fast-{slowfast_fast.__version__}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        scripts = archive.read(f"{info}/entry_points.txt").decode()
        assert archive.read(f"{info}/licenses/LICENSE").decode().lstrip().startswith("Apache License")
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "slowfast_fast").rglob("*.py")}
    assert sources <= names
    binaries = {Path(name).name for name in names if name.endswith(".so")}
    assert binaries == {_extension.LIBRARY.name, Path(_C.__file__).name}
    assert "slowfast_fast/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"slowfast_fast", info}

    assert metadata["Version"] == slowfast_fast.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    requires = metadata.get_all("Requires-Dist")
    assert "torch>=2.10" in requires
    assert set(metadata.get_all("Provides-Extra")) >= {"demo", "test", "bench", "dev", "triton"}
    # It would replace a pinned torch.
    assert not [line for line in requires if line.startswith("torchvision")]
    assert "slowfast-fast = slowfast_fast.cli:main" in scripts


def test_sdist_holds_what_a_build_needs(tmp_path):
    egg_info = ["egg_info", "--egg-base", tmp_path]
    result = run(sys.executable, "setup.py", "-q", *egg_info, "sdist", "--dist-dir", tmp_path)
    assert result.returncode == 0, result.stdout
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    wanted = ["CMakeLists.txt", "pyproject.toml", "setup.py", "LICENSE", "README.md", "build_backend/sff_build.py"]
    for folder, pattern in {"csrc": "*.*", "slowfast_fast": "*.py*"}.items():
        wanted += [str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(pattern) if path.suffix != ".pyc"]
    missing = [name for name in wanted if name not in names and "__pycache__" not in name]
    assert not missing
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o"))]


@pytest.fixture
def isolated(tmp_path):
    """A bare environment, and a build isolated in it as pip does it: only what PYTHONPATH adds is importable."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env").check_returncode()
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    installed = Path(importlib.util.find_spec("setuptools").origin).parents[1]
    for pattern in ("setuptools", "setuptools-*.dist-info", "_distutils_hack", "pkg_resources"):
        for path in installed.glob(pattern):
            (overlay / path.name).symlink_to(path)

    def requirements(**environment: str) -> list[str]:
        code = "import json, sff_build; print(json.dumps(sff_build.get_requires_for_build_wheel()))"
        path = os.pathsep.join([str(overlay), str(ROOT / "build_backend")])
        python = tmp_path / "env" / "bin" / "python"
        result = run(python, "-c", code, PYTHONPATH=path, **environment)
        assert result.returncode == 0, result.stdout
        return json.loads(result.stdout.splitlines()[-1])

    site_packages = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    return requirements, site_packages


def install_torch(site_packages: Path, version: str) -> None:
    (site_packages / "torch").mkdir()
    (site_packages / "torch" / "__init__.py").write_text("raise RuntimeError('the build must not import torch')\n")
    (site_packages / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")


@pytest.mark.parametrize(
    ("installed", "required"),
    [(None, True), ("2.9.1+cu128", True), ("2.10.0", False), ("2.13.0+cpu", False), ("3.0.0a0+git1234", False)],
)
def test_torch_is_a_build_requirement_only_where_none_will_do(isolated, installed, required):
    requirements, site_packages = isolated
    if installed:
        install_torch(site_packages, installed)
    assert ("torch>=2.10" in requirements()) == required


def test_cmake_and_ninja_are_build_requirements_only_where_path_has_none(isolated, tmp_path):
    requirements, _ = isolated
    tools = tmp_path / "tools"
    tools.mkdir()
    assert set(requirements(PATH=str(tools))) >= {"cmake>=3.20", "ninja"}
    for name, version in {"cmake": "cmake version 3.19.8", "ninja": "1.11.1"}.items():
        (tools / name).write_text(f"#!/bin/sh\necho '{version}'\n")
        (tools / name).chmod(0o755)
    found = requirements(PATH=str(tools))
    assert "cmake>=3.20" in found, "a cmake that is too old does not count"
    assert "ninja" not in found
    (tools / "cmake").write_text("#!/bin/sh\necho 'cmake version 3.20.0'\n")
    assert "cmake>=3.20" not in requirements(PATH=str(tools))


@pytest.fixture(scope="module")
def cmake_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cmake")


def configure(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What `build_ext` prints when it only configures."""
    return run(sys.executable, "setup.py", "build_ext", "--configure-only", "--cmake-dir", folder, **environment)


def compile_commands(folder: Path) -> dict[tuple[str, str], str]:
    """(target, source) -> compiler command."""
    entries = json.loads((folder / "compile_commands.json").read_text())
    target = re.compile(r"CMakeFiles/(\w+)\.dir/")
    return {(target.search(entry["command"])[1], Path(entry["file"]).name): entry["command"] for entry in entries}


def test_configuration_without_cuda(cmake_dir):
    result = configure(cmake_dir, SLOWFAST_FAST_CUDA="0", MAX_JOBS="3")
    assert result.returncode == 0, result.stdout
    assert "SLOWFAST_FAST_CUDA: 0" in result.stdout
    assert "MAX_JOBS: 3" in result.stdout
    assert "DEBUG: 0" in result.stdout
    assert "Release build" in result.stdout
    assert "CUDA kernels  none: switched off" in result.stdout

    commands = compile_commands(cmake_dir)
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in commands["slowfast_fast", "ops.cpp"]
    for (target, source), command in commands.items():
        assert "-O3" in command, source
        if target.startswith("sff_kernels_"):
            assert f"-DSFF_ISA={target.removeprefix('sff_kernels_')} " in command
            assert "torch" not in re.sub(re.escape(str(ROOT)), "", command), "kernels see no header of torch"
        else:
            assert "-mavx" not in command, f"{source} must run on every machine"
    if platform.machine() == "x86_64":
        assert "-mavx512f" in commands["sff_kernels_avx512", "kernels.cpp"]
        assert "-mavx2 -mfma -mf16c" in commands["sff_kernels_avx2", "kernels.cpp"]
        assert "-mavx" not in commands["sff_kernels_baseline", "kernels.cpp"]


def test_debug(cmake_dir):
    result = configure(cmake_dir, SLOWFAST_FAST_CUDA="0", DEBUG="1")
    assert result.returncode == 0, result.stdout
    assert "Debug build" in result.stdout
    commands = compile_commands(cmake_dir)
    assert " -g " in commands["slowfast_fast", "ops.cpp"]
    assert "-O0" in commands["slowfast_fast", "ops.cpp"]
    assert "-O1" in commands["sff_kernels_baseline", "kernels.cpp"]


def test_sanitize(cmake_dir):
    result = configure(cmake_dir, SLOWFAST_FAST_SANITIZE="1")
    assert result.returncode == 0, result.stdout
    assert "with ASan and UBSan" in result.stdout
    assert all("-fsanitize=address,undefined" in command for command in compile_commands(cmake_dir).values())


def test_without_nvcc_one_line_says_so(tmp_path):
    result = configure(tmp_path, CUDACXX=str(tmp_path / "none"))
    assert result.returncode == 0, result.stdout
    assert "SLOWFAST_FAST_CUDA: where nvcc is found" in result.stdout
    assert result.stdout.count("CUDA kernels  none: no nvcc found, so this is a CPU build") == 1


def test_cuda_asked_for_without_nvcc_is_an_error(tmp_path):
    result = configure(tmp_path, SLOWFAST_FAST_CUDA="1", CUDACXX=str(tmp_path / "none"))
    assert result.returncode != 0
    assert "SLOWFAST_FAST_CUDA=1, but no working nvcc was found" in result.stdout


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
@pytest.mark.parametrize("archs", [None, "80-real, 90-virtual"])
def test_cuda_architectures(tmp_path, archs):
    result = configure(tmp_path, **({"SLOWFAST_FAST_CUDA_ARCHS": archs} if archs else {}))
    assert result.returncode == 0, result.stdout
    expected = archs.replace(", ", " ") if archs else "80-real 90a-real 90-virtual"
    assert re.search(rf"CUDA kernels  \S+ \(.*\) for {expected}$", result.stdout, re.MULTILINE)
    command = compile_commands(tmp_path)["slowfast_fast", "temporal_conv.cu"]
    assert set(re.findall(r",code=\[?(\w+)", command)) == {
        f"{'compute' if virtual else 'sm'}_{number}"
        for number, virtual in ((arch.split("-")[0], arch.endswith("virtual")) for arch in expected.split())
    }
    assert "-DUSE_CUDA" in command


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SLOWFAST_FAST_CUDA": "maybe"}, "SLOWFAST_FAST_CUDA='maybe': expected 0 or 1"),
        ({"SLOWFAST_FAST_SANITIZE": "yes"}, "SLOWFAST_FAST_SANITIZE='yes': expected 0 or 1"),
        ({"SLOWFAST_FAST_SANITIZE": "1", "SLOWFAST_FAST_CUDA": "1"}, "SLOWFAST_FAST_SANITIZE=1 builds no CUDA kernels"),
        ({"SLOWFAST_FAST_CUDA_ARCHS": "sm_90"}, "SLOWFAST_FAST_CUDA_ARCHS='sm_90': expected such as"),
        ({"DEBUG": "2"}, "DEBUG='2': expected 0 or 1"),
        ({"MAX_JOBS": "0"}, "MAX_JOBS='0': expected a whole number of at least 1"),
    ],
)
def test_bad_switches_name_themselves(tmp_path, environment, message):
    result = configure(tmp_path, **environment)
    assert result.returncode != 0
    assert message in result.stdout
    assert "Traceback" not in result.stdout
