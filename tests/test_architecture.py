"""The dependency rules of docs/architecture.md, checked on the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SERVICES = ("attestor", "he_lora", "inference", "gateway")
# Lowest first. A package may import from its own layer and from those below.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "settings", "crypto", "observability"}),
    frozenset({"rpc"}),
    frozenset({"ckks"}),
    frozenset({"engines"}),
    frozenset({"lora"}),
    frozenset({"package", "models"}),
    frozenset({"evidence"}),
    frozenset({"session"}),
    frozenset({"stack"}),
    frozenset({"backends"}),
    frozenset({"cli"}),
)
HEAVY = {"torch", "vllm", "transformers"}


def imported_modules(path: Path, package: str) -> Iterator[tuple[str, bool]]:
    """Absolute names of the modules `path` imports, each with whether it is a type-checking or in-function import."""
    tree = ast.parse(path.read_text())
    top_level = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in top_level
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}", id(node) not in top_level


def sources(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.rglob("*.py")):
        if "generated" not in path.parts:
            yield path, ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])


def layer_of(component: str) -> int | None:
    return next((i for i, names in enumerate(LAYERS) if component in names), None)


def test_library_never_imports_services() -> None:
    for path, package in sources(ROOT / "tensorguard"):
        for name, _ in imported_modules(path, package):
            assert not name.startswith("services"), f"{path} imports {name}"


def test_services_do_not_import_each_other() -> None:
    for service in SERVICES:
        for path, package in sources(ROOT / "services" / service):
            for name, _ in imported_modules(path, package):
                if name.startswith("services."):
                    assert name.split(".")[1] == service, f"{path} imports {name}"


def test_library_layers_point_downward() -> None:
    for path, package in sources(ROOT / "tensorguard"):
        parts = path.relative_to(ROOT / "tensorguard").parts
        own = layer_of(Path(parts[0]).stem)
        if own is None:
            assert parts == ("__init__.py",), f"{path} is in no layer: add it to LAYERS and docs/architecture.md"
            continue
        for name, _ in imported_modules(path, package):
            pieces = name.split(".")
            if pieces[0] == "tensorguard" and len(pieces) > 1 and pieces[1] != "__version__":
                other = layer_of(pieces[1])
                assert other is not None and other <= own, f"{path} imports {name} from a higher layer"


@pytest.mark.parametrize(
    "module", ["services.he_lora.__main__", "services.attestor.__main__", "services.gateway.__main__"]
)
def test_light_services_load_neither_torch_nor_vllm(module: str) -> None:
    code = f"import {module}, sys; print(sorted({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
