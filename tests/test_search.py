"""Budgets: few evaluations, promises on fresh data, and runs that go on where they were killed."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.version_converter
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import slrprop
from slrprop import BudgetError, SlrpropError, cli, compress
from slrprop.data import Data
from slrprop.metrics import interval_of
from slrprop.network import base as network_base
from slrprop.network.onnx.file import OnnxFile
from slrprop.network.onnx.graph import Graph
from slrprop.plan import Plan
from slrprop.search import Candidate, hull, shares, times
from slrprop.search.compress import parse_size
from slrprop.search.judge import Door
from slrprop.search.path import MANY_LAYERS, ranks_for
from slrprop.search.result import most_evaluations


@pytest.fixture(scope="module")
def fresh(digits):
    """Labelled samples that the network was not trained on."""
    x, y = digits
    return x[1200:], y[1200:]


@pytest.fixture(scope="module")
def files(trained, fresh, tmp_path_factory):
    """The network as an ONNX file, and its data as an .npz."""
    folder = tmp_path_factory.mktemp("files")
    slrprop.export_onnx(trained, folder / "model.onnx", fresh[0][:4])
    np.savez(folder / "data.npz", x=fresh[0].numpy(), targets=fresh[1].numpy())
    return folder / "model.onnx", folder / "data.npz"


@pytest.mark.parametrize("door", ["torch", "onnx"])
def test_a_drop_is_kept_on_data_the_search_did_not_see(door, trained, fresh, files):
    model, data = (trained, fresh) if door == "torch" else files
    found = compress(model, data, max_drop=1.0)
    assert found.met and found.drop <= 1.0 and found.bytes[1] < 0.6 * found.bytes[0]
    _, check = Data(data if door == "torch" else str(data)).split(0)
    x, y = torch.cat([batch.inputs[0] for batch in check]), torch.cat([batch.targets for batch in check])
    small = slrprop.apply(trained, found.plan) if door == "torch" else None
    if small is not None:
        for value, network in zip(found.quality, (trained, small), strict=True):
            assert value == pytest.approx(100 * float((network(x).argmax(1) == y).double().mean()))
    assert found.interval[0] <= found.drop <= found.interval[1]


def test_bytes_are_kept_and_measured(trained, fresh, tmp_path):
    for budget, limit in (("40%", None), ("30KB", 30_000), (25_000, 25_000)):
        found = compress(trained, fresh, max_bytes=budget)
        slrprop.save(found.model, tmp_path / "small.safetensors")
        assert (tmp_path / "small.safetensors").stat().st_size == found.bytes[1]
        assert found.bytes[1] <= (limit or 0.4 * found.bytes[0])


@pytest.mark.parametrize("door", ["torch", "onnx", "older onnx"])
@pytest.mark.parametrize("level", ["weights", "calibrated"])
def test_bytes_of_small_files_are_predicted(door, level, trained, fresh, files, tmp_path):
    """Names and shapes of the arrays, which take a third of so small a file, too; so a little less of it costs a little.

    Before opset 21 there are no 4 bits in ONNX: nodes unpack them, once for the file.
    """
    model, data = (trained, fresh) if door == "torch" else files
    if door == "older onnx":
        model = tmp_path / "older.onnx"
        onnx.save(onnx.version_converter.convert_version(onnx.load(files[0]), 17), model)
    found = compress(model, data, max_drop=3.0, level=level)
    measured = [point for point in found.points if point.measured is not None and point.plan.layers]
    assert len(measured) > 3
    for point in measured:
        assert point.measured.bytes == pytest.approx(point.predicted_bytes, rel=0.07)
    most = {"torch": 3700, "onnx": 4000, "older onnx": 7000}[door]
    smaller = compress(model, data, max_bytes=most, level=level)
    assert 0.9 * most < smaller.bytes[1] <= most and smaller.drop < 10


def by_multiplications(forms, operator, positions, integers=False):
    """What a layer's forms would take if nothing but multiplications did."""
    return {name: 1e-8 * positions * form.multiplications for name, form in forms.items()}


