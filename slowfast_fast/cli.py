"""The command line: ``slowfast-fast`` and ``python -m slowfast_fast``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import click

from ._version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="slowfast_fast")
def main() -> None:
    """SlowFast video networks on fused convolutions."""


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def info(as_json: bool) -> None:
    """Show how this installation was built and which backend each op would use here."""
    from . import info as facts

    build, runtime = facts.build_info(), facts.runtime_info()
    click.echo(json.dumps({"build": build, "runtime": runtime}, indent=2) if as_json else facts.as_text(build, runtime))


@main.command()
@click.option(
    "--op", "ops", multiple=True, help="temporal_conv, lateral_concat or slowfast; repeatable  [default: both ops]"
)
@click.option(
    "--model",
    "networks",
    multiple=True,
    help='A whole network: "R50 4x16", "R50 8x8", "R101 16x8" or a name that `models` lists; repeatable  [default: the '
    "ops alone]",
)
@click.option("--family", is_flag=True, help="Every model that `models` lists: its eval forward, frozen")
@click.option(
    "--train",
    is_flag=True,
    help="Training steps, with the optimizer, of R50 4x16 and 8x8. Unless said otherwise on a CPU float32, 2 clips at "
    "112; on a GPU bfloat16, 32 clips at 224",
)
@click.option("--direction", "directions", multiple=True, help="fwd or bwd; repeatable  [default: both]")
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    help="float32, tf32, float64, bfloat16 or float16; repeatable  [default: float32]",
)
@click.option("--device", help="cpu or cuda  [default: a GPU if there is one]")
@click.option("--threads", type=int, help="CPU threads  [default: PyTorch's setting]")
@click.option("--rounds", type=int, help="How often each variant runs")
@click.option("--crop", "crops", type=int, multiple=True, help="Pixels, a multiple of 32; repeatable  [default: 224]")
@click.option("--batch", "batches", type=int, multiple=True, help="Clips; repeatable  [default: 1]")
@click.option("--compile/--no-compile", default=True, help="Whether torch.compile is among the variants")
@click.option("--autocast/--no-autocast", default=True, help="Whether training steps are raced in mixed precision, too")
@click.option("--quick", is_flag=True, help="A few shapes and rounds: to see that it works, not to measure")
@click.option("--budget", type=float, help="Seconds; cases that would not fit are left out")
@click.option("--case-seconds", type=float, help="No further rounds of a case after so many seconds, but 3 in any case")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the inputs and parameters")
@click.option("--out", default="slowfast_fast-bench", show_default=True, help="Write OUT.json and OUT.png")
@click.option("--chart/--no-chart", default=True, help="Whether to draw OUT.png (needs matplotlib)")
def bench(out: str, chart: bool, **options: Any) -> None:
    """Measure the fused ops at every shape of SlowFast R50 8x8, or whole networks, against stock PyTorch."""
    from . import bench as benchmarks
    from .bench.chart import require_matplotlib

    chosen = {name: value for name, value in options.items() if value != ()}
    try:
        if chart:
            require_matplotlib()
    except ImportError as error:
        raise click.ClickException(f"{error}, or leave the chart out with --no-chart") from error
    try:
        benchmarks.bench(**chosen, json=f"{out}.json", png=f"{out}.png" if chart else None)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


@main.command()
@click.argument(
    "documents",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE...",
)
@click.option("--png", type=click.Path(dir_okay=False, path_type=Path), help="Draw the chart here (needs matplotlib)")
def results(documents: tuple[Path, ...], png: Path | None) -> None:
    """Whole networks of documents that `bench` wrote, as a table in Markdown; also of runs that did not finish."""
    from .bench.chart import draw
    from .bench.report import heading, network_table

    runs = [json.loads(path.read_text()) for path in documents]
    for path, run in zip(documents, runs, strict=True):
        if not run.get("finished", True):
            click.echo(f"{path} is of a run that did not finish", err=True)
    cases = [case for run in runs for case in run["cases"] if "network" in case["shape"]]
    if not cases:
        raise click.UsageError("there is no whole network in what these runs measured")
    click.echo(network_table(cases))
    if png is not None:
        try:
            draw(cases, png, heading(runs[0]["machine"], runs[0]["versions"]))
        except (ImportError, ValueError) as error:
            raise click.ClickException(str(error)) from error


@main.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--crop", type=int, default=256, show_default=True, help="Pixels that GFLOPs are counted for")
@click.option(
    "--measured",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A document that `bench --family` wrote: its clips/s in further columns",
)
def models(names: tuple[str, ...], crop: int, measured: Path | None) -> None:
    """List the models that have a name: parameters, and multiply-adds of one clip.

    NAMEs limit the table, which is Markdown, to some of them.
    """
    from .bench.family import caption, speeds
    from .models.costs import table

    run = None if measured is None else json.loads(measured.read_text())
    try:
        click.echo(table(names or None, crop, ((), {}) if run is None else speeds(run)))
        if run is not None:
            click.echo(f"\n{caption(run)}")
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _views(context: click.Context, option: click.Parameter, value: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", value)
    if found is None:
        raise click.BadParameter(f"expected clips x crops, as 10x3; got {value!r}")
    return int(found[1]), int(found[2])


@main.command()
@click.argument("videos", metavar="VIDEO...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--model", default="slowfast_r50_8x8", show_default=True, help="A name that `models` lists")
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="The weights, from any library that `convert` knows"
)
@click.option("--random-weights", is_flag=True, help="Run untrained, to see that it works")
@click.option("--labels", type=click.Path(path_type=Path), help="Names of the classes: a line each, or JSON")
@click.option("--classes", type=int, help="How many there are  [default: as many as labels, or the model's]")
@click.option(
    "--activation",
    type=click.Choice(["softmax", "sigmoid"]),
    help="What makes probabilities of scores  [default: as the checkpoint says, or the model]",
)
@click.option("--views", default="10x3", show_default=True, callback=_views, help="Clips over time x crops of each")
@click.option("--crop", type=int, default=256, show_default=True, help="Pixels of a view")
@click.option("--rule", default="pytorchvideo", show_default=True, help="The library whose frames the pathways see")
@click.option("--device", help="cpu or cuda  [default: a GPU if there is one]")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32", show_default=True)
@click.option("--top", type=int, default=5, show_default=True, help="How many classes to name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw PNG; of several videos, a folder of them")
def classify(
    videos: tuple[Path, ...],
    checkpoint: Path | None,
    random_weights: bool,
    labels: Path | None,
    views: tuple[int, int],
    device: str | None,
    dtype: str,
    top: int,
    as_json: bool,
    plot: Path | None,
    **options: Any,
) -> None:
    """Tell what VIDEOs show: files, or folders of them.

    A video that cannot be read is reported, and the others go on; the exit status is then 1.
    """
    import torch

    from . import classify as classifying
    from .bench.chart import require_matplotlib
    from .compat._convert import CheckpointError
    from .data import VideoError

    if (checkpoint is None) != random_weights:
        raise click.UsageError(
            "give the network's weights with --checkpoint FILE, or --random-weights to see that it runs without"
        )
    try:
        if plot is not None:
            require_matplotlib()
        files = classifying.find_videos(videos)
        classifier = classifying.Classifier(
            checkpoint=checkpoint,
            labels=None if labels is None else classifying.read_labels(labels),
            views=views,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            dtype=getattr(torch, dtype),
            **options,
        )
    except (FileNotFoundError, ImportError, CheckpointError) as error:
        raise click.ClickException(str(error)) from error
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if random_weights:
        click.echo("The weights are random: the answers mean nothing.", err=True)
    told, failed = [], []
    if plot is not None and len(files) > 1:
        plot.mkdir(parents=True, exist_ok=True)
    with click.progressbar(files, label="classifying", file=sys.stderr, item_show_func=_name) as bar:
        for file in bar:
            try:
                answer = classifier(file, top)
            except VideoError as error:
                failed.append({"video": str(file), "error": str(error)})
                continue
            told.append(answer)
            if plot is not None:
                # Of the whole path: files of one name may lie in several folders.
                to = plot / ("_".join(file.with_suffix("").parts).strip("/_") + ".png") if len(files) > 1 else plot
                classifying.draw(answer, classifier.slow_frames(), to)
    if as_json:
        found = [*(answer.as_json() | {"random_weights": random_weights} for answer in told), *failed]
        click.echo(json.dumps(found, indent=2))
    else:
        for answer in told:
            lines = [f"{100 * probability:6.1f} %  {label}" for label, probability in answer.top]
            click.echo("\n".join([f"{answer.video} ({answer.views} views)", *lines]))
    for failure in failed:
        click.echo(f"Error: {failure['error']}", err=True)
    if failed:
        raise SystemExit(1)


def _name(file: Path | None) -> str | None:
    return None if file is None else file.name


@main.command()
@click.option("--device", help="cuda, or one of several as cuda:1  [default: cuda]")
@click.option(
    "--dtype", "precisions", multiple=True, help="float16, bfloat16, tf32 or float32; repeatable  [default: all]"
)
@click.option("--batch", type=int, help="Clips  [default: 8; for a frozen network on a CPU: 1]")
@click.option("--crop", type=int, default=224, show_default=True, help="Pixels, a multiple of 32")
@click.option("--rounds", type=int, default=30, show_default=True, help="How often each backend runs each shape")
@click.option("--frozen", is_flag=True, help="The kernels of a frozen network; also on a CPU, float32 by default")
@click.option("--out", type=click.Path(path_type=Path), help="File  [default: where `auto` looks for this device's]")
def tune(
    device: str | None,
    precisions: tuple[str, ...],
    batch: int | None,
    frozen: bool,
    out: Path | None,
    **options: Any,
) -> None:
    """Measure which backend is fastest for what on this device, and write the table that `auto` reads."""
    import torch

    from . import tune as tuning

    if frozen:
        from .tune_frozen import tune_frozen

        on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        options |= {"batch": batch or (1 if on.type == "cpu" else 8), "precisions": precisions or ("float32",)}
        click.echo(f"written: {tuning.write(tune_frozen(on, report=click.echo, **options), out)}")
        return
    target = torch.device(device or "cuda")
    if target.type == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("tune measures a GPU, and this machine has none")
    try:
        table = tuning.tune(
            target,
            precisions=precisions or tuning.PRECISIONS,
            batch=batch or 8,
            report=click.echo,
            keep=lambda table: tuning.write(table, out),
            **options,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    click.echo(f"written: {tuning.write(table, out)}")


@main.command()
@click.argument("checkpoint", metavar="IN", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--to", "target", required=True, help="pytorchvideo, pyslowfast, mmaction2, gluoncv or r1c7")
@click.option("--from", "source", help="One of these, or caffe2  [default: by the keys]")
def convert(checkpoint: Path, out: Path, target: str, source: str | None) -> None:
    """Write the checkpoint IN as OUT, under the keys of another library.

    IN may be a .pyth, .pth, .safetensors or Caffe2 .pkl file; it is read without running anything that it holds.
    OUT is written as safetensors if it is named so, else with torch.save.
    """
    from .compat import _checkpoint, _convert

    try:
        state_dict = _checkpoint.read_checkpoint(checkpoint)
        source = source or _convert.detect(state_dict)
        if source is None:
            raise click.ClickException(f"{checkpoint} has no keys of a known library; it has {next(iter(state_dict))}")
        done = _convert.convert(state_dict, source, target)
        _checkpoint.write_checkpoint(out, done.state_dict, target)
    except _convert.CheckpointError as error:
        raise click.ClickException(str(error)) from error
    except ImportError as error:
        raise click.ClickException(str(error)) from error
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    click.echo(f"{done}\nwritten: {out}")
