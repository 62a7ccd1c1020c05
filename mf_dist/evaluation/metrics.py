"""Metrics of a set of features, and their names. Inception score, KID, precision and recall are torch-fidelity's.

    fid        Frechet distance of the pooled features (arXiv 1706.08500)
    sfid       the same for the spatial features (arXiv 2103.03841, ADM's layout)
    is         inception score: 10 splits, shuffled with seed 2020 (ADM's evaluator does not shuffle)
    pr         precision and recall, k = 3 (arXiv 1904.06991), against the real images whose features are available
    kid        squared maximum mean discrepancy, 100 subsets of up to 1000 (arXiv 1801.01401)

Only metrics of the published Inception are named fid, sfid and kid, without a network: fid50k is of 50,000 images,
fd_efflite0_1k of 1000 with EfficientNet.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from mf_dist.evaluation.blocks import Blocks, RepeatableParts, number_of_blocks
from mf_dist.evaluation.confidence import plus_minus
from mf_dist.evaluation.feature_network import FeatureNetwork, Floats
from mf_dist.evaluation.reference import Reference
from mf_dist.evaluation.statistics import FeatureSums, Gaussian, exact_gaussian, frechet_distance
from mf_dist.runtime.distributed import Ranks, raise_on_all_ranks, sum_over_ranks
from mf_dist.runtime.errors import UserError, import_error
from mf_dist.runtime.torchvision_repair import repair_torchvision

repair_torchvision()
try:
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric
except Exception as error:
    raise import_error("torch_fidelity", "computes metrics", error) from None

KINDS = ("fid", "sfid", "is", "pr", "kid")
SPLITS, NEIGHBOURS, SUBSET = 10, 3, 1000
OTHER_NAMES = {"fid": "fd", "sfid": "sfd", "kid": "kd"}


@dataclass
class Values:
    """Metrics by name, their settings, and seconds by stage."""

    numbers: dict[str, float] = field(default_factory=dict)
    plus_minus: dict[str, float] = field(default_factory=dict)
    """Half the width of a metric's 95 % band (confidence.py); of `fid` only."""
    settings: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start


def metric_name(kind: str, network: FeatureNetwork, count: int) -> str:
    """Such as fid50k, fid10k, precision50k, fd_digits_1k."""
    size = f"{count // 1000}k" if count % 1000 == 0 else str(count)
    return f"{kind}{size}" if network.is_inception else f"{OTHER_NAMES.get(kind, kind)}_{network.name}_{size}"


def choose_kinds(
    wanted: tuple[str, ...] | None, network: FeatureNetwork, reference: Reference, count: int
) -> tuple[str, ...]:
    """The kinds to measure: those wanted, else all that can be. Raises UserError if one cannot be measured."""
    why_not = {}
    if not network.spatial_dimension:
        why_not["sfid"] = f"features {network.name!r} have no spatial part"
    elif reference.spatial is None:
        why_not["sfid"] = "the reference has no mu_s and sigma_s"
    if reference.rows is None:
        why_not["pr"] = why_not["kid"] = "the reference holds neither real images nor their features"
    if not network.has_logits:
        why_not["is"] = f"features {network.name!r} have no classes"
    elif count < SPLITS:
        why_not["is"] = f"{count} images are fewer than its {SPLITS} splits"
    if min(count, len(reference.rows) if reference.rows is not None else count) <= NEIGHBOURS:
        why_not["pr"] = why_not["kid"] = "there are too few images"
    for kind in wanted or ():
        if kind not in KINDS:
            raise UserError(f"--metrics {kind!r}: expected some of {','.join(KINDS)}")
        if kind in why_not:
            raise UserError(f"--metrics {kind}: {why_not[kind]}")
    return wanted or tuple(kind for kind in KINDS if kind not in why_not)


