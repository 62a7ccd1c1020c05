"""The commit protocol: complete or absent, verified before use, the newest valid one wins."""

import errno
import json
import os
import shutil
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mf_dist.checkpoint.reader import find_checkpoint, newest_checkpoint, open_checkpoint
from mf_dist.checkpoint.runs import evaluation_folder, newest_run
from mf_dist.checkpoint.writer import CheckpointWriter, Retention, WriterRank, check_free_space, write_tensors
from mf_dist.fault_tolerance.status import Status
from mf_dist.runtime.atomic_files import sha256_of
from mf_dist.runtime.errors import UserError, is_disk_fault

KINDS = ["master", "exp_avg", "exp_avg_sq", "ema-0.9"]


def random_tensors(step):
    g = torch.Generator().manual_seed(step)
    shapes = {"a.weight": (3, 4), "b": (5,), "empty": (0, 2), "scalar": ()}
    return {kind: {name: torch.randn(shape, generator=g) for name, shape in shapes.items()} for kind in KINDS}


def begin(writer, tensors, step, **state):
    assert writer.writer_rank.rank or writer.prepare(step) is None
    gathered = ((kind, name, a) for kind, by_name in tensors.items() for name, a in by_name.items())
    writer.begin(gathered, KINDS, {"step": step, "samples_seen": step, "config": {}, "guard": {}, **state})


def save(root, step, keep=2, **state):
    tensors, writer = random_tensors(step), CheckpointWriter(root, WriterRank(0, 1), Retention(keep))
    begin(writer, tensors, step, **state)
    writer.wait()
    assert writer.error is None
    return writer.committed, tensors


def test_a_checkpoint_loads_as_saved(tmp_path):
    folder, tensors = save(tmp_path, 7)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.step == 7 and checkpoint.ema_decays() == ["0.9"]
    for kind, by_name in tensors.items():
        loaded = checkpoint.load(kind)
        assert loaded.keys() == by_name.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in by_name.items())


def test_only_the_newest_are_kept(tmp_path):
    for step in (2, 10, 9, 100):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]


def test_a_new_checkpoint_stays_beside_damaged_later_ones(tmp_path):
    for step in (75, 100):
        (save(tmp_path, step)[0] / "state.json").write_text("{}")
    for step in (20, 25, 30):
        save(tmp_path, step)
        assert newest_checkpoint(tmp_path)[0].step == step
    assert {path.name for path in tmp_path.iterdir()} == {f"step-{n:08d}" for n in (25, 30, 75, 100)}


