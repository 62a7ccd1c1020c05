#!/usr/bin/env bash
# First contact with a GPU, in 25 minutes: does it run, is it right, how fast is it; predictions beside measurements.
#
#   tools/bench/first_contact.sh OUT [--minutes N] [--wheels DIR] [--only NAME,NAME] [--tiny]
#
# Writes OUT/first_contact.md and first_contact.json, and all else below OUT. Each line has a time limit, and none can
# stop the next. When the minutes are over, the same command goes on with the lines that have no result yet.
#   --minutes N     for this call (default 25)
#   --wheels DIR    install DIR/*.whl into OUT/packages, without a network and without what they depend on
#   --only NAMES    these lines only, also if they have a result
#   --tiny          small shapes, to try the script itself without a GPU; the predictions do not apply
#   PYTHON="..."    the interpreter, with arguments if need be (default: .venv/bin/python, else python3)
# shellcheck disable=SC2086  # PYTHON, SMALL, SHAPE and STEP are several words
set -uo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
usage() {
  sed -n '4p;8,12p' "$0" | cut -c3- >&2
  exit 2
}

minutes=25 wheels='' only='' tiny='' OUT=''
while [ $# -gt 0 ]; do
  case $1 in
    --tiny) tiny=yes ;;
    --minutes | --wheels | --only)
      [ $# -gt 1 ] || usage
      printf -v "${1#--}" %s "$2"
      shift ;;
    -* | '') usage ;;
    *)
      [ -z "$OUT" ] || usage
      OUT=$1 ;;
  esac
  shift
done
if [ -z "$OUT" ] || ! [[ $minutes =~ ^[1-9][0-9]*$ ]]; then usage; fi
mkdir -p "$OUT"/{logs,results} || exit 2
OUT=$(cd "$OUT" && pwd)
[ -z "$wheels" ] || wheels=$(cd "$wheels" && pwd) || exit 2
cd "$root" || exit 2
default=python3
[ ! -x .venv/bin/python ] || default=$root/.venv/bin/python
export OUT PYTHON=${PYTHON:-$default} PYTHONUNBUFFERED=1
export PYTHONPATH=$root:$OUT/packages${PYTHONPATH:+:$PYTHONPATH}

# ---- shapes
export STEPS=100 SMALL=''                                        # of the small model
export COUNT=2000 SIDE=256 WIDTH=128 SAMPLES=1000 ROWS=32 SHAPE='' # of XL/2, its images and VAE
SIZE=8192 GIGABYTES=4 WEIGHTS=676440592 STEP='--model XL/2 --depth 4 --batch 32 --dtype bf16 --rounds 5'
IMF_STEP='--model B/2 --depth 4 --head-depth 2 --batch 32 --dtype bf16 --rounds 5' IMF_SHAPE=''
if [ -n "$tiny" ]; then
  STEPS=20 SMALL='model.depth=2 model.hidden_size=32'
  COUNT=40 SIDE=64 WIDTH=32 SAMPLES=20 ROWS=16
  SHAPE='model.depth=2 model.hidden_size=32 model.num_heads=2 model.latent_size=8 engine.compile=false'
  SIZE=256 GIGABYTES=0.01 WEIGHTS=100000 STEP='--model B/4 --depth 1 --batch 4 --resolution 64 --rounds 1'
  IMF_STEP='--model B/2 --depth 2 --head-depth 1 --width 64 --heads 2 --rounds 1' IMF_SHAPE='model.imf_dit.head_depth=1'
fi

# ---- a line of the list, and what is predicted of it
deadline=$((SECONDS + 60 * minutes))
: > "$OUT/list.tsv"
: > "$OUT/expected.tsv"
touch "$OUT/done.tsv"
line='' # its process
finish() { # also after an interrupt; exit code 1: a line has failed
  local code=$?
  $PYTHON tools/bench/first_contact.py table "$OUT" ${tiny:+--tiny} || [ $code != 0 ] || code=1
  exit $code
}
trap finish EXIT
trap 'kill $line; exit 130' INT TERM

