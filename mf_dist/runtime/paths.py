"""Names of files and folders, and paths in configs and arguments that no shell has expanded: ~, $NAME and ${NAME}. Does
not import torch.
"""

import os
import re
from pathlib import Path

from mf_dist.runtime.errors import UserError
from mf_dist.runtime.output import complain

VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\}|\()", re.ASCII)
ODD = re.compile("[\n\0\ud800-\udfff]")
"""Letters that no name has. Python stands lone surrogates for bytes that are not UTF-8."""


def refuse_odd_name(name: str, what: str) -> None:
    """A name of a file, of a member of a tar or of a class is Unicode text on one line; all else, such as U+202F in the
    names of macOS' screenshots, is kept as it is. Raises UserError, whose text begins with `what`, for any other."""
    if match := ODD.search(name):
        fault = "has a line break or a NUL" if match[0] in "\n\0" else "is not UTF-8"
        raise UserError(f"{what} {name!r} {fault}; rename it")


def shell_expansion(text: str) -> str:
    """`text` with a leading ~ or ~USER and every $NAME or ${NAME} expanded. Raises UserError for a variable that is not
    set or empty, an unknown user, $(command), which is not run, a name that refuse_odd_name refuses, and one that ends
    in a carriage return."""

    def value(match: re.Match[str]) -> str:
        name = match[1] if match[2] is None else match[2]
        if name is None:
            raise UserError(f"path {text!r}: commands in a path are not run")
        if not os.environ.get(name):
            raise UserError(f"path {text!r}: the environment variable {name} is not set")
        return os.environ[name]

    home = os.path.expanduser(text)
    if home.startswith("~"):
        raise UserError(f"path {text!r}: no home folder of {text.split('/')[0]}; write ./{text} for a name with a ~")
    result = VARIABLE.sub(value, home)
    refuse_odd_name(result, "path")
    if result.endswith("\r"):
        raise UserError(f"path {result!r} ends in a carriage return: its script has Windows' line ends; remove them")
    return result


def expanded(text: str) -> str:
    """shell_expansion, with a line on stderr, by rank 0, if it changes the text."""
    result = shell_expansion(text)
    if result != text and os.environ.get("RANK", "0") == "0":
        complain(f"note: {text} is {result}")
    return result


def expanded_path(text: str) -> Path:
    """A path argument of a command line, expanded."""
    return Path(expanded(text))
