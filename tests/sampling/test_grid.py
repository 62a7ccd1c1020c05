"""Words in grids of samples, and lists of classes."""

import pytest
import torch
from conftest import VAE, run_python

from mf_dist.config.schema import load_config, resolve
from mf_dist.data.shards import read_manifest
from mf_dist.sampling.generator import ImageGenerator, build_network
from mf_dist.vae import Vae

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["数字", "Größe", "a\x1b[31m"])
def test_a_class_whose_name_cannot_be_drawn_shows_its_number(tmp_path, tiny_config, latents, name):
    config = resolve(load_config(str(tiny_config), []), read_manifest(latents), 1)
    generator = ImageGenerator(build_network(config.model, 0), Vae(str(VAE), CPU), config, CPU)
    for file, names in {"a": [name, "tree"], "b": ["0", "tree"]}.items():
        generator.grid([1], 0, tmp_path / f"{file}.png", names, [0, 1])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_stats_lists_the_classes(latents):
    lines = run_python("tools/latents.py", "stats", latents).stdout.splitlines()
    assert [line for line in lines if line.startswith("class ")] == [f"class {i}: {i}" for i in range(10)]
