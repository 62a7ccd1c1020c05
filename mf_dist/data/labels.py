"""The classes of a list of images, from the first of these forms that is there:

    sub-folders     of a folder of images: a direct sub-folder is a class
    KEY.cls         beside every image KEY.jpg: the number of its class
    KEY.json        beside every image KEY.jpg: its "label", a number or a name
    folders         in tars: below the folders that all images share, each path has one more, which is the class
    tars            of which each image's name begins with its tar's, as n01_1.jpg in n01.tar: a tar is a class

Names are numbered in their order; numbers are used as they are. Nothing else is a label, and labels of only some images
are refused.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from mf_dist.runtime.errors import UserError
from mf_dist.runtime.paths import refuse_odd_name

SHOWN = 10
"""Names of classes in a message."""
MAX_CLASSES = 1_000_000
MAX_JSON = 1 << 20
"""Bytes of a KEY.json; in a longer one no label is looked for."""
Place = TypeVar("Place")
Read = Callable[[Iterable[Place]], Iterator[bytes]]
"""Gives the first MAX_JSON bytes, and one more of a longer file, of each of some places, in their order."""


class Labels(NamedTuple):
    """labels[i] is the class of image i, an index into classes."""

    labels: list[int]
    classes: list[str]
    form: str
    """Where they are from; empty if there are none."""


def no_labels(count: int) -> Labels:
    return Labels([0] * count, [], "")


def numbered(values: Sequence[int | str], form: str) -> Labels:
    """From one number or name for each image."""
    if isinstance(values[0], int):
        numbers = [int(value) for value in values]
        return Labels(numbers, [str(number) for number in range(max(numbers) + 1)], form)
    names = sorted({str(value) for value in values})
    index = {name: number for number, name in enumerate(names)}
    return Labels([index[str(value)] for value in values], names, form)


def from_cls(root: Path, keys: Sequence[str], places: dict[str, Place], read: Read[Place]) -> Labels | None:
    """`places`: the KEY.cls by key. None if there are none; UserError if an image has none, or one holds no number."""
    if not places:
        return None
    missing = [key for key in keys if key not in places]
    if missing:
        raise UserError(f"{missing[0]!r} in {str(root)!r} has an image but no .cls with its class")
    values = []
    for key, raw in zip(keys, read(places[key] for key in keys), strict=True):
        text = raw[:20].decode("ascii", "replace").strip()
        if not text.isdecimal() or int(text) >= MAX_CLASSES:
            raise UserError(f"{key + '.cls'!r} in {str(root)!r} holds {text!r}, expected the number of a class")
        values.append(int(text))
    return numbered(values, ".cls")


def from_json(root: Path, keys: Sequence[str], places: dict[str, Place], read: Read[Place]) -> Labels | None:
    """`places`: the KEY.json by key. None if no image has a label there; UserError if only some have, or if some are
    numbers and others names."""
    found = [key for key in keys if key in places]
    values = dict(zip(found, map(_label_in, read(places[key] for key in found)), strict=True))
    labelled = [key for key in keys if values.get(key) is not None]
    if not labelled:
        return None
    if len(labelled) < len(keys):
        missing = next(key for key in keys if values.get(key) is None)
        raise UserError(
            f'{missing!r} in {str(root)!r} has no .json with a "label" that is a number or a name, {labelled[0]!r} has'
        )
    numbers = [key for key in keys if isinstance(values[key], int)]
    if 0 < len(numbers) < len(keys):
        name = next(key for key in keys if isinstance(values[key], str))
        raise UserError(f'in {str(root)!r} the "label" of {numbers[0]!r} is a number, that of {name!r} a name')
    for key in keys:
        refuse_odd_name(str(values[key]), f'in {str(root)!r} the "label" of {key!r}:')
    return numbered([value for key in keys if (value := values[key]) is not None], ".json")


def _label_in(raw: bytes) -> int | str | None:
    """The class number or name in the bytes of a KEY.json; None if it has none."""
    try:
        label = json.loads(raw)["label"] if len(raw) <= MAX_JSON else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if isinstance(label, str):
        text = label.strip()
        return int(text) if text.isascii() and text.isdecimal() and len(text) <= 6 else text or None
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < MAX_CLASSES:
        return label
    return None


def from_folders(folders: Sequence[tuple[str, ...]]) -> Labels | None:
    """From the folders that hold each image in its tar, outermost first."""
    shared = len(os.path.commonprefix(list(folders)))
    if any(len(path) != shared + 1 for path in folders):
        return None
    return numbered([path[-1] for path in folders], "class folders")


def from_tar_names(tars: Sequence[str], names: Sequence[str]) -> Labels | None:
    """From the stem of each image's tar, and the image's name in it."""
    if len(set(tars)) < 2 or not all(name.startswith((f"{t}_", f"{t}-")) for t, name in zip(tars, names, strict=True)):
        return None
    return numbered(tars, "one tar a class")


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
