"""The end of a job as SLURM states it."""

import time

import pytest

from mf_dist.fault_tolerance.stop import MARGIN, Stop, StopAgreement
from mf_dist.runtime.distributed import process_group


@pytest.mark.parametrize(
    ("ends_in", "expected"), [(MARGIN - 20, Stop.TIME), (MARGIN + 60, Stop.NO), (-5, Stop.NO), (-1e7, Stop.NO)]
)
def test_the_end_of_the_job(tmp_path, monkeypatch, capsys, ends_in, expected):
    """One in the past was left by another job."""
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + ends_in)))
    with process_group() as ranks:
        agreement = StopAgreement(tmp_path, ranks.is_rank_zero, 0, None)
        assert agreement.agree(False, False)[0] == expected
        agreement.close()
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == (ends_in < 0)
    assert all(line.startswith("warning: SLURM_JOB_END_TIME=") and line.endswith("is past: ignored") for line in warned)
