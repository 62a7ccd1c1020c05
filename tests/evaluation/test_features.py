"""The feature networks: what they compute, their names, and what is refused."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import FEATURES
from safetensors.torch import save_file
from test_reference import Bomb

from mf_dist.data.image_folder import list_images
from mf_dist.data.images import load_image
from mf_dist.evaluation.feature_network import read_state_dict
from mf_dist.evaluation.features import FolderNetwork, open_features
from mf_dist.runtime.errors import UserError

CPU = torch.device("cpu")


def test_digits_network_classifies_digits(images):
    network = open_features(str(FEATURES), None, CPU)
    folder = list_images(images)
    pixels = np.stack([load_image(folder.root / path, 32) for path in folder.paths])
    features = network(pixels)
    assert features.pooled.shape == (150, 64) and features.spatial.shape == (150, 0)
    assert features.pooled.dtype == np.float32
    assert (features.logits.argmax(1) == folder.labels).mean() > 0.97


def test_efficientnet_classifies_photographs():
    """Two photographs that scikit-learn ships, a Chinese palace and a yellow flower: ImageNet's palace and daisy."""
    from sklearn.datasets import load_sample_images

    network = open_features("efflite0", None, CPU)
    pixels = np.stack([image[:400, 120:520].transpose(2, 0, 1) for image in load_sample_images().images])
    features = network(np.ascontiguousarray(pixels))
    assert features.pooled.shape == (2, 1280) and network.sha256.startswith("579344248a93")
    assert features.logits.argmax(1).tolist() == [698, 985] and not network.is_inception


def test_refused_network_folders(tmp_path):
    with pytest.raises(UserError, match="no feature network"):
        open_features(str(tmp_path), None, CPU)
    copy = shutil.copytree(FEATURES, tmp_path / "copy")

    def config(**changes):
        (copy / "config.json").write_text(json.dumps({"name": "x", "resolution": 32, "classes": 10} | changes))

    config(classes=11)
    with pytest.raises(UserError, match=r"classify.bias has shape \(10,\), this network needs \(11,\)"):
        FolderNetwork(copy, CPU)
    config(name="inception")
    with pytest.raises(UserError, match="without the prefix inception"):
        FolderNetwork(copy, CPU)
    for odd in (
        *({"resolution": 0}, {"resolution": float("inf")}, {"resolution": None}),
        *({"classes": -1}, {"classes": [10]}, {"classes": float("nan")}),
    ):
        config(**odd)
        with pytest.raises(UserError, match="no feature network in"):
            FolderNetwork(copy, CPU)
    config()
    tensors = read_state_dict(copy / "model.safetensors")
    save_file({**tensors, "classify.bias": tensors["classify.bias"] * np.nan}, copy / "model.safetensors")
    with pytest.raises(UserError, match="classify.bias is not finite"):
        FolderNetwork(copy, CPU)
    with pytest.raises(UserError, match="side 32, got 16x16"):
        FolderNetwork(FEATURES, CPU)(np.zeros((1, 3, 16, 16), np.uint8))
    with pytest.raises(UserError, match="--inception-weights belongs to"):
        open_features(str(FEATURES), "x", CPU)


def test_no_weights_file_runs_code(tmp_path):
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Bomb()))
    torch.save({"x": Bomb()}, tmp_path / "object.pth")
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "script.pt")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "short.safetensors").write_bytes(b"\x08")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.pth").write_text("root:x:0:0:root:/root:/bin/bash\n" * 20)
    for name in ("pickle.pth", "object.pth", "script.pt", "list.pth", "short.safetensors", "empty.pth", "text.pth"):
        with pytest.raises(UserError, match=r"it is damaged, or|hold list, expected tensors|as safetensors") as caught:
            read_state_dict(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot read .*nowhere.pth: No such file"):
        read_state_dict(tmp_path / "nowhere.pth")
    torch.save({"x": torch.ones(2)}, tmp_path / "good.pth")
    assert read_state_dict(tmp_path / "good.pth")["x"].tolist() == [1, 1]


def test_published_inception_is_identified_by_hash_before_it_is_read(tmp_path):
    (tmp_path / "weights.pth").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="it was not loaded"):
        open_features("inception", str(tmp_path / "weights.pth"), CPU)
    for weights in (None, str(tmp_path / "nowhere")):
        with pytest.raises(UserError, match=r"curl -L -o FILE https://.*6726825d0af5f729"):
            open_features("inception", weights, CPU)
    with pytest.raises(UserError, match="it is damaged, or"):
        open_features("inception-other", str(tmp_path / "weights.pth"), CPU)
    with pytest.raises(UserError, match="unknown features 'inception-v3'"):
        open_features("inception-v3", None, CPU)
