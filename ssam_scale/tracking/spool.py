"""What a run records on its way to MLflow: it waits on disk while the store does not take it, and is sent later, once.

    <checkpoint.directory>/unsent_<run id>/
        records.jsonl   a line for each `Writer.log` and `Writer.tag`, after one that says of which run
        artifacts/      files under the names that they get in the run; a newer one replaces one that waits

Everything passes through these files, so that it outlives the process; they are empty whenever the store has all, and
gone when a run ends so. `Writer` fills and empties them for a run, `send` empties them afterwards.

**Once.** After an error nobody knows whether a request was carried out. MLflow's databases ignore a point that they
have, its folders do not, and older servers read a metric's whole history to find out. So we ask for the run's latest
metrics, one request, before anything is repeated: points are sent in order, and those of a metric up to the one that is
its latest have arrived.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import queue
import shlex
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ssam_scale.errors import UserError
from ssam_scale.tracking.environment import process
from ssam_scale.tracking.redaction import without_secrets
from ssam_scale.tracking.store import ANSWER_WITHIN_S, absolute, is_permanent, one_line, open_store, shortened
from ssam_scale.tracking.system import PREFIX

_log = logging.getLogger(__name__)

# What MLflow takes in one request.
_METRICS_AT_ONCE, _TAGS_AT_ONCE, _TAG_CHARACTERS = 1000, 100, 8000
_LONGEST_PAUSE_S = 30.0

CLOSE_WITHIN_S = 10.0
"""In which a run that ends is done with its store, whatever that does: SIGKILL follows SIGTERM after 30 s, of which
saving may take half."""

# Longer than another process may be about one request.
_SENT_WITHIN_S = 60.0

# Where the disk takes nothing: some 20 MB.
_RECORDS_IN_MEMORY = 10_000

_RECORDS, _ARTIFACTS = "records.jsonl", "artifacts"

Record = dict[str, Any]
"""`{"metrics": {key: value}, "step", "time": ms}`, `{"tags": {key: value}}` or, of how a process ended the run,
`{"end": status, "failure", "time", "process"}`."""


def unsent_folder(checkpoints: Path, run_id: str) -> Path:
    """Where a run's records wait: beside its checkpoints."""
    return checkpoints / f"unsent_{run_id}"


