from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

def build_info() -> dict[str, Any]: ...
def make_look_up(
    classes: tuple[type, ...],
    cpu: Any,
    plans: dict[bytes, Any],
    watching: Any,
    forcing: Any,
    is_function_mode_enabled: Callable[[], bool],
    are_algorithms_deterministic: Callable[[], bool],
    allows_tf32: Callable[[Any], bool],
) -> Callable[[str, tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]], tuple[bytes | None, Any]]:
    """look_up(op, options, tensors, vectors) gives the signature of a call and what ``plans`` has under it, or None.

    Signatures are equal where these are: the op; the options, in value and type; tensors, in shape, strides, dtype and
    device, or None; vectors, in dtype, or None; ``forcing.forced``, are_algorithms_deterministic() and, where the first
    tensor is not on the device ``cpu``, allows_tf32(first tensor). Both results are None where ``watching.recorder`` is
    not, where a function mode is enabled, a tensor is of another class than ``classes``, an option is no float, bool,
    None or int of 64 bits, or the signature would be longer than that of any op. The attributes of tensors are those of
    the first of the ``classes``."""

def make_call(
    is_grad_enabled: Callable[[], bool],
    any_requires_grad: Callable[..., bool],
    below_autograd: Callable[[], AbstractContextManager[Any]],
    with_gradient: Callable[..., Any],
    boxed: Callable[..., Any] | None,
) -> Callable[..., Any]:
    """call_eagerly(op, *arguments) gives ``with_gradient(op, *arguments)`` where the first two say that a gradient is
    wanted, else ``op(*arguments)`` inside of a context manager that ``below_autograd()`` gave and later calls
    enter again; with ``boxed``, as ``boxed(op._handle, *arguments)``, which passes over function modes and
    subclasses of Tensor."""
