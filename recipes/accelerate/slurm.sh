#!/bin/bash
# sbatch recipes/accelerate/slurm.sh RECIPE.yaml --output_dir DIR [--key value ...]
# One launcher per node, which starts one process per GPU. A preempted job is requeued and resumes from its checkpoint.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --requeue
set -euo pipefail

gpus_per_node=$(nvidia-smi --list-gpus | wc -l)
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs may share a node

out=
for ((i = 2; i <= $#; i++)); do
    case ${!i} in
        --output_dir) next=$((i + 1)) && out=${!next:-} ;;
        --output_dir=*) out=${!i#*=} ;;
    esac
done
if [ -z "$out" ]; then
    echo "error: add --output_dir DIR, where a requeued job finds its checkpoints" >&2
    exit 2
fi
resume=()
begun=$(compgen -G "$out/checkpoint-*" || compgen -G "$out/seed-*" || compgen -G "$out/fold-*" || true)
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -n "$begun" ]; then # without a checkpoint there is nothing to resume
    resume=(--resume_from_checkpoint true)
fi

# SLURM_NODEID differs per node, so it is expanded there. A node that fails stops the others, which would wait for it.
srun --kill-on-bad-exit=1 bash -c 'accelerate launch --config_file recipes/accelerate/multi_node.yaml \
    --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes "$0" --main_process_ip "$1" \
    --main_process_port "$2" finetune_vit.py "${@:3}"' \
    $((SLURM_NNODES * gpus_per_node)) "$host" "$port" "$@" "${resume[@]}"
