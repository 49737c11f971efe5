"""The Triton backend without a GPU: the ops under Triton's interpreter, each half of them in a process of its own,
since TRITON_INTERPRET must be set before Triton is imported and then holds for the whole process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

TESTS = Path(__file__).parent


@pytest.mark.no_sanitizer
def test_under_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "interpreted_triton.py")]
    halves = ["test_random_values or test_training_step", "not test_random_values and not test_training_step"]
    running = [
        subprocess.Popen(
            [*command, "-k", half], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for half in halves
    ]
    outputs = [process.communicate()[0] for process in running]
    for process, output in zip(running, outputs, strict=True):
        assert process.returncode == 0, output
        assert " passed" in output, output
        assert "skipped" not in output, output
