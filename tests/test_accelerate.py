"""slowfast_fast.accelerate: a network of every library gives the same as before, and stays what it was."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from library_testing import NETWORKS, SMALL, assert_same, clips, on_ops, pair, run, step, stock
from network_testing import TOLERANCE, distance, gradients, statistics
from stock_models import LIBRARIES, Plan, pyslowfast
from torch import Tensor, nn

import slowfast_fast

pytestmark = pytest.mark.usefixtures("one_thread")


def fused_layers(report: slowfast_fast.compat.Report) -> int:
    return sum(not row.reason for row in report.layers)


@pytest.mark.parametrize(("library", "pathways"), NETWORKS)
def test_same_numbers(library: str, pathways: int) -> None:
    """Also with non-local blocks, where the library's code takes views of its input."""
    plan = replace(SMALL, pathways=pathways, nonlocal_blocks=((1, 0), (2, 0)) if library == "pyslowfast" else ())
    model = stock(library, plan)
    accelerated = copy.deepcopy(model)
    report = slowfast_fast.accelerate(accelerated)
    assert report.libraries == ({"pyslowfast": "PySlowFast"}.get(library, library),)
    x = clips(library, plan)
    assert_same(accelerated, model, x)
    # a and c of every block, the shortcut of res2; of two pathways both, and the lateral connections.
    assert fused_layers(report) == on_ops(accelerated, x) == (2 * 11 + 4 if pathways == 2 else 11)
    assert on_ops(model, x) == 0


@pytest.mark.parametrize("library", LIBRARIES)
def test_it_stays_what_it_was(library: str) -> None:
    model = stock(library, SMALL)
    kinds = [type(module) for module in model.modules()]
    before = {
        "names": [(name, type(module).__name__) for name, module in model.named_modules()],
        "text": repr(model),
        "keys": list(model.state_dict()),
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }
    parameters, buffers = list(model.parameters()), list(model.buffers())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    state = torch.get_rng_state()
    slowfast_fast.accelerate(model)
    again = slowfast_fast.accelerate(model)
    assert len(again.accelerated) > 10
    assert torch.equal(torch.get_rng_state(), state)
    assert before == {
        "names": [(name, type(module).__name__) for name, module in model.named_modules()],
        "text": repr(model),
        "keys": list(model.state_dict()),
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), kinds, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))
    x, weight = clips(library), parameters[0].detach().clone()
    step(model, x)
    optimizer.step()
    assert not torch.equal(parameters[0], weight)
    slowfast_fast.restore(model)
    assert [type(module) for module in model.modules()] == kinds
    assert on_ops(model, x) == 0
    slowfast_fast.restore(model)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_stay_accelerated(library: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    model, _ = pair(library)
    x = clips(library)
    other = copied(model)
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    assert on_ops(other, x) == on_ops(model, x) > 0
    assert torch.equal(run(other.eval(), x), run(model.eval(), x))
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    assert not torch.equal(run(other, x), run(model, x))


@pytest.mark.no_sanitizer
@pytest.mark.parametrize("library", ["pyslowfast", "mmaction2"])  # pytorchvideo: with the training code
def test_compiled_in_one_graph(library: str) -> None:
    plan = replace(SMALL, depths=(1, 1, 1, 1))
    model, _ = pair(library, plan)
    x = clips(library, plan)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model.eval(), fullgraph=True, backend="eager")
        assert distance(run(compiled, x), run(model, x)) < TOLERANCE
    torch._dynamo.reset()


@pytest.mark.parametrize("library", LIBRARIES)
def test_hooks_see_every_module(library: str) -> None:
    """With a hook everywhere everything runs as modules; of a library's containers, too."""
    model, expected = pair(library)
    x, seen = clips(library), []
    handles = [
        module.register_forward_hook(lambda _m, _args, _out, name=name: seen.append(name))
        for name, module in model.named_modules()
    ]
    assert_same(model, expected, x, training=False)
    called = {name for name, module in model.named_modules() if type(module) not in (nn.ModuleList, nn.Softmax)}
    assert called - set(seen) <= {"backbone.slow_path", "backbone.fast_path", "avg"}  # never called in stock either
    for handle in handles:
        handle.remove()
    assert on_ops(model, x) == 26


