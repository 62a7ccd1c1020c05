"""Run folders as training writes them, and a parser of the page, for the tests of the report."""

import json
from html.parser import HTMLParser

import numpy as np

from mf_dist.report.page import write_report

CONFIG = {
    "run_dir": "runs/a",
    "data": {"path": "data/a"},
    "train": {"total_images": 1600, "batch_size": 16},
    "model": {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "patch_size": 2,
        "latent_size": 8,
        "latent_channels": 4,
        "num_classes": 3,
    },
    "meanflow": {"kappa": 0.5},
}
MARKUP = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&{{7*7}}"


def line(step, **changes):
    return {
        "step": step,
        "samples_seen": 16 * step,
        "raw_loss_r_equals_t": 200 / step,
        "raw_loss_r_below_t": 300 / step,
        "v_loss": 210 / step,
        "du_dt_norm": 20.0,
        "grad_norm": 0.5,
        "lr": 1e-3,
        "skipped_steps": 0,
        "clipped_steps": 0,
        "images_per_second": 640.0,
        "seconds_per_step": 0.025,
        "data_wait_share": 0.01,
        "memory_gib": 0.7,
        **changes,
    }


def write_run(folder, lines=None, config=CONFIG, classes=("a", "b", "c")):
    """The folder of a run with two log lines."""
    checkpoint = folder / "checkpoints/step-00000004"
    checkpoint.mkdir(parents=True)
    lines = [line(2), line(4)] if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    state = {"step": 4, "config": config, "classes": list(classes), "versions": {"ranks": "2", "device": "x86_64 CPU"}}
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "manifest.json").write_text("{}")
    return folder


def write_samples(folder, count, side, generator, nfe=1, number_of_classes=3):
    (folder / "eval").mkdir(exist_ok=True)
    pixels = generator.integers(0, 256, (count, side, side, 3), np.uint8)
    labels = np.arange(count) % number_of_classes
    np.savez(folder / f"eval/samples_nfe{nfe}.npz", pixels, labels)
    return pixels, labels


class Page(HTMLParser):
    """The elements and texts of a page, without scripts and styles, and its embedded data."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self.data, self._inside = [], [], "", None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = (tag, dict(attrs))

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        tag, attrs = self._inside or ("", {})
        if attrs.get("id") == "data":
            self.data += data
        elif tag not in ("script", "style"):
            self.texts.append(data.strip())

    def text(self):
        return " ".join(" ".join(self.texts).split())


def report(*runs):
    out = runs[0] / "report.html"
    write_report(list(runs), out)
    page = Page(out)
    return page, json.loads(page.data)
