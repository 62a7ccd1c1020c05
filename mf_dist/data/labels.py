"""The classes of a list of images."""

from collections.abc import Sequence
from pathlib import Path

from mf_dist.runtime.errors import UserError

SHOWN = 10
"""Names of classes in a message."""


def some_of(names: Sequence[str]) -> str:
    """The names, separated by commas; of more than SHOWN the first ones, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def refuse_empty_classes(root: Path, labels: Sequence[int], classes: Sequence[str]) -> None:
    """Raises UserError if a class has no image: it would never be trained, but be drawn from in evaluation."""
    with_images = set(labels)
    empty = [name for number, name in enumerate(classes) if number not in with_images]
    if empty:
        raise UserError(
            f"{str(root)!r}: the class numbers go up to {len(classes) - 1}, but there is no image of "
            f"{some_of(empty)}: such a class is never trained, and yet drawn in evaluation; number the classes from "
            f"0 to {len(classes) - len(empty) - 1}, without gaps"
        )
