"""What the videos show: ``python -m slowfast_fast classify``. Files are decoded view by view, and the probabilities are
averaged over the views, as in section 4 of the paper."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .compat import load_checkpoint
from .data import ClipSampler, UniformViews
from .data.folder import EXTENSIONS, videos_in
from .freezing import freeze
from .models import create_model, entry
from .models.registry import ACTIVATIONS, check_activation
from .nn.net import Net
from .pathways import pathway_frames


@dataclass(frozen=True)
class Answer:
    """Of one video: the likeliest classes with their probabilities, and frames of its middle view, (T, H, W, 3)."""

    video: Path
    views: int
    activation: str
    top: list[tuple[str, float]]
    frames: Tensor

    def as_json(self) -> dict[str, Any]:
        top = [{"label": label, "probability": probability} for label, probability in self.top]
        return {"video": str(self.video), "views": self.views, "activation": self.activation, "top": top}


class Classifier:
    """A registered network with its weights, and how it sees a video.

    Args:
        model: a name of ``list_models()``, of a network that takes no boxes.
        checkpoint: of its weights, as for ``load_checkpoint``; None: random ones.
        labels: the classes' names; None: "class 0" and on.
        classes: how many there are; None: as many as labels, or what the model has.
        activation: "softmax", or "sigmoid" for classes that do not exclude one another. None: what the checkpoint says,
            else the model's.
        views: (clips, crops) of each video.
        crop: of a view, in pixels; the shorter side of the video is scaled to it.
        rule: the library whose frames the pathways see.
        device, dtype: of the network.
        overrides: other keywords of the model.

    Raises ValueError for arguments that do not exist or do not fit, and what ``load_checkpoint`` raises.
    """

    def __init__(
        self,
        model: str = "slowfast_r50_8x8",
        *,
        checkpoint: str | Path | None = None,
        labels: Sequence[str] | None = None,
        classes: int | None = None,
        activation: str | None = None,
        views: tuple[int, int] = (10, 3),
        crop: int = 256,
        rule: str = "pytorchvideo",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        **overrides: Any,
    ) -> None:
        known = entry(model)
        if known.boxes:
            raise ValueError(f"model {model} classifies boxes, not videos")
        if overrides.get("head_activation") is not None:
            raise ValueError(
                "head_activation must be None: scores are wanted, of which `activation` makes probabilities"
            )
        classes = classes or (len(labels) if labels else None)
        network = create_model(model, **({"model_num_class": classes} if classes else {}), **overrides)
        saved = None if checkpoint is None else load_checkpoint(checkpoint, network).activation
        self.activation = activation or saved or known.activation
        check_activation(self.activation)
        network = network.eval().to(device)
        self.network: nn.Module = freeze(network, dtype=dtype) if type(network) is Net else network.to(dtype)
        self.labels, self.alpha, self.rule = labels, known.alpha, rule
        self.device, self.dtype = torch.device(device), dtype
        sampler = ClipSampler(known.frames, known.tau, known.alpha or 1, rule)
        self.read = UniformViews(sampler, *views, crop=crop, short_side=crop)

    def __call__(self, video: Path, top: int = 5) -> Answer:
        """Raises VideoError for a file that cannot be read, ValueError where labels do not fit the scores."""
        views = self.read(video)
        scores = torch.cat([self._probabilities(part) for part in views.split(self.read.crops)]).mean(0)
        if self.labels is not None and len(self.labels) != len(scores):
            raise ValueError(f"the network tells {len(scores)} classes apart, and {len(self.labels)} labels were given")
        best = scores.topk(min(top, len(scores)))
        names = [self.labels[i] if self.labels else f"class {i}" for i in best.indices.tolist()]
        middle = views[len(views) // 2]
        top_scores = list(zip(names, best.values.tolist(), strict=True))
        return Answer(video, len(views), self.activation, top_scores, middle)

    def slow_frames(self) -> list[int]:
        """Which frames of a view the slow pathway sees; none where there is one pathway."""
        if self.alpha is None:
            return []
        return list(pathway_frames(self.read.sampler.fast_frames, alpha=self.alpha, rule=self.rule)[0])

    @torch.no_grad()
    def _probabilities(self, views: Tensor) -> Tensor:
        clips = ops.pack_pathways(views.to(self.device), alpha=self.alpha, dtype=self.dtype, rule=self.rule)
        scores = self.network(clips if self.alpha else clips[0])
        return ACTIVATIONS[self.activation](scores.float()).cpu()


def find_videos(paths: Iterable[str | Path]) -> list[Path]:
    """The files among ``paths``, and those in folders among them, whose names end as videos' do, in order. Raises
    FileNotFoundError for what is not there, and for a folder without a video."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = videos_in(path)
            if not inside:
                raise FileNotFoundError(f"{path}: no videos ({', '.join(EXTENSIONS)}) in this folder")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise FileNotFoundError(f"{path}: no such file")
    return found


def read_labels(path: str | Path) -> list[str]:
    """Names of classes by number: a line each; or JSON, a list, {name: number} (as pytorchvideo's for Kinetics, whose
    names are in quotes twice) or {number: name}. Raises ValueError for anything else."""
    text = Path(path).read_text()
    if Path(path).suffix.lower() != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    given = json.loads(text)
    if isinstance(given, dict):
        pairs = [(value, key) if isinstance(value, int) else (int(key), value) for key, value in given.items()]
        given = [name for _, name in sorted(pairs)]
        if [number for number, _ in sorted(pairs)] != list(range(len(pairs))):
            raise ValueError(f"{path}: the numbers of classes must be 0 to {len(pairs) - 1}, each once")
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"{path}: expected a list of names, or names and numbers; got {type(given).__name__}")
    return [name.strip('"') for name in given]


def draw(answer: Answer, slow: Sequence[int], path: str | Path) -> None:
    """A PNG of the middle view: the slow pathway's frames in a row, below these the fast one's, in order of reading,
    and the likeliest classes."""
    from matplotlib.figure import Figure

    frames = answer.frames
    columns = len(slow) or min(len(frames), 8)
    pictures = {"slow": frames[list(slow)], "fast": frames} if slow else {"frames": frames}
    rows = [-(-len(shown) // columns) for shown in pictures.values()]
    figure = Figure(figsize=(1.2 * columns + 0.6, 1.2 * sum(rows) + 2.4), dpi=100, layout="constrained")
    figure.suptitle(answer.video.name)
    axes = figure.subplots(len(rows) + 1, 1, squeeze=False, height_ratios=[*rows, 1.6])[:, 0]
    for axis, (name, shown) in zip(axes, pictures.items(), strict=False):
        axis.imshow(_mosaic(shown, columns).numpy())
        axis.set(xticks=[], yticks=[], ylabel=name)
    labels, values = zip(*reversed(answer.top), strict=True)
    bars = axes[-1].barh(range(len(values)), values, color="#d62728", tick_label=labels)
    axes[-1].bar_label(bars, [f"{100 * value:.1f} %" for value in values], padding=3)
    axes[-1].set(xlim=(0, 1), xlabel=f"probability, mean of {answer.views} views")
    figure.savefig(path)


def _mosaic(frames: Tensor, columns: int) -> Tensor:
    """(T, H, W, 3) -> one picture, ``columns`` frames a row, white lines between them."""
    framed = F.pad(frames, (0, 0, 1, 1, 1, 1), value=255)
    missing = -len(frames) % columns
    framed = F.pad(framed, (0, 0, 0, 0, 0, 0, 0, missing), value=255)
    _, height, width, _ = framed.shape
    return framed.view(-1, columns, height, width, 3).transpose(1, 2).reshape(-1, columns * width, 3)
