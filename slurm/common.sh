# shellcheck shell=bash
# What the job scripts share. They are submitted from the checkout, source this file, and call train or task.
set -uo pipefail

say() { printf '%(%F %T)T %s\n' -1 "$*"; }
leave() { # exit code, reason: writes the last line of the log
  [ -z "${listener:-}" ] || kill "$listener" 2> /dev/null
  say "$2"
  exit "$1"
}

# ---- settings of the site, and this job's nodes
CONTAINER=()
site=${SITE_ENV:-slurm/site.env}
if [ -f "$site" ]; then
  set +u # modules and conda read variables that are not set
  # shellcheck source=/dev/null
  source "$site"
  set -u
fi
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
NPROC_PER_NODE=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
PREFLIGHT_SECONDS=${PREFLIGHT_SECONDS:-300}
nodes=$SLURM_JOB_NUM_NODES
cpus=$(sed 's/(x[0-9]*)//g; s/,/\n/g' <<< "$SLURM_JOB_CPUS_PER_NODE" | sort -n | head -n 1) # of the smallest node
mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # SLURM_JOB_ID may mean the whole array
job=${job:-$SLURM_JOB_ID}
start=$job.${SLURM_RESTART_COUNT:-0}
ignoring_signals=(bash -c 'trap "" USR1 TERM; exec "$@"' -) # runs a program with the job's signals ignored
here=()                                                     # prefix that runs a program in the container on this node
[ ${#CONTAINER[@]} = 0 ] || here=(srun --nodes=1 --ntasks=1 --overlap "${CONTAINER[@]}")

# ---- environment of the ranks
export SLURM_EXPORT_ENV=ALL                  # srun passes all of this on, also after sbatch --export=NONE
export PYTHONUNBUFFERED=1                    # the last output of a killed rank is in its log
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # else every rank starts one thread per core
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}        # reasons of failures only
# torch.compile starts up to 32 processes for every rank
export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-$((cpus / (NPROC_PER_NODE > 0 ? NPROC_PER_NODE : 8) + 1))}

# ---- signals: recorded here, passed on to the ranks, which save at their next step
stop_signal='' # the signal that told this job to stop
repeat_signal() { # repeats a signal to the steps while this script lives, since a starting program may miss it
  while kill -0 $$ 2> /dev/null; do
    # scancel itself retries while a job changes state, and would hit the next start
    timeout 4 scancel --quiet --signal="$1" "$job"
    sleep 5
  done
}
on_usr1() {
  [ -z "$stop_signal" ] || return 0
  say "SIGUSR1: the time limit is near; asking for a save"
  stop_signal=SIGUSR1
  repeat_signal USR1 &
}
on_term() {
  [ "$stop_signal" != SIGTERM ] || return 0
  say "SIGTERM: cancelled, preempted, or a node is lost"
  stop_signal=SIGTERM
  repeat_signal TERM &
}
trap on_usr1 USR1
trap on_term TERM
# scancel --signal=TERM signals only the steps; this step, which lasts as long as the script, passes it on
# shellcheck disable=SC2016  # its $0 is this script's process id
srun --overlap --nodes=1 --ntasks=1 --cpus-per-task=1 --gres=none --mem=0 --nodelist="$SLURMD_NODENAME" --input=none \
  bash -c 'trap "" USR1; trap "kill -TERM $0" TERM; while kill -0 "$0"; do sleep 1 & wait; done' $$ &> /dev/null &
listener=$!

# ---- steps
run_module() { "${here[@]}" "${ignoring_signals[@]}" "$PYTHON" -m "$@"; } # runs a module of mf_dist on this node

within=()                   # prefix that ends a step that takes too long
patience=$PREFLIGHT_SECONDS # seconds to wait until all nodes have joined

step() { # an srun of one task per node: in the background, since in the foreground a trap would wait for its end
  local pid
  # since SLURM 22.05 srun does not inherit the number of CPUs per task
  "${within[@]}" srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="$cpus" \
    --nodelist="$(IFS=,; printf %s "${names[*]}")" "${CONTAINER[@]}" "$@" &
  pid=$!
  while kill -0 "$pid" 2> /dev/null; do # a signal ends the wait, not srun
    wait "$pid"
  done
  wait "$pid" # returns its exit code, which bash has kept
}

