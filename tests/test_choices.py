"""What a search chooses among its candidates, against brute force; and what it finds at each level."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

import slrprop
from slrprop import SlrpropError, compress
from slrprop.api import realised
from slrprop.data import Data
from slrprop.methods import Problem, calibrated
from slrprop.methods.calibrated import METHOD_OF
from slrprop.methods.slr import SLRSettings, kept
from slrprop.network import open_network
from slrprop.relevance.simple import weight_scores
from slrprop.search import Candidate, path
from slrprop.search.judge import Door, Judge, Log
from slrprop.search.path import LEVELS, best_places, fitted, frontier, hull, neighbours, path_of, undominated
from slrprop.search.shares import Shares
from slrprop.search.trials import Trials
from slrprop.tune import TuneSettings

POINTS = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 40)), min_size=1, max_size=9)


def candidates(points):
    return [Candidate(size, error / 7) for size, error in points]


def pairs(found):
    return [(candidate.bytes, candidate.error) for candidate in found]


@given(POINTS)
@hypothesis_settings(deadline=None)
def test_undominated_by_brute_force(points):
    given_ones = candidates(points)
    found = undominated(given_ones)

    def beaten(one):
        return any(
            (other.bytes <= one.bytes and other.error < one.error) or (other.bytes < one.bytes and other.error <= one.error)
            for other in given_ones
        )  # fmt: skip

    assert set(pairs(found)) == {
        pair for pair, one in zip(pairs(given_ones), given_ones, strict=True) if not beaten(one)
    }
    assert all(a.bytes > b.bytes and a.error < b.error for a, b in itertools.pairwise(found))


@given(POINTS)
@hypothesis_settings(deadline=None)
def test_hulls_lie_below_all_candidates(points):
    """From the largest candidate to the smallest, convex, and no candidate is below."""
    given_ones = candidates(points)
    found = hull(given_ones)
    sizes = [candidate.bytes for candidate in given_ones]
    assert (found[0].bytes, found[-1].bytes) == (max(sizes), min(sizes))
    for one in given_ones:
        for large, small in itertools.pairwise(found):
            if small.bytes <= one.bytes <= large.bytes:
                share = (large.bytes - one.bytes) / (large.bytes - small.bytes)
                assert one.error >= large.error + share * (small.error - large.error) - 1e-9
        if len(found) == 1:
            assert one.error >= found[0].error
    slopes = [(b.error - a.error) / (a.bytes - b.bytes) for a, b in itertools.pairwise(found)]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(slopes))
    assert pairs(found)[0] in pairs([one for one, _ in frontier(given_ones)])


@given(
    st.lists(POINTS, min_size=1, max_size=3), st.integers(0, 190), st.lists(st.integers(1, 20), min_size=3, max_size=3)
)
@hypothesis_settings(deadline=None, max_examples=200)
def test_best_places_against_brute_force(layers, limit, weights):
    """Never above the limit, none only where nothing fits; at most one layer's step of its hull from the optimum."""
    steps = {str(i): undominated(candidates(points)) for i, points in enumerate(layers)}
    # slightly unlike sensitivities, so that no two layers' steps have the same price
    sensitivity = {str(i): weights[i] + 1e-4 * (1 + i) ** 0.5 for i in range(len(layers))}
    found = best_places(steps, sensitivity, limit)
    every = [dict(zip(steps, at, strict=True)) for at in itertools.product(*(range(len(s)) for s in steps.values()))]

    def size(place):
        return sum(steps[name][at].bytes for name, at in place.items())

    def damage(place):
        return sum(sensitivity[name] * steps[name][at].error for name, at in place.items())

    fitting = [place for place in every if size(place) <= limit]
    assert (found is None) == (not fitting)
    if found is None:
        return
    assert found.keys() == steps.keys() and size(found) <= limit
    best = min(map(damage, fitting))
    edges = [
        sensitivity[name] * (b.error - a.error) for name, s in steps.items() for a, b in itertools.pairwise(hull(s))
    ]
    assert best <= damage(found) <= best + max(edges, default=0) + 1e-9
    for name, at in found.items():  # nothing that fits is left
        assert all(size(found | {name: i}) > limit for i in range(at))
    if len(steps) == 1:
        assert damage(found) == best
    assert best_places(steps, sensitivity, 10**6) == dict.fromkeys(steps, 0)


