"""What would cost hours if it were found out later: looked at on every machine of a job, before anything is built."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ssam_scale.config.schema import Config
from ssam_scale.data import Images, open_images
from ssam_scale.errors import UserError
from ssam_scale.finding import Finding, checked
from ssam_scale.folders import existing
from ssam_scale.sharding import World
from ssam_scale.sharding.device import DeviceChoice
from ssam_scale.sharding.roll_call import roll_call
from ssam_scale.tracking.environment import git_tags, versions
from ssam_scale.tracking.redaction import without_secrets
from ssam_scale.tracking.store import check_experiment
from ssam_scale.tracking.tracker import TRACKERS

from .build import backend_of
from .checkpoint_size import expected_bytes
from .installation import installation
from .written import written_folders

# Of clocks of two machines. Records and logs are put in order by them; what depends on more takes the file system's.
APART_S = 5.0
_MODEL = "model"
_AT_ONCE = 2  # checkpoints: the one that is kept until the newer one is written


@dataclass(frozen=True)
class Preflight:
    """What was found before anything was built.

    Attributes:
        findings: of all processes, the same list on each.
        data: `data.train` and `data.val`, as this process sees them; missing: it cannot read them.
    """

    findings: Sequence[Finding]
    data: Mapping[str, Images]

    def notes(self) -> list[str]:
        """Lines on what a run goes on with, and is seldom meant to. What is wrong with the model building says itself.

        Raises:
            UserError: something fails; says the first.
        """
        if failed := [f for f in self.findings if f.verdict == "fail" and f.what != _MODEL]:
            raise UserError(failed[0].line)
        return [finding.line for finding in self.findings if finding.verdict == "warn"]


@dataclass(frozen=True)
class _Seen:
    """What one process sees.

    Attributes:
        where: the process and its machine, in words.
        own: what it finds by itself.
        versions: of packages, and this package's commit.
        files: bytes and fingerprint of each file of data.
        clock: seconds since 1970, at the moment that is everybody's.
    """

    where: str
    own: list[Finding]
    versions: dict[str, str]
    files: dict[str, str]
    clock: float


def preflight(config: Config, world: World) -> Preflight:
    """Look at data, folders, the store, versions, clocks and collectives; builds and leaves nothing. Collective.

    Args:
        config: of the run.
        world: the processes.
    """
    meeting = _meeting(world)
    if _fails(meeting):  # nothing that is collective would come back
        return Preflight(meeting, {})
    clock = _common_moment(world)
    data, own = _data(config)
    if world.first:
        own += [_tracker(config, name) for name in config.tracking.trackers]
    own += _folders(config, world, but="tracking store" if _fails(own) else "")
    if world.first and not _fails(own):
        own += [*_experiment(config), _room(config)]
    files = {key: f"{images.bytes:,} bytes, {images.fingerprint}" for key, images in data.items()}
    return Preflight([*meeting, *_of_all(world, own, files, clock)], data)


def examine(config: Config | None, world: World) -> list[Finding]:
    """What `ssam-scale doctor` looks at: each machine's installation, and what a run needs. Collective.

    Args:
        config: of the run; None: no run is asked about.
        world: the processes.

    Returns:
        The same on every process.
    """
    meeting = _meeting(world)
    if _fails(meeting):
        return meeting
    clock = _common_moment(world)
    device: DeviceChoice = "auto" if config is None else config.train.device
    found = _of_all(world, installation(device) if world.first_of_node else [], {}, clock)
    if config is None:
        return [*found, *meeting]
    # What both look at is said once.
    return list(dict.fromkeys([*found, *preflight(config, world).findings]))


def _meeting(world: World) -> list[Finding]:
    return [checked("collectives", lambda: roll_call(world))] if world.size > 1 else []


def _common_moment(world: World) -> float:
    """This machine's clock when all processes have just met. Collective."""
    world.smallest(0)
    return time.time()


def _of_all(world: World, own: list[Finding], files: dict[str, str], clock: float) -> list[Finding]:
    """What every process has found, and what only comparing them tells. Collective."""
    where = f"process {world.rank} ({socket.gethostname()})"
    seen = world.each_says(_Seen(where, own, versions() | git_tags(), files, clock))
    together = alike("versions", [(each.where, each.versions) for each in seen])
    if any(each.files for each in seen):
        together += alike("data", [(each.where, each.files) for each in seen])
    return [*_merged(seen), *together, *clocks([(each.where, each.clock) for each in seen])]


