"""Measures a trained model's samples, or any set of images, against real ones.

    python tools/fid_eval.py --nfe 1                                  # the newest run under runs/
    python tools/fid_eval.py --checkpoint runs/imagenet256_xl2 --nfe 1,2 --reference adm_in256.npz \\
        --inception-weights weights-inception-2015-12-05-6726825d.pth
    torchrun --nproc_per_node=8 tools/fid_eval.py ...                 # the same numbers, to the last bit
    python tools/fid_eval.py --checkpoint runs/digits --times 1,0.6,0 --save-npz
    python tools/fid_eval.py --checkpoint runs/a --nfe 1 --repeats 3 --against runs/b
    python tools/fid_eval.py --checkpoint runs/imf_xl2 --protocol imf-jax --reference imagenet_256_fid_stats.npz ...
    python tools/fid_eval.py --sweep guidance=2:12:1 --sweep-samples 5000 --interval 0,1 --interval 0.4,0.65
    python tools/fid_eval.py --images samples.npz --features efflite0 --reference photos/ --resolution 256 --out OUT

Writes OUT/metrics.json (an entry per protocol), and for a model OUT/grid_nfeK.png, OUT/grid_steps.png (1, 2 and 4 steps
side by side) and OUT/neighbours_nfeK.png (samples beside their nearest real images); with --save-npz
OUT/samples_nfeK.npz (ADM's layout). With --sweep only the Frechet distance is measured, at each scale of guidance in
each --interval for each --nfe. Options not given come from --protocol, else from the run's config. After a kill, the
same command continues where it stopped, with any number of processes. docs/evaluation.md explains the numbers.
"""

import argparse
import contextlib
import os
import sys
from itertools import pairwise
from pathlib import Path

from mf_dist.evaluation.protocols import ADM, COUNT, PROTOCOLS
from mf_dist.evaluation.sweep import scales_of
from mf_dist.fault_tolerance.tool_status import reports_status
from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.paths import expanded, expanded_path
from mf_dist.sampling.options import add_sampling_options

MODEL_ONLY = (
    "checkpoint",
    "nfe",
    "times",
    "sampler",
    "guidance",
    "interval",
    "sweep",
    "sweep_samples",
    "num_samples",
    "labels",
    "seed",
    "repeats",
    "ema",
    "vae",
    "precision",
    "compile",
    "save_npz",
    "save_images",
)
NOT_IN_SWEEPS = ("times", "guidance", "num_samples", "metrics", "save_npz", "save_images", "repeats", "against")
SWEEP_SAMPLES = 5000
MEASURED = ("metrics", "plus_minus_95")
GRID_STEPS = [1, 2, 4]
KINDS = ("fid", "sfid", "is", "pr", "kid")


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        type=expanded_path,
        help="folder of a run, checkpoint or model (default: the newest run under runs/)",
    )
    add("--images", type=expanded, help="measure these images instead of a model: folder, .tar, or .npz with arr_0")
    add("--nfe", help="network calls per image, such as 1 or 1,2,4 (default: the run's eval.nfe)")
    add("--times", help="one time grid instead of --nfe, from 1 down to 0, such as 1,0.6,0")
    add_sampling_options(parser, "append")
    add(
        "--sweep",
        type=scales_of,
        metavar="guidance=GRID",
        help="measure a grid of scales, START:STOP:STEP (both ends included) or A,B,..., in each --interval, of which "
        "several may be given",
    )
    add("--sweep-samples", type=int, help=f"images to generate for each point of a sweep (default {SWEEP_SAMPLES})")
    add("--num-samples", type=int, help="images to generate (default: the run's, 50000)")
    add("--labels", choices=("random", "balanced"), help="default: the run's, random")
    add("--seed", type=int, help="of noise and labels (default: the run's eval.seed, 0; in a sweep training_seed)")
    add("--repeats", type=int, metavar="N", help="measure N seeds, from --seed on, and record their mean (default 1)")
    add(
        "--protocol",
        choices=tuple(PROTOCOLS),
        help="whose published numbers this one is to be compared with: labels, number of images, rounding, reference "
        "(default: adm, with the run's labels and number of images)",
    )
    add(
        "--against",
        type=expanded_path,
        metavar="RUN",
        help="also say whether the distance differs from that of a run, or of a metrics.json, by more than noise",
    )
    add("--ema", help="decay of the EMA to sample from (default: the run's first)")
    add(
        "--features",
        type=expanded,
        help="inception, inception-other, inception-random, dinov2-l, dinov2-l-other, efflite0, or a folder (default: "
        "the run's)",
    )
    add(
        *("--inception-weights", "--feature-weights"),
        type=expanded,
        help="file of the weights of Inception, or of DINOv2 with --features dinov2-l",
    )
    add("--reference", type=expanded, help=".npz of statistics, or real images: folder, .tar, .npz")
    add("--metrics", help="some of fid,sfid,is,pr,kid (default: all that features and reference allow)")
    add(
        "--statistics",
        choices=("exact", "streaming"),
        default="exact",
        help="exact: the same bits for any number of processes; streaming: each sums its share, equal to 1e-9 "
        "(default exact)",
    )
    add("--resolution", type=int, help="centre crop of --images and of real images (default: as they are)")
    add("--vae", type=expanded, help="folder or hub id of the VAE (default: the one the latents were made with)")
    add(
        "--precision",
        choices=("fp32", "tf32", "bf16"),
        help="precision of sampling and decoding (default: tf32 on a GPU)",
    )
    add("--block", type=int, default=50, help="images computed together (default 50); can change last bits")
    add("--compile", action="store_true", help="torch.compile the network and the decoder")
    add("--out", type=expanded_path, help="folder for the results (default: eval/ in the run folder)")
    add("--save-images", type=int, metavar="N", help="also write the first N samples as PNG")
    add("--save-npz", action="store_true", help="also write all samples as .npz for ADM's evaluator")
    add(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="reuse the finished blocks of an earlier, identical evaluation (default), or compute all again",
    )
    args = parser.parse_args()
    check(args)
    return args


