"""Warnings about metrics that are not comparable with others, and refused options."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FEATURES
from test_measure import ALONE, as_npz, measured

from mf_dist.evaluation.features import FolderNetwork, open_features
from mf_dist.evaluation.measure import Settings, images_for, warnings_of
from mf_dist.evaluation.protocols import ADM, PROTOCOLS
from mf_dist.evaluation.reference import read_reference
from mf_dist.evaluation.sources import ImageFiles
from mf_dist.runtime.errors import UserError


@pytest.fixture(scope="module")
def network():
    return FolderNetwork(FEATURES, torch.device("cpu"))


@pytest.fixture(scope="module")
def pixels(images):
    return ImageFiles(images, None).read(0, 150)[0]


def test_warnings_about_differing_protocols(images, network, tmp_path, pixels):
    small = as_npz(tmp_path / "few.npz", pixels[:40])
    result, reference, _ = measured(small, images, network, tmp_path)
    (warning,) = result.entry["warnings"]
    assert warning == "40 images are too few for 64 features: the distance is biased upwards"
    inception = SimpleNamespace(dimension=10, is_published=True, is_inception=True, resize="TF1")
    made = {"reference_made": {"resolution": 64, "resize": "bicubic"}}
    other = SimpleNamespace(provenance=made, warnings=[])
    warnings = warnings_of(40, 32, inception, other, "balanced", Settings())
    assert len(warnings) == 5 and "takes 50,000 images, this number 40" in warnings[0]
    assert "labels are balanced; protocol adm has them random" in warnings[1]
    assert "against ADM's VIRTUAL_*.npz, this number against None" in warnings[2]
    assert "side 64, these have 32" in warnings[3] and "resized by bicubic" in warnings[4] and reference is not None


def test_a_protocol_that_is_asked_for_is_warned_of_with_any_features(images, network, tmp_path, pixels):
    """Of files also what is not known; DINOv2's reference is one of EDM2's alone."""
    file, edm2 = as_npz(tmp_path / "all.npz", pixels), PROTOCOLS["edm2"]
    assert measured(file, images, network, tmp_path, protocol=edm2)[0].entry["warnings"] == []
    result, _, _ = measured(file, images, network, tmp_path, protocol=edm2, is_named=True)
    fewer, seeds, unknown = result.entry["warnings"]
    assert "takes 50,000 images, this number 150" in fewer
    assert seeds == "protocol edm2 publishes the lowest of 3 seeds, this number is of 1"
    assert unknown.startswith("protocol edm2 has random labels, truncated pixels; how images from files were made")
    dinov2 = SimpleNamespace(dimension=10, is_published=True, is_inception=False, resize="bicubic")
    reference = SimpleNamespace(provenance={"reference": "own.npz", "reference_images": 50_000}, warnings=[])
    assert warnings_of(50_000, 32, dinov2, reference, "random", Settings(protocol=ADM)) == []
    (warning,) = warnings_of(50_000, 32, dinov2, reference, "random", Settings(protocol=PROTOCOLS["edm2"]))[1:]
    assert "against EDM2's img*.npz, this number against own.npz" in warning


def test_warning_about_a_reference_of_too_few_images(images, network, tmp_path, pixels):
    """Recognised by its count, or, in a file without a count, by the rank of its covariance."""
    few = as_npz(tmp_path / "few.npz", pixels[:50])
    warnings = measured(images, few, network, tmp_path)[0].entry["warnings"]
    assert warnings == ["the reference's 50 images are too few for 64 features: the distance is biased upwards"]
    rows = np.random.default_rng(0).standard_normal((50, 64))
    np.savez(tmp_path / "bare.npz", mu=rows.mean(0), sigma=np.cov(rows.T))
    assert "has rank 49 of 64: too few images" in read_reference(str(tmp_path / "bare.npz"), network).warnings[1]


def test_entry_records_the_images_in_adms_layout(images, network, tmp_path, pixels):
    """Their number and side, with a warning if the samples have another side."""
    rows = np.random.default_rng(0).standard_normal((200, 64))
    larger = pixels[:30].repeat(2, axis=2).repeat(2, axis=3)
    adm = as_npz(tmp_path / "adm.npz", larger, mu=rows.mean(0), sigma=np.cov(rows.T))
    entry = measured(images, adm, network, tmp_path, kinds=("fid",))[0].entry
    assert entry["reference_pictures"] == 30 and entry["reference_resolution"] == 64
    assert "the reference has images of side 64, these have 32" in entry["warnings"]
    as_npz(tmp_path / "bad.npz", larger.astype(np.float32), mu=rows.mean(0), sigma=np.cov(rows.T))
    with pytest.raises(UserError, match=r"arr_0 .* float32, expected \(N, R, R, 3\) uint8"):
        read_reference(str(tmp_path / "bad.npz"), network)


def test_contradicting_or_unused_options_are_refused(images, network):
    assert images_for(network, str(images), 32, ALONE, []).identity["resolution"] == 32
    with pytest.raises(UserError, match="features 'digits' take images of side 32, not 16"):
        images_for(network, str(images), 16, ALONE, [])
    with pytest.raises(UserError, match="--inception-weights belongs to"):
        open_features("efflite0", "weights.pth", ALONE.device)
