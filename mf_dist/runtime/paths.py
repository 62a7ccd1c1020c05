"""Paths in configs and arguments that no shell has expanded: ~, $NAME and ${NAME}. Does not import torch."""

import os
import re
import sys
from pathlib import Path

from mf_dist.runtime.errors import UserError

VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\}|\()", re.ASCII)


def shell_expansion(text: str) -> str:
    """`text` with a leading ~ or ~USER and every $NAME or ${NAME} expanded. Raises UserError for a variable that is not
    set or empty, an unknown user, and $(command), which is not run."""

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
    return VARIABLE.sub(value, home)


def expanded(text: str) -> str:
    """shell_expansion, with a line on stderr, by rank 0, if it changes the text."""
    result = shell_expansion(text)
    if result != text and os.environ.get("RANK", "0") == "0":
        print(f"note: {text} is {result}", file=sys.stderr, flush=True)
    return result


def expanded_path(text: str) -> Path:
    """A path argument of a command line, expanded."""
    return Path(expanded(text))
