"""Reading files through TorchCodec: its tests of test_data.py, in a process that finds FFmpeg's libraries."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

av = pytest.importorskip("av", reason="PyAV is not installed")
TESTS = Path(__file__).parent


@pytest.fixture
def ffmpeg(tmp_path: Path) -> Path:
    """A folder of the libraries that PyAV's wheel brings, which have hashes in their names, and plain ones."""
    libraries = Path(av.__file__).parents[1] / "av.libs"
    if not libraries.is_dir():
        pytest.skip("this PyAV brings no FFmpeg; if TorchCodec finds one, test_data.py has tested it")
    for library in libraries.iterdir():
        plain = re.sub(r"-[0-9a-f]{8}(\.so\.\d+).*", r"\1", library.name)
        for name in {library.name, plain}:
            (tmp_path / name).symlink_to(library)
    return tmp_path


@pytest.mark.skipif(find_spec("torchcodec") is None, reason="TorchCodec is not installed")
def test_files_are_read(ffmpeg: Path) -> None:
    # The loader reads this variable when a process starts.
    path = os.pathsep.join(filter(None, [str(ffmpeg), os.environ.get("LD_LIBRARY_PATH")]))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "test_data.py")]
    done = subprocess.run(
        [*command, "-k", "torchcodec"],
        env=os.environ | {"LD_LIBRARY_PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout, done.stdout
    assert "skipped" not in done.stdout, done.stdout
