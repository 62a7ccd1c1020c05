"""The cost model of --dry-run compared with the network."""

import dataclasses
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mf_dist.config import cost
from mf_dist.config.objectives import AlphaFlowConfig, ImfConfig, MeanFlowConfig, SolutionFlowConfig
from mf_dist.config.schema import ImfDitConfig, ModelConfig, load_config, resolve
from mf_dist.models.imf_dit import Guidance
from mf_dist.objectives.build import build_loss
from mf_dist.sampling.generator import build_network

MODEL = ModelConfig(depth=3, hidden_size=32, num_heads=2, patch_size=2, latent_size=8, latent_channels=4, num_classes=5)
IMF_MODEL = dataclasses.replace(MODEL, network="imf_dit", imf_dit=ImfDitConfig(1, 3, 2, 1, 1, 2))


@pytest.mark.parametrize("model", [MODEL, IMF_MODEL])
@pytest.mark.parametrize("for_sampling", [False, True])
def test_parameters(model, for_sampling):
    counted = sum(p.numel() for p in build_network(model, 0, for_sampling).parameters())
    assert cost.parameters(model, for_sampling) == counted


def test_memory_per_rank_at_each_zero_stage():
    config = resolve(load_config("configs/imagenet256_xl2.yaml", []), None, 8)
    count = cost.parameters(config.model)
    per_stage = []
    for stage in (1, 2, 3):
        staged = dataclasses.replace(config, engine=dataclasses.replace(config.engine, zero_stage=stage))
        memory = cost.memory_per_rank(staged, 8)
        per_stage.append((memory["weights"], memory["gradients"], memory["optimizer"]))
    assert per_stage == [
        (2 * count, 4 * count, 2 * count),
        (2 * count, count / 2, 2 * count),
        (count / 4, count, 2 * count),
    ]
    assert "warning" not in cost.describe(config, 8)
    small = resolve(load_config("configs/imagenet256_xl2.yaml", ["engine.zero_stage=3"]), None, 32)
    assert "warning: 8 rows" in cost.describe(small, 32)


@torch.no_grad()
def test_forward_flops():
    net, z = build_network(MODEL, 0), torch.randn(2, 4, 8, 8)
    # the counter does not know the CPU's fused attention
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        net(z, torch.zeros(2), torch.ones(2), torch.zeros(2, dtype=torch.int64))
    assert counter.get_total_flops() == 2 * cost.forward_flops(MODEL)


@pytest.mark.parametrize("head", ["u", "v", "both"])
@torch.no_grad()
def test_forward_flops_of_imf_dit(head):
    net, z, zeros, ones = build_network(IMF_MODEL, 0), torch.randn(2, 4, 8, 8), torch.zeros(2), torch.ones(2)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        net(z, zeros, ones, torch.zeros(2, dtype=torch.int64), Guidance(ones, zeros, ones), head=head)
    assert counter.get_total_flops() == 2 * cost.forward_flops(IMF_MODEL, both_heads=head == "both")


@pytest.mark.parametrize(
    ("objective", "progress", "forwards"),
    [
        (MeanFlowConfig(), 0, 3.5),
        (MeanFlowConfig(omega=2.0), 0, 4.5),
        (MeanFlowConfig(kappa=0.5), 0, 4.75),
        (MeanFlowConfig(share_r_equals_t=Fraction(1)), 0, 3.0),
        (MeanFlowConfig(kappa=0.5, tangent="boundary"), 0, 4.75),
        (MeanFlowConfig(tangent="boundary"), 0, 3.75),
        (SolutionFlowConfig(), 0.5, 4.5),
        (AlphaFlowConfig(Fraction(3, 4), kappa=0.5), 0, 4.25),
        (AlphaFlowConfig(Fraction(3, 4), kappa=0.5), 0.5, 4.5),
        (AlphaFlowConfig(Fraction(3, 4), kappa=0.5), 1, 4.75),
        (AlphaFlowConfig(kappa=0.5), 0.5, 5.0),
        (AlphaFlowConfig(Fraction(1, 4), kappa=0.5), 0.5, 5.5),
        (ImfConfig(), 0, 5.5),
        (ImfConfig(Fraction(1, 4)), 0, 6.25),
    ],
)
def test_step_flops(objective, progress, forwards):
    """Counted by torch on a real step, within 4 %: the backward of a linear whose input needs no gradient costs less
    than assumed, the tangent's attention more."""
    assert objective.phase(progress).forwards == forwards
    if isinstance(objective, ImfConfig):  # and the regression's second head
        one, both = cost.forward_flops(IMF_MODEL), cost.forward_flops(IMF_MODEL, both_heads=True)
        forwards += 3 * (both - one) / one
    assert counted_forwards(objective, progress, in_bf16=False) == pytest.approx(forwards, rel=0.04)


@pytest.mark.parametrize("objective", [SolutionFlowConfig(), AlphaFlowConfig(Fraction(1, 4), kappa=0.5)])
def test_step_flops_in_bf16(objective):
    """The pass that is repeated in fp32 counts as any other."""
    forwards = objective.phase(0.5).cost(in_bf16=True)
    assert forwards == objective.phase(0.5).forwards + objective.below
    assert counted_forwards(objective, 0.5, in_bf16=True) == pytest.approx(forwards, rel=0.04)