class Writer:
    """Takes what a run records, returns at once, and sends it in order in the background, many metrics in one request.

    MLflow's own asynchronous logging starts twenty threads, may reorder, and drops what fails.

    Args:
        client: an `mlflow.MlflowClient`.
        run_id: of the run.
        uri: of its store.
        folder: where records wait; what an earlier process of the run left there is sent first.
        goes_on: the store has the run already. No metric is then recorded again at steps at which it is already,
            because MLflow cannot delete points: the first ones stay. Those at step 0, which stand for a whole run, are.

    Attributes:
        resumed: the run that goes on, as the store has it once nobody else sends what waits; None: it is new.

    Raises:
        UserError: another process does not end sending what an earlier one has left.
    """

    def __init__(self, client: Any, run_id: str, uri: str, folder: Path, *, goes_on: bool = False) -> None:
        self._spool = _Spool(folder, run_id, uri, _SENT_WITHIN_S if goes_on else 0.0)
        if goes_on and self._spool.held:
            raise UserError(f"{folder}: {self._spool.problem}; wait until it has ended, or end it")
        self._delivery = _Delivery(client, run_id, self._spool)
        self._furthest: dict[str, int] = {}
        self._not_finite: dict[str, str] = {}
        self.resumed: Any = None
        if goes_on:
            self._spool.forget_end()
            self.resumed = resumed = client.get_run(run_id)
            if "not_finite" in resumed.data.tags:
                self._not_finite[""] = resumed.data.tags["not_finite"]
            self._furthest = {key: step for key, (step, _) in _latest(resumed).items()}
            for _, record in self._spool.all():
                for key in record.get("metrics", ()):
                    self._furthest[key] = max(record["step"], self._furthest.get(key, 0))
        self._queue: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._closing, self._deadline = False, math.inf
        self._answered = -math.inf
        # The disk has a thread of its own: sending takes half a minute when nobody answers, and the process may be
        # killed meanwhile.
        self._keeper = threading.Thread(target=self._keep, name="tracking disk", daemon=True)
        self._sender = threading.Thread(target=self._send, name="tracking", daemon=True)
        self._keeper.start()
        self._sender.start()

    @property
    def furthest(self) -> int:
        """The last step at which the resumed run had recorded anything; 0: nothing."""
        # What machines do is by time.
        return max((step for key, step in self._furthest.items() if not key.startswith(PREFIX)), default=0)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics at a step."""
        new = {key: float(value) for key, value in metrics.items() if not step or step > self._furthest.get(key, -1)}
        if new:
            self._queue.put({"metrics": new, "step": step, "time": int(time.time() * 1000)})

    def tag(self, key: str, value: str) -> None:
        """Set a tag of the run."""
        self._queue.put({"tags": {key: shortened(value, _TAG_CHARACTERS)}})

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file, which may be deleted afterwards, in `folder` of the run's artifacts.

        Raises:
            OSError: it could not be copied to where it waits.
        """
        self._spool.keep_artifact(path, folder or "")
        with self._changed:
            self._changed.notify()

    def close(self, status: str, failure: str, within: float = CLOSE_WITHIN_S) -> bool:
        """Send what is left and then how the run ended; what cannot be sent is left on disk, with a line that says so.

        Args:
            status: that the run ended with.
            failure: why.
            within: seconds after which a store is given up. One that does not answer is sooner.

        Returns:
            Whether the store knows how the run ended.
        """
        self._deadline = time.monotonic() + within
        end = {"end": status, "failure": failure, "time": int(time.time() * 1000), "process": process()}
        self._queue.put(end)
        self._queue.put(None)
        self._keeper.join(CLOSE_WITHIN_S)  # the disk is not the store
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._answered = time.monotonic()
        while self._sender.is_alive() and time.monotonic() < min(self._deadline, self._answered + ANSWER_WITHIN_S):
            self._sender.join(0.05)
        self._deadline = min(self._deadline, time.monotonic())
        marked = not any("end" in record for _, record in self._spool.all())
        self._spool.flush()
        waiting = self._spool.describe()
        if self._spool.lost:
            _log.warning("%d records were lost: neither the tracking store nor the disk took them", self._spool.lost)
        if waiting:
            command = f"ssam-scale send {shlex.quote(str(self._spool.folder))}"
            _log.warning(
                "%s of run %s did not reach the tracking store; they are sent when it is resumed, or by: %s",
                waiting,
                self._spool.run_id,
                command,
            )
        self._spool.close()
        return marked

    def _keep(self) -> None:
        while True:
            records = [self._queue.get()]
            with suppress(queue.Empty):
                while True:
                    records.append(self._queue.get_nowait())
            kept = [record for record in records if record is not None]
            self._spool.append([*kept, *self._not_finite_tags(kept)])
            with self._changed:
                self._changed.notify()
            if None in records:
                return

    def _not_finite_tags(self, records: list[Record]) -> Iterator[Record]:
        """Say in words what is no number: MLflow's databases keep infinity as ±1.8e308, its pages draw no NaN."""
        known = len(self._not_finite)
        for record in records:
            for key, value in record.get("metrics", {}).items():
                if not math.isfinite(value) and key not in self._not_finite:
                    self._not_finite[key] = f"{key} {value} at step {record['step']}"
        if len(self._not_finite) > known:
            yield {"tags": {"not_finite": shortened(", ".join(self._not_finite.values()), _TAG_CHARACTERS)}}

    def _send(self) -> None:
        pause, told = 0.0, False
        while True:
            with self._changed:
                if pause:
                    self._changed.wait_for(lambda: self._closing, timeout=pause)
                self._changed.wait_for(lambda: self._closing or self._delivery.is_due())
            if not self._delivery.is_due() or time.monotonic() > self._deadline:
                return
            try:
                self._delivery.some()
                pause, self._answered = 0.0, time.monotonic()
                if told and not self._delivery.is_due():
                    _log.warning("tracking store answers again, and has all that waited")
                    told = False
            except Exception as error:  # MLflow lets its stores' errors through, of every kind
                if not told:
                    where = f"waits in {self._spool.folder}"
                    _log.warning("tracking store does not answer, what is recorded %s: %s", where, one_line(error))
                    told = True
                pause = min(max(1.0, 2 * pause), _LONGEST_PAUSE_S)
                if self._closing:
                    time.sleep(0.2)  # the pause ends at once when closing; do not spin


class AwayError(UserError):
    """What waits is not sent now, and may be later: its store does not take it, or another process is at it."""