def check(args):
    """Raises UserError on mistakes that show without loading anything."""
    if args.images:
        refuse(args, MODEL_ONLY, "--images measures all of a set of images")
        if not (args.features and args.reference and args.out):
            raise UserError("--images needs --features, --reference and --out")
    if args.sweep:
        refuse(args, NOT_IN_SWEEPS, "--sweep measures the Frechet distance alone, of --sweep-samples at each scale")
    elif args.sweep_samples or len(args.interval or []) > 1:
        raise UserError("--sweep-samples, and more than one --interval, are for --sweep")
    if args.nfe and args.times:
        raise UserError("--nfe and --times exclude each other: --times is a grid of its own")
    limits = ("num_samples", 2, 10_000_000), ("seed", 0, 2**63 - 1), ("block", 1, 10_000), ("resolution", 8, 4096)
    limits = *limits, ("repeats", 1, 1000)
    for name, low, high in (*limits, ("sweep_samples", 2, 10_000_000), ("save_images", 1, 10_000_000)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} must be from {low} to {high}, got {value}")
    args.nfe = [whole(text) for text in args.nfe.split(",")] if args.nfe else None
    args.times = [number(text) for text in args.times.split(",")] if args.times else None
    if args.times and not (args.times[0] == 1 and args.times[-1] == 0 and all(t > r for t, r in pairwise(args.times))):
        raise UserError("--times must fall from 1 to 0, such as 1,0.6,0")
    args.metrics = tuple(args.metrics.split(",")) if args.metrics else None
    for kind in args.metrics or ():
        if kind not in KINDS:
            raise UserError(f"--metrics {kind!r}: expected some of {','.join(KINDS)}")
    if args.sweep:
        args.metrics, args.num_samples = ("fid",), args.sweep_samples or SWEEP_SAMPLES
    if args.against and args.metrics and "fid" not in args.metrics:
        raise UserError("--against compares Frechet distances: add fid to --metrics")


def refuse(args, names, reason):
    for name in names:
        if getattr(args, name) is not None and getattr(args, name) is not False:
            raise UserError(f"{reason}: leave out --{name.replace('_', '-')}")