def test_all_budgets_together(files, tmp_path, monkeypatch):
    """Timed as if latency were one microsecond per hundred numbers, so that no noise decides."""

    def proportional(self, plans, repetitions=50):
        return {
            name: 1e-8 * (14_000 - sum(n.shape[0] * n.shape[1] - n.numbers for n in plan.layers))
            for name, plan in plans.items()
        }

    monkeypatch.setattr(Door, "latencies", proportional)
    monkeypatch.setattr(times, "layer_latencies", by_multiplications)
    found = compress(*files, max_drop=2.0, max_bytes="80%", max_latency_ms=0.12)
    assert found.met and found.drop <= 2 and found.bytes[1] <= 0.8 * found.bytes[0] and found.latency[1] <= 0.00012
    slrprop.apply(files[0], found.plan, tmp_path / "small.onnx")
    assert (tmp_path / "small.onnx").stat().st_size == found.bytes[1]
    only = compress(*files, max_latency="60%")
    assert only.met and only.latency[1] <= 0.6 * only.latency[0]


def test_a_budget_that_can_not_be_met_names_the_nearest(trained, fresh):
    with pytest.raises(
        BudgetError, match=r"no plan was found for at most 1,500 bytes; the nearest has a drop of .*, \d+ in all"
    ) as error:
        compress(trained, fresh, max_bytes=1500)
    assert not error.value.best.met and 1500 < error.value.best.bytes[1] < error.value.best.bytes[0]


def test_confident_demands_the_upper_end(trained, fresh):
    loose, strict = (
        compress(trained, fresh, max_drop=3.0, methods={"svd": {}}, confident=confident) for confident in (False, True)
    )
    assert loose.drop <= 3 and strict.interval[1] <= 3 and strict.bytes[1] >= loose.bytes[1]


def test_it_says_why_it_chose(trained, fresh):
    found = compress(trained, fresh, max_drop=3.0)
    assert [reason.split(":")[0] for reason in found.reasons()] == [layer.name for layer in found.plan.layers]
    for layer, reason in zip(found.plan.layers, found.reasons(), strict=True):
        assert layer.method in reason and (
            "times the damage" in reason or "that small" in reason or "refitted" in reason
        )


def test_few_evaluations_for_eight_layers(fresh):
    torch.manual_seed(0)
    wide = [part for _ in range(6) for part in (nn.Linear(48, 48), nn.ReLU())]
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), *wide, nn.Linear(48, 10)).eval()
    found = compress(model, fresh[0], max_drop=5.0)
    assert len(found.curves) == 8 and found.evaluations <= 4 + 2 * 8
    assert found.metric == "agreement"
    one = nn.Sequential(nn.Linear(64, 10)).eval()
    assert compress(one, fresh[0], max_drop=5.0, methods={"svd": {}, "slr": {"criterion": "weight"}}).evaluations <= 6
    assert compress(one, fresh[0], max_drop=5.0).evaluations <= 4 + 2 * 8


def deep(width):
    """Fourteen dense layers, so many that plans are seldom fitted in order."""
    torch.manual_seed(0)
    between = [part for _ in range(12) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), *between, nn.Linear(width, 10)).eval()


def noted(monkeypatch):
    """The plans that are fitted in order from now on."""
    fits, real = [], shares.fitted
    monkeypatch.setattr(shares, "fitted", lambda *given: (given[2] and fits.append(given[1])) or real(*given))
    return fits


def test_many_layers_are_fitted_in_order_only_around_the_edge(fresh, monkeypatch):
    """Between the edge of layers fitted alone and that of layers fitted in order lie few points."""
    model, fits = deep(48), noted(monkeypatch)
    near = compress(model, fresh[0], max_drop=5.0)
    of_near, fits[:] = len(fits), []
    monkeypatch.setattr(shares, "MANY_LAYERS", 99)
    whole = compress(model, fresh[0], max_drop=5.0)
    assert len(near.curves) == 14 > MANY_LAYERS and near.drop <= 5
    assert of_near < len(fits) and near.evaluations <= most_evaluations(14)
    assert near.bytes[1] < 1.05 * whole.bytes[1]


def test_few_evaluations_where_the_head_is_refitted_beside_what_was_asked(trained, fresh):
    """Its bytes are in no prediction, so that many points of the path are too large."""
    found = compress(trained, fresh, max_bytes="10%", layers=["0", "2"])
    assert found.met and found.evaluations <= most_evaluations(2)


def test_same_seed_same_data_same_plan(trained, fresh):
    first, second = (compress(trained, fresh, max_drop=1.0, seed=3).plan.to_json() for _ in range(2))
    assert first == second


def test_the_benchmark_of_growth_times_every_part_of_a_search():
    """It takes a search apart, so that it breaks where a part is called differently."""
    from benchmarks.scaling import PARTS, seconds

    found = seconds(torch.rand(64, 784), layers=2, width=16, samples=64, workers=1)
    assert list(found) == list(PARTS) and all(found.values())


