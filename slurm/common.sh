# shellcheck shell=bash
# What the job scripts share. They are submitted from the checkout, source this file, and call train or task.
set -uo pipefail

say() { printf '%(%F %T)T %s\n' -1 "$*"; }
leave() { say "$2"; exit "$1"; } # code, why: the last line of the log

# ---- the site, and where we are in it
CONTAINER=()
site=${SITE_ENV:-slurm/site.env}
if [ -f "$site" ]; then
  set +u # modules and conda read variables that are not set
  # shellcheck source=/dev/null
  source "$site"
  set -u
fi
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
NPROC_PER_NODE=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
PREFLIGHT_SECONDS=${PREFLIGHT_SECONDS:-300}
nodes=$SLURM_JOB_NUM_NODES
ranks=$((nodes * NPROC_PER_NODE))
mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # SLURM_JOB_ID may mean the whole array
job=${job:-$SLURM_JOB_ID}
start=$job.${SLURM_RESTART_COUNT:-0}
deaf=(bash -c 'trap "" USR1 TERM; exec "$@"' -) # runs a program that signals to all of a job must not end
here=()                                         # what puts a program on this node
[ ${#CONTAINER[@]} = 0 ] || here=(srun --nodes=1 --ntasks=1 --overlap "${CONTAINER[@]}")

# ---- what ranks inherit
export SLURM_EXPORT_ENV=ALL                  # srun passes all of this on, also after sbatch --export=NONE
export PYTHONUNBUFFERED=1                    # the last words of a killed rank are in its log
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # else every rank starts a thread a core
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}        # why it failed, and nothing else

# ---- signals: noted here, passed on to the ranks, which save at their next step
asked='' # which one told this job to stop
ask_again() { # as long as this script lives, since a program that just starts is deaf; to the steps, not to this script
  while kill -0 $$ 2> /dev/null; do
    scancel --quiet --signal=USR1 "$job"
    sleep 5
  done
}
on_usr1() {
  say "SIGUSR1: the time limit is near; asking for a save"
  asked=SIGUSR1
  ask_again &
}
on_term() {
  say "SIGTERM: cancelled, preempted, or a node is lost" # SLURM has told the ranks
  asked=SIGTERM
}
trap on_usr1 USR1
trap on_term TERM

# ---- steps
ours() { "${here[@]}" "${deaf[@]}" "$PYTHON" -m "$@"; } # a module of mf_dist on this node

step() { # an srun of one task a node: in the background, for in the foreground a trap would wait for its end
  local code pid
  # since SLURM 22.05 srun does not take over how many CPUs a task has
  srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \
    "${CONTAINER[@]}" "$@" &
  pid=$!
  wait "$pid"
  code=$?
  while kill -0 "$pid" 2> /dev/null; do # a signal ended the wait, not srun
    wait "$pid"
    code=$?
  done
  return "$code"
}

on_ranks() { # folder of logs, arguments of torchrun: NPROC_PER_NODE processes on each node
  # The agent must not die of signals that are for the ranks, which hear both by handlers of their own. It still ends
  # the others when one rank fails, and soon, since they only wait for it. SLURM starts again, not torchrun.
  # shellcheck disable=SC2016  # SLURMD_NODENAME is each node's own
  step --kill-on-bad-exit=1 --wait=60 \
    bash -c 'trap "" USR1 TERM; exec "$0" -m torch.distributed.run --log-dir "$1/$SLURMD_NODENAME" "${@:2}"' \
    "$PYTHON" "$1" --nnodes "$nodes" --nproc-per-node "$NPROC_PER_NODE" --max-restarts 0 \
    --rdzv-backend c10d --rdzv-id "$start" --rdzv-endpoint "${names[0]}:$((20000 + SLURM_JOB_ID % 10000))" \
    --rdzv-conf join_timeout="$PREFLIGHT_SECONDS" --shutdown-timeout 10 --signals-to-handle SIGINT,SIGHUP,SIGQUIT \
    --redirects 3 --tee 3 --local-ranks-filter 0 "${@:2}"
}

task() { # a tool and its arguments, in one process on one node; the same call goes on where it stopped
  local code=0 restarts=${SLURM_RESTART_COUNT:-0}
  say "job $job start $restarts on $SLURM_JOB_NODELIST: $*"
  step "$PYTHON" "$@" || code=$?
  [ $code != 0 ] || leave 0 "finished"
  [ $code != 2 ] || leave 2 "refused, as said above"
  if [ "$asked" = SIGUSR1 ] || [ "$restarts" -lt 3 ]; then
    requeue '' && leave 0 "requeued: ended with code $code${asked:+ after $asked}"
  fi
  leave 1 "failed: ended with code $code${asked:+ after $asked}, restarts: $restarts"
}

# ---- training
preflight() { # config, overrides: sets verdict (good, bad, failed), bad (nodes) and reason
  local into=$run_dir/preflight/$start why=''
  # one node that fails early must not end the others, which would then seem silent
  step --kill-on-bad-exit=0 --wait=0 "${deaf[@]}" timeout --signal=KILL "$PREFLIGHT_SECONDS" "$PYTHON" -m mf_dist.preflight node \
    --into "$into" --gpus "${GPUS_PER_NODE:-$NPROC_PER_NODE}" --ranks "$ranks" "$@" ||
    why="srun ended with code $?"
  judge
  [ "$verdict" = good ] || return
  on_ranks "$into/logs" -m mf_dist.preflight wires --into "$into" ||
    why="the all-reduce over all nodes failed, srun's code $?"
  judge
}
judge() { # uses preflight's into and why
  read -r verdict bad reason < <(ours mf_dist.preflight judge --into "$into" --reason "$why" "${names[@]}")
}

requeue() { # nodes to leave out, or nothing. SLURM then ends this script
  local before
  [ "$asked" != SIGTERM ] || return # cancelled, or SLURM has done it
  trap '' TERM
  before=$(scontrol show job "$job" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')
  [ "$before" != '(null)' ] || before=''
  scontrol requeue "$job" || return
  # only a job that waits takes another list
  [ -z "$1" ] || scontrol update JobId="$job" ExcNodeList="$1${before:+,$before}" || say "cannot leave out $1"
}

train() { # config, overrides: one attempt, from the check whether there is anything to do to the word why it ended
  local verdict='' reason='' bad='' run_dir code=0 staging=()
  [ -z "${LOCAL_SCRATCH:-}" ] || staging=(data.stage=dir data.stage_dir="$LOCAL_SCRATCH")
  say "job $job start ${SLURM_RESTART_COUNT:-0}: $nodes nodes x $NPROC_PER_NODE ranks on $SLURM_JOB_NODELIST: $*"
  read -r verdict reason < <(ours mf_dist.attempt begin --ranks "$ranks" "$@")
  run_dir=$reason
  if [ "$verdict" = go ]; then
    preflight "$@"
    if [ "$verdict" = good ] && [ -z "$asked" ]; then
      say "preflight is good; training in $run_dir"
      on_ranks "$run_dir/logs/$start" -m mf_dist.train "$1" "${staging[@]}" "${@:2}" || code=$?
      reason="srun ended with code $code before the run said why"
    else
      reason="preflight: ${reason:-it does not run}"
    fi
    [ "$bad" != - ] || bad=''
    read -r verdict reason < <(ours mf_dist.attempt end --reason "$reason" --asked "$asked" "$@")
  fi
  case $verdict in
    finished) leave 0 "finished $reason" ;;
    resume | retry)
      requeue "$bad" && leave 0 "requeued${bad:+ without $bad}: $reason"
      [ "$verdict" = retry ] || leave 3 "$reason"
      leave 1 "$reason" ;;
    stopped) leave 3 "$reason" ;;
    refused) leave 2 "refused: $reason" ;;
    *) leave 1 "failed: ${reason:-$PYTHON does not run mf_dist; see PYTHON in $site}" ;;
  esac
}
