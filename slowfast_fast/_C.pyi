from collections.abc import Callable
from typing import Any

def build_info() -> dict[str, Any]: ...
def make_signature(classes: tuple[type, ...]) -> Callable[..., tuple[Any, ...] | None]:
    """signature(settings, options, tensors, vectors), four tuples, gives a key that is equal for two calls where
    these are: settings; options, in value and type; tensors, in shape, strides, dtype and device, or None; vectors, in
    dtype, or None. It gives None where a tensor is of another class than ``classes``, or a vector on the meta
    device."""

def make_call(
    is_grad_enabled: Callable[[], bool],
    any_requires_grad: Callable[..., bool],
    below_autograd: Callable[[], Any],
    with_gradient: Callable[..., Any],
) -> Callable[..., Any]:
    """call_eagerly(op, *arguments) gives ``with_gradient(op, *arguments)`` where the first two say that a gradient is
    wanted, else ``op(*arguments)`` inside of the context manager ``below_autograd()``."""
