"""The command line: one file a command. None imports more than typer and rich before it is called."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
import time
import traceback
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ssam_scale.cli import bench, data
from ssam_scale.cli.compare import OptionsAlone, compare_command
from ssam_scale.cli.consolidate import consolidate_command
from ssam_scale.cli.cost import cost_command
from ssam_scale.cli.doctor import doctor_command
from ssam_scale.cli.list import list_command
from ssam_scale.cli.methods import methods_command
from ssam_scale.cli.send import send_command
from ssam_scale.cli.sharpness import sharpness_command
from ssam_scale.cli.stages import stages_command
from ssam_scale.cli.sweep import sweep_command
from ssam_scale.cli.train import train_command
from ssam_scale.cli.trained import average_command, evaluate_command, export_command, predict_command
from ssam_scale.cli.versions import version_lines
from ssam_scale.errors import RankLostError, UserError

app = typer.Typer(
    name="ssam-scale",
    help="Sparse Sharpness-Aware Minimization at scale.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(*version_lines(), sep="\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print versions and exit.")
    ] = False,
) -> None:
    pass


app.command("train")(train_command)
app.command("sweep")(sweep_command)
app.add_typer(data.app, name="data")
app.command("cost")(cost_command)
app.command("compare", cls=OptionsAlone)(compare_command)
app.command("sharpness")(sharpness_command)
app.command("send")(send_command)
app.command("evaluate")(evaluate_command)
app.command("predict")(predict_command)
app.command("export")(export_command)
app.command("average")(average_command)
app.command("consolidate")(consolidate_command)
app.command("doctor")(doctor_command)
app.command("list")(list_command)
app.command("methods")(methods_command)
app.command("stages")(stages_command)
app.add_typer(bench.app, name="bench")


def main(argv: list[str] | None = None) -> None:
    """Run `ssam-scale` with `argv` (the process's own arguments by default) and exit: 0 done, 2 the user's mistake."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and "utf" not in stream.encoding.lower():
            stream.reconfigure(errors="replace")  # a terminal that lacks a sign is no reason to end
    try:
        _refuse_keys_as_options(sys.argv[1:] if argv is None else argv)
        try:
            app(args=argv)
        finally:
            sys.stdout.flush()  # what reads it may be gone, which the interpreter would complain of at its end
    except BrokenPipeError:
        _end_for_a_closed_pipe()
    except SystemExit as end:
        # typer and rich make 1 of it, and a failure.
        if isinstance(end.__context__, BrokenPipeError):
            _end_for_a_closed_pipe()
        raise
    except UserError as error:
        line = _shown(error)
        _tell_launcher(line)
        # Most mistakes are seen by every process of a job alike, but a damaged file may be seen by one of them only.
        prefix = "" if os.environ.get("RANK", "0") == "0" else f"process {os.environ['RANK']}: "
        print(f"ssam-scale: {prefix}error: {line}", file=sys.stderr)
        sys.exit(2)
    except RankLostError as error:
        line = _shown(error)
        _tell_launcher(line)
        print(f"ssam-scale: process {os.environ.get('RANK', '0')}: error: {line}", file=sys.stderr)
        sys.exit(1)
    except (MemoryError, RecursionError, UnicodeError) as error:
        # No traceback says more of what was given than where it was looked at.
        print(f"ssam-scale: error: {_in_a_line(error)}", file=sys.stderr)
        sys.exit(1)


def _in_a_line(error: MemoryError | RecursionError | UnicodeError) -> str:
    """What has happened, and in which file of this package."""
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "ssam_scale" in Path(f.filename).parts]
    where = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno}, {ours[-1].name})" if ours else ""
    if isinstance(error, MemoryError):
        return f"this machine's memory does not suffice for what was asked{where}{f': {error}' if str(error) else ''}"
    if isinstance(error, RecursionError):
        return f"something that was given is nested too deeply{where}"
    return f"not text that can be read or written: {str(error)[:200]}{where}"


# What other programs call a key.
_OF_OTHERS = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "bs": "batch_size",
    "batch": "batch_size",
    "arch": "model.name",
    "model": "model.name",
    "optimizer": "optimizer.name",
    "opt": "optimizer.name",
    "dataset": "data.train",
}


def _refuse_keys_as_options(arguments: list[str]) -> None:
    """Say how a key of the configuration is written, for `--lr 0.1` and `--train.epochs=3`.

    Raises:
        UserError: an option is none, but a key of the configuration is called so.
    """
    if not any(argument.startswith("-") for argument in arguments[1:]):
        return
    command = typer.main.get_command(app).commands.get(arguments[0])  # type: ignore[attr-defined]
    if command is None or not any("overrides" in parameter.opts for parameter in command.params):
        return
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    for place, argument in enumerate(arguments[1:], start=2):
        option, equals, value = argument.partition("=")
        if argument == "--":
            return
        if not re.match("--?[A-Za-z]", option) or option in known or (option[1] != "-" and option[:2] in known):
            continue
        from ssam_scale.config.explain import dotted_names

        name = option.lstrip("-").replace("-", "_")
        name, every = _OF_OTHERS.get(name, name), list(dotted_names())
        keys = [key for key in every if key == name or key.rpartition(".")[2] == name]
        if not keys and get_close_matches(option, known, cutoff=0.75):
            continue  # typer names it
        if not keys:
            near = get_close_matches(name, {key.rpartition(".")[2] for key in every}, n=1, cutoff=0.75)
            keys = [key for key in every if key.rpartition(".")[2] in near]
        if keys:
            following = next(iter(arguments[place:]), "")
            value = value if equals else following if following[:2] != "--" and "=" not in following else "VALUE"
            written = " or ".join(dict.fromkeys(f"{key}={value or 'VALUE'}" for key in keys))
        else:
            written = f"optimizer.lr=0.1, for example; `ssam-scale {arguments[0]} --help` lists the options"
        raise UserError(f"{option}: no such option; keys of the configuration are written without dashes: {written}")


def _end_for_a_closed_pipe() -> NoReturn:
    """As others end whose output nobody reads on, such as that of `| head -1`: with the code of SIGPIPE, silently."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(128 + signal.SIGPIPE)


def _shown(error: Exception) -> str:
    """Its message without passwords, whatever of a configuration it quotes."""
    from ssam_scale.tracking.redaction import without_secrets

    return without_secrets(str(error))


def _tell_launcher(line: str) -> None:
    """Under torchrun, put the line where its report of the failure looks for it."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # In torch's form, which shows the place of the traceback only; its own handler puts a traceback there.
        extra = {"py_callstack": f"ssam-scale: error: {line}", "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}))
