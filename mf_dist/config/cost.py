"""Cost model of a run: parameters, FLOPs, memory, communication, hours. --dry-run prints it. No torch."""

import yaml

from mf_dist.config.loader import to_tree
from mf_dist.config.schema import Config, ImfDitConfig, ModelConfig
from mf_dist.runtime.figures import three_digits

SINUSOIDS = 256
KEPT_PER_BLOCK, KEPT_PER_IMF_BLOCK = 18, 21
"""Values per token and unit of width that a compiled block saves for backward (measured, docs/performance.md)."""
ASSUMED_FLOPS = 400e12
"""FLOP/s per GPU behind the hours that --dry-run prints: 40 % of an H100's bf16 peak."""
GPUS_PER_NODE = 8
BUS_WITHIN, BUS_BETWEEN = 300e9, 200e9
"""Assumed bytes/s that a rank sends in a collective within a node and between nodes: two thirds of NVLink 4's 450 GB/s,
half of eight 400 Gbit/s network cards. The preflight measures the actual rates of a cluster."""
MAX_REUSED_WEIGHTS = 10**9
"""Largest number of weights that DeepSpeed's ZeRO-3 keeps gathered for later passes (stage3_max_reuse_distance)."""
BLOCKS_TOGETHER = 10**7
"""Parameters that at least are reduced and gathered together at ZeRO-1 in bf16 (training/data_parallel.py): 40 MB of
gradients, a message near the network's full rate."""
REDUCED_TOGETHER = 5 * 10**7
"""Gradients in DeepSpeed's bucket at the other stages and in fp32 (reduce_bucket_size)."""
FEW_ROWS = 16
"""Rows per GPU below which the matrix products are too small to use it fully."""


