"""The small tools, run as a user runs them with a few steps; and the benches, which must agree with their peers."""

import json
import os

import numpy as np
import pytest
from conftest import FEATURES, TINY, VAE, run_python, write_digits
from PIL import Image

from mf_dist.data.image_folder import list_images
from mf_dist.models.sizes import SHAPES, named_model


def test_digits_are_written_completely_and_in_two_parts(tmp_path):
    run_python("tools/demo/write_digits.py", "--out", tmp_path / "digits", "--split", tmp_path / "split")
    whole, a, b = (list_images(tmp_path / name) for name in ("digits", "split/a", "split/b"))
    assert (len(whole.paths), len(a.paths), len(b.paths)) == (1797, 797, 1000)
    assert set(a.paths) | set(b.paths) == set(whole.paths) and not set(a.paths) & set(b.paths)
    image = Image.open(whole.root / whole.paths[0])
    assert image.size == (32, 32) and image.mode == "RGB"


@pytest.mark.dist
def test_small_networks_train_and_are_usable(tmp_path, images):
    """All files that the tools write follow the umask."""
    run_python("tools/train_vae.py", "--images", images, "--out", tmp_path / "vae", "--steps", 2)
    run_python(
        "tools/encode_latents.py",
        "--images",
        images,
        "--out",
        tmp_path / "latents",
        "--vae",
        tmp_path / "vae",
        "--resolution",
        32,
    )
    run_python("tools/train_features.py", "--images", images, "--name", "few", "--out", tmp_path / "few", "--steps", 3)
    run_python(
        "tools/fid_eval.py",
        "--images",
        images,
        "--features",
        tmp_path / "few",
        "--reference",
        images,
        "--out",
        tmp_path / "out",
    )
    assert json.loads((tmp_path / "out/metrics.json").read_text())[0]["metrics"]["fd_few_150"] < 1e-6
    umask = os.umask(0)
    os.umask(umask)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 7 and {path.stat().st_mode & 0o777 for path in written} == {0o666 & ~umask}


