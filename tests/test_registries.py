"""How libraries come to build accelerated networks by themselves."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from installed_pytorchvideo import pytorchvideo_slowfast
from library_testing import SMALL, assert_same
from stock_models import LIBRARIES
from torch import nn

import slowfast_fast
from slowfast_fast.compat import mmaction2, pyslowfast, pytorchvideo


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts modules with some attributes among the imported ones."""

    def put(**contents: dict[str, Any]) -> None:
        for name, attributes in contents.items():
            module = ModuleType(name.replace("__", "."))
            vars(module).update(attributes)
            monkeypatch.setitem(sys.modules, module.__name__, module)

    return put


@pytest.fixture
def library() -> ModuleType:
    slowfast = pytorchvideo_slowfast()
    importlib.import_module("pytorchvideo.models.hub.slowfast")
    return slowfast


KEYWORDS = {
    "model_depth": 18,
    "slowfast_channel_reduction_ratio": 4,
    "stem_dim_outs": (16, 4),
    "head_pool_kernel_sizes": ((2, 1, 1), (8, 1, 1)),
}


def is_ours(model: nn.Module) -> bool:
    return type(model).__module__.startswith("slowfast_fast.")


def test_pytorchvideo_builds_ours_until_undone(library: ModuleType, modules: Any) -> None:
    stock, hub = library.create_slowfast, importlib.import_module("pytorchvideo.models.hub.slowfast")
    builder = hub._slowfast.__defaults__
    modules(somebodys_training={"build_model": stock, "create_slowfast": stock})
    somebodys = sys.modules["somebodys_training"]
    patched = pytorchvideo.patch()
    for build in (library.create_slowfast, hub.create_slowfast, somebodys.build_model, somebodys.create_slowfast):
        assert is_ours(build(**KEYWORDS))
    assert is_ours(hub._slowfast(**KEYWORDS))  # by its default argument
    with pytest.raises(RuntimeError, match=r"patched already; undo\(\)"):
        pytorchvideo.patch()
    modules(imported_later={"create_slowfast": library.create_slowfast})
    patched.undo()
    later = sys.modules["imported_later"]
    for build in (library.create_slowfast, hub.create_slowfast, somebodys.build_model, later.create_slowfast):
        assert build is stock
    assert hub._slowfast.__defaults__ == builder
    assert not is_ours(hub._slowfast(**KEYWORDS))
    assert is_ours(slowfast_fast.create_slowfast(**KEYWORDS))
    with pytorchvideo.patch():
        assert library.create_slowfast is not stock
    assert library.create_slowfast is stock


def test_accelerated_pytorchvideo_is_what_it_was(library: ModuleType) -> None:
    """The installed library's own network: evaluation and a training step."""
    model = library.create_slowfast(**KEYWORDS, dropout_rate=0.0, model_num_class=7).double()
    expected = library.create_slowfast(**KEYWORDS, dropout_rate=0.0, model_num_class=7).double()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    expected.load_state_dict(model.state_dict())
    report = slowfast_fast.accelerate(model)
    assert report.libraries == ("pytorchvideo",)
    assert report.left == ()
    assert sum(not row.reason for row in report.layers) == 22
    clips = [torch.randn(2, 3, frames, 32, 32, dtype=torch.float64) for frames in (2, 8)]
    assert_same(model, expected, clips)


class Registry(dict):
    """mmengine's, as far as it is used."""

    def register_module(self, name: str, force: bool, module: Any) -> None:
        assert force or name not in self
        self[name] = module


def test_mmaction2_s_registry(modules: Any) -> None:
    """Against a stand-in of mmaction2's modules and of mmengine's registry."""
    kind = LIBRARIES["mmaction2"].ResNet3dSlowFast
    registry = Registry(ResNet3dSlowFast=kind)
    modules(
        mmaction={},
        mmaction__models={},
        mmaction__models__backbones={"ResNet3dSlowFast": kind},
        mmaction__registry={"MODELS": registry},
    )
    undo = mmaction2.register()
    built = registry["ResNet3dSlowFast"](plan=SMALL, resample_rate=4)
    assert isinstance(built, kind)
    assert type(built) is not kind
    undo()
    assert registry["ResNet3dSlowFast"] is kind


def test_pyslowfast_s_registry(modules: Any) -> None:
    """With fvcore's registry, which is PySlowFast's."""
    registry_module = pytest.importorskip("fvcore.common.registry", reason="fvcore comes with pytorchvideo")
    registry, kind = registry_module.Registry("MODEL"), LIBRARIES["pyslowfast"].SlowFast
    registry.register(kind)
    modules(
        slowfast={},
        slowfast__models={},
        slowfast__models__build={"MODEL_REGISTRY": registry},
        slowfast__models__video_model_builder={"SlowFast": kind},
    )
    pyslowfast.register()
    pyslowfast.register()
    built = registry.get("SlowFastFast")(SMALL)
    assert isinstance(built, kind)
    assert not any(row.reason.startswith("not") for row in slowfast_fast.accelerate(built).left)
    assert type(registry.get("SlowFast")(SMALL)) is kind


@pytest.mark.parametrize("helper", [pytorchvideo.patch, mmaction2.register, pyslowfast.register])
def test_without_the_library(helper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pytorchvideo", "pytorchvideo.models.slowfast", "mmaction", "mmaction.models.backbones", "slowfast"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "slowfast.models.build", None)
    with pytest.raises(ImportError, match="cannot be imported"):
        helper()
