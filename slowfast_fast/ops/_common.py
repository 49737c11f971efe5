"""What every op does around its kernel: autocast, accumulation dtypes, PyTorch's settings, the call itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import Function

from .. import _C
from ..backend import BACKENDS, forced
from ..choosing import choose
from ._layout import as_dense


def kernel(backend: str, op: str) -> OpOverload:
    """The op of that name in the library of a compiled backend."""
    return getattr(getattr(torch.ops, str(BACKENDS[backend].library)), op).default


def register_fake(name: str, fake: Callable[..., Any]) -> None:
    """The shapes and strides that an op returns. A tensor on the meta device among others would get their call here,
    where nothing is computed: that raises, as the kernels do for tensors of several devices."""

    def of_one_device(*arguments: Any, **keywords: Any) -> Any:
        devices = {a.device for a in (*arguments, *keywords.values()) if isinstance(a, Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"{name} takes tensors of one device; got {', '.join(sorted(map(str, devices)))}")
        return fake(*arguments, **keywords)

    torch.library.register_fake(name, of_one_device)


def define_op(
    name: str,
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> None:
    """Tell PyTorch of an op with a gradient: the shapes and strides it returns, and its backward."""
    register_fake(name, fake)
    torch.library.register_autograd(name, backward, setup_context=setup_context)
    library, _, base = name.partition("::")
    op = getattr(getattr(torch.ops, library), base).default
    _functions[op] = _function(op, setup_context, backward)


# The gradient of an op as eager calls record it: what register_autograd makes of the same two functions goes through
# several layers of Python, which cost more than some kernels. See docs/design.md, "What a call costs the host".
_functions: dict[OpOverload, type[Function]] = {}


def _function(
    op: OpOverload, setup_context: Callable[..., None], backward: Callable[..., tuple[Tensor | None, ...]]
) -> type[Function]:
    def forward(ctx: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*arguments)
        setup_context(ctx, arguments, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(op._schema.name.replace("::", "_"), (Function,), members)


def define_frozen(library: str, op: str, fake: Callable[..., Any]) -> None:
    """The same for an op that folds fixed BatchNorm statistics itself, called only where no gradient is wanted."""
    define_inference_op(library, op, fake, "fold the statistics and call the op without them")


def define_inference_op(
    library: str, op: str, fake: Callable[..., Any], instead: str = "it is made for inference"
) -> None:
    """The same for an op without a gradient, which a library need not have."""
    if hasattr(getattr(torch.ops, library), op):
        register_fake(f"{library}::{op}", fake)
        forbid_gradient(f"{library}::{op}", f"{op} has no gradient: {instead}")


def forbid_gradient(op: str, problem: str) -> None:
    """Make a gradient of what ``op`` returns raise, saying ``problem``."""

    def refuse(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(problem)

    torch.library.register_autograd(op, refuse)


def frozen_kernel(backend: str, op: str, *differentiable: Tensor | None) -> OpOverload | None:
    """The op that folds fixed BatchNorm statistics itself, for a call of which no gradient is wanted; None where the
    library of the backend has none, and for a graph, whose compiler folds the constants once."""
    library = BACKENDS[backend].library
    if torch.compiler.is_compiling() or library is None or wants_gradient(*differentiable):
        return None
    return kernel(backend, op) if hasattr(getattr(torch.ops, library), op) else None


def backward_library(library: str, op: str, x: Tensor, weight: Tensor, stride: int, tf32: bool) -> str:
    """Where the backward of a call of public op ``op`` runs that ran in ``library``: there, if its backend was forced,
    or where there is no choice; else ``auto`` chooses anew, since all backends save the same."""
    if not x.is_cuda or forced() != "auto":
        return library
    choice = choose(op, x, weight, stride, tf32=tf32, direction="bwd")
    return BACKENDS[choice.backend].library or library


# Every call asks; torch takes longer to find the function than the function takes.
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the active autocast dtype of the device of the first. As in PyTorch's own convolutions, float64 is
    left alone."""
    return _autocast(tensors) if _is_any_autocast_enabled() else tensors


def _autocast(tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    first = tensors[0]
    device = first.device.type if isinstance(first, Tensor) else "meta"
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def accumulator(vector: Tensor | None, x: Tensor, argument: str) -> Tensor | None:
    """A per-channel vector in the dtype that the kernels sum in. Differentiable."""
    if vector is None:
        return None
    dtype = accumulation_dtype(x)
    return as_dense(vector if vector.dtype == dtype else vector.to(dtype), argument)


class _Settings(ModuleType):
    """Global settings of PyTorch that a call passes on to its kernel.

    A module, because torch.compile reads the attributes of a module as constants and reads them again before each
    call, so that a changed setting compiles anew. It cannot trace what reads this setting.
    """

    @property
    def conv_tf32(self) -> bool:
        # What ATen asks before a cuDNN convolution. torch.backends.cudnn.allow_tf32 is one of several ways to set it,
        # and reading that one raises where the setting was made through another.
        return bool(torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32")


_settings = _Settings("slowfast_fast settings")


def allows_tf32(x: Tensor) -> bool:
    """Whether a convolution of ``x`` may round its factors to TF32: float32 on CUDA, where PyTorch lets cuDNN's do."""
    return x.is_cuda and x.dtype == torch.float32 and _settings.conv_tf32


def wants_gradient(*arguments: Any) -> bool:
    return torch.is_grad_enabled() and bool(torch._C._any_requires_grad(*arguments))


def call(op: OpOverload, *arguments: Any) -> Any:
    """``op(*arguments)``, past the Python autograd layer of ``torch.library`` wherever nobody needs that layer."""
    return op(*arguments) if torch.compiler.is_compiling() else call_eagerly(op, *arguments)


def _with_gradient(op: OpOverload, *arguments: Any) -> Any:
    # Function transforms and traces look for the op itself.
    if torch._C._are_functorch_transforms_active() or torch.jit.is_tracing() or op not in _functions:
        return op(*arguments)
    return _functions[op].apply(*arguments)


# What _AutoDispatchBelowAutograd excludes: that one cannot be entered again.
_AUTOGRAD = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
for _key in (torch._C.DispatchKey.AutogradOther, torch._C.DispatchKey.AutogradNestedTensor):
    _AUTOGRAD = _AUTOGRAD.add(_key)


def make_call(boxed: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """``call`` where nothing is being compiled, as ``_C.make_call`` describes it."""
    return _C.make_call(
        torch.is_grad_enabled,
        torch._C._any_requires_grad,
        partial(torch._C._ExcludeDispatchKeyGuard, _AUTOGRAD),
        _with_gradient,
        boxed,
    )


call_eagerly = make_call()
