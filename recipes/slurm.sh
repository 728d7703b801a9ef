#!/bin/bash
# sbatch recipes/slurm.sh recipes/cuhk_pedes.json --data_dir /data/CUHK-PEDES --per_device_train_batch_size 12
#SBATCH --job-name=cada
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
# Two minutes before the time is up this script gets SIGTERM and passes it on: a checkpoint is saved, and the job queues
# again and goes on from there.
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)  # head would end before scontrol does
processes=$((SLURM_JOB_NUM_NODES * ${GPUS_PER_NODE:-4}))
terminated=no
export PET_SHUTDOWN_TIMEOUT=115  # seconds that the launcher leaves its processes to save; 30 by default

# One launcher on each machine, which starts a process for each of its GPUs.
srun bash -c 'exec accelerate launch --config_file recipes/accelerate/two_machines.yaml \
    --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$1" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$2" train_cada.py "${@:3}" --resume_from_checkpoint last' \
    launch "$processes" "$first" "$@" &
step=$!
trap 'terminated=yes; kill -TERM "$step"' TERM

status=0
wait "$step" || status=$?
if [ "$terminated" = yes ]; then
    wait "$step" || status=$?  # until the checkpoint is saved
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
