#!/usr/bin/env bash
# Set-up, then the tests; arguments are pytest's:
#
#     bash launch/test.sh                  the whole suite
#     bash launch/test.sh -m 'not slow'    what answers within three minutes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh dev
exec .venv/bin/python -m pytest "$@"
