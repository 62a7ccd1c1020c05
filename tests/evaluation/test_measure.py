"""From images to an entry of metrics.json, with the digits' network: blocks, sources, metrics, records, pictures."""

import importlib.metadata
import json
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FEATURES, ROOT, write_digits
from PIL import Image
from test_reference import Bomb

from mf_dist.evaluation.blocks import compute_blocks, read_block
from mf_dist.evaluation.confidence import plus_minus
from mf_dist.evaluation.features import FolderNetwork
from mf_dist.evaluation.measure import Settings, measure, open_reference, pick
from mf_dist.evaluation.metrics import choose_kinds, metric_name
from mf_dist.evaluation.pictures import nearest_rows, save_neighbours
from mf_dist.evaluation.report import read_entries, record, save_images, save_npz, table
from mf_dist.evaluation.sources import ImageFiles, NpzImages, open_source
from mf_dist.runtime.distributed import Ranks
from mf_dist.runtime.errors import UserError

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def network():
    return FolderNetwork(FEATURES, torch.device("cpu"))


@pytest.fixture(scope="module")
def pixels(images):
    return ImageFiles(images, None).read(0, 150)[0]


def as_npz(path, pixels, **more):
    np.savez(path, arr_0=pixels.transpose(0, 2, 3, 1), **more)
    return str(path)


def test_blocks_are_reused_or_recomputed(images, network, tmp_path):
    """Damaged blocks and those of another plan are recomputed; another block size gives the same rows to 1e-5."""
    source = ImageFiles(images, None)
    whole = compute_blocks(source, network, ALONE, tmp_path, "x", block=40)
    rows = whole.rows("pooled")
    assert rows.shape == (150, 64) and sorted(p.name for p in whole.folder.glob("*.npz"))[-1] == "block-00003.npz"
    files = sorted(whole.folder.glob("*.npz"))
    times = [path.stat().st_mtime_ns for path in files]
    raw = bytearray(files[1].read_bytes())
    raw[len(raw) // 2] ^= 1
    files[1].write_bytes(raw)
    files[2].unlink()
    again = compute_blocks(source, network, ALONE, tmp_path, "x", block=40)
    assert again.folder == whole.folder and np.array_equal(again.rows("pooled"), rows)
    assert [a == path.stat().st_mtime_ns for a, path in zip(times, files, strict=True)] == [True, False, False, True]
    assert list(whole.parts("pooled", range(5, 4))) == []  # a rank without blocks reads none, not all
    assert np.array_equal(whole.select("pooled", [3, 39, 40, 149]), rows[[3, 39, 40, 149]])
    with np.load(files[0]) as arrays:
        np.savez(files[0], **{**arrays, "seconds": np.array('{"images": 1000, "features": 7}')})
    seconds = compute_blocks(source, network, ALONE, tmp_path, "x", block=40).seconds  # includes earlier attempts
    assert 1000 < seconds["images"] < 1007 and 7 < seconds["features"] < 14
    compute_blocks(source, network, ALONE, tmp_path, "x", block=40, resume=False)
    assert all(path.stat().st_mtime_ns not in times for path in files)
    other = compute_blocks(source, network, ALONE, tmp_path, "x", block=50)
    assert other.folder != whole.folder and other.pixels_sha256 != whole.pixels_sha256  # hashed by block
    np.testing.assert_allclose(other.rows("pooled"), rows, atol=1e-5)
    files[0].write_bytes(b"")
    with pytest.raises(UserError, match="block-00000.npz is damaged or missing"):
        read_block(whole.folder, 0)


def test_it_measures_from_a_checkout_that_is_not_installed(images, network, tmp_path, monkeypatch):
    installed = importlib.metadata.version

    def version(package):
        if package == "mf_dist":
            raise importlib.metadata.PackageNotFoundError(package)
        return installed(package)

    monkeypatch.setattr("mf_dist.evaluation.blocks.version", version)
    assert compute_blocks(ImageFiles(images, None), network, ALONE, tmp_path, "x", block=150).rows("pooled").any()


def test_folder_tar_and_npz_give_the_same_images(images, network, tmp_path, pixels):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for path in sorted(images.rglob("*.png")):
            archive.add(path, f"{path.parent.name}_{path.name}")
    sources = [open_source(str(s), None) for s in (images, tmp_path / "x.tar", as_npz(tmp_path / "x.npz", pixels))]
    for source in sources:
        assert source.count == 150 and source.identity["resolution"] == 32
        assert np.array_equal(source.read(60, 90)[0], pixels[60:90]) and np.array_equal(
            source.read(0, 9)[0], pixels[:9]
        )
    sources[2].check()
    hashes = {compute_blocks(s, network, ALONE, tmp_path / "work", "x").pixels_sha256 for s in sources}
    assert len(hashes) == 1


def test_images_of_several_sizes_need_a_resolution(tmp_path):
    for name, size in {"a": (32, 32), "b": (48, 40)}.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    with pytest.raises(
        UserError, match="'b.png': it is 48x40, the first is 32x32; to crop all to one size give --reso"
    ):
        ImageFiles(tmp_path, None).read(0, 2)
    assert ImageFiles(tmp_path, 16).read(0, 2)[0].shape == (2, 3, 16, 16)
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match="is 48x40, not square: give --resolution"):
        ImageFiles(tmp_path, None)


