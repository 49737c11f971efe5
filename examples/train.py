"""A training loop on real clips: teach a small SlowFast to tell bikes.mp4 from bigbuckbunny.mp4.

    python examples/train.py
    python examples/train.py --amp bfloat16 --steps 20

Exits with status 1 when the loss has not fallen, or a parameter got no finite gradient.
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from clips import count_frames, decode, packaged_video, pathways, preprocess, sample_indices
from torch import Tensor, nn
from tqdm import tqdm

import slowfast_fast

VIDEOS = ("bikes.mp4", "bigbuckbunny.mp4")
FRAMES, STRIDE = 32, 2


def load_clips(per_video: int, crop: int) -> tuple[list[Tensor], Tensor]:
    """Clips spread over both videos as [slow, fast], and the index of the video that each comes from."""
    clips, labels = [], []
    for label, name in enumerate(VIDEOS):
        path = packaged_video(name)
        total = count_frames(path)
        for centre in torch.linspace(0, 1, per_video).tolist():
            indices = sample_indices(total, FRAMES, STRIDE, centre)
            clips.append(preprocess(decode(path, indices), short_side=crop, crop=crop))
            labels.append(label)
    return pathways(clips), torch.tensor(labels)


def create_network(crop: int) -> nn.Module:
    """SlowFast 8x8 of depth 18 with two classes, its head's pools as large as this crop leaves the maps."""
    size = crop // 32
    pools = ((FRAMES // 4, size, size), (FRAMES, size, size))
    return slowfast_fast.create_slowfast(
        model_depth=18, model_num_class=len(VIDEOS), dropout_rate=0.0, head_pool_kernel_sizes=pools
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--clips", type=int, default=2, help="clips of each video (default: %(default)s)")
    parser.add_argument("--crop", type=int, default=64, help="a multiple of 32 (default: %(default)s)")
    parser.add_argument("--amp", choices=("bfloat16", "float16"), help="train under autocast to this dtype")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    device, amp = arguments.device, getattr(torch, arguments.amp or "float32")

    torch.manual_seed(arguments.seed)
    inputs, labels = load_clips(arguments.clips, arguments.crop)
    inputs = [pathway.to(device, memory_format=torch.channels_last_3d) for pathway in inputs]
    labels = labels.to(device)
    network = create_network(arguments.crop).to(device, memory_format=torch.channels_last_3d).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(device, enabled=amp is torch.float16)  # float16 gradients underflow without it

    losses = []
    for step in tqdm(range(arguments.steps), desc="training", unit="step", delay=1):
        with torch.autocast(device, amp, enabled=arguments.amp is not None):
            loss = F.cross_entropy(network(list(inputs)), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if step == 0:
            without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        tqdm.write(f"step {step + 1:3}: loss {losses[-1]:.4f}")

    if without:
        print(f"no finite gradient for {without}", file=sys.stderr)
        return 1
    first, last = sum(losses[:3]) / len(losses[:3]), sum(losses[-3:]) / len(losses[-3:])
    print(f"mean loss of the first three steps {first:.4f}, of the last three {last:.4f}")
    return 0 if last < first else 1


if __name__ == "__main__":
    sys.exit(main())
