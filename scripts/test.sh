#!/usr/bin/env bash
# Sets up .venv, then checks style and types and runs the tests: scripts/test.sh [--quick | --clients] [pytest's arguments]
#
#   --quick     a choice for the inner loop, without style and types
#   --clients   the tests marked `clients` too: other frameworks, the launcher, and processes that die and come back
#
# scripts/environment.sh says what can be set for the set-up.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

QUICK=(tests/test_{structure,law,layout,placement,collectives,sharded,contract,refusals,metrics}.py)

tier=${1:-} purpose=test
case $tier in
    --quick) shift; set -- -m "not clients" "${QUICK[@]}" "$@" ;;
    --clients) shift; purpose=clients ;;
    *) tier=; set -- -m "not clients" "$@" ;;
esac
use_environment $purpose
if [[ $tier != --quick ]]; then
    say "ruff"
    "$VENV_PYTHON" -m ruff check
    "$VENV_PYTHON" -m ruff format --check --quiet
    say "mypy --strict"
    "$VENV_PYTHON" -m mypy --strict
fi
say "pytest"
# Two files at a time: each has four ranks, of which mostly one computes.
exec "$VENV_PYTHON" -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@"
