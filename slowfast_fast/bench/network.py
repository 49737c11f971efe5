"""The whole network as a case: eval forward, and training step (forward, loss, backward, SGD with momentum) of a
SlowFast network, stock and ours, same weights."""

import importlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .. import freeze
from ..models import create_slowfast
from ..reference.slowfast import SlowFast
from .cases import DIRECTIONS, ELEMENT_SIZE
from .clips import Clips
from .leg import Leg
from .variants import OURS, Runner, Unavailable, compile_module, compile_now

OP = "slowfast"
NETWORK_DIRECTIONS = {"fwd": DIRECTIONS["fwd"], "bwd": "training step"}
# Where the targets of a training step hold.
TRAINING = {"cpu": Leg("float32", 2, 112), "cuda": Leg("bfloat16", 32, 224)}
LEARNING_RATE = 1e-6  # so small that every step of a race is as good as the first


@dataclass(frozen=True)
class Network:
    """A network of the paper's Table 2; its fast pathway has `alpha` times the slow one's frames."""

    depth: int
    slow_frames: int
    alpha: int

    @property
    def arguments(self) -> dict[str, Any]:
        return {"model_depth": self.depth, "slowfast_fusion_conv_stride": (self.alpha, 1, 1)}


# Named by depth, and T x tau of the slow pathway. R101: 101 layers deep in both, as pytorchvideo's model_depth has it.
NETWORKS = {"R50 4x16": Network(50, 4, 8), "R50 8x8": Network(50, 8, 4), "R101 16x8": Network(101, 16, 4)}
DEFAULT_NETWORK = "R50 8x8"
TRAINED = ("R50 4x16", "R50 8x8")


@dataclass(frozen=True)
class NetworkCase:
    """A network of `NETWORKS` on the clips of a leg; `direction` as in `cases.DIRECTIONS`."""

    leg: Leg
    direction: str
    network: str = DEFAULT_NETWORK

    @property
    def dtype(self) -> torch.dtype:
        return self.leg.dtype

    @property
    def crop(self) -> int:
        return self.leg.crop

    @property
    def batch(self) -> int:
        return self.leg.batch

    @property
    def name(self) -> str:
        return f"{OP} {self.network} batch {self.batch} at {self.crop} {self.direction}"

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        """Shapes of the slow and the fast input."""
        return [(self.batch, 3, frames, self.crop, self.crop) for frames in self.frames]

    @property
    def frames(self) -> tuple[int, int]:
        network = NETWORKS[self.network]
        return network.slow_frames, network.slow_frames * network.alpha

    @property
    def bytes(self) -> int:
        """Inputs and parameters, once: a bound that no fusion can go below, far under what any layer-wise run moves."""
        return (_counts(self)[1] + sum(torch.Size(size).numel() for size in self.sizes)) * ELEMENT_SIZE[self.dtype]

    @property
    def flops(self) -> int:
        """Of the convolutions and the linear layer, as `torch.utils.flop_counter` counts them."""
        return _counts(self)[0]


def _create(create: Callable[..., nn.Module], case: NetworkCase) -> nn.Module:
    """The network at the crop of the case, without dropout so that variants can be compared in training."""
    size = math.ceil(case.crop / 32)
    pools = tuple((frames, size, size) for frames in case.frames)
    return create(dropout_rate=0.0, head_pool_kernel_sizes=pools, **NETWORKS[case.network].arguments)


@lru_cache
def _counts(case: NetworkCase) -> tuple[int, int]:
    """FLOPs and number of parameters, counted on the reference without computing anything."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = _create(SlowFast, case)
        inputs = [torch.empty(size) for size in case.sizes]
        output = model(inputs)
        if case.direction == "bwd":
            output.sum().backward()
    return counter.get_total_flops(), sum(parameter.numel() for parameter in model.parameters())


def random_state(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """A state dict that keeps activations and logits near 1 and every branch alive, unlike a fresh network's.

    Convolutions and linear layers are drawn from N(0, 1 / fan_in), BatchNorm's scales and variances from 0.5 to 1.5
    uniformly, biases and means from N(0, 0.01). Queries and keys of non-local blocks are a hundredth of that: without
    softmax attention is cubic in its input, and would grow beyond float32 from block to block.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in model.state_dict().items():
        value = torch.zeros_like(value)
        if value.dim() > 1:
            attends = key.endswith(("conv_theta.weight", "conv_phi.weight"))
            value.normal_(0, (0.01 if attends else 1) * value[0].numel() ** -0.5, generator=generator)
        elif key.endswith((".weight", "running_var")):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.is_floating_point():
            value.normal_(0, 0.1, generator=generator)
        state[key] = value
    return state