@given(st.lists(POINTS, min_size=1, max_size=3), st.integers(0, 190))
@hypothesis_settings(deadline=None)
def test_neighbours_fit_and_differ_in_two_layers(layers, limit):
    steps = {str(i): undominated(candidates(points)) for i, points in enumerate(layers)}
    place = best_places(steps, dict.fromkeys(steps, 1.0), limit)
    if place is None:
        return
    for other in neighbours(steps, place, limit):
        moved = [other[name] - place[name] for name in steps]
        assert moved.count(1) == 1 and sum(step < 0 for step in moved) == 1 and sum(map(bool, moved)) == 2
        assert sum(steps[name][at].bytes for name, at in other.items()) <= limit


@given(st.lists(POINTS, min_size=1, max_size=3), st.integers(0, 50))
@hypothesis_settings(deadline=None)
def test_paths_go_down(layers, rest):
    """From all layers' largest to all layers' smallest; bytes fall at every step, and predicted bytes add up."""
    found = {str(i): candidates([*points, (100, 0)]) for i, points in enumerate(layers)}
    points = path_of(found, dict.fromkeys(found, 1.0), {}, rest)
    sizes = [point.predicted_bytes for point in points]
    assert sizes[0] == rest + 100 * len(layers)
    assert sizes[-1] == rest + sum(min(candidate.bytes for candidate in curve) for curve in found.values())
    assert all(a > b for a, b in itertools.pairwise(sizes))
    assert all(a.predicted_damage <= b.predicted_damage + 1e-9 for a, b in itertools.pairwise(points))


@pytest.fixture(scope="module")
def fresh(digits):
    x, y = digits
    return x[1200:], y[1200:]


METHODS = (("low_rank", {"bits": 8}), ("low_rank", {"bits": 4}), ("nested", {"shape": "half", "bits": 4, "sweeps": 1}))


def explored(model, data, methods=METHODS, layers=None):
    opened = Data(data)
    judge = Judge(model, opened, None)
    trials = Trials(Door(model, opened), judge, Log(None))
    run = Shares(trials, Problem(open_network(model, opened), opened), methods)
    run.explore(layers)
    return run


@pytest.fixture(scope="module")
def run(trained, fresh):
    return explored(trained, fresh)


def file_bytes(model, names):
    """Bytes of the tensors that these layers of a module store."""
    return sum(
        tensor.nbytes for key, tensor in model.state_dict().items() if key.rpartition(".")[0].partition(".")[0] in names
    )