def test_edits_after_acceleration() -> None:
    """Parts are looked up at every forward: replaced, removed, of another kind, with a forward of their own."""

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    model, expected = pair("pytorchvideo")
    for network in (model, expected):
        first, second, third, fourth = (network.blocks[i].multipathway_blocks[0].res_blocks[0] for i in (1, 2, 3, 4))
        first.branch2 = Doubled(first.branch2)
        second.branch2.norm_c = None
        third.activation = nn.SiLU()
        third.branch2.act_a = None
        fourth.branch_fusion = lambda x, y: x - y
        fourth.branch2.forward = lambda x, inner=fourth.branch2.forward: inner(x) + 1
    assert_same(model, expected, clips("pytorchvideo"))


def test_the_caller_s_list_is_left_alone() -> None:
    model, expected = pair("pytorchvideo")
    x = clips("pytorchvideo")
    given = list(x)
    model(given)
    assert all(a is b for a, b in zip(given, x, strict=True))
    expected(given)
    assert not any(a is b for a, b in zip(given, x, strict=True))


def test_arguments_by_name() -> None:
    model, expected = pair("mmaction2")
    x, layer = clips("mmaction2"), "backbone.slow_path.conv1"
    for got, wanted in zip(model.backbone(x=x), expected.backbone(x=x), strict=True):
        assert distance(got, wanted) < TOLERANCE
    for options in ({"activate": False}, {"norm": False}):
        got, wanted = (network.get_submodule(layer)(x, **options) for network in (model, expected))
        assert distance(got, wanted) < TOLERANCE


# What one library has and the others have not


@pytest.mark.parametrize("setting", ["frozen_stages", "norm_eval", "with_cp"])
def test_mmaction2_s_settings(setting: str) -> None:
    model, expected = pair("mmaction2", replace(SMALL, fusion_norm=True))
    for network in (model, expected):
        for module in network.modules():
            if setting == "with_cp" and type(module).__name__ == "Bottleneck3d":
                module.with_cp = True
            elif type(module).__name__ == "ResNet3dPathway":
                module.frozen_stages, module.norm_eval = (
                    (1 if setting == "frozen_stages" else -1),
                    setting == "norm_eval",
                )
        network.train()
    before = statistics(model)
    assert_same(model, expected, clips("mmaction2"))
    assert torch.equal(before, statistics(model)) == (setting == "norm_eval")
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert bool(frozen) == (setting == "frozen_stages")


def test_mmaction2_s_other_order_of_layers() -> None:
    model, expected = pair("mmaction2")
    for network in (model, expected):
        layer = network.backbone.fast_path.layer2[1].conv1
        layer.order = ("norm", "conv", "act")
        layer.bn = nn.BatchNorm3d(layer.conv.in_channels).double()
    assert_same(model, expected, clips("mmaction2"))


class SubBatchNorm3d(nn.Module):
    """PySlowFast's: statistics of parts of the batch, by views of its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.bn = nn.BatchNorm3d(channels, affine=False)
        self.split_bn = nn.BatchNorm3d(2 * channels, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            n, c, *size = x.shape
            x = self.split_bn(x.view(n // 2, c * 2, *size)).view(n, c, *size)
        else:
            x = self.bn(x)
        return x * self.weight.view(-1, 1, 1, 1) + self.bias.view(-1, 1, 1, 1)


class NaiveSyncBatchNorm3d(nn.BatchNorm3d):
    """PySlowFast's is a BatchNorm3d whose forward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize("norm", [SubBatchNorm3d, NaiveSyncBatchNorm3d])
