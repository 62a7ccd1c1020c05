"""Tells a job script whether to start its run and what to do after a start has ended: one line, verdict and reason.

    python -m mf_dist.jobs.attempt begin --ranks 16 configs/imagenet256_xl2.yaml        # go RUN_DIR
    python -m mf_dist.jobs.attempt end --reason "srun ended with code 1" configs/imagenet256_xl2.yaml
    python -m mf_dist.jobs.attempt begin --tool runs/jobs/17        # the same for a tool and its status folder

begin: go | finished | stopped | refused. end: resume (stopped near its time limit; start again) | retry (failed; start
again) | finished | stopped (by a person) | failed (permanently) | refused. The verdict follows from status.json alone,
since exit codes do not survive torchrun and srun. Whether the data are there is checked by the preflight, node by node.
Does not import torch.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from mf_dist.config.schema import Config, load_config
from mf_dist.data.shards import read_manifest
from mf_dist.fault_tolerance.status import Status
from mf_dist.runtime.errors import CrashLoopError, UnrecordedError, UserError, command_line
from mf_dist.runtime.output import one_line
from mf_dist.runtime.paths import expanded_path
from mf_dist.train import check

LOCK_SECONDS = 120.0
"""How long the lock of an earlier start may outlive it: a network disk releases those of a dead node late."""


class Verdict(NamedTuple):
    word: str
    reason: str


def begin(config: Config, ranks: int, patience: float = LOCK_SECONDS) -> Verdict:
    """Whether to train; if so, the run's status is `starting` from here on. `patience`: seconds to wait for another
    process to release the run. Raises UserError if the run cannot train."""
    status, stop_file = Status(Path(config.run_dir)), Path(config.run_dir) / "STOP"
    entry = status.read()
    seen = entry.get("samples_seen")
    if entry.get("status") == "finished" and isinstance(seen, int) and not config.steps_left(seen):
        return Verdict("finished", f"{config.run_dir} has finished, at step {entry['step']}; nothing to do")
    if stop_file.exists():
        return Verdict("stopped", f"{stop_file} exists; remove it to go on")
    _lock_run(status, patience)
    try:
        if _has_dataset(config):  # otherwise the preflight finds the nodes that lack it
            check(config, ranks, needs_data=True)
        status.mark_starting()
    except UserError as error:
        if status.read().get("status") != "crash_loop":
            status.refuse(str(error), has_begun=False)
        raise
    finally:
        status.unlock_run()
    return Verdict("go", config.run_dir)


def _has_dataset(config: Config) -> bool:
    try:
        return read_manifest(config.data.path) is not None
    except OSError:
        return False


def _lock_run(status: Status, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            return status.lock_run()
        except UnrecordedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(min(2.0, patience))


def end(
    config: Config, reason: str, stop_signal: str = "", refused: bool = False, patience: float = LOCK_SECONDS
) -> Verdict:
    """What follows the start that has ended; `refused`: by a preflight that found a mistake in the call. Raises
    UserError if another process holds the run by now, which will record its own end."""
    status = Status(Path(config.run_dir))
    _lock_run(status, patience)
    try:
        if refused:
            status.refuse(reason, has_begun=False)
        return judge(status.conclude(reason, stop_signal))
    finally:
        status.unlock_run()


def judge(entry: dict[str, Any]) -> Verdict:
    """The verdict on an entry of status.json. A run stopped by SIGTERM was cancelled, or SLURM itself requeues it."""
    status, text = entry.get("status", "failed"), str(entry.get("reason", "status.json cannot be read"))
    at_step = f"at step {entry.get('step', 0)}" + (f": {text}" if text else "")
    if status == "finished":
        return Verdict("finished", at_step)
    if status == "stopped":
        return Verdict("resume" if entry.get("stopped_by") in ("TIME", "SIGUSR1") else "stopped", f"stopped {at_step}")
    if entry.get("refused"):
        return Verdict("refused", text)
    if status == "failed" and entry:
        starts = entry.get("starts_without_progress", 0)
        return Verdict("retry", f"failed {at_step} (start {starts} since the last checkpoint)")
    return Verdict("failed", f"{status} {at_step}")


def begin_tool(folder: Path) -> Verdict:
    """Marks the tool as starting. Raises UserError for a crash loop, or if status.json cannot be written."""
    status = Status(folder)
    status.mark_starting()
    if status.read().get("status") != "starting":
        raise UserError(f"cannot write {status.path}; make room there, or set JOBS_DIR to another folder")
    return Verdict("go", str(folder))


def answer(args: argparse.Namespace) -> Verdict:
    """The verdict for parsed arguments. Raises UserError and OSError."""
    if args.tool:
        if args.what == "begin":
            return begin_tool(args.tool)
        return judge(Status(args.tool).conclude(args.reason, args.stop_signal))
    config = load_config(args.config, args.overrides)
    if args.what == "begin":
        return begin(config, args.ranks)
    return end(config, args.reason, args.stop_signal, args.refused)


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mf_dist.jobs.attempt",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("what", choices=("begin", "end"))
    parser.add_argument("config", nargs="?", help="YAML file, as for mf_dist.train")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--tool", type=expanded_path, metavar="FOLDER", help="folder of a tool's status.json, instead of a config"
    )
    parser.add_argument("--allow-config-change", action="store_true", help="as for mf_dist.train; has no effect here")
    parser.add_argument("--ranks", type=int, default=1, help="processes that will train (default 1)")
    parser.add_argument("--reason", default="", help="end: what the launcher saw; used if the run recorded no reason")
    parser.add_argument(
        "--stop-signal", choices=("", "SIGUSR1", "SIGTERM"), default="", help="end: signal to stop, if any"
    )
    parser.add_argument("--refused", action="store_true", help="end: --reason is a mistake in the call")
    args = parser.parse_intermixed_args()
    if (args.config is None) == (args.tool is None):
        parser.error("give a config or --tool FOLDER")
    try:
        verdict = answer(args)
    except UserError as error:
        verdict = Verdict("failed" if isinstance(error, CrashLoopError) else "refused", str(error))
    except OSError as error:  # an unavailable disk, which is no verdict on the run
        verdict = Verdict("failed", f"{error.filename or args.config or args.tool}: {error.strerror or error}")
    reason = verdict.reason if verdict.word == "go" else one_line(" ".join(verdict.reason.split()))
    # as it is, not escaped for a terminal: job scripts read the run's folder from it
    sys.stdout.buffer.write(f"{verdict.word} {reason}\n".encode(errors="surrogateescape"))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
