"""`ssam-scale compare`."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from ssam_scale.cli.paths import expanded, expanded_uri
from ssam_scale.cli.table import AsJson, Sheet
from ssam_scale.console import console
from ssam_scale.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ssam_scale.tracking.compare import Comparison, Experiment, Question

# Of options that may stand alone: what they mean then.
_ALONE = {"--watch": "10", "--csv": "-"}

# What a table for a terminal leaves to --csv and --html; and what a narrow one does without, the first one first.
_NOT_SHOWN = {"images_per_second", "gain_over_base", "top1_at_wall_clock"}
_SPARE = (
    "top1_at_wall_clock",
    "gpu_hours",
    "step_seconds",
    "density",
    "gain_over_sam",
    "seconds",
    "seconds_to_accuracy",
)


class OptionsAlone(TyperCommand):
    """A command some of whose options take a value or none: `--watch`, `--watch 5`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Gives those that stand alone the value that this means."""
        return super().parse_args(ctx, list(_filled(args)))


def _filled(arguments: Sequence[str]) -> Iterator[str]:
    for argument, following in zip(arguments, [*arguments, "--"][1:], strict=True):
        yield argument
        if argument in _ALONE and following.startswith("--"):
            yield _ALONE[argument]


def compare_command(
    tracking_uri: Annotated[
        str, typer.Option("--tracking-uri", callback=expanded_uri, help="MLflow tracking URI, e.g. http://host:5000.")
    ] = "sqlite:///mlflow.db",
    experiment: Annotated[str, typer.Option("--experiment", help="MLflow experiment.")] = "ssam_scale",
    group: Annotated[str | None, typer.Option("--group", help="Only runs with this value of the tag `group`.")] = None,
    accuracy: Annotated[
        float | None,
        typer.Option(
            "--accuracy", metavar="PERCENT", help="Time to this top-1; else to the best that every run reaches."
        ),
    ] = None,
    wall_clock: Annotated[
        float | None,
        typer.Option(
            "--wall-clock",
            metavar="SECONDS",
            help="Top-1 after this time of training; else after the fastest method's.",
        ),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option("--price", metavar="PER GPU-HOUR", help="Also show what runs cost, in your currency."),
    ] = None,
    allow_different: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-different",
            metavar="WHAT",
            help="Compare runs of different hardware, data, software (with commas).",
        ),
    ] = None,
    as_json: AsJson = False,
    csv: Annotated[
        Path | None,
        typer.Option(
            "--csv", metavar="[FILE]", callback=expanded, help="All columns as CSV; without a file, print them."
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            callback=expanded,
            help="One page with charts; also kept in MLflow, in a run of its own.",
        ),
    ] = None,
    log: Annotated[bool, typer.Option("--log/--no-log", help="Whether MLflow keeps the page of --html.")] = True,
    watch: Annotated[
        float | None,
        typer.Option(
            "--watch", metavar="[SECONDS]", help="Draw the table anew all 10 s, with runs that go on, until Ctrl-C."
        ),
    ] = None,
) -> None:
    """Compare runs: top-1, time over the base optimizer, saving over dense SAM, time to an accuracy, cost."""
    prints_csv = csv is not None and str(csv) == "-"
    _check_numbers(accuracy, wall_clock, price, watch)
    if watch is not None and (as_json or csv is not None or html is not None):
        raise UserError(
            "--watch draws a table for people; --json, --csv and --html are for one look: leave one of them out"
        )
    if as_json and prints_csv:
        raise UserError("--json and --csv would both print; give --csv a file")

    from ssam_scale.tracking.compare import Question, compared, find_experiment
    from ssam_scale.tracking.compare.files import as_csv, check_output, write_whole
    from ssam_scale.tracking.compare.files import as_json as json_of

    for option, path in (("--csv", None if prints_csv else csv), ("--html", html)):
        if path is not None:
            check_output(option, path)
    allowed = _aspects(allow_different or [])
    question = Question(group, accuracy, wall_clock, price, allowed, running=watch is not None)
    found = find_experiment(tracking_uri, experiment)
    if watch is not None:
        _watch(found, question, watch)
        return
    comparison = compared(found, question)
    if prints_csv:
        print(as_csv(comparison.rows), end="")
    elif as_json:
        print(json_of(comparison.rows))
    said = []
    if csv is not None and not prints_csv:
        write_whole("--csv", csv, as_csv(comparison.rows))
        said.append(f"written: {csv}")
    if html is not None:
        said += _write_page(comparison, html, log)
    printed = prints_csv or as_json
    if not printed:
        console().print(render(comparison))
        said += _interface(found)
    for line in said:
        # Not through the console: it would break a command that is to be copied.
        print(line, file=sys.stderr if printed else sys.stdout)


def render(comparison: Comparison) -> Sheet:
    """The rows as a table for a terminal; what is missing is a dash with a numbered note below."""
    from ssam_scale.tracking.compare import columns

    # The table of --wall-clock is about it; the time of the fastest method is one of many that could be asked about.
    left_out = _NOT_SHOWN - ({"top1_at_wall_clock"} if comparison.question.wall_clock is not None else set())
    shown = [column for column in columns(comparison) if column.keys[0] not in left_out]
    notes: list[str] = []

    def cell_of(row: int, number: int) -> str:
        column, about = shown[number], comparison.rows[row]
        new = [note for note in column.notes(about) if note not in notes]
        notes.extend(new)
        marks = "".join(f" [{notes.index(note) + 1}]" for note in dict.fromkeys(column.notes(about)))
        return column.cell(about) + marks

    cells = [[cell_of(row, number) for number in range(len(shown))] for row in range(len(comparison.rows))]
    lines = [f"[{number}] {note}" for number, note in enumerate(notes, 1)]
    if comparison.tests:
        tests = f"{comparison.tests} comparison{'s'[: comparison.tests != 1]}"
        lines.append(f"p: Welch's t test of top-1 over seeds, Holm's correction over {tests}, with base and with SAM")
    lines += comparison.differences
    return Sheet(
        [column.title for column in shown],
        cells,
        "\n".join(lines),
        words=sum(column.words for column in shown),
        spare=[column.title for key in _SPARE for column in shown if column.keys[0] == key],
    )


def _write_page(comparison: Comparison, path: Path, log: bool) -> list[str]:
    """Write the report, and keep it in MLflow; lines that say where it is."""
    from ssam_scale.tracking.compare.files import write_whole
    from ssam_scale.tracking.compare.page import page
    from ssam_scale.tracking.compare.record import record

    text = page(comparison)
    write_whole("--html", path, text)
    return [f"written: {path}", *(record(comparison, text) if log else [])]


def _watch(experiment: Experiment, question: Question, seconds: float) -> None:
    """Draw the table again and again, until Ctrl-C; a store that is away for a while is a line below the last table."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from ssam_scale.tracking.compare import compared

    table: RenderableType = render(compared(experiment, question))
    out = console()

    def below(line: str) -> RenderableType:
        return Group(table, Text(line, "table.caption"))

    footer = f"anew all {seconds:g} s; Ctrl-C ends"
    with Live(below(footer), console=out, auto_refresh=False, vertical_overflow="visible") as live:
        show: Callable[[RenderableType], None] = (
            (lambda it: live.update(it, refresh=True)) if out.is_terminal else out.print
        )
        try:
            while True:
                time.sleep(seconds)
                try:
                    table = render(compared(experiment, question))
                    show(below(footer))
                except UserError as error:
                    show(below(f"{error}; {footer}"))
        except KeyboardInterrupt:
            return


def _interface(experiment: Experiment) -> list[str]:
    from ssam_scale.tracking.commands import interface_lines

    return interface_lines(experiment.uri, experiment.id)


def _check_numbers(accuracy: float | None, wall_clock: float | None, price: float | None, watch: float | None) -> None:
    if accuracy is not None and not 0.0 <= accuracy <= 100.0:
        raise UserError(f"--accuracy is {accuracy:g}; it is a percentage, 0 to 100")
    for option, value in (("--price", price), ("--wall-clock", wall_clock)):
        if value is not None and not (math.isfinite(value) and value >= 0.0):
            raise UserError(f"{option} is {value:g}; it is a number, 0 or above")
    if watch is not None and not (math.isfinite(watch) and watch >= 1.0):
        raise UserError(f"--watch is {watch:g}; it is the seconds from one look to the next, 1 or above")


def _aspects(given: Sequence[str]) -> frozenset[str]:
    from ssam_scale.tracking.compare import ASPECTS

    named = [word.strip() for text in given for word in text.split(",")]
    for word in named:
        if word not in ASPECTS:
            raise UserError(f"--allow-different {word!r}: runs may differ in {', '.join(ASPECTS)}")
    return frozenset(named)