on_ranks() { # log folder, arguments of torchrun: NPROC_PER_NODE processes on each node
  # The agent ignores the signals meant for the ranks, which have handlers for both. When one rank fails, it still ends
  # the others, after a short timeout, since they only wait for it. SLURM restarts the job, not torchrun.
  # shellcheck disable=SC2016  # SLURMD_NODENAME is expanded on each node
  step --kill-on-bad-exit=1 --wait=60 \
    bash -c 'trap "" USR1 TERM; exec "$0" -m torch.distributed.run --local-addr "$SLURMD_NODENAME" \
      --log-dir "$1/$SLURMD_NODENAME" "${@:2}"' \
    "$PYTHON" "$1" --nnodes "$nodes" --nproc-per-node "$NPROC_PER_NODE" --max-restarts 0 \
    --rdzv-backend c10d --rdzv-id "$start" --rdzv-endpoint "${names[0]}:$((20000 + SLURM_JOB_ID % 10000))" \
    --rdzv-conf join_timeout="$patience" --shutdown-timeout 10 --signals-to-handle SIGINT,SIGHUP,SIGQUIT \
    --redirects 3 --tee 3 --local-ranks-filter 0 "${@:2}"
}

task() { # a tool and its arguments: one process on one node; the same call resumes where it stopped
  local verdict='' reason='' code=0
  export MF_DIST_STATUS=${JOBS_DIR:-runs/jobs}/$job # status.json of the tool, for mf_dist.jobs.attempt
  [ "${SLURM_RESTART_COUNT:-0}" != 0 ] || rm -f "$MF_DIST_STATUS/status.json" # left by an older job with the same id
  say "job $job start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST: $*"
  read -r verdict reason < <(run_module mf_dist.jobs.attempt begin --tool "$MF_DIST_STATUS")
  if [ "$verdict" = go ]; then
    step "$PYTHON" "$@" || code=$?
    reason="srun ended with code $code before the tool said why"
    read -r verdict reason < <(run_module mf_dist.jobs.attempt end --tool "$MF_DIST_STATUS" --reason "$reason" \
      --stop-signal "$stop_signal")
  fi
  conclude ''
}

requeue() { # nodes to exclude, or an empty string. SLURM then ends this script
  local before
  [ "$stop_signal" != SIGTERM ] || return # cancelled, or already requeued by SLURM
  trap '' TERM
  before=$(scontrol show job "$job" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')
  [ "$before" != '(null)' ] || before=''
  scontrol requeue "$job" || return
  # only a pending job accepts another list
  [ -z "$1" ] || scontrol update JobId="$job" ExcNodeList="$1${before:+,$before}" || say "cannot leave out $1"
}

conclude() { # nodes to exclude, or an empty string: acts on verdict and reason
  case $verdict in
    finished) leave 0 "finished $reason" ;;
    resume | retry)
      requeue "$1" && leave 0 "requeued${1:+ without $1}: $reason"
      [ "$verdict" = retry ] || leave 3 "$reason"
      leave 1 "$reason" ;;
    stopped) leave 3 "$reason" ;;
    refused) leave 2 "refused: $reason" ;;
    *) leave 1 "failed: ${reason:-$PYTHON does not run mf_dist; see PYTHON in $site}" ;;
  esac
}

