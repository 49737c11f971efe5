"""Which of a few tile shapes runs a call: measured the first time, remembered on disk.

The folder is ``SLOWFAST_FAST_CACHE_DIR``, or ``slowfast_fast`` below ``XDG_CACHE_HOME`` or ``~/.cache``; in it one JSON
file for each device, Triton version and package version. ``SLOWFAST_FAST_TRITON_TUNE=0`` switches measuring off.

Nothing is measured, and the heuristic (first) configuration taken, under ``torch.use_deterministic_algorithms(True)``,
where results must repeat to the last bit on every machine. While torch.compile traces, while a CUDA graph is being
captured and under Triton's interpreter nothing is measured either; a choice made before is still used.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton

from .._version import __version__
from ._configs import Config
from ._launch import INTERPRETED

REPEATS = 5
_lock = threading.Lock()


def folder() -> Path:
    """Where measured choices are kept."""
    own = os.environ.get("SLOWFAST_FAST_CACHE_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slowfast_fast"


class Choices:
    """The configurations chosen on one device, as on disk. Keys and values are text and lists of numbers, so that a
    person can read the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known = self._read()

    def _read(self) -> dict[str, Config]:
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            return {}
        except OSError as error:
            warnings.warn(f"tuned configurations in {self.path} cannot be read and are ignored: {error}", stacklevel=2)
            return {}
        try:
            return {str(key): Config(*map(int, config)) for key, config in json.loads(text).items()}
        except (ValueError, TypeError, AttributeError) as error:
            warnings.warn(f"tuned configurations in {self.path} are damaged and ignored: {error}", stacklevel=2)
            return {}

    def add(self, key: str, config: Config) -> None:
        """Remember a choice here and on disk. What other processes wrote meanwhile is kept, and a reader sees the old
        file or the new one, never half of it."""
        self.known[key] = config
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.known = self._read() | self.known
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".tmp", delete=False) as file:
                json.dump(self.known, file, indent=0, sort_keys=True)
            os.replace(file.name, self.path)
        except OSError as error:
            warnings.warn(f"tuned configurations cannot be kept in {self.path}: {error}", stacklevel=2)


_choices: dict[str, Choices] = {}


def _of_device(device: torch.device) -> Choices:
    properties = torch.cuda.get_device_properties(device)
    name = f"{properties.name}-sm{properties.major}{properties.minor}-triton{triton.__version__}-{__version__}"
    name = "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in name)
    if name not in _choices:
        _choices[name] = Choices(folder() / f"triton-{name}.json")
    return _choices[name]


def choose(
    key: str,
    candidates: Sequence[Config],
    device: torch.device,
    prepare: Callable[[Config], Callable[[], object]] | None,
) -> tuple[Config, bool]:
    """The configuration for the call described by ``key``, and whether that is final or may be measured at a later
    call. ``prepare`` gives a function that makes the call, which may be made many times; without it nothing can be
    measured."""
    if INTERPRETED or device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return candidates[0], True
    choices = _of_device(device)
    # A choice from an older list of candidates is measured again.
    if choices.known.get(key) in candidates:
        return choices.known[key], True
    if os.environ.get("SLOWFAST_FAST_TRITON_TUNE") == "0":
        return candidates[0], True
    if prepare is None or torch.cuda.is_current_stream_capturing():
        return candidates[0], False
    with _lock:
        if choices.known.get(key) not in candidates:
            choices.add(key, fastest(candidates, prepare))
    return choices.known[key], True


def fastest(candidates: Sequence[Config], prepare: Callable[[Config], Callable[[], object]]) -> Config:
    """The configuration under which the call takes the least time on the device. One that needs more than the device
    has (shared memory, registers) is passed over."""
    times: dict[Config, float] = {}
    for config in dict.fromkeys(candidates):
        try:
            call = prepare(config)
            call()
            times[config] = min(_milliseconds(call) for _ in range(REPEATS))
        except triton.runtime.errors.OutOfResources:
            continue
    if not times:
        raise RuntimeError(f"none of the tile shapes {list(candidates)} fits this device")
    return min(times, key=times.__getitem__)


def _milliseconds(function: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # The device waits while the host gets ahead; else short kernels would be timed at the pace of their launches.
    torch.cuda._sleep(1_000_000)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
