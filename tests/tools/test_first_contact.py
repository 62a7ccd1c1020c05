"""tools/bench/first_contact.sh: its table of predictions and measurements, its options, and how it goes on."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, run_python

SCRIPT = ROOT / "tools/bench/first_contact.sh"


def call(*arguments, expect=0):
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([SCRIPT, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def rows(out: Path, name: str) -> dict[str, dict]:
    """Predictions of a line by key."""
    checks = json.loads((out / "first_contact.json").read_text())["checks"]
    return {row["key"]: row for check in checks if check["name"] == name for row in check["predictions"]}


def test_predictions_stand_beside_measurements(tmp_path):
    out = tmp_path
    for folder in ("results", "logs"):
        (out / folder).mkdir()
    (out / "list.tsv").write_text("device\t60\nstep\t300\nslow\t5\nbroken\t9\nlater\t9\n")
    (out / "done.tsv").write_text("device\t2\t0\nstep\t70\t0\nslow\t5\t124\nbroken\t1\t3\n")
    (out / "results/device.json").write_text('{"device": "NVIDIA H100", "torch": "2.11.0", "attention": "FLASH"}')
    numbers = {"ms": 113.9, "mfu": 0.3, "low": 79.9, "peak": 24, "waits": 3, "of": {"products": 55.5}, "idle": None}
    (out / "results/step.json").write_text(json.dumps(numbers))
    (out / "results/slow.json").write_text('{"ms": 3')  # killed while it wrote
    (out / "logs/broken.err").write_text("Traceback\nerror: no GPU | here\n\n")
    expected = [
        *(("device", "attention", "is", value, "source") for value in ("CUDNN", "FLASH")),
        *(("step", *row, "arithmetic") for row in (("ms", "about", "95"), ("low", "about", "100"))),
        *(("step", *row, "arithmetic") for row in (("mfu", "at_most", "0.2"), ("peak", "at_most", "24.0"))),
        *(("step", *row, "counted") for row in (("waits", "at_most", "2"), ("of.products", "about", "55"))),
        *(("step", key, "about", "1", "") for key in ("idle", "absent")),
        ("later", "ms", "about", "1", ""),
    ]
    (out / "expected.tsv").write_text("".join("\t".join(row) + "\n" for row in expected))
    run_python("tools/bench/first_contact.py", "table", out, expect=1)
    missed = {key: row["is_missed"] for key, row in rows(out, "step").items()}
    assert missed == {
        "ms": False,
        "low": True,
        "mfu": True,
        "peak": False,
        "waits": True,
        "of.products": False,
        "idle": None,
        "absent": None,
    }
    assert rows(out, "step")["ms"]["ratio"] == pytest.approx(113.9 / 95)
    text = (out / "first_contact.md").read_text()
    assert text.startswith("# First contact: NVIDIA H100, torch 2.11.0\n\n2 of 5 checks passed; failed: slow, broken; ")
    assert "missed by more than 20%: device: attention, step: low, step: mfu, step: waits.\n" in text
    assert "| **slow** | FAILED: over its time limit after 5 s |" in text
    assert "| **broken** | FAILED: exit code 3 after 1 s: error: no GPU / here |" in text
    assert "| **later** | not run |" in text
    assert "| | low | 100 | 79.9 **missed** | 0.799 | arithmetic |" in text
    assert "| | mfu | at most 0.2 | 0.3 **missed** | 1.5 | arithmetic |" in text


def test_the_script_is_clean():
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([checker, "-x", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("options", [[], ["OUT", "MORE"], ["OUT", "--minutes", "x"], ["OUT", "--no-such"], ["--only"]])
def test_a_wrong_call_is_explained(options):
    assert "first_contact.sh OUT [--minutes N]" in call(*options, expect=2).stderr


def test_wheels_are_installed_below_the_output(tmp_path):
    """A package without a network, where python finds it; the interpreter's own packages stay as they are."""
    wheels, info = tmp_path / "wheels", "hand_made-1.0.dist-info"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "hand_made-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("hand_made.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: hand-made\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    call(tmp_path / "out", "--tiny", "--wheels", wheels, "--only", "wheels")
    assert (tmp_path / "out/packages/hand_made.py").is_file()
    assert "passed" in json.loads((tmp_path / "out/first_contact.json").read_text())["checks"][0]["outcome"]


def test_it_goes_on_with_the_lines_that_have_no_result(tmp_path):
    out = tmp_path / "out"
    wrong = call(out, "--tiny", "--only", "no-such-line", expect=2)
    assert "error: --only no-such-line: no such line" in wrong.stderr
    names = [line.split("\t")[0] for line in (out / "list.tsv").read_text().splitlines()]
    assert len(names) == len(set(names)) >= 30 and not (out / "done.tsv").read_text()
    (out / "done.tsv").write_text("".join(f"{name}\t1\t0\n" for name in names if name != "device"))
    said = call(out, "--tiny").stdout.split()
    assert said[1] == "device" and said[2].endswith("first_contact.md") and len(said) == 3
    assert rows(out, "device")["product_tflops"]["measured"] > 0
    assert "the predictions do not apply" in (out / "first_contact.md").read_text()
