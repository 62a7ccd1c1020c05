"""The stream of batches: the same global batch for any ranks, workers, accumulation; exact shares; O(1) seeking."""

import pickle
import time
from fractions import Fraction

import numpy as np
import pytest
import torch

from mf_dist.config.schema import load_config, resolve
from mf_dist.data.loader import LatentStream, training_batches
from mf_dist.data.shards import LatentShards, read_manifest
from mf_dist.runtime import rng


def global_rows(config_path, overrides, latents, world_size, samples_seen=0):
    """All rows of the run over all ranks, keyed by what they draw: {e's bytes: (label, moments' bytes, times)}."""
    config = resolve(load_config(str(config_path), overrides), read_manifest(latents), world_size)
    per_step, batch = [], config.train.batch_size
    iterators = [
        training_batches(LatentShards(latents), config, samples_seen, rank, world_size, pin_memory=False)
        for rank in range(world_size)
    ]
    accumulation = batch // (config.train.micro_batch * world_size)
    for _ in range(config.steps_left(samples_seen)):
        rows = {}
        for iterator in iterators:
            for _ in range(accumulation):
                b = next(iterator)
                for i in range(len(b.labels)):
                    key = b.e[i].numpy().tobytes()
                    rows[key] = (
                        int(b.labels[i]),
                        b.moments[i].numpy().tobytes(),
                        b.posterior_noise[i].numpy().tobytes(),
                        b.time_normals[i].numpy().tobytes(),
                        float(b.drop_uniforms[i]),
                    )
        assert len(rows) == batch
        per_step.append(rows)
    assert all(next(iterator, None) is None for iterator in iterators)
    return per_step


def test_global_batch_is_the_same_for_any_ranks_accumulation_and_workers(tiny_config, latents):
    reference = global_rows(tiny_config, [], latents, 1)
    assert len(reference) == 6
    for world_size, overrides in [
        (2, []),
        (4, []),
        (1, ["train.micro_batch=4"]),
        (2, ["train.micro_batch=4"]),
        (1, ["data.num_workers=2"]),
    ]:
        assert global_rows(tiny_config, overrides, latents, world_size) == reference


def test_resumed_stream_is_the_rest_of_the_full_one(tiny_config, latents):
    reference = global_rows(tiny_config, [], latents, 1)
    assert global_rows(tiny_config, [], latents, 2, samples_seen=48) == reference[3:]


@pytest.mark.parametrize(("batch", "steps"), [(24, 2), (32, 1), (8, 7), (12, 4)])
def test_another_batch_size_continues_with_the_next_image(tiny_config, latents, batch, steps):
    """44 images seen, which neither the new batch nor the micro-batches divide: the next steps are of the images
    44, 45, ..., in complete batches, for any number of ranks."""
    options = [f"train.batch_size={batch}", "train.total_images=100", "meanflow.share_r_equals_t=1/2"]
    by_draw = {rng.train_draws(0, slot, (4, 8, 8))[1].tobytes(): slot for slot in range(100)}
    resumed = global_rows(tiny_config, options, latents, 1, samples_seen=44)
    assert [sorted(by_draw[e] for e in rows) for rows in resumed] == [
        list(range(first, first + batch)) for first in range(44, 44 + steps * batch, batch)
    ]
    for world_size, more in [(2, []), (1, [f"train.micro_batch={batch // 2}"])]:
        assert global_rows(tiny_config, [*options, *more], latents, world_size, samples_seen=44) == resumed


def test_every_image_once_an_epoch_and_batches_cross_epochs(latents):
    """With r = t on every row nothing is reordered, so the rows must be the concatenated permutations."""
    shards = LatentShards(latents)
    stream = LatentStream(shards, seed=3, micro_batch=8, share_r_equals_t=Fraction(1), flip=False)
    rows = torch.cat([stream[first].moments for first in range(0, 293, 8)]).numpy()  # 150 is not a multiple of 8
    slots = [*rng.order(3, 0, shards.count), *rng.order(3, 1, shards.count)]
    for row, image in zip(rows, slots, strict=False):
        assert np.array_equal(row, shards[int(image)][0])


def test_stream_can_be_pickled_for_loader_processes(latents):
    """Needed where loader processes are not forked."""
    stream = LatentStream(LatentShards(latents), seed=3, micro_batch=8, share_r_equals_t=Fraction(3, 4), flip=False)
    expected = stream[5]
    copy = pickle.loads(pickle.dumps(stream))  # noqa: S301  as for a spawned loader process
    assert all(torch.equal(a, b) for a, b in zip(copy[5], expected, strict=True))


@pytest.mark.parametrize("share", ["3/4", "1/2", "1", "0", "5/8"])
def test_rows_with_r_below_t_come_last_and_are_those_of_their_slots(latents, share):
    share, m = Fraction(share), 8
    stream = LatentStream(LatentShards(latents), seed=0, micro_batch=m, share_r_equals_t=share, flip=False)
    for first in (0, 40, 43):
        expected = {slot: rng.train_draws(0, slot, (4, 8, 8))[1] for slot in range(first, first + m)}
        equal = [e for slot, e in expected.items() if slot % share.denominator < share.numerator]
        below = [e for slot, e in expected.items() if slot % share.denominator >= share.numerator]
        assert len(equal) == m * share
        assert np.array_equal(stream[first].e.numpy(), np.stack([*equal, *below]))


def test_seeking_takes_constant_time(latents):
    stream = LatentStream(LatentShards(latents), seed=0, micro_batch=8, share_r_equals_t=Fraction(3, 4), flip=False)
    start = time.perf_counter()
    stream[10**9]
    assert time.perf_counter() - start < 1


def test_loading_draws_nothing_from_the_global_generators(tiny_config, latents):
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    global_rows(tiny_config, [], latents, 1)
    assert torch.equal(torch_state, torch.random.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])


@pytest.mark.dist
def test_ten_epochs_on_three_ranks_with_four_workers_and_seven_shards(images, tmp_path, tiny_config):
    """Every image exactly once an epoch, in another order each."""
    from conftest import encode

    encode(images, tmp_path / "seven", shard_size=22)
    shards = LatentShards(tmp_path / "seven")
    assert len(shards.manifest["shards"]) == 7
    number = {shards[i][0].tobytes(): i for i in range(150)}
    options = [
        f"data.path={tmp_path / 'seven'}",
        "train.batch_size=60",
        "train.micro_batch=20",
        "data.num_workers=4",
        "train.total_images=1500",
    ]
    config = resolve(load_config(str(tiny_config), options), shards.manifest, 3)
    ranks = [training_batches(shards, config, 0, rank, 3, pin_memory=False) for rank in range(3)]
    seen = []
    for _ in range(config.steps_left(0)):
        step = np.empty(60, int)
        for rank, batches in enumerate(ranks):
            batch = next(batches)
            step[20 * rank : 20 * rank + 20] = [number[m.numpy().tobytes()] for m in batch.moments]
        seen.append(step)
    assert all(next(batches, None) is None for batches in ranks)
    stream = np.concatenate(seen)
    # rows are ordered inside a micro-batch, so an epoch of 150 ends inside a step: compare with the order itself
    order = np.concatenate([rng.order(config.train.seed, epoch, 150) for epoch in range(10)])
    for first in range(0, 1500, 20):
        assert sorted(stream[first : first + 20]) == sorted(order[first : first + 20])
    for epoch in range(10):
        assert sorted(order[150 * epoch : 150 * epoch + 150]) == list(range(150))
    assert not np.array_equal(order[:150], order[150:300])
