#!/usr/bin/env bash
# One process of a Slurm job: tells it its place, then runs what follows. Used by srun, not run here.
set -euo pipefail
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
exec "$@"
