"""Imports point one way, and pure modules stay pure."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "prism"

COMMON = {
    "types",
    "errors",
    "messages",
    "config",
    "configfile",
    "clock",
    "metrics",
    "stalls",
    "transport",
    "logs",
    "modelspec",
    "costs",
    "modes",
    "profile",
    "outputs",
    "tenants",
    "fields",
    "yamlfile",
}
ALLOWED = {
    "memory": {"memory"},
    "weights": {"weights", "memory"},
    "attention": {"attention", "memory"},
    "models": {"models", "attention", "memory"},
    "engine": {"engine", "models", "attention", "memory"},
    "worker": {"worker", "engine", "models", "attention", "weights", "memory"},
    "gateway": {"gateway"},
    "controller": {"controller"},
    "agent": {"agent", "weights", "memory"},
    "demo": {"demo"},
    "bench": {"bench", "sim"},
    "calibration": {"calibration", "worker", "engine", "models", "weights", "memory"},
    "sim": {"sim", "engine", "worker", "controller", "gateway"},
}
"""Which packages a package may import besides the common modules; `cli` may import everything."""

ENTRY_POINTS = {"agent/child.py"}
"""The first code of every process, which hands over to its role."""

PURE = [
    "costs.py",
    "modes.py",
    "memory/slabs.py",
    "memory/ledger.py",
    "engine/kv_layout.py",
    "engine/kv_blocks.py",
    "engine/host_blocks.py",
    "engine/sequence.py",
    "engine/scheduler.py",
    "engine/randomness.py",
    "worker/snapshot.py",
    "worker/admission.py",
    "worker/ahead.py",
    "worker/on_time.py",
    "worker/shares.py",
    "worker/timeshare.py",
    "worker/turns.py",
    "worker/usage.py",
    "worker/reclaim.py",
    "worker/kv_costs.py",
    "worker/foresight.py",
    "worker/growth.py",
    "worker/standstill.py",
    "worker/offers.py",
    "worker/copies.py",
    "controller/snapshot.py",
    "controller/decisions.py",
    "controller/pressure.py",
    "controller/homes.py",
    "controller/replicas.py",
    "controller/placement.py",
    "controller/demand.py",
    "controller/migration.py",
    "controller/moves.py",
    "controller/placer.py",
    "controller/state.py",
    "controller/views.py",
    "gateway/routing.py",
    "gateway/requests.py",
    "agent/backoff.py",
]
IMPURE = {"torch", "asyncio", "time", "random", "logging", "zmq", "threading", "socket"}
WITHOUT_TORCH = ("gateway", "controller", "agent", "sim", "bench")


def imports(path: Path) -> set[str]:
    """All modules that a file imports, wherever in it, except for type checking."""
    tree = ast.parse(path.read_text())
    typing_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            is_package = (ROOT.parent / node.module.replace(".", "/")).is_dir()
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if is_package else {node.module}
    return found


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_point_one_way(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        if str(path.relative_to(ROOT)) in ENTRY_POINTS:
            continue
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "prism" and len(parts) > 1:
                assert parts[1] in ALLOWED[package] | COMMON | {"__version__"}, f"{path} imports {name}"


def test_common_modules_import_only_one_another() -> None:
    for path in ROOT.glob("*.py"):
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "prism" and len(parts) > 1:
                assert parts[1] in COMMON, f"{path} imports {name}"


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_stay_pure(name: str) -> None:
    path = ROOT / name
    impure = {module.split(".")[0] for module in imports(path)} & IMPURE
    assert not impure, f"{name} imports {impure}"


def test_control_plane_imports_no_torch() -> None:
    for package in WITHOUT_TORCH:
        for path in (ROOT / package).rglob("*.py"):
            assert not any(name.split(".")[0] == "torch" for name in imports(path)), path


def test_the_simulator_uses_pure_modules_alone() -> None:
    pure = {f"prism.{name.removesuffix('.py').replace('/', '.')}" for name in PURE}
    for path in sorted((ROOT / "sim").rglob("*.py")):
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "prism" and len(parts) > 2 and parts[1] not in COMMON | {"sim"}:
                assert name in pure, f"{path} imports {name}"


def test_every_package_is_listed() -> None:
    packages = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert packages <= set(ALLOWED) | {"cli"}


def test_tests_mirror_the_package() -> None:
    packages = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    missing = {name for name in packages if not list((ROOT.parent / "tests" / name).glob("test_*.py"))}
    assert not missing, f"no tests for {missing}"
