"""Lists, checks, compares, prunes and exports checkpoints.

    python tools/checkpoint.py ls runs/digits                       # list them, newest last
    python tools/checkpoint.py verify runs/digits                   # check every byte; exit 1 if one is bad
    python tools/checkpoint.py diff runs/a runs/b                   # config and tensors; exit 1 if they differ
    python tools/checkpoint.py prune runs/digits --keep 1           # delete older ones; --dry-run only lists them
    python tools/checkpoint.py export runs/digits --out model       # the EMA with all that sampling needs: a folder
    python tools/sample.py --checkpoint model
    python tools/checkpoint.py export runs/digits --out model.safetensors       # or in one file, without a model card

diff and export take a run folder as its newest valid checkpoint. Exit code 2: a usage error.
"""

import argparse
import json
import os
import shutil
import sys

from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.figures import three_digits
from mf_dist.runtime.outputs import refuse_inside
from mf_dist.runtime.paths import expanded, expanded_path


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ls", help="list a run's checkpoints").add_argument("run", type=expanded_path)
    verify = commands.add_parser("verify", help="check every byte against the manifest")
    verify.add_argument("path", type=expanded_path, help="run or checkpoint folder")
    diff = commands.add_parser("diff", help="compare two checkpoints")
    diff.add_argument("a", type=expanded_path)
    diff.add_argument("b", type=expanded_path)
    prune = commands.add_parser("prune", help="delete older checkpoints")
    prune.add_argument("run", type=expanded_path)
    prune.add_argument("--keep", type=int, required=True, help="newest valid ones to keep, at least 1")
    prune.add_argument(
        "--keep-every-images", type=int, default=0, help="also keep those that passed a multiple of this"
    )
    prune.add_argument(
        "--keep-best", help="also keep the lowest in this metric of eval/metrics.json, of the run's first measured EMA"
    )
    prune.add_argument("--dry-run", action="store_true", help="print what would be deleted, delete nothing")
    export = commands.add_parser("export", help="write the EMA as a model folder, or as one file")
    export.add_argument("path", type=expanded_path, help="run or checkpoint folder")
    export.add_argument(
        "--out", type=expanded_path, required=True, help="new folder, or file name ending in .safetensors"
    )
    export.add_argument("--ema", help="decay (default: the run's first)")
    export.add_argument(
        "--with-vae",
        type=expanded,
        nargs="?",
        const="",
        metavar="VAE",
        help="copy the VAE into the folder, too; VAE: folder or hub id (default: where sampling looks for it)",
    )
    return parser.parse_args()


def folders(path):
    """[path] if it is a checkpoint's folder, else all checkpoints of a run, oldest first."""
    from mf_dist.checkpoint.reader import checkpoint_folders, folder_of_checkpoints, number_of

    if (path / "manifest.json").is_file() or (number_of(path) >= 0 and path.is_dir()):
        return [path]
    found = checkpoint_folders(folder_of_checkpoints(path))
    if not found:
        raise UserError(f"no checkpoint in {str(path)!r} (expected a run folder or a checkpoint's folder)")
    return found


def ls(args):
    from mf_dist.checkpoint.reader import number_of

    print(f"{'step':>10}{'images':>14}{'GiB':>9}  EMAs")
    for folder in folders(args.run):
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            step, images = int(state["step"]), int(state["samples_seen"])
        except (OSError, ValueError, KeyError, TypeError):
            print(f"{folder.name}: damaged, see verify")
            continue
        size = sum(path.stat().st_size for path in folder.iterdir()) / 2**30
        emas = ", ".join(sorted(path.stem.removeprefix("ema-") for path in folder.glob("ema-*.safetensors")))
        name = "" if number_of(folder) == step else f"  in {folder.name}"
        print(f"{step:10}{images:14,}{three_digits(size):>9}  {emas}{name}")
    return 0


def verify(args):
    from mf_dist.checkpoint.reader import open_checkpoint

    bad = 0
    for folder in folders(args.path):
        try:
            open_checkpoint(folder)
            print(f"{folder}: valid")
        except UserError as error:
            bad += 1
            print(f"{folder}: DAMAGED: {error}")
    return 1 if bad else 0