def test_refused_npz_images(tmp_path, pixels):
    floats = np.full((4, 8, 8, 3), np.nan, np.float32)
    for arrays, text in (
        ({"arr_0": floats}, "type float32, expected .* uint8"),
        ({"arr_0": pixels}, r"expected \(N, R, R, 3\)"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "expected"),
        ({"x": pixels}, "arr_0"),
        ({"arr_0": np.array([Bomb()], object)}, "expected"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.uint8), "arr_1": np.zeros(3)}, "arr_1 has shape"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.uint8), "arr_1": np.array([Bomb()] * 4, object)}, "cannot read"),
    ):
        np.savez(tmp_path / "x.npz", **arrays)
        with pytest.raises(UserError, match=text):
            NpzImages(tmp_path / "x.npz")
    path = as_npz(tmp_path / "good.npz", pixels)
    raw = bytearray((tmp_path / "good.npz").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "good.npz").write_bytes(raw)
    with pytest.raises(UserError, match="is damaged"):
        NpzImages(path).check()
    (tmp_path / "good.npz").write_bytes(raw[:-40])
    with pytest.raises(UserError, match="cannot read images"):
        NpzImages(path)


def test_metric_names_have_network_and_count(network):
    inception = SimpleNamespace(is_inception=True, name="inception")
    assert metric_name("fid", inception, 50_000) == "fid50k" and metric_name("sfid", inception, 10_000) == "sfid10k"
    assert metric_name("kid", inception, 1234) == "kid1234"
    assert metric_name("precision", inception, 50_000) == "precision50k"
    assert metric_name("fid", network, 1000) == "fd_digits_1k" and metric_name("kid", network, 60) == "kd_digits_60"


def measured(images, reference, network, tmp_path, **settings):
    chosen = Settings(**settings)
    real = open_reference(str(reference), network, None, chosen, ALONE, tmp_path / "work")
    source = open_source(str(images), None)
    return measure(source, "x", network, real, chosen, {"images": str(images)}, ALONE, tmp_path / "work"), real, source


def test_entry_is_complete(images, network, tmp_path):
    result, _, _ = measured(images, images, network, tmp_path)
    entry = json.loads(json.dumps(result.entry))
    assert abs(entry["metrics"]["fd_digits_150"]) < 1e-9
    assert entry["metrics"]["precision_digits_150"] == entry["metrics"]["recall_digits_150"] == 1
    assert {"is_digits_150", "is_digits_150_std", "kd_digits_150", "kd_digits_150_std"} < entry["metrics"].keys()
    assert entry["features_sha256"] == network.sha256 and entry["pixels_sha256"] == entry["reference_sha256"]
    assert entry["num_samples"] == entry["reference_images"] == entry["kid_subset_size"] == 150
    assert entry["versions"].keys() >= {"torch", "torch-fidelity", "scipy", "pillow", "code"} and entry["ranks"] == 1
    assert entry["seconds"].keys() >= {"images", "features", "statistics", "fid", "pr", "kid", "this_try"}
    assert "fd_digits_150" in table(entry) and "FID" not in table(entry) and not entry["warnings"]


def test_npz_with_and_without_statistics_as_reference(images, network, tmp_path, pixels):
    """ADM's layout has statistics, and images for precision and recall; without statistics all is computed."""
    own = measured(images, images, network, tmp_path)[1]
    adm = as_npz(tmp_path / "adm.npz", pixels, mu=own.pooled.mean, sigma=own.pooled.covariance)
    bare = as_npz(tmp_path / "bare.npz", pixels)
    expected = measured(images, images, network, tmp_path)[0].entry["metrics"]
    for path in (adm, bare):
        result, reference, _ = measured(images, path, network, tmp_path)
        assert result.entry["metrics"] == pytest.approx(expected, abs=1e-9)
        assert np.array_equal(reference.rows, own.rows) and np.array_equal(reference.real_image(9), pixels[9])
    result, reference, source = measured(images, adm, network, tmp_path, kinds=("fid",))
    assert reference.rows is None and result.entry["reference_pictures"] == 150
    why = save_neighbours(source, result.blocks, reference, tmp_path / "no.png")
    assert "pr or kid in --metrics" in why and not (tmp_path / "no.png").exists()
    bare = replace(reference, images=None)
    assert "statistics but no images" in save_neighbours(source, result.blocks, bare, tmp_path / "no.png")


