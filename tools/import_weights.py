"""Makes a model folder of another project's weights, which tools/sample.py, tools/fid_eval.py and train.init_from take.

    python tools/import_weights.py --from sit SiT-XL-2-256x256.pt --out models/sit_xl2
    python tools/import_weights.py --from repa last.pt --out models/repa_xl2
    python tools/sample.py --checkpoint models/sit_xl2 --nfe 50 --out grid.png
    python -m mf_dist.train configs/custom_finetune.yaml train.init_from=models/sit_xl2

FILE: as the project wrote it, by torch.save or as safetensors; of a training checkpoint the EMA is taken. No code in it
is run. docs/weights.md has what is converted, and why DMF's and DiT's networks are refused.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.paths import expanded, expanded_path

DMF = (
    "--from dmf: the first blocks of DMF's networks see t and the others r, while this DiT gives every block t and "
    "t - r: it cannot represent them. The flow network that DMF is trained from, SiT-XL/2+REPA, can be: --from repa"
)


@dataclass(frozen=True)
class Project:
    repository: str
    convert: Callable
    """As sit_weights.from_sit."""
    vae: str
    """The VAE of its sampling script, whose scaling_factor is 0.18215."""
    sections: dict
    """Of the config by which its networks are sampled."""
    ema_decay: float = 0.9999


def projects():
    from fractions import Fraction

    from mf_dist.config.objectives import MeanFlowConfig
    from mf_dist.config.schema import EvalConfig
    from mf_dist.sampling.sit_weights import from_repa, from_sit

    flow = {"meanflow": MeanFlowConfig(share_r_equals_t=Fraction(1)), "eval": EvalConfig(nfe=(50,), grid_nfe=(50,))}
    return {
        "sit": Project("willisma/SiT", from_sit, "stabilityai/sd-vae-ft-mse", flow),
        "repa": Project("sihyun-yu/REPA", from_repa, "stabilityai/sd-vae-ft-ema", flow),
    }


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("file", type=expanded_path, metavar="FILE", help="weights, or a training checkpoint")
    parser.add_argument("--from", dest="project", choices=("sit", "repa", "dmf"), required=True, help="whose weights")
    parser.add_argument("--out", type=expanded_path, required=True, help="new folder")
    parser.add_argument("--num-heads", type=int, help="attention heads (default: SiT's for the width of the network)")
    parser.add_argument("--vae", type=expanded, help="folder or hub id of the VAE (default: the project's)")
    args = parser.parse_args()
    if args.num_heads is not None and args.num_heads < 1:
        raise UserError("--num-heads must be at least 1")
    return args


def read(path):
    """(tensors by name, what training saved beside them) of FILE: its EMA if it is a training checkpoint."""
    from torch import Tensor

    from mf_dist.runtime.tensor_file import load_tensors
    from mf_dist.runtime.torch_file import load_torch_file

    tree = load_tensors(path) if path.suffix == ".safetensors" else load_torch_file(path)
    if isinstance(tree, dict) and isinstance(tree.get("ema"), dict):
        tensors, beside = tree["ema"], {key: tree.get(key) for key in ("args", "steps")}  # the others need memory
    else:
        tensors, beside = tree, {}
    del tree
    if not isinstance(tensors, dict) or not tensors:
        raise UserError(f"{path} holds no weights by name")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path}: {name!r} is no tensor, and there is no 'ema': not a file of such weights")
    for prefix in ("module.", "_orig_mod."):  # of DistributedDataParallel and torch.compile
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors, beside


def check_training(path, beside):
    """Raises UserError if the training checkpoint says that its network is no velocity along z = (1 - t) x + t e."""
    args = beside.get("args")
    said = vars(args) if isinstance(args, argparse.Namespace) else {}
    for key, expected in (("path_type", ("linear",)), ("prediction", ("velocity", "v"))):
        value = said.get(key)
        if value is not None and str(value).lower() not in expected:
            raise UserError(f"{path} was trained with {key}={value}; only {expected[0]} can be imported")


def state_of(args, project, model, step):
    """What a model folder records. What is not known of the training has no other reader than people."""
    from mf_dist.config.loader import to_tree
    from mf_dist.config.schema import Config, DataConfig, OptimConfig, TrainConfig
    from mf_dist.runtime.atomic_files import sha256_of

    config = Config(
        run_dir=f"imported from {project.repository}",
        data=DataConfig(path=f"of {project.repository}"),
        model=model,
        train=TrainConfig(total_images=1),
        optim=OptimConfig(ema_decay=(project.ema_decay,)),
        **project.sections,
    )
    return {
        "step": step,
        "samples_seen": 0,
        "guard": {},
        "config": to_tree(config),
        "classes": [],
        "vae": {"source": args.vae or project.vae, "scaling_factor": 0.18215},
        "imported": {"from": project.repository, "file": args.file.name, "sha256": sha256_of(args.file)},
        "ema": str(project.ema_decay),
    }


def convert(args, project, tensors):
    """The weights by our names, in a network that loads them and predicts a velocity."""
    import torch

    from mf_dist.runtime.weights import load_weights
    from mf_dist.sampling.generator import build_network
    from mf_dist.sampling.sit_weights import check_velocity

    generator = torch.Generator().manual_seed(0)
    try:
        converted = project.convert(tensors, args.num_heads, generator)
        net = build_network(converted.model, seed=0)
        load_weights(net, converted.tensors, "converted")
        check_velocity(net, generator)
    except UserError as error:
        raise UserError(f"{args.file}, --from {args.project}: {error}") from None
    return converted


def write(args, project, converted, step):
    from mf_dist.checkpoint.model_folder import new_folder, write_model
    from mf_dist.report.model_card import model_card

    state, model = state_of(args, project, converted.model, step), converted.model
    left_out = ", ".join(converted.left_out) or "nothing"
    origin = (
        f"Imported from `{args.file.name}` (sha256 {state['imported']['sha256']}) of github.com/{project.repository}, "
        f"with mf_dist's tools/import_weights.py. Left out: {left_out}.\n\nThese weights are an instantaneous "
        "velocity: samples are drawn in many Euler steps, without classifier-free guidance."
    )
    with new_folder(args.out) as folder:
        write_model(folder, converted.tensors, state)
        card = model_card(args.out.absolute().name, state, origin, [], None)
        (folder / "README.md").write_text(card, encoding="utf-8")
    print(
        f"{args.out}: depth {model.depth}, width {model.hidden_size}, {model.num_heads} heads, patches of "
        f"{model.patch_size}, {model.num_classes:,} classes\nleft out: {left_out}"
    )


@command_line
def main() -> None:
    args = parse()
    if args.project == "dmf":
        raise UserError(DMF)
    from mf_dist.checkpoint.model_folder import refuse_unless_new

    refuse_unless_new(args.out)
    project = projects()[args.project]
    tensors, beside = read(args.file)
    check_training(args.file, beside)
    steps = beside.get("steps")
    write(args, project, convert(args, project, tensors), steps if type(steps) is int else 0)


if __name__ == "__main__":
    sys.exit(main())
