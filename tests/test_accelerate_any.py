"""accelerate on networks that hypothesis draws: what varies between the libraries' configurations, and frozen parts."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from library_testing import assert_same, clips, stock
from stock_models import LIBRARIES, Plan
from torch import nn

import slowfast_fast

pytest.importorskip("hypothesis", reason="configurations are drawn by hypothesis, which is not installed")
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("one_thread")

NORMS = {
    "BatchNorm3d": nn.BatchNorm3d,
    "cumulative": partial(nn.BatchNorm3d, momentum=None),
    "untracked": partial(nn.BatchNorm3d, track_running_stats=False),
    "not affine": partial(nn.BatchNorm3d, affine=False),
    "GroupNorm": partial(nn.GroupNorm, 1),
}


@st.composite
def networks(draw: st.DrawFn) -> tuple[str, Plan]:
    library = draw(st.sampled_from(list(LIBRARIES)))
    kernels = st.tuples(*[st.sampled_from([1, 3, 5])] * 4)
    norm = NORMS[draw(st.sampled_from(list(NORMS)))]
    activation = nn.ReLU
    if library == "pytorchvideo":  # the only one that has them
        norm = draw(st.sampled_from([norm, norm, None]))
        activation = draw(st.sampled_from([nn.ReLU, nn.ReLU, nn.SiLU, None]))
    ratio = draw(st.sampled_from([2, 4, 8]))
    return library, Plan(
        depths=draw(st.tuples(*[st.integers(1, 2)] * 4)),
        width=ratio * draw(st.sampled_from([2, 3])),
        beta_inverse=ratio,
        alpha=8 if library == "r1c7" else draw(st.sampled_from([2, 4])),
        fusion_kernel=draw(st.sampled_from([1, 5, 7])),
        fusion_norm=draw(st.booleans()),
        classes=draw(st.integers(2, 9)),
        kernels=(draw(kernels), draw(kernels)),
        dilations=draw(st.tuples(*[st.sampled_from([1, 2])] * 4)),
        strides=(1, 2, 2, 2),
        pathways=1 if library != "r1c7" and draw(st.integers(0, 4)) == 0 else 2,
        pool=(1, 1),
        frames=2,
        norm=norm,
        activation=activation,
    )


@given(networks(), st.sampled_from(["none", "parameters", "norms", "stage"]), st.integers(0, 2**31))
@settings(max_examples=25)
def test_random_networks(network: tuple[str, Plan], frozen: str, seed: int) -> None:
    library, plan = network
    torch.manual_seed(seed)
    model = stock(library, plan)
    modules = [module for module in model.modules() if not list(module.children())]
    for module in modules[:: 1 if frozen == "norms" else 3]:
        if frozen == "parameters":
            module.requires_grad_(False)
        elif frozen == "norms" and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    if frozen == "stage":
        next(m for m in model.modules() if type(m) is nn.Sequential or "Stage" in type(m).__name__).eval()
    accelerated = copy.deepcopy(model)
    slowfast_fast.accelerate(accelerated)
    # More values for BatchNorm than a clip of two has at the last stage, so that rounding stays small.
    assert_same(accelerated, model, clips(library, plan, batch=3, size=48))
