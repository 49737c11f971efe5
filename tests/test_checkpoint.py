"""load_checkpoint and the command line: every kind of file, and no file is trusted."""

from __future__ import annotations

import os
import pickle
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from library_testing import SMALL, stock
from torch import Tensor, nn

import slowfast_fast
from slowfast_fast.cli import main
from slowfast_fast.compat import CheckpointError

np = pytest.importorskip("numpy", reason="Caffe2's files hold numpy arrays")


def same(model: nn.Module, expected: nn.Module) -> None:
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


FILES = {
    "PySlowFast, pytorchvideo": ("x.pyth", lambda s: {"epoch": 3, "model_state": s, "cfg": "a: 1"}),
    "Lightning": ("x.ckpt", lambda s: {"state_dict": prefixed("model.", s), "epoch": 1}),
    "distributed": ("x.pth", lambda s: prefixed("module.", s)),
    "compiled, distributed": ("x.pt", lambda s: {"model_state": prefixed("_orig_mod.module.", s)}),
}


@pytest.mark.parametrize("file", FILES)
def test_files_of_torch_save(file: str, tmp_path: Path) -> None:
    name, wrap = FILES[file]
    given, model = stock("pytorchvideo"), stock("pytorchvideo")
    torch.save(wrap(given.state_dict()), tmp_path / name)
    slowfast_fast.load_checkpoint(tmp_path / name, model)
    same(model, given)


def test_from_one_library_s_file_into_another_s_model(tmp_path: Path) -> None:
    """mmaction2's weights through PySlowFast's model (which is distributed) back into mmaction2's."""
    given, between, model = stock("mmaction2"), stock("pyslowfast"), stock("mmaction2")
    torch.save({"meta": {}, "state_dict": given.state_dict()}, tmp_path / "mm.pth")
    wrapped = nn.Module()
    wrapped.module = between
    summary = str(slowfast_fast.load_checkpoint(tmp_path / "mm.pth", wrapped))
    assert summary.startswith("mmaction2 -> pyslowfast: ")
    assert "(2 stems, 4 lateral connections, 10 residual blocks, 1 classifier)" in summary
    assert "the classifier's columns went from [fast | slow] to [slow | fast]" in summary
    torch.save({"model_state": between.state_dict()}, tmp_path / "psf.pyth")
    slowfast_fast.load_checkpoint(tmp_path / "psf.pyth", model)
    same(model, given)


def test_accelerated_models_load_too(tmp_path: Path) -> None:
    given, model = stock("gluoncv"), stock("gluoncv")
    slowfast_fast.accelerate(model)
    torch.save(given.state_dict(), tmp_path / "x.pth")
    slowfast_fast.load_checkpoint(tmp_path / "x.pth", model)
    same(model, given)


def test_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is in the test extra")
    given, model = stock("gluoncv"), stock("gluoncv")
    safetensors.save_file(dict(given.state_dict()), tmp_path / "x.safetensors")
    slowfast_fast.load_checkpoint(tmp_path / "x.safetensors", model)
    same(model, given)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors cannot be read: "):
        slowfast_fast.load_checkpoint(tmp_path / "cut.safetensors", model)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"slowfast-fast\[checkpoints\]"):
        slowfast_fast.load_checkpoint(tmp_path / "x.safetensors", model)


def blobs(model: nn.Module) -> dict[str, Any]:
    """A PySlowFast state_dict under Caffe2's names, written out by hand, with what else such files hold."""
    tensors = {"weight": "w", "bias": "b"}
    norms = {"weight": "bn_s", "bias": "bn_b", "running_mean": "bn_rm", "running_var": "bn_riv"}
    found: dict[str, Any] = {"lr": np.float32(0.1), "model_iter": 5, "conv1_w_momentum": np.zeros(3)}
    for key, value in model.state_dict().items():
        parts, tensor = key.split(".")[:-1], key.split(".")[-1]
        norm = parts[-1].endswith("bn")
        if tensor == "num_batches_tracked":
            continue
        suffix = (norms if norm else tensors)[tensor]
        stage = int(parts[0][1]) if parts[0][0] == "s" else 0
        fast = "t_" if len(parts) > 1 and "pathway1" in parts[1] else ""
        if parts[0] == "head":
            name = f"pred_{suffix}"
        elif parts[0].endswith("_fuse"):
            before = "t_pool1" if stage == 1 else f"t_res{stage}_{len(SMALL.depths) - 2}_branch2c_bn"
            name = f"{before}_subsample_{suffix}"
        elif stage == 1:
            name = f"{fast}{'res_conv1' if norm else 'conv1'}_{suffix}"
        elif "nonlocal" in parts[1]:
            layer = "" if norm else f"{parts[2].removeprefix('conv_')}_"
            name = f"nonlocal_conv{stage}_{parts[1][-1]}_{layer}{suffix}"
        else:
            branch = "1" if parts[2].startswith("branch1") else f"2{parts[3][0]}"
            name = f"{fast}res{stage}_{parts[1][-1]}_branch{branch}_{suffix}"
        found[name] = value.numpy()
    found["pred_w"] = found["pred_w"][:, :, None, None, None]
    return found


@pytest.mark.parametrize("protocol", [2, 4])
def test_caffe2_files(protocol: int, tmp_path: Path) -> None:
    plan = replace(SMALL, nonlocal_blocks=((1, 0), (1, 1)))
    given, model = stock("pyslowfast", plan), stock("pyslowfast", plan)
    content = OrderedDict(blobs=blobs(given), names=("a", ["b", {1}]))
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    summary = str(slowfast_fast.load_checkpoint(tmp_path / "x.pkl", model))
    same(model, given)
    assert "2 non-local blocks" in summary
    assert "num_batches_tracked were missing and are 0" in summary


