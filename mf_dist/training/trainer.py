"""The training loop. Progress counts in optimizer steps of batch_size images; everything else follows from it.

Order within a step: micro-batches through the engine, then log, samples, checkpoint, each when its turn has come, then
the border, where all ranks agree whether to stop.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mf_dist.checkpoint.reader import Checkpoint, newest_checkpoint, open_checkpoint, step_folder
from mf_dist.checkpoint.writer import check_free_space
from mf_dist.config.cost import checkpoint_bytes
from mf_dist.config.loader import to_tree
from mf_dist.config.schema import Config
from mf_dist.data.loader import Batch, training_batches
from mf_dist.data.shards import LatentShards, dataset_sha256
from mf_dist.data.staging import Staging
from mf_dist.fault_tolerance.status import Status
from mf_dist.fault_tolerance.stop import Stop
from mf_dist.objectives.meanflow import Draws, MeanFlowLoss
from mf_dist.runtime.distributed import Ranks, broadcast_int
from mf_dist.runtime.environment import environment
from mf_dist.runtime.errors import UnrecordedError, UserError, is_disk_fault
from mf_dist.sampling.generator import build_network
from mf_dist.training.engine import MASTER, Engine
from mf_dist.training.logger import Logger
from mf_dist.training.resume import check_config_changes, load_initial_weights
from mf_dist.training.snapshots import Snapshots
from mf_dist.training.supervisor import Supervisor
from mf_dist.training.throughput import Throughput
from mf_dist.vae import sample_posterior


class Trainer:
    """One run on this rank: builds, resumes from the newest checkpoint, trains to the end or to a request to stop."""

    def __init__(self, config: Config, ranks: Ranks, allow_config_change: bool = False) -> None:
        self.config, self.ranks, self.run_dir = config, ranks, Path(config.run_dir)
        self.checkpoints, self.status = self.run_dir / "checkpoints", Status(self.run_dir)
        self.allow_config_change, self.step = allow_config_change, 0
        self.supervisor = Supervisor(config, ranks, self.status, self._say)

    def run(self) -> None:
        """Builds and trains; ends with status finished or stopped. An exception is recorded as failed."""
        try:
            self._build_or_refuse()
            self._train()
        except torch.OutOfMemoryError:
            error = self._out_of_memory()
            self._fail(str(error))
            raise error from None
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
        """A mistake of the user's found here is no crash; a disk's fault is one, and may be over at the next start."""
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
        self.step, self.messages = self._find_checkpoint()
        net = build_network(config.model, config.train.seed)
        if not self.step and config.train.init_from:
            self.messages.append(f"initial weights: {load_initial_weights(net, config.train.init_from)}")
        self.snapshots = Snapshots(config, self.shards.manifest, ranks)
        self.engine = Engine(MeanFlowLoss(net, net.null_label, config.meanflow), config, ranks)
        self._load()
        self.supervisor.committed_step = self.supervisor.saved_step = self.supervisor.step = self.step
        self.throughput = Throughput(ranks.device)
        self._open_log()

    def _find_checkpoint(self) -> tuple[int, list[str]]:
        """Step of the newest valid checkpoint, 0 for none, and what there is to say. Counts the start, and refuses one
        too many or a disk without room."""
        found: Checkpoint | None = None
        error: UserError | OSError | None = None
        messages: list[str] = []
        if self.ranks.is_rank_zero:
            try:
                self.status.lock_run()
                found, messages = newest_checkpoint(self.checkpoints)
                self.status.begin(found.step if found else 0)
                if not found or found.step < self.config.total_steps:
                    check_free_space(self.checkpoints, checkpoint_bytes(self.config))
            except UserError as refused:
                error = refused
            except OSError as refused:
                error = refused if is_disk_fault(refused) else UserError(f"{refused.filename}: {refused.strerror}")
        step = broadcast_int(-1 if error else found.step if found else 0, self.ranks.device)
        if step < 0:
            raise error or UnrecordedError("rank 0 refuses to start, see there")
        if found:
            return step, [*messages, f"resuming {self.run_dir} from {found.folder.name}"]
        why = "none of its checkpoints is whole" if messages else "it has no checkpoint"
        return step, [*messages, f"starting {self.run_dir} from {self.config.train.init_from or 'scratch'}: {why}"]

    def _load(self) -> None:
        """The state of the checkpoint of step self.step into the engine."""
        if not self.step:
            return
        checkpoint = open_checkpoint(step_folder(self.checkpoints, self.step), verify=False)  # rank 0 has verified it
        self.messages += check_config_changes(checkpoint, self._state(), self.allow_config_change)
        tensors = {}
        for kind in self.engine.kinds:
            has_it = kind in checkpoint.kinds() or not kind.startswith("ema-")
            tensors[kind] = checkpoint.load(kind if has_it else MASTER)
            if not has_it:
                self.messages.append(f"{kind} is new: it starts from the weights of step {self.step}")
        self.engine.guard.load_state(checkpoint.state["guard"])
        self.engine.load_state(tensors, self.step - self.engine.guard.skipped)

    def _open_log(self) -> None:
        if self.ranks.is_rank_zero:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self.logger = Logger(self.config, self.run_dir, self.step)
        for line in self.messages:
            self._say(line)

    def _train(self) -> None:
        config, ranks = self.config, self.ranks
        seen, on_gpu = self.step * config.train.batch_size, ranks.device.type == "cuda"
        batches = training_batches(self.shards, config, seen, ranks.rank, ranks.world_size, on_gpu)
        if config.data.stage != "off" and ranks.is_local_rank_zero:
            stage_dir = Path(config.data.stage_dir) if config.data.stage_dir else None
            Staging(self.shards.folder, self.shards.manifest, stage_dir, self._say)
        first_step, stop = self.step + 1, self.supervisor.agree_at_step_boundary()
        while self.step < config.total_steps and not stop:
            self._one_step(batches)
            if self.step == first_step:
                seconds = time.perf_counter() - self.throughput.since
                self._say(f"first step after {seconds:.1f} s: {self.engine.compiled()}")
                self.supervisor.watchdog.begin_regular_steps()
            stop = self.supervisor.agree_at_step_boundary()
            is_last = self.step == config.total_steps
            measures = not stop and self._is_due_or_last(config.eval.every_images)
            saves = is_last or stop or self._is_due(config.checkpoint.every_images)
            saves = saves or (measures and config.checkpoint.keep_best is not None)
            if saves or self.step % config.log.every_steps == 0:
                self._log()
            if saves:  # before anything that could fail
                with self.throughput.pausing():
                    self.supervisor.begin_save(self.engine, self._state())
            if not stop and self._is_due_or_last(config.log.sample_every_images):
                self._show(self.snapshots.draw)
            if measures:
                self._show(self.snapshots.measure)
        if self.step == config.total_steps:
            stop = Stop.NO
        self.supervisor.end(self.engine, self._state(), stop, self.step * config.train.batch_size)
        if ranks.is_rank_zero:
            self.logger.close()

    def _one_step(self, batches: Any) -> None:
        sums = []
        for _ in range(self.engine.accumulation):
            with self.throughput.waiting():
                batch = next(batches)
            sums.append(self._train_micro_batch(batch))
        self.step += 1
        self.supervisor.step = self.step
        guard = self.engine.guard
        if guard.last:
            self._say(f"warning: step {self.step}: {guard.last} ({guard.skipped_in_row} left out in a row)")
        if guard.skipped_in_row >= self.config.train.max_skipped:
            raise UserError(
                f"training diverged: {guard.skipped_in_row} steps in a row were left out, the last at step {self.step} "
                f"({guard.last}). The newest checkpoint in {self.checkpoints} is from before; lower optim.lr or set "
                "optim.grad_clip, in another run_dir"
            )
        for part in sums:  # of a step left out the numbers may not be finite: it counts for nothing
            self.throughput.add({k: torch.zeros_like(v) for k, v in part.items()} if guard.skipped_in_row else part)
        self.throughput.steps += 1
        if self.ranks.is_rank_zero:
            self.logger.advance(self.config.train.batch_size)
        self.supervisor.watchdog.heartbeat()

    def _train_micro_batch(self, batch: Batch) -> dict[str, Tensor]:
        on_device = Batch(*(tensor.to(self.ranks.device, non_blocking=True) for tensor in batch))
        scale = self.shards.manifest["vae"]["scaling_factor"]
        x = sample_posterior(on_device.moments, on_device.posterior_noise, scale)
        draws = Draws(on_device.e, on_device.time_normals, on_device.drop_uniforms)
        return self.engine.train_micro_batch(x, on_device.labels, draws)

    def _is_due(self, every_images: int) -> bool:
        """Whether this step crossed a multiple of `every_images`."""
        seen, batch = self.step * self.config.train.batch_size, self.config.train.batch_size
        return seen // every_images > (seen - batch) // every_images

    def _is_due_or_last(self, every_images: int) -> bool:
        """Never where every_images is 0."""
        return every_images > 0 and (self.step == self.config.total_steps or self._is_due(every_images))

    def _log(self) -> None:
        guard = self.engine.guard
        norm = self.engine.grad_norm()
        entry = {
            "step": self.step,
            "samples_seen": self.step * self.config.train.batch_size,
            **self.throughput.means(),
            "grad_norm": norm if math.isfinite(norm) else None,
            "lr": self.config.optim.lr,
            "skipped_steps": guard.skipped,
            "clipped_steps": guard.clipped,
            **self.throughput.speed(self.config.train.batch_size),
        }
        self.throughput.reset()
        for name, value in entry.items():
            if value is not None and not math.isfinite(value):  # the gradient may be finite where the loss overflows
                raise UserError(
                    f"{name} is {value} at step {self.step}: training diverged. The newest checkpoint in "
                    f"{self.checkpoints} is from before; lower optim.lr or set optim.grad_clip, in another run_dir"
                )
        if self.ranks.is_rank_zero:
            self.logger.log(entry)

    def _show(self, show: Callable[[Engine, int, Logger | None], None]) -> None:
        """Draws or measures with the EMA: every rank takes part, and training waits."""
        with self.throughput.pausing(), self.supervisor.watchdog.extended_limit():
            show(self.engine, self.step, self.logger if self.ranks.is_rank_zero else None)
            broadcast_int(0, self.ranks.device)  # all leave together: the others have waited for rank 0

    def _report(self) -> None:
        """report.html, after all is saved: nothing that goes wrong here harms the run, or hides why it failed."""
        if not hasattr(self, "logger"):  # another rank than the first, or a call refused before training
            return
        try:
            from mf_dist.report.page import write_report

            write_report([self.run_dir], self.run_dir / "report.html")
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            self.logger.say(f"warning: no report ({reason}); tools/report.py {self.run_dir} writes it")

    def _state(self) -> dict[str, Any]:
        batch = self.config.train.batch_size
        return {
            "step": self.step,
            "samples_seen": self.step * batch,
            "saved_images_ago": (self.step - self.supervisor.committed_step) * batch,
            "guard": self.engine.guard.state(),
            "config": to_tree(self.config),
            "classes": self.shards.manifest["classes"],
            "vae": self.shards.manifest["vae"],
            "dataset": {"path": self.config.data.path, "sha256": dataset_sha256(self.shards.manifest)},
            "versions": environment(self.ranks.world_size),
        }

    def _say(self, line: str) -> None:
        if self.ranks.is_rank_zero:
            if line.startswith(("warning", "config changed", "passed over")):
                self.status.note(self.step, line.removeprefix("warning: "))
            self.logger.say(line)

    def _out_of_memory(self) -> UserError:
        train, engine = self.config.train, self.config.engine
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else math.nan
        rows, unit = (train.micro_batch or 0) // 2, self.config.meanflow.share_r_equals_t.denominator
        advice = [f"train.micro_batch={rows}"] if rows and rows % unit == 0 else []
        advice += [] if engine.checkpoint_activations else ["engine.checkpoint_activations=true"]
        advice += [] if engine.zero_stage == 3 else [f"engine.zero_stage={engine.zero_stage + 1}"]
        return UserError(
            f"out of GPU memory in step {self.step + 1}, peak {peak:.1f} GiB; try {', or '.join(advice)} "
            "(--dry-run estimates each)"
        )
