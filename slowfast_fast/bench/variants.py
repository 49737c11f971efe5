"""The ways to run one case: stock PyTorch in several forms, and every backend of this package.

A variant prepares everything it may prepare ahead (its layout, folded or packed weights, compilation) and returns a
runner: a call without arguments that does the case once and returns its results by name, `y` and in training the
gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..backend import backend as use_backend
from ..backend import can_run
from .cases import Case, natively_supported

Runner = Callable[[], dict[str, Tensor]]
Forward = Callable[[Tensor, Tensor | None], Tensor]  # x or fast, and slow
EPS = 1e-5
OURS = "slowfast_fast"


class Unavailable(Exception):
    """This variant can't run this case; the message says why."""


@dataclass
class Problem:
    """Inputs and parameters of a case, NCDHW-contiguous. `slow` is None for `temporal_conv`, `grad` in eval."""

    case: Case
    x: Tensor
    slow: Tensor | None
    weight: Tensor
    gamma: Tensor
    beta: Tensor
    mean: Tensor
    var: Tensor
    grad: Tensor | None

    @classmethod
    def random(cls, case: Case, device: torch.device, seed: int = 0) -> "Problem":
        shape, generator = case.shape, torch.Generator(device).manual_seed(seed)
        vector_dtype = torch.float64 if case.dtype is torch.float64 else torch.float32

        def normal(*size: int, dtype: torch.dtype = case.dtype) -> Tensor:
            return torch.randn(size, generator=generator, device=device).to(dtype)

        def positions(channels: int, frames: int) -> Tensor:
            return normal(shape.batch, channels, frames, shape.size, shape.size)

        def vector(scale: float, offset: float) -> Tensor:
            return scale * normal(shape.out_channels, dtype=vector_dtype) + offset

        fan_in = shape.channels * shape.kernel
        result_channels = shape.slow_channels + shape.out_channels
        return cls(
            case,
            x=positions(shape.channels, shape.frames),
            slow=positions(shape.slow_channels, shape.out_frames) if shape.slow_channels else None,
            weight=normal(shape.out_channels, shape.channels, shape.kernel, 1, 1) / fan_in**0.5,
            gamma=vector(0.1, 1.0),
            beta=vector(0.1, 0.0),
            mean=vector(0.1, 0.0),
            var=vector(0.1, 1.0).abs(),
            grad=positions(result_channels, shape.out_frames) if case.direction == "bwd" else None,
        )

    def to(
        self, *, dtype: torch.dtype | None = None, memory_format: torch.memory_format = torch.contiguous_format
    ) -> "Problem":
        """A copy in a dtype and layout of its own, so that no variant shares memory with another."""

        def copy(tensor: Tensor) -> Tensor:
            tensor = tensor.to(dtype or tensor.dtype, copy=True)
            return tensor.contiguous(memory_format=memory_format) if tensor.dim() == 5 else tensor

        tensors: dict[str, Any] = {name: copy(value) for name, value in vars(self).items() if torch.is_tensor(value)}
        return replace(self, **tensors)

    @property
    def op(self) -> str:
        """The op of this package that does the case."""
        return f"{self.case.shape.op}_bn"

    @property
    def tensors(self) -> list[Tensor]:
        """What that op's choice of backend depends on."""
        return [tensor for tensor in (self.slow, self.x, self.weight) if tensor is not None]

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution that BatchNorm in eval mode folds into."""
        scale = self.gamma * torch.rsqrt(self.var + EPS)
        weight = self.weight * scale.to(self.weight.dtype).view(-1, 1, 1, 1, 1)
        return weight, (self.beta - self.mean * scale).to(self.weight.dtype)


class StockBlock(nn.Module):
    """Conv3d, BatchNorm3d and ReLU, then the concatenation with slow if there is one: what the stock networks run."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        shape, weight = problem.case.shape, problem.weight
        kernel, stride, padding = (shape.kernel, 1, 1), (shape.stride, 1, 1), (shape.padding, 0, 0)
        options: dict[str, Any] = {
            "stride": stride,
            "padding": padding,
            "bias": False,
            "device": weight.device,
            "dtype": weight.dtype,
        }
        self.conv = nn.Conv3d(shape.channels, shape.out_channels, kernel, **options)
        self.norm = nn.BatchNorm3d(shape.out_channels, eps=EPS, device=weight.device, dtype=problem.gamma.dtype)
        self.activation = nn.ReLU()
        self.conv.weight = nn.Parameter(weight)
        self.norm.weight, self.norm.bias = nn.Parameter(problem.gamma), nn.Parameter(problem.beta)
        self.norm.running_mean, self.norm.running_var = problem.mean, problem.var
        self.train(problem.case.direction == "bwd")

    def forward(self, x: Tensor, slow: Tensor | None = None) -> Tensor:
        y = self.activation(self.norm(self.conv(x)))
        return y if slow is None else torch.cat([slow, y], dim=1)


