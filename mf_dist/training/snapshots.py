"""Outputs of the EMAs during training: grids of samples, and distances to real images."""

import time
from pathlib import Path
from typing import Any

from mf_dist.config.schema import Config
from mf_dist.models.network import Network
from mf_dist.runtime.distributed import Ranks, raise_on_all_ranks
from mf_dist.sampling.generator import ImageGenerator, sampling_network
from mf_dist.training.engine import Engine
from mf_dist.training.logger import Logger
from mf_dist.training.resume import measured_ema_decays
from mf_dist.vae import Vae


class Snapshots:
    """Loads everything that drawing and measuring need before training, so that missing files are found early."""

    def __init__(self, config: Config, manifest: dict[str, Any], ranks: Ranks) -> None:
        self.config, self.classes = config, manifest["classes"]
        self.evaluation, self.vae = None, None
        if config.eval.every_images:
            from mf_dist.evaluation.during import TrainingEvaluation  # its libraries take seconds to import

            self.evaluation = TrainingEvaluation(config, manifest, ranks)
            self.vae = self.evaluation.vae
        elif config.log.sample_every_images:
            with raise_on_all_ranks(ranks):
                if ranks.is_rank_zero:
                    self.vae = Vae(config.eval.vae or manifest["vae"]["source"], ranks.device, manifest["vae"])
        self.ranks = ranks

    def draw(self, engine: Engine, step: int, logger: Logger | None) -> None:
        """Draws a grid of samples of the first EMA into RUN/samples. Rank 0 draws, but every rank must call: the EMA is
        gathered."""
        decay = self.config.optim.ema_decay[0]
        ema = engine.ema(decay)
        if logger is None:
            return
        assert self.vae is not None
        net = sampling_network(self.config.model, ema, f"the EMA of decay {decay}")
        self._draw_grid(net, self.vae, step, logger)

    def _draw_grid(self, net: Network, vae: Vae, step: int, logger: Logger) -> None:
        generator = ImageGenerator(net, vae, self.config, self.ranks.device)
        path = Path(self.config.run_dir) / "samples" / f"step{step:08d}.png"
        options = self.config.eval
        try:
            generator.grid(list(options.grid_nfe), options.seed, path, self.classes)
        except OSError as error:
            logger.info(f"warning: cannot write {path}: {error}; training continues")
            return
        logger.log_picture("samples", path, step)

    def measure(self, engine: Engine, step: int, logger: Logger | None, samples_seen: int) -> None:
        """Logs the distances of the measured EMAs and the seconds that training waited. All ranks share the work."""
        assert self.evaluation is not None
        start = time.perf_counter()
        values: dict[str, Any] = {"step": step, "samples_seen": samples_seen}
        for decay in measured_ema_decays(self.config):
            values |= self.evaluation.measure(engine.ema(decay), decay, step, samples_seen)
            if logger is not None:
                for problem in self.evaluation.problems:
                    logger.info(problem)
        values["evaluation_seconds"] = round(time.perf_counter() - start, 3)
        if logger is not None:
            logger.log_evaluation(values)