def difference(a, b):
    """How two dicts of tensors differ, as text; empty if they are equal."""
    import torch

    unmatched = [name for name in sorted({*a, *b}) if name not in a or name not in b or a[name].shape != b[name].shape]
    if unmatched:
        return f"{unmatched[0]} is not in both with the same shape ({len(unmatched)} such tensors)"
    differing = [name for name in a if not torch.equal(a[name], b[name])]
    if not differing:
        return ""
    largest = max((a[name] - b[name]).abs().max().item() for name in differing)
    return f"{len(differing)} of {len(a)} tensors differ, by {largest:.3g} at most"


def diff(args):
    from mf_dist.checkpoint.reader import find_checkpoint
    from mf_dist.training.resume import differences

    a, b = find_checkpoint(args.a), find_checkpoint(args.b)
    lines = [f"{key}: {old} -> {new}" for key, (old, new) in differences(a.state, b.state).items()]
    for kind in sorted({*a.kinds(), *b.kinds()}):
        if kind not in a.kinds() or kind not in b.kinds():
            lines.append(f"{kind}: only in {(a if kind in a.kinds() else b).folder}")
            continue
        line = difference(a.load(kind), b.load(kind))
        lines += [f"{kind}: {line}"] if line else []
    print("\n".join(lines) or "the same")
    return 1 if lines else 0


def prune(args):
    from mf_dist.checkpoint.reader import number_of, open_checkpoint
    from mf_dist.checkpoint.writer import Retention, remove_checkpoint
    from mf_dist.config.loader import from_tree
    from mf_dist.config.schema import Config
    from mf_dist.training.resume import measured_ema_decays

    if args.keep < 1:
        raise UserError(f"--keep must be at least 1, got {args.keep}: one valid checkpoint always stays")
    valid = []
    for folder in folders(args.run):
        try:
            valid.append(open_checkpoint(folder))
        except UserError as error:
            print(f"{folder}: left alone, DAMAGED: {error}")
    if not valid:
        raise UserError(f"{args.run} has no valid checkpoint: nothing is deleted")
    config = from_tree(Config, valid[-1].state["config"], f"{valid[-1].folder}/state.json")
    ema = str(measured_ema_decays(config)[0])
    rules = Retention(args.keep, args.keep_every_images, args.keep_best, args.run / "eval/metrics.json", ema)
    if args.keep_best and not rules.scores():
        raise UserError(f"--keep-best {args.keep_best}: {rules.metrics} has no value of that metric for EMA {ema}")
    named = [checkpoint.folder for checkpoint in valid if number_of(checkpoint.folder) == checkpoint.step]
    for folder in sorted({checkpoint.folder for checkpoint in valid} - {*named}):
        print(f"{folder}: left alone, a person gave it its name")
    for folder in rules.removable(named):
        print(f"{'would delete' if args.dry_run else 'deleting'} {folder}")
        if not args.dry_run:
            remove_checkpoint(folder)
            if folder.exists():
                raise UserError(f"cannot delete {folder}; is {folder.parent} writable?")
    return 0


def export(args):
    from mf_dist.checkpoint.model_folder import refuse_unless_new
    from mf_dist.checkpoint.reader import find_checkpoint
    from mf_dist.training.resume import first_ema_decay

    is_file = args.out.suffix == ".safetensors"
    if is_file and args.with_vae is not None:
        raise UserError("--with-vae needs a folder as --out, a .safetensors file holds the EMA alone")
    if is_file and args.out.exists():
        raise UserError(f"{args.out} exists; remove it, or choose another name")
    if not is_file and args.out.suffix in (".pt", ".pth", ".ckpt", ".bin"):
        raise UserError(f"--out {str(args.out)!r} must be a folder, or a file name ending in .safetensors")
    if not is_file:
        refuse_unless_new(args.out)
    checkpoint = find_checkpoint(args.path)
    refuse_inside([args.out], checkpoint.folder)
    decay = args.ema or first_ema_decay(checkpoint)
    if decay not in checkpoint.ema_decays():
        raise UserError(f"{checkpoint.folder} has no EMA of decay {decay}; it has {', '.join(checkpoint.ema_decays())}")
    (export_file if is_file else export_folder)(args, checkpoint, decay)
    print(f"{args.out}: EMA of decay {decay} of {checkpoint.folder}")
    return 0


