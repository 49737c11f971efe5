"""`bench`: what `python -m slowfast_fast bench` runs."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..models import list_models
from .apart import Apart
from .budget import Budget, most_wanted_first
from .cases import DIRECTIONS, Case
from .chart import draw, require_matplotlib
from .leg import Leg
from .measure import FAILED, Measurement
from .network import DEFAULT_NETWORK, NETWORKS, OP, TRAINED, TRAINING, NetworkCase
from .report import busy, document, figures, heading, machine, table, write
from .run import OPS, find_cases, run
from .summary import STOCK, summary_text

ROUNDS, QUICK_ROUNDS = 15, 3
LONGEST_CASE = 200.0  # seconds on a GPU, where nothing is compiled; a kernel that runs for longer hangs


def bench(
    *,
    ops: Sequence[str] | None = None,
    networks: Sequence[str] = (),
    train: bool = False,
    family: bool = False,
    directions: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    batches: Sequence[int] = (),
    crops: Sequence[int] = (),
    device: str | None = None,
    threads: int | None = None,
    rounds: int | None = None,
    compile: bool = True,
    autocast: bool = True,
    json: str | Path | None = None,
    png: str | Path | None = None,
    quick: bool = False,
    budget: float | None = None,
    case_seconds: float | None = None,
    seed: int = 0,
) -> None:
    """Measure ours against stock, at every shape of SlowFast R50 8x8 or whole networks; print tables and summary.

    Args:
        ops: of "temporal_conv", "lateral_concat" and "slowfast" (whole networks). By default the first two, or the
            last where networks are named.
        networks: of `network.NETWORKS`, by default "R50 8x8"; or registered models, which are measured in the eval
            forward alone: frozen, against their layers as stock PyTorch runs them.
        train: measure training steps of whole networks: of R50 4x16 and 8x8 unless networks are named, where the
            targets hold (on a CPU float32, 2 clips at 112; on a GPU bfloat16, 32 clips at 224) unless said otherwise.
        family: measure every registered model.
        directions: "fwd" (eval forward) and "bwd" (training forward and backward; of a network a whole step, with SGD),
            by default both.
        dtypes: of float32 (the default), tf32 (float32 that a GPU may round to TF32), float64, bfloat16 and float16.
        batches: clips, by default 1.
        crops: height and width in pixels (for ops multiples of 32), by default 224.
        device: "cpu" or "cuda", by default a GPU if there is one.
        threads: CPU threads for this call, by default PyTorch's setting.
        rounds: how often each variant runs, by default 15.
        compile: whether torch.compile is among the variants (seconds to compile each case).
        autocast: whether automatic mixed precision is among the variants of training steps in float32.
        json, png: where to write the document, after every case, with "finished" false until the last; and the chart of
            the first dtype (of ops, also first batch and crop).
        quick: one shape of each op and pathway, 3 rounds, no torch.compile: to see that it works, not to measure.
        budget: seconds within which the last case should end; the document names those left out. Ops come in the order
            given: the crops, in each the batches, in each the dtypes. Of whole networks alone those that have a target
            come first, then the others by their FLOPs.
        case_seconds: a case has no further rounds after so many seconds of them, but 3 in any case.
        seed: of the inputs and parameters.

    Raises:
        ValueError: a value is not one of those above.
        ImportError: the chart needs matplotlib. Both come before anything is measured.
        RuntimeError: cases failed, or variants; everything that could be measured has been, and is written.
    """
    for argument, value in (("threads", threads), ("rounds", rounds)):
        if value is not None and value < 1:
            raise ValueError(f"{argument}: expected at least 1, got {value}")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device!r}")
    usual = TRAINING[place.type] if train else Leg("float32")
    dtypes, batches, crops = dtypes or (usual.precision,), batches or (usual.batch,), crops or (usual.crop,)
    networks = networks or (TRAINED if train else list_models() if family else ())
    registered = [name for name in networks if name not in NETWORKS]
    directions = directions or (("bwd",) if train else ("fwd",) if registered else tuple(DIRECTIONS))
    if registered and tuple(directions) != ("fwd",):
        raise ValueError(f"directions: registered models are measured in fwd alone, got {', '.join(directions)}")
    ops = ops or ((OP,) if networks else OPS[:2])
    if place.type == "cpu" and "tf32" in dtypes:
        raise ValueError("dtype: tf32 is for a GPU, on a CPU float32 is never rounded to it")
    for argument, path in (("json", json), ("png", png)):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{argument}: the folder of {path} does not exist")
    if png is not None:
        require_matplotlib()
    legs = [Leg(dtype, batch, crop) for crop, batch, dtype in itertools.product(crops, batches, dtypes)]
    cases = [case for leg in legs for case in find_cases(ops, directions, leg, networks or (DEFAULT_NETWORK,))]
    if quick:
        cases = list({_kind(case): case for case in reversed(cases)}.values())[::-1]
    cases = most_wanted_first(cases, place.type)
    rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
    compile = compile and not quick

    # Of a GPU's kernels any may end the process or hang.
    apart = Apart(run, None if compile else LONGEST_CASE) if place.type == "cuda" else None
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    try:
        settings: dict[str, Any] = {"legs": [asdict(leg) for leg in legs], "device": str(place), "rounds": rounds}
        settings |= {"compile": compile, "autocast": autocast, "quick": quick, "budget": budget}
        settings |= {"case_seconds": case_seconds, "seed": seed}
        found = machine(place)
        print("\n".join(filter(None, (heading(found), busy(found)))), end="\n\n")
        measurements: list[Measurement] = []
        left_out: list[dict[str, str]] = []

        def keep(finished: bool = False) -> None:
            if json is not None:
                remaining = cases[len(measurements) + len(left_out) :]
                missing = [*left_out, *(_without(case, "the run did not get there") for case in remaining)]
                write(document(measurements, found, settings, missing, finished=finished), Path(json))

        clock = Budget(budget, rounds, case_seconds)
        for case in cases:
            if not clock.has_room_for(case):
                left_out.append(_without(case, "the time was up"))
                continue
            try:
                options: dict[str, Any] = {"compile": compile, "autocast": autocast, "seed": seed}
                measurements.append((apart or run)(case, place, rounds=rounds, seconds=case_seconds, **options))
            except KeyboardInterrupt:  # what has been measured is kept
                clock.stop()
                left_out.append(_without(case, "interrupted"))
            except torch.OutOfMemoryError:
                left_out.append(_without(case, "out of device memory"))
            except RuntimeError as error:  # the others are still worth measuring
                left_out.append(_without(case, f"{FAILED}{error}"))
                print(f"{case.name} ({case.leg}) failed: {error}", end="\n\n", flush=True)
            else:
                print(table(measurements[-1]), end="\n\n", flush=True)
            measured = measurements[-1] if measurements and measurements[-1].case == case else None
            clock.took(case, measured)
            keep()
        print(summary_text(measurements))
        if left_out:
            print(f"{len(left_out)} of {len(cases)} cases were left out; the document names them and says why")
        keep(finished=True)
        drawn = [m for m in measurements if m.ratio(STOCK) is not None and _drawn(m.case, legs[0])]
        if png is not None and drawn:
            precisions = ", ".join(dict.fromkeys(m.case.leg.precision for m in drawn))
            draw([figures(m) for m in drawn], png, f"{heading(found)}\n{precisions if ops == (OP,) else legs[0]}")
        elif png is not None:
            print(f"nothing to draw: {legs[0]} has no measurement of both stock and ours")
        if failed := sum(case["reason"].startswith(FAILED) for case in left_out):
            raise RuntimeError(f"{failed} of {len(cases)} cases failed")
        if variants := sum(len(measurement.failed) for measurement in measurements):
            raise RuntimeError(f"{variants} variants failed; the document names them")
    finally:
        if apart is not None:
            apart.close()
        torch.set_num_threads(threads_before)


def _drawn(case: Case | NetworkCase, first: Leg) -> bool:
    """The chart shows networks at every batch and crop, which their names tell, and ops in the first leg."""
    return case.leg.precision == first.precision if isinstance(case, NetworkCase) else case.leg == first


def _without(case: Case | NetworkCase, reason: str) -> dict[str, str]:
    return {"name": case.name, "leg": str(case.leg), "reason": reason}


def _kind(case: Case | NetworkCase) -> tuple[object, ...]:
    of_shape = (case.shape.op, case.shape.pathway, case.direction) if isinstance(case, Case) else (case.name,)
    return case.leg, *of_shape
