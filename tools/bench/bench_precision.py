"""Measures the error of bf16 in the training target of a trained model, and the cost of fp32 tangents; and in the
residual (u - u_tgt) / a of the discrete target, which divides the difference of two passes by a share a.

    python tools/bench/bench_precision.py --checkpoint runs/digits

Draws real batches from the run's dataset. Reference: the same weights, rounded to bf16 once, computed in float64.
Errors are relative norms over the r < t rows: of du/dt, of u_tgt = v_g - (t - r) du/dt, and of residuals.
"""

import argparse
import statistics
import sys
import time

from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.paths import expanded_path

SHARES = (1.0, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002)


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", type=expanded_path, required=True, help="run or checkpoint folder")
    parser.add_argument("--batches", type=int, default=8, help="micro-batches to average over (default 8)")
    args = parser.parse_args()
    if args.batches < 1:
        raise UserError(f"--batches must be at least 1, got {args.batches}")
    import torch

    from mf_dist.checkpoint.reader import find_checkpoint
    from mf_dist.config.loader import from_tree
    from mf_dist.config.schema import Config

    checkpoint = find_checkpoint(args.checkpoint)
    config = from_tree(Config, checkpoint.state["config"], str(checkpoint.folder))
    if config.meanflow is None:
        raise UserError(f"{args.checkpoint} was trained by {config.objective_section}, expected meanflow")
    if config.objective.is_flow:
        raise UserError(f"{args.checkpoint} is a flow-matching run: it has no r < t rows")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    nets = build_nets(checkpoint.load("master"), config, device)
    nets_of_residual = {name: nets[name] for name in ("explicit tangents, bf16", "fp32")}
    residual_errors = {(name, a): [] for name in nets_of_residual for a in (None, *SHARES)}
    errors = {name: [] for name in nets}
    seconds = {name: [] for name in nets}
    for z, v, r, t, y, n_eq in batches(config, args.batches, device):
        exact = target(nets["float64"], z, v, r, t, y, n_eq, config, torch.float64)[:2]
        for name, net in nets.items():
            dtype = torch.float64 if name == "float64" else torch.float32
            du_dt, u_tgt, elapsed = target(net, z, v, r, t, y, n_eq, config, dtype)
            errors[name].append([(a.double() - b).norm() / b.norm() for a, b in ((du_dt, exact[0]), (u_tgt, exact[1]))])
            seconds[name].append(elapsed)
        for a in (None, *SHARES):
            exact_residual = residual(nets["float64"], z, v, r, t, y, n_eq, config, torch.float64, a)
            for name, net in nets_of_residual.items():
                found = residual(net, z, v, r, t, y, n_eq, config, torch.float32, a)
                error = (found.double() - exact_residual).norm() / exact_residual.norm()
                residual_errors[name, a].append(error.item())
    print(f"{checkpoint.folder}, {args.batches} batches, {device.type}")
    print(f"{'computation':34}{'du/dt':>10}{'u_tgt':>10}{'target pass, ms':>17}")
    for name in nets:
        du_dt, u_tgt = (torch.tensor(errors[name])[:, i].mean().item() for i in (0, 1))
        print(f"{name:34}{du_dt:10.2e}{u_tgt:10.2e}{1e3 * statistics.median(seconds[name]):17.1f}")
    print(f"{'residual':34}{'bf16':>10}{'fp32':>10}")
    for a in (None, *SHARES):
        label = "MeanFlow's" if a is None else f"discrete, share {a}"
        print(f"{label:34}" + "".join(f"{statistics.mean(residual_errors[n, a]):10.2e}" for n in nets_of_residual))