def test_pyslowfast_s_norms_are_called(norm: type[nn.Module]) -> None:
    plan = replace(SMALL, norm=norm)
    model, expected = pair("pyslowfast", plan)
    x = clips("pyslowfast", batch=4)
    assert_same(model, expected, x)
    assert on_ops(model, x) == 0
    report = slowfast_fast.accelerate(model)
    assert f"{norm.__name__} is not a plain BatchNorm3d" in str(report)


class ResNetRoIHead(nn.Module):
    """Takes boxes (B, 5) of (clip, first and last row, first and last column) of the features: their mean."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.projection = nn.Linear(features, classes)

    def forward(self, x: list[Tensor], bboxes: Tensor) -> Tensor:
        pooled = torch.cat([pathway.mean(2) for pathway in x], 1)
        boxes = [pooled[n, :, y0 : y1 + 1, x0 : x1 + 1].mean((1, 2)) for n, y0, y1, x0, x1 in bboxes.tolist()]
        return self.projection(torch.stack(boxes))


class Detector(pyslowfast.SlowFast):
    """As PySlowFast's SlowFast with DETECTION.ENABLE."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.head = ResNetRoIHead(sum(plan.features), plan.classes)

    def forward(self, x: list[Tensor], bboxes: Tensor) -> Tensor:
        head, self.head = self.head, nn.Identity()
        try:
            features = super().forward(x)
        finally:
            self.head = head
        return head(features, bboxes)


def test_pyslowfast_s_detection() -> None:
    """AVA's configurations: res5 with stride 1 and dilation 2, and a head that takes boxes."""
    plan = replace(SMALL, strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2))
    model = Detector(plan).double()
    accelerated = copy.deepcopy(model)
    report = slowfast_fast.accelerate(accelerated)
    assert report.libraries == ("PySlowFast",)
    assert fused_layers(report) == 2 * 12 + 4  # with a stride of 1, res5's shortcuts too
    x, boxes = clips("pyslowfast", plan), torch.tensor([[0, 0, 1, 0, 0], [1, 0, 1, 1, 1], [1, 1, 1, 0, 1]])
    results = [network([*x], boxes) for network in (accelerated, model)]
    assert distance(*results) < TOLERANCE
    for result in results:
        result.square().sum().backward()
    assert distance(gradients(accelerated), gradients(model)) < TOLERANCE
    assert distance(statistics(accelerated), statistics(model)) < TOLERANCE


def test_pyslowfast_s_drop_connect() -> None:
    model, expected = pair("pyslowfast")
    for network in (model, expected):
        network.s3.pathway0_res1._drop_connect_rate = 0.5
    x, seed, outputs = clips("pyslowfast", batch=6), int(torch.randint(2**31, ())), []
    for network in (model, expected):
        torch.manual_seed(seed)
        outputs.append(step(network, x))
    assert distance(*outputs) < TOLERANCE
    rows = slowfast_fast.explain(model, x, show=False).rows
    assert any(row.reason == "drop_connect_rate is 0.5" for row in rows)
    # Its parts still run on ops.
    assert on_ops(model, x) == 26


# What is not known


