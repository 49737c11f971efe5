"""classify: its numbers by hand, what it prints, draws and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

pytest.importorskip("av", reason="PyAV is not installed")

from video_testing import write_sound, write_video

from slowfast_fast import ops
from slowfast_fast.classify import Classifier, _mosaic, find_videos, read_labels
from slowfast_fast.cli import main
from slowfast_fast.data import ClipSampler, UniformViews, to_pathways
from slowfast_fast.models import create_model, entry, list_models

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = "slowfast_convlstm"
LABELS = ("climbing", "cooking", "cycling")
SMALL = ("--model", MODEL, "--views", "2x1", "--crop", "32")


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["classify", *map(str, arguments)])


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """A folder with one video, and one in a folder inside."""
    (tmp_path / "clips" / "more").mkdir(parents=True)
    for name in ("b.mkv", "more/a.mkv"):
        write_video(tmp_path / "clips" / name, torch.randint(256, (70, 36, 48, 3), dtype=torch.uint8))
    return tmp_path / "clips"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = create_model(MODEL, model_num_class=3)
    torch.nn.init.normal_(model.blocks[-1].proj.weight)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_probabilities_by_hand(videos: Path, checkpoint: Path, tmp_path: Path) -> None:
    """The mean over views of the softmax of the network in evaluation mode; a folder's videos in order; labels."""
    names = tmp_path / "names.txt"
    names.write_text("\n".join(LABELS) + "\n")
    result = cli(*SMALL, "--checkpoint", checkpoint, "--labels", names, "--json", videos)
    assert result.exit_code == 0, result.output
    answers = json.loads(result.stdout)
    model = create_model(MODEL, model_num_class=3).eval()
    model.load_state_dict(torch.load(checkpoint))
    read = UniformViews(ClipSampler(8, 8, 4), clips=2, crops=1, crop=32, short_side=32)
    for answer, path in zip(answers, (videos / "b.mkv", videos / "more" / "a.mkv"), strict=True):
        assert (answer["video"], answer["views"], answer["random_weights"]) == (str(path), 2, False)
        with torch.no_grad():
            expected = model(to_pathways(read(path), 4)).softmax(1).mean(0)
        found = {row["label"]: row["probability"] for row in answer["top"]}
        assert list(found.values()) == sorted(found.values(), reverse=True)
        torch.testing.assert_close(torch.tensor([found[name] for name in LABELS]), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("said", "options", "activation"),
    [
        ({"cfg": "MODEL:\n  ARCH: slowfast\n  HEAD_ACT: sigmoid\n"}, [], "sigmoid"),  # as PySlowFast writes it
        ({"activation": "sigmoid"}, [], "sigmoid"),
        ({"activation": "sigmoid"}, ["--activation", "softmax"], "softmax"),
        ({"cfg": "MODEL:\n  ARCH: slowfast\n"}, [], "softmax"),
        ({}, ["--activation", "sigmoid"], "sigmoid"),
    ],
)
def test_classes_that_do_not_exclude_one_another(
    videos: Path, checkpoint: Path, said: dict[str, str], options: list[str], activation: str
) -> None:
    """The option decides, else the checkpoint, else the model; JSON says which it was."""
    state = torch.load(checkpoint)
    torch.save({"model_state": state, **said}, checkpoint)
    result = cli(*SMALL, "--checkpoint", checkpoint, "--classes", 3, *options, "--json", videos / "b.mkv")
    assert result.exit_code == 0, result.output
    (answer,) = json.loads(result.stdout)
    assert answer["activation"] == activation
    model = create_model(MODEL, model_num_class=3).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        scores = model(to_pathways(UniformViews(ClipSampler(), 2, 1, 32, 32)(videos / "b.mkv"), 4))
    expected = (scores.sigmoid() if activation == "sigmoid" else scores.softmax(1)).mean(0)
    found = {row["label"]: row["probability"] for row in answer["top"]}
    torch.testing.assert_close(torch.tensor([found[f"class {i}"] for i in range(3)]), expected, rtol=1e-3, atol=1e-4)


def test_multi_label_models_are_known() -> None:
    """Charades has several classes at a time, and so has AVA."""
    with_sigmoid = [name for name in list_models() if entry(name).activation == "sigmoid"]
    assert with_sigmoid == ["slowfast_r50_ava", "slowfast_r101_nln_ava", "slowfast_r50_16x8_charades"]
    classifier = Classifier("slowfast_r50_16x8_charades", depth=18, width=16, views=(1, 1), crop=224)
    assert classifier.activation == "sigmoid"


