#!/usr/bin/env bash
# Trains on several hosts by torchrun alone; run it on each of them, from a checkout that all have at the same path.
#
#   NODES=2 HEAD=10.0.0.1 launch/recipes/torchrun.sh [options of launch/train.py]
#   NODES=2:4 HEAD=10.0.0.1 launch/recipes/torchrun.sh ...        elastic: begins with 2 hosts, takes up to 4, goes on with 2
#   NODES=2 HEAD=10.0.0.1 NODE_RANK=0 launch/recipes/torchrun.sh ...        static: 0 on HEAD, 1 on the next
#
#   HEAD        address of one of the hosts, which every host reaches and which has to outlive the run
#   NODES       how many hosts, or MIN:MAX
#   NODE_RANK   number of this host, for hosts that must not find each other by themselves
#   RANKS       ranks per host; one per GPU where unset
#   RUN_DIR     folder on a file system that all hosts share
set -euo pipefail
: "${NODES:?how many hosts, or MIN:MAX}" "${HEAD:?address of one of the hosts}"

run_dir=${RUN_DIR:-runs/several-hosts}
python3 launch/options.py --run-dir "$run_dir" --requeue "$@" # what is wrong here would be wrong after each restart
if [[ -n ${NODE_RANK:-} ]]; then
    rendezvous=(--node-rank "$NODE_RANK" --master-addr "$HEAD" --master-port 29400)
else
    rendezvous=(--rdzv-backend c10d --rdzv-endpoint "$HEAD:29400" --rdzv-id sharded-dadamw)
fi
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300     # seconds for ranks to write a checkpoint
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # or agents keep the address of a store that may have gone with a host
exec torchrun --nnodes "$NODES" --nproc-per-node "${RANKS:-gpu}" --max-restarts 100 \
    "${rendezvous[@]}" launch/train.py --run-dir "$run_dir" --requeue "$@"
