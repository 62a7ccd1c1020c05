"""Trains a MeanFlow model from a config file. The same command resumes from the newest checkpoint.

    python -m mf_dist.train configs/digits_cpu.yaml
    python -m mf_dist.train configs/imagenet256_xl2.yaml --dry-run
    torchrun --nproc_per_node=8 -m mf_dist.train configs/imagenet256_xl2.yaml train.micro_batch=32 log.wandb=online

section.key=value overrides any config value.
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
    """The config completed from the dataset. Raises UserError if the two disagree, or if needs_data and there is no
    dataset."""
    manifest = read_manifest(config.data.path)
    resolved = resolve(config, manifest, world_size)
    if needs_data and manifest is None:
        raise UserError(f"no finished dataset at {config.data.path!r}; run tools/encode_latents.py first")
    return resolved


def _record_refusal(config: Config, error: UserError) -> None:
    """For the launcher."""
    Status(Path(config.run_dir)).refuse(str(error), has_begun=False)


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mf_dist.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", help="YAML file, e.g. configs/digits_cpu.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. optim.lr=2e-4")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and its cost, then exit")
    parser.add_argument(
        "--allow-config-change",
        action="store_true",
        help="resume even if settings that affect training differ from the checkpoint's; lists them",
    )
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    launched = rank_from_environment()
    try:
        config = check(config, launched.world_size, needs_data=not args.dry_run)
    except UserError as error:
        if launched.rank == 0 and not args.dry_run:
            _record_refusal(config, error)
        raise
    if args.dry_run:
        print(describe(config, launched.world_size))
        return
    record_signals()
    # torch and deepspeed are imported only once the config is valid
    from mf_dist.fault_tolerance.watchdog import process_group_timeout
    from mf_dist.runtime.compiler import require_compiler
    from mf_dist.runtime.distributed import process_group, raise_on_all_ranks

    with process_group(process_group_timeout(config.train.hang_seconds)) as ranks:
        if config.engine.compile:
            try:
                with raise_on_all_ranks(ranks):
                    if ranks.is_local_rank_zero:
                        require_compiler(ranks.device, "set engine.compile=false")
            except UserError as error:
                if ranks.is_rank_zero:
                    _record_refusal(config, error)
                raise
        from mf_dist.training.trainer import Trainer  # deepspeed takes seconds

        Trainer(config, ranks, args.allow_config_change).run()


if __name__ == "__main__":
    exit_without_finalization(main())
