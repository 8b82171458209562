"""Process events and accounting over netlink, by pyroute2.

The proc connector reports every fork, exec and exit of the machine; it reaches only listeners in
the initial PID namespace. Elsewhere a pidfd still tells of exits, and the session itself notices
an exec when it next looks at the address space.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from crtrace.errors import CrtraceError
from crtrace.linux.procfs import Process
from crtrace.units import Pid

_INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO, the inode that the kernel gives it

_NETLINK_CONNECTOR, _NLMSG_DONE, _SO_RCVBUFFORCE = 11, 3, 33
_ROOM = 4 << 20  # bytes; each event takes some 800 of them


@dataclass(frozen=True, slots=True)
class ProcessEvent:
    """``kind`` is fork, exec or exit; ``status`` a wait status, for exits."""

    kind: str
    pid: Pid
    parent: Pid
    status: int


class ProcessEvents:
    """A subscription to the proc connector, to be waited for with ``select`` by :attr:`fd`.

    The messages are pyroute2's; the socket is a plain one, because theirs reads ahead into a
    queue, after which ``select`` no longer tells that something is there.
    """

    def __init__(self) -> None:
        from pyroute2.netlink.connector import cn_proc

        marshal = cn_proc.ProcEventMarshal()
        # It would decode the new name of a process, anybody's, which need not be UTF-8.
        marshal.msg_map[cn_proc.PROC_EVENT_COMM] = cn_proc.proc_event_base
        self._parse = marshal.parse
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, _NETLINK_CONNECTOR
        )
        self.fd = self._socket.fileno()
        self.overflowed = False
        with suppress(PermissionError):
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _ROOM)
        self._socket.bind((0, cn_proc.CN_IDX_PROC))
        self._socket.send(_subscription(cn_proc))

    def close(self) -> None:
        """End the subscription."""
        self._socket.close()

    def read(self) -> list[ProcessEvent]:
        """The events of whole processes that have come; never waits.

        When the machine forks faster than we read, the kernel drops events; ``overflowed`` tells.
        """
        found: list[ProcessEvent] = []
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.overflowed = True
                continue
            found += [event for message in self._parse(data) if (event := _decode(message))]


def _subscription(cn_proc: Any) -> bytes:
    message = cn_proc.proc_event_control()
    message["action"] = cn_proc.PROC_CN_MCAST_LISTEN
    message["idx"], message["val"], message["len"] = cn_proc.CN_IDX_PROC, cn_proc.CN_VAL_PROC, 4
    message["header"]["type"] = _NLMSG_DONE
    message.encode()
    return bytes(message.data)


def _decode(message: Any) -> ProcessEvent | None:
    kind = message["event"]
    if kind == "PROC_EVENT_FORK" and message["child_pid"] == message["child_tgid"]:
        return ProcessEvent("fork", Pid(message["child_tgid"]), Pid(message["parent_tgid"]), 0)
    if kind == "PROC_EVENT_EXEC":
        return ProcessEvent("exec", Pid(message["process_tgid"]), Pid(0), 0)
    if kind == "PROC_EVENT_EXIT" and message["process_pid"] == message["process_tgid"]:
        return ProcessEvent("exit", Pid(message["process_tgid"]), Pid(0), message["exit_code"])
    return None


def in_initial_pid_namespace() -> bool:
    """Whether process numbers are the kernel's own here."""
    return os.stat("/proc/self/ns/pid").st_ino == _INITIAL_PID_NAMESPACE


def open_events() -> ProcessEvents | None:
    """A subscription, or None where the proc connector cannot be heard."""
    if not in_initial_pid_namespace():
        return None
    try:
        return ProcessEvents()
    except OSError:
        return None


_PAID = {
    "ac_minflt": "minor_faults",
    "ac_majflt": "major_faults",
    "cpu_run_real_total": "cpu_ns",
    "cpu_delay_total": "cpu_delay_ns",
    "blkio_delay_total": "blkio_delay_ns",
    "swapin_delay_total": "swapin_delay_ns",
    "nvcsw": "voluntary_switches",
    "nivcsw": "involuntary_switches",
}


class Accounting:
    """Taskstats of a process: what its living threads have paid since they began."""

    def __init__(self) -> None:
        from pyroute2.netlink.taskstats import TaskStats

        self._socket = TaskStats()
        self._socket.bind()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def totals(self, processes: Iterable[Process]) -> dict[str, int]:
        """Sums over all threads: faults, CPU time and delays in ns, context switches."""
        totals = dict.fromkeys(_PAID.values(), 0)
        threads: list[Pid] = []
        for process in processes:
            with suppress(CrtraceError):
                threads += process.threads()
        for tid in threads:
            for name, value in self._thread(tid).items():
                if name in _PAID:
                    totals[_PAID[name]] += value
        return totals

    def _thread(self, tid: Pid) -> dict[str, Any]:
        try:
            (reply,) = self._socket.get_pid_stat(tid)
        except Exception:  # a thread that is gone comes back as one of several library errors
            return {}
        group = reply.get_attr("TASKSTATS_TYPE_AGGR_PID")
        stats = group.get_attr("TASKSTATS_TYPE_STATS") if group else None
        return dict(stats) if stats else {}


def open_accounting() -> Accounting | None:
    """Taskstats, or None where the kernel or our privileges do not allow it."""
    try:
        return Accounting()
    except Exception:  # the library wraps the refusal in several of its own types
        return None
