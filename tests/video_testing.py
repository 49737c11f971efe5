"""Small video files, made on the fly."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

av = pytest.importorskip("av", reason="videos are written with PyAV")


def write_video(
    path: Path,
    frames: Tensor,
    codec: str = "ffv1",
    *,
    rate: int | Fraction = 25,
    times: Sequence[int] | None = None,
    container_options: dict[str, str] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Writes uint8 (T, H, W, 3). ``ffv1`` loses nothing and goes into Matroska. ``times``: in milliseconds."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = {"ffv1": "bgr0", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def greys(count: int, height: int = 32, width: int = 48, step: int = 5) -> Tensor:
    """Frame i is a plain grey of step * i."""
    return (torch.arange(count) * step).byte().view(-1, 1, 1, 1).expand(count, height, width, 3).contiguous()


def write_sound(path: Path) -> Path:
    """Half a second of silence, and no video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame(format="s16", layout="mono", samples=4000)
        frame.planes[0].update(bytes(8000))
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
