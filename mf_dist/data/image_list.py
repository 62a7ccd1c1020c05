"""A list of images with their classes, read from a folder or from tars."""

from dataclasses import dataclass
from pathlib import Path

SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclass(frozen=True)
class ImageList:
    """Images in a fixed order: paths below the root; labels[i] is the class of paths[i], an index into classes."""

    root: Path
    paths: list[str]
    labels: list[int]
    classes: list[str]
    form: str
    """Where the labels are from (labels.py); empty if there are none."""
    doubt: str
    """What may be wrong with the labels; empty if nothing."""

    def read(self, i: int) -> bytes:
        """The bytes of paths[i]. Raises UserError, not Unreadable, on a read error: the image may be valid."""
        raise NotImplementedError

    def sizes(self) -> list[int]:
        """Bytes of every image."""
        raise NotImplementedError
