"""Images inside webdataset tars, listed without unpacking; member names are never used as paths on the disk.

A sample is KEY.jpg (or another image suffix) together with KEY.cls, its class number as text; without any .cls there
are no classes. Order: tars by name, then members in tar order.
"""

import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mf_dist.data.images import SUFFIXES, ImageFolder, list_images
from mf_dist.runtime.errors import UserError


class _Location(NamedTuple):
    tar: Path
    offset: int
    size: int


@dataclass(frozen=True)
class ImageTars:
    """The same fields as ImageFolder; paths are TAR/MEMBER."""

    root: Path
    paths: list[str]
    labels: list[int]
    classes: list[str]
    places: list[_Location] = field(repr=False)

    def read(self, i: int) -> bytes:
        """The bytes of paths[i]; raises OSError if the tar cannot be read."""
        tar, offset, size = self.places[i]
        with open(tar, "rb") as file:
            file.seek(offset)
            return file.read(size)

    def sizes(self) -> list[int]:
        return [place.size for place in self.places]


def open_images(source: str) -> "ImageFolder | ImageTars":
    """A folder of images, a .tar of images, or a folder of such tars. URLs and pipes are refused."""
    path = Path(source)
    if not source or (":" in source.split("/")[0] and not path.exists()):
        raise UserError(f"--images {source!r}: only local folders and tars are read; download it first")
    tars = sorted(path.glob("*.tar")) if path.is_dir() else [path] if path.suffix == ".tar" else []
    others = [other for other in path.iterdir() if other not in tars and other.name[0] != "."] if path.is_dir() else []
    if tars and any(other.is_dir() or other.suffix.lower() in SUFFIXES for other in others):
        raise UserError(
            f"{source!r} has tars and also folders or images: keep the ones to encode in a folder of their own"
        )
    return list_tars(path, tars) if tars else list_images(path)


def list_tars(root: Path, tars: list[Path]) -> ImageTars:
    """Raises UserError on anything but plain samples: links, devices, duplicate keys, an image without its class."""
    images: dict[str, tuple[str, _Location]] = {}
    classes: dict[str, int] = {}
    for tar in tars:
        for name, place in _members(tar):
            stem, _, suffix = name.rpartition(".")
            key = f"{tar.name}/{stem}"
            if suffix == "cls":
                classes[key] = _class_number(tar, name, place)
            elif f".{suffix.lower()}" in SUFFIXES:
                if key in images:
                    raise UserError(f"{tar}: the key {stem!r} has two images")
                images[key] = f"{tar.name}/{name}", place
    if not images:
        raise UserError(f"no images in the tars of {str(root)!r}")
    missing = [key for key in images if key not in classes]
    if classes and missing:
        raise UserError(f"{missing[0]!r} in {str(root)!r} has an image but no .cls with its class")
    names, places = zip(*images.values(), strict=True)
    labels = [classes.get(key, 0) for key in images]
    count = max(labels) + 1 if classes else 0
    return ImageTars(root, list(names), labels, [str(i) for i in range(count)], list(places))


def _members(tar: Path) -> list[tuple[str, _Location]]:
    members: dict[str, _Location] = {}
    length = tar.stat().st_size if tar.is_file() else 0
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if member.isdir():
                    continue
                if not member.isreg():
                    raise UserError(f"{tar}: member {member.name!r} is not a regular file")
                if member.size < 0 or member.offset_data + member.size > length:
                    raise UserError(f"{tar}: is truncated inside member {member.name!r}")
                if member.name in members:
                    raise UserError(f"{tar}: member {member.name!r} occurs twice")
                members[member.name] = _Location(tar, member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {tar}: {error}") from None
    return list(members.items())


def _class_number(tar: Path, name: str, place: _Location) -> int:
    with open(tar, "rb") as file:
        file.seek(place.offset)
        text = file.read(min(place.size, 20)).decode("ascii", "replace").strip()
    if not text.isdigit() or int(text) >= 1_000_000:
        raise UserError(f"{tar}: member {name!r} holds {text!r}, expected the number of a class")
    return int(text)