# ---- training
preflight() { # config, overrides: sets verdict (good, bad, failed, refused), bad (nodes) and reason
  local into=$run_dir/preflight/$start why='' within=(timeout --kill-after=30 "$PREFLIGHT_SECONDS")
  local patience=$((PREFLIGHT_SECONDS / 3)) # shorter than the step, so that ranks can report what they wait for
  # one node that fails early must not end the others, which would then have no result
  step --kill-on-bad-exit=0 --wait=0 "${ignoring_signals[@]}" "$PYTHON" -m mf_dist.jobs.preflight node \
    --into "$into" --gpus "${GPUS_PER_NODE:-$NPROC_PER_NODE}" --ranks "$ranks" "$@" || why=$(ended $?)
  judge
  [ "$verdict" = good ] || return
  check_network "$into" || why="the all-reduce over all nodes failed, $(ended $?)"
  judge
  [ "$verdict" = failed ] && [ -z "$stop_signal" ] || return
  if [ "$nodes" = 2 ]; then
    reason="$reason; which of two nodes is to blame cannot be told"
  elif [ "$nodes" -gt 2 ]; then
    say "$reason; testing pairs of nodes"
    pairs
    judge
  fi
}
ended() { # exit code of a step: what happened to it
  if [ "$1" = 124 ]; then # of timeout
    echo "not done within PREFLIGHT_SECONDS=$PREFLIGHT_SECONDS"
  else
    echo "srun ended with code $1"
  fi
}
check_network() { # folder
  on_ranks "$1/logs" -m mf_dist.jobs.preflight network --into "$1" --patience "$patience"
}
pairs() { # neighbours in the ring of nodes, no node in two pairs at once
  local within=(timeout --kill-after=30 "$patience") patience=$((patience / 2)) round i pids
  for round in 0 1 2; do # even ones, odd ones, and the last of an odd number
    pids=()
    for ((i = 0; i < nodes; i++)); do
      if [ $((nodes % 2 && i == nodes - 1 ? 2 : i % 2)) = "$round" ]; then
        pair "${names[i]}" "${names[(i + 1) % nodes]}" &
        pids+=($!)
      fi
    done
    [ ${#pids[@]} = 0 ] || wait "${pids[@]}"
    [ -z "$stop_signal" ] || return # a signal ended the wait
  done
}
pair() { # two nodes
  local nodes=2 names=("$@") start=$start.$1+$2
  check_network "$into/pairs/$1+$2" &> /dev/null # its ranks' results are in the folder
}
judge() { # uses preflight's into and why
  read -r verdict bad reason < <(run_module mf_dist.jobs.preflight judge --into "$into" --reason "$why" "${names[@]}")
}

count_ranks() { # sets NPROC_PER_NODE and ranks
  if [ "$NPROC_PER_NODE" = 0 ]; then # a site may not track GPUs
    NPROC_PER_NODE=$("${here[@]}" "$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
    [ "${NPROC_PER_NODE:-0}" != 0 ] ||
      leave 2 "refused: SLURM names no GPUs and $PYTHON sees none: submit with --gres=gpu:N, or set NPROC_PER_NODE"
    say "SLURM names no GPUs; one process for each of the $NPROC_PER_NODE visible here"
  fi
  ranks=$((nodes * NPROC_PER_NODE))
}

train() { # config, overrides: one attempt, from the check whether there is anything to do to the reason why it ended
  local verdict='' reason='' bad='' run_dir code=0 refused=() ranks
  if [ -n "${LOCAL_SCRATCH:-}" ] && [[ " $*" != *" data.stage"* ]]; then # an explicit setting takes precedence
    set -- "$1" data.stage=dir data.stage_dir="$LOCAL_SCRATCH" "${@:2}"
  fi
  count_ranks
  say "job $job start ${SLURM_RESTART_COUNT:-0}: $nodes nodes x $NPROC_PER_NODE ranks on $SLURM_JOB_NODELIST: $*"
  IFS= read -r reason < <(run_module mf_dist.jobs.attempt begin --ranks "$ranks" "$@") # blanks in a path are kept
  verdict=${reason%% *} reason=${reason#* }
  run_dir=$reason
  if [ "$verdict" = go ]; then
    preflight "$@"
    if [ "$verdict" = good ] && [ -z "$stop_signal" ]; then
      say "preflight is good; training in $run_dir"
      on_ranks "$run_dir/logs/$start" -m mf_dist.train "$@" || code=$?
      reason="srun ended with code $code before the run said why"
    else
      [ "$verdict" != refused ] || refused=(--refused)
      reason="preflight: ${reason:-it does not run}"
    fi
    [ "$bad" != - ] || bad=''
    read -r verdict reason < <(run_module mf_dist.jobs.attempt end "${refused[@]}" --reason "$reason" \
      --stop-signal "$stop_signal" "$@")
  fi
  conclude "$bad"
}