def build_nets(weights, config, device):
    """One network per kind of computation, all with the same bf16 weights."""
    import torch
    from bench_peers import plain_like

    from mf_dist.sampling.generator import build_network

    rounded = {name: tensor.bfloat16() for name, tensor in weights.items()}

    def ours(dtype, tangent_dtype=None):
        net = build_network(config.model, 0)
        net.load_state_dict(rounded)
        net.tangent_dtype = tangent_dtype
        return net.to(device, dtype)

    plain = plain_like(ours(torch.float32))
    plain.load_state_dict(rounded)
    return {
        "float64": ours(torch.float64),
        "fp32": ours(torch.float32),
        "explicit tangents, bf16": ours(torch.bfloat16),
        "explicit tangents, fp32 JVP": ours(torch.bfloat16, torch.float32),
        "torch.func.jvp, bf16": FuncJvp(plain.to(device, torch.bfloat16)),
    }


class FuncJvp:
    """Gives a plain network our interface, with the tangent by torch.func.jvp."""

    def __init__(self, net):
        self.net = net

    def __call__(self, z, r, t, y, tangent=None):
        import torch

        if tangent is None:
            return self.net(z, r, t, y)
        return torch.func.jvp(lambda a, b, c: self.net(a, b, c, y), (z, r, t), tangent)


def batches(config, count, device):
    """Real micro-batches as inputs of the loss: z, v, r, t, y, the number of r = t rows."""
    import torch

    from mf_dist.data.loader import training_batches
    from mf_dist.data.normalisation import normalisation
    from mf_dist.data.shards import LatentShards
    from mf_dist.objectives.guidance import drop_labels
    from mf_dist.objectives.path import path
    from mf_dist.objectives.times import sample_times

    shards, recipe = LatentShards(config.data.path), config.meanflow
    scale = normalisation(config.data, shards.manifest["vae"], torch.device("cpu"))
    stream = training_batches(shards, config, 0, 0, 1, pin_memory=False)
    for _, b in zip(range(count), stream, strict=False):
        x = scale.sample_posterior(b.moments, b.draws["posterior_noise"])
        n_eq = int(len(x) * recipe.share_r_equals_t)
        r, t = sample_times(b.draws["time_normals"], n_eq, recipe.time_mean, recipe.time_std)
        y = drop_labels(b.labels, b.draws["drop_uniforms"], n_eq, recipe.label_drop, config.model.num_classes)
        yield *(tensor.to(device) for tensor in (*path(x, b.draws["e"], t), r, t, y)), n_eq


def target(net, z, v, r, t, y, n_eq, config, dtype):
    """du/dt and u_tgt on the r < t rows, and the seconds that they took."""
    import torch

    from mf_dist.objectives.meanflow import meanflow_target
    from mf_dist.objectives.path import per_row

    z, v, r, t = (tensor.to(dtype) for tensor in (z, v, r, t))
    start = time.perf_counter()
    with torch.no_grad():
        _, v_g, du_dt = meanflow_target(net, z, v, r, t, y, n_eq, config.model.num_classes, config.meanflow)
    if z.is_cuda:
        torch.cuda.synchronize()
    return du_dt, v_g - per_row(t - r)[n_eq:] * du_dt, time.perf_counter() - start


def residual(net, z, v, r, t, y, n_eq, config, dtype, share):
    """u - u_tgt on the r < t rows: of MeanFlow if share is None, else of the discrete target, divided by the share."""
    import torch

    from mf_dist.objectives.discrete import discrete_target
    from mf_dist.objectives.meanflow import meanflow_target
    from mf_dist.objectives.path import per_row

    z, v, r, t = (tensor.to(dtype) for tensor in (z, v, r, t))
    with torch.no_grad():
        _, v_g, du_dt = meanflow_target(net, z, v, r, t, y, n_eq, config.model.num_classes, config.meanflow)
        z, r, t, y = z[n_eq:], r[n_eq:], t[n_eq:], y[n_eq:]
        u = net(z, r, t, y)
        if share is None:
            return u - (v_g - per_row(t - r) * du_dt)
        return (u - discrete_target(net, z, v_g, r, t, y, torch.tensor(share, dtype=dtype))[0]) / share


if __name__ == "__main__":
    sys.exit(main())
