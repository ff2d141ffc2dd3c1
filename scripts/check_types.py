"""Strict types of the package and of all scripts, in one run of mypy.

mypy's command takes no scripts that are all called run.py, in folders whose names are no names of packages.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from mypy.build import build
from mypy.errors import CompileError
from mypy.main import process_options
from mypy.modulefinder import BuildSource
from mypy.util import hard_exit

FOLDERS = ("benchmarks", "scripts")


def module_name(path: Path) -> str:
    """What others import it by; nobody imports a run.py."""
    return f"run of {path.parent.name}" if path.name == "run.py" else path.stem


def scripts() -> list[BuildSource]:
    """All of them; each finds others in its own folder, and in those that any script is in."""
    paths = [path for folder in FOLDERS for path in sorted(Path(folder).rglob("*.py"))]
    names = Counter(module_name(path) for path in paths)
    if twice := [str(path) for path in paths if names[module_name(path)] > 1]:
        raise SystemExit(f"what imports one of these might mean another: {', '.join(twice)}")
    return [BuildSource(str(path), module_name(path), base_dir=str(path.parent)) for path in paths]


def main() -> None:
    """The exit status is 1 if there are errors."""
    package, options = process_options([])
    sources = package + scripts()
    try:
        result = build(sources, options)
        errors = result.errors
    except CompileError as error:
        errors = error.messages
    print("\n".join(errors) or f"mypy: {len(sources)} files, no errors")
    hard_exit(int(bool(errors)))  # `result` stays alive: freeing it takes 20 s if nothing came from the cache


if __name__ == "__main__":
    main()
