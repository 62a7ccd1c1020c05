"""Named protocols: which steps of theirs compute the same, what is warned of, and results beside each other."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_measure import ALONE, as_npz, measured, network, pixels  # noqa: F401  fixtures

from mf_dist.evaluation.blocks import compute_blocks
from mf_dist.evaluation.comparison import entry_against, summary, verdict
from mf_dist.evaluation.protocols import ADM, PROTOCOLS
from mf_dist.evaluation.report import read_entries, record, recorded, table
from mf_dist.evaluation.sources import open_source
from mf_dist.runtime.errors import UserError
from mf_dist.runtime.torchvision_repair import repair_torchvision
from mf_dist.vae import to_pixels


def test_rounding_of_each_protocol():
    """On 2 million floats: clip(127.5 x + 128) truncated (MeanFlow and iMF in JAX, DiT) and clip(255 y) rounded (iMF in
    PyTorch) are our rounding but where float32 puts a level's middle to its other side; EDM2 floors, clip(0, 1) 255."""
    x = torch.linspace(-1.2, 1.2, 2_000_001)
    ours = to_pixels(x)
    jax = (127.5 * x + 128.0).clamp(0, 255).to(torch.uint8)
    rounded = (255 * ((x + 1) / 2)).clamp(0, 255).round().to(torch.uint8)
    for other in (jax, rounded):
        assert (other.int() - ours.int()).abs().max() <= 1 and (other != ours).sum() <= 300
    edm2 = ((x / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
    truncated = to_pixels(x, truncates=True)
    assert (truncated != edm2).sum() <= 300
    inside = x.abs() < 1
    assert (ours.float() - truncated.float())[inside].mean() == pytest.approx(0.5, abs=0.01)


def test_the_resize_in_jax_and_edm2_is_tf1s():
    """They sample an affine grid; torch-fidelity and ADM's graph interpolate at i side / 299, which is written out."""
    repair_torchvision()
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    images = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).float()
    tf1 = interpolate_bilinear_2d_like_tensorflow1x(images, size=(299, 299), align_corners=False)
    place = torch.arange(299, dtype=torch.float64) * 64 / 299
    low, part = place.long(), place.frac()
    high = (low + 1).clamp(max=63)

    def along_rows(a):
        return a[..., low, :] * (1 - part)[:, None] + a[..., high, :] * part[:, None]

    exact = along_rows(along_rows(images.double()).transpose(-1, -2)).transpose(-1, -2)
    theta = torch.eye(2, 3)
    theta[:, 2] = 1 / 64 - 1 / 299
    grid = F.affine_grid(theta.expand(2, 2, 3), [2, 3, 299, 299], align_corners=False)
    affine = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    half_pixel = F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False)
    for ours in (tf1, affine):
        assert (ours - exact).abs().max() < 0.01
    assert (half_pixel - exact).abs().mean() > 1  # pytorch-fid's differs


def sqrtm_trace(a, b):
    """tr((A B)^(1/2)), for which ADM, MeanFlow and EDM2 call scipy's sqrtm: A^(1/2) B A^(1/2) has its eigenvalues."""
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return np.sqrt(np.linalg.eigvalsh(root @ b @ root).clip(0)).sum()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_all_evaluators_agree_on_one_npz(protocol, images, network, tmp_path, pixels):  # noqa: F811
    """The features of the same file by the arithmetic of each; 1e-3 absolute is what users see."""
    repair_torchvision()
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    path = as_npz(tmp_path / "samples.npz", np.roll(pixels[20:], 1, axis=3))
    result, _, _ = measured(path, images, network, tmp_path, kinds=("fid",), protocol=PROTOCOLS[protocol])
    assert result.entry["protocol"] == protocol
    ours = result.entry["metrics"]["fd_digits_130"]
    real = compute_blocks(open_source(str(images), None), network, ALONE, tmp_path, "real").rows("pooled")
    sets = [rows.astype(np.float64) for rows in (result.blocks.rows("pooled"), real)]
    (m, a), (n, b) = ((np.mean(rows, axis=0), np.cov(rows, rowvar=False)) for rows in sets)
    rest = (m - n) @ (m - n) + np.trace(a) + np.trace(b)
    eigenvalues = np.linalg.eigvals(a @ b)
    theirs = {
        "ADM, MeanFlow (JAX), EDM2": rest - 2 * sqrtm_trace(a, b),
        "iMF (JAX)": rest - 2 * np.sqrt(eigenvalues.astype(complex)).real.sum(),
        "pytorch-fid": calculate_frechet_distance(m, a, n, b),
        "torch-fidelity": fid_statistics_to_metric({"mu": m, "sigma": a}, {"mu": n, "sigma": b}, False)[
            "frechet_inception_distance"
        ],
    }
    assert ours > 1 and theirs == pytest.approx(dict.fromkeys(theirs, ours), abs=1e-3)