def patches(model: ModelConfig) -> int:
    assert model.latent_size is not None
    return (model.latent_size // model.patch_size) ** 2


def tokens(model: ModelConfig) -> int:
    """Length of the sequence in the blocks."""
    if (imf := model.imf_dit) is None:
        return patches(model)
    return patches(model) + condition_tokens(imf)


def condition_tokens(imf: ImfDitConfig) -> int:
    return imf.class_tokens + imf.guidance_tokens + imf.start_tokens + imf.end_tokens + imf.time_tokens


def blocks(model: ModelConfig, for_sampling: bool = False) -> int:
    """Of the whole network; for_sampling: without those of imf_dit's v head."""
    return model.depth + (model.imf_dit.head_depth if model.imf_dit and not for_sampling else 0)


def parameters(model: ModelConfig, for_sampling: bool = False) -> int:
    """Number of trainable parameters of the networks in models/dit.py and models/imf_dit.py; for_sampling: without the
    latter's v head."""
    assert model.latent_channels is not None and model.num_classes is not None
    d, patch, labels = model.hidden_size, model.patch_size**2 * model.latent_channels, model.num_classes + 1
    scalar = (SINUSOIDS * d + d) + (d * d + d)
    patch_in, patch_out = patch * d + d, d * patch + patch
    if (imf := model.imf_dit) is None:
        block = (3 * d * d + 3 * d) + (d * d + d) + (8 * d * d + 5 * d) + (6 * d * d + 6 * d)
        return model.depth * block + 2 * scalar + labels * d + patch_in + (2 * d * d + 2 * d) + patch_out
    block = 4 * d * d + 3 * d * _swiglu_hidden(d) + 4 * d + 2 * (d // model.num_heads)
    conditions = 4 * scalar + (labels + condition_tokens(imf)) * d
    return blocks(model, for_sampling) * block + conditions + patch_in + (2 - for_sampling) * (d + patch_out)


def _swiglu_hidden(width: int) -> int:
    return 8 * width // 3


def forward_flops(model: ModelConfig, both_heads: bool = False) -> int:
    """FLOPs of one forward pass of one image, with imf_dit through its u head or its v head: matrix products only, a
    multiply-add counts as 2. both_heads: with imf_dit through both."""
    assert model.latent_channels is not None
    n, d, patch = tokens(model), model.hidden_size, patches(model) * model.patch_size**2 * model.latent_channels
    scalar = SINUSOIDS * d + d * d
    if model.imf_dit is None:
        block = 12 * n * d * d + 2 * n * n * d + 6 * d * d
        return 2 * (model.depth * block + 2 * scalar + 2 * patch * d + 2 * d * d)
    block = 4 * n * d * d + 3 * n * d * _swiglu_hidden(d) + 2 * n * n * d
    return 2 * (blocks(model, not both_heads) * block + 4 * scalar + (2 + both_heads) * patch * d)


def forwards_per_image(config: Config) -> float:
    """Mean cost of a step per image over the run, in forward passes F."""
    one, both = (forward_flops(config.model, both_heads) for both_heads in (False, True))
    second_head = config.objective.SECOND_HEAD_PASSES * (both - one) / one
    return config.objective.forwards(config.engine.precision == "bf16") + second_head


def _has_bf16_optimizer(config: Config) -> bool:
    return config.engine.zero_stage == 1 and config.engine.precision == "bf16"


def memory_per_rank(config: Config, world_size: int) -> dict[str, float]:
    """Bytes that a rank holds during a step: weights, gradients (accumulated in fp32, at ZeRO-3 copied for the update,
    at ZeRO-1 in bf16 where nothing is added; bf16 ones beside them where one graph returns all at once), optimizer
    (fp32 weights, two moments, EMAs), DeepSpeed's buffers of gradients that are reduced together, activations saved for
    backward."""
    model, stage, rows = config.model, config.engine.zero_stage, config.train.micro_batch
    assert rows is not None
    count, width = parameters(model), 2 if config.engine.precision == "bf16" else 4
    per_value = rows * tokens(model) * model.hidden_size * width
    kept = KEPT_PER_IMF_BLOCK if model.imf_dit else KEPT_PER_BLOCK
    values = blocks(model) + kept if config.engine.checkpoint_activations else blocks(model) * kept
    at_once = 2 * count if width == 2 and stage < 3 and world_size == 1 else 0
    is_bf16 = _has_bf16_optimizer(config) and rows == config.train.batch_size
    return {
        "weights": width * count / (world_size if stage == 3 else 1),
        "gradients": {1: 2 if is_bf16 else 4, 2: 4 / world_size, 3: 8 / world_size}[stage] * count + at_once,
        "optimizer": checkpoint_bytes(config) / world_size,
        "buckets": _bucket_bytes(config, world_size),
        "activations": per_value * values,
    }


def _bucket_bytes(config: Config, world_size: int) -> int:
    """DeepSpeed's buckets of gradients, two where reduction overlaps; at ZeRO-2 in bf16 they hold bf16, and one is
    copied to fp32 to be reduced."""
    stage = config.engine.zero_stage
    if _has_bf16_optimizer(config):  # reduces the gradients where they lie
        return 0
    buckets = 2 if stage < 3 and world_size > 1 else 1
    if stage == 2 and config.engine.precision == "bf16":
        return 2 * buckets * REDUCED_TOGETHER + 4 * min(REDUCED_TOGETHER, parameters(config.model))
    return 4 * buckets * REDUCED_TOGETHER


def payload(config: Config, accumulation: int) -> dict[str, int]:
    """Tensor bytes that a step of `accumulation` micro-batches passes through each kind of collective; a few scalars
    are not counted. Gradients are fp32. Weights are gathered once, after the update; at ZeRO-3, for each pass."""
    count, stage = parameters(config.model), config.engine.zero_stage
    weights = (2 if config.engine.precision == "bf16" else 4) * count
    if stage == 3:
        passes = (4 if config.objective.guided else 3) if count > MAX_REUSED_WEIGHTS else 1
        return {"reduce-scatter": 4 * count * accumulation, "all-gather": passes * weights * accumulation}
    if _has_bf16_optimizer(config):
        return {"reduce-scatter": 4 * count, "all-gather": weights}
    return {"all-reduce": 4 * count * (accumulation if stage == 2 else 1), "all-gather": weights}


def wire_seconds(config: Config, world_size: int, accumulation: int = 1) -> dict[str, float]:
    """Seconds per step of each kind of collective, as a ring: a rank sends (n - 1) / n of the payload, in an all-reduce
    twice that."""
    share = (world_size - 1) / world_size / (BUS_WITHIN if world_size <= GPUS_PER_NODE else BUS_BETWEEN)
    sizes = payload(config, accumulation).items()
    return {kind: size * share * (2 if kind == "all-reduce" else 1) for kind, size in sizes}


def compute_seconds(config: Config, rows: int) -> float:
    """Seconds of compute for `rows` images on one GPU."""
    return rows * forwards_per_image(config) * forward_flops(config.model) / ASSUMED_FLOPS


def exposed_seconds(config: Config, world_size: int, rows: int, accumulation: int = 1) -> float:
    """Seconds per step of communication that no compute hides, with `rows` per pass.

    Gradients are reduced in parts while the last backward (two forwards of `rows`) goes on: what does not fit into it
    is exposed, at least the last part. At ZeRO-1 in bf16 weights are gathered in parts during the first forward of the
    next step, at least the first part is exposed; otherwise all of it, which for ZeRO-3 is an upper bound."""
    reduce, gather = wire_seconds(config, world_size, accumulation).values()
    forward = rows * forward_flops(config.model) / ASSUMED_FLOPS
    count = parameters(config.model)
    together = max(BLOCKS_TOGETHER, count // blocks(config.model))
    parts = max(1, count // (together if _has_bf16_optimizer(config) else REDUCED_TOGETHER))
    beside = 1 - 1 / parts
    passes = 1 if _has_bf16_optimizer(config) else accumulation  # with a reduction
    exposed = reduce - passes * min(2 * forward, reduce / passes) * beside
    return exposed + (gather - min(forward, gather) * beside if _has_bf16_optimizer(config) else gather)


def run_hours(config: Config, world_size: int) -> float:
    """Hours of the whole run, without evaluation, samples and saves."""
    train = config.train
    assert train.micro_batch is not None
    accumulation = train.batch_size // (world_size * train.micro_batch)
    step = compute_seconds(config, train.batch_size // world_size)
    exposed = exposed_seconds(config, world_size, train.micro_batch, accumulation)
    return config.steps_left(0) * (step + exposed) / 3600


def weak_scaling(config: Config) -> list[str]:
    """Table for 1 to 64 nodes: one micro-batch per rank and step."""
    rows, sizes = config.train.micro_batch, payload(config, 1)
    assert rows is not None
    compute, kinds = compute_seconds(config, rows), list(sizes)
    lines = [
        f"scaling         at {rows} rows per GPU and step, {three_digits(compute * 1e3)} ms of compute; "
        + ", ".join(f"{kind} of {three_digits(size / 1e9)} GB" for kind, size in sizes.items()),
        f"                at an assumed {BUS_WITHIN / 1e9:.0f} GB/s per rank within a node, "
        f"{BUS_BETWEEN / 1e9:.0f} between nodes, latency not counted; exposed: what compute does not hide",
        f"                | nodes | GPUs | global batch | {kinds[0]} ms | {kinds[1]} ms | exposed ms | of linear |",
        "                |---|---|---|---|---|---|---|",
    ]
    for nodes in (1, 2, 4, 8, 16, 32, 64):
        ranks = nodes * GPUS_PER_NODE
        reduce, gather = wire_seconds(config, ranks).values()
        exposed = exposed_seconds(config, ranks, rows)
        share, batch = compute / (compute + exposed), rows * ranks
        lines.append(
            f"                | {nodes} | {ranks} | {batch} | {three_digits(reduce * 1e3)} | "
            f"{three_digits(gather * 1e3)} | {three_digits(exposed * 1e3)} | {share:.0%} |"
        )
    return lines


def checkpoint_bytes(config: Config) -> int:
    """Size of a checkpoint: fp32 weights, two moments and the EMAs."""
    return 4 * parameters(config.model) * (3 + len(config.optim.ema_decay))


def describe(config: Config, world_size: int) -> str:
    """The output of --dry-run: the resolved config and its cost."""
    model, train = config.model, config.train
    assert train.micro_batch is not None
    count, flops, per_image = parameters(model), forward_flops(model), forwards_per_image(config)
    memory = {name: size / 2**30 for name, size in memory_per_rank(config, world_size).items()}
    accumulation = train.batch_size // (world_size * train.micro_batch)
    lines = [
        yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        f"latent          ({model.latent_channels}, {model.latent_size}, {model.latent_size}), {tokens(model)} tokens, "
        f"{model.num_classes} classes",
        f"parameters      {count:,}" + (f", {parameters(model, True):,} to sample" if model.imf_dit else ""),
        f"forward         {three_digits(flops / 1e9)} GFLOP per image (2 per multiply-add)",
        f"step            {per_image:.2f} forwards per image, "
        f"{three_digits(per_image * flops * train.batch_size / 1e12)} TFLOP (plain flow matching: 3)",
        f"batch           {train.batch_size} = {world_size} ranks x {train.micro_batch} x {accumulation} accumulation",
        f"run             {config.steps_left(0):,} steps, {per_image * flops * train.total_images:.2e} FLOP",
        f"time            {three_digits(run_hours(config, world_size))} hours at an assumed "
        f"{ASSUMED_FLOPS / 1e12:.0f} TFLOP/s per rank and the collective speeds below",
        f"memory per rank {three_digits(sum(memory.values()))} GiB: "
        + ", ".join(f"{name} {three_digits(size)}" for name, size in memory.items()),
        f"checkpoint      {three_digits(checkpoint_bytes(config) / 2**30)} GiB each (fp32 weights, two moments, EMAs)",
    ]
    if len(config.objective.phases) > 1:
        in_bf16 = config.engine.precision == "bf16"
        phases = (f"{p.name} from {p.begin:.1%}, {p.cost(in_bf16):.2f} forwards" for p in config.objective.phases)
        lines.append(f"phases          {'; '.join(phases)}")
    wire = ", ".join(f"{kind} {three_digits(size / 2**30)}" for kind, size in payload(config, accumulation).items())
    lines += [f"wire            {wire} GiB per step", *weak_scaling(config)]
    if remainder := config.remainder(0):
        lines.append(f"note: {remainder}")
    if train.micro_batch < FEW_ROWS and world_size > 1:
        lines.append(
            f"warning: {train.micro_batch} rows per rank and pass are too few to fill a GPU; use {FEW_ROWS} or more"
        )
    return "\n".join(lines)
