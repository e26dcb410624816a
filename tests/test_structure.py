"""The house is built as the README says: every module on its floor, importing only from lower ones."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sharded_dadamw"


def floors_in_the_readme() -> dict[str, int]:
    rows = re.findall(r"^\| (\d) \| `([\w/]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    return {module: int(floor) for floor, module in rows}


def modules() -> dict[str, Path]:
    """Every module by its path below the package, without the packages' lists of public names."""
    paths = [path for path in PACKAGE.rglob("*.py") if path.stem != "__init__"]
    return {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in paths}


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


def test_the_readme_lists_every_module() -> None:
    assert floors_in_the_readme().keys() == modules().keys()


def test_modules_import_only_from_lower_floors() -> None:
    floors = floors_in_the_readme()
    uphill = [
        f"{module} (floor {floors[module]}) imports {imported} (floor {floors[imported]})"
        for module, path in modules().items()
        for imported in modules_imported_by(path)
        if floors[imported] >= floors[module]
    ]
    assert not uphill


def test_nothing_is_imported_inside_a_function() -> None:
    for path in PACKAGE.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                late = [node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)]
                assert not late, f"{path.name}: {function.name} imports"


def test_only_the_verbs_and_their_choice_call_torch_distributed() -> None:
    """Others may name its types and reduction operators."""
    for path in PACKAGE.rglob("*.py"):
        if path.stem not in ("collectives", "exchange", "connect"):
            calls = re.findall(r"dist\.[a-z_]+\(", path.read_text())
            assert not calls, f"{path.name} calls {calls}"
