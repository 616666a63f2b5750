#!/usr/bin/env bash
# Start a run on the hosts of launch/hostfile with Open MPI's mpirun:
#
#     launch/mpirun.sh --config quickstart train.output_dir=runs/mine train.steps=100
#     PROGRAM=launch/finetune.py launch/mpirun.sh --from runs/imported --config paper-finetune
#
# mpirun passes no variables by itself: this passes those that the preflight prints, or those that you name in PASSED.
# Ranks find each other through MPI (mpi4py).
set -euo pipefail

PROGRAM=${PROGRAM:-launch/pretrain.py}
HOSTFILE=${HOSTFILE:-launch/hostfile}
PORT=${PORT:-29500} # where the ranks meet, on the first host

for file in tools/preflight.py "$PROGRAM"; do
    if ! [[ -f $file ]]; then
        echo "error: there is no $file in $PWD; start this in the checkout, with a PROGRAM that is there" >&2
        exit 2
    fi
done
python tools/preflight.py --hostfile "$HOSTFILE" --port "$PORT" "$@"

PASSED=${PASSED:-$(python -c 'from skvr_dist.cluster.variables import passed_variables as p; print(*p())')}
export MASTER_PORT=$PORT
passed=(-x MASTER_PORT)
for name in $PASSED; do
    [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || continue # no shell could name it
    [ -z "${!name:-}" ] || [ "$name" = MASTER_PORT ] || passed+=(-x "$name")
done
# As many ranks as the hostfile has slots. As root, in a container: add --allow-run-as-root.
exec mpirun --hostfile "$HOSTFILE" "${passed[@]}" ${MPIRUN_OPTIONS:-} python "$PROGRAM" "$@"
