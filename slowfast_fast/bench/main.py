"""`bench`: what `python -m slowfast_fast bench` runs."""

import json as json_module
from collections.abc import Sequence
from pathlib import Path

import torch

from .cases import DIRECTIONS, Case
from .chart import draw, require_matplotlib
from .network import NetworkCase
from .report import busy, document, heading, machine, table
from .run import find_cases, run
from .summary import summarise

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDS, QUICK_ROUNDS = 15, 3


def bench(
    *,
    ops: Sequence[str] = ("temporal_conv", "lateral_concat"),
    directions: Sequence[str] = tuple(DIRECTIONS),
    dtype: str = "float32",
    device: str | None = None,
    threads: int | None = None,
    rounds: int | None = None,
    crop: int = 224,
    batch: int = 1,
    compile: bool = True,
    json: str | Path | None = None,
    png: str | Path | None = None,
    quick: bool = False,
    seed: int = 0,
) -> None:
    """Measure ours against stock at every shape of SlowFast R50 8x8 and print the table and the summary.

    Args:
        ops: of "temporal_conv", "lateral_concat" and "slowfast" (the whole network).
        directions: "fwd" (eval forward) and "bwd" (training forward and backward).
        dtype: float32, float64, bfloat16 or float16.
        device: "cpu" or "cuda", by default a GPU if there is one.
        threads: CPU threads for this call, by default PyTorch's setting.
        rounds: how often each variant runs, by default 15.
        crop, batch: height and width in pixels (a multiple of 32), and clips.
        compile: whether torch.compile is among the variants (seconds to compile each case).
        json, png: where to write the document and the chart.
        quick: one shape of each op and pathway, 3 rounds, no torch.compile: to see that it works, not to measure.
        seed: of the inputs and parameters.

    Raises:
        ValueError: a value is not one of those above.
        ImportError: the chart needs matplotlib. Both come before anything is measured.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {sorted(DTYPES)}, got {dtype!r}")
    for argument, value in (("threads", threads), ("rounds", rounds), ("batch", batch)):
        if value is not None and value < 1:
            raise ValueError(f"{argument}: expected at least 1, got {value}")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device!r}")
    for argument, path in (("json", json), ("png", png)):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{argument}: the folder of {path} does not exist")
    if png is not None:
        require_matplotlib()
    cases = find_cases(ops, directions, DTYPES[dtype], crop=crop, batch=batch)
    if quick:
        cases = list({_kind(case): case for case in reversed(cases)}.values())[::-1]
    rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
    compile = compile and not quick

    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    try:
        settings = {"dtype": dtype, "device": str(place), "rounds": rounds, "crop": crop, "batch": batch}
        settings |= {"compile": compile, "quick": quick, "seed": seed}
        found = machine(place)
        print("\n".join(filter(None, (heading(found), busy(found)))), end="\n\n")
        measurements = []
        for measurement in run(cases, place, rounds=rounds, compile=compile, seed=seed):
            print(table(measurement), end="\n\n", flush=True)
            measurements.append(measurement)
        print("\n".join(map(str, summarise(measurements))))
        if json is not None:
            Path(json).write_text(json_module.dumps(document(measurements, found, settings), indent=1) + "\n")
        if png is not None:
            draw(measurements, png, heading(found))
    finally:
        torch.set_num_threads(threads_before)


def _kind(case: Case | NetworkCase) -> tuple[str, ...]:
    return (case.shape.op, case.shape.pathway, case.direction) if isinstance(case, Case) else (case.name,)
