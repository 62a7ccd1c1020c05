"""The config of a run as frozen dataclasses. Defaults are those of the MeanFlow paper (arXiv 2505.13447,
Table 4) and the authors' code; a YAML file overrides them. Imports neither torch nor deepspeed, so an
invalid config is rejected at once. The strict loader is in loader.py.
"""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from mf_dist.config.fields import (
    Count,
    Decay,
    Decays,
    FewSteps,
    Interval,
    NotNegative,
    Numbers,
    Positive,
    PositiveNumbers,
    Scale,
    Seed,
    Steps,
    Text,
    Whole,
)
from mf_dist.config.loader import Check, read_config
from mf_dist.config.objectives import (
    OBJECTIVES,
    AlphaFlowConfig,
    ImfConfig,
    MeanFlowConfig,
    Objective,
    SolutionFlowConfig,
)
from mf_dist.runtime.errors import UserError
from mf_dist.runtime.outputs import refuse_inside
from mf_dist.runtime.paths import expanded


@dataclass(frozen=True)
class DataConfig:
    path: Text
    """Folder of latent shards written by tools/encode_latents.py."""
    num_workers: Whole = 2
    """Loader processes per rank; 0 loads in the training process. Does not affect the training data."""
    stage: Literal["off", "cache", "dir"] = "cache"
    """cache, dir: read every shard once, in order, while training starts, into the page cache or into stage_dir."""
    stage_dir: Text | None = None
    """Folder on a local disk of each machine, for stage=dir, e.g. /scratch/latents."""
    flip: bool = False
    """Mirror half of the images (the paper does not); the dataset must be encoded with --flip."""
    normalisation: Literal["scale", "channel"] = "scale"
    """scale: latents are shifted and scaled as the VAE's config says; channel: to mean 0 and std 1 of each channel."""
    normalisation_mean: Numbers | None = None
    """normalisation=channel: mean of each channel of the unscaled latents; None: the dataset's."""
    normalisation_std: PositiveNumbers | None = None
    """Their standard deviations."""


@dataclass(frozen=True)
class ImfDitConfig:
    """What a network of improved MeanFlow has besides what a DiT has. Defaults are those of the authors (arXiv
    2512.02012)."""

    head_depth: Count = 8
    """Of the blocks, the last ones that are not shared by the u head and the v head, which has as many of its own."""
    class_tokens: Count = 8
    """Tokens that tell the network the class; likewise the scale, the begin and the end of guidance, and t - r."""
    guidance_tokens: Count = 4
    start_tokens: Count = 2
    end_tokens: Count = 2
    time_tokens: Count = 4


@dataclass(frozen=True)
class ModelConfig:
    depth: Count
    """Transformer blocks."""
    hidden_size: Count
    """Width; divisible by num_heads. dit: by 4 (2-D sine-cosine positions); imf_dit: by 2 num_heads (rotary ones)."""
    num_heads: Count
    patch_size: Count
    """Side of the square patch of latent pixels that makes one token."""
    latent_size: Count | None = None
    """Side of the latent; None: from the dataset manifest, which it must match if set."""
    latent_channels: Count | None = None
    """Channels of the latent; None: from the dataset manifest."""
    num_classes: Whole | None = None
    """Classes, 0 = unconditional; None: from the dataset manifest."""
    network: Literal["dit", "imf_dit"] = "dit"
    """The network's architecture: DiT, or that of improved MeanFlow."""
    imf_dit: ImfDitConfig | None = None
    """For network=imf_dit alone; None: its defaults."""


@dataclass(frozen=True)
class OptimConfig:
    lr: Positive = 1e-4
    """Learning rate, constant after the warm-up."""
    warmup_images: Whole = 0
    """Images over which the learning rate rises linearly; 0: no warm-up, as in the MeanFlow paper."""
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    """Decoupled (AdamW)."""
    grad_clip: NotNegative = 0.0
    """Maximum norm of the whole gradient; 0: no clipping, as in the paper."""
    ema_decay: Decays = (0.9999,)
    """Decay of each EMA, e.g. [0.9999, 0.999]; samples are drawn from the first."""
    ema_warmup: bool = False
    """True: the decay in step n is min(ema_decay, (1 + n) / (10 + n)); needed by short runs."""
    spike_factor: NotNegative = 0.0
    """A gradient norm above this multiple of its running mean is a spike; 0: spikes are not detected."""
    spike_action: Literal["clip", "skip"] = "clip"
    """On a spike: clip the gradient to the limit, or skip the step."""

    def learning_rate(self, images: int) -> float:
        """Of the step that ends with `images` seen."""
        return self.lr * min(1.0, images / self.warmup_images) if self.warmup_images else self.lr


