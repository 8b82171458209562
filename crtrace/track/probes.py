"""Find out what this machine allows, by doing it: versions and configurations can mislead."""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from crtrace.errors import CrtraceError
from crtrace.linux.events import open_accounting, open_events
from crtrace.linux.privileges import missing_capabilities
from crtrace.linux.procfs import Process
from crtrace.linux.stop import StoppedProcess
from crtrace.track.headers import find_headers
from crtrace.track.loader import Loading
from crtrace.track.userfaultfd import try_on_ourselves
from crtrace.units import PAGE_SIZE, Pid


@dataclass(frozen=True, slots=True)
class Probe:
    """One thing that was tried. ``required``: without it ``watch`` cannot work."""

    name: str
    ok: bool
    found: str
    consequence: str = ""
    remedy: str = ""
    required: bool = True

    def to_json(self) -> dict[str, Any]:
        """A plain dict for JSON."""
        return asdict(self)


def run_probes() -> list[Probe]:
    """Every probe, the most important first. None of them raises."""
    return [probe() for probe in (
        _machine, _privileges, _write_protection, _stopping, _programs, _headers, _events,
        _accounting, _tracefs,
    )]  # fmt: skip


def _tried(what: Callable[[], str]) -> tuple[bool, str]:
    try:
        return True, what()
    except (OSError, CrtraceError) as error:
        return False, str(error)


def _machine() -> Probe:
    found = f"{platform.machine()}, pages of {mmap.PAGESIZE} bytes, Linux {os.uname().release}"
    ok = platform.machine() == "x86_64" and mmap.PAGESIZE == PAGE_SIZE
    return Probe("machine", ok, found, "registers and injection are x86-64's", "use such a machine")


def _privileges() -> Probe:
    missing = missing_capabilities()
    return Probe(
        "privileges", not missing, f"missing {', '.join(missing)}" if missing else "sufficient",
        "other processes cannot be stopped and read", "run as root",
    )  # fmt: skip


def _write_protection() -> Probe:
    ok, found = _tried(_arm_ourselves)
    return Probe(
        "userfaultfd write protection", ok, found,
        "watch reads all memory in each pause and compares it, so the pause grows with the target",
        "Linux 6.7 or later, with CONFIG_USERFAULTFD", required=False,
    )  # fmt: skip


def _arm_ourselves() -> str:
    try_on_ourselves()
    return "armed, written and seen"


def _stopping() -> Probe:
    ok, found = _tried(_stop_a_child)
    return Probe(
        "ptrace", ok, found, "threads cannot be stopped nor their registers read",
        "run as root; see kernel.yama.ptrace_scope and your container's seccomp profile",
    )  # fmt: skip


def _stop_a_child() -> str:
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            with Process(Pid(child.pid)) as process, StoppedProcess(process) as stopped:
                stopped.main().capture()
                return f"stopped a process, {len(stopped.main().xstate)} bytes of extended state"
        finally:
            child.kill()


def _programs() -> Probe:
    ok, found = _tried(_load_programs)
    return Probe(
        "BPF programs", ok, found, "nothing tells what is written between epochs",
        "scripts/setup installs python3-bpfcc and headers; CONFIG_BPF_SYSCALL is needed",
    )  # fmt: skip


def _load_programs() -> str:
    with Loading(regions=64).result() as programs:
        return f"loaded and attached in {programs.seconds:.2f} s, {programs.origin}"


def _headers() -> Probe:
    headers = find_headers()
    return Probe(
        "kernel headers", headers is not None, headers.source if headers else "none found",
        "BCC cannot compile", "scripts/setup puts a tree together",
    )  # fmt: skip


def _events() -> Probe:
    events = open_events()
    if events:
        events.close()
    return Probe(
        "process events", events is not None, "the proc connector answers" if events else "silent",
        "an exec is noticed only at the next epoch, an exit without its status",
        "run in the initial PID namespace, with CONFIG_PROC_EVENTS", required=False,
    )  # fmt: skip


def _accounting() -> Probe:
    accounting = open_accounting()
    if accounting:
        accounting.close()
    return Probe(
        "taskstats", accounting is not None, "answers" if accounting else "silent",
        "show cannot tell what the target paid", "CONFIG_TASKSTATS is needed", required=False,
    )  # fmt: skip


def _tracefs() -> Probe:
    paths = ("/sys/kernel/tracing/events", "/sys/kernel/debug/tracing/events")
    found = next((path for path in paths if os.access(path, os.R_OK)), "")
    return Probe(
        "tracefs", bool(found), found or "not there for us", "BCC cannot attach to tracepoints",
        "mount -t tracefs tracefs /sys/kernel/tracing",
    )  # fmt: skip
