"""The network that train.py trains and evaluate.py tests, from options that a checkpoint can hold."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import slowfast_fast
from slowfast_fast import data
from slowfast_fast.models import entry
from slowfast_fast.reference.slowfast import SlowFast

CROP = 224  # that the heads of named models are made for


@dataclass(frozen=True)
class NetworkOptions:
    """A network, and the clips that it takes.

    ``model`` is a name of ``slowfast_fast.models.list_models()``, or None: SlowFast as ``create_slowfast`` builds it,
    R50 8x8 if nothing else is said. What is None is as the model has it.
    """

    classes: int
    model: str | None = None
    depth: int | None = None
    width: int | None = None  # channels of the slow pathway's stem; the fast one has an eighth
    frames: int | None = None
    tau: int | None = None
    alpha: int | None = None
    crop: int = CROP
    fps: float | None = None
    dropout: float = 0.5

    def __post_init__(self) -> None:
        if self.crop < 32 or self.crop % 32:
            raise ValueError(f"crop: expected a multiple of 32, got {self.crop}")
        if self.model is not None and entry(self.model).boxes:
            raise ValueError(f"model: {self.model} is a detector; expected a classifier")
        taken = ("depth", "width", "alpha") if self.model is None else taken_by(self.model)
        for name in ("depth", "width", "alpha"):
            if (value := getattr(self, name)) is not None and name not in taken:
                raise ValueError(
                    f"{name}: {self.model} takes no {name}, got {value}; of depth, width and alpha it takes "
                    f"{', '.join(taken) or 'none'}"
                )

    @property
    def pathways(self) -> int:
        return 1 if self.model is not None and entry(self.model).alpha is None else 2

    @property
    def sampler(self) -> data.ClipSampler:
        """Of one pathway, the clip is what the sampler calls fast."""
        known = entry(self.model or "slowfast_r50_8x8")
        sizes = self.frames or known.frames, self.tau or known.tau, self.alpha or known.alpha or 1
        return data.ClipSampler(*sizes)

    def inputs(self, frames: Tensor) -> Any:
        """What the network takes, of uint8 frames (N, T, H, W, 3)."""
        return data.to_pathways(frames, self.sampler.alpha) if self.pathways == 2 else data.normalise(frames)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def taken_by(model: str) -> list[str]:
    """Which of depth, width and alpha can be chosen of a named model."""
    known = entry(model)
    taken = [name for name in ("depth", "width") if name in known.keywords or known.takes_stock_keywords]
    return taken if known.alpha is None else [*taken, "alpha"]  # what has two pathways has an alpha


def create_network(options: NetworkOptions) -> nn.Module:
    """Ours."""
    if options.model is None:
        return slowfast_fast.create_slowfast(**_stock_arguments(options))
    overrides: dict[str, Any] = {"model_num_class": options.classes, "dropout_rate": options.dropout}
    overrides |= {name: value for name in ("depth", "width") if (value := getattr(options, name)) is not None}
    # What takes the keywords of create_slowfast or create_resnet has a head for one size, other models take any.
    if entry(options.model).takes_stock_keywords:
        if options.alpha is not None:
            overrides["alpha"] = options.alpha
        if options.crop != CROP or options.frames is not None:
            overrides["head_pool"] = nn.AdaptiveAvgPool3d
    return slowfast_fast.create_model(options.model, **overrides)


def create_stock(options: NetworkOptions) -> nn.Module:
    """The plain network with the same initial weights: pytorchvideo's where it can be imported, else our reference.

    Raises:
        ValueError: a named model, of which there is no plain one.
    """
    if options.model is not None:
        raise ValueError("stock: the plain network is there for create_slowfast alone, not for a model by name")
    try:
        from pytorchvideo.models.slowfast import create_slowfast as create
    except ImportError:
        create = SlowFast
    initial = create_network(options).state_dict()  # before the other one draws random numbers
    stock = create(**_stock_arguments(options))
    stock.load_state_dict(initial)
    return stock


def _stock_arguments(options: NetworkOptions) -> dict[str, Any]:
    """For create_slowfast; the head's pools are as large as the maps that the crop leaves."""
    size, width, sampler = options.crop // 32, options.width or 64, options.sampler
    if width % 8:
        raise ValueError(f"width: expected a multiple of 8, got {width}")
    return {
        "model_depth": options.depth or 50,
        "model_num_class": options.classes,
        "dropout_rate": options.dropout,
        "stem_dim_outs": (width, width // 8),
        "slowfast_fusion_conv_stride": (sampler.alpha, 1, 1),
        "head_pool_kernel_sizes": ((sampler.num_frames, size, size), (sampler.fast_frames, size, size)),
    }


def load_network(checkpoint: dict[str, Any], stock: bool = False) -> tuple[nn.Module, NetworkOptions]:
    """The network of a checkpoint that train.py wrote, in evaluation mode, and its options."""
    options = NetworkOptions(**checkpoint["options"])
    network = (create_stock if stock else create_network)(options)
    network.load_state_dict(checkpoint["model_state"])
    return network.eval(), options
