"""Trainings to which random faults happen until they are complete, and what became of each."""

from __future__ import annotations

import random
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ssam_scale.config.load import load
from ssam_scale.sharding import World
from ssam_scale.tracking.store import open_store
from ssam_scale.train.checkpoint import checkpoints, newest, resolve
from ssam_scale.train.checkpoint.files import problem_with, read_state
from tests.support.runs import RESNET, write_config, write_data
from tests.support.stores import put_store

from .kinds import AT_REST, LIVE, MISUSE, Fault
from .training import HangError, Running, Training

ONE_PROCESS = "one process"
SHARDED = ", sharded checkpoints"
BACKENDS = (ONE_PROCESS, "ddp", "fsdp2", f"fsdp2{SHARDED}", "zero1", "zero2", "zero3", f"zero3{SHARDED}")

BATCH, STEPS = 8, 6  # of 48 images
SECTIONS: dict[str, Any] = {
    "model": {**RESNET, "drop_path_rate": 0.1},  # with BatchNorm, which each process counts for itself
    "loss": {"mixup": 0.2, "label_smoothing": 0.1},
    "optimizer": {"name": "momentum", "lr": 0.01, "momentum": 0.9},
    "perturbation": {"rho": 0.05, "norm": "masked", "mask": {"pattern": "depth"}},
    "checkpoint": {"every_steps": 2, "every_epochs": 1, "keep": 4},
    "tracking": {"log_every": 4, "probe_every": None, "system_metrics": False},
}


@dataclass
class Event:
    """One fault and what became of it.

    Attributes:
        fault: which one.
        backend: what it happened to.
        place: the newest checkpoint afterwards, or the one that was damaged.
        outcome: in a few words, which are the same for the same outcome.
        problem: what is not as it should be; empty if all is.
    """

    fault: str
    backend: str
    place: str
    outcome: str
    problem: str = ""


@dataclass
class Chain:
    """A training from its beginning to its end, in as many starts as it took.

    Attributes:
        backend: of the training.
        interruptions: starts that did not come to the end.
        within: how many of them left a checkpoint within an epoch as the newest.
        uninterrupted: SHA-256 of the final weights of the training that was left alone.
        interrupted: of this one.
        problem: in what else it differs.
    """

    backend: str
    interruptions: int = 0
    within: int = 0
    uninterrupted: str = ""
    interrupted: str = ""
    problem: str = ""

    @property
    def failed(self) -> bool:
        """Whether it is not as the uninterrupted one."""
        return bool(self.problem) or self.interrupted != self.uninterrupted


@dataclass
class Result:
    """What all trainings have come to."""

    events: list[Event] = field(default_factory=list)
    chains: list[Chain] = field(default_factory=list)

    @property
    def failures(self) -> int:
        """Of events and of trainings."""
        return sum(bool(event.problem) for event in self.events) + sum(chain.failed for chain in self.chains)

    def rows(self) -> list[dict[str, Any]]:
        """Everything."""
        return [{"what": type(each).__name__.lower(), **asdict(each)} for each in (*self.events, *self.chains)]

    def table(self) -> list[str]:
        """Fault × attempts × outcome, and the digests, in Markdown."""
        lines = ["| fault | attempts | outcome | not as it should be |", "|---|---|---|---|"]
        for fault in [*(fault.name for fault in LIVE), *AT_REST]:
            if not (mine := [event for event in self.events if event.fault == fault]):
                continue
            outcomes = dict.fromkeys(event.outcome for event in mine)
            said = "; ".join(f"{sum(event.outcome == each for event in mine)} {each}" for each in outcomes)
            problems = [f"{event.backend}, {event.place}: {event.problem}" for event in mine if event.problem]
            lines.append(f"| {fault} | {len(mine)} | {said} | {'; '.join(problems) or '0'} |")
        lines += [
            "",
            "| backend | interruptions | within epochs | weights, uninterrupted (SHA-256) | interrupted |",
            "|---|---|---|---|---|",
        ]
        for chain in self.chains:
            same = "the same" if not chain.failed else f"{chain.interrupted or 'none'}: {chain.problem or 'others'}"
            row = chain.backend, chain.interruptions, chain.within, f"`{chain.uninterrupted}`", same
            lines.append(f"| {' | '.join(map(str, row))} |")
        return lines


def happen(backends: Sequence[str], events: int, seed: int, epochs: int, home: Path, only: str = "") -> Result:
    """Let so many faults happen, shared out to the backends, in trainings of so many epochs each.

    Args:
        backends: of `BACKENDS`.
        events: how many faults.
        seed: of what is drawn.
        epochs: of each training; after its end the next one begins.
        home: an empty folder, on a disk that may be filled up.
        only: a regular expression; only faults with such names happen.
    """
    write_data(home / "data")
    result, deck = Result(), _Deck(random.Random(seed), only)
    for number, backend in enumerate(backends):
        mine = events // len(backends) + (number < events % len(backends))
        _happen_to(
            backend,
            mine,
            random.Random(f"{seed} {backend}"),
            epochs,
            home / re.sub(r"\W+", "_", backend),
            home / "data",
            deck,
            result,
        )
    return result


