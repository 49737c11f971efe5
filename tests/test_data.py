"""slowfast_fast.data: the frames of clips, reading of files, transforms, folders."""

from __future__ import annotations

import functools
import importlib.util
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from video_testing import greys, write_sound, write_video

from slowfast_fast import data
from slowfast_fast.data import ClipSampler, RandomClip, ResumableSampler, UniformViews, Video, VideoError, VideoFolder
from slowfast_fast.data import video as reading
from slowfast_fast.data.video import BACKENDS, choose_backend


def works(backend: str) -> bool:
    try:
        choose_backend(backend)
        return backend != "torchcodec" or importlib.import_module("torchcodec.decoders") is not None
    except Exception:
        return False


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    """Each backend that reads files here."""
    if not works(request.param):
        pytest.skip(f"{request.param} is not installed, or cannot be imported")
    return request.param


# Sampling


@pytest.mark.parametrize("rule", data.RULES)
def test_slow_indices_are_those_of_the_library(rule):
    even = rule in ("pytorchvideo", "pyslowfast")
    expected = [0, 4, 8, 13, 17, 22, 26, 31] if even else [0, 4, 8, 12, 16, 20, 24, 28]
    assert data.slow_indices(32, 4, rule).tolist() == expected
    assert data.slow_indices(3, 1, rule).tolist() == [0, 1, 2]


def test_a_window_of_64_raw_frames_as_in_the_paper():
    """Slow stride 16 and fast stride 2; where frames are spread evenly, the last one ends the window."""
    strided, even = (ClipSampler(4, 16, 8, rule) for rule in ("r1c7", "pytorchvideo"))
    for sampler in (strided, even):
        assert (sampler.window, sampler.fast_frames) == (64, 32)
    fast = strided.uniform(64, 1)[0]
    assert fast.tolist() == list(range(0, 64, 2))
    assert fast[strided.slow()].tolist() == [0, 16, 32, 48]
    fast = even.uniform(64, 1)[0]
    assert fast.tolist() == [*range(0, 62, 2), 63]
    assert fast[even.slow()].tolist() == [0, 20, 40, 63]


def test_uniform_clips_start_where_the_library_starts_them():
    """Ten clips of 64 raw frames in a video of 250, as the decoders of PySlowFast and mmaction2 compute them."""
    pyslowfast = ClipSampler(rule="pyslowfast").uniform(250)
    assert pyslowfast[:, 0].tolist() == [0, 18, 37, 55, 74, 93, 111, 130, 148, 167]  # 186 * i / 10
    assert pyslowfast[3].tolist() == [math.floor(55.8 + 63 * i / 31) for i in range(32)]
    mmaction2 = ClipSampler(rule="mmaction2").uniform(250)
    assert mmaction2[:, 0].tolist() == [0, 21, 42, 62, 83, 104, 125, 145, 166, 187]  # round(187 * i / 9)
    assert mmaction2[3].tolist() == list(range(62, 62 + 64, 2))
    assert ClipSampler(rule="mmaction2").uniform(250, 1)[0, 0] == 93
    assert ClipSampler(rule="pyslowfast").uniform(250, 1)[0, 0] == 0


