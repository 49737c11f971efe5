"""CUDA graphs of a frozen network, one for each shape of input."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..backend import forced

# Graphs of a module; the one that was used least recently goes first. Each holds its inputs and, in a pool that all of
# them share, the activations of its largest moment.
MOST_GRAPHS = 8
WARM_UP = 2


class _Graph:
    def __init__(self, graph: torch.cuda.CUDAGraph, inputs: list[Tensor], output: Any) -> None:
        self.graph, self.inputs, self.output = graph, inputs, output


class CudaGraphs:
    """Runs ``function(inputs)``, which gives a tensor or several, as a CUDA graph, captured when a shape of inputs
    comes for the first time.

    Calls may come from any thread and on any stream. The graphs share their memory, so a replay waits on the device for
    the one before it, and its result is a copy. Where a capture fails, a warning says why, and calls of that shape
    run without a graph.
    """

    def __init__(self, function: Callable[[list[Tensor]], Any]) -> None:
        self.function = function
        self._lock = threading.Lock()
        self._graphs: dict[Any, _Graph | None] = {}
        self._done: dict[torch.device, torch.cuda.Event] = {}
        self._pools: dict[torch.device, Any] = {}

    def clear(self) -> None:
        """Forget every graph: what they captured has changed."""
        with self._lock:
            self._finish()
            self._graphs, self._done, self._pools = {}, {}, {}

    def _finish(self) -> None:
        # A graph that still runs must not lose its memory.
        for event in self._done.values():
            event.synchronize()

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        device, key = inputs[0].device, self._key(inputs)
        with self._lock:
            if key not in self._graphs:
                self._graphs[key] = self._capture(inputs)
                if len(self._graphs) > MOST_GRAPHS:
                    self._finish()
                    del self._graphs[next(iter(self._graphs))]
            graph = self._graphs[key] = self._graphs.pop(key)  # most recently used, last
            if graph is not None:
                return self._replay(graph, inputs, device)
        return self.function(list(inputs))

    def _key(self, inputs: Sequence[Tensor]) -> Any:
        """All that a graph depends on; where none is captured, a warning for each device is enough."""
        device = inputs[0].device
        if device.type != "cuda":
            return device.type
        settings = (torch._C._get_fp32_precision_getter("cuda", op) for op in ("matmul", "conv"))
        return (device, forced(), *settings, *((tensor.shape, tensor.dtype) for tensor in inputs))

    def _replay(self, graph: _Graph, inputs: Sequence[Tensor], device: torch.device) -> Any:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done[device])
            for static, tensor in zip(graph.inputs, inputs, strict=True):
                static.copy_(tensor)
            graph.graph.replay()
            output = tree_map(torch.clone, graph.output)
            self._done[device].record(stream)
        return output

    def _capture(self, inputs: Sequence[Tensor]) -> _Graph | None:
        device = inputs[0].device
        if device.type != "cuda":
            self._warn(f"the clips are on {device.type}")
            return None
        if torch.cuda.is_current_stream_capturing():
            self._warn("the call is part of another capture")
            return None
        try:
            # A call under inference_mode must not leave inputs that no other call may write to.
            with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
                return self._capture_on(device, inputs)
        except RuntimeError as error:
            torch.cuda.synchronize(device)
            self._warn(str(error).splitlines()[0])
            return None

    def _capture_on(self, device: torch.device, inputs: Sequence[Tensor]) -> _Graph:
        if device not in self._done:
            self._done[device] = torch.cuda.Event()
            self._pools[device] = torch.cuda.graph_pool_handle()
        caller, side = torch.cuda.current_stream(), torch.cuda.Stream()
        caller.wait_event(self._done[device])  # an earlier replay may still use the pool
        side.wait_stream(caller)
        with torch.cuda.stream(side):
            static = [tensor.clone(memory_format=torch.preserve_format) for tensor in inputs]
            for _ in range(WARM_UP):  # libraries choose and allocate what must not happen in a capture
                self.function(list(static))
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pools[device], stream=side, capture_error_mode="thread_local"):
            output = self.function(list(static))
        caller.wait_stream(side)
        return _Graph(graph, static, output)

    def _warn(self, why: str) -> None:
        warnings.warn(f"cuda_graph=True runs without a graph here: {why}", RuntimeWarning, stacklevel=5)