def whole(text):
    if not text.isdecimal() or not 1 <= int(text) <= 10_000:
        raise UserError(f"--nfe must be from 1 to 10000, got {text}")
    return int(text)


def number(text):
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--times: {text!r} is not a number") from None


def settings_of(args):
    from mf_dist.evaluation.measure import Settings

    requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"  # a requeued job continues with its own blocks
    return Settings(
        *(args.metrics, args.statistics == "exact", args.block, args.resume or requeued),
        with_band=not args.sweep,
        protocol=PROTOCOLS[args.protocol] if args.protocol else ADM,
        is_named=args.protocol is not None,
    )


def measure_images(args, ranks):
    from mf_dist.evaluation.features import open_features
    from mf_dist.evaluation.measure import images_for, measure, open_reference
    from mf_dist.runtime.distributed import raise_on_all_ranks

    settings, work = settings_of(args), args.out / "work"
    if args.protocol:
        announce(settings.protocol, ranks)
    with raise_on_all_ranks(ranks):
        network = open_features(args.features, args.inception_weights, ranks.device)
        images = images_for(network, args.images, args.resolution, ranks, [work])
    reference = open_reference(args.reference, network, args.resolution, settings, ranks, work)
    protocol = {"images": args.images}
    other = find_other(args, images, protocol, network, reference, settings, ranks)
    measured = measure(images, "images", network, reference, settings, protocol, ranks, work)
    with raise_on_all_ranks(ranks):
        if ranks.is_rank_zero:
            finish(args, measured.entry, args.out)
            compare(measured.entry, other)
            show_neighbours(images, measured.blocks, reference, args.out / "neighbours.png")
            clear(args.out, measured.blocks, reference.blocks)


def measure_model(args, ranks):
    from mf_dist.evaluation.measure import open_reference
    from mf_dist.objectives.sampler import uniform_grid
    from mf_dist.runtime.distributed import raise_on_all_ranks

    with raise_on_all_ranks(ranks):
        trained, network = load(args, ranks)
    out = args.out
    side = args.resolution or trained.generator.resolution
    grids = [args.times] if args.times else [uniform_grid(nfe) for nfe in args.nfe or trained.config.eval.nfe]
    written = [out / name for times in grids for name in names_of(args, times)[1:]]
    settings = settings_of(args)
    reference = open_reference(args.reference, network, side, settings, ranks, out / "work", outputs=written)
    for times in grids if ranks.is_rank_zero else []:
        if warning := trained.generator.warning_of_few_steps(len(times) - 1):
            print(warning, file=sys.stderr, flush=True)
    blocks, sources = [], [samples_of(args, trained, times, args.seed) for times in grids]
    others = [find_other(args, *source, network, reference, settings, ranks) for source in sources]
    for times, source, other in zip(grids, sources, others, strict=True):
        entry, finished = measure_times(args, trained, source, network, reference, ranks, out)
        blocks.append(finished)
        if args.repeats > 1:
            entry = measure_seeds(args, trained, times, entry, network, reference, settings, ranks)
        if ranks.is_rank_zero:
            compare(entry, other)
    with raise_on_all_ranks(ranks):
        if ranks.is_rank_zero:
            steps = GRID_STEPS if not trained.generator.is_flow else [len(times) - 1 for times in grids]
            trained.generator.grid(steps, args.seed, out / "grid_steps.png", trained.class_names)
            clear(out, *blocks, reference.blocks)  # last, so that a job requeued at the last grid keeps the others


