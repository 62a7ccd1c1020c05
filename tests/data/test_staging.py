"""Staged shards: the same bytes, verified, and used as soon as they exist."""

import shutil

import numpy as np
import pytest

from mf_dist.data.shards import LatentShards
from mf_dist.data.staging import Staging, staged_path
from mf_dist.runtime.errors import UserError


@pytest.fixture
def copy(latents, tmp_path):
    return shutil.copytree(latents, tmp_path / "shared")


def stage(folder, stage_dir):
    messages = []
    Staging(folder, LatentShards(folder).manifest, stage_dir, messages.append).wait()
    return messages


def test_staged_shards_are_read_and_equal(copy, latents, tmp_path):
    shards, whole = LatentShards(copy, stage_dir=str(tmp_path / "staged")), LatentShards(latents)
    assert np.array_equal(shards[70][0], whole[70][0])  # from the shared disk
    assert stage(copy, tmp_path / "staged")[-1] == f"staged 3 of 3 shards in {tmp_path / 'staged'}"
    for i in range(1200):  # it looks for copies every 1000 reads
        shards[i % 150]
    assert shards._staged == {0, 1, 2}
    for tar in copy.glob("*.tar"):
        tar.write_bytes(b"gone")  # not read any more
    fresh = [shards[i] for i in range(150)]
    assert all(np.array_equal(a[0], whole[i][0]) and a[1] == whole[i][1] for i, a in enumerate(fresh))


def test_a_second_process_reuses_staged_shards(copy, tmp_path):
    stage(copy, tmp_path / "staged")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "staged").iterdir()}
    assert len(stamps) == 3 and stage(copy, tmp_path / "staged")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "staged").iterdir()} == stamps


def test_a_damaged_shard_is_not_staged(copy, tmp_path):
    manifest = LatentShards(copy).manifest
    raw = bytearray((copy / "shard-00001.tar").read_bytes())
    raw[3000] ^= 1
    (copy / "shard-00001.tar").write_bytes(raw)
    assert "shard-00001.tar has another sha256 than the manifest" in stage(copy, tmp_path / "staged")[-1]
    assert [path.name for path in (tmp_path / "staged").iterdir()] == [
        staged_path(tmp_path, manifest["shards"][0]).name
    ]


@pytest.mark.parametrize("damage", ["empty", "flipped"])
def test_a_damaged_copy_is_staged_again(copy, latents, tmp_path, damage):
    """As after a power cut. Until then readers use the shared disk, or name the damaged copy."""
    staged, shard = tmp_path / "staged", LatentShards(copy).manifest["shards"][1]
    stage(copy, staged)
    raw = bytearray(staged_path(staged, shard).read_bytes())
    raw[LatentShards(copy)._indices[1].offsets[3]] ^= 1
    staged_path(staged, shard).write_bytes(b"" if damage == "empty" else raw)
    if damage == "empty":
        assert np.array_equal(LatentShards(copy, stage_dir=str(staged))[63][0], LatentShards(latents)[63][0])
    else:
        with pytest.raises(UserError, match=rf"{shard['sha256']}.tar: sample 000000063 .*remove that copy"):
            LatentShards(copy, stage_dir=str(staged))[63]
    stage(copy, staged)
    assert staged_path(staged, shard).read_bytes() == (copy / shard["name"]).read_bytes()


def test_two_jobs_stage_into_one_folder(copy, tmp_path):
    manifest, staged, messages = LatentShards(copy).manifest, tmp_path / "staged", []
    jobs = [Staging(copy, manifest, staged, messages.append) for _ in range(2)]
    for job in jobs:
        job.wait()
    assert messages.count(f"staged 3 of 3 shards in {staged}") == 2 and not any("warning" in line for line in messages)
    assert sorted(p.name for p in staged.iterdir()) == sorted(f"{s['sha256']}.tar" for s in manifest["shards"])


def test_a_full_disk_and_an_invalid_folder_are_warnings(copy, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("mf_dist.data.staging.shutil.disk_usage", lambda path: usage)
    assert "GiB free, the shards need" in stage(copy, tmp_path / "staged")[-1]
    (tmp_path / "file").write_text("")
    assert stage(copy, tmp_path / "file")[-1].startswith("warning: staging stopped")


def test_the_page_cache_alone(copy):
    assert stage(copy, None) == [f"staged {n} of 3 shards in the page cache" for n in (1, 2, 3)]
