#!/bin/bash
# sbatch recipes/slurm.sh recipes/cuhk_pedes.json --data_dir /data/CUHK-PEDES --per_device_train_batch_size 12
#SBATCH --job-name=cada
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
# SIGTERM two minutes before the end, so that a checkpoint is saved; the job then queues again and goes on from it.
#SBATCH --signal=TERM@120
set -euo pipefail

address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
gpus=${GPUS_PER_NODE:-4}

# One launcher on each node; it starts a process for each GPU.
srun bash -c "accelerate launch --config_file recipes/accelerate/two_machines.yaml \
    --num_machines $SLURM_JOB_NUM_NODES --num_processes $((SLURM_JOB_NUM_NODES * gpus)) \
    --machine_rank \$SLURM_NODEID --main_process_ip $address \
    train_cada.py $* --resume_from_checkpoint last" && exit 0

status=$?
if [ "$status" -eq 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
