"""Outputs that must not lie in what is read: the next run would read them as input."""

import os
from collections.abc import Iterable
from pathlib import Path

from mf_dist.runtime.errors import UserError


def is_inside(path: str | Path, folder: str | Path) -> bool:
    """Whether a path, which need not exist, is `folder` or lies in it; links and bind mounts are followed."""
    inner, outer = Path(os.path.realpath(path)), os.path.realpath(folder)
    if inner.is_relative_to(outer):
        return True
    return os.path.exists(outer) and any(
        os.path.exists(parent) and os.path.samefile(parent, outer) for parent in (inner, *inner.parents)
    )


def refuse_inside(outputs: Iterable[str | Path], tree: str | Path) -> None:
    """Raises UserError if an output is what is read, a folder or a file, or lies in it."""
    for output in outputs:
        if is_inside(output, tree):
            raise UserError(
                f"the output {str(output)!r} lies in {str(tree)!r}, which this command reads; choose a place outside"
            )