def _happen_to(
    backend: str, events: int, draw: random.Random, epochs: int, home: Path, data: Path, deck: _Deck, result: Result
) -> None:
    home.mkdir()
    config = write_config(
        home / "run.yaml", data, **SECTIONS, train={"epochs": epochs, "eval_epochs": epochs, "ema_decay": 0.9}
    )
    alone = backend == ONE_PROCESS
    where = [] if alone else [f"sharding.backend={backend.removesuffix(SHARDED)}"]
    layout = "sharded" if backend.endswith(SHARDED) else "whole"
    overrides = f"data.batch_size={BATCH}", f"checkpoint.format={layout}", *where

    def training(name: str) -> Training:
        (home / name).mkdir()
        put_store(home / name / "mlflow.db")
        return Training(1 if alone else 2, config, overrides, home / name, f"epoch_{epochs:04d}")

    whole = training("whole")
    with Running(whole, 0) as run:
        run.wait_for_end()
        assert whole.is_complete(), run.said
    left, number = events, 0
    while left > 0:
        number += 1
        chain = _Interrupted(backend, training(f"run_{number}"), whole, draw, deck)
        for event in chain.events(left):
            result.events.append(event)
            left -= 1
            _say(f"{events - left}/{events} {backend}: {event.fault}: {event.problem or event.outcome} ({event.place})")
        result.chains.append(chain.chain)
        _say(f"{backend}: {chain.chain}")
        shutil.rmtree(chain.training.home)


class _Deck:
    """Kinds of faults in random order, each once before any comes again.

    Args:
        draw: the order.
        only: a regular expression; the others never come.
    """

    def __init__(self, draw: random.Random, only: str) -> None:
        self._draw = draw
        self._kinds = [
            kind for kind in (*LIVE, *AT_REST) if re.search(only, kind if isinstance(kind, str) else kind.name)
        ]
        self._live: list[Fault] = []
        self._at_rest: list[str] = []

    def live(self, processes: int) -> Fault:
        """The next one that happens to a training on so many processes."""
        while not (found := [fault for fault in self._live if processes > 1 or not fault.shared]):
            kinds = [kind for kind in self._kinds if isinstance(kind, Fault)]
            self._live += self._draw.sample(kinds, len(kinds))
        self._live.remove(found[0])
        return found[0]

    def at_rest(self) -> str | None:
        """The next one that happens to a checkpoint; None: none does."""
        if not self._at_rest:
            kinds = [kind for kind in self._kinds if isinstance(kind, str)]
            self._at_rest = self._draw.sample(kinds, len(kinds))
        return self._at_rest.pop() if self._at_rest else None