check() { # name, seconds, command: a program or one of the functions below
  local left=$((deadline - SECONDS)) began=$SECONDS code=0 limit
  NAME=$1
  printf '%s\t%s\n' "$NAME" "$2" >> "$OUT/list.tsv"
  if [ -n "$only" ]; then
    [[ ,$only, == *,$NAME,* ]] || return 0
    sed -i "/^$NAME\t/d" "$OUT/done.tsv"
  fi
  if [ "$left" -lt 5 ] || grep -q "^$NAME"$'\t' "$OUT/done.tsv"; then return 0; fi
  limit=$(($2 < left ? $2 : left))
  export NAME RESULT=$OUT/results/$NAME.json LOG=$OUT/logs/$NAME.out WORK=$OUT/scratch/$NAME
  printf '%(%T)T %s\n' -1 "$NAME"
  rm -rf "$RESULT" "$WORK"
  mkdir -p "$WORK"
  timeout --kill-after=10 "$limit" bash -euo pipefail -c '"$@"' - "${@:3}" \
    > "$LOG" 2> "${LOG%.out}.err" < /dev/null &
  line=$!
  wait $line || code=$?
  if [ "$code" = 124 ] && [ "$limit" -lt "$2" ]; then return 0; fi # the minutes are over: the next call repeats it
  printf '%s\t%s\t%s\n' "$NAME" $((SECONDS - began)) "$code" >> "$OUT/done.tsv"
}
expected() { printf '%s\t%s\t%s\t%s\t%s\n' "$NAME" "$@" >> "$OUT/expected.tsv"; }
expect() { expected "$1" about "$2" "$3"; }    # key of the result, value, basis: missed by more than 20 %
at_most() { expected "$1" at_most "$2" "$3"; } # missed by more than 20 % above
equals() { expected "$1" is "$2" "$3"; }

