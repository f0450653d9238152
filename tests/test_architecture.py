"""The folders and the arrows between them: kernels <- model <- pictures <- inference <- training <- export <- cli."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = (
    "kernels",
    "engine/model",
    "engine/pictures",
    "engine/inference",
    "engine/training",
    "export",
    "benchmarks",
    "cli",
)
# What each part may import besides itself. `cli` alone imports benchmarks, inside the verb.
ALLOWED = {
    "kernels": set(),
    "engine/model": {"kernels"},
    "engine/pictures": {"kernels", "engine/model"},
    "engine/inference": {"kernels", "engine/model", "engine/pictures"},
    "engine/training": {"kernels", "engine/model", "engine/pictures", "engine/inference"},
    "export": {"kernels", "engine/model", "engine/pictures", "engine/inference", "engine/training"},
    "benchmarks": {*PARTS} - {"cli"},
    "cli": {*PARTS},
    "": {"cli"},
}


def part_of(path: Path) -> str:
    """The part that a file or folder belongs to; "" at the root."""
    relative = path.relative_to(ROOT).as_posix()
    return next((part for part in PARTS if relative == part or relative.startswith(part + "/")), "")


def imports(file: Path, source: str) -> Iterator[tuple[int, Path]]:
    """Lines of a file that import from the project, and the module or package that each names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for alias in node.names:
                submodule = base / alias.name
                yield node.lineno, submodule if submodule.with_suffix(".py").is_file() or submodule.is_dir() else base
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                head, *rest = (name or "").split(".")
                if head == "trimask":
                    yield node.lineno, ROOT.joinpath(*rest)


def broken_arrows(file: Path, source: str) -> list[str]:
    part = part_of(file)
    wrong = []
    for line, target in imports(file, source):
        other = part_of(target)
        allowed = other in {part} | ALLOWED[part]
        if target == ROOT:  # `from trimask import load`, or the version: the root is lazy
            allowed = part in ("", "benchmarks", "export", "cli")
        if not allowed:
            wrong.append(f"{file.relative_to(ROOT)}:{line} ({part}) imports {target.relative_to(ROOT)} ({other})")
    return wrong


def library_files() -> list[Path]:
    files = [*ROOT.glob("*.py"), *(file for part in PARTS for file in (ROOT / part).rglob("*.py"))]
    assert len(files) > 20
    return files


def test_no_arrow_runs_back() -> None:
    assert [wrong for file in library_files() for wrong in broken_arrows(file, file.read_text())] == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("kernels/suppression.py", "from ..engine.model import boxes"),
        ("engine/model/rpn.py", "from ..inference import graph"),
        ("engine/inference/graph.py", "from ...engine.training import trainer"),
        ("engine/training/trainer.py", "import trimask.export.runtime"),
        ("engine/model/rpn.py", "from ...export import onnx"),
    ],
)
def test_an_arrow_that_runs_back_is_seen(file: str, source: str) -> None:
    assert len(broken_arrows(ROOT / file, source)) == 1


def test_nothing_imports_the_tests_or_torchvision_and_only_the_cli_the_benchmarks() -> None:
    for file in library_files():
        text = file.read_text()
        assert "import tests" not in text
        assert "from tests" not in text
        if part_of(file) != "benchmarks":
            assert "import torchvision" not in text, file
            if part_of(file) != "cli":
                assert "benchmarks" not in {part_of(target) for _, target in imports(file, text)}, file


def test_inside_the_library_imports_are_relative() -> None:
    """But for the suite, which pytest loads by its path, from a folder of whatever name."""
    for file in library_files():
        if file == ROOT / "benchmarks" / "suite.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == "trimask" for alias in node.names), file
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").split(".")[0] != "trimask", file


def test_every_package_is_listed_and_nothing_strays_at_the_root() -> None:
    """Packages are listed by name in pyproject.toml, and any module at the root ships in the wheel."""
    text = (ROOT / "pyproject.toml").read_text()
    for folder in {file.parent for file in library_files()}:
        name = ".".join(["trimask", *folder.relative_to(ROOT).parts])
        assert f'"{name}"' in text, name
    assert {file.name for file in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("trimask", "torch"),
        ("trimask.kernels", "torch"),
        ("trimask.kernels.cpu.masks", "torch"),
        ("trimask.engine.inference.result", "torch"),
        ("trimask.engine.pictures.resize", "torch"),
        ("trimask.engine.model.config", "torch"),
        ("trimask.cli", "torch"),
        ("trimask.engine.inference.predictor", "torchvision"),
    ],
)
def test_importing_stays_light(module: str, unwanted: str) -> None:
    code = f"import sys, {module}; sys.exit({unwanted!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_op_is_hidden_by_a_module_of_its_name() -> None:
    """An imported submodule becomes an attribute of its package, in front of a lazy one."""
    from trimask import kernels

    for name in kernels.__all__:
        __import__(f"trimask.kernels.{kernels._PUBLIC[name].lstrip('.')}")
        assert not isinstance(getattr(kernels, name), type(kernels)), name
