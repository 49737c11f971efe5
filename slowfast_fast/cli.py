"""The command line: ``slowfast-fast`` and ``python -m slowfast_fast``."""

from __future__ import annotations

import json

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