# ---- what lines consist of; WORK is the line's own folder, LOG and RESULT its files
set -a # also in the shell of each line
start() { # run, overrides: turns into the training of a small model on noise
  exec $PYTHON -m mf_dist.train configs/digits_cpu.yaml run_dir="$WORK/$1" data.path="$OUT/scratch/inputs/latents" \
    eval.reference="$OUT/scratch/inputs/statistics.npz" eval.training_samples=100 log.every_steps=5 data.num_workers=2 \
    train.total_images=$((64 * STEPS)) log.sample_every_images=$((64 * STEPS)) eval.every_images=$((64 * STEPS)) \
    $SMALL "${@:2}"
}
facts() { # run, options
  $PYTHON tools/bench/first_contact.py run "$WORK/$1" --log "$LOG" --json "$RESULT" "${@:2}"
}
train() {
  (start "$@")
  facts "$1"
}
await_half() { # run, process: until half of the steps are logged
  until grep -qs "\"step\": $((STEPS / 2))," "$WORK/$1/metrics.jsonl"; do
    kill -0 "$2"
    sleep 0.05
  done
}
differ() { # two runs: how many of weights, moments and EMAs differ in a bit
  local kinds
  $PYTHON tools/checkpoint.py diff "$WORK/$1" "$WORK/$2" > "$WORK/diff" || [ $? = 1 ]
  kinds=$(grep -c 'tensors differ' "$WORK/diff" || true)
  echo "{\"kinds_that_differ\": $kinds}" > "$RESULT"
}
inputs() {
  $PYTHON tools/bench/random_inputs.py images "$WORK/images" --count 300 --side 32
  $PYTHON tools/encode_latents.py --images "$WORK/images" --out "$WORK/latents" --resolution 32 \
    --vae mf_dist/assets/digits-vae --no-compile
  $PYTHON tools/reference_stats.py --images "$WORK/images" --features mf_dist/assets/digits-features \
    --out "$WORK/statistics.npz"
}
against_cpu() {
  (PYTHON=${PYTHON%% *} CUDA_VISIBLE_DEVICES=-1 start cpu)
  (start gpu)
  facts gpu --against "$WORK/cpu"
}
stopped() {
  local process
  (start whole)
  start stopped &
  process=$!
  await_half stopped $process
  touch "$WORK/stopped/STOP"
  wait $process
  rm "$WORK/stopped/STOP"
  (start stopped)
  differ whole stopped
}
twins() { # overrides
  (start one "$@")
  (start two "$@")
  differ one two
}
killed() {
  local process
  start killed &
  process=$!
  await_half killed $process
  kill -9 $process
  wait $process || true
  train killed
}
hang() { # of the data loader's processes
  local process loaders code=0
  start hang train.hang_seconds=10 train.total_images=64_000_000 &
  process=$!
  await_half hang $process
  loaders=$(cat /proc/$process/task/*/children)
  kill -STOP $loaders
  wait $process || code=$?
  kill -9 $loaders || true # they may have ended with it
  grep 'made no progress' "$WORK/hang/status.json"
  echo "{\"exit_code\": $code}" > "$RESULT"
}
other_local_rank() { # as the fourth rank of a node that sees its own GPU only
  export RANK=0 WORLD_SIZE=1 LOCAL_RANK=3
  train other-local-rank
}
compiled() { # as one graph, and one for the optimizer's update
  train compiled-zero1 engine.compile=true engine.precision=bf16
  grep -q '2 compiled graphs, 0 graph breaks' "$LOG"
}
engine() { # config, options: whole steps on random latents
  $PYTHON tools/bench/bench_engine.py "configs/$1.yaml" $SHAPE "${@:2}" --json "$RESULT"
}
jvp_in_tf32() {
  export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1
  engine imagenet256_xl2 train.batch_size="$ROWS" engine.jvp_precision=fp32
}
bits_of_two_starts() {
  local number
  for number in 1 2; do
    engine imagenet256_xl2 train.batch_size="$ROWS" engine.deterministic=true --steps 5 --weights
    grep -o '"weights": "[0-9a-f]*"' "$RESULT" > "$WORK/$number"
  done
  cmp "$WORK/1" "$WORK/2"
}
inputs_of_xl() {
  $PYTHON tools/bench/random_inputs.py images "$WORK/images" --count "$COUNT" --side "$SIDE"
  $PYTHON tools/bench/random_inputs.py vae "$WORK/vae" --width "$WIDTH"
  $PYTHON tools/reference_stats.py --images "$WORK/images" --features inception-random --out "$WORK/statistics.npz"
}
encoded_twice() {
  local folder shard
  for folder in latents again; do
    $PYTHON tools/encode_latents.py --images "$OUT/scratch/inputs-of-xl/images" --out "$WORK/$folder" \
      --vae "$OUT/scratch/inputs-of-xl/vae" --resolution "$SIDE" --shard-size 1000
  done
  for shard in "$WORK"/latents/*.tar; do
    cmp "$shard" "$WORK/again/${shard##*/}"
  done
}
start_xl() { # run, overrides: turns into the training of XL/2 on encoded noise, 30 steps
  exec $PYTHON -m mf_dist.train configs/imagenet256_xl2.yaml $SHAPE run_dir="$WORK/$1" model.num_classes=10 \
    data.path="$OUT/scratch/encoded-twice/latents" train.batch_size="$ROWS" train.total_images=$((30 * ROWS)) \
    log.every_steps=10 log.sample_every_images=$((30 * ROWS)) eval.every_images=$((30 * ROWS)) \
    eval.features=inception-random eval.training_samples=100 \
    eval.reference="$OUT/scratch/inputs-of-xl/statistics.npz" "${@:2}"
}
xl_run() {
  (start_xl xl train.profile_steps=5)
  facts xl
}
evaluated() { # options: one-step samples of that run
  $PYTHON tools/fid_eval.py --checkpoint "$OUT/scratch/xl-run/xl" --nfe 1 --num-samples "$SAMPLES" --metrics fid \
    --features inception-random --reference "$OUT/scratch/inputs-of-xl/statistics.npz" --out "$WORK" "$@"
  $PYTHON tools/bench/first_contact.py evaluation "$WORK" --json "$RESULT"
}
out_of_memory() {
  local code=0
  (start_xl out-of-memory train.batch_size=1024 train.total_images=1024 engine.compile=false) || code=$?
  tail -n 1 "${LOG%.out}.err" | grep '^error: out of GPU memory'
  echo "{\"exit_code\": $code}" > "$RESULT"
}
set +a

