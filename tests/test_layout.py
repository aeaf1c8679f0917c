"""What imports what: the order that docs/architecture.md gives, and research apart from everything else."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import FunctionType, ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import slrprop

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


WITHOUT = """
import os, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in os.environ["BLOCKED"].split():
            raise AssertionError(f"{name} was loaded")
sys.meta_path.insert(0, Blocked())
"""
HEAVY = "torch sklearn scipy onnxruntime"


def without(blocked: str, code: str, *arguments: object) -> str:
    """What a fresh interpreter prints that can't load these packages."""
    given = os.environ | {"BLOCKED": blocked}
    command = [sys.executable, "-c", WITHOUT + code, *map(str, arguments)]
    done = subprocess.run(command, env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def many_kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with every kind of layer, a batch norm and activations between them, one of those written as two nodes."""
    random = np.random.default_rng(0)
    sizes = {
        "table": (9, 12),
        "kernel": (5, 4, 3),
        "turned": (5, 6, 2),
        "w": (24, 16),
        "v": (16, 3),
        "b": (16,),
        "n": (5,),
    }
    tensors = {name: random.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    tensors["n"] = np.abs(tensors["n"])
    node = helper.make_node
    nodes = [
        node("Gather", ["table", "ids"], ["rows"], "table"), node("Conv", ["rows", "kernel"], ["c"], "same", auto_pad="SAME_UPPER", strides=[1]),
        node("BatchNormalization", ["c", "n", "n", "n", "n"], ["d"]), node("ConvTranspose", ["d", "turned"], ["e"], "turned", strides=[2]),
        node("Relu", ["e"], ["r"]), node("ReduceMean", ["r"], ["f"], axes=[1], keepdims=0), node("Gemm", ["f", "w", "b"], ["g"], "first"),
        node("Sigmoid", ["g"], ["i"]), node("Mul", ["i", "g"], ["j"]), node("MatMul", ["j", "v"], ["y"], "last"),
    ]  # fmt: skip
    ends = [helper.make_tensor_value_info(name, kind, sides) for name, kind, sides in (("ids", TensorProto.INT64, ["N", 4]), ("y", TensorProto.FLOAT, ["N", 3]))]  # fmt: skip
    stored = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    path = tmp_path_factory.mktemp("kinds") / "m.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], stored), opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)  # fmt: skip
    return path


def test_inspecting_a_file_loads_nothing_that_computes(many_kinds: Path) -> None:
    run = "from slrprop.cli import main; main()"
    shown = json.loads(without(HEAVY, run, "inspect", many_kinds, "--json"))
    assert [layer["name"] for layer in shown] == ["table", "same", "turned", "first", "last"]
    assert [layer["shape"] for layer in shown] == [[9, 12], [12, 5], [5 * 2, 6], [24, 16], [16, 3]]
    found = slrprop.inspect(many_kinds)
    asked = "import slrprop; found = slrprop.inspect(sys.argv[1]); print(found)"
    assert without(HEAVY, asked, many_kinds).strip() == str(found)
    told = without(HEAVY, run, "inspect", many_kinds)
    assert found.other and found.other in told and "first" in told
    whole = slrprop.network.open_network(many_kinds, None)
    for layer in found:
        known = whole.layers[layer.name]
        assert layer.shape == known.shape == tuple(whole.weight(layer.name).shape) and layer.tied_to == known.tied


def test_help_and_version_load_no_arrays() -> None:
    run = "from slrprop.cli import main; main()"
    assert without(f"{HEAVY} numpy onnx tqdm", run, "--version").strip() == slrprop.__version__
    for command in ([], ["compress"], ["inspect"], ["paper", "run"]):
        assert "Usage" in without(f"{HEAVY} numpy onnx tqdm", run, *command, "--help")
    told = without(f"{HEAVY} numpy onnx tqdm", "import slrprop; print(*dir(slrprop)); print(slrprop.SlrpropError)")
    assert set(slrprop.__all__) <= {*told.split()}


def test_a_name_that_is_a_module_too_is_the_function_whatever_is_loaded_first(many_kinds: Path, tmp_path: Path) -> None:
    twice = [name for name in slrprop.__all__ if f"slrprop.{name}" in MODULES]
    assert sorted(twice) == ["measure", "plan", "relevance", "tune"]
    np.savez(tmp_path / "d.npz", ids=np.random.default_rng(0).integers(0, 9, (12, 4)), targets=np.arange(12) % 3)
    code = """
import slrprop.measure, slrprop.plan, slrprop.relevance.cost, slrprop.tune
print(slrprop.measure(sys.argv[1], sys.argv[2]).accuracy > 0, slrprop.plan(sys.argv[1], None, method="svd", rank=2).layers[0].name)
from slrprop.plan import Plan
from slrprop import measure, plan, relevance, tune
print(Plan is slrprop.Plan, tune is slrprop.tune, callable(tune), callable(relevance.cost), slrprop.data.Data.__name__)
"""
    assert without("", code, many_kinds, tmp_path / "d.npz") == "True table\nTrue True True True Data\n"


def test_every_public_name_is_one_and_the_same_everywhere() -> None:
    star: dict[str, object] = {}
    exec("from slrprop import *", star)
    assert sorted(slrprop.__all__) == sorted(set(slrprop.__all__)) == sorted(star.keys() - {"__builtins__"})
    for name, value in star.items():
        assert name == "__builtins__" or (value is getattr(slrprop, name) and name in dir(slrprop))
    assert isinstance(slrprop.plan, FunctionType) and isinstance(slrprop.relevance, ModuleType)
    assert slrprop.relevance.cost.__module__ == "slrprop.relevance"
    with pytest.raises(AttributeError, match="module 'slrprop' has no attribute 'quantise'"):
        slrprop.quantise  # noqa: B018
    typed = {
        alias.asname
        for node in ast.walk(MODULES["slrprop"])
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed - {None} == {*slrprop.__all__}, "what type checkers are told is what there is"


ENTRIES = ("slrprop.export", "slrprop.network.onnx.file", "slrprop.cli")


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_runtime_is_told_to_send_nothing_before_it_is_loaded(entry: str, many_kinds: Path) -> None:
    code = """
import importlib
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            print(os.environ.get("ORT_DISABLE_TELEMETRY"))
            raise SystemExit
os.environ.pop("ORT_DISABLE_TELEMETRY", None)
sys.meta_path.insert(0, Watch())
importlib.import_module(sys.argv[1])
from slrprop.network.onnx.file import OnnxFile
OnnxFile.open(sys.argv[2]).session(["y"])
"""
    assert without("", code, entry, many_kinds) == "1\n"
