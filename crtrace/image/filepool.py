"""The files of a chain that is being read, few of them open at a time."""

from __future__ import annotations

import os
from collections import OrderedDict

from crtrace.errors import ChainIncomplete
from crtrace.image.chaindir import ChainDir

OPEN_FILES = 64


class FilePool:
    """Files of a chain, opened when needed and at most ``OPEN_FILES`` at a time."""

    def __init__(self, directory: ChainDir) -> None:
        self.directory = directory
        self._fds: OrderedDict[str, int] = OrderedDict()

    def get(self, name: str) -> int:
        """A descriptor for ``name``. Raises ``ChainIncomplete`` when there is no such file."""
        if name not in self._fds:
            try:
                self._fds[name] = self.directory.open_file(name)
            except FileNotFoundError as error:
                raise ChainIncomplete(
                    f"{self.directory.path / name} is missing",
                    hint="copy the whole directory; without this image, epochs that build on it "
                    "are lost",
                ) from error
            if len(self._fds) > OPEN_FILES:
                os.close(self._fds.popitem(last=False)[1])
        self._fds.move_to_end(name)
        return self._fds[name]

    def close(self) -> None:
        """Close every file."""
        while self._fds:
            os.close(self._fds.popitem()[1])
