"""Sweeps of guidance: the points of a grid, and the table of their distances. No torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import product

from mf_dist.runtime.errors import UserError

MAX_SCALES = 1000
HEADS = f"  {'steps':>5}  {'interval':>12}  {'guidance':>8}  "


@dataclass(frozen=True)
class Point:
    """How samples of a network that takes guidance as an input are drawn."""

    nfe: int
    interval: tuple[float, float]
    scale: float

    @property
    def options(self) -> str:
        """Of the tools that sample."""
        return f"--nfe {self.nfe} --guidance {self.scale:.12g} --interval {self._interval}"

    @property
    def name(self) -> str:
        """For a folder."""
        return f"guidance{self.scale:.12g}_{self._interval.replace(',', '-')}_nfe{self.nfe}"

    def row(self, value: str) -> str:
        """Below HEADS."""
        return f"  {self.nfe:>5}  {self._interval:>12}  {self.scale:>8.12g}  {value}"

    @property
    def _interval(self) -> str:
        return ",".join(f"{t:.12g}" for t in self.interval)


def scales_of(text: str) -> list[float]:
    """The scales of guidance=GRID, each once; GRID is START:STOP:STEP, both ends included, or numbers with commas.
    Raises UserError for any other text."""
    name, _, grid = text.partition("=")
    try:
        scales = _range(grid) if ":" in grid else [Decimal(number) for number in grid.split(",")]
        if name != "guidance" or len(scales) > MAX_SCALES or not all(1 <= scale <= 1_000_000 for scale in scales):
            raise ValueError
    except (ValueError, ArithmeticError):  # of a Decimal
        raise UserError(
            f"--sweep {text!r}: expected guidance=START:STOP:STEP, where whole STEPs lead from START to STOP, or "
            f"guidance=A,B,...: at most {MAX_SCALES} numbers from 1 to 1e6"
        ) from None
    return [float(scale) for scale in dict.fromkeys(scales)]


def _range(grid: str) -> list[Decimal]:
    """In decimals, since a sum of binary fractions such as 0.1 misses the end."""
    start, stop, step = (Decimal(number) for number in grid.split(":"))
    count = (stop - start) / step
    if not 0 <= count < MAX_SCALES or count != int(count):
        raise ValueError
    return [start + number * step for number in range(int(count) + 1)]


def points_of(nfes: Iterable[int], intervals: Iterable[tuple[float, float]], scales: Iterable[float]) -> list[Point]:
    """All combinations, each once; the scale changes fastest."""
    return list(dict.fromkeys(Point(*place) for place in product(nfes, intervals, scales)))


def best_of(distances: Mapping[Point, float]) -> list[Point]:
    """The point of the smallest distance at each number of steps."""
    nfes = dict.fromkeys(point.nfe for point in distances)
    return [min((point for point in distances if point.nfe == nfe), key=distances.__getitem__) for nfe in nfes]
