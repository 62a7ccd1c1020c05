"""A list of images with their classes, read from a folder or from tars; which files count as images."""

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mf_dist.runtime.output import one_line

SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
SYSTEM = {
    *("__macosx", "desktop.ini", "thumbs.db", "ehthumbs.db", "$recycle.bin", "system volume information"),
    *("lost+found", "@eadir", "@recycle", "#recycle", "@tmp", "#snapshot", "~snapshot", "__pycache__"),
}
"""Names, in lower case, of what systems put beside a user's files."""


@dataclass(frozen=True)
class ImageList(ABC):
    """Images in a fixed order: paths below the root; labels[i] is the class of paths[i], an index into classes."""

    root: Path
    paths: list[str]
    labels: list[int]
    classes: list[str]
    form: str
    """Where the labels are from (labels.py); empty if there are none."""
    doubt: str
    """What may be wrong with the labels; empty if nothing."""
    ignored: str
    """What is there besides images, as part of a sentence: "; ignored: 3 .heic"; empty if nothing."""

    @abstractmethod
    def read(self, i: int) -> bytes:
        """The bytes of paths[i]. Raises UserError, not Unreadable, on a read error: the image may be valid."""

    @abstractmethod
    def sizes(self) -> list[int]:
        """Bytes of every image."""


def is_skipped(name: str) -> bool:
    """Whether the name of a file or folder is hidden or a system's."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in SYSTEM


def describe(ignored: Counter[str]) -> str:
    """ImageList.ignored from the number of files of each suffix: the most frequent first."""
    if not ignored:
        return ""
    ranked = sorted(ignored.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count} {one_line(suffix) or 'without a suffix'}" for suffix, count in ranked[:5]]
    more = sum(count for _, count in ranked[5:])
    return "; ignored: " + ", ".join([*parts, f"{more} of other suffixes"] if more else parts)