class TestWithin:
    @pytest.mark.parametrize("limit", [4000, 6001, 9000, 15000, 40000])
    def test_never_above_its_limit(self, limit, run, trained):
        """In the bytes that the layers of the network made take."""
        plan, found = run.within(limit, 3)
        stored = run.stored(plan)
        made = realised(trained, plan)
        assert stored <= limit and file_bytes(made, run.curves) <= limit
        assert file_bytes(made, run.curves) == pytest.approx(
            stored, abs=64
        )  # packed numbers of two blocks may share a byte
        assert found.bytes <= limit + 6000 and found == run.trials.evaluate(plan)

    def test_the_original_where_that_fits(self, run):
        plan, found = run.within(10**7, 3)
        assert not plan.layers and found.divergence == 0

    def test_none_where_nothing_fits(self, run):
        assert run.within(100, 3) is None

    def test_more_tries_never_do_worse(self, run):
        one, four = (run.within(7000, tries)[1].divergence for tries in (1, 4))
        assert four <= one

    def test_no_more_evaluations_than_tries(self, run):
        before = run.trials.evaluations
        run.within(8000, 2)
        assert run.trials.evaluations - before <= 2

    def test_layers_without_bias(self, fresh):
        """The bias that a fitted layer gets is counted."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 48, bias=False), nn.ReLU(), nn.Linear(48, 40, bias=False), nn.ReLU(), nn.Linear(40, 10, bias=False)).eval()  # fmt: skip
        search = explored(model, fresh[0], (("low_rank", {}), ("low_rank", {"bits": 8})))
        for limit in (3000, 9000):
            plan, _ = search.within(limit, 2)
            assert file_bytes(realised(model, plan), search.curves) <= limit


@pytest.mark.parametrize("bits", [32, 4])
def test_slr_s_pattern_is_refitted_in_order_with_its_head(bits, trained, fresh):
    shares = explored(trained, fresh, (("slr_refit", {"criterion": "weight", "bits": bits}),), ["0", "2"])
    plan, _ = shares.within(7000, 1)
    layers = {layer.name: layer for layer in plan.layers}
    assert [layer.method for layer in plan.layers] == ["slr_refit", "slr_refit", "dense"]
    for name in ("0", "2"):  # the neurons that its weights chose
        settings = SLRSettings(rank=layers[name].settings["rank"], criterion="weight")
        form = layers[name].factors
        form = form if bits == 32 else form.codes
        scores = weight_scores(shares.problem.weight(name))
        for levels, side in ((form.row_levels, scores.rows), (form.column_levels, scores.columns)):
            assert torch.equal(levels == len(form.left), kept(side, settings.sparsity_rate))


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_meets_a_budget_of_bytes(level, trained, fresh):
    found = compress(trained, fresh, max_bytes="15%", level=level, tuning=TuneSettings(epochs=2))
    assert found.met and found.bytes[1] <= 0.15 * found.bytes[0] and found.settings["level"] == level
    assert found.evaluations <= 4 + 2 * 8
    assert {layer.method for layer in found.plan.layers} <= {name for name, _ in LEVELS[level]} | {"dense"}
    assert ("tuned_epochs" in found.plan.layers[0].notes) == (level == "tuned")


def test_single_weights_are_tried_where_only_the_size_counts(trained, fresh, monkeypatch):
    def tried(**budget):
        curves = compress(trained, fresh, max_bytes="5%", size_only=True, **budget).curves.values()
        return [{candidate.layer.method for candidate in curve if candidate.layer} for curve in curves]

    assert all({"obs", "nested", "low_rank"} <= methods for methods in tried())
    assert all({"magnitude", "svd"} <= methods for methods in tried(level="weights"))
    monkeypatch.setattr("slrprop.search.shares.WIDEST", 0)  # from here on every layer is wide
    assert not any("obs" in methods for methods in tried())


def test_methods_far_behind_are_left_early_and_nothing_is_lost(fresh, monkeypatch):
    """At equal bytes the damage that is predicted is at most 2 % more than with every step of every method."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 10)
    ).eval()
    x, methods = (
        fresh[0][:64].reshape(-1, 1, 8, 8),
        tuple(choice for choice in LEVELS["calibrated"] if choice[0] != "tucker"),
    )
    few = explored(model, x, methods)
    monkeypatch.setattr("slrprop.search.path.FAR", float("inf"))
    every = explored(model, x, methods)
    counts = [sum(map(len, run.curves.values())) for run in (few, every)]
    assert counts[0] < counts[1]
    steps = [{name: undominated(curve) for name, curve in run.curves.items()} for run in (few, every)]
    original = sum(curve[0].bytes for curve in every.curves.values())
    for share in (0.05, 0.08, 0.12, 0.2, 0.3, 0.5):
        places = [best_places(some, every.sensitivity, int(share * original)) for some in steps]
        assert all(places)
        damages = [sum(every.sensitivity[name] * some[name][at].error for name, at in place.items()) for some, place in zip(steps, places, strict=True)]  # fmt: skip
        assert damages[0] <= 1.02 * damages[1]


def test_a_form_in_several_widths_is_fitted_once(trained, fresh, monkeypatch):
    fits = []
    method = METHOD_OF["nested"]
    counted = replace(method, fit=lambda task, settings: fits.append(settings) or method.fit(task, settings))
    monkeypatch.setitem(METHOD_OF, "nested", counted)
    found = explored(trained, fresh, (("nested", {"bits": 8}), ("nested", {"bits": 4})), ["0"])
    widths = Counter(candidate.layer.settings["bits"] for candidate in found.curves["0"][1:])
    assert len(fits) == len({settings.rank for settings in fits}) > 3 < min(widths[8], widths[4])


