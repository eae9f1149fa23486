#!/usr/bin/env bash
# Train on SLURM, from the checkout: sbatch --nodes 4 --gpus-per-node 8 launch/slurm.sh [key=value ...]
# The checkout and the environment must lie on a file system that all nodes share. NPROC=<ranks per node>.
#SBATCH --job-name longctx
#SBATCH --ntasks-per-node 1
#SBATCH --output slurm-%j.log

# sbatch runs a copy of this file from its spool folder, so the checkout is where the job was submitted.
source "${SLURM_SUBMIT_DIR:?run me with sbatch, from the checkout}/launch/_env.sh"

read -r HEAD < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
exec srun --kill-on-bad-exit=1 "$RUN_PYTHON" "$ROOT/launch/_torchrun.py" \
  --nnodes "$SLURM_NNODES" --nproc-per-node "${NPROC:-${SLURM_GPUS_ON_NODE:-1}}" --max-restarts 0 \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$HEAD:${RDZV_PORT:-29400}" \
  -m longctx.train "$@"
