"""The tests of what training code does with create_slowfast's networks, with an accelerated one of pytorchvideo's names
in its place."""

from __future__ import annotations

import pytest
import test_training_code
import torch
from stock_models import LIBRARIES, Plan
from test_training_code import *  # noqa: F403  (the tests themselves)
from torch import nn

import slowfast_fast
from slowfast_fast.reference.slowfast import SlowFast

pytestmark = pytest.mark.usefixtures("one_thread")

PLAN = Plan(depths=(1, 1, 1, 1), width=16, beta_inverse=4, classes=7, pool=(1, 1), frames=2)


def accelerated_pair(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    model, stock = LIBRARIES["pytorchvideo"].build(PLAN).to(dtype), SlowFast(**test_training_code.SMALL).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    stock.load_state_dict(model.state_dict())
    slowfast_fast.accelerate(model)
    return model, stock


@pytest.fixture(autouse=True)
def accelerated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_training_code, "pair", accelerated_pair)


# The first builds its network with create_slowfast's arguments; the second compiles what the graph of
# test_compiled_whole holds, which is the same for both networks.
del test_norm_that_is_no_batch_norm, test_compiled_by_inductor  # noqa: F821
