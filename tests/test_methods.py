"""The battery that every registered method passes, and what is special to each."""

import copy
import itertools
import json
from dataclasses import fields

import pytest
import torch
from torch import nn

import slrprop
from slrprop import SlrpropError
from slrprop.data import Data
from slrprop.forms import LowRank, Quantized
from slrprop.methods import METHODS
from slrprop.methods.slr import CRITERIA, kept
from slrprop.network import TorchNetwork
from slrprop.network.junction import Junction
from slrprop.network.torch.find import operator_of
from slrprop.operators import MatMul
from slrprop.plan import pack
from slrprop.relevance import combined, propagated

LAYERS = ["0", "2"]


def fields_of(method):
    return {field.name for field in fields(METHODS[method].settings)}


@pytest.mark.parametrize("method", METHODS, scope="class")  # so tests of one method stand together
class TestEveryMethod:
    @pytest.fixture(scope="class")
    @classmethod
    def trained(cls, method, request):
        """Dense layers; convolutions under the same names for methods that treat no others."""
        dense = METHODS[method].settings().treats(MatMul())
        return request.getfixturevalue("trained_dense" if dense else "trained_convolutions")

    @pytest.fixture(scope="class")
    @classmethod
    def plan(cls, method, trained, calibration):
        """Made once, and changed by no test."""
        made = slrprop.plan(trained, calibration, method=method, layers=LAYERS, rank=6)
        before = copy.deepcopy(made)
        yield made
        assert made.to_json() == before.to_json()
        for mine, theirs in zip(made.layers, before.layers, strict=True):
            arrays = mine.factors.arrays()
            assert all(torch.equal(arrays[name], value) for name, value in theirs.factors.arrays().items())

    def test_every_setting_is_held_to_its_annotation(self, method):
        settings = METHODS[method].settings
        for name in {*settings.names()} - {"frl"}:  # a layer's name: the network knows which there are
            with pytest.raises(slrprop.SlrpropError, match=f"^{name} must be "):
                settings(**{name: object()})

    def test_computes_what_its_factors_say(self, plan, trained, digits):
        small = slrprop.apply(trained, plan)
        twin = copy.deepcopy(trained)
        for layer in plan.layers:
            module = twin.get_submodule(layer.name)
            module.weight.data = operator_of(module).stored(layer.factors.dense()).contiguous()
            bias = layer.bias
            module.bias.data = module.bias.data if bias is None else bias
        x = digits[0]
        torch.testing.assert_close(small(x), twin(x), rtol=1e-4, atol=1e-4)

    def test_leaves_the_original_alone(self, plan, trained, calibration, method):
        before = {name: value.clone() for name, value in trained.state_dict().items()}
        trained.train()
        slrprop.apply(trained, slrprop.plan(trained, calibration, method=method, layers=LAYERS, rank=6))
        assert trained.training and all(module.training for module in trained.modules())
        trained.eval()
        assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items())

    def test_same_data_same_plan(self, plan, trained, calibration, method):
        again = slrprop.plan(trained, calibration, method=method, layers=LAYERS, rank=6)
        assert plan.to_json() == again.to_json()

    def test_a_saved_plan_gives_the_same_network(self, plan, trained, digits, tmp_path, method):
        plan.save(tmp_path / "plan.json")
        loaded = slrprop.Plan.load(tmp_path / "plan.json")
        assert loaded == plan and (loaded.layers[0].factors is None) == METHODS[method].settings.rebuilt
        mine, theirs = slrprop.apply(trained, plan), slrprop.apply(trained, loaded)
        assert torch.equal(mine(digits[0]), theirs(digits[0]))

    def test_saved_networks_load(self, plan, trained, digits, tmp_path):
        small = slrprop.apply(trained, plan)
        slrprop.save(small, tmp_path / "small.safetensors")
        loaded = slrprop.load(trained, tmp_path / "small.safetensors")
        assert torch.equal(loaded(digits[0]), small(digits[0]))
        assert slrprop.measure(small, digits).bytes == (tmp_path / "small.safetensors").stat().st_size

    def test_exports_and_stays_trainable(self, plan, trained, digits, tmp_path):
        x, y = digits
        small = slrprop.apply(trained, plan)
        assert slrprop.export_onnx(small, tmp_path / "small.onnx", x[:5]) < 1e-4
        small.train()
        optimizer = torch.optim.Adam(small.parameters(), 1e-3)
        first, last = None, None
        for _ in range(20):
            last = nn.functional.cross_entropy(small(x[:300]), y[:300])
            first = last if first is None else first
            optimizer.zero_grad()
            last.backward()
            optimizer.step()
        assert last < first

    def test_stores_what_it_says(self, plan, method, trained):
        settings = METHODS[method].settings(**({"rank": 6} if "rank" in fields_of(method) else {}))
        for layer in (layer for layer in plan.layers if layer.name in LAYERS):
            operator = operator_of(trained.get_submodule(layer.name))
            alone = settings.at(operator, layer.shape).stored_numbers(*layer.shape)
            assert layer.numbers == layer.factors.numbers
            assert alone in (None, layer.numbers) or (METHODS[method].coupled and layer.numbers < alone)
            stored = sum(array.nbytes for array in layer.factors.arrays().values())
            assert layer.bytes == layer.factors.bytes == stored < 4 * layer.shape[0] * layer.shape[1]
        assert plan.compression_rate == plan.numbers / sum(layer.shape[0] * layer.shape[1] for layer in plan.layers)

    def test_is_documented(self, method):
        found = METHODS[method]
        assert found.summary.endswith(".") and any(character.isdigit() for character in found.source)

    def test_runs_without_labels(self, method, trained, calibration):
        made = slrprop.plan(trained, calibration[0], method=method, layers=LAYERS, rank=6)
        assert {layer.name for layer in made.layers} >= set(LAYERS)

    def test_never_makes_a_layer_larger(self, method, trained, calibration):
        largest = METHODS[method].settings.ladder(96, 80)[-1] | {"bits": 32}
        largest |= {"rank": 400} if method == "nested" else {"rank": 60} if "rank" in fields_of(method) else {}
        made = slrprop.plan(trained, calibration, method=method, layers=["0", "2"], **largest)
        for layer in (layer for layer in made.layers if layer.name in LAYERS):
            assert layer.bytes < 4 * layer.shape[0] * layer.shape[1]
        if {"rank"} & fields_of(method):
            assert not made.layers and set(made.left_dense) == {"0", "2"}
            numbers = trained.get_submodule("2").weight.numel()
            assert "would store" in made.left_dense["2"] and f"instead of {numbers:,}" in made.left_dense["2"]
            assert torch.equal(slrprop.apply(trained, made)(calibration[0]), trained(calibration[0]))

    @pytest.mark.parametrize("bits", [8, 4])
    def test_quantised_in_torch_and_in_onnx(self, method, bits, trained, calibration, digits, exported, tmp_path):
        x, model = digits[0], exported(trained)
        made = slrprop.plan(trained, calibration, method=method, layers=LAYERS, rank=6, bits=bits)
        packed = [layer for layer in made.layers if isinstance(layer.factors, Quantized)]
        assert {layer.name for layer in packed} == set(LAYERS)
        small = slrprop.apply(trained, made)
        assert slrprop.export_onnx(small, tmp_path / "torch.onnx", x[:5]) < 1e-4
        made.save(tmp_path / "plan.json")
        slrprop.save(small, tmp_path / "small.safetensors")
        again = slrprop.load(trained, tmp_path / "small.safetensors")
        assert torch.equal(again(x), small(x))
        torch.testing.assert_close(small.double()(x.double()).float(), again(x), rtol=1e-4, atol=1e-4)
        assert {str(t.dtype) for n, t in again.state_dict().items() if "packed" in n} <= {"torch.uint8", "torch.int16"}
        loaded = slrprop.Plan.load(tmp_path / "plan.json")
        assert torch.equal(slrprop.apply(trained, loaded)(x), again(x))
        # the same through the ONNX door, where the plan is made for the file
        through = slrprop.plan(model, calibration, method=method, rank=6, bits=bits)
        parity = slrprop.apply(model, through, tmp_path / "small.onnx", calibration)
        assert max(parity.outputs.values()) < 1e-4
        stored = sum(layer.bytes for layer in through.layers)
        dense = sum(4 * m * n for m, n in (layer.shape for layer in through.layers))
        saved = model.stat().st_size - (tmp_path / "small.onnx").stat().st_size
        assert saved > 0.7 * (dense - stored) - 6000  # nodes and names take some