@pytest.mark.parametrize("rule", data.RULES)
@pytest.mark.parametrize(("num_frames", "tau", "alpha"), [(8, 8, 4), (4, 16, 8), (16, 8, 4), (2, 3, 3), (1, 1, 1)])
def test_clips_lie_in_the_video_in_order(rule, num_frames, tau, alpha):
    sampler = ClipSampler(num_frames, tau, alpha, rule)
    for total in (sampler.window, sampler.window + 1, 3 * sampler.window + 7):
        clips = torch.cat([sampler.uniform(total, 7), *(sampler.random(total)[None] for _ in range(20))])
        assert clips.shape == (27, num_frames * alpha)
        assert clips.min() >= 0
        assert clips.max() < total
        assert (clips.diff() >= tau // alpha).all()
        assert (clips[:, -1] - clips[:, 0] < sampler.window + 1).all()


@pytest.mark.parametrize("rule", ["pytorchvideo", "mmaction2"])
def test_random_clips_reach_both_ends_and_follow_the_generator(rule):
    sampler = ClipSampler(2, 4, 2, rule)
    starts = {int(sampler.random(12)[0]) for _ in range(300)}
    # 8 raw frames of 12. Evenly spread ones start anywhere in [0, 4), whole ones at 0 to 4.
    assert starts == ({0, 1, 2, 3} if rule == "pytorchvideo" else {0, 1, 2, 3, 4})
    first, second = (sampler.random(1000, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)


def test_fewer_frames_than_a_window():
    assert ClipSampler(2, 4, 2).uniform(5, 2).tolist() == [[0, 2, 4, 4]] * 2  # of 0, 2, 4, 7
    assert ClipSampler(2, 4, 2, "mmaction2", "loop").random(5).tolist() == [0, 2, 4, 1]
    assert ClipSampler(2, 4, 2).random(1).tolist() == [0] * 4
    with pytest.raises(ValueError, match="a clip spans 8 frames and the video has 7"):
        ClipSampler(2, 4, 2, padding="error").random(7)
    assert ClipSampler(2, 4, 2, padding="error").random(8).tolist() == [0, 2, 4, 7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau": 6}, "tau: expected a multiple of alpha = 4, got 6"),
        ({"num_frames": 0}, "num_frames: expected at least 1, got 0"),
        ({"rule": "gluon"}, "rule: expected one of pytorchvideo, .*, got 'gluon'"),
        ({"padding": "zero"}, "padding: expected one of last, loop, error, got 'zero'"),
    ],
)
def test_samplers_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClipSampler(**arguments)


def test_samples_are_checked():
    with pytest.raises(ValueError, match="frames: expected a multiple of alpha = 4"):
        data.slow_indices(30, 4)
    with pytest.raises(ValueError, match="total: expected at least 1 frame, got 0"):
        ClipSampler().random(0)
    with pytest.raises(ValueError, match="clips: expected at least 1, got 0"):
        ClipSampler().uniform(100, 0)


# Files


def test_frames_come_as_asked(tmp_path, backend):
    video = Video(write_video(tmp_path / "grey.mkv", greys(12)), backend=backend)
    assert len(video) == 12
    assert video.duration == pytest.approx(12 / 25)
    frames = video.read([7, 0, 0, 11])
    assert frames.dtype is torch.uint8
    assert torch.equal(frames, greys(12)[[7, 0, 0, 11]])
    for wrong in ([3, 12], [-1]):
        with pytest.raises(IndexError, match=r"grey.mkv has 12 frames; indices from .* were asked for"):
            video.read(wrong)
    with pytest.raises(ValueError, match="indices: expected at least one"):
        video.read([])


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("b-frames.mp4", "libx264", {"g": "10", "bf": "2", "qp": "5"}),
        ("still.avi", "mjpeg", {}),
        ("raw.h264", "libx264", {"g": "10", "bf": "2", "qp": "5"}),  # no times, no index: read from the start
        ("vp9.webm", "libvpx-vp9", {"g": "10", "crf": "10", "b": "0", "deadline": "realtime", "cpu-used": "8"}),
    ],
)
def test_every_frame_is_found_from_anywhere(tmp_path, backend, name, codec, options):
    """In compressed streams with frames out of order and several keyframes, by seeking: any frame alone, and many."""
    path = write_video(tmp_path / name, greys(45), codec, options=options)
    video = Video(path, backend=backend)
    assert len(video) == 45
    frames = video.read(range(45))
    assert ((frames.float().mean((1, 2, 3)) - 5 * torch.arange(45)).abs() < 2.5).all(), "frame i is the grey of 5 i"
    chosen = torch.randperm(45)[:4].tolist()
    assert torch.equal(video.read(chosen), frames[chosen])
    assert torch.equal(video.read([41, 3]), frames[[41, 3]])


def test_variable_frame_rate(tmp_path, backend):
    """By time, a frame is shown until the next one comes."""
    times = [0, 100, 150, 400, 1000, 1100]
    path = write_video(tmp_path / "variable.mkv", greys(6), times=times)
    assert torch.equal(Video(path, backend=backend).read(range(6)), greys(6))
    video = Video(path, fps=10, backend=backend)
    #        at 0, 0.1, 0.2 ... seconds
    expected = [0, 1, 2, 2, 3, 3, 3, 3, 3, 3, 4]
    assert video.duration == pytest.approx(
        1.14
    )  # the file says of the last frame that it lasts as long as at 25 a second
    assert len(video) == 11
    assert torch.equal(video.read(range(11)), greys(6)[expected])


@pytest.mark.parametrize("rate", [25, Fraction(30000, 1001), 15])
def test_target_rate_of_constant_rates(tmp_path, rate):
    """At its own rate a video is itself, though Matroska rounds times to milliseconds; at half of it every other."""
    path = write_video(tmp_path / "constant.mkv", greys(40, 16, 16), rate=rate)
    assert torch.equal(Video(path, fps=float(rate)).read(range(40)), greys(40, 16, 16))
    half = Video(path, fps=float(rate) / 2)
    assert len(half) == 20
    assert torch.equal(half.read(range(20)), greys(40, 16, 16)[::2])


