"""Find kernel headers for BCC.

BCC wants a headers tree even for programs that take no struct from it. Ours take only pt_regs,
which is ABI, so a tree of another kernel version serves where the running kernel's is not there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ASSEMBLED = Path("/var/cache/crtrace/headers")
"""Where ``scripts/setup`` puts a tree together from the distribution's packages."""


@dataclass(frozen=True, slots=True)
class Headers:
    """A tree for ``BCC_KERNEL_SOURCE``; ``path`` is empty where BCC finds its own way."""

    path: str
    source: str


def find_headers() -> Headers | None:
    """The best tree there is: the running kernel's, else kheaders, else the distribution's."""
    if given := os.environ.get("BCC_KERNEL_SOURCE"):
        return Headers(given, "BCC_KERNEL_SOURCE")
    release = os.uname().release
    if Path(f"/lib/modules/{release}/build/include").is_dir():
        return Headers("", f"installed for {release}")
    if Path("/sys/kernel/kheaders.tar.xz").exists():
        return Headers("", "kheaders")
    for tree in _newest_first(ASSEMBLED):
        return Headers(str(tree), f"distribution's {tree.name}")
    return None


def _newest_first(folder: Path) -> Iterable[Path]:
    trees = [path for path in folder.glob("*") if (path / "include").is_dir()]
    return sorted(trees, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)], reverse=True)
