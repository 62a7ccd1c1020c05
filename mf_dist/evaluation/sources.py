"""Sets of images, read block by block: a folder, a tar, an .npz of ADM's layout."""

import hashlib
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from mf_dist.data.image_tars import ImageTars, open_images
from mf_dist.data.images import Pixels, decode_image, image_size
from mf_dist.runtime.errors import UserError
from mf_dist.runtime.outputs import refuse_inside

Labels = npt.NDArray[np.int64]


class Source(Protocol):
    """`count` images in a fixed order."""

    count: int
    identity: dict[str, Any]
    """Everything that determines the pixels; blocks of features of another identity are not reused."""
    cycle: int
    """Image i is of class i mod cycle; 0: the classes of images are independent of each other, or unknown."""
    seconds: dict[str, float]
    """Time spent in `read` so far, by stage; empty if it has only one."""

    def read(self, first: int, last: int) -> tuple[Pixels, Labels]:
        """Images [first, last): (B, 3, R, R) uint8, classes (B,). With the same first, a larger last only appends."""


class ImageFiles:
    """A folder or tar of images in order of their names, without classes, with ADM's centre crop to `resolution`. None:
    all must be squares of one size, and are used unchanged."""

    def __init__(self, source: str | Path, resolution: int | None, outputs: Iterable[Path] = ()) -> None:
        self.files, self.resolution = open_images(str(source), outputs, labelled=False), resolution
        self.count, self.cycle = len(self.files.paths), 0
        self.seconds: dict[str, float] = {}
        self._crop = resolution or self._side()
        self.identity = {"images": str(source), "files": self._fingerprint(), "resolution": self._crop}

    def read(self, first: int, last: int) -> tuple[Pixels, Labels]:
        pixels = [self._image(i) for i in range(first, min(last, self.count))]
        return np.stack(pixels), np.zeros(len(pixels), np.int64)

    def _image(self, i: int) -> Pixels:
        return decode_image(self.files.read(i), self.files.paths[i], self._crop, must_fit=self.resolution is None)

    def _side(self) -> int:
        width, height = image_size(self.files.read(0), self.files.paths[0])
        if width != height:
            raise UserError(
                f"image {self.files.paths[0]!r} is {width}x{height}, not square: give --resolution for a centre crop"
            )
        return width

    def _fingerprint(self) -> str:
        """Hash of names, sizes and modification times, which detects changed content."""
        if isinstance(self.files, ImageTars):
            paths = sorted({place.tar for place in self.files.places})
        else:
            paths = [self.files.root / path for path in self.files.paths]
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        return hashlib.sha256(json.dumps([stats, self.files.paths]).encode()).hexdigest()


class NpzImages:
    """arr_0 (N, R, R, 3) uint8 and optionally arr_1 (N,), as ADM's sampling scripts write them; arr_0 is never entirely
    in memory. Raises UserError for anything else."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._archive = zipfile.ZipFile(self.path)
            self._member, shape, kind = self._open("arr_0")
            self._start = self._member.tell()
            self.labels = np.zeros(shape[0], np.int64)
            if "arr_1.npy" in self._archive.namelist():
                with np.load(self.path, allow_pickle=False) as file:
                    self.labels = file["arr_1"].astype(np.int64)
        except Exception as error:  # zipfile alone raises eight exception types for damaged bytes
            raise UserError(f"cannot read images from {str(path)!r}: {error}; expected arr_0 in an .npz") from None
        if kind != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2] or not shape[0]:
            raise UserError(
                f"{str(path)!r} has arr_0 of shape {shape} and type {kind}, expected (N, R, R, 3) uint8; round "
                "pixels of another type to 0..255 first"
            )
        if self.labels.shape != (shape[0],):
            raise UserError(f"{str(path)!r}: arr_1 has shape {self.labels.shape}, expected ({shape[0]},)")
        self.count, self.cycle, self._shape = shape[0], 0, shape[1:]
        self.seconds: dict[str, float] = {}
        stat = self.path.stat()
        self.identity = {
            "images": str(path),
            "bytes": stat.st_size,
            "changed": stat.st_mtime_ns,
            "resolution": shape[1],
        }

    def check(self) -> None:
        """Reads the file once and verifies its checksums; raises UserError if it is damaged."""
        try:
            damaged = self._archive.testzip()
        except Exception as error:
            raise UserError(f"{str(self.path)!r} is damaged: {error}") from None
        if damaged:
            raise UserError(f"{str(self.path)!r} is damaged: {damaged} does not match its checksum")

    def read(self, first: int, last: int) -> tuple[Pixels, Labels]:
        last = min(last, self.count)
        size = int(np.prod(self._shape))
        try:
            self._member.seek(self._start + first * size)
            raw = self._member.read((last - first) * size)
            pixels = np.frombuffer(raw, np.uint8).reshape(last - first, *self._shape)
        except Exception as error:
            raise UserError(f"{str(self.path)!r} is damaged near image {first}: {error}") from None
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), self.labels[first:last]

    def _open(self, name: str) -> tuple[IO[bytes], tuple[int, ...], np.dtype[Any]]:
        """A member positioned after its header, its shape and its dtype; reads no pickles."""
        member = self._archive.open(f"{name}.npy")
        version = np.lib.format.read_magic(member)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if reader is None:
            raise ValueError(f"{name}.npy is of the unknown version {version}")
        shape, fortran, kind = reader(member)
        if fortran:
            raise ValueError(f"{name} is in Fortran order")
        return member, shape, kind


def open_source(source: str, resolution: int | None, outputs: Iterable[Path] = ()) -> "ImageFiles | NpzImages":
    """A folder, .tar or .npz of images. outputs: what the caller will write, refused where it is or lies in the source,
    which is read again later."""
    if not source.endswith(".npz"):
        return ImageFiles(source, resolution, outputs)
    refuse_inside(outputs, source)
    images = NpzImages(source)
    if resolution not in (None, images.identity["resolution"]):
        raise UserError(f"{source!r} has images of side {images.identity['resolution']}, not {resolution}")
    return images