def test_plans_that_begin_alike_are_fitted_from_where_they_differ(run, monkeypatch):
    """With the very numbers that they have fitted whole."""
    place = {name: len(curve) // 2 for name, curve in run.curves.items()}
    steps = {name: list(curve) for name, curve in run.curves.items()}
    last = list(place)[-1]
    plans = [run._chosen(steps, place | {last: at}) for at in (place[last], place[last] + 1)]
    known, fits, real = {}, [], calibrated.fit_layer
    monkeypatch.setattr(calibrated, "fit_layer", lambda *given: fits.append(given[1]) or real(*given))
    _, shared = (fitted(run.problem, plan, True, known) for plan in plans)
    assert fits == [*place, last]
    assert shared.to_json() == fitted(run.problem, plans[1], True, {}).to_json()


def test_fitting_and_tuning_pay_at_equal_bytes(trained, fresh):
    """On the check part, in divergence; what the search chose for the same budget."""
    lost = dict.fromkeys(LEVELS, 0.0)
    for seed in range(2):  # one alone is within luck of some hundred samples
        _, check = Data(fresh).split(seed)
        judge = Judge(trained, check, None)
        for level in LEVELS:
            found = compress(trained, fresh, max_bytes=3500, level=level, seed=seed)
            lost[level] += judge.divergence(judge.outputs(found.model))
            assert found.bytes[1] <= 3500
    assert lost["tuned"] < lost["calibrated"] < lost["weights"]


@pytest.mark.parametrize("budget", [{"max_drop": 1.0}, {"max_bytes": "12%"}, {"max_drop": 2.0, "max_bytes": "20%"}])
def test_few_evaluations_of_ten_layers(budget, fresh):
    torch.manual_seed(0)
    wide = [part for _ in range(8) for part in (nn.Linear(40, 40), nn.ReLU())]
    model = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), *wide, nn.Linear(40, 10)).eval()
    methods = [("low_rank", {"bits": 4}), ("dense", {"bits": 8})]
    try:
        found = compress(model, fresh[0], methods=methods, **budget)
    except slrprop.BudgetError as error:
        found = error.best
    assert len(found.curves) == 10 and found.evaluations <= 4 + 2 * 10


def test_unknown_levels_and_methods(trained, fresh):
    with pytest.raises(SlrpropError, match="'auto' chooses among methods within a budget: call compress, or name one"):
        slrprop.plan(trained, fresh, "auto")
    with pytest.raises(SlrpropError, match="level must be one of weights, calibrated, tuned, got 'best'"):
        compress(trained, fresh, max_drop=1, level="best")
    for methods in ("svd", [], [("svd",)], {"svd": None}, 3):
        with pytest.raises(SlrpropError, match="methods must be 'auto' or map names to settings"):
            compress(trained, fresh, max_drop=1, methods=methods)
    with pytest.raises(SlrpropError, match="treats layers together, and the search chooses for each by itself"):
        compress(trained, fresh, max_drop=1, methods={coupled(): {}})


def coupled():
    return next(name for name, method in slrprop.methods.METHODS.items() if method.coupled)


@pytest.mark.parametrize("network", ["digits", "wide", "deep", "tanh", "convolutions"])
def test_foretold_errors_cost_next_to_nothing(network, trained, fresh, monkeypatch):
    """Against the path of plans that has every step of every ladder fitted: damage at equal bytes, by the errors of the fits."""
    from benchmarks.speed import excess, shares_of

    torch.manual_seed(0)
    x, y = fresh
    parts = {
        "wide": [nn.Linear(64, 320), nn.ReLU(), nn.Linear(320, 300), nn.ReLU(), nn.Linear(300, 10)],
        "deep": [nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10)],
        "tanh": [nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 60), nn.Tanh(), nn.Linear(60, 10)],
        "convolutions": [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.ReLU(), nn.Flatten(), nn.Linear(384, 10)],
    }  # fmt: skip
    model = trained
    if network in parts:
        model = nn.Sequential(*parts[network])
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    fits, real = [], path.Maker.fit
    monkeypatch.setattr(path.Maker, "fit", lambda *given: fits.append(given[1]) or real(*given))
    told = shares_of(model.eval(), (x[:300], y[:300]), False)
    few, every = len(fits), shares_of(model, (x[:300], y[:300]), True)
    rows = list(excess(told, every))
    assert few < 0.75 * (len(fits) - few)
    assert sum(rows) / len(rows) < 1.02 and max(rows) < 1.15


def test_a_method_whose_numbers_the_data_decide_has_all_steps_of_its_ladder(trained, fresh):
    """Nothing says where they stand between each other, so that every one is fitted or far behind."""
    fits = explored(trained, fresh, (("net_trim", {}),), ["0"]).curves["0"][1:]
    gains = [candidate.layer.settings["gain"] for candidate in fits]
    assert len(set(gains)) == len(gains) > 5 and all(candidate.error > 0 for candidate in fits)
