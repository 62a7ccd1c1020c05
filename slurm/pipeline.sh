#!/bin/bash
# Images to metrics.json: submits encode, train and eval (1 and 2 network calls), each to start after the previous one.
#
#     slurm/pipeline.sh TRAIN_SCRIPT RUN_DIR DATA_DIR ENCODE_OPTIONS... [-- OVERRIDES...]
#     slurm/pipeline.sh slurm/train_xl.sh runs/xl2 data/imagenet256 --images IMAGENET/train \
#         --vae stabilityai/sd-vae-ft-mse --resolution 256 -- train.seed=1
#
# Run it on the login node, from the checkout. Options of sbatch: SBATCH_ variables, or ENCODE_SBATCH, TRAIN_SBATCH and
# EVAL_SBATCH in site.env.
set -euo pipefail
if [ $# -lt 4 ] || [ ! -f "$1" ] || [ ! -f slurm/common.sh ]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
ENCODE_SBATCH=() TRAIN_SBATCH=() EVAL_SBATCH=()
site=${SITE_ENV:-slurm/site.env}
if [ -f "$site" ]; then
  set +eu # modules and conda fail and read variables that are not set
  # shellcheck source=/dev/null
  source "$site"
  set -eu
fi
train=$1 run=$2 data=$3
shift 3
encode=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  encode+=("$1")
  shift
done
[ $# = 0 ] || shift

submit() { sbatch --parsable --kill-on-invalid-dep=yes "$@" | cut -d';' -f1; }
last=$(submit "${ENCODE_SBATCH[@]}" slurm/encode_latents.sh --out "$data" "${encode[@]}")
echo "encode $last"
last=$(submit --dependency=afterok:"$last" "${TRAIN_SBATCH[@]}" "$train" run_dir="$run" data.path="$data" "$@")
echo "train $last"
for nfe in 1 2; do # in sequence, since they write the same file
  last=$(submit --dependency=afterok:"$last" "${EVAL_SBATCH[@]}" slurm/fid_eval.sh --checkpoint "$run" --nfe "$nfe")
  echo "eval $last: $run/eval/metrics.json, $nfe network calls"
done
