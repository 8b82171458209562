"""Whether this process may do what watching takes."""

from __future__ import annotations

import os

from crtrace.errors import NotPermitted
from crtrace.linux.procfs import parse_status

CAPABILITIES = {
    "CAP_DAC_OVERRIDE": 1 << 1,
    "CAP_DAC_READ_SEARCH": 1 << 2,
    "CAP_SYS_PTRACE": 1 << 19,
    "CAP_SYS_ADMIN": 1 << 21,
    "CAP_PERFMON": 1 << 38,
    "CAP_BPF": 1 << 39,
    "CAP_CHECKPOINT_RESTORE": 1 << 40,
}
STAND_INS = {
    "CAP_PERFMON": "CAP_SYS_ADMIN",
    "CAP_BPF": "CAP_SYS_ADMIN",
    "CAP_CHECKPOINT_RESTORE": "CAP_SYS_ADMIN",
    "CAP_DAC_READ_SEARCH": "CAP_DAC_OVERRIDE",
}
"""The capability that includes another one."""
_INITIAL_USER_NAMESPACE = 0xEFFFFFFD  # PROC_USER_INIT_INO, the inode that the kernel gives it


def missing_capabilities() -> list[str]:
    """Names of the capabilities that watching needs and this process has not got."""
    with open("/proc/self/status") as file:
        effective = int(parse_status(file.read())["CapEff"], 16)
    held = {name for name, bit in CAPABILITIES.items() if effective & bit}
    needed = ["CAP_SYS_PTRACE", *STAND_INS]
    return [name for name in needed if name not in held and STAND_INS.get(name) not in held]


def require_capabilities() -> None:
    """Raise ``NotPermitted`` naming what is missing."""
    if missing := missing_capabilities():
        inside = (
            "in a container, start it with --privileged, or with --cap-add for each "
            "and --security-opt seccomp=unconfined"
        )
        raise NotPermitted(
            f"watching a process needs {', '.join(missing)}",
            hint="run as root: sudo scripts/crtrace …" if os.geteuid() else inside,
        )
    if os.stat("/proc/self/ns/user").st_ino != _INITIAL_USER_NAMESPACE:
        raise NotPermitted(
            "the capabilities here are those of a user namespace, which count only inside of it",
            hint="run as the root of the machine; a container must not be a rootless one",
        )
