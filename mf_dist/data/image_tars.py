"""Images inside tars, listed without unpacking; member names are never used as paths on the disk.

Order: tars by name, then members in tar order.
"""

import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from mf_dist.data.image_folder import entries, list_images
from mf_dist.data.image_list import SUFFIXES, ImageList, describe, is_skipped
from mf_dist.data.labels import MAX_JSON, Labels, from_cls, from_folders, from_json, from_tar_names, no_labels
from mf_dist.runtime.errors import UserError
from mf_dist.runtime.outputs import refuse_inside
from mf_dist.runtime.paths import refuse_odd_name


class _Location(NamedTuple):
    tar: Path
    offset: int
    size: int


@dataclass(frozen=True)
class ImageTars(ImageList):
    """Paths are TAR/MEMBER."""

    places: list[_Location] = field(repr=False)

    def read(self, i: int) -> bytes:
        return next(_contents([self.places[i]], None))

    def sizes(self) -> list[int]:
        return [place.size for place in self.places]


def open_images(source: str, outputs: Iterable[Path] = (), labelled: bool = True) -> ImageList:
    """A folder of images, a .tar of images, or a folder of such tars. URLs and pipes are refused. outputs: what the
    caller will write, refused below the source. labelled: False where labels do not matter, which are then neither read
    nor refused."""
    path, outputs = Path(source), tuple(outputs)
    if not source or (":" in source.split("/")[0] and not path.exists()):
        raise UserError(f"--images {source!r}: only local folders and tars are read; download it first")
    refuse_inside(outputs, path)
    if path.is_file():
        if path.suffix.lower() != ".tar":
            raise UserError(f"{source!r} is neither a folder nor a .tar; unpack it into a folder")
        return list_tars(path, [path], Counter(), labelled)
    found = entries(path) if path.is_dir() else []
    suffixes = [Path(entry.name).suffix.lower() for entry in found]
    tars = [Path(entry.path) for entry, suffix in zip(found, suffixes, strict=True) if suffix == ".tar"]
    if not tars:
        return list_images(path, outputs, labelled)
    if any(entry.is_dir() or suffix in SUFFIXES for entry, suffix in zip(found, suffixes, strict=True)):
        raise UserError(
            f"{source!r} has tars and also folders or images: keep the ones to encode in a folder of their own"
        )
    return list_tars(path, tars, Counter(suffix for suffix in suffixes if suffix != ".tar"), labelled)


def list_tars(root: Path, tars: list[Path], ignored: Counter[str], labelled: bool) -> ImageTars:
    """`ignored`: suffixes of files beside the tars. Raises UserError on anything but plain samples: links, devices,
    duplicate keys, an image without its class."""
    images: dict[str, tuple[str, _Location]] = {}
    beside: dict[str, dict[str, _Location]] = {".cls": {}, ".json": {}}
    inner = ""
    for tar in tars:
        for name, place in _members(tar):
            stem, suffix = os.path.splitext(name)
            key = f"{tar.name}/{stem}"
            if suffix.lower() in SUFFIXES:
                refuse_odd_name(f"{tar.name}/{name}", f"{str(tar)!r}: the name")
                if key in images:
                    raise UserError(f"{tar}: the key {stem!r} has two images")
                images[key] = name, place
                continue
            ignored[suffix.lower()] += 1
            if suffix.lower() in beside:
                beside[suffix.lower()][key] = place
            elif suffix.lower() == ".tar":
                inner = inner or name
    if not images:
        hint = f"; unpack it once, since it holds tars such as {inner!r}" if inner else ""
        raise UserError(f"no images in the tars of {str(root)!r}{describe(ignored)}{hint}")
    names, places = zip(*images.values(), strict=True)
    paths = [f"{place.tar.name}/{name}" for name, place in zip(names, places, strict=True)]
    labels, doubt = no_labels(len(paths)), ""
    if labelled:
        labels, doubt = _labels(root, list(images), beside, list(names), list(places))
    if labels.form:
        del ignored[labels.form]
    return ImageTars(root, paths, *labels, doubt, describe(ignored), list(places))


def _labels(
    root: Path, keys: list[str], beside: dict[str, dict[str, _Location]], names: list[str], places: list[_Location]
) -> tuple[Labels, str]:
    """The labels, and what may be wrong with them."""
    parts = [tuple(part for part in name.split("/") if part not in ("", ".")) for name in names]
    folders = [path[:-1] for path in parts]
    labels = (
        from_cls(root, keys, beside[".cls"], _contents)
        or from_json(root, keys, beside[".json"], _contents)
        or from_folders(folders)
        or from_tar_names([place.tar.stem for place in places], [path[-1] for path in parts])
    )
    if labels is not None:
        return labels, ""
    is_unclear = len(set(folders)) > 1
    return no_labels(len(keys)), "the folders in its tars are not one for each class" if is_unclear else ""


def _contents(places: Iterable[_Location], limit: int | None = MAX_JSON + 1) -> Iterator[bytes]:
    """The bytes of some members, at most `limit` of each; a tar is opened once for successive ones. Raises UserError if
    it cannot be read, or has become shorter."""
    for tar, members in groupby(places, lambda place: place.tar):
        try:
            with open(tar, "rb") as file:
                for _, offset, size in members:
                    wanted = size if limit is None else min(size, limit)
                    file.seek(offset)
                    raw = file.read(wanted)
                    if len(raw) < wanted:
                        raise UserError(f"{tar} ends before byte {offset + wanted}; it was longer when it was listed")
                    yield raw
        except OSError as error:
            raise UserError(f"cannot read {tar}: {error.strerror}") from None


def _members(tar: Path) -> list[tuple[str, _Location]]:
    members: dict[str, _Location] = {}
    length = tar.stat().st_size if tar.is_file() else 0
    try:
        with tarfile.open(tar, "r:", encoding="utf-8") as archive:
            for member in archive:
                if member.isdir() or any(map(is_skipped, member.name.split("/"))):
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
