#!/usr/bin/env bash
# Start a run on the hosts of launch/hostfile with Open MPI's mpirun:
#
#     launch/mpirun.sh --config quickstart train.output_dir=runs/mine train.steps=100
#     PROGRAM=launch/finetune.py launch/mpirun.sh --from runs/imported --config paper-finetune
#
# mpirun passes no variables by itself: name those of yours in PASSED. Ranks find each other through MPI (mpi4py).
set -euo pipefail

PROGRAM=${PROGRAM:-launch/pretrain.py}
HOSTFILE=${HOSTFILE:-launch/hostfile}
PASSED=${PASSED:-DS_ACCELERATOR OMP_NUM_THREADS PATH PYTHONPATH LD_LIBRARY_PATH}
PORT=${PORT:-29500} # where the ranks meet, on the first host

for file in tools/preflight.py "$PROGRAM"; do
    if ! [[ -f $file ]]; then
        echo "error: there is no $file in $PWD; start this in the checkout, with a PROGRAM that is there" >&2
        exit 2
    fi
done
python tools/preflight.py --hostfile "$HOSTFILE" --port "$PORT" "$@"

export MASTER_PORT=$PORT
passed=(-x MASTER_PORT)
for name in $PASSED; do
    [ -z "${!name:-}" ] || passed+=(-x "$name")
done
# As many ranks as the hostfile has slots. As root, in a container: add --allow-run-as-root.
exec mpirun --hostfile "$HOSTFILE" "${passed[@]}" ${MPIRUN_OPTIONS:-} python "$PROGRAM" "$@"
