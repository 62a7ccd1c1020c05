"""Numbers for people."""

import pytest

from mf_dist.runtime.figures import three_digits


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((1.44, "1.44"), (0.0144, "0.0144"), (14.4, "14.4"), (144.4, "144"), (1443.7, "1,444"), (0, "0"), (2, "2.00")),
        *((9.996, "10.0"), (99.96, "100"), (999.6, "1,000"), (0.00012345, "0.000123"), (1.2e-7, "1.20e-07")),
        *((-3.14159, "-3.14"), (float("nan"), "nan"), (float("inf"), "inf")),
    ],
)
def test_three_digits_at_least(value, text):
    assert three_digits(value) == text
    if 0 < abs(value) < 1e300:
        assert float(text.replace(",", "")) == pytest.approx(value, rel=5.001e-3)
