#!/usr/bin/env bash
# Trains on Slurm by torchx: launch/recipes/torchx.sh [options of torchx run, such as --dryrun], from the checkout.
# -j is nodes x ranks; torchx puts a job that has ended with a checkpoint, or died, back into the queue.
set -euo pipefail
exec torchx run --scheduler slurm --workspace '' "$@" \
    dist.ddp -j 2x8 --gpu 8 --cpu 64 --memMB 500000 --max_retries 100 --script launch/train.py -- \
    --run-dir runs/torchx --requeue
