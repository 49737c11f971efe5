"""A convolution with all that follows it, for inference, and the choice of its kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..backend import Choice, forced
from ..choosing import choose
from ..explanation import note, note_call, note_copy, recording
from ..ops._common import allows_tf32, call, kernel
from ..ops._layout import as_rows, places
from ..ops.spatial_conv import SPATIAL_FROM, SPATIAL_GEOMETRY, sums_few
from .choices import choose as choose_kernel
from .choices import layer_key
from .libraries import ATen, CuDnn2d, OneDnn, has_onednn

# Prepared weights that a layer keeps, one for each shape of input; each is as large as the weight.
MOST_PLANS = 4
# On the CPU ops.temporal_conv takes three taps by Winograd, in two thirds of the multiplications that the limit counts;
# from this many products a row on it is faster than oneDNN (docs/performance.md, "Frozen layers").
WINOGRAD_FROM = 64 * 32
# The ops among the kernels, as a table names them.
TEMPORAL, SPATIAL = "temporal_conv", "spatial_conv"


class Kernel(Protocol):
    """One of libraries.py, or an op of this package."""

    name: str
    reason: str

    def __call__(self, x: Tensor, residual: Tensor | None, overwrite: bool) -> Tensor: ...


class FrozenConv(nn.Module):
    """``act(conv(x) + shift + residual)`` in one kernel: BatchNorm is in the weight and the shift.

    Args:
        weight: (K, C, kt, kh, kw), in the dtype of the activations.
        shift: (K,), float32 (float64 for float64).
        stride, padding, dilation: (T, H, W).
        relu: whether act is ReLU or nothing.

    The kernel is chosen, and the weight prepared for it, when a shape of input comes for the first time.
    """

    explains_itself = True

    def __init__(
        self,
        weight: Tensor,
        shift: Tensor,
        *,
        stride: Sequence[int] = (1, 1, 1),
        padding: Sequence[int] = (0, 0, 0),
        dilation: Sequence[int] = (1, 1, 1),
        groups: int = 1,
        relu: bool,
    ) -> None:
        super().__init__()
        self.weight: Tensor
        self.shift: Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("shift", shift)
        self.stride, self.padding, self.dilation = list(stride), list(padding), list(dilation)
        self.groups = groups
        self.relu = relu
        self._plans: dict[Any, Kernel] = {}

    def forward(self, x: Tensor, residual: Tensor | None = None, overwrite: bool = False) -> Tensor:
        """x (N, C, T, H, W), residual of the result's shape -> (N, K, T', H', W') in channels_last_3d.

        ``overwrite``: nobody else needs the residual, so that the result may take its memory.
        """
        x = as_rows(x, "x")
        if torch.compiler.is_compiling():
            return self._traced(x, residual)
        dense = x.is_contiguous(memory_format=torch.channels_last_3d)
        if not (dense or self.is_temporal()):  # the libraries would copy it unseen
            note_copy("x", x)
            x, dense = x.contiguous(memory_format=torch.channels_last_3d), True
        if residual is not None:
            residual = as_rows(residual, "residual")
        if x.shape[0] == 0:
            return x.new_empty(self.output_shape(x)).contiguous(memory_format=torch.channels_last_3d)
        key = (x.shape, dense, x.dtype, x.device, forced(), allows_tf32(x))
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plan(x)
            kept = {} if len(self._plans) >= MOST_PLANS else self._plans
            self._plans = {**kept, key: plan}
        y = as_rows(plan(x, residual, overwrite), "the result")
        if recording():
            note((self,), type(self).__name__)
            note_call(type(self).__name__, Choice(plan.name, plan.reason), (x, residual), y)
        return y

    def is_temporal(self) -> bool:
        """Whether ops.temporal_conv can run this layer: (kt, 1, 1) without stride or padding in space."""
        return (
            self.groups == 1
            and self.weight.shape[3:] == (1, 1)
            and self.stride[1:] == [1, 1]
            and self.padding[1:] == [0, 0]
        )

    def is_spatial(self) -> bool:
        """Whether ops.spatial_conv can run this layer: (1, 3, 3) at stride 1."""
        form = (self.weight.shape[2:], self.stride, self.padding, self.dilation)
        return tuple(map(tuple, form)) == SPATIAL_GEOMETRY and self.groups == 1

    def temporal_geometry(self) -> dict[str, Any]:
        """stride, padding and dilation in T, by name."""
        return {"stride": self.stride[0], "padding": self.padding[0], "dilation": self.dilation[0]}

    def plain(self, x: Tensor) -> Tensor:
        """The convolution and its shift in PyTorch's words, new and dense channels_last_3d."""
        y = F.conv3d(x, self.weight, self.shift.to(x.dtype), self.stride, self.padding, self.dilation, self.groups)
        return y.contiguous(memory_format=torch.channels_last_3d)

    def output_shape(self, x: Tensor) -> tuple[int, ...]:
        sizes = map(places, x.shape[2:], self.weight.shape[2:], self.stride, self.padding, self.dilation)
        return (x.shape[0], self.weight.shape[0], *sizes)

    def _traced(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """For a graph, which may be stored and run on another processor: the op that a call would take, with the
        weight as it is; in place of a library's kernel PyTorch's words, for which a compiler finds one."""
        name, _ = self._chosen(x)
        if name == TEMPORAL:
            geometry = self.temporal_geometry()
            return ops.temporal_conv(x, self.weight, None, self.shift, residual, relu=self.relu, **geometry)
        if name == SPATIAL:
            return ops.spatial_conv(x, self.weight, self.shift, residual, relu=self.relu)
        y = self.plain(x)
        if residual is not None:
            y = y + residual
        return F.relu(y) if self.relu else y

    def _plan(self, x: Tensor) -> Kernel:
        name, why = self._chosen(x)
        plan = self.prepared(name, x)
        plan.reason = "; ".join(part for part in (plan.reason, why) if part)
        return plan

    def _chosen(self, x: Tensor) -> tuple[str, str]:
        """One of the candidates, and why that one where there are several."""
        names = self.candidates(x)
        if len(names) == 1:
            return names[0], ""
        key = layer_key(self.weight.shape, self.stride, x.dtype, allows_tf32(x))
        return choose_kernel(names, key, x.device.type, x.device.index)

    def prepared(self, name: str, x: Tensor) -> Kernel:
        """The kernel of that name for inputs like ``x``."""
        return KERNELS[name](self, x)

    def candidates(self, x: Tensor) -> tuple[str, ...]:
        """The kernels that can run this layer on ``x``, by the names of a table; the first is the one to take where
        nothing was measured."""
        op: tuple[str, ...] = ()
        if self.is_temporal():
            op = (TEMPORAL,)
        elif self.is_spatial() and x.device.type == "cpu":
            op = (SPATIAL,)
        if op and (forced() != "auto" or not x.is_contiguous(memory_format=torch.channels_last_3d)):
            return op  # which reads slices in place
        if x.is_cuda:
            flat = self.weight.shape[2] == 1 and self.stride[0] == 1 and self.padding[0] == 0
            return op + ((CuDnn2d.name,) if flat else ()) or (ATen.name,)
        if x.device.type != "cpu" or x.dtype == torch.float64 or not has_onednn(torch.float32):
            return op or (ATen.name,)
        if op and not has_onednn(x.dtype):
            return op
        return (*op, OneDnn.name) if op and self._by_winograd() else (OneDnn.name, *op)

    def _by_winograd(self) -> bool:
        k, c, taps = self.weight.shape[:3]
        if self.is_spatial():
            return min(k, c) >= SPATIAL_FROM
        return taps == 3 and self.stride[0] == 1 and self.dilation[0] == 1 and k * c >= WINOGRAD_FROM

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenConv:
        self._plans = {}
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._plans = {}
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # What is prepared belongs to this processor and cannot be pickled.
        return {**self.__dict__, "_plans": {}}

    def extra_repr(self) -> str:
        k, c, *taps = self.weight.shape
        kernel, stride, padding = tuple(taps), tuple(self.stride), tuple(self.padding)
        return f"{c}, {k}, kernel={kernel}, stride={stride}, padding={padding}, relu={self.relu}"


class TemporalConv:
    """ops.temporal_conv on the backend that it would choose, with a weight that was packed once."""

    def __init__(self, conv: FrozenConv, x: Tensor) -> None:
        self.geometry = tuple(conv.temporal_geometry().values())
        self.conv = conv
        self.tf32 = allows_tf32(x)
        choice = choose("temporal_conv", x, conv.weight, self.geometry[0], tf32=self.tf32)
        self.name = choice.backend
        self.packed: Tensor | None = None
        self.weight = conv.weight.contiguous()
        if choice.backend in ("cpu", "cuda"):
            self.op = kernel(choice.backend, "temporal_conv_packed")
            pack = kernel(choice.backend, "temporal_conv_pack")
            self.packed = pack(x, self.weight, *self.geometry, self.tf32)
        self.reason = f"temporal_conv: {choice.reason}"

    def __call__(self, x: Tensor, residual: Tensor | None, overwrite: bool) -> Tensor:
        conv = self.conv
        if self.packed is None:
            geometry = conv.temporal_geometry()
            return ops.temporal_conv(x, conv.weight, None, conv.shift, residual, relu=conv.relu, **geometry)
        arguments = (x, self.weight, self.packed, None, conv.shift, residual, *self.geometry, conv.relu, self.tf32)
        return call(self.op, *arguments)


class SpatialConv:
    """ops.spatial_conv on the backend that it would choose, with a weight that was packed once."""

    def __init__(self, conv: FrozenConv, x: Tensor) -> None:
        self.conv = conv
        choice = choose("spatial_conv", x)
        self.name = choice.backend
        self.packed: Tensor | None = None
        if choice.backend == "cpu" and not sums_few(x):
            self.op = kernel(choice.backend, "spatial_conv_packed")
            self.packed = kernel(choice.backend, "spatial_conv_pack")(x, conv.weight)
        self.reason = f"spatial_conv: {choice.reason}"

    def __call__(self, x: Tensor, residual: Tensor | None, overwrite: bool) -> Tensor:
        conv = self.conv
        if self.packed is None:
            return ops.spatial_conv(x, conv.weight, conv.shift, residual, relu=conv.relu)
        return call(self.op, x, conv.weight, self.packed, conv.shift, residual, conv.relu)


KERNELS: dict[str, Callable[[FrozenConv, Tensor], Kernel]] = {
    TEMPORAL: TemporalConv,
    SPATIAL: SpatialConv,
    **{library.name: library for library in (OneDnn, CuDnn2d, ATen)},
}