@dataclass(frozen=True)
class TrainConfig:
    total_images: Count
    """Length of the run in images; a remainder smaller than one batch is not trained on."""
    batch_size: Count = 256
    """Images per optimizer step over all ranks; the batches are the same for any number of ranks. A changed one
    continues with the next image."""
    micro_batch: Count | None = None
    """Images per rank and forward pass; None: batch_size / ranks. Smaller values accumulate gradients."""
    seed: Seed = 0
    """All randomness is a function of the seed and the sample's index."""
    init_from: Text | None = None
    """Initial weights if nothing is resumed: folder of a run, checkpoint or model (its EMA), or a .safetensors file."""
    max_skipped: Count = 5
    """Consecutive skipped steps (non-finite gradients or spikes) at which the run stops."""
    hang_seconds: Count = 600
    """A rank that completes no step for this long dumps its stacks and exits; ten times as long while it compiles,
    draws samples or loads."""
    max_hours: NotNegative = 0.0
    """Save and stop before this process has run this long; 0: no limit except SLURM's."""
    profile_steps: FewSteps = 0
    """Optimizer steps that rank 0 records at each start, after three of warm-up, into run_dir/profile: a trace and a
    table of the largest costs, waits and idle time. Training goes on with the same numbers; 0: none."""


@dataclass(frozen=True)
class EngineConfig:
    zero_stage: Annotated[
        int,
        Check("1, 2 or 3 (stage 0 trains wrongly in bf16; use 1 on a single process)", lambda n: n in (1, 2, 3)),
    ] = 1
    """DeepSpeed ZeRO: 1 shards optimizer states, 2 gradients too, 3 weights too."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Dtype of the network's layers. Master weights, times, targets and the loss are always fp32."""
    jvp_precision: Literal["bf16", "fp32"] = "bf16"
    """Dtype of the JVP pass if precision is bf16 (docs/performance.md: its effect on the target)."""
    compile: bool = True
    """torch.compile: the step as one graph and the optimizer's update as another; at ZeRO-3 the step block by block,
    cut further by its hooks."""
    checkpoint_activations: bool = False
    """Recompute each block in backward instead of saving its activations: less memory, one more forward."""
    deterministic: bool = False
    """On a GPU: only kernels whose sums have a fixed order, so that the same state and data give the same bits; slower.
    A CPU is deterministic anyway."""


@dataclass(frozen=True)
class CheckpointConfig:
    every_images: Count = 2_560_000
    """Images between checkpoints; another one is written at the end."""
    keep: Count = 2
    """Number of newest checkpoints to keep."""
    keep_every_images: Whole = 0
    """The first checkpoint after each multiple of this is kept permanently; 0: none."""
    keep_best: Text | None = None
    """Metric of eval/metrics.json, e.g. fid10k: the checkpoint with its lowest value is kept, for the first measured
    EMA at the smallest measured nfe. Each measurement during training (eval.every_images) then also saves."""


@dataclass(frozen=True)
class LogConfig:
    every_steps: Count = 100
    """Optimizer steps between lines of metrics.jsonl."""
    sample_every_images: Whole = 2_560_000
    """Images between grids of EMA samples (always the same seeds and classes); 0: none."""
    wandb: Literal["off", "online", "offline"] = "off"
    wandb_project: Text = "mf_dist"


@dataclass(frozen=True)
class EvalConfig:
    """Defaults of tools/fid_eval.py for this run, and settings of measurements during training."""

    nfe: Steps = (1, 2)
    """Network calls per image in measurements."""
    sampler: Literal["meanflow", "restart"] | None = None
    """In several steps: along the path, or with fresh noise between the steps; None: as the objective's paper does.
    Has no effect on flow matching, which takes Euler steps."""
    guidance: Scale | None = None
    """Scale of classifier-free guidance in samples, for networks that take it as an input (imf_dit); None: 1, none."""
    interval: Interval | None = None
    """Guidance applies for start <= t <= end; None: [0, 1]."""
    grid_nfe: Steps = (1, 2, 4)
    """Network calls per image in the grids drawn during training, side by side."""
    num_samples: Count = 50_000
    labels: Literal["random", "balanced"] = "random"
    """random: uniform, as for published FIDs; balanced: class i mod num_classes."""
    seed: Seed = 0
    features: Text = "inception"
    """Feature network: inception, inception-other, inception-random, dinov2-l, dinov2-l-other, efflite0, or a folder
    with weights."""
    inception_weights: Text | None = None
    """File with the Inception weights; its sha256 must match the published one."""
    reference: Text | None = None
    """Statistics of real images (.npz), or the images: a folder, tar or .npz; during training only statistics."""
    vae: Text | None = None
    """Folder or hub id of the VAE; None: the one recorded in the dataset manifest."""
    every_images: Whole = 0
    """Images between measurements of the EMA during training, with another one at the end; 0: none."""
    training_samples: Count = 10_000
    """Images per measurement during training; the metric's name contains it: fid10k."""
    training_emas: Decays | None = None
    """Which of optim.ema_decay are measured during training; None: the first. The first one listed selects the best."""
    training_seed: Seed = 1000
    """Differs from `seed`, and from those that follow it in repeats, so that the best checkpoint is not selected on the
    noise it is evaluated with."""


