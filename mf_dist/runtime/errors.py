"""What a user did wrong, said in one line."""

import errno
import functools
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake the user can mend: the text says what, where, what was expected and how to fix it."""


class SharedError(UserError):
    """The same on every rank, wherever it was found (distributed.together): the first speaks for all."""


class CrashLoopError(UserError):
    """Too many starts without progress: a person must look."""


class UnrecordedError(UserError):
    """A refusal that leaves status.json as it is: rank 0 has written why, or the run is another process's."""


USER_ERRNOS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}
"""What is wrong with a path when the caller is; any other trouble is the disk's, which may be well again next time."""


def is_disk_fault(error: BaseException | None) -> bool:
    """Whether a disk is behind an error, and not its caller."""
    while error is not None:
        if isinstance(error, OSError) and error.errno and error.errno not in USER_ERRNOS:
            return True
        error = error.__context__
    return False


def command_line(main: Callable[[], int | None]) -> Callable[[], int]:
    """Makes `main` a program whose exit code is what main returns, or 0: a UserError, or a file that cannot be used, is
    one line on stderr and exit code 2."""

    @functools.wraps(main)
    def run() -> int:
        try:
            return main() or 0
        except UserError as error:
            _print_error(str(error), is_shared=isinstance(error, SharedError))
            return 2
        except BrokenPipeError:  # the reader, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except OSError as error:
            if error.filename is None:
                raise
            _print_error(f"{error.filename}: {error.strerror}")
            return 2
        except KeyboardInterrupt:
            print("interrupted; run the same command again to go on", file=sys.stderr)
            return 130

    return run


def _print_error(text: str, is_shared: bool = False) -> None:
    """Before torch is loaded all ranks find the same mistakes, and the first speaks for all."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"error: {text}", file=sys.stderr)
    elif "torch" in sys.modules and not is_shared:
        print(f"error on rank {rank}: {text}", file=sys.stderr)
