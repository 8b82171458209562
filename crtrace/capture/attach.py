"""Bring a process, the BPF programs and a chain together."""

from __future__ import annotations

import logging
import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from crtrace.capture.session import Progress, Session, Witness
from crtrace.capture.spaces import Spaces
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
    tree: bool = False,
    max_pause_ms: float = 10.0,
    progress: Progress = lambda done, total: None,
    witness: Witness | None = None,
) -> Iterator[Session]:
    """A session on process ``pid`` that writes to the chain at ``path``, made if need be.

    With ``tree``, all that descend from the process are followed as well.

    On leaving, however that happens, the process is disarmed. Raises what the command line turns
    into exit codes: no such process, not permitted, busy, kernel feature missing, no chain.
    """
    with ExitStack() as stack:
        process = stack.enter_context(Process(pid))
        require_capabilities()
        _allow_many_files()
        refuse_unsuitable(process)
        loading = Loading()  # compiles while the chain is looked at
        try:
            chain = stack.enter_context(ChainWriter.open(path, create=True))
            spaces = _continued(chain, path, process)
        except BaseException:
            loading.abandon()
            raise
        programs = stack.enter_context(loading.result())
        log.debug("BPF: code %s, ready after %.3f s", programs.origin, programs.seconds)
        marks = WrittenPages(programs)
        session = Session(
            process, chain, marks, spaces=spaces, follow=tree, max_pause_ms=max_pause_ms,
            progress=progress, witness=witness,
        )  # fmt: skip
        stack.callback(session.close)
        yield session


def _continued(chain: ChainWriter, path: Path, process: Process) -> Spaces:
    """The space numbers of a chain that is to go on; it must be one of this very process."""
    spaces = Spaces()
    if not chain.entries:
        return spaces
    with Chain.open(path) as reader:
        epoch = reader.epoch(-1)
        tasks = [view.task for view in epoch.tasks]
        known = {(task.pid, task.start_ticks) for task in tasks}
        if epoch.header.boot_id != boot_id() or (process.pid, process.starttime) not in known:
            names = ", ".join(f"{task.comm}, {task.pid}" for task in tasks[:1])
            raise UsageError(
                f"{path} holds images of another process: {names}",
                hint="choose another directory with -o",
            )
        spaces.go_on_from(epoch)
    return spaces


def _allow_many_files() -> None:
    """Every process under watch takes some descriptors."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
