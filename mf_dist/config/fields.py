"""Types of config fields: a plain type with the values that it may take. No torch."""

from fractions import Fraction
from typing import Annotated

from mf_dist.config.loader import Check
from mf_dist.runtime.paths import ODD

Seed = Annotated[int, Check("a whole number from 0 to 2^63 - 1", lambda n: 0 <= n < 2**63)]
Whole = Annotated[int, Check("a whole number >= 0", lambda n: n >= 0)]
Count = Annotated[int, Check("a whole number >= 1", lambda n: n >= 1)]
Positive = Annotated[float, Check("a number > 0", lambda a: a > 0)]
NotNegative = Annotated[float, Check("a number >= 0", lambda a: a >= 0)]
Share = Annotated[float, Check("a number in [0, 1]", lambda a: 0 <= a <= 1)]
Decay = Annotated[float, Check("a number in [0, 1)", lambda a: 0 <= a < 1)]
RowShare = Annotated[Fraction, Check("a fraction in [0, 1] such as 3/4", lambda a: 0 <= a <= 1)]
FewSteps = Annotated[int, Check("a whole number from 0 to 100", lambda n: 0 <= n <= 100)]
Steps = Annotated[tuple[int, ...], Check("whole numbers >= 1", lambda ns: bool(ns) and min(ns) >= 1)]
Numbers = Annotated[tuple[float, ...], Check("numbers, one for each channel", lambda numbers: bool(numbers))]
PositiveNumbers = Annotated[
    tuple[float, ...], Check("numbers > 0, one for each channel", lambda numbers: bool(numbers) and min(numbers) > 0)
]
Decays = Annotated[
    tuple[float, ...],
    Check("different numbers in [0, 1)", lambda ds: bool(ds) and all(0 <= d < 1 for d in ds) and len({*ds}) == len(ds)),
]
Scale = Annotated[float, Check("a number >= 1", lambda a: a >= 1)]
Interval = Annotated[
    tuple[float, ...],
    Check("start, end with 0 <= start <= end <= 1", lambda ab: len(ab) == 2 and 0 <= ab[0] <= ab[1] <= 1),
]
Text = Annotated[
    str,
    Check("a non-empty string without line breaks, in UTF-8", lambda text: bool(text.strip()) and not ODD.search(text)),
]
