"""Trains a MeanFlow model from a config file; the same command goes on where it stopped.

    python -m mf_dist.train configs/digits_cpu.yaml
    python -m mf_dist.train configs/imagenet256_xl2.yaml --dry-run
    torchrun --nproc_per_node=8 -m mf_dist.train configs/imagenet256_xl2.yaml train.micro_batch=32 log.wandb=online

Anything in the config can be overridden by section.key=value.
"""

import argparse
from pathlib import Path

from mf_dist.config.cost import describe
from mf_dist.config.schema import Config, load_config, resolve
from mf_dist.data.shards import read_manifest
from mf_dist.fault_tolerance.status import Status
from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.launch import exit_without_finalization, rank_from_environment, record_signals


def check(config: Config, world_size: int, needs_data: bool) -> Config:
    """The config filled in from the dataset; UserError where they do not fit or there is none."""
    manifest = read_manifest(config.data.path)
    resolved = resolve(config, manifest, world_size)
    if needs_data and manifest is None:
        raise UserError(f"no finished dataset at {config.data.path!r}; run tools/encode_latents.py first")
    return resolved


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mf_dist.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", help="YAML file, such as configs/digits_cpu.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as optim.lr=2e-4")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and its cost, and stop")
    parser.add_argument(
        "--allow-config-change", action="store_true", help="resume although what is trained changed (it says what)"
    )
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    place = rank_from_environment()
    try:
        config = check(config, place.world_size, needs_data=not args.dry_run)
    except UserError as error:
        if place.rank == 0 and not args.dry_run:
            Status(Path(config.run_dir)).refuse(str(error), has_begun=False)  # which a launcher reads
        raise
    if args.dry_run:
        print(describe(config, place.world_size))
        return
    record_signals()
    from mf_dist.fault_tolerance.watchdog import process_group_timeout
    from mf_dist.runtime.distributed import (
        process_group,  # torch and deepspeed only now that the config is known to be good
    )
    from mf_dist.training.trainer import Trainer

    with process_group(process_group_timeout(config.train.hang_seconds)) as ranks:
        Trainer(config, ranks, args.allow_config_change).run()


if __name__ == "__main__":
    exit_without_finalization(main())