class _Interrupted:
    """One training to which faults happen.

    Args:
        backend: its backend.
        training: in a folder of its own.
        whole: the same, which was left alone.
        draw: what is drawn.
        deck: which faults happen.
    """

    def __init__(self, backend: str, training: Training, whole: Training, draw: random.Random, deck: _Deck) -> None:
        self.training, self._whole, self._draw, self._deck = training, whole, draw, deck
        self.chain = Chain(backend)
        self._starts, self._damaged, self._loses_records = 0, "", False

    def events(self, most: int) -> Iterator[Event]:
        """Faults, at most so many, until it is complete; then `chain` says whether it is as it should be."""
        count, sound = 0, True
        while sound and count < most and not self.training.is_complete():
            event = self._strike(self._deck.live(self.training.processes))
            if event is None:
                break
            sound = not event.problem
            count += 1
            yield event
            for _ in range(self._draw.randrange(8) if sound else 0):
                several = len(checkpoints(self.training.checkpoints)) > 1
                if count < most and several and not self._damaged and (name := self._deck.at_rest()) is not None:
                    event = self._damage(name, stays=self._draw.random() < 0.4)
                    count += 1
                    yield event
        if sound and not self.training.is_complete():
            try:
                with self._start() as run:
                    run.wait_for_end()
                    self.chain.problem = self._problem_of_start(run)
                    if not self.training.is_complete():
                        self.chain.problem = f"did not come to its end: {_last_line(run.said)}"
            except HangError as error:
                self.chain.problem = str(error)
        self._compare()

    def _start(self) -> Running:
        self._starts += 1
        return Running(self.training, self._starts)

    def _strike(self, fault: Fault) -> Event | None:
        """None: the training was complete before it happened."""
        try:
            with self._start() as run:
                if not fault.early:
                    run.wait_for_checkpoints(self._draw.randint(1, 3))
                    if self.training.is_complete() or run.has_ended():
                        run.wait_for_end()
                        if self.training.is_complete():
                            return None
                        return self._event(fault.name, "ended", f"ended by itself: {_last_line(run.said)}")
                fault.strike(run, self._draw)
                if self.training.is_complete():
                    return None
                return self._judged(fault, run)
        except HangError as error:
            return self._event(fault.name, "hung", str(error))

    def _judged(self, fault: Fault, run: Running) -> Event:
        self.chain.interruptions += 1
        found = newest(self.training.checkpoints)
        self.chain.within += found is not None and "step" in found.name
        self._loses_records |= fault.loses_records
        codes = ", ".join(map(str, sorted(set(run.codes)))) or "none is known"
        outcome = {
            (75,): "saved, exit code 75",
            (2,): "ended with the reason, exit code 2",
        }.get(tuple(sorted(set(run.codes))), "went on from the last checkpoint")
        problem = self._problem_of_start(run)
        if fault.code is not None and set(run.codes) != {fault.code}:
            problem = f"exit codes {codes}"
        elif fault.code is None and {0, MISUSE} & set(run.codes):
            problem = f"exit codes {codes}: {_last_line(run.said)}"
        elif fault.says and not re.search(fault.says, run.said):
            problem = f"nobody says {fault.says!r}: {_last_line(run.said)}"
        return self._event(fault.name, outcome, problem)

    def _problem_of_start(self, run: Running) -> str:
        """What must hold of every start, however it ended."""
        if "Traceback" in run.said:
            said = run.said[run.said.index("Traceback") :]
            _say(said)
            return f"a traceback: {_last_line(said)}"
        if self._damaged and self._damaged not in run.said and "epochs of" in run.said:
            return f"nobody says {self._damaged!r}"
        # One that is killed before its first step may have set it aside already.
        if "epochs of" in run.said or (self._damaged and not Path(self._damaged.split()[1]).exists()):
            self._damaged = ""
        for path in checkpoints(self.training.checkpoints):
            if not self._damaged and (problem := problem_with(path, World())) is not None:
                return f"{path.name} looks whole: {problem}"
        return ""

    def _damage(self, name: str, stays: bool) -> Event:
        """Damage the newest checkpoint, and put it back unless the next start is to find it so."""
        *_, older, path = checkpoints(self.training.checkpoints)
        aside = self.training.home / "aside"
        shutil.copytree(path, aside)
        AT_REST[name](path, self._draw)
        config = load(self.training.config, [*self.training.arguments[3:], "checkpoint.resume=auto"])
        used, lines = resolve(config, World())
        problem = "" if used == older and len(lines) == 1 else f"{used} is used, and said: {lines}"
        if stays:
            self._damaged = f"checkpoint {path} cannot be used"
            shutil.rmtree(aside)
        else:
            shutil.rmtree(path)
            aside.rename(path)
        outcome = "noticed, the one before is used" + (", which the run went on from" if stays else "")
        return Event(name, self.chain.backend, path.name, outcome, problem)

    def _event(self, fault: str, outcome: str, problem: str) -> Event:
        found = newest(self.training.checkpoints)
        return Event(fault, self.chain.backend, "the beginning" if found is None else found.name, outcome, problem)

    def _compare(self) -> None:
        """The final checkpoint, and what was recorded."""
        expected = read_state(self._whole.checkpoints / self._whole.last)["files"]
        self.chain.uninterrupted = _digest(expected)
        if not self.training.is_complete():
            return
        found = read_state(self.training.checkpoints / self.training.last)["files"]
        self.chain.interrupted = _digest(found)
        if found != expected:
            names = [name for name in expected if found.get(name) != expected[name]]
            self.chain.problem = self.chain.problem or f"{', '.join(names)} is another"
        records, whole = recorded(self.training), recorded(self._whole)
        twice = [point for point in records if records.count(point) > 1]
        missing = [] if self._loses_records else sorted(set(whole) - set(records))
        for what, points in (
            ("recorded twice", twice),
            ("not recorded", missing),
            ("too much", set(records) - set(whole)),
        ):
            if points:
                self.chain.problem = self.chain.problem or f"{what}: {', '.join(map(str, list(points)[:3]))}"


def _digest(files: dict[str, Any]) -> str:
    """SHA-256 of the weights; of those in several files the first one's."""
    return str(next(files[name]["sha256"] for name in sorted(files) if name.startswith("model.")))


def recorded(training: Training) -> list[tuple[str, int, float]]:
    """What the run of a training has recorded of losses and accuracies: name, step, value."""
    client = open_store(f"sqlite:///{training.database}", create=False)
    # A start that was killed before its first checkpoint is another run.
    experiment = client.get_experiment_by_name("ssam_scale").experiment_id
    run, *_ = client.search_runs([experiment], order_by=["attributes.start_time DESC"])
    names = ("train/loss", "train/lr", "val/loss", "val/top1")
    return [(name, m.step, m.value) for name in names for m in client.get_metric_history(run.info.run_id, name)]


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].replace("|", "/") if lines else "nothing"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