@pytest.mark.parametrize("door", ["torch", "onnx"])
def test_workers_find_the_same_plan(door, trained, fresh, files):
    """Candidates made in two processes are those of one, up to the last digits of their factors."""
    model, data = (trained, fresh) if door == "torch" else files
    one, two = (compress(model, data, max_bytes="30%", workers=workers) for workers in (1, 2))
    for layer, other in zip(one.plan.layers, two.plan.layers, strict=True):
        assert (layer.name, layer.method, layer.settings) == (other.name, other.method, other.settings)
    assert one.evaluations == two.evaluations and one.bytes == two.bytes
    for name, curve in one.curves.items():
        assert [c.bytes for c in curve] == [c.bytes for c in two.curves[name]]
        assert [c.error for c in curve] == pytest.approx([c.error for c in two.curves[name]], rel=1e-3, abs=1e-6)


def test_what_workers_measured_is_known_to_the_report(trained, fresh):
    choices = {"slr": {"criterion": "activation"}}
    one, two = (compress(trained, fresh, max_bytes="50%", methods=choices, workers=workers) for workers in (1, 2))
    for name, known in one.observed.items():
        assert two.observed[name].rows == pytest.approx(known.rows) and known.criterion == two.observed[name].criterion


def test_ones_own_measure_of_a_single_output(digits):
    """Labels 0 and 1 for one output: only the user's measure knows what to do with them."""
    x, y = digits
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 1)).eval()

    def right(model):
        return 100 * float(((model(x)[:, 0] > 0) == (y > 4)).double().mean())

    found = compress(model, (x, (y > 4).long()), max_drop=1.0, evaluate=right)
    assert found.met and found.quality[1] == pytest.approx(right(found.model))


def test_ones_own_measure(trained, fresh, files):
    def loss(model):
        assert isinstance(model, (nn.Module, Path))
        if isinstance(model, Path):
            return 100 - slrprop.measure(model, fresh).accuracy
        return nn.functional.cross_entropy(model(fresh[0]), fresh[1]).item()

    found = compress(trained, fresh, max_drop=0.05, evaluate=loss, lower_is_better=True)
    assert found.quality[1] == pytest.approx(loss(found.model)) and found.quality[1] <= found.quality[0] + 0.05
    assert compress(*files, max_drop=1.0, evaluate=loss, lower_is_better=True).drop <= 1.0


def test_regression_without_labels(digits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 60), nn.Tanh(), nn.Linear(60, 1)).eval()
    found = compress(model, digits[0], max_drop=0.01)
    assert found.metric == "squared_error" and found.quality[0] == 0 and found.drop <= 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "no budget was given; state max_drop, max_bytes or max_latency"),
        ({"max_bytes": "many"}, "max_bytes must be a positive number, like 300000, '300KB' or '25%', got 'many'"),
        ({"max_bytes": "-5%"}, "max_bytes must be a positive number"),
        ({"max_latency": "3"}, "max_latency is a share of the original's, like '50%'"),
        (
            {"max_drop": 1, "metric": "dice"},
            "metric must be one of accuracy, agreement, balanced_accuracy, f1, miou, auc, cosine, squared_error, mae, r2, got 'dice'",
        ),
        ({"max_drop": 1, "methods": {"magic": {}}}, "method must be one of"),
    ],
)
def test_wrong_budgets(trained, fresh, settings, message):
    with pytest.raises(SlrpropError, match=message):
        compress(trained, fresh, **settings)


def test_data_that_can_not_be_kept_apart(trained, fresh):
    with pytest.raises(SlrpropError, match="the DataLoader shuffles"):
        compress(trained, DataLoader(TensorDataset(*fresh), 64, shuffle=True), max_drop=1)
    with pytest.raises(SlrpropError, match="the data has one sample"):
        compress(trained, (fresh[0][:1], fresh[1][:1]), max_drop=1)
    with pytest.raises(SlrpropError, match="'accuracy' needs labels"):
        compress(trained, fresh[0], max_drop=1, metric="accuracy")
    assert compress(trained, DataLoader(TensorDataset(*fresh), 64), max_drop=1).met


def test_halves_are_disjoint_and_whole(fresh):
    x = torch.arange(101.0)[:, None]
    first, second = (torch.cat([batch.inputs[0] for batch in part]) for part in Data((x, None), 7).split(5))
    assert sorted([*first[:, 0].tolist(), *second[:, 0].tolist()]) == x[:, 0].tolist()


