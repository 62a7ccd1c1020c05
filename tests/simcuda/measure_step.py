"""The compiled step of a DiT for sm_90, on the simulated GPU: what it launches, moves, waits for and keeps.

    PYTHONPATH=tests/simcuda SIMCUDA_COMPILED=1 python -m simcuda tests/simcuda/measure_step.py --model XL/2 --depth 28

SIMCUDA_ATTENTION=cudnn (what an H100 takes), flash (an A100), efficient (fp32), math. Prints one JSON object; --code
FOLDER also keeps the generated sources.
"""

import argparse
import collections
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from simcuda import compiled, device, waits

from mf_dist.config.objectives import MeanFlowConfig
from mf_dist.models.sizes import named_model
from mf_dist.objectives.meanflow import MeanFlowLoss
from mf_dist.sampling.generator import build_network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="XL/2", help="named shape (default XL/2)")
    parser.add_argument("--depth", type=int, help="blocks (default: the shape's)")
    parser.add_argument("--rows", type=int, default=32, help="images of a micro-batch (default 32)")
    parser.add_argument("--latent", type=int, default=32, help="side of the latent (default 32)")
    parser.add_argument("--unguided", action="store_true", help="without guidance")
    parser.add_argument("--deterministic", action="store_true", help="as engine.deterministic=true")
    parser.add_argument("--top", type=int, default=0, help="also the N kernels that move the most")
    parser.add_argument("--code", type=Path, help="folder for the generated sources")
    args = parser.parse_args()
    model = named_model(args.model, args.latent)
    model = replace(model, depth=args.depth or model.depth)
    recipe = MeanFlowConfig() if args.unguided else MeanFlowConfig(omega=0.2, kappa=0.92, guidance_end=0.75)
    if args.deterministic:
        from mf_dist.training.engine import _make_deterministic

        _make_deterministic()
    loss = MeanFlowLoss(build_network(model, 0), recipe).to("cuda")
    for p in loss.parameters():
        p.data = p.data.bfloat16()
    loss.forward = torch.compile(loss.forward, fullgraph=True, dynamic=False)
    shape = (args.rows, 4, args.latent, args.latent)

    def inputs():
        normals, uniforms = torch.randn(args.rows, 2, device="cuda"), torch.rand(args.rows, device="cuda")
        labels = torch.randint(0, 1000, (args.rows,), device="cuda")
        draws = {"e": torch.randn(shape, device="cuda"), "time_normals": normals, "drop_uniforms": uniforms}
        return torch.randn(shape, device="cuda"), labels, draws, torch.zeros((), device="cuda")

    start = time.perf_counter()
    loss(*inputs())[0].backward()
    result = {"compile_seconds": round(time.perf_counter() - start, 1), "graphs": len(compiled.code)}
    for p in loss.parameters():
        p.grad = None
    batch = inputs()
    device.reset_peak()
    waits.count()
    compiled.phase[0] = "forward"
    value = loss(*batch)[0]
    compiled.phase[0] = "backward"
    value.backward()
    result |= {
        phase: {
            "launches": sum(n for (where, _), n in compiled.launches.items() if where == phase),
            "gb": round(sum(n for (where, _), n in compiled.moved.items() if where == phase) / 1e9, 2),
            "calls": {name: n for (where, name), n in compiled.calls.items() if where == phase},
        }
        for phase in ("forward", "backward")
    }
    held = sum(p.numel() * p.element_size() for p in loss.parameters())
    result |= {"waits": waits.total(), "peak_gib": round(device.peak() / 2**30, 2), "weights_gib": held / 2**30}
    result |= {"atomics": sum(text.count("tl.atomic_add") for text in compiled.code), "timed": timed_reductions()}
    if args.top:
        largest = sorted(compiled.moved.items(), key=lambda item: -item[1])[: args.top]
        result["top"] = [[*key, round(n / 1e6, 1), compiled.launches[key]] for key, n in largest]
    if args.code:
        args.code.mkdir(parents=True, exist_ok=True)
        for number, text in enumerate(compiled.code):
            (args.code / f"graph{number}.py").write_text(text)
    print(json.dumps(result))


def timed_reductions() -> list[str]:
    """Reductions whose block size is chosen by timing at each start, and with it the order of their sums."""
    choices = collections.defaultdict(set)
    for name, blocks, warps, _ in compiled.compiled:
        choices[name].add((blocks.get("XBLOCK"), blocks.get("R0_BLOCK"), warps))
    return sorted(name for name, sizes in choices.items() if len(sizes) > 1 and name.split("_")[1] in ("red", "per"))


if __name__ == "__main__":
    sys.exit(main())
