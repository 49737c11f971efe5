"""Clips for training and views for testing, of single files and of a folder with one folder for each class."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from . import transforms
from .sampling import ClipSampler
from .video import Video, VideoError

EXTENSIONS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")


def videos_in(folder: Path, extensions: tuple[str, ...] = EXTENSIONS) -> list[Path]:
    """The files in a folder and the folders in it whose names end as videos' do (in small letters), in order."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in extensions and path.is_file())


@dataclass(frozen=True)
class RandomClip:
    """Reads one random clip of a file, for training: (T, crop, crop, 3) in uint8, T the fast pathway's frames.

    The paper's augmentation: the shorter side scaled to a random length, a random crop, and in half of the cases its
    mirror image. ``short_side`` is (smallest, largest); ``fps`` and ``backend`` are of ``Video``, ``antialias`` is of
    ``short_side_scale``.
    """

    sampler: ClipSampler = field(default_factory=ClipSampler)
    crop: int = 224
    short_side: tuple[int, int] = (256, 320)
    flip: float = 0.5
    fps: float | None = None
    antialias: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        if not self.crop <= self.short_side[0] <= self.short_side[1]:
            raise ValueError(f"short_side: expected {self.crop} (crop) <= smallest <= largest, got {self.short_side}")

    def __call__(self, path: str | Path, generator: torch.Generator | None = None) -> Tensor:
        video = Video(path, fps=self.fps, backend=self.backend)
        indices = _place(path, self.sampler.random, len(video), generator)
        frames = video.read(indices)
        size = transforms.random_short_side(self.short_side, generator)
        frames = transforms.short_side_scale(frames, size, self.antialias)
        frames = transforms.random_crop(frames, self.crop, generator)
        return transforms.random_flip(frames, self.flip, generator).contiguous()


@dataclass(frozen=True)
class UniformViews:
    """Reads views spread over a file, for testing: (clips * crops, T, crop, crop, 3) in uint8, clip by clip.

    The paper's are 10 clips over time with 3 crops of 256 each. What two views share is decoded and scaled once.
    """

    sampler: ClipSampler = field(default_factory=ClipSampler)
    clips: int = 10
    crops: int = 3
    crop: int = 256
    short_side: int = 256
    fps: float | None = None
    antialias: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.crop > self.short_side:
            raise ValueError(f"crop: expected at most short_side = {self.short_side}, got {self.crop}")

    def __call__(self, path: str | Path, generator: torch.Generator | None = None) -> Tensor:
        video = Video(path, fps=self.fps, backend=self.backend)
        indices = _place(path, self.sampler.uniform, len(video), self.clips)
        distinct, positions = indices.unique(return_inverse=True)
        frames = transforms.short_side_scale(video.read(distinct), self.short_side, self.antialias)
        crops = transforms.spatial_crops(frames, self.crop, self.crops)
        return torch.stack([crop[position] for position in positions for crop in crops])


def _place(path: str | Path, choose: Callable[..., Tensor], *arguments: object) -> Tensor:
    try:
        return choose(*arguments)
    except ValueError as error:  # a video too short for a sampler that does not pad
        raise VideoError(f"{path}: {error}") from error


class VideoFolder(Dataset[tuple[Tensor, int]]):
    """Videos in one folder for each class: ``root/<class>/**/<video>`` -> (what ``read`` gives, index of the class).

    Classes are numbered in the order of their names (``classes``), so train and test folders with the same names agree.

    Args:
        root: the folder.
        read: a ``RandomClip``, a ``UniformViews``, or any function of a path and a generator; it must be picklable
            where workers are started with "spawn".
        seed: None: random numbers come from PyTorch's generator, which every DataLoader worker has of its own, and
            which differs from epoch to epoch. A number: they depend on it, on the epoch (``set_epoch``) and on the item
            alone, not on workers or order, so that an epoch can be repeated, or resumed in its middle.
        extensions: of the files to take, in small letters.

    Raises:
        FileNotFoundError: no such folder, or no video in it.
    """

    def __init__(
        self,
        root: str | Path,
        read: Callable[[Path, torch.Generator | None], Tensor],
        *,
        seed: int | None = None,
        extensions: tuple[str, ...] = EXTENSIONS,
    ) -> None:
        self.root, self.read, self.seed = Path(root), read, seed
        if not self.root.is_dir():
            raise FileNotFoundError(f"root: {self.root} is no folder")
        self.classes = sorted(folder.name for folder in self.root.iterdir() if folder.is_dir())
        self.samples = [
            (path, label) for label, name in enumerate(self.classes) for path in videos_in(self.root / name, extensions)
        ]
        if not self.samples:
            raise FileNotFoundError(f"root: no videos ({', '.join(extensions)}) in folders of {self.root}")
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that persist see it change

    def set_epoch(self, epoch: int) -> None:
        """Other random numbers, where a seed is given. To be called before the epoch's iterator is made."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        generator = None
        if self.seed is not None:
            key = f"{self.seed} {int(self._epoch)} {index % len(self)}".encode()
            generator = torch.Generator().manual_seed(
                int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big")
            )
        return self.read(path, generator), label


class ResumableSampler(DistributedSampler[int]):
    """PyTorch's DistributedSampler, which can begin in the middle of an epoch: set ``start`` to the number of indices
    that this process has had of it. It needs no process group, as long as ``num_replicas`` and ``rank`` are given."""

    start = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.start, None)

    def __len__(self) -> int:
        return super().__len__() - self.start