def gaussians(
    blocks: Blocks, network: FeatureNetwork, ranks: Ranks, exact: bool
) -> tuple[Gaussian | None, Gaussian | None]:
    """Gaussians of the pooled and, if any, spatial features, on rank 0 (else None). Exact: rank 0 reads all in the
    images' order. Streaming: each rank sums its share, centred on the first block's mean, then one reduction."""
    results: list[Gaussian | None] = []
    for name in ("pooled", "spatial") if network.spatial_dimension else ("pooled",):
        dimension = network.dimension if name == "pooled" else network.spatial_dimension
        if exact or blocks.count <= dimension:
            with raise_on_all_ranks(ranks):
                results.append(exact_gaussian(RepeatableParts(blocks, name), dimension) if ranks.is_rank_zero else None)
            continue
        with raise_on_all_ranks(ranks):
            sums = FeatureSums(next(blocks.parts(name, range(1))).mean(axis=0, dtype=np.float64))
            for part in blocks.parts(
                name, range(ranks.rank, number_of_blocks(blocks.count, blocks.block), ranks.world_size)
            ):
                sums.add(part)
        reduce_sums(sums, ranks)
        results.append(sums.gaussian() if ranks.is_rank_zero else None)
    return results[0], results[1] if network.spatial_dimension else None


def reduce_sums(sums: FeatureSums, ranks: Ranks) -> None:
    """Adds the sums of all ranks in one reduction."""
    if ranks.world_size > 1:
        total = sum_over_ranks(torch.from_numpy(sums.flat()).to(ranks.device))
        sums.set_flat(total.cpu().numpy())


def measure_blocks(
    values: Values,
    blocks: Blocks,
    kinds: tuple[str, ...],
    network: FeatureNetwork,
    reference: Reference,
    generated: tuple[Gaussian, Gaussian | None],
    device: torch.device,
    cycle: int | None,
) -> None:
    """Adds the metrics `kinds` to `values`, on rank 0. `generated`: the Gaussians of the blocks. cycle: the source's,
    for the band of the distance; None: without it."""
    names = {kind: metric_name(kind, network, blocks.count) for kind in (*KINDS, "precision", "recall")}
    for kind, a, b in (("fid", generated[0], reference.pooled), ("sfid", generated[1], reference.spatial)):
        if kind in kinds and a is not None and b is not None:
            with values.timing(kind):
                values.numbers[names[kind]] = frechet_distance(a, b)
    if "fid" in kinds and cycle is not None:
        with values.timing("band"):
            band = plus_minus(blocks.rows("pooled"), cycle, reference.pooled, values.numbers[names["fid"]])
        if band is not None:
            values.plus_minus[names["fid"]] = band
    if "is" in kinds:
        with values.timing("is"):
            score = isc_features_to_metric(torch.from_numpy(blocks.rows("logits")), splits=SPLITS)
        values.numbers[names["is"]] = score["inception_score_mean"]
        values.numbers[names["is"] + "_std"] = score["inception_score_std"]
    if reference.rows is not None and {"pr", "kid"} & {*kinds}:
        _compare_with_rows(values, blocks.rows("pooled"), reference.rows, kinds, names, device)


def _compare_with_rows(
    values: Values,
    generated_rows: Floats,
    real_rows: Floats,
    kinds: tuple[str, ...],
    names: dict[str, str],
    device: torch.device,
) -> None:
    """Precision, recall and KID. torch-fidelity takes the generated images first: in the other order precision and
    recall are swapped."""
    generated, real = torch.from_numpy(generated_rows).to(device), torch.from_numpy(real_rows).to(device)
    if "pr" in kinds:
        with values.timing("pr"):
            scores = prc_features_to_metric(
                generated, real, prc_neighborhood=NEIGHBOURS, prc_batch_size=1000, save_cpu_ram=True, verbose=False
            )
        values.numbers |= {names["precision"]: scores["precision"], names["recall"]: scores["recall"]}
        values.settings["pr_real_images"] = len(real)
    if "kid" in kinds:
        size = min(SUBSET, len(generated), len(real))
        with values.timing("kid"):
            scores = kid_features_to_metric(generated, real, kid_subset_size=size, verbose=False)
        values.numbers[names["kid"]] = scores["kernel_inception_distance_mean"]
        values.numbers[names["kid"] + "_std"] = scores["kernel_inception_distance_std"]
        values.settings |= {"kid_subset_size": size, "kid_real_images": len(real)}