@pytest.mark.parametrize(
    ("name", "labels", "file"),
    [
        ("adm", "random", "VIRTUAL_imagenet256_labeled.npz"),
        ("imf-jax", "balanced", "imagenet_256_fid_stats.npz"),
        ("meanflow-jax", "random", "imagenet_256_fid_stats.npz"),
        ("edm2", "random", "img512.npz"),
    ],
)
def test_what_is_overridden_is_warned_of(name, labels, file):
    protocol = PROTOCOLS[name]
    assert protocol.overridden(50_000, labels) == protocol.overridden(50_000, None) == []
    assert protocol.overridden_reference({"reference": f"refs/{file}"}) == []
    other = {"random": "balanced", "balanced": "random"}[labels]
    warnings = protocol.overridden(10_000, other) + protocol.overridden_reference({"reference": "own.npz"})
    assert len(warnings) == 3 and all(f"protocol {name}" in warning for warning in warnings)
    adms = {"reference_known_as": "ADM VIRTUAL_imagenet256_labeled.npz"}  # whatever its name
    for reference in ({"reference": "x.npz", **adms}, {"reference": file, **adms}):
        assert len(protocol.overridden_reference(reference)) == (name != "adm")
    others = {"reference": file, "reference_known_as": "nanogen-evals imagenet_256_fid_stats.npz"}
    (warning,) = protocol.overridden_reference(others)
    assert f"{file} (nanogen-evals's imagenet_256_fid_stats.npz)" in warning
    assert [len(protocol.overridden_seeds(n)) for n in (1, 3, 4)] == ([1, 0, 1] if name == "edm2" else [0, 0, 0])
    assert str(protocol).startswith(f"{name}: 50,000 images, {labels} labels, ")


def test_entries_from_before_there_were_protocols_are_adms(tmp_path):
    old = {"metrics": {"fd": 1.0}, "nfe": 1, "seed": 0, "pixels_sha256": "a"}
    record(old, tmp_path)
    record({**old, "metrics": {"fd": 2.0}, "protocol": "imf-jax"}, tmp_path)
    assert recorded({"nfe": 1, "seed": 0, "protocol": "adm"}, {}, tmp_path)["metrics"] == {"fd": 1.0}
    record({**old, "metrics": {"fd": 3.0}, "protocol": "adm"}, tmp_path)
    assert [entry["metrics"]["fd"] for entry in read_entries(tmp_path / "metrics.json")] == [2.0, 3.0]
    assert ADM.name == "adm"


def test_only_what_the_same_packages_measured_is_taken_for_measured(tmp_path):
    """On the same kind of device; by any number of ranks and commit, as blocks are."""
    by = {"versions": {"torch": "2", "scipy": "1", "code": "a", "ranks": "1"}, "device": "CPU"}
    made = {"nfe": 1, "seed": 0, "protocol": "adm"}
    record({"metrics": {"fd": 1.0}, **made, "pixels_sha256": "a", **by, "ranks": 1}, tmp_path)
    same = {**by, "versions": {**by["versions"], "code": "b", "ranks": "8"}, "ranks": 8}
    assert recorded(made, by, tmp_path) == recorded(made, same, tmp_path) != None  # noqa: E711
    for other in ({"device": "GPU"}, {"versions": {**by["versions"], "torch": "3"}}):
        assert recorded(made, {**by, **other}, tmp_path) is None


def entry(value, width=0.3, **more):
    return {
        "metrics": {"fd_x_1k": value},
        "plus_minus_95": {"fd_x_1k": width},
        "nfe": 1,
        "num_samples": 1000,
        "labels": "random",
        "seed": 0,
        "pixels_sha256": "a",
        "seconds": {"features": 1.0},
        "versions": {},
        "device": "CPU",
        "ranks": 1,
        "warnings": ["few"],
        **more,
    }