def test_unknown_parts_are_left_and_named() -> None:
    class Squeeze(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block, self.excite = block, nn.Conv3d(128, 128, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.block(x)
            return x * self.excite(x.mean((2, 3, 4), keepdim=True)).sigmoid()

    model = stock("pytorchvideo")
    blocks = model.blocks[2].multipathway_blocks[0].res_blocks
    blocks[1] = Squeeze(blocks[1]).double()
    model.blocks[1].multipathway_fusion.add_module("extra", nn.Linear(2, 2))
    expected = copy.deepcopy(model)
    report = slowfast_fast.accelerate(model)
    left = {row.path: row.reason for row in report.left}
    assert left == {
        "blocks.1.multipathway_fusion": "not pytorchvideo's: it has extra besides what is known; "
        "not PySlowFast's: it has no conv_f2s",
        "blocks.2.multipathway_blocks.0.res_blocks.1": "Squeeze is not known",
    }
    assert "left: blocks.2.multipathway_blocks.0.res_blocks.1 (Squeeze): Squeeze is not known" in str(report)
    assert fused_layers(report) == 25  # but for that one lateral connection
    assert_same(model, expected, clips("pytorchvideo"))


def test_a_forward_of_its_own_is_kept() -> None:
    kind = type(LIBRARIES["gluoncv"].build(SMALL).slow_res2[0])

    class Scaled(kind):  # type: ignore[misc,valid-type]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    class Renamed(kind):  # type: ignore[misc,valid-type]
        pass

    model = stock("gluoncv")
    model.slow_res3[1].__class__, model.fast_res3[1].__class__ = Scaled, Renamed
    expected = copy.deepcopy(model)
    report = slowfast_fast.accelerate(model)
    assert {row.path: row.reason for row in report.left} == {
        "slow_res3.1": "Scaled has a forward of its own, not Bottleneck's"
    }
    assert_same(model, expected, clips("gluoncv"))


def test_a_namesake_that_computes_something_else_is_left() -> None:
    """Another sampling of the frames, and a residual block that halves its branch: nothing shows from outside."""
    pathways = LIBRARIES["gluoncv"].Pathways
    block = LIBRARIES["pytorchvideo"].ResBlock

    class SlowFast(pathways):  # type: ignore[misc,valid-type]
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.dp(self.features(x[:, :, 1::16], x[:, :, 1::2])))

    class ResBlock(block):  # type: ignore[misc,valid-type]
        def forward(self, x: Tensor) -> Tensor:
            shortcut = x if self.branch1_conv is None else self.branch1_norm(self.branch1_conv(x))
            return self.activation(shortcut + self.branch2(x) / 2)

    model = stock("r1c7")
    model.__class__ = SlowFast
    report = slowfast_fast.accelerate(model)
    assert not any(row.kind == "SlowFast" for row in report.accelerated)
    assert "not r1c7's: it computes something else" in str(report)
    model = stock("pytorchvideo")
    for module in model.modules():
        if type(module) is block:
            module.__class__ = ResBlock
    expected = copy.deepcopy(model)
    report = slowfast_fast.accelerate(model)
    assert {row.kind for row in report.left} == {"ResBlock"}
    assert "not pytorchvideo's: it computes something else" in str(report)
    assert_same(model, expected, clips("pytorchvideo"))


def test_audio_visual_networks_are_left_alone() -> None:
    class FuseAudioToFastSlow(nn.Module):
        pass

    model = stock("pytorchvideo")
    model.blocks[4].multipathway_fusion = FuseAudioToFastSlow()
    kinds = [type(module) for module in model.modules()]
    report = slowfast_fast.accelerate(model)
    assert [type(module) for module in model.modules()] == kinds
    assert report.accelerated == ()
    assert "audio-visual networks are left alone" in str(report)


def test_what_is_not_known_at_all_raises() -> None:
    class Bottleneck(nn.Module):  # as in image networks
        def __init__(self) -> None:
            super().__init__()
            for index in (1, 2, 3):
                setattr(self, f"conv{index}", nn.Conv2d(4, 4, 1))
                setattr(self, f"bn{index}", nn.BatchNorm2d(4))
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got list"):
        slowfast_fast.accelerate([])  # type: ignore[arg-type]
    with pytest.raises(
        ValueError,
        match=r"no block of a known library in Sequential\n  found: 2 Bottleneck\n.*"
        r"0: not gluoncv's: it conv1 is a Conv2d, not a Conv3d.*\n(.*\n)*  supported: pytorchvideo \(ResNetBasicStem, ",
    ):
        slowfast_fast.accelerate(nn.Sequential(Bottleneck(), Bottleneck()))
    with pytest.raises(ValueError, match="Net is slowfast_fast's own and runs on the fused ops already"):
        slowfast_fast.accelerate(slowfast_fast.create_slowfast(model_depth=18))
