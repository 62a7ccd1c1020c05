"""The points of a sweep, and the best of them."""

import numpy as np
import pytest

from mf_dist.evaluation.sweep import Point, best_of, points_of, scales_of
from mf_dist.runtime.errors import UserError


@pytest.mark.parametrize(
    ("first", "last", "step"), [(2, 12, 1), (1, 2, 0.1), (1.5, 1.5, 1), (1, 1000, 1), (2, 3, 0.125)]
)
def test_both_ends_of_a_range_are_included(first, last, step):
    scales = scales_of(f"guidance={first}:{last}:{step}")
    assert scales[0] == first and scales[-1] == last
    np.testing.assert_allclose(scales, np.linspace(first, last, round((last - first) / step) + 1), rtol=1e-15)


def test_a_list_is_taken_as_it_is():
    assert scales_of("guidance=8,1,2.5,8") == [8, 1, 2.5]


@pytest.mark.parametrize(
    "text",
    [
        "2:12:1",
        "omega=2:12:1",
        "guidance",
        "guidance=",
        "guidance=2,",
        "guidance=two",
        "guidance=0.5,2",
        "guidance=2:12",
        "guidance=2:12:1:1",
        "guidance=2:12:3",  # 2, 5, 8, 11
        "guidance=12:2:1",
        "guidance=2:12:-1",
        "guidance=2:12:0",
        "guidance=0:2:1",
        "guidance=1:2000:1",
        "guidance=1:1e9999999:1",
        "guidance=nan",
        "guidance=1:nan:1",
        "guidance=inf:inf:1",
        "guidance=1e400",
        "guidance=1:2:1,3",
        pytest.param("guidance=" + ",".join(map(str, range(1, 1002))), id="too many"),
    ],
)
def test_other_grids_are_refused(text):
    with pytest.raises(
        UserError, match=r"^--sweep '.*': expected guidance=START:STOP:STEP, where .* numbers from 1 to 1e6$"
    ):
        scales_of(text)


def test_the_best_point_at_each_number_of_steps_and_its_options():
    points = points_of((1, 2, 1), [(0.0, 1.0), (0.4, 0.65), (0.0, 1.0)], [2.0, 7.5])
    assert [(p.nfe, p.interval[0], p.scale) for p in points[:4]] == [(1, 0, 2), (1, 0, 7.5), (1, 0.4, 2), (1, 0.4, 7.5)]
    distances = dict(zip(points, [5, 4, 3, 6, 9, 8, 8.5, 7], strict=True))
    best = best_of(distances)
    assert best == [Point(1, (0.4, 0.65), 2.0), Point(2, (0.4, 0.65), 7.5)]
    assert best[1].options == "--nfe 2 --guidance 7.5 --interval 0.4,0.65"
