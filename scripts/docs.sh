#!/usr/bin/env bash
# Sets up .venv, then builds the site of docs/ into build/site; a broken link or reference fails: scripts/docs.sh
# With other arguments, mkdocs gets them: scripts/docs.sh serve
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment test
export NO_MKDOCS_2_WARNING=1 # its theme's remark about another program
(($#)) || set -- build --strict
exec "$VENV_PYTHON" -m mkdocs "$@"
