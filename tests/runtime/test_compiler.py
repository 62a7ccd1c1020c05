"""A machine on which torch.compile cannot work: found before the work, in one line that says what to do."""

import os

import pytest
import torch
from conftest import VAE, run_python

from mf_dist.runtime import compiler
from mf_dist.runtime.errors import UserError, command_line


@pytest.mark.parametrize(
    ("device", "needed"), [("cpu", r"C\+\+ compiler: install g\+\+"), ("cuda", "C compiler: install gcc")]
)
def test_a_missing_compiler_is_named(monkeypatch, tmp_path, device, needed):
    variable = "CC" if device == "cuda" else "CXX"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UserError, match=f"torch.compile needs a {needed}, or leave it$"):
        compiler.require_compiler(torch.device(device), "leave it")
    monkeypatch.setenv(variable, "/usr/bin/absent")
    with pytest.raises(UserError, match=f"needs a {needed}, or correct {variable}, which is '/usr/bin/absent'$"):
        compiler.require_compiler(torch.device(device))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_missing_python_headers_are_named(monkeypatch, tmp_path, device):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(UserError, match=f"needs {tmp_path}/Python.h: install the python headers .python3-dev.$"):
        compiler.require_compiler(torch.device(device))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/Python.h").touch()
    monkeypatch.setenv("CPATH", f"/usr/absent:{tmp_path / 'elsewhere'}")
    assert compiler._missing(torch.device(device)) == ""


def test_a_cache_folder_that_cannot_be_made_is_named(monkeypatch, tmp_path, capsys):
    """torch makes it as it is imported, in any program."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file/x"))
    assert command_line(lambda: None)() == 2
    assert capsys.readouterr().err.startswith(
        f"error: TORCHINDUCTOR_CACHE_DIR is '{tmp_path}/file/x': Not a directory; "
    )


@pytest.mark.dist
def test_compiling_is_tried_before_the_work(tmp_path):
    """With a compiler that does not find a header, one that is none, and a cache folder in which nothing can be
    written. The tools are given images and a model that do not exist, which they would say first."""
    no_header = tmp_path / "no-header"
    no_header.write_text(
        '#!/bin/sh\ncase "$1" in --version) exec g++ "$@";; esac\necho "a.cpp:1: fatal error: Python.h" >&2; exit 1\n'
    )
    no_header.chmod(0o755)
    encode = [
        "tools/encode_latents.py",
        "--images",
        "absent",
        "--out",
        tmp_path / "out",
        "--vae",
        VAE,
        "--resolution",
        32,
    ]
    evaluate = ["tools/fid_eval.py", "--checkpoint", "absent", "--nfe", 1]
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    for command, variables, reason in (
        (encode, {"CXX": str(no_header)}, "Python.h): install the python headers (python3-dev), or give --no-compile"),
        (evaluate, {"CXX": "/bin/false"}, "install g++, or correct CXX, which is '/bin/false', or leave out --compile"),
        (evaluate, {"TORCHINDUCTOR_CACHE_DIR": "/proc"}, "set TORCHINDUCTOR_CACHE_DIR and TMPDIR to folders where"),
    ):
        done = run_python(*command, "--compile", env={**os.environ, **cache, **variables}, expect=2)
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: torch.compile fails (") and reason in line
    (line,) = run_python(*evaluate, env={**os.environ, "CXX": "/bin/false"}, expect=2).stderr.splitlines()
    assert "no checkpoint in 'absent'" in line
