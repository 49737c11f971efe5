from collections.abc import Callable
from typing import Any

def build_info() -> dict[str, Any]: ...
def make_look_up(
    classes: tuple[type, ...],
    plans: dict[Any, Any],
    watching: Any,
    forcing: Any,
    is_function_mode_enabled: Callable[[], bool],
    are_algorithms_deterministic: Callable[[], bool],
    allows_tf32: Callable[[Any], bool],
) -> Callable[[str, tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]], tuple[Any, Any]]:
    """look_up(op, options, tensors, vectors) gives the signature of a call and what ``plans`` has under it, or None.

    Signatures are equal where these are: the op; the options, in value and type; tensors, in shape, strides, dtype and
    device, or None; vectors, in dtype, or None; ``forcing.forced``, are_algorithms_deterministic() and, where the first
    tensor is on CUDA, allows_tf32(first tensor). Both results are None where ``watching.recorder`` is not, where a
    function mode is enabled, a tensor is of another class than ``classes``, or an option is no int, float, bool or
    None."""

def make_call(
    is_grad_enabled: Callable[[], bool],
    any_requires_grad: Callable[..., bool],
    below_autograd: Callable[[], Any],
    with_gradient: Callable[..., Any],
    boxed: Callable[..., Any] | None,
) -> Callable[..., Any]:
    """call_eagerly(op, *arguments) gives ``with_gradient(op, *arguments)`` where the first two say that a gradient is
    wanted, else ``op(*arguments)`` inside of the context manager ``below_autograd()``; with ``boxed``, as
    ``boxed(op._handle, *arguments)``, which passes over function modes and subclasses of Tensor."""
