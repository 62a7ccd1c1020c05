"""Saves the run, handles requests to stop and failures, and records why the run ended.

Except `fail`, every rank calls each method at the same step.
"""

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
from mf_dist.runtime.distributed import Ranks, broadcast_int, local_peers, wait_for_all
from mf_dist.runtime.errors import UserError
from mf_dist.runtime.figures import three_digits
from mf_dist.runtime.output import complain
from mf_dist.training.engine import Engine
from mf_dist.training.resume import measured_ema_decays

MAX_FAILED_SAVES = 3
"""Consecutive failed saves at which the run stops: a disk may recover, but a run that cannot save must end."""


class Supervisor:
    def __init__(self, config: Config, ranks: Ranks, status: Status, info: Callable[[str], None]) -> None:
        """From now on SIGTERM and SIGUSR1 take effect at the next step boundary. `info` logs a line on rank 0."""
        self.ranks, self.status, self._info = ranks, status, info
        self.step = 0
        """The current step, set by the trainer."""
        self.saved_step = 0
        """Step of the last save begun, or of the checkpoint resumed from; -1 after a failed save."""
        self.committed_step = 0
        """Step of the last committed checkpoint."""
        self.committed_images = self._saved_images = 0
        """Images seen by the last committed checkpoint, and by the last save begun."""
        timeout = timedelta(seconds=process_group_timeout(config.train.hang_seconds))
        self.stop_agreement = StopAgreement(Path(config.run_dir), ranks.is_rank_zero, config.train.max_hours, timeout)
        self.watchdog = Watchdog(config.train.hang_seconds, ranks.rank, local_peers(ranks.device), self.fail)
        options, self.root = config.checkpoint, Path(config.run_dir) / "checkpoints"
        metrics = Path(config.run_dir) / "eval/metrics.json"
        ema = str(measured_ema_decays(config)[0])
        retention = Retention(options.keep, options.keep_every_images, options.keep_best, metrics, ema)
        self.writer = CheckpointWriter(self.root, WriterRank(ranks.rank, ranks.world_size), retention)
        self._is_saving, self._save_start, self._failures = False, 0.0, 0

    def resume(self, step: int, samples_seen: int) -> None:
        """Sets the checkpoint that training starts from."""
        self.step = self.saved_step = self.committed_step = step
        self.committed_images = self._saved_images = samples_seen

    def begin_save(self, engine: Engine, state: dict[str, Any]) -> None:
        """Waits for the previous save, gathers the state of self.step and starts writing it in the background."""
        if self.step == self.saved_step:
            return
        with self.watchdog.extended_limit():
            start = time.perf_counter()
            self.finish_save()
            problem = self.writer.prepare(self.step) if self.ranks.is_rank_zero else None
            wait_for_all(self.ranks)
            if broadcast_int(int(problem is not None), self.ranks.device):
                self._note_failure(problem)
                return
            self._save_start = time.perf_counter()
            self.writer.begin(engine.state(), list(engine.kinds), state)
            gathering, waited = time.perf_counter() - self._save_start, self._save_start - start
            before = f" after {three_digits(waited)} s for the previous save" if waited > 0.1 else ""
            self._info(f"saving step {self.step}: training waited {three_digits(gathering)} s for it{before}")
            self.saved_step, self._saved_images, self._is_saving = self.step, state["samples_seen"], True

    def agree_at_step_boundary(self) -> Stop:
        """Called between two steps: all ranks agree on the outcome of the background save and whether to stop."""
        is_running = self.writer.is_running  # read first: a save that has ended by now has set its outcome
        has_failed = self._is_saving and not is_running and self.writer.has_failed
        stop, has_failed, is_running = self.stop_agreement.agree(has_failed, is_running)
        if has_failed:
            self.writer.cancel()
            self.writer.wait()
            self._note_failure(self.writer.error)
        elif self._is_saving and not is_running:
            self._is_saving, self._failures = False, 0
            self.committed_step, self.committed_images = self.saved_step, self._saved_images
            if self.writer.committed:
                seconds = time.perf_counter() - self._save_start
                self.stop_agreement.margin = MARGIN + 2 * seconds
                self.status.checkpoint_committed(self.saved_step)
                self._info(f"saved {self.writer.committed} in {three_digits(seconds)} s")
        return stop

    def finish_save(self) -> None:
        """Waits for the background save, without heartbeats, so that the watchdog detects a writer that hangs."""
        while self._is_saving:
            self.agree_at_step_boundary()
            time.sleep(0.02)

    def _note_failure(self, problem: str | None) -> None:
        """Training continues: earlier checkpoints are untouched, and the next save may succeed."""
        self._is_saving, self.saved_step = False, -1
        self._failures += 1
        if problem:
            self.status.note(self.step, problem)
            complain(f"warning: {problem}; earlier checkpoints are untouched")
        if self._failures >= MAX_FAILED_SAVES:
            reason = problem or "another rank failed to write"
            raise UserError(f"{self._failures} consecutive saves failed; the last one: {reason}")

    def end(self, engine: Engine, state: dict[str, Any], stop: Stop) -> None:
        """Saves the last step, with up to MAX_FAILED_SAVES attempts, and records why the run ended."""
        while self.committed_step != self.step:
            self.begin_save(engine, state)
            with self.watchdog.extended_limit():
                self.finish_save()
        if self.ranks.is_rank_zero:
            images, reason = state["samples_seen"], stop.describe(self.stop_agreement.stop_file)
            where = f"step {self.step} ({images} images)"
            stopped_by = {"stopped_by": stop.name} if stop else {}
            self.status.end("stopped" if stop else "finished", self.step, reason, samples_seen=images, **stopped_by)
            self._info(f"stopped at {where}: {reason}" if stop else f"finished at {where}")

    def fail(self, reason: str) -> None:
        """Records the failure, then waits up to a minute for a save in the background."""
        self.status.end("failed", self.step, reason)
        self.writer.wait(60)

    def close(self) -> None:
        self.watchdog.stop()
        self.stop_agreement.close()
