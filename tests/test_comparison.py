"""What becomes of the comparison's rows, and the command on a tiny network."""

import dataclasses
import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from slrprop import SlrpropError, cli
from slrprop.methods import find_method
from slrprop.research import experiments
from slrprop.research.comparison import contenders, figure, run, verdict
from slrprop.research.comparison.commands import chosen
from slrprop.research.comparison.contenders import CONTENDERS
from slrprop.research.comparison.results import Results, accuracy_table, answers_table, files_table, page
from slrprop.research.comparison.run import Comparison
from slrprop.research.datasets import Dataset
from slrprop.research.networks import Headed, LeNet300

NAN = float("nan")
LENET5 = experiments.COMPARED["lenet5-mnist"]


def made(method, size, *accuracies, bytes_=None, latency=NAN, seeds=None):
    """Rows of a contender at a size, one per seed."""
    return [
        Comparison("lenet5-mnist", seed, method, size, bytes_ or size, size // 4, accuracy, accuracy, 0.1, 2 * size, latency, 2.0, 1.5, "")
        for seed, accuracy in zip(seeds or range(len(accuracies)), accuracies, strict=True)
    ]  # fmt: skip


ROWS = [
    *made("original", 100_000, 99.0, 99.2, 99.4, latency=4e-5),
    *made("SVD", 4000, 90.0, 90.0, 90.0),
    *made("SVD, 4 bits", 2000, 90.0, 91.0, 92.0),
    *made("SVD, 4 bits", 4000, 98.0, 98.2, 98.7),
    *made("magnitude", 2000, 50.0, 50.0, 50.0),
    *made("SLRProp", 4000, 91.0, 88.0, 90.5),
    *made("nested, 4 bits", 2000, 98.0, 98.2, 98.4, latency=3e-5),
    *made("nested, 4 bits", 4000, 98.9, 99.2, 99.3),
    *made("LASSO", 4000, 97.0),
    *made("auto, weights", 4000, 98.0, 98.1, 98.6),
    *made("auto, calibrated", 2000, 97.0, 97.2, 97.4),
    *made("auto, calibrated", 4000, 99.0, 99.0, 99.3),
    *made("SVD, 4 bits, tuned", 4000, 98.5, 99.5, 98.4),
    Comparison("room-mlp", 0, "SVD", 77, 77, 1, 1.0, 1.0, 1.0, NAN, NAN, NAN, 1.0, ""),
]


@pytest.fixture(scope="module")
def results():
    return Results(LENET5, ROWS)


def test_the_table_has_means_the_best_and_who_is_near(results):
    header, original, *lines = accuracy_table(results)
    assert header == ["level", "contender", "2.0 kB (2 %)", "4.0 kB (4 %)"]
    assert original == ["", "original, 100 kB", "99.20 ± 0.20", "99.20 ± 0.20"]
    cells = {line[1]: line[2:] for line in lines}
    assert [line[0] for line in lines if line[0]] == ["weights", "calibrated", "tuned"]
    assert cells["SVD"] == ["-", "90.00 ± 0.00"]
    assert cells["SVD, 4 bits"] == ["*91.00 ± 1.00*", "*98.30 ± 0.36*"]  # the best that no data made
    assert cells["nested, 4 bits"] == ["**98.20 ± 0.20**", "**99.13 ± 0.21**"]
    assert cells["auto, calibrated"] == ["97.20 ± 0.20", "99.10 ± 0.17 ≈"]  # paired: -0.1, +0.2, 0 behind
    assert cells["SVD, 4 bits, tuned"] == ["-", "*98.80 ± 0.61* ≈"]  # 0.33 behind, standard error 0.38
    assert cells["magnitude (size only: no faster)"][0] == "50.00 ± 0.00"
    assert cells["LASSO (size only: no faster)"] == ["-", "97.00 (1 seed)"]


def test_contenders_with_other_seeds_are_judged_by_what_they_lose():
    """On a seed whose original is better, the same accuracy is a greater loss."""
    rows = [
        *made("original", 9000, 98.0, 99.0, 99.0, 99.0),
        *made("SVD", 500, 97.5, 98.5, 98.5, 98.5),
        *made("SVD, 8 bits", 500, 98.3, 98.3, 98.3, seeds=[1, 2, 3]),
    ]
    assert accuracy_table(Results(LENET5, rows))[2][2] == "**98.25 ± 0.50**"


def test_the_other_tables_show_the_frontier(results):
    answers, files = ({line[1]: line[2:] for line in table(results)} for table in (answers_table, files_table))
    assert answers["nested, 4 bits"] == ["98.20 / 0.1000", "99.13 / 0.1000"]
    assert files["nested, 4 bits"] == ["1.5", "4.0 kB, 30 µs, 2.00x", "-"]
    assert "SLRProp" not in answers and "magnitude (size only: no faster)" not in answers and "SVD" in answers


def test_the_verdict_is_computed(results):
    told = dict(verdict.verdict(results))
    first, second = told["Best at each size"]
    assert first == (
        "2.0 kB: **nested, 4 bits**, 98.20 ± 0.20 % (1.00 points lost); out of reach for plain SVD; "
        "7.20 ± 0.46 ahead of the best of the weights level (SVD, 4 bits); "
        "7.20 ± 0.46 ahead of the best of the baselines (SVD, 4 bits)."
    )
    assert "9.13 ± 0.12 ahead of plain SVD" in second and "of the baselines (SVD, 4 bits, tuned)" in second
    assert "Best at each size without training, where that is another" not in told
    theirs = (
        "0 of 2 cells (best in 0); not at 2.0 kB, where it has no plan and SVD, 4 bits has; 4.0 kB: SVD, 4 bits is 0.07 ± 0.03 ahead",
        "1 of 2 cells (best in 0); not at 2.0 kB: nested, 4 bits is 1.00 ± 0.00 ahead",
    )
    assert (
        told["The product's own choice"]
        == [
            f"auto, {level}: best or within one standard error of the best of its level and below in {cells}. "
            f"Among what is computed faster too, in {cells}. "
            f"By agreement with the original, which is what it can see, among those in {cells}."  # these rows agree as often as they are right
            for level, cells in zip(("weights", "calibrated"), theirs, strict=True)
        ]
    )
    assert told["The articles' SLR and SLRProp against plain SVD"] == [
        "At equal bytes, they do not beat it: ahead by more than one standard error in 0 of 1 cells, behind in 0.",
        "SLRProp less SVD: 4.0 kB -0.17 ± 0.93.",
    ]


def test_the_verdict_says_where_a_baseline_wins():
    rows = [
        *made("original", 9000, 99.0, 99.0),
        *made("nested", 500, 97.0, 97.2),
        *made("Wanda", 500, 98.0, 98.0),
        *(dataclasses.replace(row, agreement=99.0) for row in made("auto, calibrated", 500, 97.9, 97.9)),
        *made("OBS gradual", 500, 98.5, seeds=[0]),
        *made("auto and single weights", 500, 98.1, 98.1),
    ]
    told = dict(verdict.verdict(Results(LENET5, rows[:-2])))
    assert told["Best at each size"][0].startswith("0.5 kB: **Wanda**")  # one seed is too few to be judged
    assert told["Best at each size"][0].endswith("the best of ours, auto, calibrated, is 0.10 ± 0.00 behind.")
    assert "Best at each size without training, where that is another" not in told
    behind, best = "0 of 1 cells (best in 0); not at 0.5 kB: {} is {} ± 0.00 ahead.", "1 of 1 cells (best in 1)."
    seen = "By agreement with the original, which is what it can see,"
    assert told["The product's own choice"][0].endswith(
        f"in {behind.format('Wanda', '0.10')} Among what is computed faster too, in {best} {seen} among those in {best}"
    )
    own, both = dict(verdict.verdict(Results(LENET5, rows)))["The product's own choice"]
    assert f"in {behind.format('auto and single weights', '0.20')} Among" in own
    assert both == f"auto and single weights: best or within one standard error of the best of its level and below in {best} {seen} in {behind.format('auto, calibrated', '0.90')}"  # fmt: skip
    assert "The articles' SLR and SLRProp against plain SVD" not in told


def test_the_verdict_names_a_nearer_baseline_of_few_seeds():
    rows = [
        *made("original", 9000, 99.0, 99.0),
        *made("auto, calibrated", 500, 98.0, 98.2),
        *made("auto, tuned", 500, 98.6, 98.6),
        *made("SVD", 500, 50.0, 60.0),
        *made("OBS gradual", 500, 97.9, seeds=[0]),
        *made("LASSO", 500, 40.0, seeds=[0]),
    ]
    told = dict(verdict.verdict(Results(LENET5, rows)))
    few = "of too few seeds to be judged, OBS gradual is {} (one seed) behind."
    assert told["Best at each size"][0].endswith(few.format("0.70"))
    (untrained,) = told["Best at each size without training, where that is another"]
    assert untrained.startswith("0.5 kB: **auto, calibrated**") and untrained.endswith(few.format("0.10"))


def test_the_page_and_the_figure(results, tmp_path):
    text = page(results, verdict.verdict(results))
    assert "1 seeds" not in text and "biases. 3 seeds; " in text and "on seeds 0, 1, 2" in text
    assert "the original's file: 200 kB, 40 µs" in text and "No row: SVD, 8 bits;" in text
    drawn = figure.figure(results)
    names = list(drawn.axes[0].texts)
    assert {text.get_text() for text in names} == {name for name in results.names if name in figure.SHOWN}
    drawn.savefig(tmp_path / "figure.png")
    boxes = [text.get_window_extent() for text in names]
    assert not any(one.overlaps(other) for index, one in enumerate(boxes) for other in boxes[:index])


def test_size_only_is_what_the_forms_are():
    slow = {contender.name.split(",")[0] for contender in contenders.CONTENDERS if not contender.faster}
    assert {"magnitude", "Wanda", "OBS gradual", "permuted features", "low rank + sparse", "Net-Trim"} <= slow
    assert not slow & {"SVD", "nested", "auto", "NISP", "dense", "DDLR", contenders.NARROWER}


def test_names_of_contenders_may_have_commas_in_them():
    known = {"SVD": False, "SVD, 4 bits": False, "LASSO": True, "low rank, two-sided": False}
    assert chosen("SVD, 4 bits,low rank, two-sided", known) == {"SVD, 4 bits", "low rank, two-sided"}
    assert chosen("SVD,4 bits, SVD", known) == {"SVD", "SVD, 4 bits"}
    assert chosen("slow", known) == {"LASSO"} and chosen("all", known) == set(known)
    assert chosen("fast,LASSO", known) == set(known)
    with pytest.raises(
        SlrpropError, match="no contender begins with '9 bits'; there are fast, slow, all, or names: SVD;"
    ):
        chosen("SVD, 9 bits", known)


class Small(LeNet300):
    """Dense 64-24-16-10 on 8 x 8 digits."""

    def __init__(self, classes=10, widths=(24, 16)):
        super().__init__(classes, widths)
        self.fc1 = torch.nn.Linear(64, widths[0])

    def front(self, x):
        return x.flatten(1)


@pytest.fixture
def tiny(digits, monkeypatch):
    x, y = digits
    data = Dataset(x[:600], y[:600], x[600:800], y[600:800])
    short = dataclasses.replace(experiments.LENET300.recipe, epochs=2)
    experiment = dataclasses.replace(experiments.LENET300, name="tiny", network=Small, calibration=60, recipe=short)
    monkeypatch.setitem(experiments.COMPARED, "tiny", experiment)
    monkeypatch.setattr(experiments.Experiment, "load_data", lambda self, folder=None: data)


def call(*arguments):
    return CliRunner().invoke(cli.app, ["compare", *map(str, arguments)])


def test_the_command_computes_writes_and_goes_on(tiny, tmp_path, monkeypatch):
    common = ["tiny", "--bytes", "20%,40%", "--seeds", 1, "--run-dir", tmp_path / "run", "--output", tmp_path / "out"]
    first = call(*common, "--contenders", "SVD, 8 bits")
    assert first.exit_code == 0, first.exception
    assert "Written:" in first.stdout and "SVD, 8 bits" in first.stdout
    computed, real = [], run.plans_of
    monkeypatch.setattr(run, "plans_of", lambda *given: computed.append(given[1].name) or real(*given))
    assert call(*common, "--contenders", "SVD, 8 bits,low rank, two-sided, 8 bits").exit_code == 0
    assert computed == ["low rank, two-sided, 8 bits"]
    rows = (tmp_path / "out" / "tiny.csv").read_text().splitlines()
    assert len(rows) == 1 + 1 + 2 * 2 and rows[0].startswith("experiment,seed,method,size,bytes")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"tiny.{kind}" for kind in ("csv", "md", "png", "svg")
    }
    assert "low rank, two-sided, 8 bits" in (tmp_path / "out" / "tiny.md").read_text()
    shown = call("tiny", "--table-only", "--run-dir", tmp_path / "run", "--json")
    listed = json.loads(shown.stdout)
    assert len(listed) == 5 and len(computed) == 1
    assert all(row["bytes"] <= row["size"] for row in listed)


