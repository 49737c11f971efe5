"""The Python code of the README runs as it stands, top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run_in_order(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, object] = {}
    logits = []
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
        logits.append(names["logits"])
    assert torch.allclose(logits[-1], logits[0], atol=1e-4), "the frozen network's are the network's"
    assert names["logits"].shape == (1, 400)
    assert names["y"].shape == (2, 128, 8, 56, 56)
    assert names["out"].shape == (2, 80, 8, 56, 56)
    assert "temporal_conv" in capsys.readouterr().out, "explain prints its table"
