"""The dependency rules of docs/architecture.md, checked on the sources."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SERVICES = sorted(path.name for path in (ROOT / "services").iterdir() if (path / "__init__.py").exists())
LIGHT = ("attestor", "gateway", "he_lora")
"""Services that run without `HEAVY`, the coprocessor and the attestor on Python 3.10 too."""
# Lowest first. A package may import from its own layer and from those below.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "settings", "crypto", "observability"}),
    frozenset({"rpc"}),
    frozenset({"ckks"}),
    frozenset({"engines"}),
    frozenset({"lora"}),
    frozenset({"package", "models"}),
    frozenset({"evidence", "store"}),
    frozenset({"session"}),
    frozenset({"stack"}),
    frozenset({"backends"}),
    frozenset({"cli"}),
)
NOT_PRODUCT = {"benchmarks", "docker", "examples", "fuzz", "scripts", "tests"}
HEAVY = {"torch", "vllm", "transformers"}


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """Of the source, as Python 3.10 reads it."""
    return tuple(ast.walk(ast.parse(path.read_text(), str(path), feature_version=(3, 10))))


@cache
def imported_modules(path: Path, package: str) -> frozenset[str]:
    """Absolute names of the modules `path` imports, at its top, in functions and for type checking."""
    return frozenset(_imports(path, package))


def _imports(path: Path, package: str) -> Iterator[str]:
    for node in nodes(path):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}"


def sources(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.rglob("*.py")):
        if "generated" not in path.parts:
            yield path, ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])


def layer_of(component: str) -> int | None:
    return next((i for i, names in enumerate(LAYERS) if component in names), None)


@cache
def ours() -> dict[str, tuple[Path, str]]:
    """Every module of the library and the services, with its path and package."""
    found = {}
    for top in ("tensorguard", "services"):
        for path, package in sources(ROOT / top):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = (path, package)
    return found


@cache
def reached(service: str) -> dict[str, frozenset[str]]:
    """The modules that a service may ever load, lazily or not, with what each of them imports."""
    modules: dict[str, tuple[Path, str]] = ours()
    found: dict[str, frozenset[str]] = {}
    waiting = [name for name in modules if name.split(".")[:2] == ["services", service]]
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        path, package = modules[module]
        found[module] = imported_modules(path, package)
        if path.name == "__init__.py" and "def __getattr__" in path.read_text():
            waiting += [name for name in modules if name.startswith(f"{module}.")]  # by name, when asked for
        for name in found[module]:
            parts = name.split(".")
            waiting += [parent for end in range(len(parts)) if (parent := ".".join(parts[: end + 1])) in modules]
    return found


def test_the_documented_services_are_all_there_is() -> None:
    described = set(re.findall(r"^\| `services/(\w+)` \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE))
    contracts = {path.name for path in (ROOT / "protos/tensafe").iterdir()}
    assert set(SERVICES) == described == contracts


def test_the_documented_layers_are_these() -> None:
    """The table of docs/architecture.md has the layers of `LAYERS`, some of them joined, from the top down."""
    text = (ROOT / "docs/architecture.md").read_text()
    rows = text[text.index("| layer | packages |") :].split("\n\n")[0].splitlines()[2:]
    documented = [{name.split(".")[0] for name in re.findall(r"`(\w[\w.]*)`", row)} for row in reversed(rows)]
    numbers = [{layer_of(name) for name in names if layer_of(name) is not None} for names in documented]
    assert set().union(*numbers) == set(range(len(LAYERS)))
    assert all(max(lower) < min(upper) for lower, upper in itertools.pairwise(numbers))
    packages = {path.name for path in (ROOT / "tensorguard").iterdir() if (path / "__init__.py").exists()}
    assert packages <= set().union(*documented)


def test_product_imports_nothing_else_of_this_repository() -> None:
    for module, (path, package) in ours().items():
        for name in imported_modules(path, package):
            assert name.split(".")[0] not in NOT_PRODUCT, f"{module} imports {name}"


def test_library_never_imports_services() -> None:
    for path, package in sources(ROOT / "tensorguard"):
        for name in imported_modules(path, package):
            assert name.split(".")[0] != "services", f"{path} imports {name}"


def test_services_do_not_import_each_other() -> None:
    for path, package in sources(ROOT / "services"):
        own = path.relative_to(ROOT / "services").parts[0]
        for name in imported_modules(path, package):
            if name.split(".")[0] == "services":
                assert name.split(".")[1:2] == [own], f"{path} imports {name}"


def test_library_layers_point_downward() -> None:
    for path, package in sources(ROOT / "tensorguard"):
        parts = path.relative_to(ROOT / "tensorguard").parts
        own = layer_of(Path(parts[0]).stem)
        if own is None:
            assert parts == ("__init__.py",), f"{path} is in no layer: add it to LAYERS and docs/architecture.md"
            continue
        for name in imported_modules(path, package):
            pieces = name.split(".")
            if pieces[0] == "tensorguard" and len(pieces) > 1 and pieces[1] != "__version__":
                other = layer_of(pieces[1])
                assert other is not None and other <= own, f"{path} imports {name} from a higher layer"


@pytest.mark.parametrize("service", LIGHT)
def test_light_services_reach_neither_torch_nor_vllm(service: str) -> None:
    """Nor would they when a function imports something."""
    found = reached(service)
    assert len(found) > 20
    for module, imported in found.items():
        heavy = {name for name in imported if name.split(".")[0] in HEAVY}
        assert not heavy, f"{module}, which {service} may load, imports {sorted(heavy)}"


@pytest.mark.parametrize("service", LIGHT)
def test_light_services_load_neither_torch_nor_vllm(service: str) -> None:
    code = f"import services.{service}.__main__, sys; print(sorted({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_product_is_written_for_python_310() -> None:
    """Syntax, as everything here is parsed for it; the standard library's part is mypy's, told the same version."""
    assert all(nodes(path) for path, _ in ours().values() if path.stat().st_size)
    settings = (ROOT / "pyproject.toml").read_text()
    assert 'requires-python = ">=3.10,' in settings and 'python_version = "3.10"' in settings


def test_only_the_launcher_names_services() -> None:
    """It starts them as processes; nobody loads them by a name in a string."""
    for path, _ in sources(ROOT / "tensorguard"):
        if "stack" in path.relative_to(ROOT / "tensorguard").parts:
            continue
        for node in nodes(path):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.match(r"services\.\w+", node.value), f"{path} has {node.value!r}"
