"""Writes imf_reference.safetensors: random weights of the authors' iMF network, inputs, and what it makes of them.

    git clone --branch torch https://github.com/Lyy-iiis/imeanflow
    python tests/models/make_imf_reference.py imeanflow

Weights have the authors' names; they are rounded to fp16 to be small. Gates and last linears are random, too: at their
initial 0 every output is 0. Outputs are those of their code as it is, in fp32, and of their code with every float32
and complex64 in its text replaced by float64 and complex128.
"""

import importlib
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

SIZES = {"hidden_size": 20, "depth": 3, "num_heads": 2, "num_classes": 3, "patch_size": 2, "input_size": 4}
INPUTS = {
    "h": [0.0, 0.0, 0.3, 1.0, 0.55, 0.07],
    "omega": [1.0, 7.5, 1.0, 3.0, 2.0, 8.0],
    "start": [0.0, 0.0, 0.4, 0.1, 0.25, 0.49],
    "end": [1.0, 1.0, 0.65, 0.5, 0.9, 0.51],
    "y": [0, 3, 2, 3, 1, 0],  # 3 is the null label
}


def authors_network(source: Path, dtype: torch.dtype) -> torch.nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "models").mkdir()
        for file in (source / "models").glob("*.py"):
            text = file.read_text()
            if dtype == torch.float64:
                text = text.replace("float32", "float64").replace("complex64", "complex128")
            (Path(folder) / "models" / file.name).write_text(text)
        sys.path.insert(0, folder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "models"]:
            del sys.modules[name]
        importlib.invalidate_caches()
        network = importlib.import_module("models.imfDiT").imfDiT(aux_head_depth=1, **SIZES)
        sys.path.remove(folder)
    return network.to(dtype)


@torch.no_grad()
def main(source: Path) -> None:
    g = torch.Generator().manual_seed(0)
    initial = authors_network(source, torch.float32).state_dict()
    weights = {
        name: (0.3 * torch.randn(w.shape, generator=g) + (1.0 if "norm" in name else 0.0)).half()
        for name, w in initial.items()
    }
    inputs = {name: torch.tensor(values) for name, values in INPUTS.items()}
    inputs["z"] = torch.randn(len(inputs["y"]), 4, 4, 4, generator=g)
    outputs = {}
    for dtype in (torch.float32, torch.float64):
        network = authors_network(source, dtype)
        network.load_state_dict({name: w.to(dtype) for name, w in weights.items()})
        z, h, omega, start, end = (inputs[name].to(dtype) for name in ("z", "h", "omega", "start", "end"))
        u, v = network(z, h, h, omega, start, end, inputs["y"])
        outputs |= {f"u.{dtype}".replace("torch.", ""): u, f"v.{dtype}".replace("torch.", ""): v}
    named = {f"weight:{name}": w for name, w in weights.items()}
    named |= {f"input:{name}": a for name, a in inputs.items()} | {f"output:{name}": a for name, a in outputs.items()}
    save_file({name: a.contiguous() for name, a in named.items()}, Path(__file__).parent / "imf_reference.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