def alike(what: str, said: Sequence[tuple[str, Mapping[str, str]]]) -> list[Finding]:
    """Whether all processes say the same of each thing; nothing of one process alone.

    Args:
        what: is compared.
        said: where, and what by name.
    """
    (first, reference), *others = said
    for where, own in others:
        for key in sorted(reference.keys() | own.keys()):
            here, there = (found.get(key, "missing") for found in (reference, own))
            if here != there:
                return [Finding("fail", what, f"{key} is {here} for {first} and {there} for {where}", _SAME[what])]
    return [Finding("ok", what, f"the same for {len(said)} processes")] if others else []


_SAME = {
    "versions": "install the same on all machines, from the same commit",
    "data": "copy the file again to one of them, or use a file system that all machines share",
}


def clocks(said: Sequence[tuple[str, float]]) -> list[Finding]:
    """Whether the machines' clocks agree; nothing of one process alone.

    Args:
        said: where, and its seconds since 1970 at the same moment.
    """
    early, late = min(said, key=lambda pair: pair[1]), max(said, key=lambda pair: pair[1])
    apart = late[1] - early[1]
    if len(said) == 1:
        return []
    if apart <= APART_S:
        return [Finding("ok", "clocks", f"within {apart:.2f} s of each other")]
    return [
        Finding(
            "warn",
            "clocks",
            f"the clock of {late[0]} is {apart:.0f} s before that of {early[0]}, by which records and logs are put in "
            "order",
            "let the machines take the time from one server (chrony, systemd-timesyncd)",
        )
    ]


def room(free: int, needed: int, folder: object) -> Finding:
    """Whether a disk has room for the checkpoints that are there at once.

    Args:
        free: bytes.
        needed: of one checkpoint.
        folder: theirs.
    """
    said = f"{_AT_ONCE} checkpoints take {_size(_AT_ONCE * needed)}, {_size(free)} are free in {folder}"
    if free >= _AT_ONCE * needed:
        return Finding("ok", "room", said)
    return Finding("fail", "room", f"checkpoint.directory: {said}", "make room, or choose another folder")


def _data(config: Config) -> tuple[dict[str, Images], list[Finding]]:
    """Its tables, of which reading takes some dozen bytes an image."""
    data, own = {}, []
    for key in ("train", "val"):
        path = getattr(config.data, key)
        try:
            data[f"data.{key}"] = images = open_images(path)
            own.append(Finding("ok", f"data.{key}", f"{path}: {images.images:,} images, {_size(images.bytes)}"))
        except UserError as error:
            own.append(Finding("fail", f"data.{key}", str(error)))
    return data, own


def _folders(config: Config, world: World, but: str = "") -> list[Finding]:
    """What this process, or its machine, has to write to.

    Args:
        config: of the run.
        world: the processes.
        but: what is not looked at.
    """
    return [
        written.probed()
        for written in written_folders(config, backend_of(config, world))
        if (world.first or (written.everywhere and world.first_of_node)) and written.what != but
    ]


def _tracker(config: Config, name: str) -> Finding:
    """Whether there is what it takes; what a store holds is looked at later."""
    return checked("tracking", lambda: f"{name}: {TRACKERS[name].value.check(config)}")


def _experiment(config: Config) -> list[Finding]:
    uri, name = config.tracking.store, config.tracking.experiment
    if uri is None:
        return []

    def look() -> str:
        check_experiment(uri, name)
        return f"{without_secrets(uri)} takes experiment {name!r}"

    return [checked("tracking", look)]


def _room(config: Config) -> Finding:
    directory = config.checkpoint.directory
    try:
        return room(shutil.disk_usage(existing(directory)).free, expected_bytes(config), directory)
    except UserError as error:
        return Finding("fail", _MODEL, str(error))


def _fails(findings: Sequence[Finding]) -> bool:
    return any(finding.verdict == "fail" for finding in findings)


def _merged(seen: Sequence[_Seen]) -> list[Finding]:
    """What processes have found by themselves, each thing once; what only some have is said of them."""
    found: dict[Finding, list[str]] = {}
    for each in seen:
        for finding in each.own:
            found.setdefault(finding, []).append(each.where)
    result = []
    for finding, where in found.items():
        shared = len(where) == len(seen) or finding.verdict == "ok" or where[0] == seen[0].where
        result.append(finding if shared else replace(finding, said=f"{', '.join(where)}: {finding.said}"))
    return result


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 10**8 else f"{count / 1e6:.1f} MB"