def test_workers_make_the_same_rows_in_any_database(tiny, tmp_path):
    common = ["tiny", "--bytes", "20%,40%", "--seeds", 1, "--run-dir", tmp_path, "--json"]
    common += ["--contenders", "SVD, 8 bits,NISP,low rank, two-sided, 8 bits"]
    one, two = (
        json.loads(call(*common, "--workers", count, "--database", tmp_path / f"{count}.sqlite").stdout)
        for count in (1, 2)
    )
    for row in (*one, *two):
        for measured in ("seconds", "latency", "faster"):
            del row[measured]
    assert len(one) == 1 + 2 * 3 and one == two
    assert not (tmp_path / "results.sqlite").exists()


def test_rows_of_a_file_are_gone_on_from_where_the_network_is_the_same(tiny, tmp_path, monkeypatch):
    common = ["tiny", "--bytes", "20%,40%", "--seeds", 1, "--contenders", "SVD, 8 bits", "--json"]
    first = call(*common, "--run-dir", tmp_path / "one", "--output", tmp_path)
    rows = tmp_path / "tiny.csv"
    monkeypatch.setattr(run, "plans_of", lambda *given: pytest.fail("computed again"))
    again = call(*common, "--run-dir", tmp_path / "two", "--rows", rows)
    assert [row["accuracy"] for row in json.loads(again.stdout)] == [
        row["accuracy"] for row in json.loads(first.stdout)
    ]
    assert call("tiny", "--table-only", "--run-dir", tmp_path / "three", "--rows", rows).exit_code == 0
    accuracy = next(row["accuracy"] for row in json.loads(first.stdout) if row["method"] == "original")
    text = rows.read_text()
    assert f",{accuracy:.6g},100," in text
    rows.write_text(text.replace(f",{accuracy:.6g},100,", ",12.5,100,"))
    other = call(*common, "--bytes", "30%", "--run-dir", tmp_path / "four", "--rows", rows)
    assert isinstance(other.exception, SlrpropError)
    assert "rows of tiny 0 in" in str(other.exception) and "its accuracy was 12.5 and is" in str(other.exception)