def test_sizes():
    assert [parse_size(text, 2000, "x") for text in (5, "300KB", "1.5mb", "25%", "7 B")] == [
        5,
        300_000,
        1_500_000,
        500,
        7,
    ]


def test_ranks_pay():
    assert ranks_for(10, 10) == [1, 2, 3, 4] and ranks_for(1, 9) == []
    assert all(rank * 30 < 200 for rank in ranks_for(10, 20))


def test_hull_is_convex_and_keeps_the_ends():
    points = [(100, 0.0), (80, 0.1), (70, 0.5), (60, 0.2), (20, 0.9), (20, 0.8), (50, 0.9)]
    kept = [(c.bytes, c.error) for c in hull([Candidate(*point) for point in points])]
    assert kept == [(100, 0.0), (60, 0.2), (20, 0.8)]


@pytest.mark.parametrize(("lost", "won", "least"), [(0.02, 0.005, 0.92), (0.1, 0.05, 0.92), (0.002, 0.0, 0.84)])
def test_intervals_cover_the_truth(lost, won, least):
    """About 95 of 100 intervals hold the true drop; fewer where one sample in 500 decides, but never none."""
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(300):
        u = torch.rand(1000, generator=generator)
        low, high = interval_of(100 * ((u < lost).double() - (u > 1 - won).double()), 100.0)
        inside += low <= 100 * (lost - won) <= high
    assert inside / 300 >= least


KILLS = int(os.environ.get("SLRPROP_KILLS", "4"))
KILLED = """
import sys
from slrprop.cli import main
sys.argv = ["slrprop", "compress", *sys.argv[1:]]
main()
"""