# The list. Basis of a prediction: A = products at 650 TFLOP/s and bytes at 2.7 TB/s, both assumed, of the FLOPs that
# --dry-run counts and the bytes of the compiled step (docs/gpu.md); P = 40 % of the precision's peak, assumed.
# ---- does it run, is it right
[ -z "$wheels" ] ||
  check wheels 120 "${PYTHON%% *}" -m pip install --no-index --no-deps --target "$OUT/packages" "$wheels"/*.whl
check device 60 $PYTHON tools/bench/bench_device.py --size $SIZE --gigabytes $GIGABYTES \
  --json "$OUT/results/device.json"
expect product_tflops 800 'seen on an H100'
expect copy_tb_per_s 3.0 'seen on an H100'
equals attention_bf16 CUDNN_ATTENTION "what torch 2.13 with cuDNN 9.20 chooses by its source"
check fused-attention 120 $PYTHON -m pytest -m gpu tests/models/test_fused_attention.py
check inputs 120 inputs
for stage in 1 2 3; do
  check bf16-zero$stage 60 train bf16-zero$stage engine.precision=bf16 engine.zero_stage=$stage train.profile_steps=5
  equals status finished 'simulated device'
done
check fp32-against-cpu 120 against_cpu
at_most loss_difference 1e-4 'rounding in fp32'
check stopped 120 stopped
check twins 90 twins
check twins-deterministic 90 twins engine.deterministic=true
equals kinds_that_differ 0 'no atomic addition and no tuned reduction in the step compiled for sm_90'
check killed 120 killed
equals status finished 'simulated device'
check hang 120 hang
equals exit_code 1 'the watchdog ends the process'
check other-local-rank 60 other_local_rank
equals status finished 'simulated device: each rank sees its own GPU only'
check compiled-zero1 180 compiled
equals status finished 'compiles for sm_90'
check compiled-zero3 180 train compiled-zero3 engine.compile=true engine.precision=bf16 engine.zero_stage=3
equals status finished 'compiles for sm_90'

# ---- the speed of XL/2
check xl-32 300 engine imagenet256_xl2 train.batch_size=$ROWS --steps 30 --profile "$OUT/scratch/xl-32"
at_most first_step_s 120 'compiling for sm_90 takes 148 s on one core'
expect ms 91 'A: the graph 80 (36.1 TFLOP, 46.7 GB, gaps), outside of it 11 (42 bytes per parameter)'
expect mfu 0.402 'A: 36.1 TFLOP in 91 ms'
expect 'ms_of.matrix products' 55 'A: 36.1 TFLOP'
expect ms_of.attention 5 'estimated'
expect 'ms_of.compiled kernels' 17.3 'A: 46.7 GB'
expect ms_of.optimizer 9.0 'A: 36 bytes per parameter'
at_most idle_share 0.05 'gaps of 2,141 launches 2 to 3 ms, the wait for the norm 1'
at_most waits 1 'counted on the simulated device'
at_most peak_gib 22.8 '--dry-run'
check xl-64 150 engine imagenet256_xl2 train.batch_size=$((2 * ROWS))
expect ms 170 'A: twice the graph of 32 rows'
at_most peak_gib 31.6 '--dry-run'
check xl-jvp-fp32 150 engine imagenet256_xl2 train.batch_size=$ROWS engine.jvp_precision=fp32
expect ms 161 '3.8 TFLOP at 50 TFLOP/s: 70 ms more'
check xl-jvp-tf32 150 jvp_in_tf32
expect ms 101 '10 ms more than in bf16'
check b4-32 120 engine imagenet256_b4 train.batch_size=$ROWS --profile "$OUT/scratch/b4-32"
expect ms 9.0 'about 1,000 launches 7, outside of the graph 2.0'
check b4-128 120 engine imagenet256_b4 train.batch_size=$((4 * ROWS))
expect ms 18.0 'four times the 4 ms of work of 32 rows, outside of the graph 2.0'
check imf-xl-32 300 engine imagenet256_imf_xl2 $IMF_SHAPE train.batch_size=$ROWS \
  train.micro_batch=$ROWS --profile "$OUT/scratch/imf-xl-32"
expect ms 169 'P: 66.9 TFLOP'
check imf-b2-128 200 engine imagenet256_imf_b2 $IMF_SHAPE train.batch_size=$((4 * ROWS))
expect ms 121 'P: 47.7 TFLOP'
check xl-deterministic 240 bits_of_two_starts # its price is not predicted

# ---- what decides settings
check attention 150 $PYTHON tools/bench/bench_attention.py --json "$OUT/results/attention.json"
at_most '1024 tokens.ratio' 1.0 'assumed: FUSED_FROM_TOKENS in mf_dist/models/attention.py'
check step-ratios 240 $PYTHON tools/bench/bench_step.py $STEP --variants plain,ours,blocks,authors \
  --json "$OUT/results/step-ratios.json"
expect 'ratios.ours unguided' 1.17 'FLOPs; 1.20 on a CPU'
expect 'ratios.ours guided' 1.58 'FLOPs; 1.58 on a CPU'
check target-ratios 240 $PYTHON tools/bench/bench_step.py $STEP --guidance guided \
  --variants plain,ours,boundary,discrete,trajectory --json "$OUT/results/target-ratios.json"
expect 'ratios.boundary guided' 1.58 'FLOPs: as MeanFlow'
expect 'ratios.discrete guided' 1.50 'FLOPs: 4.5 forwards of 3; 1.43 on a CPU'
expect 'ratios.trajectory guided' 1.42 'FLOPs: 4.25 forwards of 3; 1.39 on a CPU'
check imf-ratio 240 $PYTHON tools/bench/bench_imf.py $IMF_STEP --json "$OUT/results/imf-ratio.json"
expect ours.of_authors 0.83 'FLOPs: 7.5 forwards of 9 without a smaller trunk'
check optimizer 60 $PYTHON tools/bench/bench_optimizer.py --parameters $WEIGHTS --rounds 7 \
  --json "$OUT/results/optimizer.json"
expect 'ours, compiled' 0.009 'A: 36 bytes for each of 676 million parameters'
check xl-512 200 engine imagenet512_xl2 train.batch_size=$((ROWS / 4)) --profile "$OUT/scratch/xl-512"
expect ms 104 'A: 39.9 TFLOP 61, attention 10, kernels and gaps as for 32 rows at 256 px 21, outside of the graph 12'
at_most peak_gib 22.8 '--dry-run'

# ---- around training
check inputs-of-xl 120 inputs_of_xl
check encode-speed 200 $PYTHON tools/bench/bench_encode.py --vae "$OUT/scratch/inputs-of-xl/vae" --resolution $SIDE \
  --batch $ROWS --forms compiled --rounds 3 --json "$OUT/results/encode-speed.json"
expect 'fp32, compiled' 99 'P: 270.6 GFLOP per image, 67 TFLOP/s'
expect 'tf32, compiled' 730 'P: 494 TFLOP/s'
expect 'bf16, compiled' 1460 'P: 989 TFLOP/s'
check encoded-twice 150 encoded_twice
check xl-run 300 xl_run
expect seconds_per_step 0.091 'as xl-32'
at_most data_wait_share 0.02 'the loader makes 9,700 samples/s in one process'
at_most save_wait_s 5 '10.8 GB through pageable memory'
at_most idle_share 0.05 'as xl-32'
check evaluated 150 evaluated --precision tf32
expect seconds.decode 3.1 'P: 620 GFLOP per image, 494 TFLOP/s'
expect seconds.sample 1.2 'P: 237 GFLOP per image'
check evaluated-bf16 150 evaluated --precision bf16
check evaluated-compiled 200 evaluated --precision tf32 --compile
[ -n "$tiny" ] || check out-of-memory 120 out_of_memory
[ -n "$tiny" ] || equals exit_code 2 'one line that says what to try'

for name in ${only//,/ }; do
  if ! grep -q "^$name"$'\t' "$OUT/list.tsv"; then
    echo "error: --only $name: no such line; $OUT/list.tsv has their names" >&2
    exit 2
  fi
done
