"""Errors that the user can fix, reported in one line, and exit codes of programs."""

import errno
import functools
import os
import sys
from collections.abc import Callable

from mf_dist.runtime.output import complain, drop_what_cannot_be_written


class UserError(Exception):
    """A mistake the user can fix: the text says what, where, what was expected and how to fix it."""


class SharedError(UserError):
    """Raised with the same text on every rank (distributed.raise_on_all_ranks); only rank 0 prints it."""


class CrashLoopError(UserError):
    """Too many starts without progress: the cause must be fixed by hand."""


class UnrecordedError(UserError):
    """A refusal that leaves status.json unchanged: rank 0 has recorded why, or another process holds the run."""


def import_error(package: str, use: str, error: BaseException) -> UserError:
    """For a package that cannot be imported, as where one that it imports in turn is broken; `use`: what needs it."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = " ".join(f"{type(cause).__name__}: {cause}".split())
    return UserError(
        f"cannot import {package}, which {use} ({reason}): install requirements.txt again, with constraints.txt, or "
        "uninstall the package that breaks"
    )


USER_ERRNOS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}
"""Errors of a path that are the caller's mistake; any other is a disk fault, which may not occur again."""


def is_disk_fault(error: BaseException | None) -> bool:
    """Whether a disk fault is the error or in its chain of contexts."""
    while error is not None:
        if isinstance(error, OSError) and error.errno and error.errno not in USER_ERRNOS:
            return True
        error = error.__context__
    return False


def command_line(main: Callable[[], int | None]) -> Callable[[], int]:
    """Makes `main` a program whose exit code is what main returns, or 0. A UserError, or an OSError of a file, prints
    one line on stderr and gives exit code 2; so does a locale whose encoding is not UTF-8. What cannot be printed is
    dropped."""

    @functools.wraps(main)
    def run() -> int:
        drop_what_cannot_be_written()
        encoding = sys.getfilesystemencoding()
        try:
            if encoding != "utf-8":
                raise UserError(
                    f"Python reads files and their names as {encoding} here, not as UTF-8; set PYTHONUTF8=1"
                )
            _make_cache_folder()
            return main() or 0
        except UserError as error:
            _print_error(str(error), is_shared=isinstance(error, SharedError))
            return 2
        except OSError as error:
            if error.filename is None:
                raise
            _print_error(f"{error.filename}: {error.strerror}")
            return 2
        except KeyboardInterrupt:
            complain("interrupted; run the same command again to continue")
            return 130

    return run


def _make_cache_folder() -> None:
    """torch makes it once it is imported, also where nothing is compiled."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    try:
        if folder:
            os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"TORCHINDUCTOR_CACHE_DIR is {folder!r}: {error.strerror}; set it to a folder that can be made, or unset it"
        ) from None


def _print_error(text: str, is_shared: bool = False) -> None:
    """Rank 0 prints. Other ranks only print errors of their own: not shared ones, and none before torch is imported,
    since all ranks then find the same mistakes."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        complain(f"error: {text}")
    elif "torch" in sys.modules and not is_shared:
        complain(f"error on rank {rank}: {text}")
