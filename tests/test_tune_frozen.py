"""The table that ``freeze`` reads, and the command that makes it, on a small network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from network_testing import SMALL, clips, distance
from torch import nn

from slowfast_fast import choosing, create_slowfast, explain, freeze, tune_frozen
from slowfast_fast.cli import main
from slowfast_fast.frozen import choices

pytestmark = pytest.mark.usefixtures("one_thread", "unknown_device")
CPU = torch.device("cpu")


@pytest.fixture
def unknown_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No table is known, and none that a test writes is kept."""
    monkeypatch.setattr(choosing, "TABLES", tmp_path)
    monkeypatch.setattr(choosing, "_tables", {})
    monkeypatch.setattr(choices, "_chosen", {})


def small_network(dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> nn.Module:
    torch.manual_seed(0)
    model = create_slowfast(**SMALL | {"model_depth": 50, "head_pool": nn.AdaptiveAvgPool3d})
    return freeze(model, dtype=dtype).to(device)


def ran(network: nn.Module) -> dict[str, tuple[str, str]]:
    """What each layer ran as and why, by its path."""
    rows = explain(network, clips(1, dtype=torch.float32), show=False).rows
    return {path: (f"{row.what} {row.backend}", row.reason) for row in rows for path in row.modules}


def test_a_table_decides() -> None:
    """For layers and blocks alike, whatever nothing was measured for goes by rule, and results are the same."""
    network, x = small_network(), clips(1, dtype=torch.float32)
    by_rule, expected = ran(network), network(x)
    blocks = {path for path, (what, _) in by_rule.items() if what.startswith("bottleneck")}
    assert blocks
    assert all("not measured on this device" in by_rule[path][1] for path in blocks)
    entries = {}
    for module in network.modules():
        if isinstance(module, tune_frozen.FrozenConv):
            key = choices.layer_key(module.weight.shape, module.stride, torch.float32, False)
            entries[key] = "spatial_conv" if module.is_spatial() else "temporal_conv"  # where it can
        if isinstance(module, tune_frozen.FrozenBlock) and module.geometry is not None:
            channels = (module.conv_a.weight.shape[1], *module.channels())
            projects = module.projection is not None
            key = choices.block_key(channels, module.geometry["stride"], projects, torch.float32, False)
            entries[key] = choices.LAYERS
    choosing._tables[choices.device_name("cpu", None)] = entries
    choices._chosen.clear()
    network = small_network()
    measured = ran(network)
    assert not [path for path, (what, _) in measured.items() if what.startswith("bottleneck")]
    for path in blocks:
        assert "block as layers: measured fastest for block fwd float32" in measured[path][1]
    changed = {path for path, (what, _) in measured.items() if what == "FrozenConv cpu"}
    assert changed > {path for path, (what, _) in by_rule.items() if what == "FrozenConv cpu"}
    assert all("measured fastest for layer fwd float32" in measured[path][1] for path in changed)
    assert distance(network(x), expected) < 1e-5


def test_an_entry_that_cannot_run_is_passed_over() -> None:
    able, name = ("onednn", "temporal_conv"), choices.device_name("cpu", None)
    choosing._tables[name] = {"known": "cudnn", "other": "temporal_conv"}
    assert choices.choose(able, "known", "cpu", None) == ("onednn", "not measured on this device")
    assert choices.choose(able, "other", "cpu", None)[0] == "temporal_conv"


def test_the_command_makes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Under the name and the keys that freeze asks for, with both candidates of each class."""
    quick: dict[str, Any] = {"crop": 32, "rounds": 1, "batch": 1, "network": small_network}
    made = tune_frozen.tune_frozen

    def small(device: torch.device, **options: Any) -> dict[str, Any]:
        assert options["batch"] == 1
        return made(device, **options | quick)

    monkeypatch.setattr(tune_frozen, "tune_frozen", small)
    result = CliRunner().invoke(main, ["tune", "--frozen", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    path = choosing.table_path(choices.device_name("cpu", None))
    assert path.parent == tmp_path
    table = json.loads(path.read_text())
    assert table["fastest"].keys() == table["microseconds"].keys()
    assert {key.split()[0] for key in table["fastest"]} == {"layer", "block"}
    for key, times in table["microseconds"].items():
        own = "spatial_conv" if "1x3x3" in key else "temporal_conv"
        assert set(times) == ({"bottleneck", "layers"} if key.startswith("block") else {"onednn", own})
        assert table["fastest"][key] == min(times, key=times.__getitem__)
    assert choosing._tables == {}, "the table in the making is not left in use"
    told = [reason for _, reason in ran(small_network()).values()]
    assert any("measured fastest for block" in reason for reason in told)
    assert any("measured fastest for layer" in reason for reason in told)
