#!/usr/bin/env bash
# Start this host's ranks of a run with torchrun; run it on every host, in any order (a pod of Kubernetes, tmux, pdsh):
#
#     FIRST=host1 HOSTS=2 RANKS=8 launch/torchrun.sh --config quickstart train.output_dir=runs/mine
# For fine-tuning, PROGRAM=launch/finetune.py before it, and --from CHECKPOINT among the arguments.
#
# No ssh between the hosts is needed. What they disagree on is named when the run starts.
set -euo pipefail

PROGRAM=${PROGRAM:-launch/pretrain.py}
FIRST=${FIRST:?the name of the host where all meet, the same on every host}
HOSTS=${HOSTS:?how many hosts run this}
RANKS=${RANKS:-$({ nvidia-smi --list-gpus 2> /dev/null || true; } | wc -l)} # of this host
PORT=${PORT:-29400}                               # on the first host; another one for each run that shares it

for number in HOSTS RANKS; do
    if ! [[ ${!number} =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]]; then
        echo "error: $number is '${!number}'; give a number of 1 or more (RANKS is that of GPUs if nvidia-smi finds any)" >&2
        exit 2
    fi
done

exec torchrun --nnodes "$HOSTS" --nproc-per-node "$RANKS" --rdzv-backend c10d --rdzv-endpoint "$FIRST:$PORT" \
    --rdzv-id "${RUN:-skvr}" "$PROGRAM" "$@"
