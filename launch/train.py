"""`ssam-scale train` as a script, for launchers that want one: torchrun and deepspeed."""

from __future__ import annotations

import argparse

from ssam_scale.__main__ import main as ssam_scale


def main() -> None:
    """Drop the rank that the DeepSpeed launcher adds, pass on the rest."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # The launchers say the same in LOCAL_RANK, which is what counts.
    parser.add_argument("--local_rank", "--local-rank")
    _, arguments = parser.parse_known_args()
    ssam_scale(["train", *arguments])


if __name__ == "__main__":
    main()
