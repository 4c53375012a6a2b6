"""`ssam-scale train` as a script, for launchers that want one: torchrun and deepspeed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NoReturn

from ssam_scale.cli.main import main as ssam_scale


def main() -> None:
    """Drop what the DeepSpeed launcher adds, turn its configuration file into overrides, pass on the rest."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # The launchers say the same in LOCAL_RANK, which is what counts.
    parser.add_argument("--local_rank", "--local-rank")
    parser.add_argument("--deepspeed", action="store_true")
    parser.add_argument("--deepspeed_config", "--deepspeed-config", metavar="FILE", type=Path)
    launcher, arguments = parser.parse_known_args()
    overrides = _overrides(launcher.deepspeed_config) if launcher.deepspeed_config else []
    if launcher.deepspeed and not any(a.startswith("sharding.backend=zero") for a in [*overrides, *arguments]):
        _fail("--deepspeed: say which stage of ZeRO: sharding.backend=zero2, or --deepspeed_config FILE with a stage")
    ssam_scale(["train", *overrides, *arguments])


def _overrides(path: Path) -> list[str]:
    """The sections of a DeepSpeed configuration as overrides of `sharding.deepspeed`, its stage as the backend."""
    try:
        sections = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        _fail(f"--deepspeed_config {path}: cannot be read as JSON: {error}")
    if not isinstance(sections, dict):
        _fail(f"--deepspeed_config {path}: a DeepSpeed configuration is an object with keys")
    overrides = []
    zero = sections.get("zero_optimization")
    if isinstance(zero, dict) and "stage" in zero:
        overrides.append(f"sharding.backend=zero{zero.pop('stage')}")
    return [*overrides, *(f"sharding.deepspeed.{key}={json.dumps(value)}" for key, value in sections.items())]


def _fail(message: str) -> NoReturn:
    print(f"train.py: error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
