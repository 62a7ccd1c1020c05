"""Makes a model folder of another project's weights, which tools/sample.py, tools/fid_eval.py and train.init_from take.

    python tools/import_weights.py --from sit SiT-XL-2-256x256.pt --out models/sit_xl2
    python tools/import_weights.py --from repa last.pt --out models/repa_xl2
    python tools/import_weights.py --from imf iMF-XL-2.pth --out models/imf_xl2
    python tools/sample.py --checkpoint models/sit_xl2 --nfe 50 --out grid.png
    python -m mf_dist.train configs/custom_finetune.yaml train.init_from=models/sit_xl2

FILE: as the project wrote it, by torch.save or as safetensors; of a training checkpoint the EMA is taken. No code in it
is run. docs/weights.md has what is converted, and why DMF's and DiT's networks are refused.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.paths import expanded, expanded_path

IMF_GUIDANCE = {12: (8.0, 0.4, 0.65), 24: (10.5, 0.4, 0.6), 32: (10.5, 0.4, 0.6), 48: (8.0, 0.42, 0.62)}
"""Depth of the network, B/2 to XL/2 -> scale and interval of guidance that its authors recommend for one step."""
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
    note: str
    """For the model card: what the weights are."""
    sections: Callable
    """From the network to sections of the config by which it is sampled."""
    data: dict = field(default_factory=dict)
    """How its latents are normalised."""
    ema_decay: float = 0.9999


def projects():
    from fractions import Fraction

    from mf_dist.config.objectives import ImfConfig, MeanFlowConfig
    from mf_dist.config.schema import EvalConfig
    from mf_dist.sampling.imf_weights import from_imf
    from mf_dist.sampling.sit_weights import from_repa, from_sit

    note = (
        "These weights are an instantaneous velocity: samples are drawn in many Euler steps, without classifier-free "
        "guidance."
    )

    def flow(model):
        return {
            "meanflow": MeanFlowConfig(share_r_equals_t=Fraction(1)),
            "eval": EvalConfig(nfe=(50,), grid_nfe=(50,)),
        }

    def imf(model):
        scale, *interval = IMF_GUIDANCE.get(model.depth, (1.0, 0.0, 1.0))
        return {
            "imf": ImfConfig(),
            "eval": EvalConfig(nfe=(1, 2), labels="balanced", guidance=scale, interval=tuple(interval)),
        }

    imf_note = "Guidance is an input of this network: the best scale and interval depend on its size and on the steps."
    mean, std = (0.86488, -0.27787343, 0.21616915, 0.3738409), (4.85503674, 5.31922414, 3.93725398, 3.9870003)
    normalisation = {"normalisation": "channel", "normalisation_mean": mean, "normalisation_std": std}
    return {
        "sit": Project("willisma/SiT", from_sit, "stabilityai/sd-vae-ft-mse", note, flow),
        "repa": Project("sihyun-yu/REPA", from_repa, "stabilityai/sd-vae-ft-ema", note, flow),
        "imf": Project("Lyy-iiis/imeanflow", from_imf, "stabilityai/sd-vae-ft-mse", imf_note, imf, normalisation),
    }


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("file", type=expanded_path, metavar="FILE", help="weights, or a training checkpoint")
    parser.add_argument(
        "--from", dest="project", choices=("sit", "repa", "imf", "dmf"), required=True, help="whose weights"
    )
    parser.add_argument("--out", type=expanded_path, required=True, help="new folder")
    parser.add_argument("--num-heads", type=int, help="attention heads of sit and repa (default: SiT's for the width)")
    parser.add_argument("--vae", type=expanded, help="folder or hub id of the VAE (default: the project's)")
    args = parser.parse_args()
    if args.num_heads is not None and args.num_heads < 1:
        raise UserError("--num-heads must be at least 1")
    if args.num_heads is not None and args.project == "imf":
        raise UserError("--num-heads is for sit and repa, the tensors of imf tell it: leave it out")
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
        data=DataConfig(path=f"of {project.repository}", **project.data),
        model=model,
        train=TrainConfig(total_images=1),
        optim=OptimConfig(ema_decay=(project.ema_decay,)),
        **project.sections(model),
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

    from mf_dist.models.imf_dit import Guidance, ImfDiT
    from mf_dist.sampling.foreign_weights import check_velocity
    from mf_dist.sampling.generator import sampling_network

    generator = torch.Generator().manual_seed(0)
    try:
        converted = project.convert(tensors, args.num_heads, generator)
        net = sampling_network(converted.model, converted.tensors, "converted")
        unguided = [Guidance(torch.ones(2), torch.zeros(2), torch.ones(2))] if isinstance(net, ImfDiT) else []
        check_velocity(net, generator, *unguided)
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
        f"with mf_dist's tools/import_weights.py. Left out: {left_out}.\n\n{project.note}"
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