def test_text_plot_and_what_cannot_be_read(videos: Path, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    sound = write_sound(tmp_path / "sound.mp4")
    result = cli(*SMALL, "--checkpoint", checkpoint, "--classes", 3, "--plot", tmp_path / "out", sound, videos)
    assert result.exit_code == 1
    assert f"Error: {sound}: " in result.stderr
    assert f"{videos / 'b.mkv'} (2 views)" in result.stdout
    assert result.stdout.count("%  class ") == 6
    assert "classifying" in result.stderr, "the progress bar, of which a pipe sees the label"
    drawn = sorted((tmp_path / "out").iterdir())
    assert [path.name.endswith(("_b.png", "_more_a.png")) for path in drawn] == [True, True]
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in drawn)


def test_frames_of_a_plot() -> None:
    """Five frames in rows of three, in order, each with a white line around it; white where there is none."""
    frames = torch.randint(255, (5, 4, 6, 3), dtype=torch.uint8)
    picture = _mosaic(frames, 3)
    assert picture.shape == (2 * 6, 3 * 8, 3)
    for i, frame in enumerate(frames):
        top, left = i // 3 * 6, i % 3 * 8
        assert torch.equal(picture[top + 1 : top + 5, left + 1 : left + 7], frame)
        picture[top + 1 : top + 5, left + 1 : left + 7] = 255
    assert (picture == 255).all()


def test_random_weights_are_asked_for_and_named(videos: Path) -> None:
    refused = cli(*SMALL, videos)
    assert refused.exit_code == 2
    assert "give the network's weights with --checkpoint FILE, or --random-weights" in refused.stderr
    result = cli(*SMALL, "--random-weights", "--top", 2, "--json", videos / "b.mkv")
    assert result.exit_code == 0, result.output
    assert "The weights are random: the answers mean nothing." in result.stderr
    (answer,) = json.loads(result.stdout)
    assert answer["random_weights"] is True
    assert len(answer["top"]) == 2


def test_one_pathway(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = []

    def pack(*arguments: object, **options: object) -> list[Tensor]:
        packed.append(ops.pack_pathways(*arguments, **options))
        return packed[-1]

    monkeypatch.setattr("slowfast_fast.classify.ops", SimpleNamespace(pack_pathways=pack))
    classifier = Classifier("resnet2d_r18", classes=4, views=(1, 2), crop=32)
    answer = classifier(videos / "b.mkv", top=9)
    assert [len(clips) for clips in packed] == [1], "no slow clip is made for a network that takes none"
    assert (answer.views, len(answer.top)) == (2, 4)
    assert sum(probability for _, probability in answer.top) == pytest.approx(1, abs=1e-5)
    assert answer.frames.shape == (8, 32, 32, 3)
    assert classifier.slow_frames() == []


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--random-weights", "absent.mp4"], 1, "absent.mp4: no such file"),
        (["--random-weights", "."], 1, "no videos (.avi, "),
        (["--random-weights", "--views", "10", "."], 2, "expected clips x crops, as 10x3; got '10'"),
        (["--random-weights", "--model", "slowfast", "video.mkv"], 2, "no model is named 'slowfast'"),
        (["--random-weights", "--model", "slowfast_r50_ava", "video.mkv"], 2, "classifies boxes, not videos"),
        (["--random-weights", "--activation", "tanh", "video.mkv"], 2, "'tanh' is not one of 'softmax', 'sigmoid'"),
        (["--checkpoint", "absent.pth", "video.mkv"], 1, "absent.pth"),
    ],
)
def test_what_is_refused(
    arguments: list[str], status: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "video.mkv" in arguments:
        Path("video.mkv").touch()
    result = cli(*arguments)
    assert result.exit_code == status, result.output
    assert message in result.stderr


def test_a_checkpoint_of_other_classes(videos: Path, checkpoint: Path) -> None:
    result = cli(*SMALL, "--checkpoint", checkpoint, "--classes", 5, videos)
    assert result.exit_code == 1
    assert "shapes differ" in result.stderr


def test_labels(tmp_path: Path) -> None:
    for text in ('["a", "b"]', '{"\\"a\\"": 0, "b": 1}', '{"1": "b", "0": "a"}'):
        (tmp_path / "labels.json").write_text(text)
        assert read_labels(tmp_path / "labels.json") == ["a", "b"]
    (tmp_path / "labels.json").write_text('{"a": 1, "b": 3}')
    with pytest.raises(ValueError, match="numbers of classes must be 0 to 1, each once"):
        read_labels(tmp_path / "labels.json")


def test_files_are_taken_as_given(videos: Path) -> None:
    odd = videos / "no_extension"
    odd.touch()
    assert find_videos([odd, videos]) == [odd, videos / "b.mkv", videos / "more" / "a.mkv"]
