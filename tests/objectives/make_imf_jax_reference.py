"""Writes imf_jax_reference.safetensors: the loss of the authors' iMF module in JAX, and its gradient, in float64.

    git clone --branch main https://github.com/Lyy-iiis/imeanflow
    python tests/objectives/make_imf_jax_reference.py imeanflow        # needs jax and flax

Their code runs as it is, but for every float32 and complex64 in its text, which become float64 and complex128, and for
jax.random in imf.py, whose normal and uniform return given numbers. Weights are random, gates and last linears, too: at
their initial 0 most gradients are 0. They have the names and layouts of the authors' PyTorch network. Weights, images
and draws are rounded to fp16 to be small. The first NUM_DROPPED rows lose their label.
"""

import importlib
import re
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
from safetensors.numpy import save_file

ROWS, NUM_DROPPED, NUM_CLASSES = 8, 2, 4
FILE = Path(__file__).parent / "imf_jax_reference.safetensors"
SIZES = {"hidden_size": 12, "depth": 3, "num_heads": 2, "aux_head_depth": 1, "patch_size": 2, "input_size": 8}
CASES = {
    "recipe": {},
    "other": {"P_mean": 0.2, "P_std": 1.5, "data_proportion": 0.375, "cfg_beta": 2.0, "norm_p": 0.5, "norm_eps": 0.1},
}
"""Fields of the module that are not the defaults."""


def authors_modules(source, folder):
    """imf and models.imfDiT in float64."""
    for name in ("imf.py", *(f"models/{file.name}" for file in (source / "models").glob("*.py"))):
        text = (source / name).read_text().replace("float32", "float64").replace("complex64", "complex128")
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    sys.path.insert(0, str(folder))
    return importlib.import_module("imf"), importlib.import_module("models.imfDiT")


def pytorch_name(path):
    """('params', 'net', 'shared_blocks_0', 'norm1', 'kernel') is shared_blocks.0.norm1.weight."""
    name = ".".join(key.key for key in path[2:]).replace("mlp.layers_", "mlp.")
    name = re.sub(r"(_blocks|_heads)_(\d+)", r"\1.\2", name)
    return re.sub(r"\.(kernel|embedding)$", ".weight", name)


def by_pytorch_names(kind, tree):
    """Kernels have the inputs first in JAX: (in, out), and (P, P, C, D) of the patches' convolution."""
    named = {}
    for path, a in jax.tree_util.tree_leaves_with_path(tree):
        axes = {2: (1, 0), 4: (3, 2, 0, 1)}.get(a.ndim) if path[-1].key == "kernel" else None
        named[f"{kind}:{pytorch_name(path)}"] = np.transpose(a, axes) if axes else np.asarray(a)
    return named


def random_draws(g):
    """x, e (B, C, S, S), numbers behind times, omega, interval and drop, y (B,)."""
    size = SIZES["input_size"]
    draws = {"x": g.normal(size=(ROWS, 4, size, size)), "e": g.normal(size=(ROWS, 4, size, size))}
    draws |= {"time_normals": g.normal(size=(ROWS, 2)), "omega_uniforms": g.uniform(size=ROWS)}
    draws |= {"interval_uniforms": g.uniform(size=(ROWS, 2))}
    draws |= {"drop_uniforms": np.where(np.arange(ROWS) < NUM_DROPPED, 0.0, 0.9)}
    return {name: a.astype(np.float16) for name, a in draws.items()} | {"y": g.integers(NUM_CLASSES, size=ROWS)}


def jax_with(draws):
    """What imf.py uses of jax; its random numbers are `draws`, in the order in which the loss draws."""
    t, r = draws["time_normals"].T
    start, end = draws["interval_uniforms"].T
    normals = iter([t, r, np.moveaxis(draws["e"], 1, -1)])
    uniforms = iter([start, end, draws["omega_uniforms"], draws["drop_uniforms"]])

    def normal(key, shape, dtype):
        return np.float64(next(normals)).reshape(shape)

    def uniform(key, shape, minval=0.0, maxval=1.0, dtype=None):
        return minval + (maxval - minval) * np.float64(next(uniforms)).reshape(shape)

    random = SimpleNamespace(normal=normal, uniform=uniform, split=jax.random.split)
    return SimpleNamespace(random=random, jvp=jax.jvp, lax=jax.lax)


def main(source):
    jax.config.update("jax_enable_x64", True)
    g = np.random.default_rng(12)  # a seed of which t of r < t rows is before, inside and after their interval
    with tempfile.TemporaryDirectory() as folder:
        imf, network = authors_modules(source, Path(folder))
    network.small = partial(network.imfDiT, **SIZES)
    draws = random_draws(g)
    x, y = np.float64(np.moveaxis(draws["x"], 1, -1)), draws["y"]
    model = imf.iMeanFlow("small", NUM_CLASSES)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, np.zeros(ROWS), y)
    weights = jax.tree_util.tree_map_with_path(
        lambda path, a: np.float16(0.3 * g.normal(size=a.shape) + ("norm" in pytorch_name(path))), shapes
    )
    named = {f"draw:{name}": a for name, a in draws.items()} | by_pytorch_names("weight", weights)
    for case, fields in CASES.items():
        model = imf.iMeanFlow("small", NUM_CLASSES, **fields)

        def loss(weights, model=model):
            return model.apply(weights, x, y, rngs={"gen": jax.random.key(0)}, method="forward")[0]

        with mock.patch.object(imf, "jax", jax_with(draws)):
            named[f"loss:{case}"], gradient = jax.value_and_grad(loss)(jax.tree.map(np.float64, weights))
        if case == "recipe":
            named |= by_pytorch_names("gradient", gradient)
    save_file({name: np.array(a, order="C") for name, a in named.items()}, FILE)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
