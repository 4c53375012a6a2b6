#!/usr/bin/env bash
# Set-up, then the tests; arguments are pytest's:
#
#     bash launch/test.sh                  the whole suite but its exhaustive tier
#     bash launch/test.sh -m 'not slow'    what answers within three minutes
#     bash launch/test.sh -m exhaustive    every combination, before a release
#     bash launch/test.sh -m gpu           what needs a GPU; no other run sees one
#
# It ends with what took longest. Workers share the tests; -n 0 runs them in one process, with a debugger or with one
# clear line of output.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh dev
exec .venv/bin/python -m pytest -n auto --durations 40 --durations-min 10 "$@"
