"""The house is built in floors: a module imports from its own room and from rooms on lower floors."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sharded_dadamw"

FLOORS = (
    ("config", "layout"),
    ("update", "comm"),
    ("kernels",),
    ("buckets",),
    ("norms",),
    ("schedule", "state"),
    ("base",),
    ("decoupled", "sharded"),
    ("checkpoint", "plan", "stacks"),
    ("interchange",),
    ("cli",),
)
"""The rooms, which are folders or single modules, lowest first."""


def modules() -> dict[str, Path]:
    """Every module by its path below the package, without the packages' lists of public names."""
    paths = [path for path in PACKAGE.rglob("*.py") if path.stem != "__init__"]
    return {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in paths}


def room_of(module: str) -> str:
    return module.split("/")[0]


def modules_imported_by(path: Path) -> set[str]:
    imported: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sharded_dadamw":
            below = "/".join(str(node.module).split(".")[1:])
            if below in modules():
                imported.add(below)
            else:
                imported.update(f"{below}/{alias.name}".lstrip("/") for alias in node.names)
    return imported


def test_every_room_has_a_floor() -> None:
    assert sorted(room for rooms in FLOORS for room in rooms) == sorted({room_of(module) for module in modules()})


def test_a_room_says_what_its_modules_are_for() -> None:
    for module, path in modules().items():
        about = path.with_name("__init__.py").read_text()
        assert "/" not in module or re.search(rf"\b{path.stem}\b", about), f"{about[:60]} ... is silent on {path.stem}"


def test_modules_import_only_from_their_own_room_and_from_lower_floors() -> None:
    floor_of = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    uphill = [
        f"{module} imports {imported}"
        for module, path in modules().items()
        for imported in modules_imported_by(path)
        if room_of(imported) != room_of(module) and floor_of[room_of(imported)] >= floor_of[room_of(module)]
    ]
    assert not uphill


def test_no_module_imports_more_than_ten_others() -> None:
    widths = {module: len(modules_imported_by(path)) for module, path in modules().items()}
    assert not {module for module, width in widths.items() if width > 10}


def test_no_class_has_more_than_330_lines() -> None:
    lengths = {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for path in modules().values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    assert not {name for name, length in lengths.items() if length > 330}


def test_nothing_is_imported_inside_a_function() -> None:
    for path in PACKAGE.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                late = [node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)]
                assert not late, f"{path.name}: {function.name} imports"


def test_only_the_verbs_and_their_choice_call_torch_distributed() -> None:
    """Others may name its types and reduction operators."""
    for path in PACKAGE.rglob("*.py"):
        if path.stem not in ("collectives", "messages", "connect"):
            calls = re.findall(r"dist\.[a-z_]+\(", path.read_text())
            assert not calls, f"{path.name} calls {calls}"
