"""What a training run leaves behind: log.csv, loss.png and, where TensorBoard is installed, its event files."""

from __future__ import annotations

import csv
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

FIELDS = ("step", "epoch", "lr", "loss", "top1", "val_loss", "val_top1", "seconds")


class Log:
    """Rows of log.csv, each of one step; what is not measured at a step stays empty.

    Args:
        folder: of the run.
        step: the step that the run continues after. Later rows, of a run that was killed, are dropped.
        tensorboard: whether to write event files as well; None: where TensorBoard is installed.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.csv"
        rows = [row for row in self.rows() if int(row["step"]) <= step] if self.path.exists() else []
        partial = self.path.with_suffix(".part")
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, self.path)
        self._writer = None
        if tensorboard or (tensorboard is None and find_spec("tensorboard") is not None):
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, **values: Any) -> None:
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, FIELDS).writerow(values)
        if self._writer is not None:
            for name in FIELDS[2:]:
                if name in values:
                    self._writer.add_scalar(name, float(values[name]), values["step"])
            self._writer.flush()

    def rows(self) -> list[dict[str, str]]:
        with open(self.path, newline="") as file:
            # A process that is killed can leave half a row.
            return [row for row in csv.DictReader(file) if row["seconds"] is not None]

    def plot(self) -> None:
        """Draws loss.png, of the loss in training and validation."""
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        for name, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
            points = [(int(row["step"]), float(row[name])) for row in self.rows() if row[name]]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label)
        axes.set(xlabel="step", ylabel="cross-entropy", ylim=(0, None))
        axes.legend()
        figure.savefig(self.path.with_name("loss.png"), dpi=120)
