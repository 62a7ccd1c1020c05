#!/bin/bash
# Samples a trained model and measures it: RUN/eval/metrics.json.
#
#     sbatch slurm/fid_eval.sh --checkpoint runs/imagenet256_xl2 --nfe 1
#
#SBATCH --job-name=mf-eval
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:1
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
source slurm/common.sh || { echo "submit from the checkout of mf_dist"; exit 2; }
task tools/fid_eval.py "$@"
