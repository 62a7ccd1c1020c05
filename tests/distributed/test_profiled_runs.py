"""train.profile_steps changes no bit of a run, at any number of ranks, and never ends one."""

import gzip
import json

import pytest
from processes import assert_same_end, run_history

pytestmark = [pytest.mark.dist, pytest.mark.alone]
PROFILE = "train.profile_steps=3"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_profiled_run_has_the_same_bits(zygote, config, whole, tmp_path, ranks):
    run, log = tmp_path / "run", tmp_path / "log"
    assert zygote.run(log, [config, PROFILE], ranks) == [0] * ranks, log.read_text()
    assert_same_end(run, whole(ranks))
    assert log.read_text().count("profiled steps 4 to 6") == 1
    assert {path.name for path in (run / "profile").iterdir()} == {"trace.json.gz", "profile.json", "profile.txt"}
    table = json.loads((run / "profile/profile.json").read_text())
    assert (table["first_step"], table["steps"], table["device"]) == (4, 3, "CPU")
    assert {"matrix products", "attention", "optimizer", "collectives"} <= {row["name"] for row in table["classes"]}
    assert {"data loader", "item()"} == {row["name"] for row in table["waits"]}
    trace = json.loads(gzip.decompress((run / "profile/trace.json.gz").read_bytes()))
    assert sum(event["name"].startswith("ProfilerStep#") for event in trace["traceEvents"]) == 3


def test_each_start_is_profiled(zygote, config, whole, tmp_path):
    log = tmp_path / "log"
    for options, first in ((["train.total_images=160"], 4), ([], 14)):
        assert zygote.run(log, [config, PROFILE, *options]) == [0], log.read_text()
        assert json.loads((tmp_path / "run/profile/profile.json").read_text())["first_step"] == first
    assert_same_end(tmp_path / "run", whole(1))


def test_a_profile_that_cannot_be_written_is_a_warning(zygote, config, whole, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    run.mkdir()
    (run / "profile").touch()
    assert zygote.run(log, [config, PROFILE]) == [0], log.read_text()
    assert "warning: no profile of steps 4 to 6: " in log.read_text() and "profiled" not in log.read_text()
    assert [row[1] for row in run_history(run)] == ["started", "warning", "finished"]
    assert_same_end(run, whole(1))


def test_a_run_that_ends_before_its_profile_says_so(zygote, config, tmp_path):
    log = tmp_path / "log"
    assert zygote.run(log, [config, PROFILE, "train.total_images=80"]) == [0], log.read_text()
    said = "warning: no profile: this start made 5 of the 3 + 3 steps that train.profile_steps=3 needs"
    assert said in log.read_text() and not (tmp_path / "run/profile").exists()
