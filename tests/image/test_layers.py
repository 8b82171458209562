"""The image layer works anywhere: it knows nothing of live processes, and one module knows LZ4."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import crtrace

ROOT = Path(crtrace.__file__).parent
OURS = {"image": {"image"}, "analyze": {"image", "analyze"}, "export": {"image", "export"}}
MODULES = [path for layer in OURS for path in sorted((ROOT / layer).glob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, "imports are absolute"
            assert node.level == 0, "imports are absolute"
            yield node.module


def allowed(layer: str) -> set[str]:
    return {"errors", "units", *OURS[layer]}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_module_imports_only_what_its_layer_may(path: Path) -> None:
    for name in imports(path):
        first, _, rest = name.partition(".")
        if first == "crtrace":
            assert rest.split(".")[0] in allowed(path.parent.name), name
        elif first == "lz4":
            assert path.name == "codec.py"
        else:
            assert first in sys.stdlib_module_names | {"numpy", "xxhash"}, name
        assert first not in ("ctypes", "click")


def test_there_are_modules_to_look_at() -> None:
    assert len(MODULES) > 20