class RunsCode:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.parametrize("function", [os.system, eval, exec, Path.touch, np.load, np.fromfile, getattr])
def test_a_file_that_runs_code_is_refused(function: Any, suffix: str, tmp_path: Path) -> None:
    """Nothing that the file names is called, or even imported."""
    victim, file = tmp_path / "victim", tmp_path / f"x{suffix}"
    code = f"touch {victim}" if function is os.system else f"open({str(victim)!r}, 'w')"
    evil = RunsCode(function, victim if function is Path.touch else code)
    content = {"blobs": {"conv1_w": evil}}
    if suffix == ".pkl":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=rf"x\{suffix} is refused: "):
        slowfast_fast.load_checkpoint(file, stock("pyslowfast"))
    assert not victim.exists()


@pytest.mark.parametrize(
    "attack",
    [
        b"cnot_installed_anywhere\nrun\n.",
        b"\x80\x02cnumpy.core.multiarray\n__dict__\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0bndarray.tofile\x93.",  # a dotted name: an attribute of what is admitted
        b"\x80\x02c_codecs\nencode\nX\x04\x00\x00\x00evilX\x06\x00\x00\x00base64\x86R.",
        b"\x80\x02X\x01\x00\x00\x00aQ.",  # a persistent id
        b"\x80\x02c_codecs\nencode\n}X\x08\x00\x00\x00__call__K\x01sb.",  # sets an attribute of what is admitted
    ],
)
def test_pickles_made_by_hand_are_refused(attack: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(attack)
    with pytest.raises(CheckpointError, match=r"x\.pkl (is refused|cannot be read): "):
        slowfast_fast.load_checkpoint(tmp_path / "x.pkl", stock("pyslowfast"))
    assert "not_installed_anywhere" not in sys.modules


def test_damaged_and_wrong_files(tmp_path: Path) -> None:
    model = stock("pytorchvideo")
    whole = tmp_path / "whole.pth"
    torch.save(model.state_dict(), whole)
    pickled = pickle.dumps({"blobs": {"conv1_w": np.zeros((4, 3))}})
    contents = {
        "cut.pth": whole.read_bytes()[:-5000],
        "empty.pth": b"",
        "text.pth": b"<html>not found</html>",
        "cut.pkl": pickled[:-9],
        "empty.pkl": b"",
        "text.pkl": b"<html>not found</html>",
        "number.pkl": pickle.dumps(3),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name} (cannot be read|is refused): \S"):
            slowfast_fast.load_checkpoint(tmp_path / name, model)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match=r"list\.pth holds no state_dict, but list"):
        slowfast_fast.load_checkpoint(tmp_path / "list.pth", model)
    torch.save({"epoch": 3, "weights": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth holds no state_dict: epoch are no tensors; looked for"):
        slowfast_fast.load_checkpoint(tmp_path / "other.pth", model)
    with pytest.raises(FileNotFoundError):
        slowfast_fast.load_checkpoint(tmp_path / "none.pth", model)


def test_what_does_not_fit_is_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    model = stock("pytorchvideo")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save(stock("pytorchvideo", replace(SMALL, depths=(1, 1, 1, 1))).state_dict(), tmp_path / "shallow.pth")
    with pytest.raises(
        CheckpointError, match=r"needed, but not given \(36\):\n    blocks\.2\.multipathway_blocks\.0\.res"
    ):
        slowfast_fast.load_checkpoint(tmp_path / "shallow.pth", model)
    torch.save(stock("mmaction2", replace(SMALL, classes=9)).state_dict(), tmp_path / "classes.pth")
    with pytest.raises(
        CheckpointError, match=r"shapes differ\n    blocks\.6\.proj\.weight: \(9, 640\) in the file, \(7,"
    ):
        slowfast_fast.load_checkpoint(tmp_path / "classes.pth", model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_command_line(tmp_path: Path) -> None:
    given, model = stock("mmaction2"), stock("pytorchvideo")
    torch.save({"state_dict": given.state_dict()}, tmp_path / "in.pth")
    for name in ("out.pyth", "out.safetensors"):
        result = CliRunner().invoke(
            main, ["convert", str(tmp_path / "in.pth"), str(tmp_path / name), "--to", "pytorchvideo"]
        )
        assert result.exit_code == 0, result.output
        assert "mmaction2 -> pytorchvideo: " in result.output
        assert f"written: {tmp_path / name}" in result.output
        slowfast_fast.load_checkpoint(tmp_path / name, model)
    assert set(torch.load(tmp_path / "out.pyth", weights_only=True)) == {"model_state"}
    expected = slowfast_fast.convert_state_dict(given.state_dict(), source="mmaction2", target="pytorchvideo")
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_command_line_says_what_is_wrong(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "in.pth")
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"blobs": RunsCode(os.system, "true")}))
    for file, target, message in (
        ("in.pth", "pytorchvideo", "has no keys of a known library; it has a"),
        ("bad.pkl", "pytorchvideo", "is refused: it refers to posix.system, which is neither an array nor a plain"),
        ("in.pth", "ptv", "target must be one of pytorchvideo"),
    ):
        arguments = ["convert", str(tmp_path / file), str(tmp_path / "out.pth"), "--to", target]
        result = CliRunner().invoke(main, arguments + (["--from", "pytorchvideo"] if target == "ptv" else []))
        assert result.exit_code != 0
        assert message in result.output.replace("\n", " ")
    assert not (tmp_path / "out.pth").exists()
