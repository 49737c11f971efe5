"""What csrc/calls.cpp makes of a call: its signature, and the call below autograd."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from slowfast_fast import _C, ops
from slowfast_fast.ops import _common, _repeat


def test_what_a_signature_tells_apart() -> None:
    x, vector = torch.randn(2, 3, 4, 5, 6), torch.rand(3)

    def signature(
        tensors: tuple[Any, ...] = (x, None),
        vectors: tuple[Any, ...] = (vector, None),
        option: Any = 1,
        name: str = "op",
    ) -> Any:
        return _repeat.look_up(name, (option,), tensors, vectors)[0]

    others: list[dict[str, Any]] = [
        *({"tensors": (t, None)} for t in (x[1:], x.transpose(3, 4), x[:, :, :, :, ::2], x.double(), x.to("meta"))),
        *({"tensors": tensors} for tensors in ((None, x), (x, x), (None, None))),
        *(
            {"vectors": vectors}
            for vectors in ((vector.double(), None), (None, vector), (None, None), (vector, vector))
        ),
        *({"option": option} for option in (2, -1, 2**62, True, False, 0, 1.0, 1e-300, None)),
        {"name": "another"},
    ]
    found = {signature(), *(signature(**other) for other in others)}
    assert len(found) == 1 + len(others)
    assert signature((nn.Parameter(torch.rand_like(x)), None), (nn.Parameter(vector[:2]), None)) in found

    class Marked(Tensor):
        pass

    for strange in (x.as_subclass(Marked), [1.0], 1.0):
        assert signature(tensors=(strange, None)) is None
        assert signature(vectors=(strange, None)) is None
    assert signature(tensors=(x, *20 * (x,))) is None
    for option in ([1], "one", torch.tensor(1), 2**63):
        assert signature(option=option) is None


def test_what_settings_tell_apart() -> None:
    class Settings:
        recorder, forced = None, "auto"

    settings, tf32, deterministic, watched_by_a_mode = Settings(), [True], [False], [False]
    look_up = _C.make_look_up(
        (Tensor,),
        torch.device("cpu"),
        {},
        settings,
        settings,
        lambda: watched_by_a_mode[0],
        lambda: deterministic[0],
        lambda x: tf32[0],
    )
    x = torch.rand(2)
    elsewhere = x.to("meta")

    def signatures() -> tuple[Any, Any]:
        return look_up("op", (), (x,), ())[0], look_up("op", (), (elsewhere,), ())[0]

    on_cpu, on_another_device = signatures()
    tf32[0] = False
    assert signatures()[0] == on_cpu
    assert signatures()[1] != on_another_device
    deterministic[0] = True
    assert signatures()[0] != on_cpu
    deterministic[0], settings.forced = False, "cpu"
    assert signatures()[0] != on_cpu
    settings.forced = "auto"
    assert signatures()[0] == on_cpu
    watched_by_a_mode[0] = True
    assert signatures() == (None, None)


def test_a_call_that_raises_leaves_no_trace() -> None:
    """Neither below autograd nor in what is referred to."""
    x = torch.randn(1, 2, 3, 4, 5)
    op = torch.ops.slowfast_fast.temporal_conv.default
    wrong = torch.randn(1, 7, 1, 1, 1)
    before = sys.getrefcount(wrong), sys.getrefcount(op)
    for call in 5 * (_common.call_eagerly, _repeat.call_planned):
        with pytest.raises(RuntimeError, match="with the C of the input"):
            call(op, x, wrong, None, None, None, 1, 0, 1, False, False)
        assert not torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradCPU)
    assert (sys.getrefcount(wrong), sys.getrefcount(op)) == before


def excluded() -> int:
    keys: int = torch._C._dispatch_tls_local_exclude_set().raw_repr()
    return keys


def excluded_by_pytorch() -> int:
    before = excluded()
    with torch._C._AutoDispatchBelowAutograd():
        assert excluded() != before
        return excluded()


def below_autograd(function: Callable[[], Any]) -> Any:
    """``function()`` where call_eagerly makes its calls."""
    return _common.call_eagerly(lambda _: function(), None)


def test_below_autograd_as_pytorch_means_it() -> None:
    before, inside = excluded(), excluded_by_pytorch()
    for _ in range(3):
        assert below_autograd(excluded) == inside
        assert excluded() == before


def test_a_call_inside_of_a_call() -> None:
    before, inside = excluded(), excluded_by_pytorch()

    def twice() -> list[int]:
        return [excluded(), below_autograd(excluded), excluded(), below_autograd(excluded), excluded()]

    for _ in range(3):
        assert below_autograd(twice) == 5 * [inside]
        assert excluded() == before


def test_calls_of_several_threads() -> None:
    """One thread leaves while another is still inside."""
    before, inside = excluded(), excluded_by_pytorch()
    entered, left, found = threading.Event(), threading.Event(), []

    def wait() -> int:
        entered.set()
        assert left.wait(60)
        return excluded()

    def other() -> None:
        found.append(below_autograd(wait))
        found.append(excluded())

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(60)
    assert excluded() == before
    assert below_autograd(excluded) == inside
    assert excluded() == before
    left.set()
    thread.join()
    assert found == [inside, before]
    assert below_autograd(excluded) == inside


def test_a_mode_that_calls_the_op_again() -> None:
    class Twice(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return _common.call_eagerly(func, *args, **(kwargs or {})) * 2

    x, weight = torch.randn(1, 2, 3, 4, 5).to(memory_format=torch.channels_last_3d), torch.randn(3, 2, 1, 1, 1)
    y = ops.temporal_conv(x, weight)
    with Twice():
        doubled = ops.temporal_conv(x, weight)
    assert torch.equal(doubled, 2 * y)
    weight.requires_grad_()
    assert ops.temporal_conv(x, weight).requires_grad
