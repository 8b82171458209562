"""Who may import whom: DESIGN.md, "Layers"."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import crtrace

ROOT = Path(crtrace.__file__).parent
MAY_USE = {
    "errors": set(),
    "units": set(),
    "faults": set(),
    "linux": set(),
    "track": {"linux"},
    "image": set(),
    "analyze": {"image"},
    "export": {"image", "analyze"},
    "rewrite": {"image", "analyze"},
    "capture": {"linux", "track", "image"},
    "demo": {"image"},
    "cli": {"linux", "track", "image", "analyze", "export", "rewrite", "capture", "demo"},
}
ONLY_IN = {
    "bcc": {"track/loader.py"},
    "pyroute2": {"linux/events.py"},
    "lz4": {"image/codec.py"},
    "xxhash": {"image/codec.py", "image/framing.py", "image/chainindex.py", "image/imagefile.py",
               "image/recordfile.py"},
    "click": {"cli"},
    "ctypes": {"linux"},
}  # fmt: skip
EVERYWHERE = {"errors", "units", "faults", "__version__"}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, "imports are absolute"
            assert node.level == 0, "imports are absolute"
            if node.module == "crtrace":
                yield from (f"crtrace.{name.name}" for name in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_its_layer_may(path: Path) -> None:
    place = str(path.relative_to(ROOT))
    layer = place.split("/", maxsplit=1)[0]
    for name in imports(path):
        first, _, rest = name.partition(".")
        if first == "crtrace":
            used = rest.split(".")[0]
            assert used in {layer, *MAY_USE[layer], *EVERYWHERE}, f"{layer} uses {name}"
        elif first in ONLY_IN:
            assert {place, layer} & ONLY_IN[first], f"{first} is for {ONLY_IN[first]} only"
        else:
            assert first in sys.stdlib_module_names | {"numpy"}, f"{name} is no dependency"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_command_line_prints(path: Path) -> None:
    if path.parent.name == "cli" or path.name == "workload.py":
        return
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    names = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
    assert not names & {"print", "exit"}


def test_every_layer_is_there() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == MAY_USE.keys() - {
        "errors", "units", "faults",
    }  # fmt: skip
