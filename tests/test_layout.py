"""What imports what: the order that docs/architecture.md gives, and research apart from everything else."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "slrprop"


def modules() -> dict[str, ast.Module]:
    """All modules of the package, by name, parsed."""
    names = {path: ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts) for path in SOURCE.rglob("*.py")}
    return {name.removesuffix(".__init__"): ast.parse(path.read_text()) for path, name in names.items()}


MODULES = modules()


def imported(tree: ast.AST, everywhere: bool = True) -> set[str]:
    """Modules that a module imports; as long as it is not called, where not ``everywhere``."""
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & MODULES.keys() or {node.module}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in MODULES:
            found.add(node.value)  # importlib's
    return found


def test_nothing_but_the_command_line_imports_research() -> None:
    users = {
        name: reached
        for name, tree in MODULES.items()
        if not name.startswith("slrprop.research")
        and (reached := {other for other in imported(tree) if re.match(r"slrprop\.research\b", other)})
    }
    assert users.keys() == {"slrprop.cli"}
    assert all(name.endswith(".commands") for name in users["slrprop.cli"])


def test_the_command_line_loads_no_package_of_an_extra() -> None:
    known, waiting = set(), {"slrprop.cli"}
    while waiting:
        name = waiting.pop()
        known.add(name)
        above = {name.rpartition(".")[0]} if name in MODULES else set()
        waiting |= (imported(MODULES[name], False) if name in MODULES else set()) | above - {""}
        waiting -= known
    print(sorted(known))


def test_modules_import_only_what_stands_above_them() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    order: dict[str, int] = {}
    for place, row in enumerate(re.findall(r"(?m)^\| (`.*?) \|", text)):
        order |= dict.fromkeys(re.findall(r"`(\w+)/?`", row), place)
    missing = {name.split(".")[1] for name in MODULES if "." in name} - order.keys()
    print("missing", missing)
    for name, tree in MODULES.items():
        for other in imported(tree):
            if "." in name and other.startswith("slrprop."):
                one, two = name.split(".")[1], other.split(".")[1]
                if one in order and two in order and order[two] > order[one]:
                    print(name, other)
    assert 0
