"""The host's part of CUDA graphs, with stand-ins for torch.cuda: when is captured, replayed, forgotten."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from conftest import in_threads
from torch import Tensor, nn

from slowfast_fast import backend
from slowfast_fast.frozen.graphs import MOST_GRAPHS, WARM_UP, CudaGraphs
from slowfast_fast.frozen.inference import Inference


class Cuda:
    """torch.cuda without a device; ``replayed`` has each graph that ran, in order."""

    def __init__(self) -> None:
        self.replayed: list[Any] = []
        self.waited = 0
        cuda = self

        class Queue:
            """A stream or an event."""

            def wait_event(self, event: Any) -> None: ...
            def wait_stream(self, stream: Any) -> None: ...
            def record(self, stream: Any) -> None: ...

            def synchronize(self) -> None:
                cuda.waited += 1

        class CUDAGraph:
            def replay(self) -> None:
                cuda.replayed.append(self)

        self.Event = self.Stream = Queue
        self.CUDAGraph = CUDAGraph
        self.current_stream = Queue

    def graph_pool_handle(self) -> int:
        return 0

    def is_current_stream_capturing(self) -> bool:
        return False

    def synchronize(self, device: torch.device) -> None: ...

    def device(self, device: torch.device) -> Any:
        return nullcontext()

    def stream(self, stream: Any) -> Any:
        return nullcontext()

    @contextmanager
    def graph(self, graph: Any, **options: Any) -> Iterator[None]:
        yield


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    stub = Cuda()
    for name in (*vars(stub), *(name for name in vars(Cuda) if name[0] != "_")):
        if hasattr(torch.cuda, name):
            monkeypatch.setattr(torch.cuda, name, getattr(stub, name))
    return stub


class OnCuda(Tensor):
    """A tensor of the host that says otherwise."""

    device = property(lambda self: torch.device("cuda", 0))  # type: ignore[assignment]


def clip(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype).as_subclass(OnCuda)


def counted() -> tuple[CudaGraphs, list[tuple[int, ...]]]:
    """Graphs of a function, and the shapes with which this was called: WARM_UP + 1 times for a capture."""
    calls: list[tuple[int, ...]] = []

    def function(inputs: list[Tensor]) -> Tensor:
        calls.append(tuple(inputs[0].shape))
        return inputs[0] + 1

    return CudaGraphs(function), calls


def test_a_graph_for_all_that_it_depends_on(cuda: Cuda) -> None:
    """Shapes, dtypes and the backend; not the layout."""
    run, calls = counted()
    kinds = [clip(2, 3), clip(2, 4), clip(2, 3, dtype=torch.float16)]
    for _ in range(3):
        for x in kinds:
            assert run([x]).shape == x.shape
        with backend("reference"):
            run([kinds[0]])
        run([clip(3, 2).t()])
    assert len(calls) == 4 * (WARM_UP + 1)
    assert len(set(map(id, cuda.replayed))) == 4
    assert len(cuda.replayed) == 3 * 5


def test_the_least_recently_used_goes_first(cuda: Cuda) -> None:
    run, calls = counted()
    shapes = [(1, size) for size in range(1, MOST_GRAPHS + 1)]
    for shape in shapes:
        run([clip(*shape)])
    run([clip(*shapes[0])])
    run([clip(1, 99)])
    assert cuda.waited > 0, "a graph that still ran would lose its memory"
    before = len(calls)
    run([clip(*shapes[0])])
    assert len(calls) == before
    run([clip(*shapes[1])])
    assert len(calls) == before + WARM_UP + 1
    run.clear()
    run([clip(*shapes[1])])
    assert len(calls) == before + 2 * (WARM_UP + 1)


def test_captured_under_inference_mode(cuda: Cuda) -> None:
    """Its inputs are written to by calls under no_grad, too."""
    run, calls = counted()
    with torch.inference_mode():
        run([clip(2, 3)])
    with torch.no_grad():
        run([clip(2, 3)])
    assert len(calls) == WARM_UP + 1
    assert not any(tensor.is_inference() for graph in run._graphs.values() if graph for tensor in graph.inputs)


def test_a_capture_that_fails(cuda: Cuda) -> None:
    """One warning for a shape; others are captured."""

    def function(inputs: list[Tensor]) -> Tensor:
        if len(inputs[0]) == 2:
            captured.append(1)
            if len(captured) == WARM_UP + 1:
                raise RuntimeError("not permitted\nwhen stream is capturing")
        return inputs[0] + 1

    captured: list[int] = []
    run = CudaGraphs(function)
    with pytest.warns(RuntimeWarning, match="runs without a graph here: not permitted$"):
        assert run([clip(2, 3)]).shape == (2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run([clip(2, 3)]).shape == (2, 3)
        assert not cuda.replayed
        run([clip(3, 3)])
    assert len(cuda.replayed) == 1


def test_many_threads_capture_a_shape_once(cuda: Cuda) -> None:
    run, calls = counted()
    given = [clip(1, size) for size in (1, 2, 3, 4)]

    def work(first: int) -> None:
        for turn in range(12):
            x = given[(first + turn) % len(given)]
            assert run([x]).shape == x.shape

    in_threads(work, range(4))
    assert len(calls) == len(given) * (WARM_UP + 1)
    assert len(cuda.replayed) == 4 * 12


def test_a_network_forgets_what_changed(cuda: Cuda) -> None:
    """Loaded by itself or within another module, or moved; arguments beside tensors make graphs of their own."""
    frozen = Inference(torch.float32, cuda_graph=True)
    frozen.register_buffer("weight", torch.ones(1))
    calls: list[Any] = []

    def function(x: list[Tensor], more: Any, *, flag: bool = False) -> Tensor:
        calls.append((more, flag))
        return x[0] + 1

    def run(more: Any = None, flag: bool = False) -> int:
        before = len(calls)
        frozen._replay(function, [clip(2, 3)], more, flag=flag)
        return len(calls) - before

    captured = WARM_UP + 1
    assert [run(), run(), run(flag=True), run([clip(1), clip(2)]), run([clip(1), clip(2)]), run()] == [
        *(captured, 0, captured, captured, 0, 0)
    ]
    frozen.load_state_dict(frozen.state_dict())
    assert [run(), run()] == [captured, 0]
    holder = nn.Sequential(frozen)
    holder.load_state_dict(holder.state_dict())
    assert [run(), run()] == [captured, 0]
    holder.to(torch.float32)
    assert [run(), run()] == [captured, 0]
    with pytest.warns(RuntimeWarning, match="without a graph here: the call has a object"):
        assert run(object()) == 1