def test_killed_runs_go_on_to_the_same_plan(files, tmp_path):
    """SIGKILL at random moments: the output is absent or whole, and the last run ends like one that was never killed."""
    model, data = map(str, files)

    def start(folder, output):
        arguments = [
            model,
            "--calibration",
            data,
            "--max-drop",
            "1",
            "--method",
            "svd",
            "--method",
            "low_rank",
            "--run-dir",
            str(folder),
            "-o",
            str(output),
            "--json",
        ]
        return subprocess.Popen(
            [sys.executable, "-c", KILLED, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    whole = start(tmp_path / "whole", tmp_path / "whole.onnx")
    began = time.perf_counter()
    right = json.loads(whole.communicate(timeout=120)[0])
    needed = time.perf_counter() - began
    moments = random.Random(0)
    for _ in range(KILLS):
        run = start(tmp_path / "killed", tmp_path / "killed.onnx")
        time.sleep(needed * moments.uniform(0.4, 0.95))
        run.send_signal(signal.SIGKILL)
        run.communicate()
        if (tmp_path / "killed.onnx").exists():
            assert (tmp_path / "killed.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    last = json.loads(start(tmp_path / "killed", tmp_path / "killed.onnx").communicate(timeout=120)[0])
    assert last["plan"] == right["plan"]
    assert (tmp_path / "killed.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()


def test_a_log_cut_off_by_a_kill_is_read(trained, fresh, tmp_path):
    first = compress(trained, fresh, max_drop=1.0, run_dir=tmp_path)
    log = tmp_path / "measured.jsonl"
    log.write_text(log.read_text()[:-30])
    again = compress(trained, fresh, max_drop=1.0, run_dir=tmp_path)
    assert again.plan == first.plan and isinstance(again.plan, Plan)
    assert all(isinstance(point.measured.bytes, int) for point in again.points if point.measured)


def test_a_layer_that_runs_slower_stays_dense(trained, fresh, monkeypatch):
    """Latency is a goal, and layer '2' is timed slower in any form than dense; in few bits it is no faster, so its form is factored nowhere."""
    shape = tuple(trained[2].weight.T.shape)

    def slow(self, plans, repetitions=50):
        weigh = {name: {layer.name for layer in plan.layers} for name, plan in plans.items()}
        return {name: 1e-3 * (1 - 0.3 * ("0" in layers)) for name, layers in weigh.items()}

    def slower(forms, operator, positions, integers=False):
        found = by_multiplications(forms, operator, positions)
        return {name: 9.0 if name and form.shape == shape else found[name] for name, form in forms.items()}

    monkeypatch.setattr(Door, "latencies", slow)
    monkeypatch.setattr(times, "layer_latencies", slower)
    found = compress(trained, fresh, max_latency="90%", methods={"svd": {}})
    assert "0" in {layer.name for layer in found.plan.layers}
    assert "2" not in {layer.name for layer in found.plan.layers}
    assert found.left_dense["2"] == "no form of it runs faster"
    assert all(math.isnan(candidate.seconds) for candidate in found.curves["2"][1:])


def test_a_refitted_head_is_no_form_that_could_stay_dense(trained, fresh, monkeypatch):
    """Only '0' and '2' were asked for; the last layer is refitted, as large as before, and happens to be timed slower."""

    def slow(self, plans, repetitions=50):
        weigh = {name: {layer.name for layer in plan.layers} for name, plan in plans.items()}
        return {
            name: 1e-3 * (1.5 if layers == {"4"} else 1 - 0.3 * len(layers & {"0", "2"}))
            for name, layers in weigh.items()
        }

    monkeypatch.setattr(Door, "latencies", slow)
    found = compress(trained, fresh, max_drop=3.0, max_latency="90%", layers=["0", "2"])
    assert set(found.curves) == {"0", "2"} and "4" not in found.left_dense
    assert "4" in {layer.name for layer in found.plan.layers}


def test_of_very_wide_layers_only_the_likely_forms_are_fitted_in_order(trained, fresh, monkeypatch):
    """The same forms are compared; what is promised is kept all the same."""
    fits, real = [], shares.fitted

    def counted(*given):
        fits.append(given[1])
        return real(*given)

    monkeypatch.setattr(shares, "fitted", counted)
    usual = compress(trained, fresh, max_bytes="25%")
    usually, fits[:] = len(fits), []
    monkeypatch.setattr(shares, "WIDEST", 50)
    wide = compress(trained, fresh, max_bytes="25%")
    assert len(fits) < usually - 2
    assert wide.bytes[1] <= 0.25 * wide.bytes[0] and wide.evaluations <= most_evaluations(len(wide.curves))
    assert wide.quality[1] > usual.quality[1] - 3


def test_of_many_layers_too(fresh, monkeypatch):
    model, fits = deep(32), noted(monkeypatch)
    methods = [("low_rank", {"bits": 4}), ("low_rank", {"bits": 8}), ("dense", {"bits": 4}), ("dense", {"bits": 8})]
    found = compress(model, fresh[0][:200], max_bytes="30%", methods=methods)
    assert found.met and len(found.curves) > MANY_LAYERS and len(fits) <= 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_drop": float("nan")}, "max_drop must be a finite number of points from 0, got nan"),
        ({"max_drop": -1}, "max_drop must be a finite number of points from 0, got -1"),
        ({"max_drop": "1"}, "max_drop must be a finite number of points from 0, got '1'"),
        ({"max_bytes": "9" * 400}, "max_bytes must be a positive number"),
        ({"max_bytes": "0.0001%"}, "max_bytes must be a positive number"),
        ({"max_latency_ms": -1}, "max_latency_ms must be a positive number of milliseconds, got -1"),
        ({"max_drop": 1, "methods": {"svd": {}}, "size_only": True}, "name 'obs' or 'magnitude'"),
        ({"max_drop": 1, "size_only": 1}, "size_only must be True or False, got 1"),
        ({"max_drop": 1, "methods": ["svd"]}, "methods must be 'auto' or map names to settings"),
        ({"max_drop": 1, "methods": {"svd": {"rnk": 3}}}, "method 'svd' has no setting 'rnk'; did you mean rank?"),
        (
            {"max_drop": 1, "evaluate": lambda _: math.nan},
            "evaluate must give a finite number, or one for each of the samples, got nan",
        ),
        ({"max_drop": 1, "evaluate": len, "confident": True}, "confident needs an interval"),
    ],
)
def test_budgets_that_make_no_sense_are_refused_at_once(trained, fresh, settings, message):
    with pytest.raises(SlrpropError, match=message):
        compress(trained, fresh, **settings)


def test_float_targets_are_no_labels(trained, fresh):
    with pytest.raises(
        SlrpropError, match=r"targets of shape .* can't be compared with outputs .*; give class labels as integers"
    ):
        compress(trained, (fresh[0], fresh[1].float()), max_drop=1)
    with pytest.raises(SlrpropError, match="metric 'agreement' needs two outputs or more"):
        compress(
            nn.Sequential(nn.Linear(64, 30), nn.Tanh(), nn.Linear(30, 1)), fresh[0], max_drop=1, metric="agreement"
        )


def test_methods_skip_what_they_can_not_treat(trained, fresh):
    found = compress(trained, fresh, max_bytes="60%", methods={"slrprop": {}})
    assert {layer.method for layer in found.plan.layers} == {"slrprop"}
    assert len(found.curves["4"]) == 1  # the classifier's own layer
    assert found.left_dense == {"4": "no form of it is smaller"}


def test_a_damaged_run_folder_is_read_as_far_as_it_goes(trained, fresh, tmp_path):
    (tmp_path / "measured.jsonl").write_bytes(b'[1,2]\n3\nnull\n\xff\xfe\n{"a": {"b": "c"}}\n{"a": 5}\n')
    assert compress(trained, fresh, max_drop=1.0, run_dir=tmp_path).met
    with pytest.raises(SlrpropError, match=r"the run folder .* can't be used"):
        compress(trained, fresh, max_drop=1.0, run_dir=tmp_path / "measured.jsonl" / "below")


@pytest.mark.parametrize(
    ("output", "report", "message"),
    [
        ("missing/small.onnx", "r.html", "small.onnx' could not be written (its folder does not exist)"),
        ("small.txt", "r.html", "small.txt' must end in .onnx"),
        ("small.onnx", "r.pdf", "r.pdf' must end in .html or .md"),
        ("model.onnx", "r.md", "model.onnx' is the model itself, which stays as it is"),
    ],
)
def test_paths_are_looked_at_before_the_work(files, tmp_path, output, report, message):
    model, data = files
    (tmp_path / "model.onnx").hardlink_to(model)
    command = ["compress", str(tmp_path / "model.onnx"), "--calibration", str(data), "--max-drop", "1"]
    result = CliRunner().invoke(cli.app, [*command, "-o", str(tmp_path / output), "--report", str(tmp_path / report)])
    assert message in str(result.exception) and isinstance(result.exception, SlrpropError)


def test_latency_of_a_file_with_a_fixed_batch(trained, fresh, tmp_path):
    slrprop.export_onnx(trained, tmp_path / "eight.onnx", fresh[0][:8], dynamic_batch=False)
    found = compress(tmp_path / "eight.onnx", fresh, max_latency="1000%")
    assert found.met and found.latency[0] > 0


def test_latency_before_and_after_are_of_one_run(trained, fresh, monkeypatch):
    """A machine that gets three times slower during the search does not change what is compared."""
    calls = []

    def drifting(self, plans, repetitions=50):
        calls.append(plans)
        return {name: 3e-3 ** (1 / len(calls)) * (0.5 if plan.layers else 1.0) for name, plan in plans.items()}

    monkeypatch.setattr(Door, "latencies", drifting)
    found = compress(trained, fresh, max_drop=3.0, max_latency="60%")
    assert found.met and found.latency[1] == pytest.approx(0.5 * found.latency[0]) and len(calls) > 1


def test_squared_error_of_probabilities_is_of_probabilities(trained, fresh):
    model = nn.Sequential(trained, nn.Softmax(-1))
    goal = nn.functional.one_hot(fresh[1], 10).float()
    found = compress(model, (fresh[0], goal), max_drop=0.05)
    _, check = Data((fresh[0], goal)).split(0)
    x, y = (torch.cat(list(parts)) for parts in zip(*((b.inputs[0], b.targets) for b in check), strict=True))
    with torch.no_grad():
        want = float((model(x) - y).square().sum(1).mean())
    assert found.metric == "squared_error" and found.quality[0] == pytest.approx(want, rel=1e-4)


def test_a_file_is_opened_once_and_nothing_is_written(tmp_path, monkeypatch):
    """One file, one graph, one digest of each weight; sizes are those that the written file has."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)).eval()
    path, x = tmp_path / "m.onnx", torch.randn(120, 20)
    slrprop.export_onnx(model, path, x[:3])
    counts = Counter()

    def counted(owner, name, what):
        plain = getattr(owner, name)

        def call(*args, **given):
            counts[what] += 1
            return plain(*args, **given)

        monkeypatch.setattr(owner, name, classmethod(lambda cls, path: call(path)) if name == "open" else call)

    counted(OnnxFile, "open", "opened")
    counted(Graph, "__init__", "graphs")
    counted(OnnxFile, "write", "written")
    counted(network_base, "fingerprint", "digests")
    found = slrprop.compress(path, x, max_bytes="40%", methods={"low_rank": {"bits": 8}})
    assert found.evaluations > 3 and counts == {"opened": 1, "graphs": 1, "digests": 3}
    monkeypatch.undo()
    slrprop.apply(path, found.plan, tmp_path / "s.onnx", data=x)
    assert (tmp_path / "s.onnx").stat().st_size == found.bytes[1]
