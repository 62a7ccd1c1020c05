"""What the engine refuses before anything is built."""

import pytest
import torch

from mf_dist.runtime.errors import UserError
from mf_dist.training import engine


@pytest.mark.parametrize(
    ("has_gpu", "needed"), [(False, r"a C\+\+ compiler on a CPU"), (True, "a C compiler for Triton")]
)
def test_a_missing_compiler_is_one_line(monkeypatch, has_gpu, needed):
    engine._check_compiler()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match=f"engine.compile=true needs {needed}: install .*engine.compile=false"):
        engine._check_compiler()


def test_missing_python_headers_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(UserError, match=r"needs .*Python.h for Triton: install the python headers"):
        engine._check_compiler()
