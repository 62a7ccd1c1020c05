"""Small images and tars for the tests of listing and encoding."""

import io
import tarfile
from pathlib import Path

from PIL import Image


def png(value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (value, value, value)).save(file, "png")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes | str]) -> Path:
    """A tar of these members, in this order; also returned."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            raw = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return path
