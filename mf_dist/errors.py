"""What a user did wrong, said in one line."""

import functools
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake the user can mend: the text says what, where, what was expected and how to fix it."""


def command_line(main: Callable[[], None]) -> Callable[[], int]:
    """Makes `main` a program: a UserError is one line on stderr (of rank 0 only) and exit code 2."""

    @functools.wraps(main)
    def run() -> int:
        try:
            main()
        except UserError as error:
            if os.environ.get("RANK", "0") == "0":
                print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted; run the same command again to go on", file=sys.stderr)
            return 130
        return 0

    return run
