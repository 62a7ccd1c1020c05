"""The training loop. Progress counts in optimizer steps of batch_size images; everything else follows from it.

Order within a step: micro-batches through the engine, then log, samples, checkpoint, each when its turn has come.
"""

import math
import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mf_dist.checkpoint import (
    Checkpoint,
    newest_checkpoint,
    open_checkpoint,
    save_checkpoint,
    step_folder,
    versions,
)
from mf_dist.config import Config
from mf_dist.config_loader import to_tree
from mf_dist.data.loader import Batch, training_batches
from mf_dist.data.shards import LatentShards, dataset_sha256
from mf_dist.distributed import Ranks, first_ranks_number, sum_over_ranks
from mf_dist.engine import MASTER, Engine
from mf_dist.errors import UserError
from mf_dist.generate import Generator, new_net
from mf_dist.latents import Vae, sample_posterior
from mf_dist.logger import Logger
from mf_dist.meanflow.loss import Draws, MeanFlowLoss


class Trainer:
    """One run on this rank: builds, resumes from the newest checkpoint, trains to the end."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.run_dir = Path(config.run_dir)
        self.checkpoints = self.run_dir / "checkpoints"
        self.shards = LatentShards(config.data.path)
        self.vae = self._sampling_vae()
        net = new_net(config.model, config.train.seed)
        self.engine = Engine(MeanFlowLoss(net, net.null_label, config.meanflow), config, ranks)
        self.ema_kind = f"ema-{config.optim.ema_decay}"
        self.step = 0
        self.step, story = self._resume()
        self.saved_step = self.step
        if ranks.is_first:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self.logger = Logger(config, self.run_dir, self.step)
            for line in story:
                self.logger.say(line)
        self.meter = Meter(ranks.device)

    def run(self) -> None:
        config, ranks, batch_size = self.config, self.ranks, self.config.train.batch_size
        batches = training_batches(
            self.shards, config, self.step * batch_size, ranks.rank, ranks.world_size, ranks.device.type == "cuda"
        )
        first_step = self.step + 1
        while self.step < config.total_steps:
            for _ in range(self.engine.accumulation):
                with self.meter.waiting():
                    batch = next(batches)
                self.meter.add(self._train_micro_batch(batch))
            self.step += 1
            self.meter.steps += 1
            if ranks.is_first:
                if self.step == first_step:
                    seconds = time.perf_counter() - self.meter.since
                    self.logger.say(f"first step after {seconds:.1f} s: {self.engine.compiled()}")
                self.logger.advance(batch_size)
            is_last = self.step == config.total_steps
            saves = is_last or self._is_due(config.checkpoint.every_images)
            if saves or self.step % config.log.every_steps == 0:
                self._log()  # refuses numbers that are not finite, hence before every save
            if config.log.sample_every_images and (is_last or self._is_due(config.log.sample_every_images)):
                self._draw_samples()
            if saves:
                self._save()
        if ranks.is_first:
            self.checkpoints.touch()  # the run that tools/fid_eval.py takes is the one that ended last
            self.logger.say(f"finished at step {self.step} ({self.step * batch_size} images): {self.run_dir}")
            self.logger.close()

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

    def _log(self) -> None:
        means = self.meter.means()
        entry = {
            "step": self.step,
            "samples_seen": self.step * self.config.train.batch_size,
            **means,
            "grad_norm": self.engine.grad_norm(),
            "lr": self.config.optim.lr,
            **self.meter.speed(self.config.train.batch_size),
        }
        self.meter.reset()
        for name, value in entry.items():
            if value is not None and not math.isfinite(value):
                raise UserError(
                    f"{name} is {value} at step {self.step}: training diverged. The newest checkpoint in "
                    f"{self.checkpoints} is from before; lower optim.lr or set optim.grad_clip, in another run_dir"
                )
        if self.ranks.is_first:
            self.logger.log(entry)

    def _sampling_vae(self) -> Vae | None:
        """Loaded before training on the rank that draws, so that a missing one is known at once."""
        if not self.ranks.is_first or not self.config.log.sample_every_images:
            return None
        recorded = self.shards.manifest["vae"]
        return Vae(self.config.eval.vae or recorded["source"], self.ranks.device, recorded)

    def _draw_samples(self) -> None:
        with self.meter.pausing():
            ema = self.engine.ema()  # every rank takes part
            if self.vae is None:
                return
            net = new_net(self.config.model, self.config.train.seed)
            net.load_state_dict(ema)
            generator = Generator(net, self.vae, self.config, self.ranks.device)
            for nfe in self.config.eval.nfe:
                path = self.run_dir / "samples" / f"step{self.step:08d}-nfe{nfe}.png"
                generator.grid(nfe, self.config.eval.seed, path, self.shards.manifest["classes"])
                self.logger.log_picture(f"samples/nfe{nfe}", path, self.step)

    def _save(self) -> None:
        if self.step == self.saved_step:
            return
        with self.meter.pausing():
            tensors: dict[str, dict[str, Tensor]] = {}
            for kind, name, tensor in self.engine.state():  # every rank takes part
                if self.ranks.is_first:
                    tensors.setdefault(self.ema_kind if kind == "ema" else kind, {})[name] = tensor.contiguous()
            if self.ranks.is_first:
                folder = save_checkpoint(self.checkpoints, tensors, self._state(), self.config.checkpoint.keep)
                self.logger.say(f"saved {folder}")
            self.saved_step = self.step

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "samples_seen": self.step * self.config.train.batch_size,
            "config": to_tree(self.config),
            "classes": self.shards.manifest["classes"],
            "vae": self.shards.manifest["vae"],
            "dataset": {"path": self.config.data.path, "sha256": dataset_sha256(self.shards.manifest)},
            "versions": versions(),
        }

    def _resume(self) -> tuple[int, list[str]]:
        """Loads the newest valid checkpoint of the run folder; returns its step and what there is to say."""
        checkpoint, story = newest_checkpoint(self.checkpoints) if self.ranks.is_first else (None, [])
        step = first_ranks_number(checkpoint.step if checkpoint else 0, self.ranks.device)
        if step and checkpoint is None:
            checkpoint = open_checkpoint(step_folder(self.checkpoints, step), verify=False)
        if checkpoint is None:
            return 0, [*story, f"starting {self.run_dir} from scratch: it has no checkpoint"]
        self._refuse_other_mathematics(checkpoint)
        self._load(checkpoint)
        return checkpoint.step, [*story, f"resuming {self.run_dir} from {checkpoint.folder.name}"]

    def _refuse_other_mathematics(self, checkpoint: Checkpoint) -> None:
        """A run goes on only with the model, recipe, optimizer, batch, seed and latents it began with."""
        saved, now = dict(checkpoint.state["config"]), to_tree(self.config)
        saved["dataset"], now["dataset"] = checkpoint.state.get("dataset", {}), self._state()["dataset"]
        for tree in (saved, now):
            tree["train"] = {key: tree["train"][key] for key in ("batch_size", "seed")}
            tree["dataset"] = {"sha256": tree["dataset"].get("sha256")}
        for section in ("model", "meanflow", "optim", "train", "dataset"):
            for key, value in now[section].items():
                before = saved[section].get(key)
                if before != value:
                    raise UserError(
                        f"{self.run_dir} was trained with {section}.{key}={before}, now it is {value}; "
                        "go back to that, or choose another run_dir"
                    )

    def _load(self, checkpoint: Checkpoint) -> None:
        tensors = {kind: checkpoint.load(kind) for kind in (MASTER, "exp_avg", "exp_avg_sq")}
        tensors["ema"] = checkpoint.load(self.ema_kind)
        self.engine.load_state(tensors, checkpoint.step)


class Meter:
    """Sums between two log lines: of the loss's parts, and of the time spent where."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps, self.waited, self.paused, self.since = 0, 0.0, 0.0, time.perf_counter()

    def add(self, sums: dict[str, Tensor]) -> None:
        self.sums = {name: self.sums[name] + pair if name in self.sums else pair for name, pair in sums.items()}

    def means(self) -> dict[str, float | None]:
        """Per row over all ranks and steps; None where no row counts (no r < t rows in flow matching)."""
        table = sum_over_ranks(torch.stack(list(self.sums.values()))).tolist()
        return {name: total / n if n else None for name, (total, n) in zip(self.sums, table, strict=True)}

    def speed(self, batch_size: int) -> dict[str, float]:
        """Training alone: sampling and saving are left out."""
        seconds = time.perf_counter() - self.since - self.paused
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "images_per_second": self.steps * batch_size / seconds,
            "seconds_per_step": seconds / self.steps,
            "data_wait_share": self.waited / seconds,
            "memory_gib": memory / 2**30,
        }

    def waiting(self) -> "_Stopwatch":
        return _Stopwatch(self, "waited")

    def pausing(self) -> "_Stopwatch":
        return _Stopwatch(self, "paused")


class _Stopwatch:
    """Adds the time of a `with` block to one of the meter's fields."""

    def __init__(self, meter: Meter, field: str) -> None:
        self.meter, self.field, self.started = meter, field, math.nan

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        setattr(self.meter, self.field, getattr(self.meter, self.field) + time.perf_counter() - self.started)
