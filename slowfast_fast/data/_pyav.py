"""Videos through PyAV."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import torch
from av.stream import Disposition
from torch import Tensor

from .video import VideoError


class PyAVReader:
    """Reads the packets once, without decoding, for the time of every frame and the keyframes; then decodes from the
    last keyframe before a frame that is wanted. Every call opens the file anew, so that processes share no position."""

    def __init__(self, path: Path, threads: int) -> None:
        self.path, self.threads = path, threads
        with self._opened() as (container, stream):
            packets: list[tuple[int, bool, int]] = []
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise self._cut_off(f"packet {len(packets)} is not whole")
                if (
                    packet.size and not packet.is_discard
                ):  # not the empty one at the end, nor what an edit list leaves out
                    packets.append((packet.pts, packet.is_keyframe, packet.duration or 0))
            rate = stream.average_rate or stream.guessed_rate or Fraction(25)
            base, stated = stream.time_base, _stated_seconds(stream)
        if not packets:
            raise VideoError(f"{path}: the video stream has no frames")
        self.timed = all(pts is not None for pts, *_ in packets)
        if not self.timed:  # as in a raw stream: frames are read from the start, and counted
            base, packets = 1 / rate, [(i, i == 0, 1) for i in range(len(packets))]
        packets = sorted({packet[0]: packet for packet in packets}.values())  # one frame is shown at a time
        self.base = Fraction(base)
        self.times = [pts for pts, _, _ in packets]
        self._keyframes = [i for i, (_, is_keyframe, _) in enumerate(packets) if is_keyframe]
        end = self.times[-1] + (packets[-1][2] or 1 / (rate * self.base))
        self.duration = float((end - self.times[0]) * self.base)
        if stated > float(end * self.base) + 1:
            raise self._cut_off(
                f"its frames end at {float(end * self.base):.2f} s, its header speaks of {stated:.2f} s"
            )

    @property
    def num_frames(self) -> int:
        return len(self.times)

    def at(self, seconds: Sequence[float]) -> Tensor:
        # Stored times are whole ticks: a frame can be stored as shown up to half a tick late.
        ticks = [self.times[0] + s / float(self.base) + 0.5 for s in seconds]
        return torch.tensor([max(bisect.bisect_right(self.times, tick) - 1, 0) for tick in ticks])

    def read(self, indices: Sequence[int]) -> Tensor:
        found: dict[int, Tensor] = {}
        with self._opened() as (container, stream):
            frames, position = self._decoded(container, stream), -1
            for index in sorted(set(indices)):
                before = bisect.bisect_right(self._keyframes, index) - 1
                if self.timed and before >= 0 and self._keyframes[before] > position + 1:
                    container.seek(self.times[self._keyframes[before]], stream=stream)
                    frames = self._decoded(container, stream)
                for position, frame in frames:  # noqa: B007 (used below)
                    if position >= index:
                        break
                if position != index:
                    raise VideoError(f"{self.path}: frame {index} of {self.num_frames} cannot be decoded")
                found[index] = _upright(frame)
        return torch.stack([found[index] for index in indices])

    def _decoded(self, container: Any, stream: Any) -> Iterator[tuple[int, Any]]:
        """The frames from where the container stands, each with its index."""
        for count, frame in enumerate(container.decode(stream)):
            index = bisect.bisect_left(self.times, frame.pts) if self.timed else count
            if index < self.num_frames and (not self.timed or self.times[index] == frame.pts):
                yield index, frame

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        try:
            with av.open(str(self.path)) as container:
                streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
                if not streams:
                    kinds = ", ".join(sorted({s.type for s in container.streams})) or "none"
                    raise VideoError(f"{self.path}: no video in this file; its streams: {kinds}")
                streams[0].codec_context.thread_count = self.threads
                if self.threads > 1:
                    streams[0].thread_type = "AUTO"
                yield container, streams[0]
        except av.FFmpegError as error:
            raise VideoError(f"{self.path}: no video that FFmpeg can read, or one that was cut off: {error}") from error

    def _cut_off(self, why: str) -> VideoError:
        return VideoError(f"{self.path}: the file was cut off: {why}")


def _stated_seconds(stream: Any) -> float:
    """The length of the stream as the header has it; 0 where it has none."""
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    parts = stream.metadata.get("DURATION", "").split(":")  # Matroska's, hours:minutes:seconds
    try:
        return sum(float(part) * unit for part, unit in zip(parts, (3600, 60, 1), strict=True))
    except ValueError:
        return 0.0


def _upright(frame: Any) -> Tensor:
    """uint8 (H, W, 3), turned as the file says that it is to be shown (telephones store portraits on their side)."""
    return torch.from_numpy(frame.to_ndarray(format="rgb24")).rot90(round(frame.rotation / 90), (0, 1))


def open_video(path: Path, threads: int) -> PyAVReader:
    return PyAVReader(path, threads)