@pytest.mark.parametrize("name", ["master.safetensors", "ema-0.9.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_detected_before_use_and_the_older_one_taken(tmp_path, name, damage):
    save(tmp_path, 1)
    folder, _ = save(tmp_path, 2)
    path = folder / name
    raw = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw if damage == "flip" else raw[:-1] if name != "manifest.json" else raw[:-9])
    checkpoint, warnings = newest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.step == 1
    assert len(warnings) == 1 and "damaged" in warnings[0]


def test_a_disk_fault_is_no_reason_to_start_from_scratch(tmp_path, monkeypatch):
    """While the fault lasts, an older readable checkpoint is used; without one it is an error."""
    for step in (1, 2):
        save(tmp_path, step)
    hidden = {"step-00000002"}

    def failing(path):
        if path.parent.name in hidden:
            raise OSError(errno.EIO, "Input/output error")
        return sha256_of(path)

    monkeypatch.setattr("mf_dist.checkpoint.reader.sha256_of", failing)
    assert newest_checkpoint(tmp_path)[0].step == 1
    hidden.add("step-00000001")
    with pytest.raises(UserError, match="Input/output error") as caught:
        newest_checkpoint(tmp_path)
    assert is_disk_fault(caught.value)
    for step in (1, 2):
        (tmp_path / f"step-{step:08d}" / "master.safetensors").write_bytes(b"")
    hidden.clear()
    assert newest_checkpoint(tmp_path)[0] is None


def test_a_partially_written_folder_is_ignored(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000002.tmp")
    checkpoint, warnings = newest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.step == 1 and warnings == []


def test_manifest_names_cannot_leave_the_folder(tmp_path):
    folder, _ = save(tmp_path, 1)
    (tmp_path / "outside").write_text("x")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../outside"] = {"bytes": 1, "sha256": "0" * 64}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"step-00000001/outside"):
        open_checkpoint(folder)


def test_finding_runs_and_checkpoints(tmp_path):
    with pytest.raises(UserError, match="no trained run"):
        newest_run(tmp_path)
    folder, _ = save(tmp_path / "runs/a/checkpoints", 1)
    assert newest_run(tmp_path / "runs") == tmp_path / "runs/a"
    assert find_checkpoint(folder).step == find_checkpoint(tmp_path / "runs/a").step == 1
    save(tmp_path / "runs/deep/b/checkpoints", 1)
    assert newest_run(tmp_path / "runs") == tmp_path / "runs/deep/b"
    os.utime(tmp_path / "runs/a/checkpoints", (2**31, 2**31))
    assert newest_run(tmp_path / "runs") == tmp_path / "runs/a"
    with pytest.raises(UserError, match="no checkpoint in"):
        find_checkpoint(tmp_path)


def test_the_newest_run_is_found_through_links_and_by_its_last_training(tmp_path):
    """A link to a run, a link back to its parent, and an old run that is tidied up later."""
    runs, elsewhere = tmp_path / "runs", tmp_path / "elsewhere"
    save(runs / "old/checkpoints", 1)
    Status(runs / "old").end("finished", 1)
    save(elsewhere / "exp/checkpoints", 1)
    Status(elsewhere / "exp").end("finished", 1)
    (runs / "a").symlink_to(runs, target_is_directory=True)
    (runs / "gone").symlink_to(tmp_path / "nowhere")
    assert newest_run(runs) == runs / "old"
    (runs / "exp").symlink_to(elsewhere / "exp", target_is_directory=True)
    os.utime(runs / "old/checkpoints", (2**31, 2**31))
    assert newest_run(runs) == runs / "exp"
    Status(runs / "old").refuse("a mistake in a call", has_begun=False)  # says nothing about training
    os.utime(runs / "old/checkpoints", (1, 1))
    assert newest_run(runs) == runs / "exp"
    (tmp_path / "linked").symlink_to(runs, target_is_directory=True)
    assert newest_run(tmp_path / "linked") == tmp_path / "linked/exp"


def test_a_checkpoint_may_have_any_name_and_place(tmp_path):
    root = tmp_path / "run/checkpoints"
    for step in (50, 100):
        save(root, step)
    shutil.copytree(root / "step-00000050", tmp_path / "best")
    assert (
        find_checkpoint(tmp_path / "best").step == 50 and evaluation_folder(find_checkpoint(tmp_path / "best")) is None
    )
    (root / "step-00000100").rename(root / "good one")
    (tmp_path / "link").symlink_to(root / "good one", target_is_directory=True)
    for path in (root, root.parent, root / "good one", tmp_path / "link"):
        assert find_checkpoint(path).step == newest_checkpoint(root)[0].step == 100
        assert evaluation_folder(find_checkpoint(path)).resolve() == tmp_path / "run/eval"
    (root / "good one").rename(root / "step-00000007")  # a number that is not its step
    assert newest_checkpoint(root)[0].step == 100
    (root / "step-00000007").rename(root / "step-00000200")
    assert newest_checkpoint(root)[0].step == 100 and newest_checkpoint(root)[1] == []
    writer = CheckpointWriter(root, WriterRank(0, 1), Retention(1))
    begin(writer, random_tensors(200), 200)
    writer.wait()
    assert "step-00000200 is in the way and holds step 100; give it another name" in writer.error
    assert open_checkpoint(root / "step-00000200").step == 100
    save(root, 150, keep=1)
    assert {path.name for path in root.iterdir()} == {"step-00000150", "step-00000200"}


def test_a_checkpoint_moved_to_another_disk_is_removed_as_its_link(tmp_path):
    folder, _ = save(tmp_path / "run", 1)
    shutil.move(folder, tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    save(tmp_path / "run", 2, keep=1)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000002"]
    assert open_checkpoint(tmp_path / "elsewhere").step == 1
    (tmp_path / "run/step-00000003.tmp").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    save(tmp_path / "run", 3)
    assert open_checkpoint(tmp_path / "elsewhere").step == 1


def test_files_hold_the_same_as_the_librarys(tmp_path):
    tensors = random_tensors(1)["master"]
    entry = write_tensors(tmp_path / "ours.safetensors", tensors)
    save_file(tensors, tmp_path / "theirs.safetensors")
    ours = load_file(tmp_path / "ours.safetensors")
    theirs = load_file(tmp_path / "theirs.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert entry["bytes"] == (tmp_path / "ours.safetensors").stat().st_size


def test_two_ranks_write_shares_of_one_checkpoint(tmp_path):
    """Rank 0 commits once the files of both are on the disk. The bytes are those of a single writer."""
    alone, tensors = save(tmp_path / "alone", 5)
    writers = [CheckpointWriter(tmp_path / "both", WriterRank(rank, 2), Retention(2)) for rank in (0, 1)]
    for writer in writers:
        begin(writer, tensors, 5)
    for writer in writers:
        writer.wait()
    both = writers[0].committed
    assert writers[1].committed is None and all(writer.error is None for writer in writers)
    assert sorted(p.name for p in both.iterdir()) == sorted(p.name for p in alone.iterdir())
    assert all((both / p.name).read_bytes() == p.read_bytes() for p in alone.iterdir())


def test_a_rank_that_fails_leaves_no_checkpoint_and_no_rank_waiting(tmp_path):
    first, second = (CheckpointWriter(tmp_path, WriterRank(rank, 2), Retention(2)) for rank in (0, 1))
    begin(first, random_tensors(1), 1)
    (tmp_path / "step-00000001.tmp/ema-0.9.safetensors").mkdir()  # in the way of rank 1, which has every second file
    begin(second, random_tensors(1), 1)
    second.wait()
    assert "cannot write a checkpoint" in second.error and first.is_running
    first.cancel()
    first.wait()
    assert first.committed is None and first.error is None and list(tmp_path.iterdir()) == []


def test_saving_does_not_block_the_caller(tmp_path, monkeypatch):
    """begin returns while the writer still waits for the disk; later changes of the weights do not reach it."""
    gate = threading.Event()
    fsync = os.fsync
    monkeypatch.setattr("mf_dist.checkpoint.writer.os.fsync", lambda number: (gate.wait(20), fsync(number)))
    tensors, writer = random_tensors(3), CheckpointWriter(tmp_path, WriterRank(0, 1), Retention(2))
    begin(writer, {kind: {n: a.clone() for n, a in by_name.items()} for kind, by_name in tensors.items()}, 3)
    assert writer.is_running and writer.committed is None
    gate.set()
    writer.wait()
    loaded = open_checkpoint(writer.committed).load("master")
    assert all(torch.equal(loaded[name], a) for name, a in tensors["master"].items())


def test_a_disk_that_refuses_is_a_message_and_harms_nothing(tmp_path):
    save(tmp_path / "run", 1)
    (tmp_path / "file").write_text("")
    assert "cannot write a checkpoint" in CheckpointWriter(
        tmp_path / "file" / "run", WriterRank(0, 1), Retention(2)
    ).prepare(2)
    writer = CheckpointWriter(tmp_path / "run", WriterRank(0, 1), Retention(2))
    (tmp_path / "run" / "step-00000002.tmp").write_text("in the way")
    assert "MiB free" in writer.prepare(2)
    assert newest_checkpoint(tmp_path / "run")[0].step == 1
    with pytest.raises(UserError, match="MiB free, checkpoints need"):
        check_free_space(tmp_path / "new" / "run", 2**60)


def test_two_hundred_flipped_bits_are_all_detected_before_use(tmp_path):
    save(tmp_path, 1)
    folder, _ = save(tmp_path, 2)
    names = sorted(path.name for path in folder.iterdir())
    g = np.random.default_rng(0)
    for trial in range(200):
        path = folder / names[trial % len(names)]
        good = path.read_bytes()
        bad = bytearray(good)
        bad[g.integers(len(bad))] ^= 1 << int(g.integers(8))
        path.write_bytes(bad)
        checkpoint, warnings = newest_checkpoint(tmp_path)
        assert checkpoint.step == 1 and len(warnings) == 1, (path.name, trial)
        path.write_bytes(good)
    assert newest_checkpoint(tmp_path)[0].step == 2


def test_retention_over_a_thousand_saves(tmp_path):
    """The newest 3, every 100th by images, the best by a metric of one EMA at nfe 1, sweeps aside; the newest
    always stays."""
    (tmp_path / "metrics.json").write_text(
        json.dumps(
            [
                {"metrics": {"fd": 9.0}, "nfe": 1, "step": 10, "ema": "0.9"},
                {"metrics": {"fd": 3.0}, "nfe": 1, "step": 37, "ema": "0.9"},
                {"metrics": {"other": 0.0}, "nfe": 1, "step": 5, "ema": "0.9"},
                {"metrics": {"fd": 3.5}, "nfe": 1, "step": 990, "ema": "0.9"},
                {"metrics": {"fd": 1.0}, "nfe": 1, "step": 500, "ema": "0.99"},
                {"metrics": {"fd": 2.0}, "nfe": 2, "step": 700, "ema": "0.9"},
                {"metrics": {"fd": 0.0}, "images": "x"},
                {"metrics": {"fd": 1.0}, "nfe": 1, "step": 42, "ema": "0.9", "sweep": True},
            ]
        )
    )
    keep = Retention(3, 1000, "fd", tmp_path / "metrics.json", "0.9")
    root = tmp_path / "checkpoints"
    for step in range(1, 1001):
        folder = root / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"samples_seen": 10 * step, "saved_images_ago": 10}))
        keep.apply(root, folder)
    left = {int(path.name[5:]) for path in root.iterdir()}
    assert left == {37, *range(100, 1001, 100), 998, 999, 1000}
    assert Retention(1).removable([root / "step-00001000"]) == []


def edit(folder, name, change):
    """Changes a JSON file, and its entry in the manifest to match."""
    import hashlib

    value = change(json.loads((folder / name).read_text()))
    raw = json.dumps(value).encode()
    (folder / name).write_bytes(raw)
    if name != "manifest.json":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("manifest.json", lambda m: {"files": {}}),
        ("manifest.json", lambda m: {"files": {k: v for k, v in m["files"].items() if "ema" not in k}}),
        ("manifest.json", lambda m: {"files": {k: v for k, v in m["files"].items() if "avg_sq" not in k}}),
        ("state.json", lambda s: {"step": 2}),
        ("state.json", lambda s: {**s, "step": "two"}),
    ],
    ids=["nothing", "no EMA", "no moment", "no state", "no step"],
)
def test_what_cannot_be_resumed_is_not_a_valid_checkpoint(tmp_path, name, change):
    save(tmp_path, 1)
    edit(save(tmp_path, 2)[0], name, change)
    checkpoint, warnings = newest_checkpoint(tmp_path)
    assert checkpoint.step == 1 and "is not a valid checkpoint" in warnings[0]


def test_a_disk_that_does_not_answer_is_a_failed_save(tmp_path, monkeypatch):
    """Such as a network disk that has disconnected: the explanation of the error must not hide it."""
    writer = CheckpointWriter(tmp_path, WriterRank(0, 1), Retention(2))

    def disconnected(*_):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr("mf_dist.checkpoint.writer.write_tensors", disconnected)
    monkeypatch.setattr("mf_dist.checkpoint.writer.shutil.disk_usage", disconnected)
    begin(writer, random_tensors(1), 1)
    writer.wait()
    assert writer.has_failed and "Stale file handle" in writer.error and "does not answer" in writer.error


def test_leftovers_of_interrupted_saves_are_removed(tmp_path):
    (tmp_path / "step-00000009.tmp").mkdir()
    check_free_space(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []
