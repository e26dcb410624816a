#!/usr/bin/env bash
# Sets up .venv, then trains: scripts/train.sh [--ranks N] [--max-restarts N] [options of launch/train.py]
# scripts/train.sh --help lists them; scripts/environment.sh says what can be set for the set-up.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

ranks=2
max_restarts=0
arguments=()
while (($#)); do
    case $1 in
        --ranks)
            (($# > 1)) || die "expected a number after --ranks"
            ranks=$2
            shift 2
            ;;
        --ranks=*)
            ranks=${1#--ranks=}
            shift
            ;;
        --max-restarts)
            (($# > 1)) || die "expected a number after --max-restarts"
            max_restarts=$2
            shift 2
            ;;
        --max-restarts=*)
            max_restarts=${1#--max-restarts=}
            shift
            ;;
        *)
            arguments+=("$1")
            shift
            ;;
    esac
done

from=$PWD
use_environment launch
cd "$from" # where relative paths among the options, and runs/, belong

# The options are checked first, at once: a wrong one should not take torch's start and a trace from every rank to tell.
"$VENV_PYTHON" "$CHECKOUT/launch/options.py" --ranks "$ranks" --max-restarts "$max_restarts" \
    ${arguments[@]+"${arguments[@]}"}
for argument in ${arguments[@]+"${arguments[@]}"}; do
    if [[ $argument == --help || $argument == -h ]]; then
        exit
    fi
done

cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
threads=$((cores / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
say "starting $ranks rank(s), $OMP_NUM_THREADS thread(s) each"
exec "$VENV_PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$ranks" --max-restarts "$max_restarts" \
    "$CHECKOUT/launch/train.py" ${arguments[@]+"${arguments[@]}"}