def test_streaming_agrees_with_exact(images, network, tmp_path):
    other = write_digits(tmp_path / "more", 110)
    one, two = (measured(other, images, network, tmp_path, exact=exact)[0].entry["metrics"] for exact in (True, False))
    assert one.keys() == two.keys() and one["fd_digits_110"] == pytest.approx(two["fd_digits_110"], rel=1e-9)


def test_collapsed_generator_has_high_precision_and_low_recall(images, network, tmp_path, pixels):
    """Swapped arguments would swap the two values."""
    few = as_npz(tmp_path / "few.npz", np.concatenate([pixels[:5]] * 20))
    numbers = measured(few, images, network, tmp_path, kinds=("pr",))[0].entry["metrics"]
    assert numbers["precision_digits_100"] == 1 and numbers["recall_digits_100"] < 0.1


def test_the_inception_score_does_not_depend_on_the_order_of_classes(images, network, tmp_path, pixels):
    """Without shuffling, splits of samples sorted by class have one class each, and the score falls to about 1."""
    scores = []
    for name, order in {"sorted": np.arange(150), "mixed": np.random.default_rng(1).permutation(150)}.items():
        path = as_npz(tmp_path / f"{name}.npz", pixels[order])
        scores.append(measured(path, images, network, tmp_path, kinds=("is",))[0].entry["metrics"]["is_digits_150"])
    assert scores[0] == pytest.approx(scores[1], rel=0.1) and min(scores) > 4


def test_unavailable_metrics_are_refused_with_the_reason(images, network, tmp_path):
    _, reference, _ = measured(images, images, network, tmp_path, kinds=("fid",))
    assert choose_kinds(None, network, reference, 150) == ("fid", "is", "pr", "kid")
    for kind, count, text in (
        ("sfid", 150, "no spatial part"),
        ("is", 9, "fewer than its 10 splits"),
        ("pr", 3, "too few images"),
        ("fdd", 150, "expected some of fid,sfid,is,pr,kid"),
    ):
        with pytest.raises(UserError, match=text):
            choose_kinds((kind,), network, reference, count)


def test_record_replaces_only_entries_of_the_same_protocol(tmp_path):
    entry = {"metrics": {"fd": 1.0}, "nfe": 1, "seed": 0, "seconds": {"all": 1}}
    for value, nfe in ((1.0, 1), (2.0, 2), (3.0, 1)):
        record({**entry, "metrics": {"fd": value}, "nfe": nfe}, tmp_path)
    assert [(e["nfe"], e["metrics"]["fd"]) for e in read_entries(tmp_path / "metrics.json")] == [(2, 2.0), (1, 3.0)]
    record({**entry, "metrics": {"is": 9.0}, "pixels_sha256": "a"}, tmp_path / "more")
    record({**entry, "metrics": {"fd": 1.0}, "pixels_sha256": "a"}, tmp_path / "more")  # metrics are merged
    record({**entry, "metrics": {"fd": 5.0}, "pixels_sha256": "b"}, tmp_path / "more")  # other images of the same path
    metrics = [e["metrics"] for e in read_entries(tmp_path / "more/metrics.json")]
    assert metrics == [{"is": 9.0, "fd": 1.0}, {"fd": 5.0}]
    apart = {"nfe": 4, "pixels_sha256": "a"}  # settings of single metrics are not part of the protocol
    record({**apart, "metrics": {"precision": 0.7}, "pr_real_images": 90}, tmp_path / "apart")
    record({**apart, "metrics": {"kid": 0.1}, "kid_subset_size": 40}, tmp_path / "apart")
    (both,) = read_entries(tmp_path / "apart/metrics.json")
    assert both["metrics"] == {"precision": 0.7, "kid": 0.1}
    assert (both["pr_real_images"], both["kid_subset_size"]) == (90, 40)
    for damaged in ("{", '[{"metric": "fd", "value": 1}]', "[1]"):
        (tmp_path / "metrics.json").write_text(damaged)
        with pytest.raises(UserError, match="damaged or of an older version"):
            record(entry, tmp_path)
        assert (tmp_path / "metrics.json").read_text() == damaged


def test_concurrent_records_lose_no_entry(tmp_path):
    code = """if 1:
        import sys
        from pathlib import Path
        from mf_dist.evaluation.report import record
        for i in range(40):
            record({"metrics": {"fd": i}, "nfe": i, "seed": int(sys.argv[2])}, Path(sys.argv[1]))"""
    both = [subprocess.Popen([sys.executable, "-c", code, tmp_path, str(seed)], cwd=ROOT) for seed in (0, 1)]
    assert [process.wait() for process in both] == [0, 0]
    assert len(read_entries(tmp_path / "metrics.json")) == 80


