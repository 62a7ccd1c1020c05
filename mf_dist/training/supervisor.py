"""Nothing is lost: what happens between steps to save the run, to notice requests to stop, and to say why it ended.

All methods are called by every rank, at the same steps.
"""

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from mf_dist.checkpoint.writer import CheckpointWriter, Retention, WriterRank
from mf_dist.config.schema import Config
from mf_dist.fault_tolerance.status import Status
from mf_dist.fault_tolerance.stop import MARGIN, Stop, StopAgreement
from mf_dist.fault_tolerance.watchdog import Watchdog, process_group_timeout
from mf_dist.runtime.distributed import Ranks, broadcast_int, local_peers
from mf_dist.runtime.errors import UserError
from mf_dist.training.engine import Engine
from mf_dist.training.resume import measured_ema_decays

MAX_FAILED_SAVES = 3
"""Saves in a row that may fail before the run stops: a disk may come back, but training for nothing must end."""


class Supervisor:
    def __init__(self, config: Config, ranks: Ranks, status: Status, say: Callable[[str], None]) -> None:
        """From here on SIGTERM and SIGUSR1 wait for the next border. `say` is heard on rank 0."""
        self.ranks, self.status, self._say = ranks, status, say
        self.step = 0
        """Where the run stands."""
        self.saved_step = 0
        """The step of the last save begun or found; -1 after a save that failed."""
        self.committed_step = 0
        """The step of the last checkpoint that is whole."""
        timeout = timedelta(seconds=process_group_timeout(config.train.hang_seconds))
        self.stop_agreement = StopAgreement(Path(config.run_dir), ranks.is_rank_zero, config.train.max_hours, timeout)
        self.watchdog = Watchdog(config.train.hang_seconds, ranks.rank, local_peers(ranks.device), self.fail)
        keep, self.root = config.checkpoint, Path(config.run_dir) / "checkpoints"
        metrics = Path(config.run_dir) / "eval/metrics.json"
        ema = str(measured_ema_decays(config)[0])
        retention = Retention(keep.keep, keep.keep_every_images, keep.keep_best, metrics, ema)
        self.saver = CheckpointWriter(self.root, WriterRank(ranks.rank, ranks.world_size), retention)
        self._is_saving, self._began, self._failures, self._problem = False, 0.0, 0, ""

    def begin_save(self, engine: Engine, state: dict[str, Any]) -> None:
        """Gathers step self.step and starts writing it in the background, after the save before has ended."""
        if self.step == self.saved_step:
            return
        with self.watchdog.extended_limit():
            start = time.perf_counter()
            self.finish_save()
            problem = self.saver.prepare(self.step) if self.ranks.is_rank_zero else None
            if broadcast_int(int(problem is not None), self.ranks.device):
                self._note_failure(problem)
                return
            self._began = time.perf_counter()
            self.saver.begin(engine.state(), list(engine.kinds), state)
            now = time.perf_counter()
            before = f" after {self._began - start:.2f} s for the save before" if self._began - start > 0.1 else ""
            self._say(f"saving step {self.step}: training waited {now - self._began:.2f} s for it{before}")
            self.saved_step, self._is_saving = self.step, True

    def agree_at_step_boundary(self) -> Stop:
        """The border after a step: hears of saves that ended and of requests to stop."""
        is_running = self.saver.is_running  # asked first: a save that ends after this has set its outcome by then
        has_failed = self._is_saving and not is_running and self.saver.has_failed
        stop, has_failed, is_running = self.stop_agreement.agree(has_failed, is_running)
        if has_failed:
            self.saver.cancel()
            self.saver.wait()
            self._note_failure(self.saver.error)
        elif self._is_saving and not is_running:
            self._is_saving, self._failures, self.committed_step = False, 0, self.saved_step
            if self.saver.committed:
                seconds = time.perf_counter() - self._began
                self.stop_agreement.margin = MARGIN + 2 * seconds
                self.status.checkpoint_committed(self.saved_step)
                self._say(f"saved {self.saver.committed} in {seconds:.1f} s")
        return stop

    def finish_save(self) -> None:
        """Waits for the save in the background. No beat here: a writer that hangs must be noticed."""
        while self._is_saving:
            self.agree_at_step_boundary()
            time.sleep(0.02)

    def _note_failure(self, problem: str | None) -> None:
        """Training goes on: the checkpoint before is untouched, and the next save may succeed."""
        self._is_saving, self.saved_step = False, -1
        self._failures += 1
        self._problem = problem or "another rank failed to write"
        if problem:
            self.status.note(self.step, problem)
            print(f"warning: {problem}; earlier checkpoints are untouched", file=sys.stderr, flush=True)
        if self._failures >= MAX_FAILED_SAVES:
            raise UserError(f"{self._failures} saves in a row failed; the last: {self._problem}")

    def end(self, engine: Engine, state: dict[str, Any], stop: Stop, images: int) -> None:
        """The last save, tried as often as saves may fail in a row, and why the run ended."""
        while self.committed_step != self.step:
            self.begin_save(engine, state)
            with self.watchdog.extended_limit():
                self.finish_save()
        if self.ranks.is_rank_zero:
            if self.root.is_dir():
                self.root.touch()  # the run that tools/fid_eval.py takes is the one that ended last
            where, why = f"step {self.step} ({images} images)", stop.words(self.stop_agreement.stop_file)
            who = {"stopped_by": stop.name} if stop else {}
            self.status.end("stopped" if stop else "finished", self.step, why, **who)
            self._say(f"stopped at {where}: {why}" if stop else f"finished at {where}")

    def fail(self, reason: str) -> None:
        """Records the failure, after a save that is being written had a minute to end."""
        self.status.end("failed", self.step, reason)
        self.saver.wait(60)

    def close(self) -> None:
        self.watchdog.stop()
        self.stop_agreement.close()
