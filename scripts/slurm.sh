#!/usr/bin/env bash
# Slurm example: one launcher per node, torchrun starts the ranks.
#     sbatch scripts/slurm.sh [flags of pretrain_multimodal.py]
# Sizes and names come from the environment, as without Slurm:
#     MODEL_VARIANT=35b_a3b EP=8 GBS=256 sbatch --nodes=4 scripts/slurm.sh
#     CKPT_RESUME=1 sbatch scripts/slurm.sh         goes on where this run's last checkpoint ends
#SBATCH --job-name=qwen35vl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=04:00:00
# Ten minutes before the end, and when the job is preempted or cancelled, the ranks save and end: as long as the largest
# checkpoint takes, and an iteration more. A partition's GraceTime limits it at preemption.
#SBATCH --signal=TERM@600
#SBATCH --output=slurm-%j.txt
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch, from the repository}"

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # two jobs may share a node
export MASTER_ADDR MASTER_PORT

# In a container that has every package:
#     srun --container-image=IMAGE --container-workdir="$PWD" env SKIP_ENV=1 bash scripts/run_qwen35_vl.sh "$@"
# The environment is made once, before the nodes need it.
source scripts/env.sh
srun bash scripts/run_qwen35_vl.sh "$@"