@pytest.mark.parametrize("method", ["svd", "slr", "slrprop"])
def test_without_shortening_it_is_the_svd(method, trained, calibration):
    made = slrprop.plan(trained, calibration, method=method, layers=LAYERS, rank=6, sparsity_rate=0.0)
    svd = slrprop.plan(trained, None, method="svd", layers=LAYERS, rank=6)
    for mine, theirs in zip(made.layers, svd.layers, strict=True):
        torch.testing.assert_close(mine.factors.dense(), theirs.factors.dense())


def masks(plan):
    return {layer.name: (layer.kept_rows, layer.kept_columns) for layer in plan.layers}


@pytest.mark.parametrize("criterion", CRITERIA)
def test_slr_keeps_the_most_relevant(criterion, trained, calibration):
    """The kept neurons are those with the highest scores, computed here from the definition."""
    made = slrprop.plan(trained, calibration, method="slr", criterion=criterion, layers=["2"], rank=6)
    parts = {
        "weight": lambda: slrprop.relevance.weight(trained, "2"),
        "activation": lambda: slrprop.relevance.activation(trained, "2", calibration),
        "cost": lambda: slrprop.relevance.Scores(*slrprop.relevance.cost(trained, "2", calibration, rank=6)[:2]),
    }
    found = [parts[name]() for name in criterion.split("+")]
    scores = found[0] if len(found) == 1 else combined(*found)
    layer = made.layers[0]
    for side, text, levels in zip(
        scores, masks(made)["2"], (layer.factors.row_levels, layer.factors.column_levels), strict=True
    ):
        top = levels == 2
        assert top.sum() == len(side) - len(side) // 2
        assert side[top].min() >= side[~top].max()
        assert text == pack(top)


