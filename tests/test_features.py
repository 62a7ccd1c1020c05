"""The shipped feature network, and refusals."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import FEATURES
from mf_dist.features import FeatureNetwork

from mf_dist.data.images import list_images, load_image
from mf_dist.errors import UserError

CPU = torch.device("cpu")


def test_it_knows_the_digits(images):
    network = FeatureNetwork(FEATURES, CPU)
    folder = list_images(images)
    pixels = torch.from_numpy(np.stack([load_image(folder.root / path, 32) for path in folder.paths]))
    assert network(pixels).shape == (150, 64)
    with torch.no_grad():
        agreement = (network.network(pixels).argmax(1) == torch.tensor(folder.labels)).float().mean()
    assert agreement > 0.97


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="no feature network"):
        FeatureNetwork(tmp_path, CPU)
    copy = shutil.copytree(FEATURES, tmp_path / "copy")
    (copy / "config.json").write_text(json.dumps({"name": "x", "resolution": 32, "classes": 11}))
    with pytest.raises(UserError, match="no feature network"):
        FeatureNetwork(copy, CPU)
    with pytest.raises(UserError, match="side 32, got 16"):
        FeatureNetwork(FEATURES, CPU)(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
