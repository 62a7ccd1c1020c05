#!/bin/bash
# Images into latent shards: task i of n makes every n-th shard on one GPU; the last one writes the manifest.
#
#     sbatch slurm/encode_latents.sh --images IMAGENET/train --out data/imagenet256 \
#         --vae stabilityai/sd-vae-ft-mse --resolution 256
#     sbatch --array=0-31 slurm/encode_latents.sh ...
#
# A task that fails is requeued and makes the missing shards. The same call completes whatever is still missing.
#SBATCH --job-name=mf-encode
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:1
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
source slurm/common.sh || { echo "submit from the checkout of mf_dist"; exit 2; }
task tools/encode_latents.py "$@"
