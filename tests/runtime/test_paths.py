"""Paths that no shell has expanded."""

import re

import pytest
from conftest import repository_files

from mf_dist.config.schema import load_config
from mf_dist.fault_tolerance.tool_status import STATUS_VARIABLE, count_finished_unit
from mf_dist.runtime.errors import UserError
from mf_dist.runtime.paths import expanded, expanded_path


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("GONE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    return tmp_path


def test_the_home_folder_and_variables_are_expanded_and_said(home, capsys):
    for text, path in {
        "~": f"{home}",
        "~/runs/x": f"{home}/runs/x",
        "~root/x": "/root/x",
        "$SCRATCH/x": "/scratch/me/x",
        "a/${SCRATCH}b/$HOME": f"a//scratch/meb/{home}",
    }.items():
        assert expanded(text) == path and str(expanded_path(text)) == path.replace("//", "/")
        assert capsys.readouterr().err == 2 * f"note: {text} is {path}\n"
    for text in (
        "runs/x",
        "./~",
        "a~b",
        "runs/~/x",
        "cost$5",
        "a$",
        "owner/name",
        "efflite0",
        "",
        "a\u202f\u3000\r\x1b",
    ):
        assert expanded(text) == text
    assert capsys.readouterr().err == ""


def test_only_rank_0_says_it(home, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert expanded("~/x") == f"{home}/x" and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("$GONE/x", r"path '\$GONE/x': the environment variable GONE is not set"),
        ("x/${GONE}", "the environment variable GONE is not set"),
        ("${SCRATCH:-y}", "the environment variable SCRATCH:-y is not set"),
        ("${}", "the environment variable  is not set"),
        ("runs/$(date)", "commands in a path are not run"),
        ("runs/\udcff", r"path 'runs/\\udcff' is not UTF-8; rename it"),
        ("${SCRATCH}/a\nb", "has a line break or a NUL; rename it"),
        ("runs/x\r", "ends in a carriage return: its script has Windows' line ends; remove them"),
        ("~nobody-of-this-name/x", "no home folder of ~nobody-of-this-name; write ./~nobody-of-this-name/x for"),
    ],
)
def test_what_cannot_be_expanded_is_refused(home, text, message):
    with pytest.raises(UserError, match=message):
        expanded(text)


def test_paths_of_a_config_are_expanded(home, tiny_config, capsys):
    (home / "c.yaml").write_text(tiny_config.read_text().replace("run_dir: ", "run_dir: ~/  # "))
    config = load_config("~/c.yaml", ["data.path=$SCRATCH/l", "eval.vae=~/v", "train.init_from=${HOME}/i"])
    assert (config.run_dir, config.data.path) == (f"{home}/", "/scratch/me/l")
    assert (config.eval.vae, config.train.init_from, config.eval.inception_weights) == (f"{home}/v", f"{home}/i", None)
    assert "note: $SCRATCH/l is /scratch/me/l\n" in capsys.readouterr().err
    with pytest.raises(UserError, match="the environment variable GONE is not set"):
        load_config(str(tiny_config), ["eval.reference=$GONE/x.npz"])


@pytest.mark.parametrize("path", repository_files("tools", "*.py", 25), ids=lambda path: path.stem)
def test_every_path_argument_is_expanded(path):
    text = path.read_text()
    assert "type=Path" not in text
    for name in ("images", "vae", "features", "inception-weights", "reference", "other", "config", "out"):
        for call in re.findall(rf'add(?:_argument)?\(\s*"--{name}".*?help=', text, re.DOTALL):
            assert "type=expanded" in call, call


def test_the_status_folder_of_a_tool_is_expanded(home, monkeypatch):
    monkeypatch.setenv(STATUS_VARIABLE, "~/jobs/7")
    count_finished_unit()
    assert (home / "jobs/7/status.json").is_file()