def test_activation_and_weight_scores_are_their_definitions(trained, calibration):
    x, _ = calibration
    weight = trained[2].weight.detach().T.double()
    scores = slrprop.relevance.weight(trained, "2")
    torch.testing.assert_close(scores.rows, weight.abs().sum(1))
    torch.testing.assert_close(scores.columns, weight.abs().sum(0))
    with torch.no_grad():
        hidden = trained[1](trained[0](x))
        after = trained[3](trained[2](hidden))
    scores = slrprop.relevance.activation(trained, "2", calibration)
    torch.testing.assert_close(scores.rows, hidden.abs().sum(0, dtype=torch.float64))
    torch.testing.assert_close(scores.columns, after.abs().sum(0, dtype=torch.float64))


def test_statistics_do_not_depend_on_the_batch_size(trained, digits):
    model, x = copy.deepcopy(trained).double(), digits[0].double()
    one, many = (slrprop.relevance.activation(model, "2", Data((x, None), size)) for size in (1797, 31))
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-9)


def test_slrprop_passes_a_layer_that_is_narrower_than_the_rank():
    torch.manual_seed(0)
    sides = (64, 64, 8, 64, 64, 10)
    model = nn.Sequential(*(part for m, n in itertools.pairwise(sides) for part in (nn.Linear(m, n), nn.ReLU())))[:-1]
    for way in ("original", "truncated"):
        found = slrprop.plan(model, (torch.randn(40, 64), torch.randint(0, 10, (40,))), rank=16, propagate=way)
        assert [layer.name for layer in found.layers] == ["0", "6"] and set(found.left_dense) == {"2", "4"}


def test_a_refitted_head_is_not_said_to_stay_as_it_is(trained, calibration):
    found = slrprop.plan(trained, calibration, method="low_rank", rank=16)
    assert [layer.name for layer in found.layers] == ["0", "2", "4"] and not found.left_dense


def test_slrprop_propagates_equation_6(trained, calibration):
    """Rows before the FRL by |W| @ is, all else by cost."""
    made = slrprop.plan(trained, calibration, method="slrprop", layers=LAYERS, rank=6)
    frl = slrprop.relevance.cost(trained, "2", calibration, rank=6)
    before = slrprop.relevance.cost(trained, "0", calibration, rank=6)
    weight = trained[0].weight.detach().T.double()
    rows = weight.abs() @ frl.rows
    torch.testing.assert_close(propagated(trained[0].weight.detach().T, frl.rows), rows)
    want = {"0": (rows, before.columns), "2": (frl.rows, frl.columns)}
    for layer in made.layers:
        for levels, scores in zip(
            (layer.factors.row_levels, layer.factors.column_levels), want[layer.name], strict=True
        ):
            assert torch.equal(levels == 2, kept(scores, 0.5))


def test_slrprop_at_the_frl_is_slr(trained, calibration):
    slr, prop = (slrprop.plan(trained, calibration, method=name, layers=["2"], rank=6) for name in ("slr", "slrprop"))
    assert masks(slr) == masks(prop)


