"""Draws images from a trained model into one labelled picture.

python tools/sample.py --class 3 --nfe 1 --out grid.png
python tools/sample.py --checkpoint runs/digits --nfe 2 --seed 7 --out grid.png     # every class
python tools/sample.py --guidance 8 --interval 0.42,0.62      # of networks that take guidance as an input
python tools/sample.py --classes                                                    # lists their numbers and names
"""

import argparse
import sys
from pathlib import Path

from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.outputs import refuse_inside
from mf_dist.runtime.paths import expanded, expanded_path
from mf_dist.sampling.options import add_sampling_options


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--checkpoint",
        type=expanded_path,
        help="folder of a run, checkpoint or model (default: the newest run under runs/)",
    )
    parser.add_argument("--class", type=int, action="append", dest="classes", help="class index; may be repeated")
    parser.add_argument(
        "--classes", action="store_true", dest="lists", help="list the classes: number and name, and stop"
    )
    parser.add_argument("--nfe", type=int, default=1, help="network calls per image (default 1)")
    add_sampling_options(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ema", help="decay of the EMA to sample from (default: the run's)")
    parser.add_argument(
        "--vae", type=expanded, help="folder or hub id of the VAE (default: the one the latents were made with)"
    )
    parser.add_argument("--out", type=expanded_path, default=Path("grid.png"), help="PNG to write (default grid.png)")
    args = parser.parse_args()
    if not 1 <= args.nfe <= 10_000 or not 0 <= args.seed < 2**63:
        raise UserError("--nfe must be from 1 to 10000 and --seed from 0 to 2^63 - 1")
    if args.out.suffix.lower() != ".png" or args.out.is_dir():
        raise UserError(f"--out {str(args.out)!r} must be a file name ending in .png")
    from mf_dist.checkpoint.reader import find_checkpoint
    from mf_dist.checkpoint.runs import newest_run
    from mf_dist.runtime.distributed import choose_device
    from mf_dist.sampling.generator import load_trained_model

    checkpoint = find_checkpoint(args.checkpoint or newest_run(Path("runs")))
    if args.lists:
        names = checkpoint.state.get("classes", [])
        count = checkpoint.state["config"]["model"]["num_classes"]
        unnamed = f"{count} classes, whose names are not known" if count else "without classes"
        print("\n".join(f"class {number}: {name}" for number, name in enumerate(names)) or unnamed)
        return
    refuse_inside([args.out], checkpoint.folder)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    options = {"sampler": args.sampler, "guidance": args.guidance, "interval": args.interval}
    trained = load_trained_model(checkpoint, args.ema, args.vae, choose_device(0), **options)
    known = max(1, trained.generator.num_classes)
    wrong = [c for c in args.classes or [] if not 0 <= c < known]
    if wrong:
        raise UserError(f"--class {wrong[0]} is not in 0..{known - 1}; --classes lists them")
    if warning := trained.generator.warning_of_few_steps(args.nfe):
        print(warning, file=sys.stderr)
    trained.generator.grid([args.nfe], args.seed, args.out, trained.class_names, args.classes)
    print(f"{trained.checkpoint.folder}, {args.nfe} network calls per image: {args.out}")


if __name__ == "__main__":
    sys.exit(main())
