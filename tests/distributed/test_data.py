"""Training runs and their data: damage met on the way, and shards staged beside the run."""

import shutil

import pytest
from processes import assert_same_end, status

from mf_dist.data.shards import LatentShards

pytestmark = [pytest.mark.dist, pytest.mark.alone]


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_met_in_training_ends_the_run_in_a_line(zygote, config, latents, tmp_path, workers):
    """One bit of one image on one of two ranks; with a loader process the error comes from another process."""
    data, log, run = shutil.copytree(latents, tmp_path / "data"), tmp_path / "log", tmp_path / "run"
    shards = LatentShards(data)
    raw = bytearray((data / "shard-00001.tar").read_bytes())
    raw[shards._indices[1].offsets[7] + 100] ^= 1
    (data / "shard-00001.tar").write_bytes(raw)
    argv = [config, f"run_dir={run}", f"data.path={data}", f"data.num_workers={workers}"]
    assert 2 in zygote.run(log, argv, ranks=2)
    reason = f"{data / 'shard-00001.tar'}: sample 000000067 differs from what was written (crc32)"
    errors = [line for line in log.read_text().splitlines() if line.startswith("error")]
    assert len(errors) == 1 and reason in errors[0] and "latents.py verify" in errors[0]
    assert status(run)["status"] == "failed" and status(run)["reason"].startswith(reason)


def test_staged_shards_are_copied_once_and_change_nothing(zygote, config, whole, latents, tmp_path):
    log, run, near = tmp_path / "log", tmp_path / "run", tmp_path / "near"
    argv = [config, f"run_dir={run}", "data.stage=dir", f"data.stage_dir={near}", "data.num_workers=1"]
    assert set(zygote.run(log, argv, ranks=2)) == {0}, log.read_text()
    assert_same_end(run, whole(2))
    assert log.read_text().count(f"staged 3 of 3 shards in {near}") == 1
    copies = {path.read_bytes() for path in near.iterdir()}
    assert copies == {(latents / shard["name"]).read_bytes() for shard in LatentShards(latents).manifest["shards"]}
