"""What existing training code does with a SlowFast model, done to the fused network and to the readable stock one."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from network_testing import (
    FUSED_SITES,
    FUSED_STEMS,
    LAYER_SITES,
    SMALL,
    TOLERANCE,
    assert_mean_of_two_processes,
    assert_same_step,
    clips,
    distance,
    fused_sites,
    gradients,
    pair,
    reasons,
    statistics,
    step,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import slowfast_fast
from slowfast_fast.nn import fused as fused_rules
from slowfast_fast.reference.slowfast import SlowFast

pytestmark = pytest.mark.usefixtures("one_thread")


# 1. Precise BN


def test_precise_bn_sees_every_norm() -> None:
    """fvcore's update_bn_stats hangs hooks on the norms, sets their momentum to 1 and replaces their buffers."""
    precise_bn = pytest.importorskip("fvcore.nn.precise_bn", reason="fvcore is in the test extra, with pytorchvideo")
    fused, stock = pair()
    batches = [clips() for _ in range(3)]
    before = statistics(fused)
    for model in (fused, stock):
        precise_bn.update_bn_stats(model, [list(batch) for batch in batches], num_iters=3, progress=None)
    assert distance(before, statistics(fused)) > 0.01
    assert distance(statistics(fused), statistics(stock)) < TOLERANCE
    assert not any(fused_rules.is_observed(module) for module in fused.modules())
    x = clips()
    assert fused_sites(fused, x) == FUSED_SITES + FUSED_STEMS
    assert distance(fused.eval()(x), stock.eval()(x)) < TOLERANCE
    assert_same_step(fused.train(), stock.train(), x)


def test_replaced_buffers_and_momentum_are_read_at_every_forward() -> None:
    fused, stock = pair()
    for momentum in (0.3, 1.0, None):
        for model in (fused, stock):
            for module in model.modules():
                if isinstance(module, nn.BatchNorm3d):
                    module.momentum = momentum
                    module.running_mean = torch.zeros_like(module.running_mean)
        assert_same_step(fused, stock, clips())


# 2. BatchNorm type checks


def test_frozen_norms_in_a_training_model() -> None:
    fused, stock = pair()
    for model in (fused, stock):
        for index, module in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm3d)):
            nn.init.uniform_(module.running_mean, -0.1, 0.1, generator=torch.Generator().manual_seed(index))
            if index % 3:
                module.eval()
    x = clips()
    assert_same_step(fused, stock, x)
    assert fused_sites(fused, x) == LAYER_SITES + 1  # no block; the slow stem's norm is not frozen, the fast one's is


def test_weight_decay_groups() -> None:
    def norm_parameters(model: nn.Module) -> list[str]:
        return [
            f"{path}.{name}"
            for path, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._NormBase)
            for name, _ in module.named_parameters(recurse=False)
        ]

    fused, stock = pair()
    assert norm_parameters(fused) == norm_parameters(stock)
    assert len(norm_parameters(fused)) > 60


def test_sync_batch_norm() -> None:
    fused, stock = pair()
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in fused.modules()) == 38
    x = clips()
    why = reasons(fused, x)
    assert why["blocks.0.multipathway_fusion.conv_fast_to_slow"] == "SyncBatchNorm is not a plain BatchNorm3d"
    assert fused_sites(fused, x) == 0
    assert_same_step(fused, stock, x)


