"""Reads of many files at random, with a limited number of descriptors. Does not import torch.

A failing disk or a file that has become shorter raises OSError; under a memory map both would be a signal (SIGBUS) that
ends the process without a word.
"""

import errno
import os
import resource
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any


class OpenFiles:
    """Files open for reading in this process; to open one more than `limit`, the least recently read one is closed."""

    def __init__(self) -> None:
        self._descriptors: OrderedDict[Path, int] = OrderedDict()
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        in_use = len(os.listdir("/proc/self/fd"))
        self.limit = max(1, (soft - in_use) // 2) if soft != resource.RLIM_INFINITY else 1 << 16

    def read(self, path: Path, offset: int, into: memoryview) -> None:
        """Fills `into` with the bytes of a file from `offset` on. Raises OSError, also if the file ends before."""
        try:
            self._read(path, offset, into)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            self.close(path)  # a file on NFS that was replaced: the new one has the same name
            self._read(path, offset, into)

    def _read(self, path: Path, offset: int, into: memoryview) -> None:
        rest = into.cast("B")
        while rest:
            count = os.preadv(self._descriptor(path), [rest], offset)
            if not count:
                raise OSError(None, f"it ends before byte {offset + len(rest)}", str(path))
            rest, offset = rest[count:], offset + count

    def _descriptor(self, path: Path) -> int:
        if path not in self._descriptors:
            while len(self._descriptors) >= self.limit:
                self.close(next(iter(self._descriptors)))
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        self._descriptors.move_to_end(path)
        return self._descriptors[path]

    def close(self, path: Path) -> None:
        with suppress(OSError):  # some network file systems report there what concerns writing
            os.close(self._descriptors.pop(path))

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens its own."""
        return OpenFiles, ()

    def __del__(self) -> None:
        for path in list(self._descriptors):
            self.close(path)
