"""frames_concat and the ops of inference that end in it: every value where it belongs, and its gradient back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import device_of
from cuda_host.build import Harness
from op_arguments import Draw, Integers, Normal
from op_testing import (
    ROWS,
    Call,
    assert_as_exact_as_pytorch,
    assert_autocast,
    assert_dense,
    assert_exact,
    assert_same_for_any_number_of_threads,
    dtypes,
    lay_out,
)
from torch import Tensor

import slowfast_fast
from slowfast_fast import ops, reference

# (taps, frames of fast) for three slow frames and alpha 4: sampling, time-to-channel, and what lies between; with
# frames left over.
FRAMES = [(1, 12), (1, 9), (4, 12), (3, 14)]


def moving_call(dtype: torch.dtype, taps: int | None = None, t_fast: int = 0) -> Call:
    draw = Normal(dtype)
    if taps is None:
        taps, t_fast = FRAMES[int(torch.randint(0, len(FRAMES), ()))]
    given = {"slow": draw(2, 7, 3, 5, 4), "fast": draw(2, 6, t_fast, 5, 4)}
    grad = draw(2, 7 + 6 * taps, 3, 5, 4)
    return Call("frames_concat", given, {"alpha": 4, "taps": taps}, ("slow", "fast"), grad)


def conv_call(draw: Draw) -> Call:
    given = {
        "x": draw(2, 20, 3, 5, 4),
        "weight": draw.weight(33, 20, 3, 1, 1),
        "shift": draw.shift(33),
        "residual": draw(2, 33, 3, 5, 4),
        "fast": draw(2, 6, 12, 5, 4),
    }
    return Call("temporal_conv_frames_concat", given, {"alpha": 4, "taps": int(torch.randint(1, 5, ()))})


def pool_call(dtype: torch.dtype) -> Call:
    draw = Normal(dtype)
    options = {"alpha": 4, "taps": int(torch.randint(1, 5, ())), "kernel": 3, "stride": 2, "padding": 1}
    return Call("max_pool_frames_concat", {"x": draw(2, 21, 3, 10, 7), "fast": draw(2, 6, 12, 5, 4)}, options)


@dtypes
@pytest.mark.parametrize("layout", [*ROWS, "contiguous"])
def test_every_value_and_gradient(poisoned: None, backend: str, dtype: torch.dtype, layout: str) -> None:
    call = moving_call(dtype)
    device = device_of(backend)
    assert_exact(call, layout, device)
    assert_dense(call.to(layout=layout, device=device).run()["output"])


@dtypes
def test_one_frame_for_several(backend: str, dtype: torch.dtype) -> None:
    """Frames without a distance in memory, which frozen connections from slow to fast give."""
    slow, fast = (lay_out(t, "channels_last").to(device_of(backend)) for t in moving_call(dtype, 1, 9).tensors.values())
    still = fast[:, :, 4:5].expand(-1, -1, 9, -1, -1)
    assert torch.equal(
        ops.frames_concat(slow, still, alpha=4, taps=1), torch.cat([slow, fast[:, :, 4:5].repeat(1, 1, 3, 1, 1)], 1)
    )


@dtypes
@pytest.mark.parametrize("layout", [*ROWS, "contiguous"])
def test_behind_a_pool(poisoned: None, dtype: torch.dtype, layout: str) -> None:
    assert_exact(pool_call(dtype), layout)


@dtypes
@pytest.mark.parametrize("layout", [*ROWS, "contiguous"])
def test_behind_a_convolution(poisoned: None, dtype: torch.dtype, layout: str) -> None:
    assert_exact(conv_call(Integers(dtype)), layout)
    assert_as_exact_as_pytorch(lambda: conv_call(Normal(dtype)), layout)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    for call in (moving_call(dtype, 4, 12), conv_call(Integers(dtype)), pool_call(dtype)):
        assert_exact(call, device="cuda")


@dtypes
@pytest.mark.parametrize("c", [6, 16], ids=["odd", "aligned"])
def test_cuda_kernels_on_the_host(host: Harness, dtype: torch.dtype, c: int) -> None:
    for taps, t_fast in ((1, 9), (3, 14)):
        slow, fast = (lay_out(torch.randn(2, c, t, 5, 4).to(dtype), "channels_last") for t in (3, t_fast))
        out = host.frames_concat(slow, fast, 4, taps)
        assert torch.equal(out, reference.frames_concat(slow, fast, alpha=4, taps=taps))
        # The gradient of what was taken is what came, that of the other frames 0: so the sum over both is it all.
        back = host.frames_concat_backward(out[:, c:], t_fast, 4, taps)
        taken = torch.zeros(t_fast, dtype=torch.bool)
        taken[[4 * t + tap for t in range(3) for tap in range(taps)]] = True
        assert torch.equal(back, fast * taken[:, None, None])
        still = fast[:, :, :1].expand(fast.shape)
        assert torch.equal(host.frames_concat(slow, still, 4, taps)[:, c:], still[:, :, :3].repeat(1, taps, 1, 1, 1))
        x = lay_out(torch.randn(2, c, 3, 10, 7).to(dtype), "channels_last")
        expected = reference.max_pool_frames_concat(x, fast, kernel=3, stride=2, padding=1, alpha=4, taps=taps)
        assert torch.equal(host.max_pool_frames_concat(x, 3, 2, 1, fast, 4, taps), expected)
        weight = Integers(dtype)(8, c, 3, 1, 1)
        exact = lay_out(Integers(dtype)(2, c, 3, 5, 4), "channels_last")
        expected = reference.temporal_conv_frames_concat(exact, weight, None, None, fast, alpha=4, taps=taps)
        conv = (exact, weight, None, None, 1, 1, 1, True)
        assert torch.equal(host.temporal_conv_frames_concat(*conv, fast, 4, taps, False), expected)


@pytest.mark.parametrize(("taps", "t_fast"), [(4, 12), (3, 14)])
def test_opcheck(taps: int, t_fast: int) -> None:
    call = moving_call(torch.float32, taps, t_fast).to(layout="channels_last")
    given = [tensor.requires_grad_() for tensor in call.tensors.values()]
    torch.library.opcheck(torch.ops.slowfast_fast.frames_concat.default, (*given, 4, taps))
    grad = call.grad[:, 7:]
    torch.library.opcheck(torch.ops.slowfast_fast.frames_concat_backward.default, (grad, t_fast, 4, taps))


def test_opcheck_of_inference() -> None:
    t = conv_call(Normal(torch.float32)).to(layout="channels_last").tensors
    conv = (t["x"], t["weight"], t["shift"], t["residual"], 1, 1, 1, True)
    torch.library.opcheck(torch.ops.slowfast_fast.temporal_conv_frames_concat.default, (*conv, t["fast"], 4, 2, False))
    t = pool_call(torch.float32).to(layout="channels_last").tensors
    torch.library.opcheck(torch.ops.slowfast_fast.max_pool_frames_concat.default, (t["x"], 3, 2, 1, t["fast"], 4, 2))


def test_autocast_threads_and_gradients_of_one() -> None:
    call = moving_call(torch.float32, 3, 14).to(layout="channels_last")
    assert_autocast(call, torch.bfloat16, "cpu")
    assert_same_for_any_number_of_threads(call)
    for name in ("slow", "fast"):
        alone = replace(call, differentiable=(name,))
        assert torch.equal(alone.run()[f"grad of {name}"], alone.run_stock()[f"grad of {name}"])


def test_a_double_backward_raises() -> None:
    call = moving_call(torch.float64, 4, 12).to(layout="channels_last")
    fast = call.tensors["fast"].requires_grad_()
    grad = call.grad.requires_grad_()
    out = ops.frames_concat(call.tensors["slow"], fast, alpha=4, taps=4)
    (first,) = torch.autograd.grad(out, fast, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward through frames_concat is not supported"):
        first.sum().backward()


def test_no_gradient_of_inference() -> None:
    call = pool_call(torch.float32)
    call.tensors["fast"].requires_grad_()
    with pytest.raises(RuntimeError, match="max_pool_frames_concat has no gradient"):
        ops.max_pool_frames_concat(**call.tensors, **call.options).sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"fast": torch.randn(2, 6, 8, 5, 4)}, ValueError, "slow has T = 3 and fast T = 8, of which .* make 2"),
        ({"fast": torch.randn(2, 6, 12, 5, 5)}, ValueError, "must agree in N, H and W"),
        ({"fast": torch.randn(2, 6, 12, 5, 4).double()}, TypeError, "fast must have the dtype and the device of slow"),
        ({"taps": 5}, ValueError, "taps must be at most alpha, 4; got 5"),
        ({"taps": 0}, ValueError, "taps must be"),
        ({"slow": torch.randn(2, 7, 3, 5)}, ValueError, "slow must be"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call = moving_call(torch.float32, 4, 12)
    with pytest.raises(error, match=message):
        ops.frames_concat(**{**call.tensors, **call.options, **change})


def test_no_concatenation_is_left_in_a_frozen_network() -> None:
    """Of each stage before a lateral connection the last layer writes beside the frames."""
    model = slowfast_fast.create_model(
        "slowfast_r50_4x16_time_to_channel", model_depth=(1, 1, 1, 1), width=16, head_pool=torch.nn.AdaptiveAvgPool3d
    ).eval()
    x: list[Tensor] = [torch.randn(1, 3, t, 32, 32) for t in (2, 16)]
    live = [row.what for row in slowfast_fast.explain(model, x, show=False).rows]
    assert live.count("frames_concat") == 4
    frozen = slowfast_fast.freeze(model)
    ran = [row.what for row in slowfast_fast.explain(frozen, x, show=False).rows]
    assert ran.count("max_pool_frames_concat") == 1
    assert ran.count("temporal_conv_frames_concat") == 3
    with torch.no_grad(), torch.profiler.profile() as profile:
        logits = frozen(x)
    assert "aten::cat" not in {event.key for event in profile.key_averages()}
    with torch.no_grad():
        torch.testing.assert_close(logits, model(x), rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="for 2 slow frames it takes 16 to 23 fast ones"):
        frozen([x[0], torch.randn(1, 3, 24, 32, 32)])
