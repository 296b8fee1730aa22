"""Imports point down the layer picture and never up."""

from __future__ import annotations

import ast
from pathlib import Path

import fusedcomm

PACKAGE = Path(fusedcomm.__file__).parent
# From the ground up. A package may import itself and what stands on lower lines.
LAYERS = [
    {"errors"},
    {"aiter_package", "env", "native", "platform"},
    {"kernels"},
    {"ops"},
    {"comm"},
    {"groups"},
    {"collectives"},
    {"layers"},
    {"models", "speculative"},
    {"integrations"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def part_of(module: str) -> str:
    """fusedcomm.comm.plan -> comm."""
    return module.split(".")[1]


def imported_modules(path: Path) -> list[str]:
    """The modules of fusedcomm that a file imports anywhere, also inside functions and under TYPE_CHECKING."""
    package = ["fusedcomm", *path.relative_to(PACKAGE).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            # `from fusedcomm import comm` imports a part, `from fusedcomm.comm import plan` a module of it.
            found += [f"{module}.{alias.name}" for alias in node.names]
    return [module for module in found if module.split(".")[0] == "fusedcomm"]


def test_every_part_has_a_place_in_the_picture() -> None:
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert parts - {"__init__", "__main__"} <= set(LEVEL)


def test_imports_point_down() -> None:
    upward = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own in {"__init__", "__main__"}:
            continue  # the public face sees everything
        for module in imported_modules(path):
            if module == "fusedcomm" and own == "native":
                continue  # for the package's folders, where the library lies
            # Only the command line, which stands above it, goes through the public face.
            target = LEVEL.get(part_of(module)) if "." in module else None
            allowed = own == "cli" if target is None else part_of(module) == own or target < LEVEL[own]
            if not allowed:
                upward.append(f"{path.relative_to(PACKAGE)} imports {module}")
    assert upward == []
