"""A training step outside the compiled graph, on the simulated GPU: kernels, bytes and waits of the host.

    PYTHONPATH=tests/simcuda python -m simcuda tests/simcuda/measure_engine.py CONFIG [section.key=value ...]

Runs the project's Engine eagerly on random batches and counts, per parameter, what the handling of gradients and the
optimizer read and write, what memory is held, and what the host waits for in a step; with SIMCUDA_COMPILED=1 also what
the compiled update does. Prints one JSON object.
"""

import collections
import json
import sys
from dataclasses import replace

import torch
from simcuda import device, waits

from mf_dist.config.schema import load_config, resolve
from mf_dist.objectives.build import build_loss
from mf_dist.runtime.distributed import process_group
from mf_dist.runtime.launch import exit_without_finalization
from mf_dist.sampling.generator import build_network
from mf_dist.training.engine import Engine

compiled = sys.modules.get("simcuda.compiled")
"""Counters of compiled kernels, with SIMCUDA_COMPILED=1."""

SHAPE = ["model.latent_size=8", "model.latent_channels=4", "model.num_classes=10"]


def build(ranks, path, overrides):
    """The engine of a config, its number of parameters, and a function that makes a random batch on the device."""
    config = load_config(path, [*SHAPE, *overrides])
    config = resolve(replace(config, data=replace(config.data, path="none")), None, ranks.world_size)
    net = build_network(config.model, 0)
    count = sum(p.numel() for p in net.parameters())
    engine, rows = Engine(build_loss(net, config.objective), config, ranks), config.train.micro_batch

    def batch():
        shape = (rows, 4, 8, 8)
        drawn = {"e": torch.randn(shape), "time_normals": torch.randn(rows, 2), "drop_uniforms": torch.rand(rows)}
        draws = {name: tensor.pin_memory().to(ranks.device, non_blocking=True) for name, tensor in drawn.items()}
        labels = torch.randint(0, 10, (rows,)).pin_memory().to(ranks.device, non_blocking=True)
        x = torch.randn(shape).pin_memory().to(ranks.device, non_blocking=True)
        return x, labels, draws, torch.zeros((), device=ranks.device)

    return engine, count, batch


def main() -> None:
    path, *overrides = sys.argv[1:]
    with process_group() as ranks:
        engine, count, batch = build(ranks, path, overrides)
        records = collections.defaultdict(list)
        record_phase(engine._engine, "_backward_epilogue", records)
        record_phase(engine._engine, "step", records)
        record_phase(engine._engine.optimizer, "backward_prologue", records)
        if engine._data_parallel:
            record_phase(engine._engine.optimizer, "_update_hp_grad", records)
            record_phase(engine._data_parallel, "finish", records)

        update = engine._optimizer.step

        def counted_update():
            if compiled is not None:
                compiled.phase[0] = "update"
            update()
            if compiled is not None:
                compiled.phase[0] = ""

        engine._optimizer.step = counted_update
        for step in range(4):
            if step == 3:
                if compiled is not None:
                    compiled.moved.clear()
                records.clear()
                device.reset_peak()
                waits.count()
            for _ in range(engine.accumulation):
                engine.train_micro_batch(*batch())
        result = {"parameters": count, "waits": waits.total(), "waited_for": waits.report().splitlines()}
        waits.count(False)
        for name, kernels in records.items():
            moved = collections.Counter()
            for operator, read, written in kernels:
                moved[operator] += read + written
            result[name] = {
                "kernels": len(kernels),
                "bytes": round(sum(moved.values()) / count, 1),
                "top": {operator: round(n / count, 1) for operator, n in moved.most_common(12) if n / count > 0.05},
            }
        if compiled is not None:
            moved = sum(n for (phase, _), n in compiled.moved.items() if phase == "update")
            result["compiled_bytes"] = round(moved / count, 1)
        result["bytes"] = round(sum(result[name]["bytes"] for name in records), 1)
        result |= {"held": round(device.held() / count, 1), "peak": round(device.peak() / count, 1)}
        if ranks.is_rank_zero:
            print(json.dumps(result), flush=True)


def record_phase(owner, name, records) -> None:
    """Counts what the method's operators read and write, an operator written in place as both."""
    method = getattr(owner, name)

    def recorded(*args, **options):
        device.record(True)
        try:
            return method(*args, **options)
        finally:
            records[name] += device.records()
            device.record(False)

    setattr(owner, name, recorded)


if __name__ == "__main__":
    main()
    exit_without_finalization(0)
