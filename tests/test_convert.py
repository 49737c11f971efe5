"""convert_state_dict between all five spellings."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from library_testing import SMALL, clips, run, stock
from network_testing import TOLERANCE, distance
from stock_models import LIBRARIES, Plan
from torch import Tensor, nn

import slowfast_fast
from slowfast_fast.compat import CheckpointError
from slowfast_fast.nn.lateral import FastToSlowFusionBuilder

pytestmark = pytest.mark.usefixtures("one_thread")

# What r1c7 can say: no norms in the lateral connections, no bias, alpha 8, kernel 5.
BARE = replace(SMALL, fusion_norm=False, classifier_bias=False, alpha=8, fusion_kernel=5)


def without_bias(state: dict[str, Tensor], classifier: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != f"{classifier}.bias"}


CLASSIFIERS = {
    "pytorchvideo": "blocks.6.proj",
    "pyslowfast": "head.projection",
    "mmaction2": "cls_head.fc_cls",
    "gluoncv": "fc",
    "r1c7": "fc",
}


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(CLASSIFIERS, 2)))
def test_there_and_back(source: str, target: str) -> None:
    bare = "r1c7" in (source, target)
    plan = BARE if bare else SMALL
    state = stock("r1c7" if bare else source, plan).state_dict()
    if bare and source != "r1c7":
        state = slowfast_fast.convert_state_dict(state, source="r1c7", target=source)
    there = slowfast_fast.convert_state_dict(state, source=source, target=target)
    back = slowfast_fast.convert_state_dict(there, source=target, target=source)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())
    if not bare:  # the other library's network has exactly these keys
        expected = LIBRARIES[target].build(plan).state_dict()
        assert list(there.keys() ^ expected.keys()) == []
        assert all(there[key].shape == value.shape for key, value in expected.items())
    elif target == "r1c7":
        assert there.keys() == LIBRARIES["r1c7"].build(plan).state_dict().keys()
    changed = [key for key, value in there.items() if not any(value is tensor for tensor in state.values())]
    allowed = {f"{CLASSIFIERS[target]}.weight", f"{CLASSIFIERS[target]}.bias"}
    assert set(changed) <= allowed


def ours(plan: Plan) -> nn.Module:
    """create_slowfast's network of a plan, in evaluation."""
    lateral = FastToSlowFusionBuilder(
        plan.beta_inverse,
        2,
        (plan.fusion_kernel, 1, 1),
        (plan.alpha, 1, 1),
        norm=nn.BatchNorm3d if plan.fusion_norm else None,
        activation=nn.ReLU if plan.fusion_norm else None,
    )
    arguments: dict[str, Any] = {
        "model_depth": 18,
        "slowfast_channel_reduction_ratio": plan.beta_inverse,
        "slowfast_fusion_conv_stride": (plan.alpha, 1, 1),
        "stem_dim_outs": (plan.width, plan.width // plan.beta_inverse),
        "model_num_class": plan.classes,
        "head_pool": nn.AdaptiveAvgPool3d,
    }
    return slowfast_fast.create_slowfast(**arguments, fusion_builder=lateral.create_module).double().eval()


@pytest.mark.parametrize(
    ("source", "fusion_norm"),
    [
        ("pytorchvideo", True),
        ("pytorchvideo", False),
        ("pyslowfast", True),
        ("mmaction2", True),
        ("mmaction2", False),
        ("gluoncv", True),
        ("r1c7", False),
    ],
)
def test_the_network_is_the_same(source: str, fusion_norm: bool) -> None:
    """Each library's, loaded into ours, gives the same logits: the columns, the norms and the pathways are right. So it
    does frozen, and so does the library's own, accelerated and frozen."""
    base = BARE if source == "r1c7" else replace(SMALL, fusion_norm=fusion_norm)
    plan = replace(base, depths=(1, 1, 1, 1))
    model = stock(source, plan).eval()
    for name, buffer in model.named_buffers():
        if not name.endswith("num_batches_tracked"):
            buffer.uniform_(0.5, 1.5)
    if source == "pyslowfast":
        model.head.act = nn.Identity()
    x = clips(source, plan)
    network = ours(plan)
    network.load_state_dict(
        slowfast_fast.convert_state_dict(model.state_dict(), source=source, target="pytorchvideo"), strict=True
    )
    pathways = x if isinstance(x, list) else [x[:, :, ::4], x] if plan.alpha == 4 else [x[:, :, ::16], x[:, :, ::2]]
    with torch.no_grad():
        assert distance(network(pathways), run(model, x)) < TOLERANCE
    slowfast_fast.accelerate(model)
    expected = run(model, x).detach()
    assert distance(slowfast_fast.freeze(network)(pathways), expected) < TOLERANCE
    with torch.no_grad():
        assert distance(run(slowfast_fast.freeze(model), x), expected) < TOLERANCE


def test_non_local_blocks() -> None:
    state = stock("pyslowfast", replace(SMALL, nonlocal_blocks=((1, 0),))).state_dict()
    with pytest.raises(CheckpointError) as raised:
        slowfast_fast.convert_state_dict(state, source="pyslowfast", target="gluoncv")
    extra = [key for key in state if "nonlocal" in key]
    assert len(extra) == 13
    assert [line.strip() for line in str(raised.value).splitlines()[2:]] == extra


def test_every_key_left_over_is_listed() -> None:
    state = dict(stock("pytorchvideo").state_dict())
    gone = [
        "blocks.0.multipathway_blocks.1.conv.weight",
        "blocks.1.multipathway_fusion.norm.running_var",
        "blocks.2.multipathway_blocks.0.res_blocks.1.branch2.conv_a.weight",
        "blocks.3.multipathway_fusion.conv_fast_to_slow.weight",
        "blocks.4.multipathway_blocks.1.res_blocks.0.branch2.norm_c.bias",
    ]
    for key in gone:
        del state[key]
    state |= {"epoch": torch.zeros(1), "blocks.7.proj.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError) as raised:
        slowfast_fast.convert_state_dict(state, source="pytorchvideo", target="pyslowfast")
    lines = [line.strip() for line in str(raised.value).splitlines()]
    assert lines[:4] == [
        "pytorchvideo -> pyslowfast: keys are left over",
        "given, but with no place (2):",
        "epoch",
        "blocks.7.proj.weight",
    ]
    assert set(lines[5:]) == {
        "s1.pathway1_stem.conv.weight",
        "s2_fuse.bn.running_var",
        "s3.pathway0_res1.branch2.a.weight",
        "s4_fuse.conv_f2s.weight",
        "s5.pathway1_res0.branch2.c_bn.bias",
    }


def test_what_r1c7_has_no_place_for() -> None:
    state = without_bias(stock("gluoncv").state_dict(), "fc")
    with pytest.raises(CheckpointError, match=r"given, but with no place \(20\):\n    lateral_p1\.1\.weight"):
        slowfast_fast.convert_state_dict(state, source="gluoncv", target="r1c7")
    state = stock("mmaction2", replace(BARE, classifier_bias=True)).state_dict()
    with pytest.raises(CheckpointError, match="r1c7's classifier has no bias, and this one's is not 0"):
        slowfast_fast.convert_state_dict(state, source="mmaction2", target="r1c7")


def test_missing_counters_are_filled() -> None:
    state = stock("gluoncv").state_dict()
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    new = slowfast_fast.convert_state_dict(old, source="gluoncv", target="pytorchvideo")
    assert new.keys() == stock("pytorchvideo").state_dict().keys()
    assert all(value.dtype == torch.int64 and value == 0 for key, value in new.items() if key.endswith("tracked"))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"target must be one of pytorchvideo, .*, r1c7; got 'caffe2'"):
        slowfast_fast.convert_state_dict({}, source="r1c7", target="caffe2")
    with pytest.raises(ValueError, match=r"source must be one of .*caffe2; got 'ptv'"):
        slowfast_fast.convert_state_dict({}, source="ptv", target="r1c7")
    state = dict(stock("gluoncv").state_dict())
    state["fc.weight"] = torch.zeros(7, 99)
    with pytest.raises(CheckpointError, match="99 columns are not those of 512 slow and 128 fast features"):
        slowfast_fast.convert_state_dict(state, source="gluoncv", target="mmaction2")