def test_slrprop_finds_or_takes_the_frl(trained, calibration):
    by_default = slrprop.plan(trained, calibration, method="slrprop", rank=6)
    assert [layer.name for layer in by_default.layers] == ["0", "2"]
    named = slrprop.plan(trained, calibration, method="slrprop", rank=6, frl="0")
    assert [layer.name for layer in named.layers] == ["0"]
    with pytest.raises(SlrpropError, match="can't treat layer '4'; on this model it treats 0, 2"):
        slrprop.plan(trained, calibration, method="slrprop", layers=["4"], rank=6)
    with pytest.raises(SlrpropError, match=r"no final response layer was found.*name it with frl="):
        slrprop.plan(nn.Sequential(nn.Linear(64, 10)), calibration, method="slrprop", rank=2)


def test_slrprop_over_rank_k_weights(trained, calibration):
    original, truncated = (
        slrprop.plan(trained, calibration, rank=2, layers=LAYERS, propagate=way) for way in ("original", "truncated")
    )
    frl = slrprop.relevance.cost(trained, "2", calibration, rank=2)
    low = LowRank.from_svd(slrprop.linalg.truncated_svd(trained[0].weight.detach().T.contiguous(), 2)).dense()
    assert torch.equal(truncated.layers[0].factors.row_levels == 2, kept(propagated(low, frl.rows), 0.5))
    assert masks(original)["2"] == masks(truncated)["2"]


def test_sequential_order_measures_with_later_layers_compressed(trained, calibration):
    made = slrprop.plan(trained, calibration, method="slr", layers=LAYERS, rank=4, order="sequential")
    later = slrprop.plan(trained, calibration, method="slr", layers=["2"], rank=4)
    assert masks(made)["2"] == masks(later)["2"]
    half = copy.deepcopy(trained)
    half[2].weight.data = later.layers[0].factors.dense().T.contiguous()
    assert masks(made)["0"] == masks(slrprop.plan(half, calibration, method="slr", layers=["0"], rank=4))["0"]


def test_ties_fall_to_the_lower_index():
    assert kept(torch.zeros(5), 0.5).tolist() == [False, False, True, True, True]
    assert kept(torch.tensor([1.0, 0.0, 1.0, 1.0]), 0.5).tolist() == [False, False, True, True]


def test_neurons_are_ordered_so_that_sets_are_slices(trained, calibration):
    made = slrprop.plan(trained, calibration, method="slr", layers=LAYERS, rank=6)
    assert made.junctions == (Junction(("0",), (), {"2": 1}), Junction(("2",), (), {"4": 1}))
    small = slrprop.apply(trained, made)
    first, second = (small[place].factors().sets for place in (0, 2))
    assert first.order is None and second.order is None
    assert all(index.part is not None for index in second.rows)
    assert first.rows[1].part is None  # the network's inputs keep their order


def test_chains_are_seen_through_batch_norm(calibration):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 10)
    ).eval()
    network = TorchNetwork(model, Data(calibration))
    assert network.junction("0") == Junction(("0",), ("1",), {"3": 1}) and network.junction("3") == Junction(
        ("3",), (), {"5": 1}
    )
    made = slrprop.plan(model, calibration, rank=3)
    assert [layer.name for layer in made.layers] == ["0", "3"]


def test_layers_by_pattern_in_order_of_execution(trained, calibration):
    made = slrprop.plan(trained, calibration, method="svd", layers="[0-2]", rank=4)
    assert [layer.name for layer in made.layers] == ["0", "2"]
    everything = slrprop.plan(trained, calibration, method="svd", rank=8)
    assert [layer.name for layer in everything.layers] == ["0", "2", "4"]
    assert slrprop.plan(trained, calibration, method="svd", rank=9).left_dense == {
        "4": "rank 9 would store 810 numbers instead of 800"
    }


def test_inspect(trained):
    first, second, last = slrprop.inspect(trained)
    assert (first.name, first.shape, first.numbers, first.break_even_rank) == ("0", (64, 96), 6144, 38)
    assert second.break_even_rank == 43 and last.shape == (80, 10)
    total = sum(p.numel() for p in trained.parameters())
    assert second.share == pytest.approx(7680 / total)


def test_plans_are_plain_json(trained, calibration):
    content = json.loads(slrprop.plan(trained, calibration, rank=6).to_json())
    assert content["format"] == "slrprop-plan" and content["version"] == 2
    with pytest.raises(SlrpropError, match="solver of layer '0' is a function"):
        slrprop.plan(trained, None, method="svd", rank=2, solver=slrprop.linalg.SOLVERS["full"]).to_json()
