"""A run's pictures as data URIs, thinned out so that they fit into the report."""

import base64
import io
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from mf_dist.report.collect import Run, table
from mf_dist.report.curves import steps

GRID = re.compile(r"step(?P<step>\d+)(-nfe(?P<nfe>\d+))?\.png")
MAX_WIDTH = 1100
"""Pixels; wider pictures are shrunk."""
MAX_GRIDS = 32
"""Steps of the slider."""
MAX_READ = 400_000_000
"""Bytes of a file of samples that are looked through for the class browser."""
SIDE, COLUMNS, ROWS, GAP = 96, 8, 2, 2
"""Of the class browser: largest side of a sample, samples shown of a class, and pixels between them."""
UNREADABLE = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What a damaged .npz raises."""

Item = TypeVar("Item")
Picture = dict[str, Any]
"""caption, src (a data URI), w, h."""


@dataclass(frozen=True)
class Shown:
    """What fits of a run's pictures, and a sentence where that is not all, or none."""

    items: list[dict[str, Any]]
    note: str = ""


def data_uri(image: Image.Image, lossless: bool = False) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "webp", lossless=lossless, quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def picture(path: Path, caption: str) -> Picture | None:
    """None for a file that is no picture, or only half of one."""
    if not path.is_file():
        return None
    try:
        with Image.open(path) as image:
            shown = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    if shown.width > MAX_WIDTH:
        shown = shown.resize((MAX_WIDTH, max(1, shown.height * MAX_WIDTH // shown.width)), Image.Resampling.LANCZOS)
    return {"caption": caption, "src": data_uri(shown), "w": shown.width, "h": shown.height}


def fit(items: Sequence[Item], make: Callable[[Item], dict[str, Any] | None], room: int, most: int) -> list[Any]:
    """What `make` makes of the items, of as many of them, evenly spread from the first to the last, as have room. None
    stands for one that cannot be made."""
    made: dict[int, dict[str, Any] | None] = {}
    count = min(most, len(items))
    while count:
        chosen = sorted({round(i * (len(items) - 1) / max(1, count - 1)) for i in range(count)}) if count > 1 else [-1]
        for number in chosen:
            if number not in made:
                made[number] = make(items[number])
        size = sum(_size(made[number]) for number in chosen)
        if size <= room:
            return [made[number] for number in chosen]
        count = max(0, min(count - 1, count * room // size))
    return []


def _size(made: dict[str, Any] | None) -> int:
    return sum(len(part["src"]) + 200 for part in (made or {}).get("pictures", ()))


def grids(run: Run, room: int) -> Shown:
    """A frame for each step whose samples were drawn."""
    found: dict[int, list[tuple[int, Path]]] = {}
    for path in sorted((run.folder / "samples").glob("step*.png")):
        if match := GRID.fullmatch(path.name):
            found.setdefault(int(match["step"]), []).append((int(match["nfe"] or 0), path))

    counts = table(run.config.get("eval")).get("grid_nfe")
    only = steps(counts[0]) if isinstance(counts, list) and len(counts) == 1 else ""

    def frame(step: int) -> dict[str, Any] | None:
        made = [picture(path, steps(nfe) if nfe else only) for nfe, path in sorted(found[step])]
        whole = [one for one in made if one]
        return {"step": step, "images": run.images(step), "pictures": whole} if whole else None

    frames = fit(sorted(found), frame, room, MAX_GRIDS)
    whole = [one for one in frames if one]
    notes = []
    if not found:
        notes = ["No grids of samples in this run's folder samples yet (log.sample_every_images)."]
    if len(frames) < len(found):
        notes.append(
            f"Thinned out: {len(frames)} of {len(found)} grids, evenly spread; all are in {run.folder}/samples."
        )
    if len(whole) < len(frames):
        notes.append(f"{len(frames) - len(whole)} could not be read.")
    return Shown(whole, " ".join(notes))


def last_grids(run: Run, drawn: Shown, room: int) -> Shown:
    """The grids of tools/fid_eval.py, but not those that the slider `drawn` ends with. Of MeanFlow one picture has
    several numbers of steps; of flow matching each has its own."""
    last = run.measurements[-1].protocol if run.measurements else {}
    names = ("grid_nfe*.png", "grid_steps.png") if last.get("sampler") == "euler" else ("grid_steps.png", "grid_*.png")
    found = _captioned(run, next(filter(None, (_pictures(run, name) for name in names)), []), "grid", room)
    known = {one["src"] for one in drawn.items[-1]["pictures"]} if drawn.items else set()
    return Shown([one for one in found.items if one["src"] not in known], found.note)


def neighbours(run: Run, room: int) -> Shown:
    """The rows of tools/fid_eval.py: a sample, then the nearest real images."""
    return _captioned(run, _pictures(run, "neighbours*.png"), "neighbours", room)


def _pictures(run: Run, name: str) -> list[Path]:
    return sorted((run.folder / "eval").glob(name), key=lambda path: (len(path.name), path.name))


def _captioned(run: Run, paths: list[Path], kind: str, room: int) -> Shown:
    """With the number of sampling steps, which is in the file's name, and the training step, which is not."""

    def one(path: Path) -> dict[str, Any] | None:
        nfe = re.fullmatch(r"nfe(\d+)(_times)?", path.stem.removeprefix(kind).strip("_"))
        measured = [m.protocol for m in run.measurements if not m.protocol.get("in_training")]
        known = [entry.get("step") for entry in measured if nfe is None or str(entry.get("nfe")) == nfe[1]]
        when = f"after training step {known[-1]:,}" if known and isinstance(known[-1], int) else ""
        counts = steps(nfe[1]) if nfe else "several numbers of steps" if path.stem.endswith("_steps") else ""
        made = picture(path, ", ".join(part for part in (counts, when) if part))
        return {"pictures": [made]} if made else None

    made = fit(paths, one, room, 6)
    note = "" if len(made) == len(paths) else f"{len(made)} of {len(paths)} pictures; all are in {run.folder}/eval."
    return Shown([found["pictures"][0] for found in made if found], note)


def classes(run: Run, room: int) -> Shown:
    """Per class the first samples of each eval/samples_nfeN.npz, the same noise in all of them."""
    paths = {
        int(p.stem[11:]): p
        for p in (run.folder / "eval").glob("samples_nfe*.npz")
        if p.stem[11:].isdigit() and p.is_file()
    }
    if not paths:
        return Shown([], "No samples_nfeN.npz in this run's folder eval: tools/fid_eval.py --save-npz writes one.")
    sprites: dict[int, dict[int, npt.NDArray[np.uint8]]] = {}
    damaged = []
    for nfe, path in sorted(paths.items())[:3]:
        try:
            sprites[nfe] = _samples_by_class(path)
        except UNREADABLE as error:
            damaged.append(f"{path.name} cannot be read ({error}).")
    labels = sorted({label for found in sprites.values() for label in found})
    names = run.state.get("classes")

    def entry(label: int) -> dict[str, Any]:
        known = isinstance(names, list) and 0 <= label < len(names) and names[label]
        parts = [_sprite(found[label], steps(nfe)) for nfe, found in sprites.items() if label in found]
        return {"name": str(known) if known else str(label), "pictures": parts}

    shown = fit(labels, entry, room, len(labels))
    if len(shown) < len(labels):
        damaged.append(f"Thinned out: {len(shown)} of {len(labels)} classes.")
    return Shown(shown, " ".join(damaged))


def _sprite(samples: npt.NDArray[np.uint8], caption: str) -> Picture:
    """(N, H, W, 3) as one picture of COLUMNS columns."""
    side, across = samples.shape[1], min(COLUMNS, len(samples))
    pitch, rows = side + GAP, -(-len(samples) // COLUMNS)
    canvas = Image.new("RGB", (across * pitch - GAP, rows * pitch - GAP), "white")
    for i, pixels in enumerate(samples):
        canvas.paste(Image.fromarray(pixels), (i % COLUMNS * pitch, i // COLUMNS * pitch))
    return {"caption": caption, "src": data_uri(canvas, lossless=side <= 64), "w": canvas.width, "h": canvas.height}


def _samples_by_class(path: Path) -> dict[int, npt.NDArray[np.uint8]]:
    """The first samples of each class, (N, R, R, 3) with R at most SIDE, read image by image. ValueError for a file of
    another layout than ADM's."""
    with zipfile.ZipFile(path) as archive:
        with archive.open("arr_1.npy") as file:
            labels = np.lib.format.read_array(file, allow_pickle=False)
        with archive.open("arr_0.npy") as file:
            count, height, width = _image_shape(file)
            if labels.shape != (count,) or labels.dtype.kind not in "iu" or not count:
                raise ValueError("labels do not fit its images")
            per_class = max(2, min(COLUMNS * ROWS, 1600 // len(np.unique(labels))))
            found: dict[int, list[npt.NDArray[np.uint8]]] = {}
            for label in labels[: MAX_READ // (height * width * 3)].tolist():
                raw = file.read(height * width * 3)
                if len(found.setdefault(label, [])) < per_class:
                    found[label].append(_small(np.frombuffer(raw, np.uint8).reshape(height, width, 3)))
    return {label: np.stack(samples) for label, samples in found.items()}


def _image_shape(file: IO[bytes]) -> tuple[int, int, int]:
    """(N, H, W) of the array whose header is read from `file`."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, kind = read(file)
    if kind != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3 or not 1 <= shape[1] == shape[2] <= 4096:
        raise ValueError("its images are not (N, R, R, 3) uint8")
    return shape[:3]


def _small(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    if pixels.shape[0] <= SIDE:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.LANCZOS))
