"""The stream of batches: the same global batch for any ranks, workers, accumulation; exact shares; O(1) seeking."""

import multiprocessing
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import time
from fractions import Fraction
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, encode

from mf_dist.config.objectives import MeanFlowConfig
from mf_dist.config.schema import load_config, resolve
from mf_dist.data.loader import LatentStream, training_batches
from mf_dist.data.shards import LatentShards, read_manifest
from mf_dist.runtime import rng
from mf_dist.runtime.errors import UserError

DRAWS = MeanFlowConfig().draws((4, 8, 8))


def tensors(batch):
    return [batch.moments, batch.labels, *batch.draws.values()]


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
                    key = b.draws["e"][i].numpy().tobytes()
                    rows[key] = (
                        int(b.labels[i]),
                        b.moments[i].numpy().tobytes(),
                        b.draws["posterior_noise"][i].numpy().tobytes(),
                        b.draws["time_normals"][i].numpy().tobytes(),
                        float(b.draws["drop_uniforms"][i]),
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
    by_draw = {rng.train_draws(0, slot, DRAWS)[0]["e"].tobytes(): slot for slot in range(100)}
    resumed = global_rows(tiny_config, options, latents, 1, samples_seen=44)
    assert [sorted(by_draw[e] for e in rows) for rows in resumed] == [
        list(range(first, first + batch)) for first in range(44, 44 + steps * batch, batch)
    ]
    for world_size, more in [(2, []), (1, [f"train.micro_batch={batch // 2}"])]:
        assert global_rows(tiny_config, [*options, *more], latents, world_size, samples_seen=44) == resumed


def test_every_image_once_an_epoch_and_batches_cross_epochs(latents):
    """With r = t on every row nothing is reordered, so the rows must be the concatenated permutations."""
    shards = LatentShards(latents)
    stream = LatentStream(shards, seed=3, micro_batch=8, objective=MeanFlowConfig(Fraction(1)), flip=False)
    rows = torch.cat([stream[first].moments for first in range(0, 293, 8)]).numpy()  # 150 is not a multiple of 8
    slots = [*rng.order(3, 0, shards.count), *rng.order(3, 1, shards.count)]
    for row, image in zip(rows, slots, strict=False):
        assert np.array_equal(row, shards[int(image)][0])


def test_stream_can_be_pickled_for_loader_processes(latents):
    """Needed where loader processes are not forked."""
    stream = LatentStream(LatentShards(latents), seed=3, micro_batch=8, objective=MeanFlowConfig(), flip=False)
    expected = stream[5]
    copy = pickle.loads(pickle.dumps(stream))  # noqa: S301  as for a spawned loader process
    assert all(torch.equal(a, b) for a, b in zip(tensors(copy[5]), tensors(expected), strict=True))


@pytest.mark.parametrize("share", ["3/4", "1/2", "1", "0", "5/8"])
def test_rows_with_r_below_t_come_last_and_are_those_of_their_slots(latents, share):
    share, m = Fraction(share), 8
    stream = LatentStream(LatentShards(latents), seed=0, micro_batch=m, objective=MeanFlowConfig(share), flip=False)
    for first in (0, 40, 43):
        expected = {slot: rng.train_draws(0, slot, DRAWS)[0]["e"] for slot in range(first, first + m)}
        equal = [e for slot, e in expected.items() if slot % share.denominator < share.numerator]
        below = [e for slot, e in expected.items() if slot % share.denominator >= share.numerator]
        assert len(equal) == m * share
        assert np.array_equal(stream[first].draws["e"].numpy(), np.stack([*equal, *below]))


def test_seeking_takes_constant_time(latents):
    stream = LatentStream(LatentShards(latents), seed=0, micro_batch=8, objective=MeanFlowConfig(), flip=False)
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


def test_a_batch_travels_without_shared_memory_and_descriptors(latents):
    """Otherwise a long TMPDIR or a small /dev/shm makes training wait for a batch that was lost."""
    stream = LatentStream(LatentShards(latents), seed=3, micro_batch=8, objective=MeanFlowConfig(), flip=False)
    batch = stream[5]
    before = set(Path("/proc/self/fd").iterdir())
    sent = bytes(ForkingPickler.dumps(batch))
    assert set(Path("/proc/self/fd").iterdir()) == before
    assert len(sent) > sum(tensor.nbytes for tensor in tensors(batch))
    received = pickle.loads(sent)  # noqa: S301  our own
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(tensors(received), tensors(batch), strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_becomes_shorter_is_one_line(latents, tiny_config, tmp_path, workers):
    """Under a memory map the process would end by SIGBUS."""
    copy = shutil.copytree(latents, tmp_path / "copy")
    shards = LatentShards(copy)
    config = resolve(load_config(str(tiny_config), [f"data.num_workers={workers}"]), shards.manifest, 1)
    batches = training_batches(shards, config, 0, 0, 1, pin_memory=False)
    next(batches)
    for tar in copy.glob("*.tar"):
        os.truncate(tar, 5000)
    with pytest.raises(
        UserError, match=r"^/.*\.tar: cannot read sample 000000\d+: it ends before byte .*latents.py verify"
    ):
        list(batches)


def test_an_unexpected_error_in_a_loader_process_keeps_its_traceback(latents, tiny_config, monkeypatch):
    """A bug is neither a killed process nor one that cannot be started."""
    shards = LatentShards(latents)
    config = resolve(load_config(str(tiny_config), ["data.num_workers=1"]), shards.manifest, 1)
    for kind in (RuntimeError, OSError):

        def fail(*_, kind=kind):
            raise kind("a bug")

        monkeypatch.setattr(LatentShards, "batch", fail)
        with pytest.raises(kind, match=r"^Caught \w+ in DataLoader worker process 0(.|\n)*a bug"):
            next(training_batches(shards, config, 0, 0, 1, pin_memory=False))


def test_a_killed_loader_process_is_one_line(latents, tiny_config):
    shards = LatentShards(latents)
    config = resolve(load_config(str(tiny_config), ["data.num_workers=1"]), shards.manifest, 1)
    before = set(multiprocessing.active_children())
    batches = training_batches(shards, config, 0, 0, 1, pin_memory=False)
    next(batches)
    for process in set(multiprocessing.active_children()) - before:
        process.kill()
    with pytest.raises(UserError, match=r"a loader process has ended unexpectedly \(DataLoader worker .*num_workers"):
        list(batches)


@pytest.mark.dist
@pytest.mark.parametrize("is_full", [False, True])
def test_loader_processes_in_small_surroundings(tiny_config, images, tmp_path, is_full):
    """A temporary folder too long for sockets, 150 shards with 64 spare descriptors, and /dev/shm of 200 kB; a full
    /dev/shm, in which no process can be started, is one line."""
    if os.geteuid():
        pytest.skip("mounting a small /dev/shm needs root")
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    encode(images, tmp_path / "many", shard_size=1)
    options = [f"data.path={tmp_path / 'many'}", "data.num_workers=2", "log.sample_every_images=0"]
    command = shlex.join([sys.executable, "-m", "mf_dist.train", str(tiny_config), *options])
    size = "4k tmpfs /dev/shm && head -c 4096 /dev/zero > /dev/shm/full" if is_full else "200k tmpfs /dev/shm"
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", f"mount -t tmpfs -o size={size} && ulimit -n 90 && {command}"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    if is_full:
        (line,) = [line for line in done.stderr.splitlines() if "warning" not in line.lower()]
        assert done.returncode == 2 and line.startswith(
            "error: cannot start data.num_workers=2 loader processes: No sp"
        )
    else:
        assert done.returncode == 0 and "finished at step 6" in done.stdout, done.stderr
