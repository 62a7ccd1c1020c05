"""A run's pictures as data URIs, as many as fit into the report."""

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
"""Bytes of pixels read from a file of samples for the class browser."""
SIDE, COLUMNS, ROWS, GAP = 96, 8, 2, 2
"""Class browser: largest side of a sample, columns and rows of samples per class, and pixels between them."""
UNREADABLE = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""Exceptions raised for a damaged .npz."""

Item = TypeVar("Item")
Picture = dict[str, Any]
"""caption, src (a data URI), w, h."""


@dataclass(frozen=True)
class Selection:
    """The pictures of a run that fit, and a sentence if some or all are missing."""

    items: list[dict[str, Any]]
    note: str = ""


def data_uri(image: Image.Image, lossless: bool = False) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "webp", lossless=lossless, quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def picture(path: Path, caption: str) -> Picture | None:
    """The picture in `path`, shrunk to MAX_WIDTH; None if the file is not a complete picture."""
    if not path.is_file():
        return None
    try:
        with Image.open(path, formats=("PNG",)) as image:  # by content; other formats may run a program
            shown = image.convert("RGB")
    except Exception:  # on damaged bytes a decoder may raise any
        return None
    if shown.width > MAX_WIDTH:
        shown = shown.resize((MAX_WIDTH, max(1, shown.height * MAX_WIDTH // shown.width)), Image.Resampling.LANCZOS)
    return {"caption": caption, "src": data_uri(shown), "w": shown.width, "h": shown.height}


def fit(items: Sequence[Item], make: Callable[[Item], dict[str, Any] | None], budget: int, limit: int) -> list[Any]:
    """Results of `make` for at most `limit` items, evenly spread from the first to the last, as many as fit into
    `budget` bytes. None stands for an item for which `make` returns None."""
    made: dict[int, dict[str, Any] | None] = {}
    count = min(limit, len(items))
    while count:
        chosen = sorted({round(i * (len(items) - 1) / max(1, count - 1)) for i in range(count)}) if count > 1 else [-1]
        for number in chosen:
            if number not in made:
                made[number] = make(items[number])
        size = sum(_size(made[number]) for number in chosen)
        if size <= budget:
            return [made[number] for number in chosen]
        count = max(0, min(count - 1, count * budget // size))
    return []


def _size(made: dict[str, Any] | None) -> int:
    return sum(len(part["src"]) + 200 for part in (made or {}).get("pictures", ()))


def grids(run: Run, budget: int) -> Selection:
    """A frame for each step whose samples were drawn."""
    paths: dict[int, list[tuple[int, Path]]] = {}
    for path in sorted((run.folder / "samples").glob("step*.png")):
        if match := GRID.fullmatch(path.name):
            paths.setdefault(int(match["step"]), []).append((int(match["nfe"] or 0), path))

    counts = table(run.config.get("eval")).get("grid_nfe")
    default = steps(counts[0]) if isinstance(counts, list) and len(counts) == 1 else ""

    def frame(step: int) -> dict[str, Any] | None:
        made = [picture(path, steps(nfe) if nfe else default) for nfe, path in sorted(paths[step])]
        readable = [item for item in made if item]
        return {"step": step, "images": run.images(step), "pictures": readable} if readable else None

    frames = fit(sorted(paths), frame, budget, MAX_GRIDS)
    readable = [item for item in frames if item]
    notes = []
    if not paths:
        notes = ["No grids of samples in this run's folder samples yet (log.sample_every_images)."]
    if len(frames) < len(paths):
        notes.append(
            f"Thinned out: {len(frames)} of {len(paths)} grids, evenly spread; all are in {run.folder}/samples."
        )
    if len(readable) < len(frames):
        notes.append(f"{len(frames) - len(readable)} could not be read.")
    return Selection(readable, " ".join(notes))


def last_grids(run: Run, frames: Selection, budget: int) -> Selection:
    """The grids of tools/fid_eval.py, without those that are in the last of `frames`. For MeanFlow one picture has
    several numbers of steps; for flow matching each number has its own."""
    last = run.measurements[-1].protocol if run.measurements else {}
    names = ("grid_nfe*.png", "grid_steps.png") if last.get("sampler") == "euler" else ("grid_steps.png", "grid_*.png")
    grid = _captioned(run, next(filter(None, (_pictures(run, name) for name in names)), []), "grid", budget)
    known = {item["src"] for item in frames.items[-1]["pictures"]} if frames.items else set()
    return Selection([item for item in grid.items if item["src"] not in known], grid.note)


def neighbours(run: Run, budget: int) -> Selection:
    """The pictures of tools/fid_eval.py whose rows are a sample, then its nearest real images."""
    return _captioned(run, _pictures(run, "neighbours*.png"), "neighbours", budget)


def _pictures(run: Run, name: str) -> list[Path]:
    return sorted((run.folder / "eval").glob(name), key=lambda path: (len(path.name), path.name))


def _captioned(run: Run, paths: list[Path], kind: str, budget: int) -> Selection:
    """Pictures, captioned with the number of sampling steps (from the file name) and the training step (measured)."""

    def captioned(path: Path) -> dict[str, Any] | None:
        nfe = re.fullmatch(r"nfe(\d+)(_times)?", path.stem.removeprefix(kind).strip("_"))
        measured = [m.protocol for m in run.measurements if not m.protocol.get("in_training")]
        known = [entry.get("step") for entry in measured if nfe is None or str(entry.get("nfe")) == nfe[1]]
        when = f"after training step {known[-1]:,}" if known and isinstance(known[-1], int) else ""
        counts = steps(nfe[1]) if nfe else "several numbers of steps" if path.stem.endswith("_steps") else ""
        made = picture(path, ", ".join(part for part in (counts, when) if part))
        return {"pictures": [made]} if made else None

    made = fit(paths, captioned, budget, 6)
    note = "" if len(made) == len(paths) else f"{len(made)} of {len(paths)} pictures; all are in {run.folder}/eval."
    return Selection([item["pictures"][0] for item in made if item], note)


def classes(run: Run, budget: int) -> Selection:
    """For each class the first samples of each eval/samples_nfeN.npz; all files have the same noise."""
    paths = {
        int(p.stem[11:]): p
        for p in (run.folder / "eval").glob("samples_nfe*.npz")
        if p.stem[11:].isdecimal() and p.is_file()
    }
    if not paths:
        return Selection([], "No samples_nfeN.npz in this run's folder eval: tools/fid_eval.py --save-npz writes one.")
    sprites: dict[int, dict[int, npt.NDArray[np.uint8]]] = {}
    notes = []
    for nfe, path in sorted(paths.items())[:3]:
        try:
            sprites[nfe] = _samples_by_class(path)
        except UNREADABLE as error:
            notes.append(f"{path.name} cannot be read ({error}).")
    labels = sorted({label for by_class in sprites.values() for label in by_class})
    names = run.state.get("classes")

    def entry(label: int) -> dict[str, Any]:
        known = isinstance(names, list) and 0 <= label < len(names) and names[label]
        parts = [_sprite(by_class[label], steps(nfe)) for nfe, by_class in sprites.items() if label in by_class]
        return {"name": str(known) if known else str(label), "pictures": parts}

    entries = fit(labels, entry, budget, len(labels))
    if len(entries) < len(labels):
        notes.append(f"Thinned out: {len(entries)} of {len(labels)} classes.")
    return Selection(entries, " ".join(notes))


def _sprite(samples: npt.NDArray[np.uint8], caption: str) -> Picture:
    """(N, H, W, 3) as one picture of COLUMNS columns."""
    side, across = samples.shape[1], min(COLUMNS, len(samples))
    pitch, rows = side + GAP, -(-len(samples) // COLUMNS)
    canvas = Image.new("RGB", (across * pitch - GAP, rows * pitch - GAP), "white")
    for i, pixels in enumerate(samples):
        canvas.paste(Image.fromarray(pixels), (i % COLUMNS * pitch, i // COLUMNS * pitch))
    return {"caption": caption, "src": data_uri(canvas, lossless=side <= 64), "w": canvas.width, "h": canvas.height}


def _samples_by_class(path: Path) -> dict[int, npt.NDArray[np.uint8]]:
    """The first samples of each class, (N, R, R, 3) with R at most SIDE, read image by image. Raises ValueError for a
    layout other than ADM's."""
    with zipfile.ZipFile(path) as archive:
        with archive.open("arr_1.npy") as file:
            labels = np.lib.format.read_array(file, allow_pickle=False)
        with archive.open("arr_0.npy") as file:
            count, height, width = _image_shape(file)
            if labels.shape != (count,) or labels.dtype.kind not in "iu" or not count:
                raise ValueError("its labels do not match its images")
            per_class = max(2, min(COLUMNS * ROWS, 1600 // len(np.unique(labels))))
            by_class: dict[int, list[npt.NDArray[np.uint8]]] = {}
            for label in labels[: MAX_READ // (height * width * 3)].tolist():
                raw = file.read(height * width * 3)
                if len(by_class.setdefault(label, [])) < per_class:
                    by_class[label].append(_small(np.frombuffer(raw, np.uint8).reshape(height, width, 3)))
    return {label: np.stack(samples) for label, samples in by_class.items()}


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