def measure_seeds(args, trained, times, entry, network, reference, settings, ranks):
    """Measures the other seeds of --repeats, unless metrics.json has them, and returns the summary of all. entry: that
    of the first."""
    from mf_dist.evaluation.comparison import summary
    from mf_dist.evaluation.measure import computed_by, protocol_of
    from mf_dist.evaluation.report import recorded
    from mf_dist.runtime.distributed import broadcast_int, raise_on_all_ranks

    entries = [entry]
    for seed in range(args.seed + 1, args.seed + args.repeats):
        source, found = samples_of(args, trained, times, seed), None
        with raise_on_all_ranks(ranks):
            if ranks.is_rank_zero and settings.resume:
                protocol = protocol_of(*source, network, reference, settings)
                found = recorded(protocol, computed_by(ranks), args.out)
                if found and any(not entry[key].keys() <= found.get(key, {}).keys() for key in MEASURED):
                    found = None  # measured with fewer metrics, or without bands
        if not broadcast_int(int(found is not None), ranks.device):
            name = f"nfe{len(times) - 1}_seed{seed}"
            found = measure_and_remove(args, *source, name, network, reference, settings, ranks)
        entries.append(found)
    with raise_on_all_ranks(ranks):
        if ranks.is_rank_zero:
            finish(args, summary(entries), args.out)
            return summary(entries)
    return {}


def find_other(args, samples, made, network, reference, settings, ranks):
    """The entry that --against names, on rank 0, before anything is measured; None without --against."""
    from mf_dist.evaluation.comparison import entry_against
    from mf_dist.evaluation.confidence import MIN_COUNT, allows_band
    from mf_dist.evaluation.measure import protocol_of
    from mf_dist.evaluation.metrics import metric_name
    from mf_dist.runtime.distributed import raise_on_all_ranks

    with raise_on_all_ranks(ranks):
        if args.against is None or not ranks.is_rank_zero:
            return None
        wanted = protocol_of(samples, made, network, reference, settings)
        metric = metric_name("fid", network, samples.count)
        if not allows_band(samples.count, samples.cycle):
            few = f"fewer than {MIN_COUNT} images, or fewer than the classes of balanced ones, have none"
            raise UserError(f"--against needs the band of {metric}: {few}")
        return entry_against(args.against, wanted, metric), metric


def compare(entry, other):
    from mf_dist.evaluation.comparison import verdict

    if other is not None:
        print(f"  {verdict(entry, *other)}", flush=True)


def measure_sweep(args, ranks):
    """Measures every point of a sweep that metrics.json does not have, and prints them all, and the best."""
    from mf_dist.evaluation.measure import computed_by, open_reference, protocol_of
    from mf_dist.evaluation.metrics import metric_name
    from mf_dist.evaluation.report import recorded
    from mf_dist.evaluation.sweep import HEADS, points_of
    from mf_dist.runtime.distributed import broadcast_int, raise_on_all_ranks
    from mf_dist.runtime.progress import progress

    with raise_on_all_ranks(ranks):
        trained, network = load(args, ranks)
    settings, side = settings_of(args), args.resolution or trained.generator.resolution
    reference = open_reference(args.reference, network, side, settings, ranks, args.out / "work")
    intervals = args.interval or [trained.generator.guidance[1:]]
    points, entries = points_of(args.nfe or trained.config.eval.nfe, intervals, args.sweep), {}
    with raise_on_all_ranks(ranks):
        for point in points if ranks.is_rank_zero and settings.resume else []:
            protocol = protocol_of(*point_source(args, trained, point), network, reference, settings)
            if entry := recorded(protocol, computed_by(ranks), args.out):
                entries[point] = entry
    missing = [point for point in points if not broadcast_int(int(point in entries), ranks.device)]
    metric = metric_name("fid", network, args.num_samples)
    if ranks.is_rank_zero:
        print(HEADS + metric, flush=True)
    with progress(len(missing), "point", "sweep", ranks.is_rank_zero and bool(missing)) as bar:
        for point in points:
            if point in missing:
                source = point_source(args, trained, point)
                entries[point] = measure_and_remove(args, *source, point.name, network, reference, settings, ranks)
                bar.update()
            if ranks.is_rank_zero:
                bar.write(point.row(f"{entries[point]['metrics'][metric]:.6g}"))
                sys.stdout.flush()
    with raise_on_all_ranks(ranks):
        if ranks.is_rank_zero:
            show_best(args, entries, metric)
            clear(args.out, reference.blocks)