def send(folder: Path, uri: str | None = None) -> str:
    """Send what waits in a folder that `Writer` left, and delete it. Returns what was sent, in a line.

    Args:
        folder: `unsent_…`.
        uri: of the store; None: the one that the run was recorded in.

    Raises:
        AwayError: the store does not answer, or another process sends it; what is not sent stays.
        UserError: there is nothing, or the store refuses some of it, which stays.
    """
    try:
        header = json.loads((folder / _RECORDS).read_bytes().partition(b"\n")[0])
        run_id, known = str(header["run_id"]), str(header["uri"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: nothing waits there to be sent; give a folder unsent_… of a run") from error
    uri = uri or (os.environ.get("MLFLOW_TRACKING_URI", known) if "***" in known else known)
    if "***" in uri:
        raise UserError(f"{folder} is for {uri}, of which no password is kept: give it by --uri or MLFLOW_TRACKING_URI")
    try:
        client = open_store(uri, create=False)
    except UserError as error:
        raise AwayError(f"{folder}: {error}") from error
    spool = _Spool(folder, run_id, uri)
    if spool.problem:  # whoever has it may fail, and leave it to the next
        raise (AwayError if spool.held else UserError)(f"{folder}: {spool.problem}")
    delivery, what = _Delivery(client, run_id, spool), spool.describe()
    try:
        while delivery.is_due():
            delivery.some()
    except Exception as error:
        raise AwayError(f"{folder}: {without_secrets(uri)} does not take it: {one_line(error)}") from error
    finally:
        left = spool.describe()
        spool.close()
    if left:
        raise UserError(f"{folder}: {without_secrets(uri)} refuses {left}")
    return f"{what or 'nothing new'} sent to run {run_id} in {without_secrets(uri)}"


def waiting_text(folder: Path, name: str) -> str | None:
    """The text of an artifact that an earlier process of a run left in `folder`; None: there is none."""
    try:
        return (folder / _ARTIFACTS / name).read_text()
    except OSError:
        return None


class _Delivery:
    """Sends what waits, batch by batch.

    Args:
        client: MLflow's.
        run_id: of the run.
        spool: where it waits.
    """

    def __init__(self, client: Any, run_id: str, spool: _Spool) -> None:
        self._client, self._run_id, self._spool = client, run_id, spool
        self._doubt = spool.is_waiting()  # the process that left it may have been killed after it sent some
        self._arrived: dict[str, int] = {}
        self._refused: set[str] = set()

    def is_due(self) -> bool:
        """Whether there is something to send."""
        return self._spool.is_waiting() or bool(self._spool.artifacts(self._refused))

    def some(self) -> None:
        """Send the next batch.

        Raises:
            Exception: of MLflow's or its drivers': the store does not answer, or has no such run now.
        """
        if self._doubt:
            latest = _latest(self._run())
            self._arrived = {}
            for place, record in self._spool.all():
                for key in record.get("metrics", ()):
                    if latest.get(key) == (record["step"], record["time"]):
                        self._arrived[key] = place
            self._doubt = False
        head = self._spool.head()
        if head:
            self._doubt = True
            self._post(head)
            self._doubt = False
            self._spool.drop(len(head))
        elif files := self._spool.artifacts(self._refused):
            self._upload(files[0])

    def _run(self) -> Any:
        run = self._client.get_run(self._run_id)
        if run.info.lifecycle_stage == "deleted":  # it may be restored
            raise UserError(f"run {self._run_id} was deleted")
        return run

    def _post(self, head: list[tuple[int, Record]]) -> None:
        from mlflow.entities import Metric, RunTag

        entities: list[Any] = []
        for place, record in head:
            for key, value in record.get("metrics", {}).items():
                if place > self._arrived.get(key, -1):
                    entities.append(Metric(key, float(value), record["time"], record["step"]))
            entities += [RunTag(key, value) for key, value in record.get("tags", {}).items()]
        if entities:
            self._log_batch(entities)
        for _, record in head:
            if "end" in record:
                self._mark(record)

    def _mark(self, end: Record) -> None:
        """Tell the store how a process has ended the run, unless another one is going on with it."""
        if self._run().data.tags.get("process", end.get("process")) == end.get("process"):
            if end["failure"]:
                self._client.set_tag(self._run_id, "failure", end["failure"])
            self._client.set_terminated(self._run_id, end["end"], end["time"])

    def _log_batch(self, entities: list[Any]) -> None:
        from mlflow.entities import Metric

        metrics = [entity for entity in entities if isinstance(entity, Metric)]
        tags = [entity for entity in entities if not isinstance(entity, Metric)]
        try:
            self._client.log_batch(self._run_id, metrics=metrics, tags=tags)
        except Exception as error:
            if not is_permanent(error):
                raise
            self._run()  # raises if that is the reason
            if len(entities) > 1:
                # MLflow refuses a batch for one bad metric.
                half = len(entities) // 2
                self._log_batch(entities[:half])
                self._log_batch(entities[half:])
            elif (key := entities[0].key) not in self._refused:
                self._refused.add(key)
                _log.warning("tracking store refuses %s, which is left out: %s", key, one_line(error))

    def _upload(self, path: Path) -> None:
        name = path.relative_to(self._spool.folder / _ARTIFACTS)
        folder = None if name.parent == Path() else str(name.parent)
        sent = path.stat().st_ino
        try:
            self._client.log_artifact(self._run_id, str(path), folder)
        except Exception as error:
            if not is_permanent(error):
                raise OSError(f"artifact {name}: {one_line(error)}") from error
            self._refused.add(str(path))
            _log.warning("tracking store refuses artifact %s: %s", name, one_line(error))
        else:
            self._spool.drop_artifact(path, sent)


def _latest(run: Any) -> dict[str, tuple[int, int]]:
    """Step and time of each metric's latest point, which is the one of the highest step."""
    return {metric.key: (metric.step, metric.timestamp) for metric in run.data.to_proto().metrics}


class _HeldError(OSError):
    """Another process has the file."""


class _Spool:
    """Records in a file, to which is appended at one end and from which is taken at the other; and files.

    Where the disk takes nothing, so many records wait in memory. Nothing is raised for it.

    Args:
        folder: for both; made when the first record or file comes.
        run_id: whose they are.
        uri: of the store that they are for.
        patience: seconds to wait for another process that has the file.

    Attributes:
        lost: records that were neither kept nor sent.
        problem: why the file cannot be used; empty if it can.
        held: whether that is because another process has it.
    """

    def __init__(self, folder: Path, run_id: str, uri: str, patience: float = 0.0) -> None:
        self.folder, self.run_id = folder, run_id
        self.lost, self.problem, self.held = 0, "", False
        header = {"run_id": run_id, "uri": without_secrets(absolute(uri))}
        self._header = json.dumps(header).encode() + b"\n"
        self._lock = threading.RLock()
        self._fd: int | None = None
        self._begin = self._read = self._size = 0  # bytes of the file: its first line, what is done with, all
        self._memory: deque[Record] = deque()  # younger than what the file has
        self._taken = 0  # added to places, so that they rise also when the file begins anew
        self._files: set[Path] = set()
        if (folder / _RECORDS).exists():
            give_up = time.monotonic() + patience
            while True:
                try:
                    self._open()
                    break
                except _HeldError as error:
                    if time.monotonic() < give_up:
                        time.sleep(0.05)
                        continue
                    self.held, self.problem = True, str(error)
                    break
                except OSError as error:
                    self._tell(error)
                    break

    def append(self, records: list[Record]) -> None:
        """Keep records: on disk, if it takes them and nothing older is in memory."""
        with self._lock:
            if not records:
                return
            if not self._memory:
                try:
                    self._write(b"".join(map(_line, records)))
                    self.problem = ""
                    return
                except OSError as error:
                    self._tell(error)
            room = _RECORDS_IN_MEMORY - len(self._memory)
            self._memory.extend(records[:room])
            self.lost += len(records[room:])

    def is_waiting(self) -> bool:
        """Whether there are records."""
        return self._read < self._size or bool(self._memory)

    def head(self) -> list[tuple[int, Record]]:
        """The next records and their places, as many as fit into one request."""
        found: list[tuple[int, Record]] = []
        metrics = tags = 0
        with self._lock:
            for place, record in self.all():
                metrics += len(record.get("metrics", ()))
                tags += len(record.get("tags", ()))
                if found and (metrics > _METRICS_AT_ONCE or tags > _TAGS_AT_ONCE or "end" in record):
                    break
                found.append((place, record))
        return found

    def all(self) -> Iterator[tuple[int, Record]]:
        """All records and their places, which rise."""
        with self._lock:
            place = self._read
            if self._fd is not None:
                with open(self._fd, "rb", closefd=False) as file:
                    file.seek(place)
                    for line in file:
                        yield self._taken + place, _record(line)
                        place += len(line)
            yield from enumerate(self._memory, self._taken + self._size)

    def drop(self, count: int) -> None:
        """Be done with the first records."""
        with self._lock:
            if self._fd is not None and self._read < self._size:
                with open(self._fd, "rb", closefd=False) as file:
                    file.seek(self._read)
                    while count and (line := file.readline()):
                        self._read += len(line)
                        count -= 1
            for _ in range(min(count, len(self._memory))):
                self._memory.popleft()
                self._taken += 1
            if self._fd is not None and self._read == self._size > self._begin and not self._memory:
                with suppress(OSError):
                    os.ftruncate(self._fd, self._begin)
                    self._taken += self._size
                    self._read = self._size = self._begin

    def forget_end(self) -> None:
        """Drop the end of the run, which is going on."""
        with self._lock:
            kept = [record for _, record in self.all()]
            if any("end" in record for record in kept):
                self.drop(len(kept))
                self.append([record for record in kept if "end" not in record])

    def keep_artifact(self, path: Path, folder: str) -> None:
        """Copy a file to where it waits."""
        place = self.folder / _ARTIFACTS / folder / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            if self._fd is None:
                self._open()  # whose file it is, is said there
        partial = self.folder / f"partial {threading.get_ident()}"
        try:
            shutil.copyfile(path, partial)
            with self._lock:
                partial.replace(place)
                self._files.add(place)
        finally:
            partial.unlink(missing_ok=True)

    def artifacts(self, refused: set[str]) -> list[Path]:
        """Files that wait, but those."""
        with self._lock:
            return sorted(path for path in self._files if str(path) not in refused)

    def drop_artifact(self, path: Path, inode: int) -> None:
        """Delete a file that was sent, unless another one has taken its place."""
        with self._lock, suppress(OSError):
            if path.stat().st_ino == inode:
                path.unlink()
                self._files.discard(path)

    def describe(self) -> str:
        """What waits, in words; empty if nothing does."""
        records = [record for _, record in self.all()]
        metrics = sum(len(record.get("metrics", ())) for record in records)
        tags, files = sum(len(record.get("tags", ())) for record in records), len(self.artifacts(set()))
        ends = [f"its end ({record['end']})" for record in records if "end" in record]
        counts = ((metrics, "metric"), (tags, "tag"), (files, "artifact"))
        return ", ".join([*(f"{n} {name}{'s'[: n != 1]}" for n, name in counts if n), *ends[-1:]])

    def flush(self) -> None:
        """Put what is in memory on disk, which may have room again, or count it as lost."""
        with self._lock:
            rest, self._memory = list(self._memory), deque()
            self.append(rest)
            self.lost += len(self._memory)
            self._memory.clear()

    def close(self) -> None:
        """Let go of the file, and delete it if nothing waits."""
        with self._lock:
            if self._fd is None:
                return
            if not self.is_waiting() and not self.artifacts(set()):
                shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._fd)
            self._fd = None

    def _open(self) -> None:
        fd = self._locked()
        try:
            content = os.pread(fd, os.fstat(fd).st_size, 0)
            size = content.rfind(b"\n") + 1  # a line that was being written when the process was killed is none
            os.ftruncate(fd, size)
            if not size:
                os.write(fd, self._header)
                size = len(self._header)
        except OSError:
            os.close(fd)
            raise
        self._fd, self._size = fd, size
        self._files = {path for path in (self.folder / _ARTIFACTS).rglob("*") if path.is_file()}
        self._begin = self._read = content.find(b"\n") + 1 or size

    def _locked(self) -> int:
        """The file, open, which no other process has."""
        path = self.folder / _RECORDS
        while True:
            # What it records of a run may hold more than its names show; it is nobody else's.
            self.folder.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which loader processes would inherit
            except (BlockingIOError, PermissionError):
                os.close(fd)
                raise _HeldError(f"run {self.run_id} is being recorded or sent from there by another process") from None
            except OSError:
                return fd  # some network disks have no locks
            try:
                if os.path.samestat(path.stat(), os.fstat(fd)):
                    return fd
            except FileNotFoundError:
                pass
            os.close(fd)  # whoever had it before has sent all and deleted it

    def _write(self, data: bytes) -> None:
        if self._fd is None:
            self._open()
        assert self._fd is not None
        try:
            done = 0
            while done < len(data):
                done += os.write(self._fd, data[done:])
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._fd, self._size)  # no half of a line
            raise
        self._size += len(data)

    def _tell(self, error: OSError) -> None:
        if not self.problem:
            what = f"what is not sent yet waits in memory, {_RECORDS_IN_MEMORY} records at most"
            _log.warning("%s: %s: %s", self.folder, what, error)
        self.problem = str(error)


def _line(record: Record) -> bytes:
    # JSON knows neither NaN nor infinity; as words they are read by anybody's `float`.
    if "metrics" in record:
        values = {key: value if math.isfinite(value) else str(value) for key, value in record["metrics"].items()}
        record = record | {"metrics": values}
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def _record(line: bytes) -> Record:
    try:
        record = json.loads(line)
    except ValueError:
        return {}  # a disk that lost its power may hold anything
    return record if isinstance(record, dict) else {}
