"""Trains like `python -m mf_dist.train`, but with du/dt along the wrong direction (v, 0, 0) instead of (v, 0, 1).

python tools/study/wrong_tangent.py configs/fashion_cpu.yaml run_dir=runs/fashion/wrong-tangent-0

The paper's Table 1b does so to show that the direction matters; tools/study/ablation.py runs this script.
"""

import sys

import torch

from mf_dist.models.dit import DiT
from mf_dist.train import main

correct_forward = DiT.forward


def without_time(self, z, r, t, y, tangent=None):
    if tangent is not None:
        dz, dr, dt = tangent
        tangent = dz, dr, torch.zeros_like(dt)
    return correct_forward(self, z, r, t, y, tangent)


if __name__ == "__main__":
    DiT.forward = without_time
    sys.exit(main())
