"""Evaluation during training: a Frechet distance of few samples, under its own name, on all ranks and without files.

Rank k mod n generates block k of the samples. Each rank sums its features, centred on the reference's mean, and
reductions add the sums: the result is the same for any number of ranks, to 1e-9. Its 95 % band (confidence.py) takes
the sums of 20 groups of samples and 20 more distances, of which each rank computes its share.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mf_dist.config.schema import Config
from mf_dist.evaluation.blocks import BLOCK, device_name, number_of_blocks
from mf_dist.evaluation.confidence import ACCURACY, GROUPS, Groups, groups_of, has_band, jackknife, sums_of_groups
from mf_dist.evaluation.features import open_features
from mf_dist.evaluation.measure import Settings, warnings_of
from mf_dist.evaluation.metrics import metric_name, reduce_sums
from mf_dist.evaluation.protocols import ADM
from mf_dist.evaluation.reference import read_reference
from mf_dist.evaluation.report import record
from mf_dist.evaluation.statistics import FeatureSums, Gaussian, Rows, frechet_distance
from mf_dist.objectives.sampler import uniform_grid
from mf_dist.runtime.distributed import Ranks, raise_on_all_ranks, sum_over_ranks
from mf_dist.runtime.environment import environment
from mf_dist.runtime.errors import UserError
from mf_dist.runtime.precision import Precision, single_cpu_thread
from mf_dist.sampling.generator import ImageGenerator, Samples, sampling_network
from mf_dist.vae import Vae

BAND_WORK = 3 * 2048**3
"""A band takes each rank a share of 20 distances of D features, D^3 each; above this, training has no bands."""


class TrainingEvaluation:
    """Feature network, VAE and reference of a run, loaded once before training, so that a missing one is reported at
    the start. Every rank constructs one and calls `measure` at the same steps."""

    def __init__(self, config: Config, manifest: dict[str, Any], ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        settings, device = config.eval, ranks.device
        recorded = manifest["vae"]
        self.precision: Precision = "tf32" if device.type == "cuda" else "fp32"
        with raise_on_all_ranks(ranks):
            self.network = open_features(settings.features, settings.inception_weights, device)
            self.vae = Vae(settings.vae or recorded["source"], device, recorded, self.precision)
        assert settings.reference is not None and config.model.latent_size is not None
        self.resolution = config.model.latent_size * self.vae.reduction
        self.problems: list[str] = []
        """Warnings of the last measurement."""
        self.real = self._read(settings.reference)
        self.name = metric_name("fid", self.network, settings.training_samples)

    def _read(self, path: str) -> Gaussian:
        """The real images' Gaussian on every rank; only rank 0 reads the file."""
        d = self.network.dimension
        flat = torch.zeros(d + d * d, dtype=torch.float64)
        with raise_on_all_ranks(self.ranks):
            if self.ranks.is_rank_zero:
                self.reference = read_reference(path, self.network)
                real = self.reference.pooled
                flat = torch.from_numpy(np.concatenate([real.mean, real.covariance.ravel()]))
        total = sum_over_ranks(flat.to(self.ranks.device)).cpu().numpy()
        return Gaussian(total[:d], total[d:].reshape(d, d))

    def measure(self, ema: dict[str, Tensor], decay: float, step: int, samples_seen: int) -> dict[str, float]:
        """Name -> value for this EMA at every eval.nfe, recorded in eval/metrics.json; on rank 0 (else empty)."""
        net = sampling_network(self.config.model, ema, f"the EMA of decay {decay}")
        generator = ImageGenerator(net, self.vae, self.config, self.ranks.device, self.precision)
        values, self.problems = {}, []
        for nfe in self.config.eval.nfe:
            value, band, seconds = self._distance(generator, nfe)
            if self.ranks.is_rank_zero:
                values[f"{self.name}/nfe{nfe}/ema{decay}"] = value
                entry = self._entry(value, band, nfe, decay, step, generator.protocol, seconds)
                entry["samples_seen"] = samples_seen
                try:
                    record(entry, Path(self.config.run_dir) / "eval")
                except (OSError, UserError) as error:
                    self.problems = [f"warning: the measurements of step {step} are not in eval/metrics.json: {error}"]
        return values

    def _distance(self, generator: ImageGenerator, nfe: int) -> tuple[float, float | None, dict[str, float]]:
        """Distance, half the width of its band, and this rank's seconds by stage; statistics includes waiting for
        others."""
        settings, ranks, start = self.config.eval, self.ranks, time.perf_counter()
        count, feature_seconds = settings.training_samples, 0.0
        samples = Samples(generator, count, uniform_grid(nfe), settings.labels, settings.training_seed, {})
        groups, rows = groups_of(count, samples.cycle), [np.empty((0, self.network.dimension), np.float32)]
        group_of_row = [np.empty(0, np.int64)]
        generator.seconds.clear()
        with raise_on_all_ranks(ranks), single_cpu_thread(ranks.device):
            for number in range(ranks.rank, number_of_blocks(count, BLOCK), ranks.world_size):
                pixels, _ = samples.read(number * BLOCK, (number + 1) * BLOCK)
                features_start = time.perf_counter()
                rows.append(self.network(pixels).pooled[: count - number * BLOCK])
                group_of_row.append(groups[number * BLOCK : (number + 1) * BLOCK])
                feature_seconds += time.perf_counter() - features_start
            statistics_start = time.perf_counter()
        value, band = self._statistics(
            np.concatenate(rows), np.concatenate(group_of_row), np.bincount(groups, minlength=GROUPS)
        )
        end = time.perf_counter()
        seconds = {"features": feature_seconds, "statistics": end - statistics_start, "all": end - start}
        return value, band, {**generator.seconds, **seconds}

    def _statistics(self, rows: Rows, groups: Groups, sizes: Groups) -> tuple[float, float | None]:
        """The distance and half the width of its band, on all ranks. rows (n, D), groups (n,): this rank's samples;
        sizes: of the groups, over all ranks."""
        ranks = self.ranks
        own, total = {}, FeatureSums(self.real.mean)
        for group, part in enumerate(sums_of_groups(rows, groups, self.real.mean)):
            reduce_sums(part, ranks)
            total = total.plus(part)
            if group % ranks.world_size == ranks.rank:
                own[group] = part
        values = torch.zeros(GROUPS + 1, dtype=torch.float64)
        with raise_on_all_ranks(ranks):
            if ranks.is_rank_zero:
                values[GROUPS] = frechet_distance(total.gaussian(), self.real)
            if self._has_band(sizes):
                for group, part in own.items():
                    values[group] = frechet_distance(total.plus(part, -1).gaussian(), self.real, ACCURACY)
        *without, value = sum_over_ranks(values.to(ranks.device)).tolist()
        return value, jackknife(value, without, sizes) if self._has_band(sizes) else None

    def _has_band(self, sizes: Groups) -> bool:
        dimension, share = self.network.dimension, -(-GROUPS // self.ranks.world_size)
        return has_band(sizes, dimension) and share * dimension**3 <= BAND_WORK

    def _entry(
        self,
        value: float,
        band: float | None,
        nfe: int,
        decay: float,
        step: int,
        protocol: dict[str, Any],
        seconds: dict[str, float],
    ) -> dict[str, Any]:
        settings, count = self.config.eval, self.config.eval.training_samples
        return {
            "metrics": {self.name: value},
            "plus_minus_95": {} if band is None else {self.name: band},
            "in_training": True,
            "protocol": ADM.name,
            "nfe": nfe,
            **protocol,
            "labels": settings.labels,
            "seed": settings.training_seed,
            "ema": str(decay),
            "step": step,
            "num_samples": count,
            "resolution": self.resolution,
            "features": self.network.name,
            "features_sha256": self.network.sha256,
            "resize": self.network.resize,
            "vae_sha256": self.vae.sha256,
            "precision": self.precision,
            "block": BLOCK,
            "statistics": "streaming",
            **self.reference.provenance,
            "versions": environment(self.ranks.world_size),
            "device": device_name(self.ranks.device),
            "ranks": self.ranks.world_size,
            "seconds": {stage: round(taken, 3) for stage, taken in seconds.items()},
            "warnings": warnings_of(count, self.resolution, self.network, self.reference, settings.labels, Settings()),
        }
