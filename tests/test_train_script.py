"""examples/train.py and examples/evaluate.py on clips cut from the two sample videos."""

from __future__ import annotations

import csv
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).parents[1] / "examples"
for module in ("av", "click", "matplotlib", "tqdm"):
    pytest.importorskip(module, reason=f"the examples need {module}")

from click.testing import CliRunner, Result  # noqa: E402
from video_testing import write_video  # noqa: E402

# 8 fast and 2 slow frames, through one block a stage.
LEARNING = "--depth 18 --width 16 --frames 2 --crop 64 --short-side 64 72 --dropout 0 --batch 8 --lr 0.03 --workers 0"
TINY = "--depth 18 --width 8 --frames 2 --crop 32 --short-side 32 40 --lr 0.01 --workers 0"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), *sys.path])}


def example(name: str) -> ModuleType:
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name)


def invoke(script: str, *arguments: object) -> Result:
    """The script in this process, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return CliRunner().invoke(example(script).main, [str(argument) for argument in arguments])
    finally:
        torch.set_num_threads(threads)


def run(script: str, *arguments: object) -> str:
    result = invoke(script, *arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "log.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """Clips of 16 frames of both videos, in train and val."""
    folder = tmp_path_factory.mktemp("clips")
    try:
        example("sample_clips").packaged_video("bikes.mp4")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    run("sample_clips", folder, "--length", 16, "--short-side", 72)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """A training folder that costs nothing to decode: two classes of noise."""
    for name in ("dark", "light"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(4):
            noise = torch.randint(0, 120, (16, 40, 40, 3), dtype=torch.uint8) + (100 if name == "light" else 0)
            write_video(tmp_path / "train" / name / f"{i}.mkv", noise)
    return tmp_path / "train"


def test_it_learns_to_tell_the_videos_apart(clips, tmp_path):
    out = tmp_path / "run"
    output = run(
        "train",
        clips / "train",
        "--val",
        clips / "val",
        "--out",
        out,
        *LEARNING.split(),
        "--epochs",
        20,
        "--log-every",
        4,
    )
    losses = [float(row["loss"]) for row in rows(out) if row["loss"]]
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
    assert output.count("validation loss") == 20
    assert (out / "loss.png").stat().st_size > 5000

    result = tmp_path / "evaluation.json"
    arguments = (
        out / "checkpoint.pt",
        clips / "train",
        "--workers",
        0,
        "--crop",
        64,
        "--views",
        "2x3",
        "--json",
        result,
    )
    assert "16 videos: top-1" in run("evaluate", *arguments)
    frozen = json.loads(result.read_text())
    assert (frozen["views"], frozen["network"]) == ("2x3", "frozen")
    assert frozen["top1"] >= 15 / 16
    assert frozen["top5"] == 1
    for other in ("--no-freeze", "--stock"):
        run("evaluate", *arguments, other)
        for a, b in zip(json.loads(result.read_text())["videos"], frozen["videos"], strict=True):
            assert a["video"] == b["video"]
            assert a["top5"] == pytest.approx(b["top5"], abs=1e-4)


def test_a_killed_run_resumes_to_the_same_losses(folder, tmp_path):
    arguments = [
        folder,
        "--val",
        folder,
        *TINY.split(),
        "--epochs",
        8,
        "--batch",
        3,
        "--log-every",
        1,
        "--save-every",
        3,
    ]
    run("train", *arguments, "--out", tmp_path / "whole")

    out = tmp_path / "killed"
    command = [sys.executable, EXAMPLES / "train.py", *map(str, arguments), "--out", out]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (out / "checkpoint.pt").exists() or len(rows(out)) < 4:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert 0 < saved["step"] < 16, "killed in the middle"
    assert saved["activation"] == "softmax", "that of the cross-entropy; classify reads it"

    result = invoke("train", *arguments, "--out", out)
    assert result.exit_code != 0
    assert "continue with --resume" in result.output
    run("train", *arguments, "--out", out, "--resume")
    assert rows(out) == rows(tmp_path / "whole"), "every loss, to the last bit"
    states = [
        torch.load(path / "checkpoint.pt", weights_only=True)["model_state"] for path in (out, tmp_path / "whole")
    ]
    assert all(torch.equal(a, b) for a, b in zip(*map(dict.values, states), strict=True))

    result = invoke("train", *arguments, "--out", out, "--resume", "--width", 16)
    assert "has width = 8, got 16" in result.output


def test_two_processes(folder, tmp_path):
    """torchrun with gloo: both halves of each batch train one network."""
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        EXAMPLES / "train.py",
    ]
    arguments = [
        folder,
        "--val",
        folder,
        "--out",
        out,
        *TINY.split(),
        "--epochs",
        2,
        "--batch",
        2,
        "--log-every",
        1,
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        [*command, *map(str, arguments)], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [int(row["step"]) for row in rows(out) if row["loss"]]
    assert steps == [1, 2, 3, 4], "8 videos, 2 processes, 2 clips each, 2 epochs; one process writes"
    assert torch.load(out / "checkpoint.pt", weights_only=True)["model_state"]["blocks.6.proj.bias"].shape == (2,)


def test_stock_has_the_same_losses(folder, tmp_path):
    arguments = [folder, *TINY.split(), "--epochs", 2, "--batch", 4, "--log-every", 1]
    losses = []
    for name, option in (("ours", []), ("stock", ["--stock"])):
        run("train", *arguments, "--out", tmp_path / name, *option)
        losses.append([float(row["loss"]) for row in rows(tmp_path / name)])
    assert len(losses[0]) == 4
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4), "what rounding comes to in three steps"


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_autocast(folder, tmp_path, amp):
    arguments = [folder, *TINY.split(), "--epochs", 1, "--batch", 4, "--log-every", 1]
    run("train", *arguments, "--out", tmp_path / "float32")
    run("train", *arguments, "--out", tmp_path / amp, "--amp", amp)
    losses = [[float(row["loss"]) for row in rows(tmp_path / name)] for name in ("float32", amp)]
    assert losses[1][0] != losses[0][0]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.02)
    assert torch.load(tmp_path / amp / "checkpoint.pt", weights_only=True)["scaler"].get("scale", 1) > 0


def test_named_models(folder, tmp_path):
    """Of one pathway and of two, on another crop and another number of frames than they are made for."""
    for model in ("slow_r50_8x8", "slowfast_r18_8x8", "resnet2d_r18", "slowfast_convlstm"):
        out = tmp_path / model
        options = [
            "--frames",
            4,
            "--tau",
            4,
            "--crop",
            32,
            "--short-side",
            32,
            40,
            "--width",
            8,
            "--workers",
            0,
            "--batch",
            4,
        ]
        run("train", folder, "--out", out, "--model", model, *options, "--epochs", 1)
        run("evaluate", out / "checkpoint.pt", folder, "--workers", 0, "--views", "1x1", "--no-freeze")


def test_wrong_options_are_told(folder, tmp_path):
    for options, message in (
        (["--batch", 9], "--batch: expected at most 8, an epoch's clips, got 9"),
        (["--crop", 50], "crop: expected a multiple of 32, got 50"),
        (["--crop", 96], "short_side: expected 96 (crop) <= smallest <= largest, got (32, 40)"),
        (["--model", "slowfast_r50_ava"], "slowfast_r50_ava is a detector"),
        (
            ["--model", "slowfast_convlstm", "--depth", 18],
            "depth: slowfast_convlstm takes no depth, got 18; of depth, width and alpha it takes width, alpha",
        ),
        (
            ["--model", "slow_r50_8x8", "--alpha", 4],
            "alpha: slow_r50_8x8 takes no alpha, got 4; of depth, width and alpha it takes depth, width",
        ),
        (["--model", "slowfast_r18_8x8", "--stock"], "stock: the plain network is there for create_slowfast alone"),
    ):
        result = invoke("train", folder, "--out", tmp_path / "run", *TINY.split(), *options)
        assert result.exit_code != 0
        assert message in " ".join(result.output.split())


def test_groups_and_schedule():
    recipes = example("recipes")
    network = nn.Sequential(nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4), nn.Linear(4, 2))
    decayed, rest = recipes.parameter_groups(network, 0.1)
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3, 1, 1, 1), (2, 4)]
    assert (len(rest["params"]), decayed["weight_decay"], rest["weight_decay"]) == (4, 0.1, 0)
    rates = [recipes.learning_rate(step, 10, 3, 0.8) for step in range(11)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[10] == pytest.approx(0)


def test_a_model_with_a_recipe_is_trained_by_it():
    recipes = example("recipes")
    given = {"epochs": None, "batch": 4, "optimizer": None, "lr": None, "weight_decay": None, "clip_grad": None}
    expected = {"epochs": 100, "batch": 4, "optimizer": "adam", "lr": 1e-4, "weight_decay": 1e-4, "clip_grad": None}
    assert recipes.with_defaults("slowfast_convlstm", given) == expected
    assert recipes.with_defaults(None, given) == {**recipes.PAPER, "batch": 4, "clip_grad": None}


def test_a_checkpoint_is_whole_or_the_old_one(tmp_path, monkeypatch):
    checkpoints = example("checkpoints")
    path = tmp_path / "checkpoint.pt"
    checkpoints.write(path, {"step": 1})

    def killed(checkpoint: object, file: object) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.write(path, {"step": 2})
    assert torch.load(path, weights_only=True) == {"step": 1}
