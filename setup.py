"""Builds the C++ and CUDA code with CMake and Ninja. Everything else about the package stands in pyproject.toml.

Environment:
    SLOWFAST_FAST_CUDA        0 or 1; default: 1 where nvcc is found
    SLOWFAST_FAST_CUDA_ARCHS  as CMAKE_CUDA_ARCHITECTURES takes them; default: 80-real;90a-real;90-virtual
    MAX_JOBS                  default: the number of cores that this process may use
    DEBUG                     1: unoptimised, with debug information
    SLOWFAST_FAST_SANITIZE    1: AddressSanitizer and UndefinedBehaviorSanitizer, no CUDA kernels
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "build_backend"))

import sff_build  # noqa: E402  (found through the line above)

LIBRARY = "libslowfast_fast.so"


def _switch(name: str, default: bool | None) -> bool | None:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}={value!r}: expected 0 or 1")
    return default if value == "" else value == "1"


@dataclass(frozen=True)
class Switches:
    """What the environment asks of the build. ``cuda`` is None where nvcc decides."""

    cuda: bool | None
    cuda_archs: str | None
    jobs: int
    debug: bool
    sanitize: bool

    @classmethod
    def from_environment(cls) -> Switches:
        sanitize = bool(_switch("SLOWFAST_FAST_SANITIZE", False))
        cuda = _switch("SLOWFAST_FAST_CUDA", False if sanitize else None)
        if sanitize and cuda:
            raise SystemExit("SLOWFAST_FAST_SANITIZE=1 builds no CUDA kernels: unset SLOWFAST_FAST_CUDA or set it to 0")
        archs = ";".join(re.findall(r"[^;, ]+", os.environ.get("SLOWFAST_FAST_CUDA_ARCHS", "")))
        if archs and not re.fullmatch(r"(\d+[af]?(-real|-virtual)?(;|$))+", archs):
            raise SystemExit(f"SLOWFAST_FAST_CUDA_ARCHS={archs!r}: expected such as '80-real;90a-real;90-virtual'")
        jobs = os.environ.get("MAX_JOBS", "") or str(len(os.sched_getaffinity(0)))
        if not jobs.isdigit() or int(jobs) < 1:
            raise SystemExit(f"MAX_JOBS={jobs!r}: expected a whole number of at least 1")
        return cls(cuda, archs or None, int(jobs), bool(_switch("DEBUG", False)), sanitize)

    def __str__(self) -> str:
        cuda = {None: "where nvcc is found", True: "1", False: "0"}[self.cuda]
        return (
            f"SLOWFAST_FAST_CUDA: {cuda}, SLOWFAST_FAST_CUDA_ARCHS: {self.cuda_archs or 'default'}, "
            f"MAX_JOBS: {self.jobs}, DEBUG: {int(self.debug)}, SLOWFAST_FAST_SANITIZE: {int(self.sanitize)}"
        )

    @property
    def folder(self) -> str:
        kind = ["debug" if self.debug else "release"]
        kind += ["sanitize"] if self.sanitize else ["cpu"] if self.cuda is False else []
        return "-".join([sys.implementation.cache_tag or "python", *kind])


class CMakeBuild(build_ext):
    """``build_ext`` that runs CMake. Builds of one folder are incremental, and wait for each other."""

    user_options: ClassVar[list] = [
        *build_ext.user_options,
        ("cmake-dir=", None, "folder of the CMake build [default: build/cmake/<Python, kind>]"),
        ("configure-only", None, "print the build configuration and stop"),
    ]
    boolean_options: ClassVar[list] = [*build_ext.boolean_options, "configure-only"]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.cmake_dir: str | None = None
        self.configure_only = False

    def run(self) -> None:
        switches = Switches.from_environment()
        folder = Path(self.cmake_dir or ROOT / "build" / "cmake" / switches.folder).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            cmake = self._configure(folder, switches)
            if self.configure_only:
                return
            _run(cmake, "--build", folder, "--parallel", switches.jobs)
            for built, target in self._targets().items():
                _replace(folder / built, target)

    def _configure(self, folder: Path, switches: Switches) -> str:
        torch = sff_build.find_torch()
        if torch is None or not torch.usable:
            found = f"torch {torch.version} in {torch.folder}" if torch else "none"
            oldest = ".".join(map(str, sff_build.OLDEST_TORCH))
            raise SystemExit(f"slowfast_fast is built against an installed torch >= {oldest}; found: {found}")
        tools = {"cmake": sff_build.find_cmake(), "ninja": sff_build.find_ninja()}
        missing = [name for name, path in tools.items() if path is None]
        if missing:
            raise SystemExit(f"building slowfast_fast needs {' and '.join(missing)}: pip install {' '.join(missing)}")
        settings = {
            "CMAKE_BUILD_TYPE": "Debug" if switches.debug else "Release",
            "CMAKE_MAKE_PROGRAM": tools["ninja"],
            "Python_EXECUTABLE": sys.executable,
            "SFF_VERSION": self.distribution.get_version(),
            "SFF_TORCH_DIR": torch.folder,
            "SFF_TORCH_VERSION": torch.version,
            "SFF_CUDA": {None: "AUTO", True: "ON", False: "OFF"}[switches.cuda],
            "SFF_SANITIZE": "ON" if switches.sanitize else "OFF",
        }
        # An unset variable goes back to CMakeLists.txt's default, also in a folder configured otherwise before.
        archs = ["-U", "SFF_CUDA_ARCHS"] if switches.cuda_archs is None else [f"-DSFF_CUDA_ARCHS={switches.cuda_archs}"]
        print(f"slowfast_fast build: {switches}", flush=True)
        definitions = [f"-D{name}={value}" for name, value in settings.items()]
        _run(tools["cmake"], "-S", ROOT, "-B", folder, "-G", "Ninja", *archs, *definitions)
        return tools["cmake"]

    def _targets(self) -> dict[str, Path]:
        """What CMake builds, and where it belongs: beside the Python sources (in-place, editable) or in build_lib."""
        package = ROOT / "slowfast_fast" if self.inplace else Path(self.build_lib).resolve() / "slowfast_fast"
        module = os.path.basename(self.get_ext_filename("_C"))
        return {name: package / name for name in (LIBRARY, module)}

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self._targets().values()]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        package = os.path.join(self.build_lib, "slowfast_fast")
        return {os.path.join(package, name): str(path) for name, path in self._targets().items()}


def _run(*command: object) -> None:
    status = subprocess.run([str(word) for word in command]).returncode
    if status:
        raise SystemExit(f"{Path(str(command[0])).name} failed (exit status {status}); what it printed above says why")


def _replace(source: Path, target: Path) -> None:
    """Put a copy in place in one step: a process that has the old library loaded keeps its own file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy2(source, fresh)
    os.replace(fresh, target)


setup(
    ext_modules=[Extension("slowfast_fast._C", [])],
    cmdclass={"build_ext": CMakeBuild},
)
