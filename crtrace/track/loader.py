"""Compile and attach the BPF programs in a child process that then goes away.

BCC brings a whole compiler: a hundred MiB that the controller would carry for hours. So a child
loads and attaches, passes the descriptors of maps and attachments over a socket, and exits.
The kernel keeps everything alive as long as the controller holds those descriptors, and undoes
everything when it dies, however it dies.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from crtrace.errors import FeatureMissing
from crtrace.track.headers import find_headers

REGIONS = 65_536
"""Regions that each generation of the written-page map holds: 128 GiB when densely written."""
TARGETS = 4_096

MAPS = ("written0", "written1", "targets", "generation", "totals", "question")
RAW_TRACEPOINTS = ("page_fault_user", "page_fault_kernel", "mmap_lock_acquire_returned")
TRACEPOINTS = ("task:task_newtask", "sched:sched_process_exec", "sched:sched_process_exit")


@dataclass(slots=True)
class Programs:
    """Descriptors of the loaded maps by name; attachments live until :meth:`close`."""

    maps: dict[str, int]
    resolver: int
    attachments: list[int]
    seconds: dict[str, float]
    headers: str

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Detach and unload everything; it may be called twice."""
        for fd in (*self.maps.values(), self.resolver, *self.attachments):
            os.close(fd)
        self.maps, self.attachments = {}, []
        self.resolver = -1


class Loading:
    """A load under way: start it early, do other things, then take the :meth:`result`."""

    def __init__(self, regions: int = REGIONS) -> None:
        self._began = time.monotonic()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "crtrace.track.loader", str(theirs.fileno()), str(regions)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # a Ctrl-C is for the controller to answer
            )

    def result(self) -> Programs:
        """The loaded programs, when they are; ``FeatureMissing`` with the compiler's words."""
        with self._socket:
            message, fds, _, _ = socket.recv_fds(self._socket, 1 << 16, 64)
        errors = self._child.communicate()[1].decode(errors="replace").strip()
        if not message:
            raise FeatureMissing(
                f"BPF programs cannot be loaded: {_last_lines(errors)}", hint=_HINT
            )
        reply = json.loads(message)
        seconds = {**reply["seconds"], "total": time.monotonic() - self._began}
        count = len(MAPS)
        return Programs(
            dict(zip(MAPS, fds[:count], strict=True)),
            fds[count], fds[count + 1 :], seconds, reply["headers"],
        )  # fmt: skip

    def abandon(self) -> None:
        """Give the load up."""
        self._child.kill()
        self._child.communicate()
        self._socket.close()


_HINT = "crtrace check tells what is missing; scripts/setup installs it"


def _last_lines(text: str, count: int = 3) -> str:
    """What the compiler or the kernel said, without Python's own lines."""
    lines = [line for line in text.splitlines() if not line.startswith(("Traceback", " "))]
    return " | ".join(lines[-count:]) or "the loader died without a word"


def bpf_sources() -> Path:
    """The directory of the BPF C: inside the installed package, or beside it in a source tree."""
    packaged = Path(str(importlib.resources.files("crtrace"))) / "bpf"
    return packaged if packaged.is_dir() else packaged.parent.parent / "bpf"


def _load(channel: socket.socket, regions: int) -> None:
    """The child's whole life."""
    began = time.monotonic()
    headers = find_headers()
    if headers is None:
        raise SystemExit("no kernel headers found for BCC: run scripts/setup")
    if headers.path:
        os.environ["BCC_KERNEL_SOURCE"] = headers.path
    from bcc import BPF

    imported = time.monotonic()
    folder = bpf_sources()
    program = BPF(
        src_file=str(folder / "track.c"),
        cflags=[f"-I{folder}", f"-DREGIONS={regions}", f"-DTARGETS={TARGETS}"],
    )
    resolver = program.load_func("resolve", BPF.RAW_TRACEPOINT)
    loaded = time.monotonic()
    attached = _attachments(program)
    maps = [program[name].map_fd for name in MAPS]
    reply = {
        "headers": headers.source,
        "seconds": {"import": imported - began, "compile": loaded - imported},
    }
    socket.send_fds(channel, [json.dumps(reply).encode()], [*maps, resolver.fd, *attached])
    os._exit(0)  # a tidy exit would detach what was just passed on


def _attachments(program: object) -> list[int]:
    """BCC attached every program by its name as it loaded; these descriptors keep it so."""
    raw = getattr(program, "raw_tracepoint_fds", {})
    perf = getattr(program, "tracepoint_fds", {})
    found = {(k.decode() if isinstance(k, bytes) else k): fd for k, fd in {**raw, **perf}.items()}
    missing = [name for name in (*RAW_TRACEPOINTS, *TRACEPOINTS) if name not in found]
    if missing:
        raise SystemExit(f"not attached: {', '.join(missing)}")
    return list(found.values())


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as inherited:
        _load(inherited, int(sys.argv[2]))