def _step(problem: Problem, forward: Forward, parameters: dict[str, Tensor]) -> Runner:
    """The runner of a forward: without gradients in eval, else with those of the inputs and of the parameters."""
    x, slow, grad = problem.x, problem.slow, problem.grad
    if grad is None:

        @torch.no_grad()
        def evaluate() -> dict[str, Tensor]:
            return {"y": forward(x, slow)}

        return evaluate

    inputs = {"dx": x} if slow is None else {"dx": x, "dslow": slow}
    sources = {name: tensor.requires_grad_() for name, tensor in {**inputs, **parameters}.items()}

    def train() -> dict[str, Tensor]:
        y = forward(x, slow)
        gradients = torch.autograd.grad(y, list(sources.values()), grad)
        return {"y": y.detach(), **dict(zip(sources, gradients, strict=True))}

    return train


def _run_block(problem: Problem, block: StockBlock, forward: Forward) -> Runner:
    parameters = {"dweight": block.conv.weight, "dgamma": block.norm.weight, "dbeta": block.norm.bias}
    return _step(problem, forward, parameters)


def stock_eager(problem: Problem) -> Runner:
    """Stock modules on contiguous NCDHW tensors."""
    problem = problem.to(memory_format=torch.contiguous_format)
    block = StockBlock(problem)
    return _run_block(problem, block, block)


def stock_channels_last(problem: Problem) -> Runner:
    """The same modules on channels_last_3d tensors and weights."""
    problem = problem.to(memory_format=torch.channels_last_3d)
    block = StockBlock(problem)
    return _run_block(problem, block, block)


def compiled(problem: Problem) -> Runner:
    """torch.compile (inductor) of the stock modules in channels_last_3d, with freezing in eval."""
    if torch.finfo(problem.x.dtype).bits == 64:
        raise Unavailable("float64 is not what inductor is for")
    problem = problem.to(memory_format=torch.channels_last_3d)
    block = StockBlock(problem)
    return compile_now(_run_block(problem, block, compile_module(block, freeze=problem.grad is None)))


def compile_module(module: nn.Module, *, freeze: bool) -> Callable[..., Tensor]:
    """With inductor, for static shapes. Freezing folds BatchNorm and packs weights; it is for inference only. On a GPU
    inductor measures which kernels are fastest; launches it need not save (CUDA graphs), since they are not timed."""
    options: dict[str, Any] = {"freezing": freeze, "max_autotune": torch.cuda.is_available()}
    return torch.compile(module, fullgraph=True, dynamic=False, options=options)


def compile_now(runner: Runner) -> Runner:
    """Run once, so that compilation happens here. Without a C++ compiler inductor fails in ways of its own."""
    try:
        runner()
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:120]
        raise Unavailable(f"torch.compile failed: {type(error).__name__}: {reason}") from error
    return runner