def export_file(args, checkpoint, decay):
    from mf_dist.checkpoint.writer import write_tensors

    partial = args.out.with_name(f"{args.out.name}.{os.getpid()}.tmp")
    try:
        description = {"kind": f"ema-{decay}", "state": {**checkpoint.state, "ema": decay}}
        write_tensors(partial, checkpoint.load(f"ema-{decay}"), description)
        partial.replace(args.out)
    finally:
        partial.unlink(missing_ok=True)


def export_folder(args, checkpoint, decay):
    from mf_dist.checkpoint.model_folder import new_folder, write_model
    from mf_dist.checkpoint.reader import MODEL_VAE
    from mf_dist.report.model_card import model_card
    from mf_dist.runtime.atomic_files import write_json

    state = {**checkpoint.state, "ema": decay}
    vae = None if args.with_vae is None else verified_vae(checkpoint, args.with_vae)
    entries, picture = measurements_of(checkpoint, decay), picture_of(checkpoint, decay)
    origin = f"These are the weights of step {checkpoint.step:,} of a run of mf_dist, their EMA of decay {decay}."
    if source := state.get("imported"):
        origin = f"Imported from `{source['file']}` (sha256 {source['sha256']}) of github.com/{source['from']}."
    with new_folder(args.out) as folder:
        write_model(folder, checkpoint.load(f"ema-{decay}"), state)
        if vae:
            vae.copy_files(folder / MODEL_VAE)
        if entries:
            write_json(folder / "metrics.json", entries)
        if picture:
            shutil.copyfile(picture, folder / "samples.png")
        card = model_card(args.out.absolute().name, state, origin, entries, "samples.png" if picture else None)
        (folder / "README.md").write_text(card, encoding="utf-8")


def verified_vae(checkpoint, source):
    """The VAE that made the checkpoint's latents; source: where it is, empty for where sampling looks."""
    import torch

    from mf_dist.vae import Vae

    recorded = checkpoint.state["config"]["eval"].get("vae") or checkpoint.state["vae"]["source"]
    return Vae(source or str(checkpoint.vae_folder or recorded), torch.device("cpu"), checkpoint.state["vae"])


def measurements_of(checkpoint, decay):
    """Those of metrics.json, its run's or the model folder's, that are of this step and EMA, without sweeps."""
    from mf_dist.checkpoint.reader import MODEL_FILE
    from mf_dist.checkpoint.runs import evaluation_folder
    from mf_dist.evaluation.report import read_entries

    path = checkpoint.folder
    folder = path.parent if path.name == MODEL_FILE else evaluation_folder(checkpoint)
    entries = read_entries(folder / "metrics.json") if folder else []
    of_step = [entry for entry in entries if (entry.get("step"), entry.get("ema")) == (checkpoint.step, decay)]
    return [entry for entry in of_step if not entry.get("sweep")]


def picture_of(checkpoint, decay):
    """The grid that its run drew at this step, of its first EMA, or the model folder's; None if there is none."""
    from mf_dist.checkpoint.reader import MODEL_FILE
    from mf_dist.checkpoint.runs import evaluation_folder
    from mf_dist.training.resume import first_ema_decay

    if checkpoint.folder.name == MODEL_FILE:
        path = checkpoint.folder.with_name("samples.png")
        return path if path.is_file() else None
    folder = evaluation_folder(checkpoint)
    path = folder and folder.with_name("samples") / f"step{checkpoint.step:08d}.png"
    return path if path and path.is_file() and decay == first_ema_decay(checkpoint) else None


@command_line
def main() -> int:
    args = parse()
    return {"ls": ls, "verify": verify, "diff": diff, "prune": prune, "export": export}[args.command](args)


if __name__ == "__main__":
    sys.exit(main())
