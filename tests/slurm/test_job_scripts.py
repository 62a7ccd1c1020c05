"""The job scripts as text; tests/slurm submits them."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, repository_files

SCRIPTS = [*repository_files("slurm", "*.sh", 6), ROOT / "slurm/site.env.example", ROOT / "tests/slurm/node.sh"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_is_clean(script):
    subprocess.run(["bash", "-n", script], check=True)
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([checker, "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [p for p in SCRIPTS if "\n#SBATCH --" in p.read_text()], ids=lambda path: path.name)
def test_a_job_can_be_started_again(script):
    """A requeued job needs an appended log and a signal in time; and scripts hold no numbers of the recipe."""
    text = script.read_text()
    for line in ("--requeue", "--open-mode=append", "--signal=B:USR1@120"):
        assert f"#SBATCH {line}\n" in text
    code = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(code) == 2, "a script sources common.sh and runs one command"
