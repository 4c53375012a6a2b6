"""`ssam-scale train` as a script, for launchers that want one: torchrun and deepspeed."""

from __future__ import annotations

import argparse
import sys

from ssam_scale import cli


def main() -> None:
    """Drop what the DeepSpeed launcher adds, pass on the rest."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # The launchers say the same in LOCAL_RANK, which is what counts.
    parser.add_argument("--local_rank", "--local-rank")
    parser.add_argument("--deepspeed", action="store_true")
    parser.add_argument("--deepspeed_config", "--deepspeed-config", metavar="FILE")
    launcher, arguments = parser.parse_known_args()
    if launcher.deepspeed or launcher.deepspeed_config:
        given = "--deepspeed_config" if launcher.deepspeed_config else "--deepspeed"
        print(
            f"train.py: error: {given}: training on DeepSpeed ZeRO is not there yet; "
            "leave it out and choose sharding.backend=ddp or sharding.backend=fsdp2",
            file=sys.stderr,
        )
        sys.exit(2)
    cli.main(["train", *arguments])


if __name__ == "__main__":
    main()
