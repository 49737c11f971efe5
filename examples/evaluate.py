"""Test a network that train.py trained: 10 clips x 3 crops of every video, averaged.

python examples/evaluate.py build/run/checkpoint.pt build/clips/val --views 10x3 --json build/run/evaluation.json
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import torch
from networks import NetworkOptions, load_network
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import slowfast_fast
from slowfast_fast import data


@torch.no_grad()
def average_views(network: nn.Module, views: Tensor, options: NetworkOptions, batch: int, average: str) -> Tensor:
    """Probabilities of the classes, from uint8 views (V, T, H, W, 3) on the network's device.

    Args:
        batch: views that go through the network together.
        average: "scores": softmax of the mean logits; "probabilities": mean of the softmaxes.
    """
    logits = torch.cat([network(options.inputs(part)).float() for part in views.split(batch)])
    return logits.softmax(1).mean(0) if average == "probabilities" else logits.mean(0).softmax(0)


def parse_views(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", value)
    if match is None:
        raise click.BadParameter(f"expected clips x crops, as 10x3, got {value}")
    return int(match[1]), int(match[2])


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110})
@click.argument("checkpoint", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--views", default="10x3", callback=parse_views, help="Clips x crops of each video")
@click.option("--crop", type=int, help="Pixels  [default: 8/7 of the crop in training, as 256 for 224]")
@click.option("--average", type=click.Choice(["probabilities", "scores"]), default="probabilities")
@click.option("--freeze/--no-freeze", default=True, help="Fold BatchNorm into the weights, for speed")
@click.option("--stock", is_flag=True, help="The plain network, which is not frozen")
@click.option("--batch", default=10, help="Views that go through the network together")
@click.option("--device", help="cpu or cuda  [default: a GPU if there is one]")
@click.option("--workers", default=4, help="Processes that decode")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the results to this file")
def main(checkpoint: Path, folder: Path, **given: Any) -> None:
    """Test CHECKPOINT on the videos in FOLDER, which has one folder for each class."""
    try:
        result = evaluate(checkpoint, folder, **given)
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{len(result['videos'])} videos: top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%}")


def evaluate(
    checkpoint: Path,
    folder: Path,
    *,
    views: tuple[int, int],
    crop: int | None,
    average: str,
    freeze: bool,
    stock: bool,
    batch: int,
    device: str | None,
    workers: int,
    out: Path | None,
) -> dict[str, Any]:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    (network, options), classes = load_network(saved, stock), saved["classes"]
    if freeze and not stock:
        network = slowfast_fast.freeze(network)
    network.to(device)
    crop = crop or options.crop * 8 // 7
    dataset = data.VideoFolder(folder, data.UniformViews(options.sampler, *views, crop, crop, fps=options.fps))
    if dataset.classes != classes:
        raise click.UsageError(f"FOLDER: expected the classes {classes}, got {dataset.classes}")
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, pin_memory=device.startswith("cuda"))
    results, right = [], torch.zeros(2)
    for (path, label), (frames, _) in zip(dataset.samples, tqdm(loader, desc="evaluating", unit="video"), strict=True):
        probabilities = average_views(network, frames.to(device), options, batch, average).cpu()
        ranked = probabilities.argsort(descending=True)[:5]
        right += torch.stack([ranked[0] == label, (ranked == label).any()])
        results.append(
            {
                "video": str(path.relative_to(folder)),
                "class": classes[label],
                "top5": {classes[i]: float(probabilities[i]) for i in ranked.tolist()},
            }
        )
    top1, top5 = (right / len(results)).tolist()
    result = {
        "checkpoint": str(checkpoint),
        "views": f"{views[0]}x{views[1]}",
        "crop": crop,
        "average": average,
        "network": "stock" if stock else "frozen" if freeze else "fused",
        "top1": top1,
        "top5": top5,
        "videos": results,
    }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
