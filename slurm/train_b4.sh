#!/bin/bash
# MeanFlow DiT-B/4 on ImageNet 256x256, the small model: batch 256 on one node of 8 GPUs.
#
#     sbatch slurm/train_b4.sh
#     sbatch --time=4:00:00 slurm/train_b4.sh train.seed=1 run_dir=runs/b4-seed1     # overrides of the config
#
# Resumes, is requeued at its time limit and after failures, and ends at once when the run has finished.
# See docs/cluster.md; settings of the cluster are in slurm/site.env.
#SBATCH --job-name=mf-b4
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
source slurm/common.sh || { echo "submit from the checkout of mf_dist"; exit 2; }
train configs/imagenet256_b4.yaml "$@"
