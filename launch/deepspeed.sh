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

for file in tools/preflight.py "$PROGRAM"; do
    if ! [[ -f $file ]]; then
        echo "error: there is no $file in $PWD; start this in the checkout, with a PROGRAM that is there" >&2
        exit 2
    fi
done

settled=~/.cache/skvr-launch/$HOSTNAME-$PORT
rm -f "$settled/arguments"
python tools/preflight.py --hostfile "$HOSTFILE" --port "$PORT" --settle "$settled" "$@"
[[ -f $settled/arguments ]] || exit 0 # it was asked for its --help

DS_ENV_FILE=$settled/environment exec deepspeed --hostfile "$HOSTFILE" --master_addr "$(cat "$settled/address")" \
    --master_port "$PORT" --log_level error "$PROGRAM" "$(cat "$settled/arguments")"