def counted_forwards(objective, progress, in_bf16):
    model = IMF_MODEL if isinstance(objective, ImfConfig) else MODEL
    net, g = build_network(model, 0), torch.Generator().manual_seed(0)
    x = torch.randn(8, 4, 8, 8, generator=g)
    laws = {"normal": torch.randn, "uniform": torch.rand}
    draws = {name: laws[law](8, *shape, generator=g) for name, (law, shape) in objective.draws((4, 8, 8)).items()}
    # the counter does not know the CPU's fused attention
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module = build_loss(net, objective)
        module.phase, module.in_bf16 = objective.phase(progress).name, in_bf16
        loss, _ = module(x, torch.zeros(8, dtype=torch.int64), draws, torch.tensor(objective.schedule(progress)))
        loss.backward()
    return counter.get_total_flops() / 8 / cost.forward_flops(model)


def xl2(world_size, *overrides):
    return resolve(load_config("configs/imagenet256_xl2.yaml", [*overrides]), None, world_size)


def test_wire_seconds_of_a_ring():
    """In each of n - 1 rounds a rank sends one of n chunks; an all-reduce does this twice."""
    for ranks, stage in ((8, 1), (64, 1), (64, 2)):
        config = xl2(8, "train.micro_batch=32", f"engine.zero_stage={stage}")
        sent = {kind: sum(size / ranks for _ in range(ranks - 1)) for kind, size in cost.payload(config, 1).items()}
        if stage == 2:
            sent["all-reduce"] *= 2
        speed = cost.BUS_WITHIN if ranks <= 8 else cost.BUS_BETWEEN
        for kind, seconds in cost.wire_seconds(config, ranks).items():
            assert seconds == pytest.approx(sent[kind] / speed)


def test_exposed_communication_is_that_of_an_event_simulation(monkeypatch):
    """Parts become ready one by one during the backward and pass a link one after the other; before its part of the
    next forward, each must have been gathered. Links from fast to so slow that nothing is hidden."""
    config, parts = xl2(8, "train.micro_batch=32"), 28
    forward = cost.compute_seconds(config, 32) / 4.75
    for speed in (1e9, 10e9, 30e9, 60e9, 100e9, 1e12):
        monkeypatch.setattr(cost, "BUS_WITHIN", speed)
        reduce, gather = cost.wire_seconds(config, 8).values()
        free = 0.0
        for part in range(parts):
            free = max(free, 2 * forward * (part + 1) / parts) + reduce / parts
        time = 0.0
        for part in range(parts):
            time = max(time, gather * (part + 1) / parts) + forward / parts
        assert cost.exposed_seconds(config, 8, 32) == pytest.approx(free - 2 * forward + time - forward)


def test_tables_in_docs_match_the_cost_model():
    """docs/cluster.md against the lines of --dry-run."""
    text = Path("docs/cluster.md").read_text()
    for size in ([], ["model.depth=40", "model.hidden_size=2048"]):
        for nodes in (1, 2, 4, 8, 16, 32, 64):
            cells = [str(nodes), str(8 * nodes)]
            for rows in (16, 32):
                config = xl2(1, *size, f"train.micro_batch={rows}")
                rows_of_table = map(str.strip, cost.describe(config, 1).splitlines())
                (line,) = [row for row in rows_of_table if row.startswith(f"| {nodes} |")]
                _, _, batch, reduce_ms, gather_ms, exposed_ms, share = line.strip(" |").split(" | ")
                cells += [reduce_ms, gather_ms] if rows == 16 else []
                cells += [batch, exposed_ms, share]
            assert f"| {' | '.join(cells)} |" in text
    for name in ("b4", "b2", "m2", "l2", "xl2", "xl2plus"):
        path = f"configs/imagenet256_{name}.yaml"
        hours = [cost.run_hours(resolve(load_config(path, []), None, ranks), ranks) for ranks in (8, 16, 32, 64)]
        assert f"| imagenet256_{name} | {' | '.join(f'{h:.1f}' for h in hours)} |" in text


def test_cost_of_a_run_of_several_phases():
    """The mean over the run: 4.5 F for 59.6 % of it, 5.0 F for 14.1 % and in bf16 0.5 F more, 5.5 F for the rest."""
    config = load_config("configs/imagenet256_xl2_alpha_flow.yaml", [])
    begin, end = (phase.begin for phase in config.objective.phases[1:])
    for precision, discrete in (("fp32", 5.0), ("bf16", 5.5)):
        config = load_config("configs/imagenet256_xl2_alpha_flow.yaml", [f"engine.precision={precision}"])
        expected = 4.5 * begin + discrete * (end - begin) + 5.5 * (1 - end)
        assert cost.forwards_per_image(config) == pytest.approx(expected)
    text = cost.describe(resolve(config, None, 8), 8)
    assert "phases          trajectory flow matching from 0.0%, 4.50 forwards; discrete target from 59.6%, 5.50" in text
