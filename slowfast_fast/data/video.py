"""Frames of a video file, through PyAV or TorchCodec."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

MODULES = {"torchcodec": ("torchcodec", "torchcodec"), "pyav": ("av", "data")}  # and the extra that brings it
BACKENDS = tuple(MODULES)


class VideoError(ValueError):
    """A file that is no video, has no video in it, or breaks off. The message starts with its path."""


class Reader(Protocol):
    """What a backend does. Frames are numbered in the order in which they are shown."""

    num_frames: int
    duration: float
    """Seconds, from when the first frame is shown to the end of the last."""

    def at(self, seconds: Sequence[float]) -> Tensor:
        """The frames shown at these times after the first: int64 indices."""

    def read(self, indices: Sequence[int]) -> Tensor:
        """These frames, as uint8 (T, H, W, 3) in RGB. Indices are in range, and may repeat in any order."""


class Video:
    """A video file as a sequence of frames; ``len(video)`` is their number.

    Args:
        path: of a file in any format that FFmpeg reads.
        fps: None: the frames as they are stored, whatever their distance in time. A number: as if the video had that
            many frames a second, each the one shown at its time. Sampling by this rate treats files of different and of
            variable frame rate alike.
        backend: "pyav", "torchcodec", or "auto": torchcodec where it can be imported, else PyAV.
        threads: of the decoder. One is best in the workers of a DataLoader.

    Raises:
        FileNotFoundError: there is no such file.
        VideoError: the file is no video, has no video stream, or has been cut off.
        ImportError: the backend is not installed.
    """

    def __init__(self, path: str | Path, *, fps: float | None = None, backend: str = "auto", threads: int = 1) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such file")
        if fps is not None and fps <= 0:
            raise ValueError(f"fps: expected more than 0, got {fps}")
        self.backend = choose_backend(backend)
        module = importlib.import_module(f"{__package__}._{self.backend}")
        self._reader: Reader = module.open_video(self.path, threads)
        self.fps = fps
        self._frames: Tensor | None = None  # the stored frame behind each, where these differ
        if fps is not None:
            count = max(1, round(self._reader.duration * fps))
            self._frames = self._reader.at([i / fps for i in range(count)])

    def __len__(self) -> int:
        return self._reader.num_frames if self._frames is None else len(self._frames)

    @property
    def duration(self) -> float:
        """In seconds."""
        return self._reader.duration

    def read(self, indices: Sequence[int] | Tensor) -> Tensor:
        """The frames with these indices, in this order, as uint8 (T, H, W, 3) in RGB. Each is decoded once.

        Raises:
            IndexError: an index is negative, or not less than ``len(self)``.
            VideoError: a frame cannot be decoded.
        """
        wanted = torch.as_tensor(indices, dtype=torch.int64)
        if wanted.ndim != 1 or not len(wanted):
            raise ValueError(f"indices: expected at least one, in one dimension, got shape {tuple(wanted.shape)}")
        if wanted.min() < 0 or wanted.max() >= len(self):
            raise IndexError(
                f"{self.path} has {len(self)} frames; indices from {wanted.min()} to {wanted.max()} were asked for"
            )
        if self._frames is not None:
            wanted = self._frames[wanted]
        return self._reader.read(wanted.tolist())


def choose_backend(name: str) -> str:
    """The backend that ``name`` means here.

    Raises:
        ValueError: an unknown name.
        ImportError: it is not installed; the message names the extra to install.
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend: expected auto, {' or '.join(BACKENDS)}, got {name!r}")
    if name == "auto":
        found = importlib.util.find_spec("torchcodec") is not None
        return "torchcodec" if found and _torchcodec_works() else choose_backend("pyav")
    module, extra = MODULES[name]
    if importlib.util.find_spec(module) is None:
        raise ImportError(
            f'reading videos needs {module}: pip install "slowfast-fast[{extra}]", or pip install {module}'
        )
    return name


@functools.cache
def _torchcodec_works() -> bool:
    """Tried once: an import that fails is slow, and one warning is enough."""
    try:
        importlib.import_module("torchcodec.decoders")
    except Exception as error:  # its libraries need a fitting FFmpeg and torch, and what is raised differs
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(f"torchcodec is installed and cannot be imported ({reason}); PyAV reads videos", stacklevel=4)
        return False
    return True
