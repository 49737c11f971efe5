"""PEP 517 build backend of slowfast_fast: setuptools, with build requirements that depend on the machine.

A plain ``requires = ["torch"]`` makes pip download a second torch, the newest CUDA build, for the sake of a few
headers. Instead, the torch of the environment that the package is installed into is used where there is one; torch
becomes a build requirement only where there is none. cmake and ninja are required only where PATH has no usable ones.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)

OLDEST_TORCH = (2, 10)
OLDEST_CMAKE = (3, 20)

# Run by the interpreter of the target environment; prints where its torch is without importing it.
_FIND_TORCH = """
import importlib.util, json
spec = importlib.util.find_spec("torch")
print(json.dumps(spec and spec.submodule_search_locations and list(spec.submodule_search_locations)[0]))
"""


@dataclass(frozen=True)
class Torch:
    """An installed torch: its package folder and its version, such as ``2.13.0+cpu``."""

    folder: Path
    version: str

    @property
    def usable(self) -> bool:
        return _numbers(self.version)[:2] >= OLDEST_TORCH


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0]))


def find_torch() -> Torch | None:
    """The torch of this interpreter: the one importable here, else the one of the environment behind pip's isolation.

    pip isolates a build with PYTHONPATH and a ``sitecustomize`` of its own, so the same interpreter started without
    Python's environment variables sees the target environment again, system site-packages and ``.pth`` files included.
    """
    for flags in ((), ("-E",)):
        found = subprocess.run(
            [sys.executable, *flags, "-c", _FIND_TORCH],
            cwd=os.path.dirname(sys.executable),  # -c puts the current folder first on the path
            capture_output=True,
            text=True,
            check=True,
        )
        folder = json.loads(found.stdout)
        version_file = Path(folder, "version.py") if folder else None
        if version_file and version_file.is_file():
            version = re.search(r"__version__ = ['\"]([^'\"]+)", version_file.read_text())
            if version:
                return Torch(Path(folder), version[1])
    return None


def find_cmake() -> str | None:
    """A cmake that is new enough: that of the ``cmake`` package of this environment, else the one on PATH."""
    for path in _tools("cmake", "CMAKE_BIN_DIR"):
        version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
        if _numbers(version.splitlines()[0])[:2] >= OLDEST_CMAKE:
            return path
    return None


def find_ninja() -> str | None:
    """ninja: that of the ``ninja`` package of this environment, else the one on PATH."""
    return next(_tools("ninja", "BIN_DIR"), None)


def _tools(name: str, folder: str) -> Iterator[str]:
    with contextlib.suppress(ImportError, AttributeError):  # a folder of that name is a package without attributes
        yield os.path.join(getattr(importlib.import_module(name), folder), name)
    if path := shutil.which(name):
        yield path


def _machine_requirements() -> list[str]:
    requirements = []
    torch = find_torch()
    if torch is None or not torch.usable:  # too old: pip is about to replace it
        requirements.append(f"torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}")
    if find_cmake() is None:
        requirements.append(f"cmake>={OLDEST_CMAKE[0]}.{OLDEST_CMAKE[1]}")
    if find_ninja() is None:
        requirements.append("ninja")
    return requirements


def get_requires_for_build_wheel(config_settings=None):
    return _setuptools.get_requires_for_build_wheel(config_settings) + _machine_requirements()


def get_requires_for_build_editable(config_settings=None):
    return _setuptools.get_requires_for_build_editable(config_settings) + _machine_requirements()