class CountingBatchNorm(nn.BatchNorm3d):
    """As PySlowFast's NaiveSyncBatchNorm3d: a BatchNorm3d by isinstance, with a forward of its own."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return super().forward(x) + 1


def test_subclass_of_batch_norm_runs_its_own_forward() -> None:
    fused, stock = pair()
    for model in (fused, stock):
        for module in model.modules():
            if type(module) is nn.BatchNorm3d:
                module.__class__ = CountingBatchNorm
    x, CountingBatchNorm.calls = clips(), 0
    assert_same_step(fused, stock, x)
    assert CountingBatchNorm.calls == 2 * 38
    assert fused_sites(fused, x) == 0


class SubBatchNorm(nn.Module):
    """As PySlowFast's SubBatchNorm3d: statistics of parts of a batch, gamma and beta outside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.split_bn = nn.BatchNorm3d(2 * channels, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        n, c, t, h, w = x.shape
        x = self.split_bn(x.reshape(n // 2, 2 * c, t, h, w)).reshape(n, c, t, h, w)
        return x * self.weight[:, None, None, None] + self.bias[:, None, None, None]


def test_norm_that_is_no_batch_norm() -> None:
    norm: Callable[..., nn.Module] = lambda num_features, **_: SubBatchNorm(num_features)  # noqa: E731
    fused = slowfast_fast.create_slowfast(**SMALL, norm=norm).double()
    stock = SlowFast(**SMALL, norm=SubBatchNorm).double()
    stock.load_state_dict(fused.state_dict())
    assert_same_step(fused, stock, clips())


# 3. Head edits


@pytest.mark.parametrize("edit", ["linear", "identity", "mlp", "none", "no head"])
def test_head_edits(edit: str) -> None:
    fused, stock = pair()
    features = 512 + 128  # 16 channels in the slow stem, times 32, and a quarter of that
    proj: nn.Module | None = {
        "linear": nn.Linear(features, 5),
        "mlp": nn.Sequential(nn.Linear(features, 8), nn.ReLU(), nn.Linear(8, 3)),
    }.get(edit, nn.Identity())
    for model in (fused, stock):
        if edit == "no head":
            model.blocks[-1] = nn.Identity()
        else:
            model.blocks[-1].proj = proj
        model.double().eval()
    if edit == "none":
        fused.blocks[-1].proj = None
    x = clips()
    assert distance(fused(x), stock(list(x))) < TOLERANCE


# 4. Slicing


def test_slices_of_the_network() -> None:
    fused, stock = pair()
    x, results = clips(), []
    for model in (fused.eval(), stock.eval()):
        parts = nn.Sequential(*list(model.children())[0])  # noqa: RUF015  (as it is written out there)
        features = nn.Sequential(*[parts[index] for index in range(5)])(x)
        assert isinstance(features, list)
        results.append([parts[5].pool[pathway](features[pathway]) for pathway in (0, 1)])
    for got, expected in zip(*results, strict=True):
        assert distance(got, expected) < TOLERANCE
    assert distance(fused.blocks[6].output_pool(results[0][0]), results[0][0].mean((2, 3, 4), keepdim=True)) < TOLERANCE


def test_every_block_runs_alone() -> None:
    fused, stock = pair()
    ours, theirs = clips(), clips()
    theirs[:] = [pathway.clone() for pathway in ours]
    for block, expected in zip(fused.blocks[:5], stock.blocks[:5], strict=True):
        given = list(ours)
        # NCDHW memory, as slices of somebody else's network may have it.
        ours, theirs = block([pathway.contiguous() for pathway in given]), expected(theirs)
        assert isinstance(ours, list)
        for got, want in zip(ours, theirs, strict=True):
            assert distance(got, want) < TOLERANCE
    stage = fused.blocks[1].multipathway_blocks[1]
    x = torch.randn(1, stage.res_blocks[0].branch2.conv_a.in_channels, 4, 6, 5, dtype=torch.float64)
    assert distance(stage(x), stock.blocks[1].multipathway_blocks[1](x)) < TOLERANCE


# 5. Hooks by path

HOOKED = (
    "blocks.4.multipathway_blocks.0.res_blocks.0",
    "blocks.3.multipathway_blocks.0.res_blocks.0.branch2",
    "blocks.3.multipathway_blocks.1.res_blocks.0.branch2.conv_a",
    "blocks.2.multipathway_blocks.1.res_blocks.0.branch2.norm_a",
    "blocks.1.multipathway_blocks.1.res_blocks.0.branch2.act_a",
    "blocks.2.multipathway_fusion",
    "blocks.1.multipathway_fusion.norm",
    "blocks.0.multipathway_fusion.activation",
)


@pytest.mark.filterwarnings("ignore:For backward hooks to be called")  # of the fusion, whose output is a list
@pytest.mark.parametrize("path", HOOKED)
def test_grad_cam(path: str) -> None:
    """A forward hook keeps the activation, a full backward hook its gradient."""
    fused, stock = pair()
    x, kept = clips(), []
    for model in (fused, stock):
        module, seen = model.get_submodule(path), []
        module.register_forward_hook(lambda _module, _args, output, seen=seen: seen.append(output))
        module.register_full_backward_hook(lambda _module, _inputs, grads, seen=seen: seen.append(grads))
        model.eval()(list(x))[0, 3].backward()
        kept.append([t for item in seen for t in (item if isinstance(item, list | tuple) else [item]) if t is not None])
    assert len(kept[0]) == len(kept[1]) >= 2
    for got, expected in zip(*kept, strict=True):
        assert distance(got, expected) < TOLERANCE


# 6. List semantics


def test_the_list_given_is_left_alone() -> None:
    fused, _ = pair()
    x = clips()
    given, values = list(x), [clip.clone() for clip in x]
    for run in (fused, fused.blocks[0], fused.eval()):
        run(x)
        assert all(a is b for a, b in zip(x, given, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(x, values, strict=True))
    features = fused.blocks[0](x)
    for block in (*fused.blocks[1:5], fused.blocks[5]):
        before = list(features)
        after = block(features)
        assert all(a is b for a, b in zip(features, before, strict=True))
        features = after


# 7. Multigrid


def test_frames_crop_and_batch_vary_while_training() -> None:
    fused, stock = pair()
    for model in (fused, stock):
        model.blocks[5].pool = nn.ModuleList(nn.AdaptiveAvgPool3d(1) for _ in range(2))
    for shape in ((4, 1, 32), (1, 2, 46), (2, 3, 33), (4, 1, 32)):
        assert_same_step(fused, stock, clips(*shape))


# 8. AMP, DDP


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_autocast_errs_at_most_twice_as_much_as_stock(mode: str) -> None:
    exact, reference = pair()
    x = clips(4, 2, 64)
    with torch.no_grad():
        expected = copy.deepcopy(exact).train(mode == "train")(x)
        errors = []
        for model in (exact, reference):
            model.float().train(mode == "train")
            with torch.autocast("cpu", torch.bfloat16):
                logits = model([clip.float() for clip in x])
            errors.append(distance(logits.double(), expected))
    fused, stock = errors
    assert 1e-4 < fused <= 2 * stock


def test_autocast_with_gradient_scaler_and_clipping() -> None:
    fused, _ = pair(torch.float32)
    optimizer = torch.optim.SGD(fused.parameters(), 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    before = torch.cat([p.detach().flatten().clone() for p in fused.parameters()])
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(fused(clips(dtype=torch.float32)), torch.tensor([0, 1]))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in fused.parameters())
        assert nn.utils.clip_grad_norm_(fused.parameters(), 1.0).isfinite()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 16.0
    after = torch.cat([p.detach().flatten() for p in fused.parameters()])
    assert after.isfinite().all()
    assert not torch.equal(before, after)
    counters = [b for name, b in fused.named_buffers() if name.endswith("num_batches_tracked")]
    assert len(counters) == 38
    assert all(counter == 2 for counter in counters)


def ddp_worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = torch.load(folder / "model.pt", weights_only=False)
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
    step(parallel, torch.load(folder / f"clips{rank}.pt"))
    torch.save((gradients(model), statistics(model)), folder / f"result{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.no_sanitizer
def test_distributed_data_parallel(tmp_path: Path) -> None:
    """Two processes: the gradient is the mean of theirs, statistics are those of each one's own clips."""
    assert_mean_of_two_processes(__file__, tmp_path)


# 9. Activation checkpointing


def checkpoint_every_block(model: nn.Module, use_reentrant: bool) -> None:
    for block in [m for m in model.modules() if type(m).__name__ == "ResBlock"]:
        block.forward = lambda x, inner=block.forward: checkpoint(inner, x, use_reentrant=use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_of_every_residual_block(use_reentrant: bool) -> None:
    """As in stock, the recomputation updates running statistics once more."""
    fused, stock = pair()
    for model in (fused, stock):
        checkpoint_every_block(model, use_reentrant)
    with set_checkpoint_early_stop(False):
        assert_same_step(fused, stock, clips())


def test_checkpointing_that_stops_early() -> None:
    """By default PyTorch ends a recomputation at the last tensor that the backward needs. In a fused block that comes
    before its norms' statistics are updated: they see the batch once, as they would without checkpointing."""
    fused, stock = pair()
    x, plain = clips(), copy.deepcopy(stock)
    step(plain, x)
    for model in (fused, stock):
        checkpoint_every_block(model, use_reentrant=False)
    assert distance(step(fused, x), step(stock, x)) < TOLERANCE
    assert distance(gradients(fused), gradients(stock)) < TOLERANCE
    expected, once = stock.state_dict(), plain.state_dict()
    for key, value in fused.state_dict().items():
        same_as = once if "res_blocks" in key else expected
        assert distance(value.double(), same_as[key].double()) < TOLERANCE, key


# 10. torch.compile, export, copies


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.no_sanitizer
@pytest.mark.parametrize("training", [False, True])
def test_compiled_whole(training: bool, dynamo: None) -> None:
    """One graph, forward and backward, with the numbers of eager mode."""
    fused, _ = pair()
    x, eager = clips(), copy.deepcopy(fused.train(training))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert distance(step(compiled, x), step(eager, x)) < TOLERANCE
    assert distance(gradients(fused), gradients(eager)) < TOLERANCE
    assert distance(statistics(fused), statistics(eager)) < TOLERANCE


class FirstBlocks(nn.Module):
    """Stems, res2 and two lateral connections: every kind of layer, in few enough kernels to compile them in a test."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.blocks = model.blocks[:2]

    def forward(self, x: list[Tensor]) -> Tensor:
        slow, fast = self.blocks[1](self.blocks[0](x))
        return slow.mean((2, 3, 4)) + fast.mean((1, 2, 3, 4))[:, None]


@pytest.mark.no_sanitizer
@pytest.mark.parametrize("training", [False, True])
def test_compiled_by_inductor(training: bool, dynamo: None) -> None:
    fused, _ = pair()
    part = FirstBlocks(fused.train(training))
    x, eager = clips(), copy.deepcopy(part)
    compiled = torch.compile(part, fullgraph=True)
    with torch.set_grad_enabled(training):
        got, expected = compiled(x), eager(x)
    assert distance(got, expected) < TOLERANCE
    if training:
        grad = torch.randn_like(expected)
        got.backward(grad)
        expected.backward(grad)
        assert distance(gradients(part), gradients(eager)) < TOLERANCE
        assert distance(statistics(part), statistics(eager)) < TOLERANCE


@pytest.mark.no_sanitizer
def test_export() -> None:
    fused, _ = pair()
    x = clips()
    program = torch.export.export(fused.eval(), (x,))
    assert distance(program.module()(x), fused(x)) < TOLERANCE
    names = {str(node.target) for node in program.graph.nodes}
    assert any("slowfast_fast.temporal_conv" in name for name in names)
    assert any("slowfast_fast.lateral_concat" in name for name in names)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_trace() -> None:
    fused, _ = pair()
    x = clips()
    with torch.no_grad():
        traced = torch.jit.trace(fused.eval(), (x,))
        assert distance(traced(x), fused(x)) < TOLERANCE


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copy_of: Callable[[nn.Module], nn.Module]) -> None:
    fused, _ = pair()
    x = clips()
    other = copy_of(fused)
    assert torch.equal(other.eval()(x), fused.eval()(x))
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    assert not torch.equal(other(x), fused(x))


if __name__ == "__main__":
    ddp_worker(int(sys.argv[1]), Path(sys.argv[2]))