class NetworkProblem:
    """Inputs, labels and weights of a case, shared by its variants."""

    def __init__(self, case: NetworkCase, device: torch.device, seed: int = 0) -> None:
        self.case, self.device = case, device
        self.clips = Clips(case.sizes, case.dtype, device, seed)
        self.labels = torch.arange(case.batch, device=device)
        self.state = random_state(_create(SlowFast, case), seed)

    def model(self, create: Callable[..., nn.Module], dtype: torch.dtype) -> nn.Module:
        """A network of its own with the case's weights, in training or evaluation mode."""
        model = _create(create, self.case).to(self.device)
        model.load_state_dict(self.state)
        return model.to(dtype).train(self.case.direction == "bwd")

    def exact(self) -> dict[str, Tensor]:
        """The results of stock in float64: of a training step, whose statistics are the batch's, all; of an evaluation
        those of the clips that are checked, one after the other."""
        if self.case.direction == "bwd":
            return self.runner(SlowFast, torch.contiguous_format, dtype=torch.float64)()
        model = self.model(SlowFast, torch.float64)
        with torch.no_grad():
            return {"y": torch.cat([model(self.clips.alone(clip)) for clip in self.clips.checked])}

    def runner(
        self,
        create: Callable[..., nn.Module],
        memory_format: torch.memory_format,
        *,
        dtype: torch.dtype | None = None,
        compiled: bool = False,
    ) -> Runner:
        """The case on a network of its own, in `dtype` if given. Half precision means autocast over float32."""
        dtype = dtype or self.case.dtype
        half = torch.finfo(dtype).bits == 16
        training = self.case.direction == "bwd"
        model = self.model(create, torch.float32 if half else dtype)
        model.to(memory_format=memory_format)  # type: ignore[call-overload]  # the stubs lack this overload
        inputs = self.clips.laid_out(memory_format, dtype)
        network = compile_module(model, freeze=not training) if compiled else model
        # The first layer's gradient has passed through every other. In half precision, though, batch statistics amplify
        # rounding so much on the way that two correct networks need not agree in it.
        compared = {"dlast": model.get_parameter("blocks.6.proj.weight")}
        if not half and torch.finfo(self.case.dtype).bits > 16:
            compared["dfirst"] = model.get_parameter("blocks.0.multipathway_blocks.0.conv.weight")

        def forward() -> Tensor:
            with torch.autocast(self.device.type, dtype, enabled=half):
                return network(list(inputs))  # a list of its own, because pytorchvideo's network writes into it

        @torch.no_grad()
        def evaluate() -> dict[str, Tensor]:
            return {"y": forward()}

        optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)

        def train(update: bool = True) -> dict[str, Tensor]:
            logits = forward()
            F.cross_entropy(logits, self.labels).backward()
            gradients: dict[str, Any] = {name: parameter.grad for name, parameter in compared.items()}
            if update:
                optimizer.step()
            optimizer.zero_grad()
            return {"y": logits.detach(), **gradients}

        runner = train if training else evaluate
        if compiled:
            # The weights must stay: what the first call gives is compared with a first step, whose second is far off.
            compile_now(partial(train, update=False) if training else evaluate)
        return runner


def frozen(problem: NetworkProblem, cuda_graph: bool = False) -> Runner:
    """`slowfast_fast.freeze` of our network, in the dtype of the case."""
    if problem.case.direction == "bwd":
        raise Unavailable("a frozen network is for inference")
    if cuda_graph and problem.device.type != "cuda":
        raise Unavailable("CUDA graphs are a GPU's")
    network = freeze(problem.model(create_slowfast, torch.float32), dtype=problem.case.dtype, cuda_graph=cuda_graph)
    inputs = problem.clips.laid_out(torch.channels_last_3d)

    @torch.inference_mode()
    def evaluate() -> dict[str, Tensor]:
        return {"y": network(inputs)}

    if cuda_graph:
        with warnings.catch_warnings():
            # It runs without a graph where it could not capture one, and would be no other variant than without.
            warnings.simplefilter("error", RuntimeWarning)
            evaluate()
    return evaluate


def openvino(problem: NetworkProblem) -> Runner:
    """The stock network converted by OpenVINO, for latency, on as many threads as PyTorch has."""
    case = problem.case
    if case.direction == "bwd" or problem.device.type != "cpu" or case.dtype is not torch.float32:
        raise Unavailable("OpenVINO is raced for inference on a CPU in float32")
    try:
        ov = importlib.import_module("openvino")
    except ImportError as error:
        raise Unavailable("openvino is not installed: pip install openvino") from error
    with torch.no_grad():
        program = torch.export.export(problem.model(SlowFast, torch.float32), (problem.clips.tensors,))
    converted = ov.convert_model(program)
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    # The default on CPUs with bfloat16 would be to compute in it.
    compiled = ov.compile_model(converted, "CPU", options | {"INFERENCE_PRECISION_HINT": "f32"})
    inputs = [tensor.numpy() for tensor in problem.clips.tensors]
    return lambda: {"y": torch.from_numpy(compiled(inputs)[0])}


def autocast(problem: NetworkProblem) -> Runner:
    """Stock channels_last_3d in mixed precision, for training in float32."""
    if problem.case.direction == "fwd" or problem.case.dtype is not torch.float32:
        raise Unavailable("automatic mixed precision is raced in training, where the others are in float32")
    return problem.runner(SlowFast, torch.channels_last_3d, dtype=torch.bfloat16)


AUTOCAST = "stock autocast bfloat16"
NETWORK_STOCK: dict[str, Callable[[NetworkProblem], Runner]] = {
    "stock": lambda problem: problem.runner(SlowFast, torch.contiguous_format),
    "stock channels_last_3d": lambda problem: problem.runner(SlowFast, torch.channels_last_3d),
    AUTOCAST: autocast,
    "torch.compile": lambda problem: problem.runner(SlowFast, torch.channels_last_3d, compiled=True),
    "OpenVINO": openvino,
}
FROZEN = f"{OURS} frozen"
GRAPHED = f"{FROZEN}, graph"
NETWORK_OURS: dict[str, Callable[[NetworkProblem], Runner]] = {
    OURS: lambda problem: problem.runner(create_slowfast, torch.channels_last_3d),
    FROZEN: frozen,
    GRAPHED: partial(frozen, cuda_graph=True),
}
