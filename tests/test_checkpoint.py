"""The commit protocol: complete or absent, verified before use, the newest valid one wins."""

import json
import os
import shutil

import pytest
import torch

from mf_dist.checkpoint import find_checkpoint, newest_checkpoint, newest_run, open_checkpoint, save_checkpoint
from mf_dist.errors import UserError


def save(root, step, keep=2):
    g = torch.Generator().manual_seed(step)
    tensors = {
        kind: {"a.weight": torch.randn(3, 4, generator=g), "b": torch.randn(5, generator=g)}
        for kind in ("master", "ema-0.9")
    }
    return save_checkpoint(root, tensors, {"step": step}, keep), tensors


def test_what_is_saved_comes_back(tmp_path):
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


def test_what_was_just_saved_stays_beside_damaged_later_ones(tmp_path):
    for step in (75, 100):
        (save(tmp_path, step)[0] / "state.json").write_text("{}")
    for step in (20, 25, 30):
        save(tmp_path, step)
        assert newest_checkpoint(tmp_path)[0].step == step
    assert {path.name for path in tmp_path.iterdir()} == {f"step-{n:08d}" for n in (25, 30, 75, 100)}


@pytest.mark.parametrize("name", ["master.safetensors", "ema-0.9.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_seen_before_use_and_the_older_one_taken(tmp_path, name, damage):
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


def test_a_half_written_folder_does_not_exist(tmp_path):
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


def test_finding(tmp_path):
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


def test_a_full_or_missing_disk_is_one_line_and_harms_nothing(tmp_path):
    save(tmp_path / "run", 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write checkpoint"):
        save(tmp_path / "file" / "run", 2)
    (tmp_path / "run" / "step-00000002.tmp").write_text("in the way")
    with pytest.raises(UserError, match="MiB free"):
        save(tmp_path / "run", 2)
    assert newest_checkpoint(tmp_path / "run")[0].step == 1