def conv2d_view(problem: Problem) -> Runner:
    """The temporal convolution as a 2-D one, (N, C, T, H*W) with kernel (kt, 1). In eval BatchNorm is folded in."""
    problem = problem.to(memory_format=torch.channels_last_3d)
    stride, padding = (problem.case.shape.stride, 1), (problem.case.shape.padding, 0)
    size = problem.case.shape.size

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.conv2d(x.flatten(3), weight.flatten(3), bias, stride=stride, padding=padding)
        return y.unflatten(3, (size, size))

    if problem.grad is None:
        weight, bias = problem.folded()

        def forward(x: Tensor, slow: Tensor | None) -> Tensor:
            y = convolve(x, weight, bias).relu_()
            return y if slow is None else torch.cat([slow, y], dim=1)

        return _step(problem, forward, {})

    def forward_and_norm(x: Tensor, slow: Tensor | None) -> Tensor:
        y = convolve(x, problem.weight, None)
        y = F.batch_norm(y, problem.mean, problem.var, problem.gamma, problem.beta, training=True, eps=EPS).relu()
        return y if slow is None else torch.cat([slow, y], dim=1)

    return _step(problem, forward_and_norm, _parameters(problem))


def mkldnn_pointwise(problem: Problem) -> Runner:
    """oneDNN's convolution with the ReLU post-op, BatchNorm folded, weight packed ahead (as inductor's freezing)."""
    if problem.x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        raise Unavailable("torch.ops.mkldnn._convolution_pointwise runs on a CPU with oneDNN only")
    if problem.grad is not None:
        raise Unavailable("torch.ops.mkldnn._convolution_pointwise has no backward")
    if problem.x.dtype is torch.float64:
        raise Unavailable("oneDNN has no float64 convolution")
    if not natively_supported(problem.x.dtype, problem.x.device):
        raise Unavailable(f"oneDNN has no {problem.x.dtype} convolution for this CPU")
    problem = problem.to(memory_format=torch.channels_last_3d)
    shape = problem.case.shape
    weight, bias = problem.folded()
    padding, stride, dilation = [shape.padding, 0, 0], [shape.stride, 1, 1], [1, 1, 1]
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, 1, list(problem.x.shape))

    def forward(x: Tensor, slow: Tensor | None) -> Tensor:
        y = torch.ops.mkldnn._convolution_pointwise(x, packed, bias, padding, stride, dilation, 1, "relu", [], "")
        return y if slow is None else torch.cat([slow, y], dim=1)

    return _step(problem, forward, {})


def _parameters(problem: Problem) -> dict[str, Tensor]:
    return {"dweight": problem.weight, "dgamma": problem.gamma, "dbeta": problem.beta}


def ours(problem: Problem, backend: str) -> Runner:
    """The op of this package on one backend, called as its modules do: in eval it folds BatchNorm in every call."""
    reason = can_run(backend, problem.op, *problem.tensors)
    if reason is not None:
        raise Unavailable(reason)
    problem = problem.to(memory_format=torch.channels_last_3d)
    op = getattr(ops, problem.op)
    stride_name = "stride" if problem.slow is None else "alpha"
    options = {stride_name: problem.case.shape.stride, "eps": EPS, "training": problem.grad is not None, "relu": True}
    vectors = (problem.gamma, problem.beta, problem.mean, problem.var)

    def forward(x: Tensor, slow: Tensor | None) -> Tensor:
        activations = (x,) if slow is None else (slow, x)
        with use_backend(backend):
            return op(*activations, problem.weight, *vectors, **options)

    return _step(problem, forward, {} if problem.grad is None else _parameters(problem))


STOCK: dict[str, Callable[[Problem], Runner]] = {
    "stock": stock_eager,
    "stock channels_last_3d": stock_channels_last,
    "conv2d view": conv2d_view,
    "mkldnn post-op": mkldnn_pointwise,
    "torch.compile": compiled,
}
