import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from slrprop import SlrpropError, cli
from slrprop.methods import METHODS
from slrprop.research.demo import Row

runner = CliRunner()


def test_methods_are_listed_with_needs_and_source():
    listed = {item["method"]: item for item in json.loads(runner.invoke(cli.app, ["methods", "--json"]).stdout)}
    assert listed.keys() == set(METHODS)
    assert listed["svd"]["needs"] == [] and listed["slrprop"]["needs"] == ["cost"]
    assert listed["low_rank"]["needs"] == ["inputs", "sensitivity"]
    assert "Sensors 23(5):2718" in listed["slrprop"]["source"]
    table = runner.invoke(cli.app, ["methods"]).stdout
    assert "weights only" in table and all(name in table for name in METHODS)
    one = runner.invoke(cli.app, ["methods", "slr"]).stdout
    assert re.search(r"sparsity_rate *│ *0\.5", one) and "Neurocomputing 398" in one and "cost" in one
    alone = json.loads(runner.invoke(cli.app, ["methods", "slr", "--json"]).stdout)
    assert alone == [listed["slr"]]


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["methods"],
        ["inspect"],
        ["plan"],
        ["apply"],
        ["measure"],
        ["demo"],
        ["compare"],
        ["paper", "run"],
        ["paper", "table"],
        ["paper", "figures"],
    ],
)
def test_every_command_has_help_with_an_example(command):
    result = runner.invoke(cli.app, [*command, "--help"])
    assert result.exit_code == 0 and ("Example:" in result.stdout or not command)


def test_a_mistake_is_one_sentence_and_no_traceback(tmp_path):
    command = [
        sys.executable,
        "-c",
        "from slrprop.cli import main; main()",
        "paper",
        "table",
        "vgg",
        "--run-dir",
        str(tmp_path),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert (
        result.stderr.strip()
        == "error: no experiment is called 'vgg'; there are lenet5-mnist, room-mlp, vgg16-cifar10, vgg16-cifar100"
    )


MISSING = (
    "demo: matplotlib", "paper train lenet5-mnist: pooch", "paper run lenet5-mnist: sqlalchemy", "paper run spiking-mnist: sqlalchemy",
    "paper table room-mlp: sqlalchemy", "paper figures: matplotlib", "compare room-mlp: sqlalchemy", "compare room-mlp: matplotlib",
)  # fmt: skip


@pytest.mark.parametrize("case", MISSING)
def test_a_missing_package_is_named_with_its_extra(case, monkeypatch, tmp_path):
    command, _, package = case.partition(": ")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLRPROP_DATA", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    for name in ("store", "paper.run", "paper.results", "comparison.run", "spiking_study"):
        monkeypatch.delitem(sys.modules, f"slrprop.research.{name}", raising=False)
    error = runner.invoke(cli.app, command.split()).exception
    told = f"this command needs the package '{package}'; install it with: pip install 'slrprop[research]'"
    assert isinstance(error, SlrpropError) and str(error) == told and list(tmp_path.iterdir()) == []


def test_the_demo_says_what_it_chose(monkeypatch, tmp_path):
    rows = [Row("original", 1000, 4000, 97.0, 96.0, 1e-4), Row("svd, rank 2", 100, 400, 96.5, 95.5, 2e-5)]
    monkeypatch.setattr("slrprop.research.demo.run", lambda output: (rows, rows[1]))
    text = runner.invoke(cli.app, ["demo", "--output", str(tmp_path)]).stdout
    assert "svd, rank 2: 10.0x smaller, 5.0x faster, test accuracy 96.0 -> 95.5 %" in text
    assert json.loads(runner.invoke(cli.app, ["demo", "--json"]).stdout)["chosen"] == "svd, rank 2"


def test_every_command_prints_json_on_request():
    for command in cli.app.registered_commands + cli.paper.registered_commands:
        assert "as_json" in command.callback.__annotations__, command.callback.__name__
