#!/bin/bash
# sbatch recipes/accelerate/slurm.sh RECIPE.yaml [--key value ...]
# One launcher a node, which starts one process a GPU; a preempted job is requeued and goes on from its checkpoint.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --requeue
set -euo pipefail

gpus_per_node=$(nvidia-smi --list-gpus | wc -l)
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
resume=()
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then resume=(--resume_from_checkpoint true); fi

# SLURM_NODEID differs by node, so it is expanded there.
srun bash -c 'accelerate launch --config_file recipes/accelerate/multi_node.yaml \
    --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes "$0" --main_process_ip "$1" \
    finetune_vit.py "${@:2}"' \
    $((SLURM_NNODES * gpus_per_node)) "$host" "$@" "${resume[@]}"
