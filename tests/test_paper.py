"""The article's experiments, on a tiny network in the place of the large ones; real data where it lies."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from slrprop import SlrpropError, cli
from slrprop.research import datasets, interpret_study, spiking_study, tables
from slrprop.research.datasets import Dataset
from slrprop.research.experiments import EXPERIMENTS, find_experiment, trained
from slrprop.research.networks import LeNet5, RoomMLP
from slrprop.research.paper import results, run
from slrprop.research.paper.run import paper_store

needs_data = pytest.mark.skipif("SLRPROP_DATA" not in os.environ, reason="SLRPROP_DATA names no data folder")


@pytest.fixture(scope="module")
def tiny(digits):
    x, y = digits
    x = torch.nn.functional.interpolate(x.view(-1, 1, 8, 8), 32)
    data = Dataset(x[:600], y[:600], x[600:800], y[600:800])
    lenet = EXPERIMENTS["lenet5-mnist"]
    short = dataclasses.replace(lenet.recipe, epochs=2)
    experiment = dataclasses.replace(lenet, ranks=(2, 8), calibration=60, recipe=short, levels=("weights",))
    return experiment, data


def test_a_killed_run_goes_on_where_it_stopped(tiny, tmp_path, monkeypatch):
    experiment, data = tiny
    measured, real = [], run.measured

    def stops_at_eleven(*args):
        if len(measured) == 11:
            raise KeyboardInterrupt
        measured.append(args[1:3])
        return real(*args)

    monkeypatch.setattr(run, "measured", stops_at_eleven)
    with pytest.raises(KeyboardInterrupt):
        run.run(experiment, data, tmp_path, 1, paper_store(tmp_path / "results.sqlite"))
    monkeypatch.setattr(run, "measured", lambda *args: measured.append(args[1:3]) or real(*args))
    store = paper_store(tmp_path / "results.sqlite")
    assert len(store.results()) == 11
    assert run.run(experiment, data, tmp_path, 1, store, methods=["svd", "slr cost"]) == 1
    with pytest.raises(SlrpropError, match="method must be one of svd, slr weight, slr"):
        run.run(experiment, data, tmp_path, 1, store, methods=["slr costs"])
    assert run.run(experiment, data, tmp_path, 1, store) == 5
    assert len(set(measured)) == 17  # 8 methods x 2 ranks and the original
    assert len(measured) == 19  # the original twice more: is it the same network?
    assert run.run(experiment, data, tmp_path, 1, store) == 0

    lines = results.table(experiment, store.results(experiment.name))
    assert len(lines) == 18 and any("[21.08]" in cell for line in lines for cell in line)
    tables.write_csv(store.results(), tmp_path / "results.csv")
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 18
    results.figure(experiment, store.results(), "title").savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000

    monkeypatch.setitem(EXPERIMENTS, experiment.name, experiment)
    monkeypatch.setitem(datasets.DATASETS, experiment.dataset, lambda folder: data)
    command = ["paper", "run", experiment.name, "--seeds", "1", "--json", "--run-dir", str(tmp_path)]
    told = {"experiment": experiment.name, "new": 0, "rows": 17, "database": str(tmp_path / "results.sqlite")}
    assert json.loads(CliRunner().invoke(cli.app, command, catch_exceptions=False).stdout) == told
    elsewhere = ["--run-dir", str(tmp_path / "new"), "--rows", str(tmp_path / "results.csv"), "--method", "svd"]
    again = CliRunner().invoke(cli.app, [*command, *elsewhere], catch_exceptions=False)
    assert json.loads(again.stdout)["new"] == 0 and json.loads(again.stdout)["rows"] == 17


@pytest.mark.parametrize("study", [interpret_study, spiking_study])
def test_the_command_hands_a_study_what_it_was_told(study, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(study, "run", lambda *args, **options: asked.append((args, options)) or 0)
    monkeypatch.setitem(datasets.DATASETS, study.DATASET, lambda folder: f"what {folder} holds")
    command = [
        "paper",
        "run",
        study.NAME,
        "--seeds",
        "2",
        "--method",
        "a",
        "--data",
        "there",
        "--run-dir",
        str(tmp_path),
    ]
    found = CliRunner().invoke(cli.app, command, catch_exceptions=False).stdout
    assert found == f"0 new rows; all 0 of {study.NAME} are in {tmp_path / 'results.sqlite'}\n"
    (args, options), store = asked[0], asked[0][1].pop("store")
    assert args == ("what there holds", tmp_path) and store.name == str(tmp_path / "results.sqlite")
    assert options == {"seeds": 2, "workers": 1, "cluster": None, "methods": ["a"]}


def test_training_is_repeatable_and_kept(tiny, tmp_path):
    experiment, data = tiny
    state = torch.random.get_rng_state()
    first, second = (trained(experiment, 1, data, tmp_path / name) for name in "ab")
    kept = trained(experiment, 1, data, tmp_path / "a")
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]) and torch.equal(value, kept.state_dict()[name])
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_networks_are_the_articles():
    assert [tuple(p.shape) for p in LeNet5().parameters() if p.ndim == 2] == [(120, 400), (84, 120), (10, 84)]
    assert LeNet5()(torch.zeros(2, 1, 32, 32)).shape == (2, 10)
    assert [tuple(p.shape) for p in RoomMLP(widths=(40, 40, 40)).parameters() if p.ndim == 2] == [
        (40, 16),
        (40, 40),
        (40, 40),
        (4, 40),
    ]


def test_published_figures():
    theirs = results.published()
    assert theirs["lenet5-mnist", "slr cost", 8]["accuracy"] == 80.47
    assert theirs["room-mlp", "slrprop", 8]["auc"] == 95.52


def test_no_results_and_no_experiment():
    with pytest.raises(SlrpropError, match="compute them with: slrprop paper run room-mlp"):
        results.table(EXPERIMENTS["room-mlp"], [])
    with pytest.raises(SlrpropError, match="no experiment is called 'vgg'"):
        find_experiment("vgg")


def test_a_named_folder_must_hold_the_data(tmp_path):
    with pytest.raises(SlrpropError, match=r"holds neither room_occupancy.csv nor room_occupancy.csv.xz"):
        datasets.room(tmp_path)
    (tmp_path / "room_occupancy.csv").write_text("header\n" + ",".join(["0"] * 19) + "\n")
    with pytest.raises(SlrpropError, match="not the published"):
        datasets.room(tmp_path)


@needs_data
def test_real_data():
    digits, room = datasets.mnist(), datasets.room()
    assert digits.x_train.shape == (60000, 1, 32, 32) and digits.x_test.shape == (10000, 1, 32, 32)
    assert room.x_train.shape == (9129, 16) and float((room.y_test == 0).double().mean()) == 0.175
    torch.testing.assert_close(room.x_train.mean(0), torch.zeros(16), atol=1e-5, rtol=0)


def test_the_committed_results_are_complete():
    """Every row of the sweep is in the export that the documentation shows."""
    for name in ("lenet5-mnist", "room-mlp"):
        experiment = EXPERIMENTS[name]
        path = Path(__file__).parents[1] / "docs" / "paper" / f"{name}.csv"
        assert len(path.read_text().splitlines()) == 1 + 10 * (1 + 7 * len(experiment.ranks))
