"""``python -m slowfast_fast``."""

from .cli import main

main(prog_name="python -m slowfast_fast")