def test_demo_table_and_its_check(tmp_path):
    """Real digits as samples: the SVC agrees with their labels, and not with labels shifted by one."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images[:100] * 15.9375).astype(np.uint8).repeat(4, 1).repeat(4, 2)[..., None].repeat(3, 3)
    line = {
        "step": 5,
        "samples_seen": 80,
        "seconds_per_step": 0.1,
        "raw_loss_r_equals_t": 2.0,
        "raw_loss_r_below_t": 3.0,
    }
    for run, nfes in {"run": (1, 2), "flow": (50,), "real": (None,)}.items():
        out = tmp_path / run / ("" if run == "real" else "eval")
        out.mkdir(parents=True)
        (tmp_path / run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        entries = [
            {"nfe": n, "metrics": {"fd_digits_100": 2.0}, "num_samples": 100, "reference_images": 7} for n in nfes
        ]
        swept = {"sweep": True, "nfe": 1, "metrics": {"fd_digits_100": 77.0}}  # no result
        (out / "metrics.json").write_text(json.dumps([*entries, swept]))
    folders = [("--" + name, tmp_path / name) for name in ("run", "flow", "real")]
    command = ["tools/demo/demo_table.py", *(part for pair in folders for part in pair), "--min-svc", 0.95]
    np.savez(tmp_path / "run/eval/samples_nfe1.npz", pixels, digits.target[:100])
    good = run_python(*command)
    assert "77" not in good.stdout
    assert "MeanFlow            1" in good.stdout and "160" in good.stdout  # 80 images in 5 steps of 0.1 s
    np.savez(tmp_path / "run/eval/samples_nfe1.npz", pixels, (digits.target[:100] + 1) % 10)
    assert "the model did not learn" in run_python(*command, expect=2).stderr


def test_named_sizes():
    for letters, (depth, width, heads) in SHAPES.items():
        model = named_model(f"{letters}/2", 32)
        assert (model.depth, model.hidden_size, model.num_heads, model.patch_size) == (depth, width, heads, 2)
        assert width % heads == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory, latents, images):
    root = tmp_path_factory.mktemp("bench")
    config = root / "tiny.yaml"
    config.write_text(TINY.format(run=root / "run", latents=latents, features=FEATURES, images=images))
    run_python("-m", "mf_dist.train", config, "train.total_images=32", "log.sample_every_images=0")
    return root / "run"


@pytest.mark.dist
def test_precision_bench(run):
    lines = run_python("tools/bench/bench_precision.py", "--checkpoint", run, "--batches", 2).stdout.splitlines()
    rows = [line for line in lines[2:] if not line.startswith("residual ")]
    table = {line[:34].strip(): [float(text) for text in line[34:].split()] for line in rows}
    assert table["float64"][:2] == [0, 0]
    assert 0 < table["explicit tangents, fp32 JVP"][0] < table["explicit tangents, bf16"][0] < 0.1
    assert table["torch.func.jvp, bf16"][0] < 0.1
    whole, small = table["discrete, share 1.0"], table["discrete, share 0.002"]
    assert small[1] < 1e-3 < small[0] and whole[0] < small[0]  # errors grow where the share is small


@pytest.mark.dist
@pytest.mark.long
def test_step_bench_measures_equal_losses(tmp_path):
    """It refuses to time variants that compute another loss, so a successful exit tests the peers."""
    run_python(
        "tools/bench/bench_step.py",
        "--depth",
        1,
        "--rounds",
        1,
        "--guidance",
        "guided",
        "--variants",
        "all",
        "--json",
        tmp_path / "bench.json",
    )
    result = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["variant"]: row for row in result["results"]}
    assert set(rows) == {"plain", "diffusers", "ours", "blocks", "authors", "port", "tim"}
    assert rows["plain"]["ratio"] == 1 and rows["ours"]["saved_bytes"] <= 1.02 * rows["plain"]["saved_bytes"]
    assert (
        rows["ours"]["peak_bytes"] > rows["ours"]["saved_bytes"]
        and rows["diffusers"]["flops"] == rows["plain"]["flops"]
    )
    assert rows["ours"]["flops"] < rows["authors"]["flops"] < rows["port"]["flops"]


@pytest.mark.dist
def test_encode_bench_counts_the_convolutions(tmp_path):
    import torch

    from mf_dist.vae import Vae

    tool = [
        "tools/bench/bench_encode.py",
        "--vae",
        VAE,
        "--resolution",
        32,
        "--batch",
        2,
        "--rounds",
        1,
        "--forms",
        "eager",
    ]
    first, fp32, bf16 = run_python(*tool).stdout.splitlines()
    vae, counted = Vae(str(VAE), torch.device("cpu")), []
    for module in vae.model.encoder.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(lambda m, x, y: counted.append(2 * y.numel() * m.weight[0].numel()))
    vae.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert float(first.split(": ")[1].split()[0]) * 1e9 == pytest.approx(sum(counted), rel=0.05)  # and attention
    assert fp32.endswith("error 0.0e+00") and 1e-5 < float(bf16.split()[-1]) < 3e-2
    assert "expected some of" in run_python(*tool[:-1], "fast", expect=2).stderr


def test_degradation_increases_the_distance(tmp_path):
    """Eight pieces of each of the two photographs that scikit-learn ships; digits are farther still."""
    from sklearn.datasets import load_sample_images

    for name, image in zip("ab", load_sample_images().images, strict=True):
        for i in range(8):
            y, x = divmod(i, 4)
            piece = image[y * 140 : y * 140 + 140, x * 160 : x * 160 + 140]
            Image.fromarray(piece).save(tmp_path / f"{name}{i:02d}.png")
    digits = write_digits(tmp_path.with_name("digits"), 8)
    done = run_python(
        "tools/bench/bench_degradations.py",
        "--images",
        tmp_path,
        "--other",
        digits,
        "--resolution",
        140,
        "--strengths",
        1,
    )
    rows = [line.rsplit(maxsplit=2) for line in done.stdout.splitlines()]
    assert done.stdout.count("every step is farther") == 3 and "NOT" not in done.stdout
    assert rows[4][0] == "other images" and float(rows[4][2]) > max(float(row[-1]) for row in rows[:4])


def test_metrics_bench_agrees_with_its_peers():
    done = run_python("tools/bench/bench_metrics.py", "--count", 600, "--dimension", 64, "--rounds", 1)
    rows = [line for line in done.stdout.splitlines() if line.startswith(("ours ", "scipy ", "torch-fidelity "))]
    differences = [abs(float(line.split()[-1])) for line in rows]
    assert len(rows) == 9 and differences[::3] == [0, 0, 0] and "peak memory" in done.stdout
    assert max(differences[:3]) < 1e-9 and max(differences) < 1e-5  # where the peers lose half of the digits


@pytest.mark.dist
def test_decode_bench_finds_only_rounding_differences():
    done = run_python("tools/bench/bench_decode.py", "--width", 16, "--latent-size", 8, "--rounds", 1, "--eager")
    plain, last, bf16 = (line.split()[-2:] for line in done.stdout.splitlines()[1:4])
    assert plain == ["0.00%", "0"] and int(last[1]) <= 1 and float(last[0][:-1]) < 1 < float(bf16[0][:-1])


def test_bench_optimizer():
    lines = run_python("tools/bench/bench_optimizer.py", "--parameters", 100_000, "--rounds", 1).stdout.splitlines()
    assert [line[:22].strip() for line in lines[1:]] == [
        "limit",
        "one after the other",
        "ours, in pieces",
        "ours, compiled",
        "torch, fused, no EMA",
    ]
