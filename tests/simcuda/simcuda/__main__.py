"""python -m simcuda (-m MODULE | FILE) ARGUMENTS: the program on a simulated GPU."""

import os
import runpy
import sys
from pathlib import Path

import simcuda  # noqa: F401  installs the device

if os.environ.get("SIMCUDA_COMPILED"):
    import simcuda.compiled  # noqa: F401

if sys.argv[1] == "-m":
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