def point_source(args, trained, point):
    """The samples of one point of a sweep, and how they are made. Those of an earlier point are no longer valid."""
    from mf_dist.objectives.sampler import uniform_grid

    trained.generator.guidance = (point.scale, *point.interval)
    samples, protocol = samples_of(args, trained, uniform_grid(point.nfe), args.seed)
    return samples, {**protocol, "sweep": True}


def measure_and_remove(args, samples, made, name, network, reference, settings, ranks):
    """The entry of samples that need no pictures, on rank 0 (else empty); their blocks are removed."""
    from mf_dist.evaluation.measure import measure
    from mf_dist.runtime.distributed import raise_on_all_ranks

    measured = measure(samples, name, network, reference, settings, made, ranks, args.out / "work")
    with raise_on_all_ranks(ranks):
        if ranks.is_rank_zero:
            measured.blocks.remove()  # before it is recorded: afterwards nothing would look for them
            save(args, measured.entry, args.out)
    return measured.entry


def show_best(args, entries, metric):
    from mf_dist.evaluation.sweep import best_of

    distances = {point: entry["metrics"][metric] for point, entry in entries.items()}
    for point in best_of(distances):
        print(f"  best: {metric} {distances[point]:.6g}, with {point.options}")
    for warning in dict.fromkeys(warning for entry in entries.values() for warning in entry["warnings"]):
        print(f"  warning: {warning}")
    print(f"  written to {args.out / 'metrics.json'}", flush=True)


def load(args, ranks):
    """The trained model and the feature network; fills in options not given from the run and its config."""
    from mf_dist.checkpoint.reader import find_checkpoint
    from mf_dist.checkpoint.runs import evaluation_folder, newest_run
    from mf_dist.evaluation.features import WITH_WEIGHTS, open_features
    from mf_dist.sampling.generator import load_trained_model

    checkpoint = find_checkpoint(args.checkpoint or newest_run(Path("runs")))
    args.out = args.out or evaluation_folder(checkpoint)
    if args.out is None:
        raise UserError(
            f"{checkpoint.folder} is not in the folder checkpoints/ of a run: give --out FOLDER for results"
        )
    if ranks.is_rank_zero:
        print(f"evaluating {checkpoint.folder}\nresults go to {args.out}", flush=True)
    precision = args.precision or ("tf32" if ranks.device.type == "cuda" else "fp32")
    trained = load_trained_model(
        *(checkpoint, args.ema, args.vae, ranks.device, precision, args.compile),
        *(args.sampler, args.guidance, args.interval[0] if args.interval and not args.sweep else None),
    )
    if args.protocol:
        apply_protocol(args, trained.generator, ranks)
    args.repeats = args.repeats or 1
    if args.sweep and trained.generator.guidance is None:
        network = f"model.network={trained.config.model.network}"
        raise UserError(
            f"{checkpoint.folder} has a network without guidance as an input ({network}): leave out --sweep"
        )
    if args.sweep and args.seed is None:
        args.seed = trained.config.eval.training_seed  # not to choose by the noise of the evaluation
    defaults = ["features", "reference", "num_samples", "labels", "seed"]
    if (args.features or trained.config.eval.features) in WITH_WEIGHTS:  # other networks refuse them
        defaults.append("inception_weights")
    for name in defaults:
        if getattr(args, name) is None:
            setattr(args, name, getattr(trained.config.eval, name))
    chosen = trained.config.eval.training_seed
    if ranks.is_rank_zero and not args.sweep and args.seed <= chosen < args.seed + args.repeats:
        text = "checkpoints or guidance may have been chosen by its noise; take others by --seed"
        print(f"warning: seed {chosen} is eval.training_seed: {text}", file=sys.stderr, flush=True)
    if args.reference is None:
        raise UserError("the run's config has no eval.reference; give --reference")
    return trained, open_features(args.features, args.inception_weights, ranks.device)


def apply_protocol(args, generator, ranks):
    """Options not given become the protocol's."""
    protocol = PROTOCOLS[args.protocol]
    generator.truncates = protocol.truncates
    args.num_samples, args.labels = args.num_samples or COUNT, args.labels or protocol.labels
    args.repeats = args.repeats or (1 if args.sweep else protocol.seeds)
    announce(protocol, ranks)


