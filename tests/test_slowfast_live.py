"""create_slowfast against what it stands in for, the installed pytorchvideo's: same call, seed, weights and clips."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from installed_pytorchvideo import RoIAlign, pytorchvideo_slowfast
from torch import Tensor, nn

import slowfast_fast
from slowfast_fast.nn.head import create_res_roi_pooling_head
from slowfast_fast.nn.stem import create_res_basic_stem

pytest.importorskip("hypothesis", reason="configurations are drawn by hypothesis, which is not installed")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# float64, so that a difference is one of arithmetic. BatchNorm over the few values of tiny clips amplifies rounding.
DTYPE = torch.float64
TOLERANCE = 1e-6

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def stock() -> ModuleType:
    return pytorchvideo_slowfast()


def pair(
    ours: Callable[..., nn.Module], theirs: Callable[..., nn.Module], **kwargs: Any
) -> tuple[nn.Module, nn.Module]:
    """The two networks from one seed, after checking that they start equal; then with new gammas: many start as 0."""
    seed = torch.randint(2**31, ()).item()
    models = []
    for create in (ours, theirs):
        torch.manual_seed(seed)
        models.append(create(**kwargs).to(DTYPE))
    fused, stock = models
    assert [(n, type(m).__name__) for n, m in fused.named_modules()] == [
        (n, type(m).__name__) for n, m in stock.named_modules()
    ]
    expected = stock.state_dict()
    assert list(fused.state_dict()) == list(expected)
    for key, value in fused.state_dict().items():
        assert torch.equal(value, expected[key]), key
    for parameter in stock.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    fused.load_state_dict(stock.state_dict())
    return fused, stock


def agree(got: Tensor, expected: Tensor, what: str) -> None:
    assert got.shape == expected.shape, what
    error = torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected).clamp_min(1e-6)
    assert error < TOLERANCE, f"{what}: relative error {error:.1e}"


def pass_plain_gradients(model: nn.Module) -> None:
    """Makes what the pools hand back dense in the order of dimensions.

    PyTorch's BatchNorm (2.13, CPU) returns a wrong gradient, silently, when its input is NCDHW and the gradient is
    channels_last_3d but for the stride of a dimension of size 1. Pools over a width of 1 make such gradients, and stock
    hands them to its last norms.
    """

    def hook_tensors(_pools: nn.Module, args: tuple[list[Tensor]]) -> None:
        for tensor in args[0]:
            if tensor.requires_grad:
                tensor.register_hook(lambda grad: grad.clone(memory_format=torch.contiguous_format))

    getattr(model, "model", model).blocks[5].register_forward_pre_hook(hook_tensors)


def compare(fused: nn.Module, stock: nn.Module, clips: list[Tensor], *more: Tensor) -> None:
    """Eval output, training output, every gradient (inputs' too) and every statistic."""
    with torch.no_grad():
        agree(fused.eval()(list(clips), *more), stock.eval()(list(clips), *more), "eval output")
    results = []
    grad = None
    for model in (fused, stock):
        pass_plain_gradients(model)
        x = [clip.clone().requires_grad_() for clip in clips]
        y = model.train()(list(x), *more)
        grad = torch.randn_like(y) if grad is None else grad
        y.backward(grad)
        results.append((y.detach(), x))
    (y, x), (expected_y, expected_x) = results
    agree(y, expected_y, "training output")
    for pathway, (a, b) in enumerate(zip(x, expected_x, strict=True)):
        agree(a.grad, b.grad, f"gradient of clip {pathway}")
    gradients = [
        [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()] for model in (fused, stock)
    ]
    agree(*(torch.cat([g.flatten() for g in grads]) for grads in gradients), "gradients of the parameters")
    for (key, a), (_, b) in zip(fused.named_buffers(), stock.named_buffers(), strict=True):
        agree(a.to(DTYPE), b.to(DTYPE), key)


class ScaledBatchNorm(nn.BatchNorm3d):
    """Not what nn.BatchNorm3d computes, though isinstance says that it is one."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def group_norm(num_features: int, eps: float, momentum: float) -> nn.Module:
    return nn.GroupNorm(1, num_features, eps)


NORMS = {
    "BatchNorm3d": nn.BatchNorm3d,
    "cumulative": lambda num_features, eps, momentum: nn.BatchNorm3d(num_features, eps, momentum=None),
    "untracked": partial(nn.BatchNorm3d, track_running_stats=False),
    "not affine": partial(nn.BatchNorm3d, affine=False),
    "subclass": ScaledBatchNorm,
    "GroupNorm": group_norm,
    "none": None,
}
ACTIVATIONS = {"ReLU": nn.ReLU, "in place": partial(nn.ReLU, inplace=True), "SiLU": nn.SiLU, "none": None}


@st.composite
def configurations(draw: st.DrawFn) -> tuple[dict[str, Any], list[tuple[int, ...]]]:
    """Keyword arguments, and the shapes of [slow, fast]."""
    reduction, alpha = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4, 8]))
    width, frames = reduction * draw(st.sampled_from([4, 8])), draw(st.sampled_from([1, 2, 3]))
    height, breadth = draw(st.sampled_from([16, 31])), draw(st.sampled_from([16, 40]))
    kernel = st.sampled_from([(1, 1, 1), (3, 1, 1), (5, 1, 1), ((3, 1, 1), (1, 1, 1)), [(1, 1, 1), (3, 3, 3)]])
    four = partial(st.lists, min_size=4, max_size=4)
    spatial_strides = draw(four(st.sampled_from([1, 2])))
    temporal_strides = draw(st.sampled_from([(1, 1, 1, 1), (1, 2, 1, 1)]))
    global_average = draw(st.booleans())
    pooled = draw(st.sampled_from(["average", "adaptive"]))
    frames_out = (frames + 1) // 2 if 2 in temporal_strides else frames
    fast_out = (frames * alpha + 1) // 2 if 2 in temporal_strides else frames * alpha
    arguments = {
        "slowfast_channel_reduction_ratio": draw(st.sampled_from([reduction, (reduction,)])),
        "slowfast_conv_channel_fusion_ratio": draw(st.sampled_from([1, 2, 3])),
        "slowfast_fusion_conv_kernel_size": (draw(st.sampled_from([1, 3, 5, 7])), 1, 1),
        "slowfast_fusion_conv_stride": (alpha, 1, 1),
        "input_channels": draw(st.sampled_from([(3, 3), (1, 2)])),
        "model_depth": draw(st.sampled_from([18, 18, 18, 50])),
        "model_num_class": draw(st.integers(1, 9)),
        "dropout_rate": 0.0,
        "norm": NORMS[draw(st.sampled_from(list(NORMS)))],
        "activation": ACTIVATIONS[draw(st.sampled_from(list(ACTIVATIONS)))],
        "stem_dim_outs": (width, width // reduction),
        "stem_conv_kernel_sizes": draw(st.sampled_from([((1, 7, 7), (5, 7, 7)), ((3, 3, 3), (1, 1, 1))])),
        "stem_pool": draw(st.sampled_from([nn.MaxPool3d, (nn.AvgPool3d, nn.MaxPool3d), (None, None)])),
        "stage_conv_a_kernel_sizes": draw(st.tuples(four(kernel), four(kernel))),
        "stage_conv_b_num_groups": (draw(four(st.sampled_from([1, 2]))), (1, 1, 1, 1)),
        "stage_conv_b_dilations": (draw(four(st.sampled_from([(1, 1, 1), (1, 2, 2)]))),) * 2,
        "stage_spatial_strides": (spatial_strides, spatial_strides),
        "stage_temporal_strides": (temporal_strides, temporal_strides),
        "head_pool": {"average": nn.AvgPool3d, "adaptive": nn.AdaptiveAvgPool3d}[pooled],
        "head_pool_kernel_sizes": ((frames_out, 1, 1), (fast_out, 1, 1)),
        "head_output_with_global_average": global_average,
        "head_activation": draw(st.sampled_from([None, nn.Softmax, nn.Sigmoid])),
    }
    if draw(st.integers(0, 9)) == 0:
        arguments["head"] = None
    channels = arguments["input_channels"]
    # Three clips: of two values a channel nothing is left of BatchNorm's gradient but eps and rounding errors.
    return arguments, [(3, channels[0], frames, height, breadth), (3, channels[1], frames * alpha, height, breadth)]


@given(configurations(), st.integers(0, 2**31))
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
def test_random_configurations(
    stock: ModuleType, configuration: tuple[dict[str, Any], list[tuple[int, ...]]], seed: int
) -> None:
    arguments, shapes = configuration
    torch.manual_seed(seed)
    fused, expected = pair(slowfast_fast.create_slowfast, stock.create_slowfast, **arguments)
    clips = [torch.randn(shape, dtype=DTYPE) for shape in shapes]
    try:
        with torch.no_grad():
            expected.eval()(list(clips))
    except RuntimeError:  # Frames or sizes that do not fit: so it must be here.
        with pytest.raises((RuntimeError, ValueError)):
            fused.eval()(clips)
        return
    compare(fused, expected, clips)


SMALL = {
    "model_depth": 18,
    "slowfast_channel_reduction_ratio": 4,
    "stem_dim_outs": (16, 4),
    "dropout_rate": 0.0,
    "model_num_class": 7,
    "head_pool_kernel_sizes": ((2, 1, 1), (8, 1, 1)),
}


def clips(size: int = 32) -> list[Tensor]:
    return [torch.randn(2, 3, frames, size, size, dtype=DTYPE) for frames in (2, 8)]


def test_signature_is_stock_s(stock: ModuleType) -> None:
    def names(value: Any) -> Any:
        """Functions of the two packages by their names, sequences as tuples."""
        if isinstance(value, tuple | list):
            return tuple(map(names, value))
        return value.__name__ if inspect.isfunction(value) else value

    def defaults(function: Callable[..., Any]) -> list[tuple[str, Any]]:
        return [(p.name, names(p.default)) for p in inspect.signature(function).parameters.values()]

    assert defaults(slowfast_fast.create_slowfast) == defaults(stock.create_slowfast)
    known = dict(defaults(slowfast_fast.create_slowfast)) | dict(defaults(slowfast_fast.create_slowfast_with_roi_head))
    for name, default in defaults(stock.create_slowfast_with_roi_head):
        assert known[name] == default, name


@pytest.mark.parametrize("depth", [18, 50, 101, 152])
def test_same_modules_and_initial_weights_at_every_depth(stock: ModuleType, depth: int) -> None:
    pair(slowfast_fast.create_slowfast, stock.create_slowfast, model_depth=depth)


class Swap(nn.Module):
    """A fusion of somebody else's: adds the average of the fast frames to the slow ones, channel by channel."""

    def __init__(self, channels: int, extra: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels // 4, extra, 1)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        slow, fast = x
        return [torch.cat([self.proj(fast).mean(2, keepdim=True).expand(-1, -1, slow.shape[2], -1, -1), slow], 1), fast]


def fusion_builder(fusion_dim_in: int, stage_idx: int) -> nn.Module:
    return nn.Identity() if stage_idx > 3 else Swap(fusion_dim_in, fusion_dim_in // 2)


def stem_with_bias(**kwargs: Any) -> nn.Module:
    return create_res_basic_stem(**kwargs, conv_bias=True)


def bottleneck_with_bias(**kwargs: Any) -> nn.Module:
    """Stock's own block with somebody else's convolutions; its class is not ours, so it runs as it is."""
    from pytorchvideo.models.resnet import create_bottleneck_block

    return create_bottleneck_block(**{**kwargs, "conv_a": lambda **conv: nn.Conv3d(**{**conv, "bias": True})})


def mean_head(*, in_features: int, out_features: int, **kwargs: Any) -> nn.Module:
    assert set(kwargs) == {"pool", "output_size", "dropout_rate", "activation", "output_with_global_average"}
    return nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(in_features, out_features))


@pytest.mark.parametrize(
    "custom",
    [
        {"fusion_builder": fusion_builder},
        {"stem_function": (stem_with_bias, stem_with_bias)},
        {"bottleneck": bottleneck_with_bias},
        {"bottleneck": ((bottleneck_with_bias,) * 4,) * 2},
        {"head": mean_head},
        {"norm": lambda num_features, eps, momentum: nn.BatchNorm3d(num_features, 1e-3, 0.3)},
        {"activation": nn.Hardswish},
    ],
    ids=lambda custom: next(iter(custom)),
)
def test_callables_are_called_as_stock_calls_them(stock: ModuleType, custom: dict[str, Any]) -> None:
    fused, expected = pair(slowfast_fast.create_slowfast, stock.create_slowfast, **SMALL, **custom)
    compare(fused, expected, clips())


def test_the_builder_of_pytorchvideo(stock: ModuleType) -> None:
    """Its own class, whose modules run as they are, in a frozen network too."""
    builder = stock.FastToSlowFusionBuilder(
        slowfast_channel_reduction_ratio=4,
        conv_fusion_channel_ratio=2,
        conv_kernel_size=(5, 1, 1),
        conv_stride=(4, 1, 1),
    )
    options = SMALL | {"fusion_builder": builder.create_module}
    fused, expected = pair(slowfast_fast.create_slowfast, stock.create_slowfast, **options)
    compare(fused, expected, clips())
    x = clips()
    with torch.no_grad():
        agree(slowfast_fast.freeze(fused)(x), expected.eval()(list(x)), "frozen")


def test_three_pathways(stock: ModuleType) -> None:
    class Sideways(nn.Module):
        """Passes all three on; stock's lateral connection knows two."""

        def forward(self, x: list[Tensor]) -> list[Tensor]:
            slow, fast, other = x
            return [torch.cat([slow, fast[:, :, ::4], other[:, :, ::4]], 1), fast, other]

    def build(fusion_dim_in: int, stage_idx: int) -> nn.Module:
        return nn.Identity() if stage_idx > 3 else Sideways()

    sizes: dict[str, Any] = {}
    defaults = {p.name: p.default for p in inspect.signature(stock.create_slowfast).parameters.values()}
    for name, value in defaults.items():
        if isinstance(value, tuple) and len(value) == 2:
            sizes[name] = (*value, value[1])
    sizes |= SMALL | {
        "stem_dim_outs": (16, 4, 4),
        "slowfast_channel_reduction_ratio": (4, 4),
        "head_pool_kernel_sizes": ((2, 1, 1), (8, 1, 1), (8, 1, 1)),
        "fusion_builder": build,
    }
    fused, expected = pair(slowfast_fast.create_slowfast, stock.create_slowfast, **sizes)
    compare(fused, expected, [*clips(), clips()[1]])


DETECTION = SMALL | {"head_spatial_resolution": (3, 2), "head_output_size": (1, 1, 1)}
BOXES = torch.tensor([[0, 2, 3, 30, 20], [1, 0, 0, 32, 32], [1, 8, 4, 16, 30]], dtype=DTYPE)


@pytest.mark.parametrize("options", [{}, {"head_activation": None, "head_output_with_global_average": True}])
def test_detection(stock: ModuleType, options: dict[str, Any]) -> None:
    fused, expected = pair(
        slowfast_fast.create_slowfast_with_roi_head, stock.create_slowfast_with_roi_head, **DETECTION, **options
    )
    compare(fused, expected, clips(), BOXES)


def test_accelerated_detection(stock: ModuleType) -> None:
    """pytorchvideo's own detection network, whose head is called as it is."""
    accelerated, expected = pair(*[stock.create_slowfast_with_roi_head] * 2, **DETECTION)
    report = slowfast_fast.accelerate(accelerated)
    assert report.libraries == ("pytorchvideo",)
    assert sum(not row.reason for row in report.layers) == 24  # with a stride of 1, res5's shortcuts too
    compare(accelerated, expected, clips(), BOXES)


def test_detection_at_its_real_size(stock: ModuleType) -> None:
    fused, _ = pair(slowfast_fast.create_slowfast_with_roi_head, stock.create_slowfast_with_roi_head)
    assert sum(p.numel() for p in fused.parameters()) == 33_828_888
    assert len(fused.state_dict()) == 662


def test_detection_honours_what_stock_ignores(stock: ModuleType) -> None:
    model = slowfast_fast.create_slowfast_with_roi_head(
        **DETECTION,
        fusion_builder=fusion_builder,
        stem_function=(stem_with_bias, stem_with_bias),
        bottleneck=bottleneck_with_bias,
        head=partial(create_res_roi_pooling_head, roi=RoIAlign, pool_spatial=None),
    )
    first = model.model.blocks[0]
    assert isinstance(first.multipathway_fusion, Swap)
    assert first.multipathway_blocks[0].conv.bias is not None
    assert model.model.blocks[1].multipathway_blocks[0].res_blocks[0].branch2.conv_a.bias is not None
    assert model.detection_head.pool_spatial is None
    assert model.to(DTYPE)(clips(), BOXES).shape == (3, 7 * 3 * 2)


def test_detection_of_more_than_one_frame_raises(stock: ModuleType) -> None:
    model = slowfast_fast.create_slowfast_with_roi_head(
        **DETECTION | {"head_pool_kernel_sizes": ((1, 1, 1), (7, 1, 1))}
    )
    with pytest.raises(ValueError, match=r"T is 2.*head_pool_kernel_sizes"):
        model.to(DTYPE)(clips(), BOXES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_depth": 34}, "model_depth must be one of 18, 50, 101, 152, 200, .* got 34"),
        ({"stem_dim_outs": (64,)}, "stem_dim_outs must have 2 entries for 2 input_channels; got 1"),
        ({"stem_dim_outs": (64, 16)}, r"stem_dim_outs\[1\] must be .* = 8; got 16"),
        (
            {"slowfast_channel_reduction_ratio": 6, "stem_dim_outs": (64, 10)},
            "do not fit 64 channels: the lateral connection would give 20, the stage after it take 21",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slowfast_fast.create_slowfast(**arguments)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 3, 8, 32, 32), TypeError, "x must be a list with one tensor for each pathway; got Tensor"),
        (clips()[:1], ValueError, "x must have 2 tensors, one for each pathway; got 1"),
        ([clip[0] for clip in clips()], ValueError, r"x\[0\] must be \(N, C, T, H, W\); got shape \(3, 2, 32, 32\)"),
        ([clips()[0], clips()[1][:, :, :4]], ValueError, "alpha"),
    ],
)
def test_wrong_clips_are_named(x: Any, error: type[Exception], message: str) -> None:
    model = slowfast_fast.create_slowfast(**SMALL).to(DTYPE)
    with pytest.raises(error, match=message):
        model(x)
