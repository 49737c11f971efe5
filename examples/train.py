"""Train a SlowFast network on videos in one folder for each class.

    python examples/sample_clips.py build/clips
    python examples/train.py build/clips/train --val build/clips/val --out build/run --depth 18 --width 16 --crop 64 \\
        --short-side 64 80 --frames 4 --tau 4 --batch 4 --epochs 10 --lr 0.05 --workers 1
    torchrun --nproc-per-node 8 examples/train.py kinetics/train --val kinetics/val --out runs/r50 --amp bfloat16

The folder OUT gets checkpoint.pt, log.csv and loss.png. A run that was stopped goes on with --resume, after the last
step that it saved and with the losses that it would have had.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints
import click
import torch
import torch.distributed as dist
import torch.nn.functional as F
from logs import Log
from networks import NetworkOptions, create_network, create_stock
from recipes import create_optimizer, learning_rate, with_defaults
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from worlds import World, joined_world

from slowfast_fast import data

PLOT_SECONDS = 60.0  # from one drawing of the log to the next, which takes about half a second


@dataclass(frozen=True)
class Options:
    """What the command line says beside the network; `train.py --help` explains it."""

    folder: Path
    val: Path | None
    out: Path
    resume: bool
    stock: bool
    short_side: tuple[int, int]
    epochs: int
    batch: int
    optimizer: str
    lr: float
    warmup: float
    momentum: float
    weight_decay: float
    clip_grad: float | None
    amp: str | None
    compiled: bool
    workers: int
    save_every: int
    log_every: int
    tensorboard: bool | None
    seed: int


class Training:
    """A run: its network, its data, and where it stands."""

    def __init__(self, world: World, options: Options, network_options: NetworkOptions) -> None:
        self.world, self.options, self.network_options = world, options, network_options
        self.step, self.epoch, self.seen = 0, 0, 0  # seen: clips of this epoch, by all processes
        self._make_data()
        torch.manual_seed(options.seed)
        self.network = (create_stock if options.stock else create_network)(network_options)
        self.network.to(world.device).train()
        for parameter in self.network.parameters():
            if parameter.ndim == 5:  # of a Conv3d; ConvLSTMs have others
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
        self.optimizer = create_optimizer(
            self.network, options.optimizer, options.lr, options.momentum, options.weight_decay
        )
        # float16 gradients underflow without it.
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=options.amp == "float16")
        self.checkpoint = options.out / "checkpoint.pt"
        if self.checkpoint.exists():
            self._restore()
        self.runner = torch.compile(self.network) if options.compiled else self.network
        if world.size > 1:
            devices = [world.device] if world.device.type == "cuda" else None
            self.runner = nn.parallel.DistributedDataParallel(self.runner, device_ids=devices)
        self.log = Log(options.out, self.step, options.tensorboard) if world.rank == 0 else None
        self._sums = torch.zeros(3, device=world.device)  # loss, right answers and clips since the last row of the log

    def _make_data(self) -> None:
        world, options, network = self.world, self.options, self.network_options
        read = data.RandomClip(network.sampler, network.crop, options.short_side, fps=network.fps)
        self.dataset = data.VideoFolder(options.folder, read, seed=options.seed)
        self.sampler = data.ResumableSampler(
            self.dataset, num_replicas=world.size, rank=world.rank, seed=options.seed, drop_last=world.size > 1
        )
        loading: dict[str, Any] = {"num_workers": options.workers, "pin_memory": world.device.type == "cuda"}
        self.loader = DataLoader(self.dataset, options.batch, sampler=self.sampler, drop_last=True, **loading)
        if len(self.loader) == 0:
            raise click.UsageError(
                f"--batch: expected at most {len(self.sampler)}, an epoch's clips, got {options.batch}"
            )
        self.steps = len(self.loader) * options.epochs
        self.val_loader = None
        if options.val is not None:
            views = data.UniformViews(network.sampler, 1, 1, network.crop, options.short_side[0], fps=network.fps)
            tested = data.VideoFolder(options.val, views)
            if tested.classes != self.dataset.classes:
                raise click.UsageError(f"--val: expected the classes {self.dataset.classes}, got {tested.classes}")
            own = Subset(tested, range(world.rank, len(tested), world.size))
            self.val_loader = DataLoader(own, options.batch, **loading)

    def _restore(self) -> None:
        if not self.options.resume:
            raise click.UsageError(f"{self.checkpoint} exists: continue with --resume, or choose another --out")
        progress = checkpoints.restore(self.checkpoint, self._states, self.network_options, self.world.device)
        self.step, self.epoch, self.seen = (progress[name] for name in checkpoints.PROGRESS)

    @property
    def _states(self) -> dict[str, Any]:
        return {"model_state": self.network, "optimizer": self.optimizer, "scaler": self.scaler}

    def save(self) -> None:
        if self.world.rank == 0:
            progress = {name: getattr(self, name) for name in checkpoints.PROGRESS}
            checkpoints.save(self.checkpoint, self._states, progress, self.network_options, self.dataset.classes)

    def run(self) -> None:
        options, first = self.options, self.world.rank == 0
        self._started, plotted = time.perf_counter(), time.monotonic()
        with tqdm(total=self.steps, initial=self.step, desc="training", unit="step", disable=not first) as progress:
            while self.epoch < options.epochs:
                self.dataset.set_epoch(self.epoch)
                self.sampler.set_epoch(self.epoch)
                self.sampler.start = self.seen // self.world.size
                for frames, labels in self.loader:
                    self.train_step(frames, labels)
                    saves = self.step % options.save_every == 0
                    # A row ends where a checkpoint is written, so that a resumed run has the same rows.
                    if saves or self.step % options.log_every == 0:
                        progress.set_postfix(loss=f"{self.write_row():.4f}")
                    if saves:
                        self.save()
                    progress.update()
                self.epoch, self.seen = self.epoch + 1, 0
                self.sampler.start = 0
                if self._sums[2] > 0:
                    self.write_row()
                if self.val_loader is not None:
                    loss, top1 = self.validate()
                    if first:
                        progress.write(f"epoch {self.epoch}: validation loss {loss:.4f}, top-1 {top1:.1%}")
                self.save()
                if self.log is not None and (self.epoch == options.epochs or time.monotonic() > plotted + PLOT_SECONDS):
                    self.log.plot()
                    plotted = time.monotonic()

    def train_step(self, frames: Tensor, labels: Tensor) -> None:
        """One step, on uint8 (N, T, H, W, 3) and (N,)."""
        world, options = self.world, self.options
        # Dropout's numbers, as the clips', follow from the seed and where the run stands; no state of them is saved.
        torch.manual_seed((options.seed << 40) + self.step * world.size + world.rank)
        rate = learning_rate(self.step, self.steps, int(options.warmup * self.steps), options.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        labels = labels.to(world.device, non_blocking=True)
        inputs = self.network_options.inputs(frames.to(world.device, non_blocking=True))
        with self.autocast():
            logits = self.runner(inputs)
            loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        if options.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), options.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step, self.seen = self.step + 1, self.seen + len(labels) * world.size
        self._sums += _scores(loss.detach() * len(labels), logits, labels)

    def autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.options.amp or "bfloat16")
        return torch.autocast(self.world.device.type, dtype, enabled=self.options.amp is not None)

    def write_row(self) -> float:
        """Logs what the steps since the last row came to, and returns their mean loss."""
        loss, right, count = self.world.sum(self._sums).tolist()
        self._sums.zero_()
        if not math.isfinite(loss):
            raise click.ClickException(f"the loss is {loss} at step {self.step}; try a lower --lr")
        self._log(lr=self.optimizer.param_groups[0]["lr"], loss=loss / count, top1=right / count)
        return loss / count

    def _log(self, **values: float) -> None:
        if self.log is not None:
            seconds = time.perf_counter() - self._started
            self.log.write(step=self.step, epoch=self.epoch, seconds=f"{seconds:.3f}", **values)

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """Mean loss and top-1 accuracy over one view of each video, with the first process's running statistics."""
        assert self.val_loader is not None
        if self.world.size > 1:
            for buffer in self.network.buffers():
                dist.broadcast(buffer, 0)
        self.network.eval()
        sums = torch.zeros(3, device=self.world.device)
        for views, labels in self.val_loader:
            labels = labels.to(self.world.device)
            with self.autocast():
                logits = self.network(self.network_options.inputs(views.flatten(0, 1).to(self.world.device)))
            sums += _scores(F.cross_entropy(logits.float(), labels, reduction="sum"), logits, labels)
        self.network.train()
        loss, right, count = self.world.sum(sums).tolist()
        self._log(val_loss=loss / count, val_top1=right / count)
        return loss / count, right / count


