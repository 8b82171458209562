"""Process events and accounting over netlink, by pyroute2.

The proc connector reports every fork, exec and exit of the machine; it reaches only listeners in
the initial PID namespace. Elsewhere a pidfd still tells of exits, and the session itself notices
an exec when it next looks at the address space.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from crtrace.errors import TargetGone
from crtrace.linux.procfs import Process
from crtrace.units import Pid

_INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO, the inode that the kernel gives it


@dataclass(frozen=True, slots=True)
class ProcessEvent:
    """``kind`` is fork, exec or exit; ``status`` a wait status, for exits."""

    kind: str
    pid: Pid
    parent: Pid
    status: int


class ProcessEvents:
    """A subscription to the proc connector, to be waited for with ``select`` by :attr:`fd`."""

    def __init__(self) -> None:
        from pyroute2.netlink.connector.cn_proc import ProcEventSocket

        self._socket = ProcEventSocket()
        self._socket.bind()
        self._socket.control(listen=True)
        self.fd: int = self._socket.fileno()

    def close(self) -> None:
        """End the subscription."""
        self._socket.close()

    def read(self) -> Iterator[ProcessEvent]:
        """The events of whole processes that have come; call it when :attr:`fd` is readable."""
        for message in self._socket.get():
            event = _decode(message)
            if event:
                yield event


def _decode(message: Any) -> ProcessEvent | None:
    kind = message["event"]
    if kind == "PROC_EVENT_FORK" and message["child_pid"] == message["child_tgid"]:
        return ProcessEvent("fork", Pid(message["child_tgid"]), Pid(message["parent_tgid"]), 0)
    if kind == "PROC_EVENT_EXEC":
        return ProcessEvent("exec", Pid(message["process_tgid"]), Pid(0), 0)
    if kind == "PROC_EVENT_EXIT" and message["process_pid"] == message["process_tgid"]:
        return ProcessEvent("exit", Pid(message["process_tgid"]), Pid(0), message["exit_code"])
    return None


def open_events() -> ProcessEvents | None:
    """A subscription, or None where the proc connector cannot be heard."""
    if os.stat("/proc/self/ns/pid").st_ino != _INITIAL_PID_NAMESPACE:
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

    def totals(self, process: Process) -> dict[str, int]:
        """Sums over all threads: faults, CPU time and delays in ns, context switches."""
        totals = dict.fromkeys(_PAID.values(), 0)
        try:
            threads = process.threads()
        except TargetGone:
            return totals
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
