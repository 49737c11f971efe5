"""Videos through TorchCodec."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torchcodec.decoders import VideoDecoder

from ._pyav import PyAVReader
from .video import VideoError


class TorchCodecReader(PyAVReader):
    """PyAV reads the packets' times and tells what is wrong with a file, TorchCodec decodes."""

    def read(self, indices: Sequence[int]) -> Tensor:
        if not self.timed:
            return super().read(indices)
        # By time, as the two need not count alike what an edit list leaves out; half a tick into the frame, as
        # seconds are rounded.
        seconds = [float((self.times[i] + 0.5) * self.base) for i in indices]
        try:
            decoder = VideoDecoder(str(self.path), dimension_order="NHWC", num_ffmpeg_threads=self.threads)
            return decoder.get_frames_played_at(seconds).data
        except (RuntimeError, IndexError) as error:
            raise VideoError(
                f"{self.path}: frames {min(indices)} to {max(indices)} cannot be decoded: {error}"
            ) from error


def open_video(path: Path, threads: int) -> TorchCodecReader:
    return TorchCodecReader(path, threads)
