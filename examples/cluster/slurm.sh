#!/bin/bash
# Share a run's captures among four tasks of a Slurm array, each with a GPU; then fuse and train in one job.
#
#     capture=$(sbatch --parsable examples/cluster/slurm.sh my.yaml)
#     sbatch --dependency=afterany:$capture --gpus=1 --wrap "fuselm run my.yaml"
#
# `output` and the texts must be in folders that all nodes see. A task that ends early costs the part that it was making,
# and the others make it; afterany starts the second job even then, and it makes what is left.
#SBATCH --job-name=fuselm-capture
#SBATCH --array=0-3
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
set -eu
for stage in capture align fuse; do
    srun fuselm "$stage" "$1" --shard auto
done
