#!/usr/bin/env bash
# Start a run on the hosts of launch/hostfile with the deepspeed launcher, from any host that reaches them by ssh:
#
#     launch/deepspeed.sh --config quickstart train.output_dir=runs/mine train.steps=100
#     PROGRAM=launch/finetune.py launch/deepspeed.sh --from runs/imported --config paper-finetune
#
# Every host has the same checkout and environment at the same path, or shares them. The preflight ends here with a
# sentence and code 2 when something is wrong. Variables of this shell that begin as NCCL_, GLOO_, OMP_, CUDA_, HF_ ...
# reach all ranks (it prints which); arguments reach them as they are, whatever quotes and braces are in them.
set -euo pipefail

PROGRAM=${PROGRAM:-launch/pretrain.py}
HOSTFILE=${HOSTFILE:-launch/hostfile}
PORT=${PORT:-29500} # where the ranks meet, on the first host; another one for each run that shares that host

settled=$HOME/.cache/skvr-launch/$HOSTNAME-$PORT
python tools/preflight.py --hostfile "$HOSTFILE" --port "$PORT" --settle "$settled" "$@"

DS_ENV_FILE=$settled/environment exec deepspeed --hostfile "$HOSTFILE" --master_addr "$(cat "$settled/address")" \
    --master_port "$PORT" --log_level error "$PROGRAM" "$(cat "$settled/arguments")"
