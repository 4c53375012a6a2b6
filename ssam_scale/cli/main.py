"""The command line: one file a command. None imports more than typer and rich before it is called."""

from __future__ import annotations

import os
import sys

import typer

from ssam_scale.cli import bench, data
from ssam_scale.cli.compare import compare_command
from ssam_scale.cli.cost import cost_command
from ssam_scale.cli.list import list_command
from ssam_scale.cli.train import train_command
from ssam_scale.errors import UserError

app = typer.Typer(
    name="ssam-scale",
    help="Sparse Sharpness-Aware Minimization at scale.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train")(train_command)
app.add_typer(data.app, name="data")
app.command("cost")(cost_command)
app.command("compare")(compare_command)
app.command("list")(list_command)
app.add_typer(bench.app, name="bench")


def main(argv: list[str] | None = None) -> None:
    """Run `ssam-scale` with `argv` (the process's own arguments by default) and exit: 0 done, 2 the user's mistake."""
    try:
        app(args=argv)
    except UserError as error:
        # Most mistakes are seen by every process of a job alike, but a damaged file may be seen by one of them only.
        prefix = "" if os.environ.get("RANK", "0") == "0" else f"process {os.environ['RANK']}: "
        print(f"ssam-scale: {prefix}error: {error}", file=sys.stderr)
        sys.exit(2)
