"""Runs on other data that start from the weights of a run on ten digits: what is kept; they train and sample."""

import numpy as np
import pytest
from conftest import encode, write_digits
from processes import losses, status, tensors, write_config
from sklearn.datasets import load_digits

pytestmark = pytest.mark.dist
ROWS = {
    # other data -> (digits by class folder, resolution, what the log says, rows of the label table that are kept)
    "7 classes": ([str(c) for c in range(7)], 32, "of 7 classes, 7 have the row of the same name", 8),
    "15 classes": ([f"{c:02}" if c > 9 else str(c) for c in range(15)], 32, "of 15 classes, 10 have the row", 11),
    "unconditional": (None, 32, "of 0 classes, 0 have the row", 1),
    "64 pixels": ([str(c) for c in range(10)], 64, "positions are computed for latents of 16", 11),
}


def write_classes(folder, classes, resolution):
    """Four digits of each class; those above 9 are the same as c mod 10."""
    digits = load_digits()
    if classes is None:
        return write_digits(folder, 30, classes=False)
    from PIL import Image

    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in np.flatnonzero(digits.target == int(name) % 10)[:4]:
            image = Image.fromarray(np.round(digits.images[i] * (255 / 16)).astype(np.uint8))
            image.resize((resolution, resolution)).convert("RGB").save(folder / name / f"{i}.png")
    return folder


@pytest.mark.parametrize("name", ROWS)
def test_a_run_on_other_data_starts_from_it(zygote, whole, tmp_path, name):
    classes, resolution, said, kept = ROWS[name]
    source, images = whole(1), write_classes(tmp_path / "images", classes, resolution)
    encode(images, tmp_path / "latents", resolution=resolution)
    config, log = write_config(tmp_path, "run", tmp_path / "latents", images), tmp_path / "log"
    guidance = ["meanflow.kappa=0"] if classes is None else []
    options = [f"train.init_from={source}", "train.total_images=16", *guidance]
    assert zygote.run(log, [config, "optim.lr=1e-30", *options]) == [0], log.read_text()
    assert said in log.read_text()
    ours, theirs = tensors(tmp_path / "run", 1), tensors(source, 30)
    masters = {key.removeprefix("master/"): a for key, a in ours.items() if key.startswith("master/")}
    differing = {key for key, a in masters.items() if not np.array_equal(a, theirs[f"ema-0.99/{key}"])}
    assert differing == (set() if name == "64 pixels" else {"label.weight"})
    rows, before = masters["label.weight"], theirs["ema-0.99/label.weight"]
    assert sum(any(np.array_equal(row, old) for old in before) for row in rows) == kept
    trained, more = tmp_path / "trained", ["train.total_images=160", "log.sample_every_images=160"]
    assert zygote.run(log, [config, *options, *more, f"run_dir={trained}"]) == [0], log.read_text()
    assert status(trained)["status"] == "finished" and len(losses(trained)) == 10
    assert len(list((trained / "samples").glob("*.png"))) == 1
