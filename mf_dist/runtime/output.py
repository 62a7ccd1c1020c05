"""Standard output and error that cannot end a program: what cannot be written, on a full disk or into a pipe whose
reader has gone, is dropped; letters that an encoding lacks and control characters are escaped. Does not import torch.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

_lost: list[str] = []
"""A sentence on the first loss of this process."""
_listeners: list[Callable[[str], None]] = []
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
"""Of control characters, which in a name would move the cursor or change colours."""


def one_line(text: str) -> str:
    """`text` with its control characters escaped, line breaks included."""
    return text.translate(_ESCAPES)


def complain(text: str) -> None:
    """Prints one line on standard error."""
    print(one_line(text), file=sys.stderr, flush=True)


class DroppingStream:
    """A text stream whose write and flush never fail. Letters that its encoding lacks are escaped, and so are control
    characters on standard output; progress bars need them on standard error."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name = stream, name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._stream, attribute)

    def write(self, text: str) -> int:
        shown = text if self._name == "standard error" else "\n".join(map(one_line, text.split("\n")))
        try:
            try:
                self._stream.write(shown)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                self._stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:  # ValueError: it has been closed
            _note_loss(self._name, error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            _note_loss(self._name, error)


def drop_what_cannot_be_written() -> None:
    """For this process, from here on. Descriptors 0 to 2 that are closed become the null device: otherwise the next
    file to be opened would receive what libraries print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for attribute, name in (("stdout", "standard output"), ("stderr", "standard error")):
        stream = getattr(sys, attribute)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  for the rest of the process
        if not isinstance(stream, DroppingStream):
            setattr(sys, attribute, DroppingStream(stream, name))


def when_output_is_lost(tell: Callable[[str], None]) -> None:
    """`tell` is called once, with a sentence, if something cannot be written; at once if that has already happened."""
    _listeners.append(tell)
    for sentence in _lost:
        tell(sentence)


def _note_loss(name: str, error: Exception) -> None:
    if _lost:
        return
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    _lost.append(f"{name} cannot be written ({reason}); what is printed there is dropped")
    if name == "standard output" and not isinstance(error, BrokenPipeError):  # which | head causes on purpose
        print(f"warning: {_lost[0]}", file=sys.stderr)
    for tell in _listeners:
        tell(_lost[0])
