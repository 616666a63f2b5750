#!/usr/bin/env bash
# Start this host's ranks of a run with torchrun; run it on every host, in any order (a pod of Kubernetes, tmux, pdsh):
#
#     FIRST=host1 HOSTS=2 RANKS=8 launch/torchrun.sh --config quickstart train.output_dir=runs/mine
# For fine-tuning, PROGRAM=launch/finetune.py before it, and --from CHECKPOINT among the arguments.
#
# No ssh between the hosts is needed. What they disagree on is named when the run starts.
set -euo pipefail

PROGRAM=${PROGRAM:-launch/pretrain.py}
FIRST=${FIRST:-} # the name of the host where all meet, the same on every host
HOSTS=${HOSTS:-} # that run this
RANKS=${RANKS:-$(nvidia-smi --list-gpus 2> /dev/null | grep -c '^GPU ' || true)} # of this host
PORT=${PORT:-29400}                               # on the first host; another one for each run that shares it

if ! [[ -f $PROGRAM ]]; then
    echo "error: there is no $PROGRAM in $PWD; start this in the checkout, with a PROGRAM that is there" >&2
    exit 2
fi
if [[ -z $FIRST ]]; then
    echo "error: FIRST is empty; give the name of the host where all meet, the same on every host" >&2
    exit 2
fi
if ! [[ $HOSTS =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]]; then
    echo "error: HOSTS is '$HOSTS'; give the number of hosts that run this" >&2
    exit 2
fi
if [[ $RANKS == 0 ]]; then
    echo "error: nvidia-smi finds no GPU on this host; give its number of ranks as RANKS" >&2
    exit 2
fi

exec torchrun --nnodes "$HOSTS" --nproc-per-node "$RANKS" --rdzv-backend c10d --rdzv-endpoint "$FIRST:$PORT" \
    --rdzv-id "${RUN:-skvr}" "$PROGRAM" "$@"
