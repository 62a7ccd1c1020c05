"""The training loop. Progress is counted in images (`samples_seen`), which schedules and the end of the run follow; the
optimizer's steps only name checkpoints. So the batch size may change at a start.

Order within a step: micro-batches through the engine; all ranks agree whether to stop; then whichever is due of log,
checkpoint, sample grid and measurement.
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mf_dist.checkpoint.reader import Checkpoint, newest_checkpoint, open_checkpoint
from mf_dist.checkpoint.writer import check_free_space
from mf_dist.config.cost import checkpoint_bytes
from mf_dist.config.loader import to_tree
from mf_dist.config.schema import Config
from mf_dist.data.loader import Batch, training_batches
from mf_dist.data.normalisation import normalisation
from mf_dist.data.shards import LatentShards, dataset_sha256
from mf_dist.data.staging import Staging
from mf_dist.fault_tolerance.status import Status
from mf_dist.fault_tolerance.stop import Stop
from mf_dist.objectives.base import Sums
from mf_dist.objectives.build import build_loss
from mf_dist.runtime.distributed import Ranks, broadcast_int, broadcast_text, wait_for_all
from mf_dist.runtime.environment import environment
from mf_dist.runtime.errors import UnrecordedError, UserError, is_disk_fault
from mf_dist.runtime.figures import three_digits
from mf_dist.runtime.output import when_output_is_lost
from mf_dist.sampling.generator import build_network
from mf_dist.training.engine import MASTER, Engine
from mf_dist.training.initial_weights import load_initial_weights
from mf_dist.training.logger import Logger
from mf_dist.training.profile import StepProfile
from mf_dist.training.resume import check_config_changes
from mf_dist.training.snapshots import Snapshots
from mf_dist.training.supervisor import Supervisor
from mf_dist.training.throughput import Throughput


class Trainer:
    """A run on this rank: builds the model, resumes from the newest checkpoint, trains until the end or a request to
    stop."""

    def __init__(self, config: Config, ranks: Ranks, allow_config_change: bool = False) -> None:
        self.config, self.ranks, self.run_dir = config, ranks, Path(config.run_dir)
        self.checkpoints, self.status = self.run_dir / "checkpoints", Status(self.run_dir)
        self.allow_config_change, self.step, self.samples_seen = allow_config_change, 0, 0
        self.supervisor = Supervisor(config, ranks, self.status, self._info)

    def run(self) -> None:
        """Builds and trains. The status becomes finished or stopped; an exception is recorded as failed."""
        try:
            self._build_or_refuse()
            self._train()
        except RuntimeError as error:
            explained = self._explained(error)
            self._fail(str(explained) or type(error).__name__)
            if explained is error:
                raise
            raise explained from None
        except UnrecordedError:
            raise
        except KeyboardInterrupt:
            self.status.end("stopped", self.step, "interrupted from the keyboard; nothing was saved")
            raise
        except BaseException as error:
            self._fail(str(error) or type(error).__name__)
            raise
        finally:
            self.supervisor.close()
        self._report()

    def _fail(self, reason: str) -> None:
        self.supervisor.fail(reason)
        self._report()

    def _build_or_refuse(self) -> None:
        """Builds the run. A UserError is recorded as a refused start, not as a crash, unless a disk fault caused it,
        which may be gone at the next start."""
        try:
            self._build()
        except UnrecordedError:
            raise
        except UserError as error:
            if not is_disk_fault(error):
                self.status.refuse(str(error), has_begun=True)
            raise

    def _build(self) -> None:
        config, ranks = self.config, self.ranks
        self.shards = LatentShards(config.data.path, stage_dir=config.data.stage_dir)
        checkpoint, self.messages = self._find_checkpoint()
        self.normalisation = normalisation(config.data, self.shards.manifest["vae"], ranks.device)
        net = build_network(config.model, config.train.seed)
        if not checkpoint and config.train.init_from:
            self.messages += load_initial_weights(net, config, self.shards.manifest["classes"])
        self.snapshots = Snapshots(config, self.shards.manifest, ranks)
        self.loss = build_loss(net, config.objective)
        self.engine = Engine(self.loss, config, ranks)
        if checkpoint:
            self._load_checkpoint(checkpoint)
        self.loss.phase = self._phase()
        if self.loss.phase:
            self.messages.append(f"phase: {self.loss.phase}")
        if remainder := config.remainder(self.samples_seen):
            self.messages.append(remainder)
        self.supervisor.resume(self.step, self.samples_seen)
        self.throughput = Throughput(ranks.device)
        self.profile = StepProfile(config.train.profile_steps, self.run_dir, ranks)
        self._open_log()

    def _find_checkpoint(self) -> tuple[Path | None, list[str]]:
        """The folder of the newest valid checkpoint, and messages for the log. Counts the start. Raises UserError for a
        crash loop or a lack of disk space."""
        newest: Checkpoint | None = None
        error: UserError | OSError | None = None
        messages: list[str] = []
        if self.ranks.is_rank_zero:
            try:
                self.status.lock_run()
                newest, messages = newest_checkpoint(self.checkpoints)
                self.status.begin(newest.step if newest else 0)
                if not newest or self.config.steps_left(newest.samples_seen):
                    check_free_space(self.checkpoints, checkpoint_bytes(self.config))
            except UserError as caught:
                error = caught
            except OSError as caught:
                error = caught if is_disk_fault(caught) else UserError(f"{caught.filename}: {caught.strerror}")
        wait_for_all(self.ranks)
        if broadcast_int(int(error is not None), self.ranks.device):
            raise error or UnrecordedError("rank 0 refuses to start, see its message")
        if name := broadcast_text(0, newest.folder.name if newest else "", self.ranks):
            return self.checkpoints / name, [*messages, f"resuming {self.run_dir} from {name}"]
        reason = "none of its checkpoints is valid" if messages else "it has no checkpoint"
        return None, [*messages, f"starting {self.run_dir} from {self.config.train.init_from or 'scratch'}: {reason}"]

    def _load_checkpoint(self, folder: Path) -> None:
        """Continues from the checkpoint in `folder`, which rank 0 has verified."""
        checkpoint = open_checkpoint(folder, verify=False)
        self.step, self.samples_seen = checkpoint.step, checkpoint.samples_seen
        self.messages += check_config_changes(checkpoint, self._state(), self.allow_config_change)
        for kind in self.engine.kinds:
            is_new = kind.startswith("ema-") and kind not in checkpoint.kinds()
            self.engine.load_state(kind, checkpoint.each(MASTER if is_new else kind))
            if is_new:
                self.messages.append(f"{kind} is new: it starts from the weights of step {self.step}")
        self.engine.guard.load_state(checkpoint.state["guard"])
        self.engine.set_optimizer_steps(self.step - self.engine.guard.skipped)

    def _open_log(self) -> None:
        if self.ranks.is_rank_zero:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self.logger = Logger(self.config, self.run_dir, self.step, self.samples_seen)
            when_output_is_lost(lambda sentence: self.status.note(self.step, sentence))
        for line in self.messages:
            self._info(line)

    def _train(self) -> None:
        config, ranks = self.config, self.ranks
        on_gpu = ranks.device.type == "cuda"
        batches = training_batches(self.shards, config, self.samples_seen, ranks.rank, ranks.world_size, on_gpu)
        if config.data.stage != "off" and ranks.is_local_rank_zero:
            stage_dir = Path(config.data.stage_dir) if config.data.stage_dir else None
            Staging(self.shards.folder, self.shards.manifest, stage_dir, self._info)
        first_step, stop = self.step + 1, self.supervisor.agree_at_step_boundary()
        while not self._is_finished() and not stop:
            with self._compiling_allowed_in_new_phase():
                self._one_step(batches)
            if self.step == first_step:
                seconds = time.perf_counter() - self.throughput.since
                self._info(f"first step after {three_digits(seconds)} s: {self.engine.compiled()}")
                self.supervisor.watchdog.begin_regular_steps()
            stop = self.supervisor.agree_at_step_boundary()
            measures = not stop and self._is_due_or_last(config.eval.every_images)
            saves = self._is_finished() or stop or self._is_due(config.checkpoint.every_images)
            saves = saves or (measures and config.checkpoint.keep_best is not None)
            if saves or self.step % config.log.every_steps == 0:
                self._log()
            if saves:  # before drawing and measuring, which may fail
                with self.throughput.pausing():
                    self.supervisor.begin_save(self.engine, self._state())
            if not stop and self._is_due_or_last(config.log.sample_every_images):
                self._show(self.snapshots.draw)
            if measures:
                self._show(partial(self.snapshots.measure, samples_seen=self.samples_seen))
            if self.profile.step():
                self._show(lambda _engine, step, _logger: self._info(self.profile.write(step)))
        if self._is_finished():
            stop = Stop.NO
        if line := self.profile.end():
            self._info(line)
        self.supervisor.end(self.engine, self._state(), stop)
        if ranks.is_rank_zero:
            self.logger.close()

    def _compiling_allowed_in_new_phase(self) -> AbstractContextManager[None]:
        """Enters the phase of the next step. One that is new has a graph of its own, which that step compiles."""
        if self._phase() == self.loss.phase:
            return nullcontext()
        self.loss.phase = self._phase()
        self._info(f"step {self.step + 1}, image {self.samples_seen:,}: {self.loss.phase} begins")
        return self.supervisor.watchdog.extended_limit()

    def _one_step(self, batches: Any) -> None:
        sums = []
        config = self.config
        self.engine.set_learning_rate(config.optim.learning_rate(self.samples_seen + config.train.batch_size))
        value = config.objective.schedule(config.progress(self.samples_seen))
        schedule = torch.full((), value, dtype=torch.float32, device=self.ranks.device)
        for _ in range(self.engine.accumulation):
            with self.throughput.waiting():
                batch = next(batches)
            sums.append(self._train_micro_batch(batch, schedule))
        self.step += 1
        self.samples_seen += self.config.train.batch_size
        self.supervisor.step = self.step
        guard = self.engine.guard
        if guard.last_event:
            self._info(f"warning: step {self.step}: {guard.last_event} ({guard.skipped_in_row} left out in a row)")
        if guard.skipped_in_row >= self.config.train.max_skipped:
            raise UserError(
                f"training diverged: {guard.skipped_in_row} steps in a row were left out, the last at step {self.step} "
                f"({guard.last_event}). The newest checkpoint in {self.checkpoints} is older; lower optim.lr or set "
                "optim.grad_clip, in another run_dir"
            )
        for part in sums:
            if guard.skipped_in_row:  # the sums of a skipped step may not be finite: count them as 0
                part = {name: torch.zeros_like(pair) for name, pair in part.items()}
            self.throughput.add(part)
        self.throughput.steps += 1
        if self.ranks.is_rank_zero:
            self.logger.advance(self.config.train.batch_size)
        self.supervisor.watchdog.heartbeat()

    def _train_micro_batch(self, batch: Batch, schedule: Tensor) -> Sums:
        moments, labels, draws = batch.to(self.ranks.device)
        x = self.normalisation.sample_posterior(moments, draws.pop("posterior_noise"))
        return self.engine.train_micro_batch(x, labels, draws, schedule)

    def _phase(self) -> str:
        """Name of the phase of the next step."""
        return self.config.objective.phase(self.config.progress(self.samples_seen)).name

    def _is_finished(self) -> bool:
        return not self.config.steps_left(self.samples_seen)

    def _is_due(self, every_images: int) -> bool:
        """Whether this step reached or passed a multiple of `every_images`."""
        before = self.samples_seen - self.config.train.batch_size
        return self.samples_seen // every_images > before // every_images

    def _is_due_or_last(self, every_images: int) -> bool:
        """Whether it is due, or this is the last step; never if every_images is 0."""
        return every_images > 0 and (self._is_finished() or self._is_due(every_images))

    def _log(self) -> None:
        guard = self.engine.guard
        norm = self.engine.grad_norm()
        entry = {
            "step": self.step,
            "samples_seen": self.samples_seen,
            **self.throughput.means(),
            "grad_norm": norm if math.isfinite(norm) else None,
            "lr": self.config.optim.learning_rate(self.samples_seen),
            "skipped_steps": guard.skipped,
            "clipped_steps": guard.clipped,
            **self.throughput.speed(self.config.train.batch_size),
        }
        self.throughput.reset()
        for name, value in entry.items():
            if value is not None and not math.isfinite(value):  # the loss may overflow although the gradient is finite
                raise UserError(
                    f"{name} is {value} at step {self.step}: training diverged. The newest checkpoint in "
                    f"{self.checkpoints} is older; lower optim.lr or set optim.grad_clip, in another run_dir"
                )
        if self.ranks.is_rank_zero:
            self.logger.log(entry)

    def _show(self, show: Callable[[Engine, int, Logger | None], None]) -> None:
        """Draws, measures or writes a profile. Every rank takes part; training waits."""
        with self.throughput.pausing(), self.supervisor.watchdog.extended_limit():
            show(self.engine, self.step, self.logger if self.ranks.is_rank_zero else None)
            wait_for_all(self.ranks)  # all leave extended_limit together, after rank 0

    def _report(self) -> None:
        """Writes report.html after everything is saved. An error here is only a warning: it must not hide why a run
        failed."""
        if not hasattr(self, "logger"):  # not rank 0, or the start was refused
            return
        try:
            from mf_dist.report.page import write_report

            write_report([self.run_dir], self.run_dir / "report.html")
        except (Exception, SystemExit) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            self.logger.info(f"warning: no report ({reason}); tools/report.py {self.run_dir} writes it")

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "saved_images_ago": self.samples_seen - self.supervisor.committed_images,
            "guard": self.engine.guard.state(),
            "config": to_tree(self.config),
            "classes": self.shards.manifest["classes"],
            "vae": self.shards.manifest["vae"],
            "dataset": {"path": self.config.data.path, "sha256": dataset_sha256(self.shards.manifest)},
            "versions": environment(self.ranks.world_size),
        }

    def _info(self, line: str) -> None:
        if self.ranks.is_rank_zero:
            if line.startswith(("warning", "config changed", "passed over")):
                self.status.note(self.step, line.removeprefix("warning: "))
            self.logger.info(line)

    def _explained(self, error: RuntimeError) -> RuntimeError | UserError:
        """torch's errors that a setting causes and another avoids, as one line; others unchanged."""
        if isinstance(error, torch.OutOfMemoryError):
            return self._out_of_memory()
        if self.config.engine.deterministic and "deterministic implementation" in str(error):
            return UserError(f"engine.deterministic=true: {str(error).splitlines()[0]}; set engine.deterministic=false")
        return error

    def _out_of_memory(self) -> UserError:
        train, engine = self.config.train, self.config.engine
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else math.nan
        rows, unit = (train.micro_batch or 0) // 2, self.config.objective.share_r_equals_t.denominator
        advice = [f"train.micro_batch={rows}"] if rows and rows % unit == 0 else []
        advice += [] if engine.checkpoint_activations else ["engine.checkpoint_activations=true"]
        advice += [] if engine.zero_stage == 3 else [f"engine.zero_stage={engine.zero_stage + 1}"]
        return UserError(
            f"out of GPU memory in step {self.step + 1}, peak {three_digits(peak)} GiB; try {', or '.join(advice)} "
            "(--dry-run estimates each)"
        )
