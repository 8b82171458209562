"""Whether this process may do what watching takes."""

from __future__ import annotations

from crtrace.errors import NotPermitted
from crtrace.linux.procfs import parse_status

CAPABILITIES = {
    "CAP_SYS_PTRACE": 1 << 19,
    "CAP_SYS_ADMIN": 1 << 21,
    "CAP_PERFMON": 1 << 38,
    "CAP_BPF": 1 << 39,
    "CAP_CHECKPOINT_RESTORE": 1 << 40,
}
STAND_INS = {"CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE"}
"""What CAP_SYS_ADMIN includes."""


def missing_capabilities() -> list[str]:
    """Names of the capabilities that watching needs and this process has not got.

    CAP_SYS_ADMIN itself is not needed where the finer ones are granted.
    """
    with open("/proc/self/status") as file:
        effective = int(parse_status(file.read())["CapEff"], 16)
    admin = effective & CAPABILITIES["CAP_SYS_ADMIN"]
    return [
        name
        for name, bit in CAPABILITIES.items()
        if name != "CAP_SYS_ADMIN" and not effective & bit and not (admin and name in STAND_INS)
    ]


def require_capabilities() -> None:
    """Raise ``NotPermitted`` naming what is missing."""
    if missing := missing_capabilities():
        raise NotPermitted(
            f"watching a process needs {', '.join(missing)}",
            hint="run as root: sudo scripts/crtrace …",
        )
