"""Output of a measurement: an entry of metrics.json, a table, the images."""

import fcntl
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from mf_dist.data.images import Pixels
from mf_dist.evaluation.blocks import Blocks
from mf_dist.evaluation.protocols import ADM
from mf_dist.runtime.atomic_files import write_atomic, write_json
from mf_dist.runtime.errors import UserError
from mf_dist.runtime.figures import three_digits

METRIC_SETTINGS = ("pr_real_images", "kid_subset_size", "kid_real_images")
"""Settings of single metrics."""
OF_METRICS = ("metrics", "plus_minus_95", "std", "lowest")
"""Keys of an entry that hold a number for each metric, or for some."""
MACHINE = ("seconds", "versions", "device", "ranks")
RESULTS = (*OF_METRICS, "samples_seen", *MACHINE, "warnings", "arguments", *METRIC_SETTINGS)
"""Keys of an entry that are not part of its protocol; entries of the same protocol and pixels are merged."""
SHOWN = (
    "protocol",
    "num_samples",
    "nfe",
    "sampler",
    "guidance",
    "interval",
    "labels",
    "seed",
    "seeds",
    "ema",
    "precision",
    "step",
    "images",
    "features",
    "reference",
)


def read_entries(path: Path) -> list[dict[str, Any]]:
    """Entries of a metrics.json; none if the file is missing. Raises UserError if it is damaged."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        if not all(isinstance(entry["metrics"], dict) for entry in entries):
            raise TypeError("metrics is not an object")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged or of an older version ({error}); move it away and run again") from None
    return entries  # type: ignore[no-any-return]


def record(entry: dict[str, Any], out: Path) -> Path:
    """Adds the entry to out/metrics.json; an old one of the same protocol and pixels is replaced, its other metrics
    kept. A training run may record to the same file concurrently."""
    path = out / "metrics.json"
    out.mkdir(parents=True, exist_ok=True)
    new = json.loads(json.dumps(entry))
    with _locked(out / "metrics.lock"):
        entries = read_entries(path)
        for old in entries:
            if _protocol(old) == _protocol(new):
                kept = {key: old[key] for key in METRIC_SETTINGS if key in old}
                of_metrics = {
                    key: {**old.get(key, {}), **new.get(key, {})} for key in OF_METRICS if key in {**old, **new}
                }
                new = {**kept, **new, **of_metrics}
        write_json(path, [*(old for old in entries if _protocol(old) != _protocol(new)), new])
    return path


def recorded(protocol: dict[str, Any], computed_by: dict[str, Any], out: Path) -> dict[str, Any] | None:
    """The newest entry of out/metrics.json with a protocol of measure.protocol_of, measured by the same packages on the
    same kind of device as measure.computed_by has them; None without one."""
    wanted = _protocol(json.loads(json.dumps(protocol)))
    for entry in reversed(read_entries(out / "metrics.json")):
        found = _protocol(entry)
        found.pop("pixels_sha256", None)  # known afterwards only
        if found == wanted and _software(entry) == _software(computed_by):
            return entry
    return None


def _software(entry: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """What may change the last bits: as for blocks, not the number of processes, nor the commit of the code."""
    versions = entry.get("versions", {})
    return entry.get("device", ""), {name: versions[name] for name in versions.keys() - {"code", "ranks"}}


def _protocol(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry without the name of a protocol is from before there were several: it is ADM's."""
    return {"protocol": ADM.name, **{key: value for key, value in entry.items() if key not in RESULTS}}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Excludes other processes while reading and writing; has no effect on a file system without locks."""
    with open(path, "w", encoding="utf-8") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def table(entry: dict[str, Any]) -> str:
    """The entry as text: metrics, protocol, warnings."""
    lines = [f"  {name:28} {shown(entry, name)}" for name in entry["metrics"]]
    lines += [f"  {key:28} {entry[key]}" for key in SHOWN if key in entry]
    seconds = ", ".join(f"{stage.replace('_', ' ')} {three_digits(taken)}" for stage, taken in entry["seconds"].items())
    lines.append(f"  {'seconds':28} {seconds}")
    return "\n".join(lines + [f"  warning: {text}" for text in entry["warnings"]])


def shown(entry: dict[str, Any], name: str) -> str:
    """A metric with its band, and over several seeds with their standard deviation and the lowest."""
    value, text = entry["metrics"][name], ""
    if name in entry.get("plus_minus_95", {}):
        text += f" +- {entry['plus_minus_95'][name]:.2g} at 95 %"
    if name in entry.get("std", {}):
        text += f", std {entry['std'][name]:.2g} over {len(entry['seeds'])} seeds, lowest {entry['lowest'][name]:.6g}"
    return f"{value:.6g}{text}"


def save_images(blocks: Blocks, count: int, folder: Path) -> None:
    """The first `count` images as folder/NUMBER_CLASS.png, replacing any in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for number, (pixels, label) in enumerate(_images(blocks, count)):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{number:06d}_{label:03d}.png")


def save_npz(blocks: Blocks, path: Path) -> None:
    """ADM's layout: arr_0 (N, R, R, 3) uint8, arr_1 (N,) int64. Written block by block, uncompressed, since ADM's
    reader streams; atomic."""
    side = next(blocks.parts("pixels", range(1))).shape[2]

    def write(target: IO[bytes]) -> None:
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (blocks.count, side, side, 3)}
                np.lib.format.write_array_header_1_0(file, header)
                for part in blocks.parts("pixels"):
                    file.write(np.ascontiguousarray(part.transpose(0, 2, 3, 1)).tobytes())
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, blocks.rows("labels"), allow_pickle=False)

    write_atomic(path, write)


def _images(blocks: Blocks, count: int) -> Iterator[tuple[Pixels, int]]:
    for number in range(-(-min(count, blocks.count) // blocks.block)):
        pixels, labels = (next(blocks.parts(name, range(number, number + 1))) for name in ("pixels", "labels"))
        for i in range(min(len(labels), count - number * blocks.block)):
            yield pixels[i], int(labels[i])
