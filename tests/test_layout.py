"""What imports what: the order that docs/architecture.md gives, and research apart from everything else."""

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
    for path in SOURCE.rglob("*.py")
}


def imported(name: str, called: bool = True) -> set[str]:
    """What a module imports, also by its name as text; where it is not ``called``, only what is loaded with it."""
    found = set()
    for node in ast.walk(MODULES[name]) if called else MODULES[name].body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{name}: imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & MODULES.keys() or {node.module}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in MODULES:
            found.add(node.value)
    return found


def research(names: set[str]) -> set[str]:
    return {name for name in names if re.match(r"slrprop\.research(\.|$)", name)}


def test_nothing_but_the_command_line_imports_research_and_that_only_its_commands() -> None:
    users = {name: reached for name in MODULES.keys() - research({*MODULES}) if (reached := research(imported(name)))}
    assert users.keys() == {"slrprop.cli"}
    assert all(name.endswith(".commands") for name in users["slrprop.cli"])


def test_the_command_line_loads_no_more_of_research_than_its_commands() -> None:
    """What stands in functions is loaded when they are called."""
    loaded, waiting = set(), {"slrprop.cli"}
    while waiting:
        loaded |= waiting
        within = waiting & MODULES.keys()
        waiting = set().union(*(imported(name, called=False) for name in within))
        waiting = waiting.union(name.rpartition(".")[0] for name in within) - loaded - {""}
    kinds = {"commands", "research", "paper", "comparison"}
    assert {name.rpartition(".")[2] for name in research(loaded)} == kinds
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    optional = {re.split(r"\W", need)[0] for extra in ("research", "report", "ray") for need in extras[extra]}
    assert {"matplotlib", "sqlalchemy"} <= optional and not optional & {name.split(".")[0] for name in loaded}


def test_modules_import_only_what_stands_above_them() -> None:
    """In the first table of docs/architecture.md, row by row."""
    table = (ROOT / "docs" / "architecture.md").read_text().split("\n\n")[2]
    rows = [re.findall(r"`(\w+)/?`", row.split("|")[1]) for row in table.splitlines()]
    place = {part: index for index, row in enumerate(rows) for part in row}
    parts = {name: name.split(".")[1] for name in MODULES if "." in name}
    assert place.keys() == set(parts.values())
    below = [(name, other) for name in parts for other in imported(name) & parts.keys() if place[parts[other]] > place[parts[name]]]  # fmt: skip
    assert below == []