def test_npz_has_the_layout_that_adms_reader_streams(network, tmp_path, pixels):
    """Its reader opens the member inside the zip, reads the header, then raw bytes; no Fortran order, no objects."""
    labels = np.arange(150) // 15
    source = NpzImages(as_npz(tmp_path / "source.npz", pixels, arr_1=labels))
    blocks = compute_blocks(source, network, ALONE, tmp_path, "x", keep_pixels=True)
    save_npz(blocks, tmp_path / "samples.npz")
    with zipfile.ZipFile(tmp_path / "samples.npz") as archive, archive.open("arr_0.npy") as member:
        assert np.lib.format.read_magic(member) == (1, 0)
        assert np.lib.format.read_array_header_1_0(member) == ((150, 32, 32, 3), False, np.uint8)
        first = np.frombuffer(member.read(64 * 32 * 32 * 3), np.uint8).reshape(64, 32, 32, 3)
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    assert np.array_equal(first, pixels[:64].transpose(0, 2, 3, 1))
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as file:
        assert np.array_equal(file["arr_0"], pixels.transpose(0, 2, 3, 1))
        assert np.array_equal(file["arr_1"], labels)
    save_images(blocks, 60, tmp_path / "png")
    names = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert len(names) == 60 and names[0] == "000000_000.png"
    assert np.array_equal(np.asarray(Image.open(tmp_path / "png" / names[59])), pixels[59].transpose(1, 2, 0))


def test_nearest_neighbour_of_a_memorised_image_is_that_image(images, network, tmp_path, pixels):
    """Five samples are copies of training images, five are noise."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32)).astype(np.uint8)
    path = as_npz(tmp_path / "x.npz", np.concatenate([pixels[[7, 70, 30, 99, 140]], noise]))
    result, reference, source = measured(path, images, network, tmp_path)
    rows = result.blocks.rows("pooled")
    order, distances = nearest_rows(rows, reference.rows, 3)
    brute = ((rows[:, None].astype(float) - reference.rows[None]) ** 2).sum(2)
    assert np.array_equal(order, np.argsort(brute, axis=1)[:, :3])
    assert order[:5, 0].tolist() == [7, 70, 30, 99, 140] and distances[:5, 0].max() == 0 < distances[5:, 0].min()
    assert np.array_equal(reference.real_image(int(order[1, 0])), pixels[70])
    assert save_neighbours(source, result.blocks, reference, tmp_path / "near.png") is None
    picture = np.asarray(Image.open(tmp_path / "near.png"))
    top, near = 16, picture.shape[1] - 7 * 66
    sample = near - 10 - 66  # the gap before the real images is wider than between them
    shown = [picture[top : top + 64 : 2, left : left + 64 : 2] for left in (sample, near)]
    assert np.array_equal(shown[0], shown[1]) and np.array_equal(shown[0], pixels[7].transpose(1, 2, 0))


def test_at_most_ten_thousand_real_images_are_kept():
    assert pick(3) == [0, 1, 2] and len(pick(25_000)) == 10_000 and pick(20_000)[:3] == [0, 2, 4]
    assert max(pick(1_281_167)) < 1_281_167 and len({*pick(10_001)}) == 10_000


def test_the_distance_has_its_band_which_a_sweep_leaves_out(images, network, tmp_path):
    """Against the formula of the band for these rows; later metrics of the same images keep it."""
    other = write_digits(tmp_path / "more", 110)
    (result, reference, _), (without, _, _) = (
        measured(other, images, network, tmp_path / str(band), kinds=("fid",), with_band=band) for band in (True, False)
    )
    entry, rows = result.entry, result.blocks.rows("pooled")
    value, band = entry["metrics"]["fd_digits_110"], entry["plus_minus_95"]["fd_digits_110"]
    assert band == plus_minus(rows, 0, reference.pooled, value) and 0 < band < value
    assert f"{value:.6g} +- {band:.2g} at 95 %" in table(entry)
    assert without.entry["plus_minus_95"] == {} and "+-" not in table(without.entry)
    record(entry, tmp_path / "out")
    record({**entry, "metrics": {"is_digits_110": 8.0}, "plus_minus_95": {}}, tmp_path / "out")
    (both,) = read_entries(tmp_path / "out/metrics.json")
    assert both["metrics"] == {"fd_digits_110": value, "is_digits_110": 8.0}
    assert both["plus_minus_95"] == {"fd_digits_110": band}
