"""Find out what this machine allows, by doing it: versions and configurations can mislead.

A probe is a function that tries one thing and says what it found. It raises where the thing does
not work, and a ``hint`` of what it raises is a better remedy than the probe's own.
"""

from __future__ import annotations

import mmap
import os
import platform
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from crtrace.errors import CrtraceError, FeatureMissing
from crtrace.linux.addrspace import AddressSpace
from crtrace.linux.events import open_accounting, open_events
from crtrace.linux.memory import MemoryReader
from crtrace.linux.pagemap import OWN, scanner
from crtrace.linux.privileges import require_capabilities
from crtrace.linux.procfs import Process
from crtrace.linux.stop import StoppedProcess
from crtrace.track import choose, softdirty, userfaultfd
from crtrace.track.dirty import Coverage, WrittenPages
from crtrace.track.loader import Loading, compiled
from crtrace.units import PAGE_SIZE, Pid, merge

Importance = Literal["required", "better", "nice"]
"""Without it ``watch`` cannot work; works less well; or tells less."""
HEARD_WITHIN = 5.0
"""Seconds in which news of a process must have come."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One thing that was tried; ``remedy`` is empty where there is nothing to be done."""

    name: str
    importance: Importance
    ok: bool
    found: str
    consequence: str
    remedy: str

    def to_json(self) -> dict[str, Any]:
        """A plain dict for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Findings:
    """What all probes found."""

    probes: list[Probe]
    """The most important first."""

    @property
    def missing(self) -> list[str]:
        """Names of what is required and does not work."""
        return [each.name for each in self.probes if each.importance == "required" and not each.ok]

    @property
    def armer(self) -> str | None:
        """The way of arming that ``watch`` takes here; None if it cannot work."""
        return None if self.missing else choose.armer_name()


Try = Callable[[], str]
_PROBES: list[Callable[[], Probe]] = []


def probe(
    name: str, importance: Importance, *, follows: str, otherwise: str, remedy: str
) -> Callable[[Try], Try]:
    """Make a function a probe: what follows where it works and where it does not, and what helps.

    Of equal importance, what is a cause of others comes first.
    """

    def register(attempt: Try) -> Try:
        def run() -> Probe:
            try:
                return Probe(name, importance, True, attempt(), follows, "")
            except Exception as error:  # whatever it is, the other probes have something to say
                expected = isinstance(error, (OSError, CrtraceError))
                said = str(error) if expected else f"{type(error).__name__}: {error}"
                helps = getattr(error, "hint", "") or remedy
                return Probe(name, importance, False, said, otherwise, helps)

        _PROBES.append(run)
        return attempt

    return register


def run_probes() -> Findings:
    """Try everything. Nothing is raised, and nothing takes for ever."""
    order = get_args(Importance)
    return Findings(sorted((run() for run in _PROBES), key=lambda it: order.index(it.importance)))


# --- required -----------------------------------------------------------------------------------


@probe(
    "machine", "required",
    follows="its registers and system calls are known to crtrace",
    otherwise="registers and injected calls are x86-64's alone",
    remedy="images can be read here, but watching takes an x86-64 machine",
)  # fmt: skip
def _machine() -> str:
    found = f"{platform.machine()}, pages of {mmap.PAGESIZE} bytes, Linux {os.uname().release}"
    if platform.machine() != "x86_64" or mmap.PAGESIZE != PAGE_SIZE:
        raise FeatureMissing(found)
    return found


@probe(
    "privileges", "required",
    follows="other processes may be stopped and read, and the kernel told to look on",
    otherwise="other processes cannot be stopped and read",
    remedy="run as root",
)  # fmt: skip
def _privileges() -> str:
    require_capabilities()
    return "all that are needed"


@contextmanager
def _child() -> Iterator[Process]:
    with subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL) as child:
        try:
            with Process(Pid(child.pid)) as process:
                yield process
        finally:
            child.kill()


@probe(
    "ptrace", "required",
    follows="threads can be stopped together, and their registers are in the images",
    otherwise="threads cannot be stopped nor their registers read",
    remedy="run as root; see kernel.yama.ptrace_scope and your container's seccomp profile",
)  # fmt: skip
def _stopping() -> str:
    with _child() as process, StoppedProcess(process) as stopped:
        stopped.main().capture()
        return f"stopped a process, {len(stopped.main().xstate)} bytes of extended state"


@probe(
    "process memory", "required",
    follows="contents can be copied",
    otherwise="contents cannot be copied",
    remedy="run as root; see your container's seccomp profile for process_vm_readv",
)  # fmt: skip
def _memory() -> str:
    with _child() as process, StoppedProcess(process), closing(MemoryReader(process)) as reader:
        space = AddressSpace(process)
        space.refresh()
        with open(process.open("pagemap"), "rb", buffering=0) as pagemap:
            pages = merge(scanner(pagemap.fileno(), space).scan(OWN)[0])[:1]
        pages[:, 1] = pages[:, 0] + np.uint64(1)
        if reader.read(pages, np.empty(PAGE_SIZE, dtype=np.uint8)):
            raise FeatureMissing("a page that is there could not be read")
    return "found and read a page of another process"


@probe(
    "tracefs", "required",
    follows="BPF programs can be attached to the kernel's tracepoints",
    otherwise="BPF programs cannot be attached to the kernel's tracepoints",
    remedy="as root, mount -t tracefs tracefs /sys/kernel/tracing; into a container, from outside",
)  # fmt: skip
def _tracefs() -> str:
    folders = "/sys/kernel/tracing", "/sys/kernel/debug/tracing"
    for path in folders:
        with suppress(FileNotFoundError):
            os.listdir(f"{path}/events")
            return f"mounted on {path}"
    raise FeatureMissing(f"not mounted on {' or '.join(folders)}")


@probe(
    "BPF programs", "required",
    follows="what is written between epochs is seen as it happens",
    otherwise="nobody sees what is written between epochs",
    remedy="mend what is missing above, or the BPF compiler below; it takes CONFIG_BPF_SYSCALL",
)  # fmt: skip
def _programs() -> str:
    try:
        with Loading(regions=64).result() as programs:
            return f"loaded and attached in {programs.seconds:.2f} s, {programs.origin}"
    except FeatureMissing as error:
        raise _without_hint(error) from error


def _without_hint(error: FeatureMissing) -> FeatureMissing:
    """What the loader said has a hint to ask us."""
    return FeatureMissing(str(error).partition(": ")[2])


@probe(
    "armer", "required",
    follows="this is how watch finds what was written since the last epoch",
    otherwise="watch does what it is asked for or nothing",
    remedy=f"unset {choose.VARIABLE}",
)  # fmt: skip
def _armer() -> str:
    name = choose.armer_name()
    asked = f", as {choose.VARIABLE} asks" if os.environ.get(choose.VARIABLE) else ""
    try:
        choose.WAYS[name].try_on_ourselves()
    except (OSError, CrtraceError) as error:
        raise FeatureMissing(f"{name}{asked}, but: {error}") from error
    return name + asked


# --- better -------------------------------------------------------------------------------------


@probe(
    "userfaultfd write protection", "better",
    follows="pauses can be short: the kernel notes the first write to each page",
    otherwise="watch finds what was written in another way: see \"armer\"",
    remedy="Linux 6.7 or later, with CONFIG_USERFAULTFD",
)  # fmt: skip
def _write_protection() -> str:
    userfaultfd.try_on_ourselves()
    return "armed, written and seen"


@probe(
    "soft-dirty bits", "better",
    follows="where userfaultfd does not do it, these tell what was written",
    otherwise="where userfaultfd does not do it, all memory is read in each pause",
    remedy="none is needed with userfaultfd; else a kernel with CONFIG_MEM_SOFT_DIRTY",
)  # fmt: skip
def _soft_dirty() -> str:
    softdirty.try_on_ourselves()
    return "cleared, written and seen"


@probe(
    "BPF coverage", "better",
    follows="writes by other processes and by devices are marked, too, and pauses stay short then",
    otherwise="writes by other processes and by devices are left to scans: after one, the pause"
    " scans everything",
    remedy="a kernel with kprobes (CONFIG_KPROBE_EVENTS) and BTF (CONFIG_DEBUG_INFO_BTF)",
)  # fmt: skip
def _coverage() -> str:
    with Loading(regions=64).result() as programs:
        found = WrittenPages(programs).coverage
    if found is not Coverage.OTHERS:
        raise FeatureMissing(found)
    return found


@probe(
    "BPF compiler", "better",
    follows="BPF programs can be made anew when the kernel or crtrace is another one",
    otherwise="only code that was kept can be loaded: none after the next update",
    remedy="scripts/setup installs BCC (python3-bpfcc) and kernel headers",
)  # fmt: skip
def _compiler() -> str:
    try:
        return f"BCC, with headers {compiled().headers}"
    except FeatureMissing as error:
        raise _without_hint(error) from error


@probe(
    "process events", "better",
    follows="an exec makes an epoch at once, and it is known how processes ended",
    otherwise="an exec is noticed only at the next epoch, an exit without its status",
    remedy="run in the initial PID namespace, with CONFIG_PROC_EVENTS",
)  # fmt: skip
def _events() -> str:
    events = open_events()
    if events is None:
        raise FeatureMissing("the proc connector cannot be heard")
    deadline = time.monotonic() + HEARD_WITHIN
    with closing(events), _child() as process:
        while select.select([events.fd], [], [], max(0, deadline - time.monotonic()))[0]:
            if any(event.pid == process.pid for event in events.read()):
                return "the proc connector told of a new process"
    raise FeatureMissing("the proc connector is silent")


# --- nice ---------------------------------------------------------------------------------------


@probe(
    "taskstats", "nice",
    follows="show tells what the target paid: faults, delays, switches",
    otherwise="show cannot tell what the target paid",
    remedy="run with CAP_NET_ADMIN, on a kernel with CONFIG_TASKSTATS",
)  # fmt: skip
def _accounting() -> str:
    accounting = open_accounting()
    if accounting is None:
        raise FeatureMissing("the kernel does not answer")
    with closing(accounting), Process(Pid(os.getpid())) as process:
        if not any(accounting.totals([process]).values()):
            raise FeatureMissing("the kernel tells us nothing")
    return "faults, CPU time and delays of a process were told"