def test_files_that_start_late(tmp_path, backend):
    path = write_video(tmp_path / "late.mkv", greys(5), times=[3000, 3040, 3080, 3120, 3160])
    video = Video(path, fps=25, backend=backend)
    assert len(video) == 5
    assert torch.equal(video.read([4, 0]), greys(5)[[4, 0]])


def noise(count: int) -> Tensor:
    return torch.randint(256, (count, 48, 64, 3), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "codec", "container_options", "where", "message"),
    [
        ("end.mp4", "libx264", {}, 0.5, "or one that was cut off"),  # the index was at the end
        ("start.mp4", "libx264", {"movflags": "faststart"}, 0.5, "the file was cut off: packet .* is not whole"),
        ("start.mp4", "libx264", {"movflags": "faststart"}, "packet", "cut off: its frames end at .* header speaks of"),
        ("cut.mkv", "ffv1", {}, 0.5, "cut off"),
        ("cut.avi", "mjpeg", {}, 0.5, "cut off"),
    ],
)
def test_truncated_file(tmp_path, name, codec, container_options, where, message):
    path = write_video(tmp_path / name, noise(100), codec, container_options=container_options)
    Video(path)
    content = path.read_bytes()
    length = start_of_packet(path, 30) if where == "packet" else int(len(content) * where)
    path.write_bytes(content[:length])
    with pytest.raises(VideoError, match=rf"{name}.*{message}"):
        Video(path)


def start_of_packet(path, number: int) -> int:
    import av

    with av.open(str(path)) as container:
        return next(p.pos for i, p in enumerate(container.demux(video=0)) if i == number)


def test_damaged_in_the_middle(tmp_path, backend):
    path = write_video(tmp_path / "damaged.avi", noise(20), "mjpeg")
    start, end = start_of_packet(path, 9), start_of_packet(path, 10)
    content = bytearray(path.read_bytes())
    content[start + 8 : end] = bytes(end - start - 8)
    path.write_bytes(content)
    video = Video(path, backend=backend)
    with pytest.raises(VideoError, match=r"damaged.avi"):
        video.read([12, 9])


def test_no_video_in_it(tmp_path):
    for path, message in (
        (write_sound(tmp_path / "sound.wav"), "no video in this file; its streams: audio"),
        (write_sound(tmp_path / "sound.mkv"), "no video in this file; its streams: audio"),
        (tmp_path / "text.mp4", "no video that FFmpeg can read"),
        (tmp_path / "empty.mp4", "no video that FFmpeg can read"),
    ):
        if not path.exists():
            path.write_text("No video.\n" * 100 if path.stem == "text" else "")
        with pytest.raises(VideoError, match=f"{path.name}: {message}"):
            Video(path)
    with pytest.raises(FileNotFoundError, match=r"none\.mp4: no such file"):
        Video(tmp_path / "none.mp4")


def test_upright(tmp_path, backend):
    """The rotation that a telephone writes into the header: 90 degrees clockwise, by a matrix at byte 40 of tkhd."""
    picture = greys(1, 32, 64, 0).clone()
    picture[:, :, :32] = 255  # left half white
    path = write_video(tmp_path / "turned.mp4", picture.repeat(3, 1, 1, 1), "mpeg4")
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    words = [0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30]
    content[matrix : matrix + 36] = b"".join(word.to_bytes(4, "big", signed=True) for word in words)
    path.write_bytes(content)
    frame = Video(path, backend=backend).read([1])[0].float()
    assert frame.shape == (64, 32, 3)
    assert frame[:30].mean() > 240, "what was on the left is on top"
    assert frame[34:].mean() < 15


def test_what_is_missing_is_named(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in ("av", "torchcodec") else find_spec(name, *rest),
    )
    for name, module, extra in (
        ("auto", "av", "data"),
        ("pyav", "av", "data"),
        ("torchcodec", "torchcodec", "torchcodec"),
    ):
        with pytest.raises(ImportError, match=rf'needs {module}: pip install "slowfast-fast\[{extra}\]"'):
            choose_backend(name)
    with pytest.raises(ValueError, match="backend: expected auto, torchcodec or pyav, got 'decord'"):
        choose_backend("decord")


