"""Images in a folder."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mf_dist.data.image_list import SUFFIXES, ImageList, describe, is_skipped
from mf_dist.data.labels import MAX_JSON, Labels, from_cls, from_json, no_labels, numbered
from mf_dist.runtime.errors import UserError
from mf_dist.runtime.outputs import refuse_inside
from mf_dist.runtime.paths import refuse_odd_name


@dataclass(frozen=True)
class ImageFolder(ImageList):
    """Images in order of their path."""

    def read(self, i: int) -> bytes:
        return _read(self.root / self.paths[i])

    def sizes(self) -> list[int]:
        return [(self.root / path).stat().st_size for path in self.paths]


def list_images(root: str | Path, outputs: Iterable[Path] = (), labelled: bool = True) -> ImageFolder:
    """A class is a direct sub-folder, numbered in order of its name (ImageNet's wnids give the usual indices). Without
    sub-folders labels are looked for beside the images (labels.py). Raises UserError on anything ambiguous. outputs:
    what the caller will write, refused below the root. labelled: False where labels do not matter, which are then
    neither read nor refused."""
    root, outputs = Path(root), tuple(outputs)
    if not root.is_dir():
        raise UserError(f"no image folder at {str(root)!r}")
    refuse_inside(outputs, root)
    paths, beside, ignored = list[str](), dict[str, dict[str, str]]({".cls": {}, ".json": {}}), Counter[str]()
    for path in _walk(root, "", outputs, ()):
        key, suffix = os.path.splitext(path)
        if suffix.lower() in SUFFIXES:
            paths.append(path)
        else:
            ignored[suffix.lower()] += 1
            if suffix.lower() in beside:
                beside[suffix.lower()][key] = path
    if not paths:
        raise UserError(f"no images ({', '.join(sorted(SUFFIXES))}) under {str(root)!r}{describe(ignored)}")
    paths.sort()
    if not labelled:
        return ImageFolder(root, paths, *no_labels(len(paths)), "", describe(ignored))
    in_folders = [path for path in paths if "/" in path]
    if in_folders and len(in_folders) < len(paths):
        loose = next(path for path in paths if "/" not in path)
        raise UserError(f"{str(root)!r} has class folders and also the loose image {loose!r}; move it into a class")
    if in_folders:
        labels = _of_folders(root, paths, ignored)
        doubt = _doubt_in_folders(root, paths, len(beside[".cls"]))
    else:
        labels, doubt = _beside(root, paths, beside), ""
    if labels.form:
        del ignored[labels.form]
    return ImageFolder(root, paths, *labels, doubt, describe(ignored))


def _of_folders(root: Path, paths: Sequence[str], ignored: Counter[str]) -> Labels:
    classes = [entry.name for entry in entries(root) if entry.is_dir()]
    names = [path.split("/")[0] for path in paths]
    empty = sorted(set(classes) - set(names))
    if empty:
        others = describe(ignored)
        raise UserError(f"class folder {empty[0]!r} in {str(root)!r} has no images; fill or remove it{others}")
    return numbered(names, "class folders")


def _doubt_in_folders(root: Path, paths: Sequence[str], cls_count: int) -> str:
    """Whether the classes may be one level deeper, as where the root has train/ and val/, or in KEY.cls."""
    parts = [path.split("/") for path in paths]
    below = {(path[0], path[1]) for path in parts if len(path) > 2}
    if min(map(len, parts)) > 2 and len(below) > len({path[0] for path in parts}):
        first = min(below)
        return (
            f"the classes are the folders in {str(root)!r}, but each has its images in folders of its own, such as "
            f"{'/'.join(first)!r}; if those are the classes, give --images {root / first[0]}"
        )
    if cls_count:
        return f"the classes are the folders in {str(root)!r}; its {cls_count:,} .cls files are not read"
    return ""


def _beside(root: Path, paths: Sequence[str], beside: dict[str, dict[str, str]]) -> Labels:
    def read(places: Iterable[str]) -> Iterator[bytes]:
        return (_read(root / place, MAX_JSON + 1) for place in places)

    keys = [os.path.splitext(path)[0] for path in paths]
    return (
        from_cls(root, keys, beside[".cls"], read)
        or from_json(root, keys, beside[".json"], read)
        or no_labels(len(paths))
    )


def _read(path: Path, limit: int = -1) -> bytes:
    """The first `limit` bytes of a file, by default all. Raises UserError on a read error."""
    try:
        with open(path, "rb") as file:
            return file.read(limit)
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from None


def entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """What is in a folder in order of name, without hidden and system files. Raises UserError on an error."""
    try:
        with os.scandir(folder) as found:
            return sorted((entry for entry in found if not is_skipped(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot list {str(folder)!r}: {error.strerror}; make it readable or move it away") from None


def _walk(root: Path, below: str, outputs: Iterable[Path], above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Paths, below `root`, of all files in its folder `below`. above: device and inode of the folders around it."""
    here = os.stat(root / below)
    if (here.st_dev, here.st_ino) in above:
        raise UserError(f"{str(root / below)!r} links back to a folder that contains it; remove the link")
    for entry in entries(root / below):
        path = f"{below}/{entry.name}" if below else entry.name
        if entry.is_dir():
            if entry.is_symlink():
                refuse_inside(outputs, entry.path)
            yield from _walk(root, path, outputs, (*above, (here.st_dev, here.st_ino)))
        elif entry.is_file():
            if os.path.splitext(path)[1].lower() in SUFFIXES:
                refuse_odd_name(path, f"below {str(root)!r} the name")
            yield path
        elif entry.is_symlink():
            raise UserError(f"{entry.path!r} is a link to nothing; repair or remove it")
        elif os.path.splitext(path)[1].lower() in SUFFIXES:
            raise UserError(f"{entry.path!r} is not a regular file; remove it")