def test_summary_of_three_seeds(tmp_path):
    entries = [entry(value, seed=seed) for seed, value in enumerate((3.0, 4.0, 5.0))]
    total = summary(entries)
    assert (total["metrics"], total["std"], total["lowest"]) == ({"fd_x_1k": 4}, {"fd_x_1k": 1}, {"fd_x_1k": 3})
    assert total["plus_minus_95"]["fd_x_1k"] == pytest.approx(0.3 / np.sqrt(3)) and total["seeds"] == [0, 1, 2]
    assert total["warnings"] == ["few"] and "seed" not in total and "pixels_sha256" not in total
    assert "4 +- 0.17 at 95 %, std 1 over 3 seeds, lowest 3" in table(total)
    of_edm2 = [{**one, "protocol": "edm2"} for one in entries]
    (warning,) = PROTOCOLS["edm2"].overridden_seeds(1)
    of_edm2[0] = {**of_edm2[0], "warnings": ["few", warning]}
    del of_edm2[0]["plus_minus_95"]  # as of older versions
    assert summary(of_edm2)["warnings"] == ["few"] and summary(of_edm2)["plus_minus_95"] == {}
    assert summary(of_edm2[:2])["warnings"] == ["few", *PROTOCOLS["edm2"].overridden_seeds(2)]
    for one in (*entries, total, total):
        record(one, tmp_path)
    assert len(read_entries(tmp_path / "metrics.json")) == 4


def test_two_results_differ_only_beyond_both_bands():
    """At 95 %, for independent samples: 0.5 = (0.3^2 + 0.4^2)^(1/2). The other is named."""
    other = entry(10.0, 0.4, step=1500, ema="0.999")
    assert "against 10 +- 0.4 (nfe 1, step 1500, ema 0.999, seed 0): a" in verdict(entry(9.0), other, "fd_x_1k")
    for value, text in {
        10.49: "+0.49 +- 0.5 at 95 %, no more than noise",
        9.51: "no more than noise",
        10.51: "+0.51 +- 0.5 at 95 %, higher beyond noise",
        9.49: "lower beyond noise",
    }.items():
        assert text in verdict(entry(value), other, "fd_x_1k")


def test_only_results_of_one_protocol_are_compared(tmp_path):
    out = tmp_path / "run/eval"
    out.mkdir(parents=True)
    entries = [
        entry(1.0),
        entry(2.0, protocol="adm"),
        entry(3.0, labels="balanced"),
        entry(4.0, sweep=True),
        entry(5.0, in_training=True),
        entry(6.0, nfe=2),
    ]
    (out / "metrics.json").write_text(json.dumps(entries))

    def found(path=tmp_path / "run", metric="fd_x_1k", **wanted):
        return entry_against(path, entry(0.0, **wanted), metric)["metrics"]["fd_x_1k"]

    assert found() == found(path=out) == found(path=out / "metrics.json") == 2  # the newest that can be
    assert found(labels="balanced", seed=7) == 3 and found(nfe=2) == 6
    for refused, text in (
        ({"protocol": "imf-jax"}, "another protocol; its protocol is adm, this one's imf-jax, its labels"),
        ({"features_sha256": "b"}, "its features_sha256 is None, this one's b"),
        ({"labels": "other"}, "its labels is balanced, this one's other"),
        ({"metric": "fid50k"}, "no fid50k in it; it has fd_x_1k"),
        ({"nfe": 4}, "it has no results of nfe 4"),
        ({"path": tmp_path / "nowhere"}, "no results in"),
    ):
        with pytest.raises(UserError, match=text) as caught:
            found(**refused)
        assert "\n" not in str(caught.value)
    assert found(labels=None, nfe=None) == 3  # images from files: the newest, with the fewest network calls
    last = [entry(7.0, step=9, seeds=[0, 1]), entry(8.0, step=9), entry(9.0, step=5), entry(10.0, step=9, nfe=2)]
    (out / "metrics.json").write_text(json.dumps([*entries, *last, entry(11.0, step=9, sampler="restart")]))
    assert found() == found(nfe=None, statistics="streaming") == 7  # of the last step, of the most seeds
    other = entry_against(out, entry(0.0, sampler="restart"), "fd_x_1k")  # made alike
    assert other["metrics"]["fd_x_1k"] == 11 and "sampler restart" in verdict(entry(9.0), other, "fd_x_1k")
    (out / "metrics.json").write_text(json.dumps([{**entry(1.0), "plus_minus_95": {}}]))
    with pytest.raises(UserError, match="has no band at 95 %; measure it again"):
        found()