def test_a_torchcodec_that_cannot_be_imported(monkeypatch):
    """It is tried and warned of once; PyAV reads."""
    import_module, tried = importlib.import_module, []

    def fails(name, *rest):
        if name != "torchcodec.decoders":
            return import_module(name, *rest)
        tried.append(name)
        raise RuntimeError("FFmpeg is not installed\nand so on")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    monkeypatch.setattr(importlib, "import_module", fails)
    monkeypatch.setattr(reading, "_torchcodec_works", functools.cache(reading._torchcodec_works.__wrapped__))
    with pytest.warns(
        UserWarning, match=r"cannot be imported \(FFmpeg is not installed\); PyAV reads videos"
    ) as caught:
        assert [choose_backend("auto") for _ in range(2)] == ["pyav", "pyav"]
    assert len(caught) == len(tried) == 1


# Transforms


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("height", "width", "size"), [(37, 61, 24), (61, 37, 24), (20, 33, 31), (24, 24, 24)])
def test_short_side_scale(height, width, size, antialias):
    frames = torch.randint(256, (3, height, width, 3), dtype=torch.uint8)
    scaled = data.short_side_scale(frames, size, antialias)
    longer = math.floor(max(height, width) / min(height, width) * size)
    shape = (size, longer) if height < width else (longer, size)
    assert scaled.dtype is torch.uint8
    assert scaled.shape == (3, *shape, 3)
    exact = F.interpolate(frames.permute(0, 3, 1, 2).double(), shape, mode="bilinear", antialias=antialias)
    # Rounding of the pixel, and of the weights to a few more bits than it has.
    assert (scaled.permute(0, 3, 1, 2) - exact).abs().max() <= 1.5


def test_spatial_crops():
    frames = torch.randint(256, (2, 10, 17, 3), dtype=torch.uint8)
    crops = data.spatial_crops(frames, 8)
    for crop, left in zip(crops, (0, 5, 9), strict=True):  # of 9 pixels to spare, ceil(4.5) before the middle
        assert torch.equal(crop, frames[:, 1:9, left : left + 8])
    for crop, top in zip(data.spatial_crops(frames.transpose(1, 2), 8), (0, 5, 9), strict=True):
        assert torch.equal(crop, frames.transpose(1, 2)[:, top : top + 8, 1:9])
    assert torch.equal(data.spatial_crops(frames, 8, 1)[0], crops[1])
    with pytest.raises(ValueError, match="size: expected 1 to 10, the shorter side of the frames, got 11"):
        data.spatial_crops(frames, 11)


def test_random_transforms():
    positions = torch.arange(6 * 7).view(1, 6, 7, 1).expand(2, 6, 7, 3).byte()
    corners = {int(data.random_crop(positions, 5)[0, 0, 0, 0]) for _ in range(200)}
    assert corners == {0, 1, 2, 7, 8, 9}
    assert torch.equal(data.random_flip(positions, 1.0), positions.flip(2))
    assert data.random_flip(positions, 0.0) is positions
    flipped = sum(data.random_flip(positions) is not positions for _ in range(200))
    assert 50 < flipped < 150
    sides = {data.transforms.random_short_side((3, 5)) for _ in range(200)}
    assert sides == {3, 4, 5}