@dataclass(frozen=True)
class Config:
    run_dir: Text
    """Folder for all output of the run."""
    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    meanflow: MeanFlowConfig | None = None
    solution_flow: SolutionFlowConfig | None = None
    alpha_flow: AlphaFlowConfig | None = None
    imf: ImfConfig | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def objective(self) -> Objective:
        """The one section of an objective."""
        return getattr(self, self.objective_section)  # type: ignore[no-any-return]

    @property
    def objective_section(self) -> str:
        """Its name. Raises UserError unless the config has exactly one."""
        given = [name for name in OBJECTIVES if getattr(self, name) is not None]
        if len(given) != 1:
            has = f"has {' and '.join(given)}" if given else "has none"
            raise UserError(f"the config {has}, expected exactly one objective: {', '.join(OBJECTIVES)}")
        return given[0]

    @property
    def sampler(self) -> Literal["meanflow", "restart", "euler"]:
        """Name of the sampler of this run's network."""
        return self.objective.sampler if self.objective.is_flow else self.eval.sampler or self.objective.sampler

    @property
    def guidance(self) -> tuple[float, float, float] | None:
        """Scale, start and end of the guidance in samples; None if the network does not take them."""
        if self.model.network != "imf_dit":
            return None
        start, end = self.eval.interval or (0.0, 1.0)
        return self.eval.guidance or 1.0, start, end

    def progress(self, samples_seen: int) -> float:
        """In [0, 1]."""
        return min(1.0, samples_seen / self.train.total_images)

    def steps_left(self, samples_seen: int) -> int:
        """Steps from `samples_seen` images to the end of the run. All batches are complete."""
        return max(0, self.train.total_images - samples_seen) // self.train.batch_size

    def remainder(self, samples_seen: int) -> str:
        """A sentence on the last images of the run if they are fewer than a batch, else empty."""
        left, batch = max(0, self.train.total_images - samples_seen), self.train.batch_size
        if not left % batch:
            return ""
        return (
            f"train.batch_size {batch:,} does not divide the {left:,} images left of train.total_images "
            f"{self.train.total_images:,}: the last {left % batch:,} are not trained on"
        )


PATHS = {
    "data": ("path", "stage_dir"),
    "train": ("init_from",),
    "eval": ("features", "inception_weights", "reference", "vae"),
}
"""Fields that are paths, or may be, besides run_dir."""


def load_config(path: str, overrides: list[str]) -> Config:
    """Reads the YAML file, applies `section.key=value` overrides and expands ~ and $NAME in paths; raises UserError for
    any mistake."""
    config = read_config(Config, expanded(path), overrides)
    try:
        config.objective_section  # noqa: B018  raises unless there is one
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    sections: dict[str, Any] = {}
    for section, names in PATHS.items():
        given = getattr(config, section)
        texts = {name: getattr(given, name) for name in names}
        sections[section] = replace(given, **{name: expanded(text) for name, text in texts.items() if text})
    config = replace(config, run_dir=expanded(config.run_dir), **sections)
    refuse_inside([config.run_dir], config.data.path)
    return config