class Whole(Headed):
    """Two convolutions and a dense layer, looked at together."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.fc = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 12, 3), nn.Linear(12, 10)

    def head(self):
        return self

    def forward(self, x):
        return self.fc(self.two(self.one(x).relu()).relu().mean((2, 3)))


def test_a_whole_network_of_convolutions_is_compared(digits, monkeypatch, tmp_path):
    """Its bytes are those of all its layers, its file is its own, and what removes neurons of dense layers is left out."""
    x, y = digits
    data = Dataset(x[:300].view(-1, 1, 8, 8), y[:300], x[300:400].view(-1, 1, 8, 8), y[300:400])
    recipe = dataclasses.replace(experiments.LENET300.recipe, epochs=15, batch=32, learning_rate=1e-2)
    layers = ("one", "two", "fc")
    made = experiments.Experiment("whole", "mnist", Whole, layers, (), 40, recipe, whole=True)
    monkeypatch.setitem(experiments.COMPARED, "whole", made)
    monkeypatch.setattr(experiments.Experiment, "load_data", lambda self, folder=None: data)
    chosen = "spatial, 8 bits,dense, 4 bits,NISP,auto, tuned"
    given = ["whole", "--bytes", "30%", "--seeds", 1, "--contenders", chosen, "--run-dir", tmp_path]
    done = call(*given, "--output", tmp_path / "out", "--json")
    original, *rows = sorted(json.loads(done.stdout), key=lambda row: -row["bytes"])
    assert original["bytes"] == 4 * sum(p.numel() for p in Whole().parameters())
    assert {row["method"] for row in rows} == {"spatial, 8 bits", "dense, 4 bits"}
    assert all(row["bytes"] <= row["size"] and row["file_bytes"] < original["file_bytes"] for row in rows)
    assert "Treated: all layers" in (tmp_path / "out" / "whole.md").read_text()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "can't be read: "),
        ("experiment,seed\ntiny,0\n", "is not a file of rows"),
        ("experiment,seed\ntiny,none\n", "is not a file of rows"),
        ("experiment,much\ntiny,0\n", "must have the columns experiment,seed,method,size,bytes,"),
        ("seed\n0\n", "has no rows of tiny; name the CSV file that --output wrote"),
    ],
)
def test_a_file_that_has_no_rows_is_a_mistake(tiny, tmp_path, text, sentence):
    if text is not None:
        (tmp_path / "rows.csv").write_text(text)
    found = call("tiny", "--table-only", "--run-dir", tmp_path, "--rows", tmp_path / "rows.csv")
    assert isinstance(found.exception, SlrpropError) and sentence in str(found.exception)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["vgg"],
            "no experiment is called 'vgg'; there are lenet5-mnist, room-mlp, vgg16-cifar10, vgg16-cifar100, lenet300-mnist",
        ),
        (
            ["tiny", "--bytes", "1%,much"],
            "--bytes must be a positive number, like 300000, '300KB' or '25%', got 'much'",
        ),
        (["tiny", "--contenders", "SVD,best"], "no contender begins with 'best'; there are fast, slow, all"),
        (["tiny", "--table-only"], "results.sqlite' to show results from"),
    ],
)
def test_mistakes_are_one_sentence(tiny, tmp_path, arguments, sentence):
    found = call(*arguments, "--run-dir", tmp_path / "run")
    assert isinstance(found.exception, SlrpropError) and sentence in str(found.exception)
    assert not (tmp_path / "run").exists()


def test_no_rows_are_a_mistake():
    with pytest.raises(SlrpropError, match="compute them with: slrprop compare lenet5-mnist"):
        Results(LENET5, ROWS[-1:])


def test_every_contender_names_methods_and_settings_that_exist():
    for contender in CONTENDERS:
        for method, settings in (*contender.choices, *([contender.shares] if contender.shares else [])):
            assert find_method(method).settings(**settings).bits == settings.get("bits", 8 if method == "dense" else 32)
