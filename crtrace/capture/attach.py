"""Bring a process, the BPF programs and a chain together."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from crtrace.capture.session import Progress, Session, Witness
from crtrace.capture.state import boot_id
from crtrace.errors import UsageError
from crtrace.image.reader import Chain
from crtrace.image.store import ChainWriter
from crtrace.linux.privileges import require_capabilities
from crtrace.linux.procfs import Process, refuse_unsuitable
from crtrace.track.dirty import WrittenPages
from crtrace.track.loader import Loading
from crtrace.units import Pid

log = logging.getLogger("crtrace")


@contextmanager
def attached(
    pid: Pid,
    path: Path,
    *,
    max_pause_ms: float = 10.0,
    progress: Progress = lambda done, total: None,
    witness: Witness | None = None,
) -> Iterator[Session]:
    """A session on process ``pid`` that writes to the chain at ``path``, made if need be.

    On leaving, however that happens, the process is disarmed. Raises what the command line turns
    into exit codes: no such process, not permitted, busy, kernel feature missing, no chain.
    """
    with ExitStack() as stack:
        process = stack.enter_context(Process(pid))
        require_capabilities()
        refuse_unsuitable(process)
        loading = Loading()  # compiles while the chain is looked at
        try:
            chain = stack.enter_context(ChainWriter.open(path, create=True))
            objects = _continued(chain, path, process)
        except BaseException:
            loading.abandon()
            raise
        programs = stack.enter_context(loading.result())
        log.debug(
            "BPF with headers %s: bcc imported in %.3f s, compiled in %.3f s, ready after %.3f s",
            programs.headers, *(programs.seconds[name] for name in ("import", "compile", "total")),
        )  # fmt: skip
        marks = WrittenPages(programs)
        session = Session(
            process, chain, marks, max_pause_ms=max_pause_ms, progress=progress, witness=witness
        )
        stack.callback(session.close)
        session.adopt(objects)
        yield session


def _continued(chain: ChainWriter, path: Path, process: Process) -> dict[tuple[int, int], int]:
    """The object spaces of a chain that is to go on; it must be one of this very process."""
    if not chain.entries:
        return {}
    with Chain.open(path) as reader:
        epoch = reader.epoch(-1)
        task = epoch.tasks[0].task
        same = (epoch.header.boot_id, task.pid, task.start_ticks)
        if same != (boot_id(), process.pid, process.starttime):
            raise UsageError(
                f"{path} holds images of another process: {task.comm}, {task.pid}",
                hint="choose another directory with -o",
            )
        kept = (file for file in epoch.files.values() if file.object_space)
        return {(file.dev, file.inode): file.object_space for file in kept}
