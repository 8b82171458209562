"""A process as the capture holds it: everything that is bound to one of its address spaces."""

from __future__ import annotations

import os

from crtrace.capture.objects import MappedObject, ObjectTable
from crtrace.capture.state import MapBook
from crtrace.linux.addrspace import AddressSpace
from crtrace.linux.memory import MemoryReader
from crtrace.linux.pagemap import Scanner
from crtrace.linux.procfs import Process
from crtrace.linux.ptrace import StoppedProcess, signals_held
from crtrace.track.armer import Armer
from crtrace.track.userfaultfd import UserfaultfdArmer
from crtrace.units import U64


class Target:
    """One program in one process, armed. An ``execve`` ends it; make a new one then."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.closed = False
        self.space = AddressSpace(process)
        self.book = MapBook()
        self._pagemap = -1
        self.armer: Armer = UserfaultfdArmer(process, self.space)
        self.reader = MemoryReader(process)
        try:
            self._pagemap = process.open("pagemap")
            self.scanner = Scanner(self._pagemap)
            with signals_held(), StoppedProcess(process) as stopped:
                self.armer.arm(stopped)
                self._landmark = process.stat().startcode
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Disarm; the process goes on. It may be called twice."""
        self.closed = True
        self.armer.close()
        self.reader.close()
        if self._pagemap >= 0:
            os.close(self._pagemap)
            self._pagemap = -1

    def same_program(self) -> bool:
        """Whether the process still runs in the address space that was armed."""
        return not self.closed and self.reader.same_program(self._landmark)

    def vdso(self) -> U64:
        """The pages of ``[vdso]``: the kernel's own code, but debuggers want it in every image."""
        return self.space.ranges(lambda vma: vma.name == "[vdso]")

    def objects(self, table: ObjectTable) -> list[MappedObject]:
        """What is mapped of objects whose contents belong into the image, opened."""
        self.book.update(self.process, self.space.vmas)
        found = table.mapped(self.space.vmas, self.book.facts)
        return [each for each in found if _opened(each, self.process)]


def _opened(each: MappedObject, process: Process) -> bool:
    """False where the object went away between two looks; then its VMA did as well."""
    try:
        each.open(process)
    except FileNotFoundError:
        return False
    return True