def announce(protocol, ranks):
    if ranks.is_rank_zero:
        print(f"protocol {protocol}", flush=True)


def names_of(args, times):
    """How files of one time grid are named: its part of a name, the folder of --save-images, the file of --save-npz."""
    name = f"nfe{len(times) - 1}" + ("_times" if args.times else "")
    return name, f"images_{name}", f"samples_{name}.npz"


def samples_of(args, trained, times, seed):
    """Samples in one time grid, and how they are made, for their entry."""
    from mf_dist.sampling.generator import Samples

    generator, checkpoint = trained.generator, trained.checkpoint
    made_by = {"checkpoint_sha256": checkpoint.sha256, "ema": trained.ema_decay, "compiled": args.compile}
    protocol = {
        "nfe": len(times) - 1,
        "times": times,
        **generator.protocol,
        "labels": args.labels,
        "seed": seed,
        **made_by,
        "checkpoint": str(checkpoint.folder),
        "step": checkpoint.step,
        "samples_seen": checkpoint.samples_seen,
        "precision": generator.precision,
        "vae": generator.vae.source,
        "vae_sha256": generator.vae.sha256,
    }
    return Samples(generator, args.num_samples, times, args.labels, seed, made_by), protocol


def measure_times(args, trained, source, network, reference, ranks, out):
    """Measures one time grid, with its pictures, and returns its entry, on rank 0 (else empty), and its blocks."""
    from mf_dist.evaluation.measure import measure
    from mf_dist.runtime.distributed import raise_on_all_ranks

    samples, made = source
    keep, work, settings = args.save_npz or bool(args.save_images), out / "work", settings_of(args)
    name = f"nfe{len(samples.times) - 1}"
    measured = measure(samples, name, network, reference, settings, made, ranks, work, keep)
    with raise_on_all_ranks(ranks):
        if ranks.is_rank_zero:
            finish(args, measured.entry, out)
            save_all(args, trained, samples, measured.blocks, reference, out)
    return measured.entry, measured.blocks


def save_all(args, trained, samples, blocks, reference, out):
    """Writes the pictures and image files of one time grid."""
    from mf_dist.evaluation.report import save_images, save_npz

    nfe = len(samples.times) - 1
    name, folder, npz = names_of(args, samples.times)
    trained.generator.grid([nfe], args.seed, out / f"grid_{name}.png", trained.class_names, times=args.times)
    show_neighbours(samples, blocks, reference, out / f"neighbours_{name}.png")
    if args.save_npz:
        save_npz(blocks, out / npz)
    if args.save_images:
        save_images(blocks, args.save_images, out / folder)


def show_neighbours(source, blocks, reference, path):
    from mf_dist.evaluation.pictures import save_neighbours

    why_not = save_neighbours(source, blocks, reference, path)
    if why_not:
        print(f"  no {path.name}: {why_not}", flush=True)


def clear(out, *finished):
    """Removes the blocks, needed only for the record and the pictures."""
    for blocks in finished:
        if blocks is not None:
            blocks.remove()
    with contextlib.suppress(OSError):  # another evaluation may have unfinished blocks there
        (out / "work").rmdir()


def finish(args, entry, out):
    from mf_dist.evaluation.report import table

    path = save(args, entry, out)
    print(table(entry) + f"\n  written to {path}", flush=True)


def save(args, entry, out):
    from mf_dist.evaluation.report import record

    entry["arguments"] = {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()}
    return record(entry, out)


@command_line
@reports_status
def main() -> None:
    args = parse()
    from mf_dist.runtime.compiler import require_compiler
    from mf_dist.runtime.distributed import process_group, raise_on_all_ranks

    with process_group() as ranks:
        with raise_on_all_ranks(ranks):
            if args.compile and ranks.is_local_rank_zero:
                require_compiler(ranks.device, "leave out --compile")
        measure = measure_images if args.images else measure_sweep if args.sweep else measure_model
        measure(args, ranks)


if __name__ == "__main__":
    sys.exit(main())
