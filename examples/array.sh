#!/bin/sh
# One plan over eight jobs of a Slurm array, in one folder that all of them see:
#
#     sbatch examples/array.sh grid_tiny --data-dir tofu
#
# Without Slurm: for i in 1 2 3 4 5 6 7 8; do SLURM_ARRAY_TASK_ID=$i sh examples/array.sh grid_tiny --data-dir tofu & done
#SBATCH --array=1-8
#SBATCH --cpus-per-task=1
set -eu
recipe=$1
shift
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
exec dualoptim compare --recipe "$recipe" --shard "$SLURM_ARRAY_TASK_ID/8" "$@"