def resolve(config: Config, manifest: dict[str, Any] | None, world_size: int) -> Config:
    """Completes the config from the dataset manifest and the number of ranks, then validates it.

    Raises UserError for every combination that cannot be trained."""
    model = config.model
    shape: dict[str, Any] = {}
    for name in ("latent_size", "latent_channels", "num_classes"):
        configured, recorded = getattr(model, name), manifest and manifest[name]
        if configured is None and recorded is None:
            raise UserError(
                f"model.{name} is not set and there is no dataset at {config.data.path!r} to take it from; "
                "run tools/encode_latents.py first, or set it"
            )
        if configured is not None and recorded is not None and configured != recorded:
            raise UserError(f"model.{name} is {configured}, but the dataset at {config.data.path!r} has {recorded}")
        shape[name] = recorded if configured is None else configured
    data = _with_channel_statistics(config.data, manifest, shape["latent_channels"])
    if (config.data.stage == "dir") != (config.data.stage_dir is not None):
        raise UserError("data.stage=dir and data.stage_dir=FOLDER require each other: set both or neither")
    if config.data.stage_dir is not None:
        refuse_inside([config.data.stage_dir], config.data.path)
    if config.data.flip and manifest and not manifest["flip"]:
        raise UserError(f"data.flip: the dataset at {config.data.path!r} has no mirrored images; encode it with --flip")
    if model.network == "imf_dit":
        shape["imf_dit"] = model.imf_dit or ImfDitConfig()
    micro_batch = config.train.micro_batch or max(1, config.train.batch_size // world_size)
    train = replace(config.train, micro_batch=micro_batch)
    resolved = replace(config, data=data, model=replace(model, **shape), train=train)
    _check_model(resolved.model)
    _check_batch(resolved, micro_batch, world_size)
    _check_objective(resolved)
    _check_evaluation(resolved)
    return resolved


def _with_channel_statistics(data: DataConfig, manifest: dict[str, Any] | None, channels: int) -> DataConfig:
    """With the numbers of normalisation=channel, which are the dataset's unless they are given. Without a dataset, for
    estimates, they may be missing."""
    given = {name: getattr(data, name) for name in ("normalisation_mean", "normalisation_std")}
    if data.normalisation == "scale":
        if extra := [name for name, values in given.items() if values is not None]:
            raise UserError(f"data.{extra[0]} needs data.normalisation=channel")
        return data
    if (data.normalisation_mean is None) != (data.normalisation_std is None):
        raise UserError("data.normalisation_mean and data.normalisation_std require each other: set both or neither")
    for name, values in given.items():
        if values is not None and len(values) != channels:
            raise UserError(f"data.{name} has {len(values)} numbers, but latents have {channels} channels")
    if data.normalisation_mean is not None or manifest is None:
        return data
    if constant := [c for c, std in enumerate(manifest["channel_std"]) if not std > 0]:
        raise UserError(f"channel {constant[0]} of the latents at {data.path!r} is constant: it cannot have std 1")
    mean, std = (tuple(manifest[key]) for key in ("channel_mean", "channel_std"))
    return replace(data, normalisation_mean=mean, normalisation_std=std)


def _check_model(model: ModelConfig) -> None:
    assert model.latent_size is not None
    if model.latent_size % model.patch_size:
        raise UserError(f"model.patch_size {model.patch_size} does not divide model.latent_size {model.latent_size}")
    if model.hidden_size % model.num_heads:
        raise UserError(f"model.num_heads {model.num_heads} does not divide model.hidden_size {model.hidden_size}")
    if model.network == "imf_dit":
        _check_imf_dit(model)
    elif model.imf_dit is not None:
        raise UserError(f"model.imf_dit is for model.network=imf_dit, not {model.network}: leave it out")
    elif model.hidden_size % 4:
        raise UserError(f"model.hidden_size {model.hidden_size} is not a multiple of 4 (2-D sine-cosine positions)")


def _check_imf_dit(model: ModelConfig) -> None:
    assert model.imf_dit is not None
    head_depth = model.imf_dit.head_depth
    if head_depth >= model.depth:
        raise UserError(f"model.imf_dit.head_depth {head_depth} leaves none of model.depth {model.depth} to be shared")
    if model.hidden_size // model.num_heads % 2:
        raise UserError(
            f"model.hidden_size {model.hidden_size} / model.num_heads {model.num_heads} is odd (rotary positions)"
        )


def _check_batch(config: Config, micro_batch: int, world_size: int) -> None:
    batch, per_pass = config.train.batch_size, micro_batch * world_size
    if batch % per_pass:
        raise UserError(
            f"train.batch_size {batch} is not a multiple of {world_size} ranks x train.micro_batch {micro_batch}"
            f" = {per_pass}; change one of the three"
        )
    section, share = config.objective_section, config.objective.share_r_equals_t
    if micro_batch % share.denominator:
        raise UserError(
            f"{section}.share_r_equals_t {share} of train.micro_batch {micro_batch} is not a whole number of rows; "
            f"choose a multiple of {share.denominator}"
        )
    if config.steps_left(0) < 1:
        raise UserError(f"train.total_images {config.train.total_images} is less than one batch of {batch}")


def _check_objective(config: Config) -> None:
    assert config.model.num_classes is not None
    section, objective = config.objective_section, config.objective
    if config.model.network not in objective.NETWORKS:
        allowed = " or ".join(objective.NETWORKS)
        raise UserError(f"{section} trains model.network={allowed}, not {config.model.network}")
    objective.check(section, config.model.num_classes)


def _check_evaluation(config: Config) -> None:
    if config.guidance is None and (config.eval.guidance or config.eval.interval):
        raise UserError(
            "eval.guidance and eval.interval are for networks that take guidance as an input, model.network=imf_dit: "
            "leave them out"
        )
    if not config.eval.every_images:
        return
    if config.eval.reference is None:
        raise UserError("eval.every_images needs eval.reference: an .npz of statistics")
    unknown = set(config.eval.training_emas or ()) - {*config.optim.ema_decay}
    if unknown:
        raise UserError(f"eval.training_emas has {min(unknown)}, which is not among optim.ema_decay")
