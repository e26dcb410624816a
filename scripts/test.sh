#!/usr/bin/env bash
# Sets up .venv, then checks style and types and runs the tests: scripts/test.sh [pytest's arguments]
# scripts/environment.sh says what can be set for the set-up.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

use_environment test
say "ruff"
"$VENV_PYTHON" -m ruff check
"$VENV_PYTHON" -m ruff format --check --quiet
say "mypy --strict"
"$VENV_PYTHON" -m mypy --strict
say "pytest"
# Two files at a time: each has four ranks, of which mostly one computes.
exec "$VENV_PYTHON" -m pytest -q -n 2 --dist loadfile "$@"
