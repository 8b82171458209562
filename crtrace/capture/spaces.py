"""Which number in the chain stands for which address space or memory object."""

from __future__ import annotations

from crtrace.image.epoch import Epoch
from crtrace.image.tables import FileFlag
from crtrace.linux.procfs import FileKey, Process
from crtrace.units import Pid


class Spaces:
    """Gives out space numbers; what an existing chain has numbered keeps its number."""

    def __init__(self) -> None:
        self._programs: dict[tuple[Pid, int], int] = {}
        self._objects: dict[FileKey, int] = {}
        self._next = 1

    def go_on_from(self, epoch: Epoch) -> None:
        """Keep the numbers of a chain's newest epoch."""
        for view in epoch.tasks:
            if view.mm:
                self._programs[Pid(view.task.pid), view.task.start_ticks] = view.mm.space
        ipc = dict(epoch.tasks[0].task.namespaces).get("ipc", 0) if epoch.tasks else 0
        for file in epoch.files.values():
            if file.object_space:
                segment = ipc if file.flags & FileFlag.SYSV else 0
                self._objects[file.dev, file.inode, segment] = file.object_space
        self._next = max(epoch.spaces, default=0) + 1

    def of_program(self, process: Process) -> int:
        """For the address space of a process that begins to be watched, or runs a new program."""
        known = self._programs.pop((process.pid, process.starttime), 0)
        return known or self._new()

    def of_object(self, key: FileKey) -> int:
        """For a memory object; always the same."""
        if key not in self._objects:
            self._objects[key] = self._new()
        return self._objects[key]

    def _new(self) -> int:
        self._next += 1
        return self._next - 1