def _scores(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """The summed loss, the right answers, and how many answers there are: float32 (3,)."""
    right = (logits.argmax(1) == labels).sum()
    return torch.stack([loss.float(), right.float(), torch.full_like(loss, len(labels), dtype=torch.float32)])


EXISTING = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110})
@click.argument("folder", type=EXISTING)
@click.option("--val", type=EXISTING, help="Folder to validate on after every epoch")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder of the run")
@click.option("--resume", is_flag=True, help="Continue OUT's run, if there is one")
@click.option("--stock", is_flag=True, help="Train the plain network, from the same initial weights, to compare with")
@click.option("--model", help="A name of slowfast_fast.models.list_models()  [default: create_slowfast, R50 8x8]")
@click.option("--depth", type=int, help="Of the model  [default: its own; so are the next four]")
@click.option("--width", type=int, help="Channels of the slow stem")
@click.option("--frames", type=int, help="Of the slow pathway (T)")
@click.option("--tau", type=int, help="Raw frames from one of them to the next")
@click.option("--alpha", type=int, help="Frames of the fast pathway for each one of the slow")
@click.option("--crop", default=224, help="Pixels, a multiple of 32")
@click.option("--short-side", nargs=2, type=int, default=(256, 320), help="Smallest and largest, in pixels")
@click.option("--fps", type=float, help="Take videos as if at this rate  [default: frames as stored]")
@click.option("--dropout", default=0.5)
@click.option("--epochs", type=int, help="[default: 196, or the model's; so are batch 8, sgd, 0.1 and 0.0001 below]")
@click.option("--batch", type=int, help="Clips of a step, for each process")
@click.option("--optimizer", type=click.Choice(["sgd", "adam"]))
@click.option("--lr", type=float, help="The highest learning rate")
@click.option("--warmup", default=0.15, help="Part of the steps in which the learning rate rises")
@click.option("--momentum", default=0.9, help="Of sgd")
@click.option("--weight-decay", type=float, help="With sgd, of all but norms and biases")
@click.option("--clip-grad", type=float, help="Largest norm of the gradient  [default: any]")
@click.option("--amp", type=click.Choice(["bfloat16", "float16"]), help="Autocast; float16 with a GradScaler")
@click.option("--compile", "compiled", is_flag=True, help="Compile the network with torch.compile")
@click.option("--device", help="cpu or cuda  [default: GPUs if there are any]")
@click.option("--workers", default=4, help="Processes that decode, for each process")
@click.option("--save-every", default=500, help="Steps between checkpoints; there is one after every epoch, too")
@click.option("--log-every", default=10, help="Steps of a row in the log")
@click.option("--tensorboard/--no-tensorboard", default=None, help="[default: where it is installed]")
@click.option("--seed", default=0)
def main(device: str | None, folder: Path, **given: Any) -> None:
    """Train a SlowFast network on the videos in FOLDER, which has one folder for each class."""
    fields = {name: given.pop(name) for name in NetworkOptions.__dataclass_fields__ if name in given}
    try:
        network_options = NetworkOptions(classes=sum(path.is_dir() for path in folder.iterdir()), **fields)
        with joined_world(device) as world:
            options = Options(folder, **with_defaults(network_options.model, given))
            Training(world, options, network_options).run()
    except (ValueError, FileNotFoundError) as error:  # wrong options, videos that cannot be read
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