@pytest.mark.parametrize("rule", ["pytorchvideo", "mmaction2"])
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
def test_to_pathways(rule, dtype):
    frames = torch.randint(256, (2, 8, 5, 7, 3), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    slow, fast = data.to_pathways(frames, 4, rule=rule, mean=mean, std=std, dtype=dtype)
    expected = ((frames.double() / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 4, 1, 2, 3)
    tolerance = 2**-8 if dtype is torch.bfloat16 else 1e-6
    assert fast.dtype is (dtype or torch.float32)
    assert (fast - expected).abs().max() <= tolerance * 2
    assert torch.equal(slow, fast[:, :, data.slow_indices(8, 4, rule)])
    for pathway in (slow, fast):
        assert pathway.is_contiguous(memory_format=torch.channels_last_3d)
    slow, fast = data.to_pathways(torch.full((1, 4, 2, 2, 3), 51, dtype=torch.uint8))
    assert torch.allclose(fast, torch.full_like(fast, (51 / 255 - 0.45) / 0.225), atol=1e-6)


def test_frames_are_checked():
    with pytest.raises(TypeError, match=r"frames: expected torch\.uint8, got torch\.float32"):
        data.to_pathways(torch.zeros(1, 4, 2, 2, 3))
    with pytest.raises(ValueError, match=r"frames: expected \(N, T, H, W, 3\), got \(1, 3, 4, 2, 2\)"):
        data.to_pathways(torch.zeros(1, 3, 4, 2, 2, dtype=torch.uint8))


# Clips, views and folders


def test_views(tmp_path):
    """10 x 3: ten clips over time, three crops of each, clip by clip."""
    frames = torch.randint(256, (90, 20, 30, 3), dtype=torch.uint8)
    path = write_video(tmp_path / "noise.mkv", frames)
    read = UniformViews(ClipSampler(2, 8, 4), short_side=16, crop=12)
    views = read(path)
    assert views.shape == (30, 8, 12, 12, 3)
    indices = read.sampler.uniform(90, 10)
    scaled = data.short_side_scale(frames, 16)
    for clip in (0, 4, 9):
        for crop, left in enumerate((0, 6, 12)):
            assert torch.equal(views[3 * clip + crop], scaled[indices[clip]][:, 2:14, left : left + 12])
    with pytest.raises(ValueError, match="crop: expected at most short_side = 16, got 17"):
        UniformViews(short_side=16, crop=17)


def test_random_clip(tmp_path):
    path = write_video(tmp_path / "grey.mkv", greys(50, 20, 30))
    read = RandomClip(ClipSampler(2, 8, 4), crop=12, short_side=(12, 18))
    clips = [read(path, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert clips[0].shape == (8, 12, 12, 3)
    assert clips[0].is_contiguous()
    assert torch.equal(clips[0], clips[1])
    assert not torch.equal(clips[0], clips[2])
    times = clips[2][:, 0, 0, 0].long() // 5
    assert (times.diff() >= 2).all()
    with pytest.raises(VideoError, match=r"grey.mkv: a clip spans 64 frames and the video has 50"):
        RandomClip(ClipSampler(padding="error"), crop=12, short_side=(12, 18))(path)
    with pytest.raises(ValueError, match=r"short_side: expected 19 \(crop\) <= smallest <= largest"):
        RandomClip(crop=19, short_side=(18, 20))


@pytest.fixture
def folder(tmp_path):
    """Two classes; the second one's videos lie a folder deeper."""
    for name, videos in (("dark", ["a.mkv", "b.mkv"]), ("light/deeper", ["c.MKV", "note.txt"])):
        (tmp_path / name).mkdir(parents=True)
        for video in videos:
            path = tmp_path / name / video
            if path.suffix == ".txt":
                path.write_text("no video")
            else:
                write_video(path.with_suffix(".mkv"), torch.randint(256, (40, 16, 24, 3), dtype=torch.uint8)).rename(
                    path
                )
    return tmp_path


READ = RandomClip(ClipSampler(2, 4, 2), crop=8, short_side=(8, 12))


def test_folder(folder):
    dataset = VideoFolder(folder, READ)
    assert dataset.classes == ["dark", "light"]
    assert [(path.name, label) for path, label in dataset.samples] == [("a.mkv", 0), ("b.mkv", 0), ("c.MKV", 1)]
    frames, label = dataset[2]
    assert (frames.shape, label) == ((4, 8, 8, 3), 1)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        VideoFolder(folder / "none", READ)
    with pytest.raises(FileNotFoundError, match="no videos"):
        VideoFolder(folder / "dark", READ)


def epoch_of(loader: DataLoader) -> Tensor:
    return torch.cat([frames for frames, _ in loader])


def test_a_seed_decides_whoever_reads(folder):
    """In the process, in workers that persist and in others: the same clips, which differ from epoch to epoch."""
    dataset = VideoFolder(folder, READ, seed=3)
    workers = DataLoader(dataset, num_workers=2, persistent_workers=True)
    epochs = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        epochs.append(epoch_of(DataLoader(dataset)))
        assert torch.equal(epoch_of(workers), epochs[-1])
    assert not torch.equal(*epochs)
    other = VideoFolder(folder, READ, seed=4)
    assert not torch.equal(epoch_of(DataLoader(other)), epochs[0])
    unseeded = DataLoader(VideoFolder(folder, READ), num_workers=1)
    assert not torch.equal(epoch_of(unseeded), epoch_of(unseeded))


def test_a_broken_file_is_named_across_workers(folder):
    path = folder / "dark" / "a.mkv"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(VideoError, match=r"dark/a\.mkv"):
        epoch_of(DataLoader(VideoFolder(folder, READ), num_workers=1))


def test_sampler_resumes():
    for rank in (0, 1):
        sampler = ResumableSampler(range(11), num_replicas=2, rank=rank, seed=7)
        sampler.set_epoch(3)
        whole = list(sampler)
        assert len(whole) == len(sampler) == 6
        sampler.start = 4
        assert list(sampler) == whole[4:]
        assert len(sampler) == 2
