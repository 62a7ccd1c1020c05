"""The ablation: its wrong tangent leaves out time; and Fashion-MNIST as class folders."""

import gzip

import numpy as np
import pytest
import torch
from conftest import run_python
from oracles import func_jvp, small_dit
from PIL import Image
from wrong_tangent import without_time


def test_the_wrong_tangent_leaves_out_time():
    net = small_dit()
    g = torch.Generator().manual_seed(1)
    z, v = torch.randn(2, 3, 3, 4, 4, dtype=torch.float64, generator=g)
    r, t, y = torch.tensor([0.1, 0.2, 0.3]).double(), torch.tensor([0.5, 0.6, 0.9]).double(), torch.tensor([0, 1, 2])
    direction = (v, torch.zeros_like(t), torch.ones_like(t))
    u, du = without_time(net, z, r, t, y, direction)
    value, expected = func_jvp(lambda z: net(z, r, t, y), (z,), (v,))
    torch.testing.assert_close(u, value)
    torch.testing.assert_close(du, expected)
    assert (net(z, r, t, y, direction)[1] - du).abs().max() > 0.1 * du.abs().max()
    torch.testing.assert_close(without_time(net, z, r, t, y), value)


def write_idx(folder, count):
    for prefix in ("train", "t10k"):
        images, labels = np.zeros((count, 28, 28), np.uint8), np.arange(count, dtype=np.uint8)
        images[:, 3, 5] = 200 + labels
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes()
            (folder / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))


def test_fashion_mnist_becomes_folders(tmp_path):
    write_idx(tmp_path, 10)
    run_python("tools/study/write_fashion.py", "--idx", tmp_path, "--out", tmp_path / "out")
    image = np.asarray(Image.open(tmp_path / "out/test/7-sneaker/00007.png"))
    assert image.shape == (32, 32, 3) and image.sum() == 3 * 207 and image[5, 7, 0] == 207
    assert len(list((tmp_path / "out/train").glob("*/*.png"))) == 10


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_invalid_fashion_mnist_files_are_user_errors(tmp_path, damage):
    write_idx(tmp_path, 10)
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:20] if damage == "cut" else gzip.compress(b"not an IDX file at all"))
    failed = run_python("tools/study/write_fashion.py", "--idx", tmp_path, "--out", tmp_path / "out", expect=2)
    assert str(path) in failed.stderr and "Traceback" not in failed.stderr
