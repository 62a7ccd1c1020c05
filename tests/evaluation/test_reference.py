"""References in every layout, and damaged ones."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FEATURES
from test_statistics import random_gaussian

from mf_dist.evaluation.features import FolderNetwork
from mf_dist.evaluation.reference import KNOWN, read_reference, write_reference
from mf_dist.runtime.errors import UserError

D = 64


@pytest.fixture(scope="module")
def network():
    return FolderNetwork(FEATURES, torch.device("cpu"))


def test_every_layout_gives_the_same_gaussian(tmp_path, network):
    good, small = random_gaussian(0, D), random_gaussian(1, 7)
    images = np.zeros((3, 8, 8, 3), np.uint8)
    layouts = {
        "plain": {"mu": good.mean, "sigma": good.covariance},
        "jax": {"ref_mu": good.mean, "ref_sigma": good.covariance},
        "adm": {
            "arr_0": images,
            "mu": good.mean,
            "sigma": good.covariance,
            "mu_s": small.mean,
            "sigma_s": small.covariance,
        },
        "single": {"mu": good.mean.astype(np.float32), "sigma": good.covariance.astype(np.float32)},
    }
    for name, arrays in layouts.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        reference = read_reference(str(tmp_path / f"{name}.npz"), network)
        np.testing.assert_allclose(reference.pooled.mean, good.mean, rtol=1e-6)
        np.testing.assert_allclose(reference.pooled.covariance, good.covariance, rtol=1e-6, atol=1e-6)
        assert reference.spatial is None and reference.rows is None
        assert len(reference.provenance["reference_sha256"]) == 64
        assert reference.warnings == [
            f"{tmp_path / name}.npz does not record its features; they must be those of digits"
        ]


def test_spatial_statistics_are_read_for_networks_that_have_them(tmp_path):
    good, small = random_gaussian(0, D), random_gaussian(1, 7)
    arrays = {"mu": good.mean, "sigma": good.covariance, "mu_s": small.mean, "sigma_s": small.covariance}
    np.savez(tmp_path / "adm.npz", **arrays)
    network = SimpleNamespace(dimension=D, spatial_dimension=7, name="x", is_inception=True)
    reference = read_reference(str(tmp_path / "adm.npz"), network)
    np.testing.assert_allclose(reference.spatial.covariance, small.covariance)
    network.spatial_dimension = 8
    with pytest.raises(UserError, match=r"mu_s and sigma_s have shapes \(7,\), \(7, 7\)"):
        read_reference(str(tmp_path / "adm.npz"), network)


def test_own_layout_has_rows_and_provenance(tmp_path, network):
    good, rows = random_gaussian(0, D), np.ones((5, D), np.float32)
    made = {"features": "digits", "features_sha256": network.sha256, "count": 9, "resize": "none", "resolution": 32}
    path = tmp_path / "ours.npz"
    write_reference(path, good, None, rows, [0, 2, 4, 6, 8], made)
    reference = read_reference(str(path), network)
    assert np.array_equal(reference.rows, rows) and reference.picks == [0, 2, 4, 6, 8] and not reference.warnings
    assert reference.provenance["reference_made"] == made and reference.provenance["reference_images"] == 9
    write_reference(path, good, None, rows, [0], {**made, "features_sha256": "0" * 64})
    with pytest.raises(UserError, match="has features 'digits' with weights 000000000000, expected"):
        read_reference(str(path), network)


def test_published_files_are_recognised(tmp_path, network, monkeypatch):
    good = random_gaussian(0, D)
    np.savez(tmp_path / "x.npz", mu=good.mean, sigma=good.covariance)
    sha256 = read_reference(str(tmp_path / "x.npz"), network).provenance["reference_sha256"]
    monkeypatch.setitem(KNOWN, sha256, "a published file")
    assert read_reference(str(tmp_path / "x.npz"), network).provenance["reference_known_as"] == "a published file"


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a file was run')",))


def test_invalid_references_are_refused(tmp_path, network):
    good = random_gaussian(0, D)
    mu, sigma = good.mean, good.covariance
    skew, negative = sigma.copy(), sigma - 3 * np.eye(D)
    skew[0, 1] += 1e-3 * np.abs(sigma).max()
    cases = {
        "missing": ({"mu": mu}, "has no mu and sigma"),
        "shape": ({"mu": mu[:3], "sigma": sigma}, "shapes"),
        "square": ({"mu": mu, "sigma": sigma[:3]}, "shapes"),
        "finite": ({"mu": mu * np.nan, "sigma": sigma}, "not finite"),
        "symmetric": ({"mu": mu, "sigma": skew}, "not symmetric"),
        "positive": ({"mu": mu, "sigma": negative}, "negative eigenvalue"),
        "text": ({"mu": np.array(["x"] * D), "sigma": sigma}, "not numeric"),
        "pickle": ({"mu": np.array([Bomb()] * D, object), "sigma": sigma}, "cannot read"),
        "rows": ({"mu": mu, "sigma": sigma, "rows": np.zeros((4, 3))}, "rows have shape"),
        "provenance": ({"mu": mu, "sigma": sigma, "provenance": np.array("{")}, "provenance cannot be read"),
    }
    for name, (arrays, text) in cases.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(UserError, match=text):
            read_reference(str(tmp_path / f"{name}.npz"), network)
    np.savez(tmp_path / "good.npz", mu=mu, sigma=sigma)
    whole = bytearray((tmp_path / "good.npz").read_bytes())
    flipped = whole.copy()
    flipped[len(whole) // 2] ^= 1
    np.save(tmp_path / "plain.npy", mu)
    for raw in (b"garbage", b"", whole[:-30], flipped, (tmp_path / "plain.npy").read_bytes(), pickle.dumps(Bomb())):
        (tmp_path / "broken.npz").write_bytes(raw)
        with pytest.raises(UserError, match="cannot read"):
            read_reference(str(tmp_path / "broken.npz"), network)
    with pytest.raises(UserError, match="cannot read"):
        read_reference(str(tmp_path / "nowhere.npz"), network)


def test_a_flipped_bit_gives_a_one_line_error_or_no_change(tmp_path, network):
    good = random_gaussian(0, D)
    np.savez_compressed(tmp_path / "a.npz", mu=good.mean, sigma=good.covariance)
    raw, g, refused = (tmp_path / "a.npz").read_bytes(), np.random.default_rng(0), 0
    for place in g.choice(len(raw), 80, replace=False):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << int(g.integers(8))
        (tmp_path / "b.npz").write_bytes(damaged)
        try:
            reference = read_reference(str(tmp_path / "b.npz"), network)
            assert np.array_equal(reference.pooled.mean, good.mean)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 60
