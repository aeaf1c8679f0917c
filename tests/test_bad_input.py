"""Every mistake ends in SlrpropError with one sentence: what was asked, what was seen, what to do."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import slrprop
from slrprop import SlrpropError
from slrprop.cli import main
from slrprop.data import Data
from slrprop.linalg import truncated_svd
from slrprop.plan import Plan

torch.set_num_threads(1)
IN, WIDE, OUT, COUNT = 10, 16, 4, 12


def network(seed: int = 0, sides: tuple[int, ...] = (IN, WIDE, WIDE, OUT)) -> nn.Sequential:
    """Layers ``0``, ``2``, ``4`` with ReLU between."""
    torch.manual_seed(seed)
    layers = [part for m, n in pairwise(sides) for part in (nn.Linear(m, n), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).eval()


def samples(count: int = COUNT) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(count, IN), torch.randint(OUT, (count,))


def plan(**changes: Any) -> Plan:
    wanted = {"model": network(), "data": samples(), "method": "slr", "rank": 3} | changes
    return slrprop.plan(wanted.pop("model"), wanted.pop("data"), **wanted)


def one_sentence(error: pytest.ExceptionInfo[SlrpropError]) -> bool:
    text = str(error.value)
    return "\n" not in text and "Traceback" not in text and 10 < len(text) < 700


def refused(match: str, call: Callable[..., Any], *given: Any, **named: Any) -> None:
    """The call ends in one sentence that says this."""
    with pytest.raises(SlrpropError, match=match) as error:
        call(*given, **named)
    assert one_sentence(error), str(error.value)


def broken(layer: str, value: float, bias: bool = False) -> nn.Module:
    model = network()
    getattr(model.get_submodule(layer), "bias" if bias else "weight").data.view(-1)[3] = value
    return model


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("bias", [False, True])
def test_weights_that_are_not_finite(value: float, bias: bool) -> None:
    for method in ("svd", "slr", "slrprop"):
        refused(r"layer '2' \(16, 16\) holds NaN or infinite", plan, model=broken("2", value, bias), method=method)
    refused("layer '2' .* NaN or infinite", slrprop.relevance.weight, broken("2", value, bias), "0")
    refused("layer '2' .* NaN or infinite", slrprop.measure, broken("2", value, bias), samples())


def test_outputs_that_are_not_finite() -> None:
    model = nn.Sequential(network(), nn.BatchNorm1d(OUT)).eval()
    model[1].running_var.fill_(torch.nan)
    refused("network's output holds NaN or infinite values", plan, model=model)


def test_a_solver_is_given_a_weight_that_is_not_finite() -> None:
    refused("10 x 16 weight holds NaN", truncated_svd, torch.full((10, 16), torch.nan), 2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_data_that_is_not_finite(value: float) -> None:
    x, y = samples()
    x[2, 3] = value
    for data in ((x, y), (x.numpy(), y.numpy()), x, [(x, y)], [{"input": x, "targets": y}]):
        refused("holds NaN or infinite values; clean the data", plan, data=data)
    x, targets = samples()[0], torch.full((COUNT, OUT), value)
    refused("target array holds NaN or infinite", plan, data=(x, targets))


WRONG_LABELS = {
    "too large": (torch.full((COUNT,), OUT), {}, "labels go from 4 to 4, but the network has 4 classes; use 0 to 3"),
    "negative": (torch.full((COUNT,), -1), {}, "labels go from -1 to -1, but the network has 4 classes"),
    "float": (samples()[1].double(), {}, r"targets of shape \(12,\) .* outputs of shape \(12, 4\)"),
    "float, named loss": (samples()[1].double(), {"loss": "cross_entropy"}, "labels must be whole numbers.*float64"),
    "one per number": (torch.zeros(COUNT, 2).long(), {}, "got 24 labels for 12 rows of outputs; give one label"),
    "uneven float": (torch.zeros(COUNT, 2, 3), {}, r"targets of shape .* outputs of shape \(12, 4\)"),
    "none": (None, {"loss": "cross_entropy"}, "'cross_entropy' needs labels, and the data has none"),
}


@pytest.mark.parametrize(("targets", "loss", "match"), WRONG_LABELS.values(), ids=WRONG_LABELS)
def test_labels_that_do_not_fit(targets: Any, loss: dict[str, str], match: str) -> None:
    refused(match, plan, data=(samples()[0], targets), **loss)


def test_real_targets_for_outputs_per_token() -> None:
    refused(r"targets of shape \(5,\)|targets of shape \(5, 1\)", plan, data=(torch.randn(5, 3, IN), torch.randn(5)))


@pytest.mark.parametrize("labels", [torch.full((COUNT,), OUT), torch.full((COUNT,), -1), torch.rand(COUNT), None])
def test_labels_that_do_not_fit_a_measure(labels: Any) -> None:
    refused("labels", slrprop.measure, network(), (samples()[0], labels))


@pytest.mark.parametrize("rank", [0, -3, 2.5, "4", None, True, float("nan"), [4], 10**30])
@pytest.mark.parametrize("method", ["svd", "slr", "slrprop"])
def test_ranks(rank: Any, method: str) -> None:
    match = f"rank must be a whole number from 1, got {re.escape(repr(rank))}"
    refused(match if rank != 10**30 else f"rank {rank} is above its smaller side", plan, rank=rank, method=method)


def test_ranks_of_cost_scores() -> None:
    for rank in (0, -1, 2.0):
        refused("rank must be a whole number", slrprop.relevance.cost, network(), "2", samples(), rank=rank)
    refused("rank 17 was asked of a 16 x 16", slrprop.relevance.cost, network(), "2", samples(), rank=17)


@pytest.mark.parametrize("method", ["svd", "slr"])
def test_ranks_above_a_layer(method: str) -> None:
    refused(
        r"layer '0' \(10 x 16\) can't be treated: rank 11 is above its smaller side 10; choose",
        plan,
        rank=11,
        layers="0",
        method=method,
    )
    refused(
        f"{method} can treat none of the layers asked for .*0: rank 17 is above its smaller side 10",
        plan,
        rank=17,
        method=method,
    )
    made = plan(rank=5, method="svd")
    assert made.left_dense == {"4": "rank 5 is above its smaller side 4"}


@pytest.mark.parametrize("layers", [None, "2", "*"])
def test_a_rank_past_break_even_leaves_the_layer_dense(layers: Any) -> None:
    made = plan(method="svd", rank=8, layers=layers)
    assert "2" not in [layer.name for layer in made.layers]
    assert made.left_dense["2"] == "rank 8 would store 256 numbers instead of 256"
    assert "2: left dense (rank 8 would store" in str(made)
    model = network()
    assert torch.equal(slrprop.apply(model, made)(samples()[0]), model(samples()[0])) or made.layers


@pytest.mark.parametrize("rate", [-0.1, 1, 1.0, 2, float("nan"), float("inf"), "0.5", None, True, [0.5]])
@pytest.mark.parametrize("name", ["sparsity_rate", "reduction_rate"])
def test_rates(rate: Any, name: str) -> None:
    match = f"{name} must be at least 0 and below 1, got {re.escape(repr(rate))}"
    for method in ("slr", "slrprop"):
        refused(match, plan, method=method, **{name: rate})
    if name == "reduction_rate":
        refused(match, slrprop.relevance.cost, network(), "2", samples(), reduction_rate=rate)


WRONG_WORDS = {
    "method": ({"method": "slrpop"}, "method must be one of svd, slr, .*'slrpop'; did you mean .*slrprop"),
    "no method": ({"method": None}, "method must be one of .*got None"),
    "many methods": ({"method": ["svd", "slr"]}, "method must be one of"),
    "criterion": ({"criterion": "wieght"}, "criterion must be one of .*'wieght'; did you mean .*weight"),
    "baseline": ({"baseline": "orignal"}, "baseline must be one of .*did you mean original"),
    "solver": ({"solver": "lanzos"}, "solver must be one of .*did you mean lanczos"),
    "order": ({"order": "sequental"}, "order must be one of .*did you mean sequential"),
    "loss": ({"loss": "mse"}, "loss must be one of cross_entropy, kl, squared, got 'mse'"),
    "propagate": ({"method": "slrprop", "propagate": "no"}, "propagate must be one of original, truncated"),
    "setting": ({"criterium": "cost"}, "method 'slr' has no setting 'criterium'; did you mean criterion"),
    "other's setting": ({"method": "svd", "criterion": "cost"}, "method 'svd' has no setting 'criterion'"),
    "frl": ({"method": "slrprop", "frl": "nope"}, "no layer is called 'nope'.*the model has 0, 2, 4"),
    "frl no name": ({"method": "slrprop", "frl": 2}, "no layer is called|frl must be"),
    "layer": ({"layers": "6"}, "no layer is called '6'.*the model has 0, 2, 4"),
    "pattern": ({"layers": ["0", "head.*"]}, r"no layer is called 'head\.\*'"),
    "no layers": ({"layers": []}, "none of the layers asked for"),
    "layers a number": ({"layers": 2}, "layers must be|no layer is called"),
    "layers of numbers": ({"layers": [0, 2]}, "layers must be|no layer is called"),
    "not for the method": ({"method": "slrprop", "layers": "4"}, "'slrprop' can't treat layer '4'; .* it treats 0, 2"),
    "no data": ({"data": None}, "needs? calibration data.* none was given"),
    "a state dict": ({"model": network().state_dict()}, "model must be a torch.nn.Module or the path of an .onnx file, got OrderedDict"),
    "no model": ({"model": None}, "model must be a torch.nn.Module or the path of an .onnx file, got NoneType"),
    "no dense layer": ({"model": nn.Sequential(nn.ReLU())}, "the model has no layer"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "match"), WRONG_WORDS.values(), ids=WRONG_WORDS)
def test_words_that_nobody_knows(changes: dict[str, Any], match: str) -> None:
    refused(match, plan, **changes)


def test_near_names_are_suggested() -> None:
    model = nn.Sequential()
    model.add_module("encoder", nn.Linear(IN, WIDE))
    model.add_module("decoder", nn.Linear(WIDE, OUT))
    refused("'encodr'; did you mean encoder", plan, model=model, layers="encodr")
    refused("'encodr'; did you mean encoder", slrprop.relevance.weight, model, "encodr")
    refused("baseline must be one of", slrprop.relevance.cost, model, "encoder", samples(), baseline="x")
    refused("no loss is called 'x'", slrprop.relevance.cost, model, "encoder", samples(), rank=3, loss="x")
    refused("no solver is called 'x'", slrprop.relevance.cost, model, "encoder", samples(), rank=3, solver="x")
    refused("solver gave factors of shapes", plan, solver=lambda w, k: (w, w, w), criterion="weight")


@pytest.mark.parametrize(
    "settings", [{"rank": np.int64(3)}, {"sparsity_rate": np.float32(0.5)}, {"bits": np.int64(4)}], ids=str
)
def test_numpy_numbers_are_numbers(settings: dict[str, Any], tmp_path: Path) -> None:
    made = plan(criterion="weight", **settings)
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made


class Awkward(nn.Module):
    """Raises what careless code raises on data of another kind."""

    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.layer, self.error = nn.Linear(IN, OUT), error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error("of another kind")


@pytest.mark.parametrize("error", [AssertionError, KeyError, AttributeError, NotImplementedError, ZeroDivisionError])
def test_a_model_that_refuses_its_data(error: type[Exception]) -> None:
    refused("the model can't take data of shape .*of another kind", plan, model=Awkward(error), method="svd")


def test_attention_of_another_width() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(WIDE, 2, 8, batch_first=True), nn.Linear(WIDE, OUT))
    refused("the model can't take data of shape", plan, model=model, data=torch.randn(4, 3, IN))


def numbers() -> np.ndarray:
    return samples()[0].numpy()


WRONG_DATA = {
    "wrong width": (torch.randn(COUNT, IN + 1), r"the model can't take data of shape \(12, 11\): .*(shape|size)"),
    "integers": (torch.ones(COUNT, IN).long(), r"the model can't take data of shape \(12, 10\)"),
    "empty": (torch.zeros(0, IN), "the data is empty; give at least one sample"),
    "no batches": ([], "the data holds no batches; give at least one sample"),
    "an empty batch": ([(torch.zeros(0, IN), torch.zeros(0).long())], "empty|at least one sample"),
    "a later empty batch": ([samples(), (torch.zeros(0, IN), torch.zeros(0).long())], "empty|at least one sample"),
    "unequal lengths": ((torch.zeros(5, IN), torch.zeros(4).long()), r"as many samples each, got shapes \[\(5, 10\), \(4,\)\]"),
    "one number": (torch.tensor(3.0), r"as many samples each, got shapes \[\(\)\]|at least one axis"),
    "objects": (np.array([[1, None]] * 4), "input array must hold numbers, got dtype object"),
    "words": (np.array(["a", "b"]), "an input of the data holds text, which a torch module can.t take"),
    "labels in words": ((samples()[0], np.array(["a"] * COUNT)), "the label .a. is text, and the model names no classes; give class numbers"),
    "complex": (np.ones((COUNT, IN), complex), "input array must hold numbers, got dtype complex128"),
    "complex tensor": (torch.ones(COUNT, IN, dtype=torch.complex64), "must hold numbers|can't take data"),
    "dates": (np.zeros(COUNT, "datetime64[s]"), "input array must hold numbers, got dtype datetime64"),
    "long double": (numbers().astype(np.longdouble), "input array .*(longdouble|float128)"),
    "an iterator": (iter([samples()]), "one-time iterator can't be read twice"),
    "a generator": ((part for part in [samples()]), "got generator; a one-time iterator can't be read twice"),
    "a number": (5, "data must be a DataLoader, a pair of arrays, or the path of an .npz, got int"),
    "a mapping": ({"x": {1: 2}}, "data must be a DataLoader, .*got dict"),
    "batches of words": (["some", "words"], "a batch must be a tensor, .*got str"),
    "batches of nothing": ([None], "a batch must be a tensor, .*got NoneType"),
    "batches of lists": ([[[1.0] * IN, 2]], "a batch must be a tensor, .*got list"),
    "too many inputs": ([(torch.zeros(2, IN), torch.zeros(2, IN), torch.zeros(2).long())], r"can't take data of shape \(2, 10\), \(2, 10\)"),
    "unknown name": ([{"nobody": torch.zeros(2, IN)}], "the model can't take data of shape"),
    "no such file": ("missing.npz", r"'missing\.npz' can't be read as an \.npz of plain arrays: .*No such file"),
    "a folder": (Path(), r"can't be read as an \.npz of plain arrays"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "match"), WRONG_DATA.values(), ids=WRONG_DATA)
def test_data_of_another_kind(data: Any, match: str) -> None:
    refused(match, plan, data=data)


@pytest.mark.parametrize(("inputs", "targets"), [(">f4", "i8"), ("f4", ">i8"), ("f2", "i4"), ("f8", "u1")])
def test_number_formats_of_other_machines_are_read(inputs: str, targets: str) -> None:
    """Arrays in the other byte order come out of many file formats."""
    x, y = samples()
    batch = next(iter(Data((x.numpy().astype(inputs), y.numpy().astype(targets)))))
    torch.testing.assert_close(batch.inputs[0].float(), x, rtol=1e-2, atol=1e-3)
    assert torch.equal(batch.targets.long(), y)


@pytest.mark.parametrize("write", [
    lambda path: np.savez(path, a=np.array([1, "x", None], object)),
    lambda path: np.savez(path, targets=np.zeros(3, int)),
    lambda path: np.savez(path, x=np.zeros((3, IN)), targets=np.zeros(2, int)),
    lambda path: np.savez(path, x=np.full((3, IN), np.nan)),
    lambda path: np.savez(path),
    lambda path: np.savez(path, x=np.zeros((3, IN), np.longdouble)),
    lambda path: np.savez(path, x=np.zeros((3, IN), "datetime64[s]")),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"PK\x03\x04 no zip"),
    lambda path: np.save(path.open("wb"), np.zeros(3)),
    lambda path: path.mkdir(),
], ids=["objects", "targets alone", "unequal", "NaN", "nothing", "long double", "dates", "empty", "no zip", "npy", "folder"])  # fmt: skip
def test_npz_files_of_another_kind(write: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    write(path)
    refused(r"data\.npz|as many samples|\.npz", plan, data=path)


def test_models_that_are_not_there_yet() -> None:
    lazy = nn.Sequential(nn.LazyLinear(WIDE), nn.ReLU(), nn.Linear(WIDE, OUT))
    with torch.device("meta"):
        empty = network()
    for model in (lazy, empty):
        refused("initiali[sz]ed|meta|no values", plan, model=model, data=None, method="svd")


# Plans, models and files that do not belong together


def renamed(model: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Sequential(*model))


@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize("method", ["svd", "slr", "slrprop"])
def test_a_plan_for_another_model(method: str, from_file: bool, tmp_path: Path) -> None:
    made = plan(method=method)
    if from_file:
        made.save(tmp_path / "plan.json")
        made = Plan.load(tmp_path / "plan.json")
    narrow = network(0, (IN, WIDE + 1, WIDE, OUT))
    refused("the plan treats layer '0', which this model does not have", slrprop.apply, renamed(network()), made)
    refused("'0' is 10 x 16, this model's is 10 x 17; it was made for another model", slrprop.apply, narrow, made)
    refused("weights of layer '0' differ from those the plan was made for", slrprop.apply, network(5), made)
    refused("weights of layer '0' differ", slrprop.apply, network().double(), made)


def test_a_plan_whose_junctions_are_another_models() -> None:
    made = plan(layers=["0", "2"])
    wider = network()
    wider[4] = nn.Linear(WIDE + 1, OUT)
    refused("'2' feeds '4', whose sizes differ", slrprop.apply, wider, made)


def test_files_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    slrprop.save(slrprop.apply(network(), plan()), path)
    refused("no layer of that name", slrprop.load, renamed(network()), path)
    refused("10 x 17 in this model, but 10 x 16 in the file", slrprop.load, network(0, (IN, 17, WIDE, OUT)), path)
    slrprop.save(network(), path)
    refused("does not fit this model: .*17", slrprop.load, network(0, (IN, 17, WIDE, OUT)), path)
    refused("does not fit this model: it has no ", slrprop.load, nn.Sequential(*network(), nn.Linear(OUT, 2)), path)
    refused("does not fit this model: it has a foreign 4", slrprop.load, network()[:3], path)
    save_file(network().state_dict(), path)
    refused(r"was not written by slrprop\.save .*None", slrprop.load, network(), path)
    for raw in (b"", b"{}", b"\xff" * 64, b"PK\x03\x04"):
        path.write_bytes(raw)
        refused("can't be read as a safetensors file", slrprop.load, network(), path)
    refused("can't be read as a safetensors file", slrprop.load, network(), tmp_path / "missing")
    refused("can't be read as a safetensors file", slrprop.load, network(), tmp_path)


@pytest.mark.parametrize("header", [
    {"layers": "[]"}, {"layers": "no json"}, {"layers": '{"0": 5}'}, {"layers": '{"0": "magic"}'},
    {"layers": '{"0": "low_rank"}'}, {"layers": '{"0": "dense"}'}, {"layers": "[" * 100000}, {"version": "99"},
    {"format": "other"}, {"layers": '{"0": "sparse_low_rank"}'}, {"layers": '{"nobody": "low_rank"}'},
], ids=lambda header: str(header)[:40])  # fmt: skip
def test_foreign_headers(header: dict[str, str], tmp_path: Path) -> None:
    whole = {"format": "slrprop-model", "version": "1", "layers": "{}"} | header
    save_file(network().state_dict(), tmp_path / "model.safetensors", whole)
    refused("model.safetensors|layer '(0|nobody)'|a magic layer|low_rank layer", slrprop.load, network(), tmp_path / "model.safetensors")  # fmt: skip


def edited(change: Callable[[dict[str, Any]], Any]) -> bytes:
    content = json.loads(plan().to_json())
    change(content)
    return json.dumps(content).encode()


def joined(maker: str, *carriers: str, **readers: int) -> bytes:
    """The plan with one junction of these."""
    return edited(lambda plan: plan.update(junctions=[{"makers": [maker], "carriers": carriers, "readers": readers}]))


WRONG_PLANS = {
    "empty": (b"", "is not a readable plan"),
    "no json": (b"{", "is not a readable plan"),
    "no text": (b"\xff\xfe\x00", "is not a readable plan"),
    "deep": (b"[" * 200000, "is not a readable plan"),
    "a list": (b"[]", "is not a slrprop plan; write one with Plan.save"),
    "foreign": (b'{"format": "other"}', "is not a slrprop plan"),
    "version": (edited(lambda plan: plan.update(version=9)), "has plan version 9; this slrprop reads versions 1 and 2"),
    "no version": (edited(lambda plan: plan.pop("version")), "has plan version None"),
    "no layers": (edited(lambda plan: plan.pop("layers")), "is not a readable plan: .*layers"),
    "layers of numbers": (edited(lambda plan: plan.update(layers=[1])), "is not a readable plan"),
    "one side": (edited(lambda plan: plan["layers"][0].update(shape=[3])), "is not a readable plan"),
    "no fingerprint": (edited(lambda plan: plan["layers"][0].pop("fingerprint")), "is not a readable plan"),
    "method": (edited(lambda plan: plan["layers"][0].update(method="x")), "plan's method must be one of"),
    "setting": (edited(lambda plan: plan["layers"][0]["settings"].update(x=1)), "settings of layer '0' are not those"),
    "rank 0": (edited(lambda plan: plan["layers"][0]["settings"].update(rank=0)), "rank must be a whole number"),
    "high rank": (edited(lambda plan: plan["layers"][0]["settings"].update(rank=99)), "rank 99 was asked of a 10 x 16"),
    "rank of text": (edited(lambda plan: plan["layers"][0]["settings"].update(rank="3")), "rank must be a whole number"),
    "rate": (edited(lambda plan: plan["layers"][0]["settings"].update(sparsity_rate=7)), "sparsity_rate must be"),
    "no mask": (edited(lambda plan: plan["layers"][0].update(kept_rows="zz")), "neuron set 'zz' is not 10 hexadecimal"),
    "long mask": (edited(lambda plan: plan["layers"][0].update(kept_rows="fff")), "neuron set 'fff' is not 10"),
    "signed mask": (edited(lambda plan: plan["layers"][0].update(kept_rows="+01")), "neuron set '\\+01' is not 10"),
    "spaced mask": (edited(lambda plan: plan["layers"][0].update(kept_rows="0_1")), "neuron set '0_1' is not 10"),
    "too few kept": (edited(lambda plan: plan["layers"][0].update(kept_rows="001")), "neurons|numbers"),
    "other neurons": (edited(lambda plan: plan["layers"][0].update(kept_rows="01f")), "damaged|neurons"),
    "numbers": (edited(lambda plan: plan["layers"][0].update(numbers=1)), "numbers"),
    "twice": (edited(lambda plan: plan["layers"].append(plan["layers"][0])), "twice|more than once"),
    "feeds nobody": (joined("0", nobody=1), "'nobody', which this model does not have"),
    "feeds itself": (joined("2", **{"2": 1}), "'2' feeds '2', which can't be; the file is damaged"),
    "feeds backwards": (joined("2", **{"0": 1}), "'2' feeds '0', whose sizes differ"),
    "feeds no row": (joined("0", **{"2": 0}), "'0' feeds '2', whose sizes differ"),
    "feeds all and none": (joined("0"), "'0' feeds , which can't be; the file is damaged"),
    "carried by itself": (joined("0", "0", **{"2": 1}), "it differs from its checksum"),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "match"), WRONG_PLANS.values(), ids=WRONG_PLANS)
def test_plans_of_another_kind(raw: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(raw)
    refused(match, lambda: slrprop.apply(network(), Plan.load(tmp_path / "plan.json")))


def test_plan_paths(tmp_path: Path) -> None:
    refused("the plan '.*missing' can't be read: No such file", Plan.load, tmp_path / "missing")
    refused("can't be read: Is a directory", Plan.load, tmp_path)
    named_by_function = plan(solver=lambda w, k: torch.linalg.svd(w, full_matrices=False), rank=10, layers="0")
    assert named_by_function.left_dense


# Damaged files: an error or the right result, nothing else


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(samples()[0])


def plan_file(path: Path) -> None:
    plan().save(path)


def model_file(path: Path) -> None:
    slrprop.save(slrprop.apply(network(), plan()), path)


def data_file(path: Path) -> None:
    x, y = samples()
    with path.open("wb") as file:
        np.savez(file, x=x.numpy(), targets=y.numpy())


def packed_data_file(path: Path) -> None:
    x, y = samples()
    with path.open("wb") as file:
        np.savez_compressed(file, x=x.numpy(), targets=y.numpy())


def all_numbers(path: Path) -> Tensor:
    batch = next(iter(Data(path)))
    parts = [*batch.inputs, *batch.named.values(), *([] if batch.targets is None else [batch.targets])]
    return torch.cat([part.double().reshape(-1) for part in parts])


FILES: dict[str, tuple[Callable[[Path], None], Callable[[Path], Tensor]]] = {
    "plan": (plan_file, lambda path: outputs(slrprop.apply(network(), Plan.load(path)))),
    "model": (model_file, lambda path: outputs(slrprop.load(network(), path))),
    "data": (data_file, all_numbers),
    "packed data": (packed_data_file, all_numbers),
}


@cache
def intact(kind: str) -> tuple[bytes, Tensor]:
    write, read = FILES[kind]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.npz"
        write(path)
        return path.read_bytes(), read(path)


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Flip bits of a few bytes, or cut the file, or put something behind it."""
    how = draw(st.sampled_from(["flip", "cut", "append"]))
    place, bits = st.floats(0, 1, exclude_max=True), st.integers(1, 255)
    flips = draw(st.lists(st.tuples(place, bits), min_size=1, max_size=3))

    def change(raw: bytes) -> bytes:
        if how == "cut":
            return raw[: int(flips[0][0] * len(raw))]
        if how == "append":
            return raw + bytes(value for _, value in flips)
        content = bytearray(raw)
        for where, value in flips:
            content[int(where * len(raw))] ^= value
        return bytes(content)

    return change


def after(kind: str, change: Callable[[bytes], bytes]) -> Tensor | None:
    """What a damaged file gives; None where it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.npz"
        path.write_bytes(change(intact(kind)[0]))
        try:
            return FILES[kind][1](path)
        except SlrpropError:
            return None


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_raises_nothing_else(kind: str) -> None:
    @settings(derandomize=True, deadline=None, max_examples=100)
    @given(damage())
    def check(change: Callable[[bytes], bytes]) -> None:
        after(kind, change)

    check()


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_gives_no_other_result(kind: str) -> None:
    @settings(derandomize=True, deadline=None, max_examples=100)
    @given(damage())
    def check(change: Callable[[bytes], bytes]) -> None:
        try:
            found = after(kind, change)
        except Exception:  # the other test's matter
            return
        assert found is None or torch.equal(found, intact(kind)[1])

    check()


def test_every_flipped_bit_of_an_npz_directory() -> None:
    """The directory at the end of the file is what no checksum guards."""
    raw, right = intact("data")
    start = raw.index(b"PK\x01\x02")
    wrong = []
    for place in range(start, len(raw)):
        for bit in range(8):
            flipped = bytes([*raw[:place], raw[place] ^ 1 << bit, *raw[place + 1 :]])
            try:
                found = after("data", lambda _, flipped=flipped: flipped)
            except Exception as error:
                wrong.append((place - start, bit, repr(error)))
            else:
                if found is not None and not torch.equal(found, right):
                    wrong.append((place - start, bit, "other numbers"))
    assert wrong == []


# Writing


WRITERS: dict[str, Callable[[Path], Any]] = {
    "plan.save": lambda path: plan(criterion="weight").save(path),
    "save": lambda path: slrprop.save(network(), path),
    "export_onnx": lambda path: slrprop.export_onnx(network(), path, samples()[0]),
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_folders_that_are_missing_or_no_folders(writer: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    for path in (
        tmp_path / "missing" / "file",
        tmp_path / "file" / "file",
        tmp_path / "folder",
        tmp_path / ("x" * 300),
    ):
        refused("could not be written .*; nothing was left behind", writer, path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "inner"]
    assert (tmp_path / "file").read_text() == "old"


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from slrprop import SlrpropError
from tests.test_bad_input import WRITERS
folder = Path(sys.argv[1])
for name, writer in WRITERS.items():
    writer(folder / name)
old = {name: (folder / name).read_bytes() for name in WRITERS}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for name, writer in WRITERS.items():
    try:
        writer(folder / name)
        print(name, "was written")
    except SlrpropError as error:
        print(name, "refused:", error)
    except BaseException as error:
        print(name, type(error).__name__, error)
assert {path.name: path.read_bytes() for path in folder.iterdir()} == old
"""


def python(code: str, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder or root, env=environment, capture_output=True, text=True
    )


def test_a_disk_that_fills_up_keeps_the_old_file(tmp_path: Path) -> None:
    done = python(FULL_DISK, str(tmp_path))
    said = [line for line in done.stdout.splitlines() if line.startswith(tuple(WRITERS))]
    assert [line.partition(": ")[0] for line in said] == [f"{name} refused" for name in WRITERS], (
        done.stdout + done.stderr
    )
    assert all("could not be written (File too large)" in line for line in said)
    assert done.returncode == 0, done.stderr


WRONG_EXAMPLES = {
    "wrong width": (torch.randn(3, IN + 1), {}, r"model can't take data of shape \(3, 11\)|can't be exported"),
    "one sample": (torch.randn(1, IN), {}, "the example input has one sample; give two or more, or dynamic_batch=False"),
    "one number": (torch.tensor(1.0), {}, "example input"),
    "objects": (np.array([None, 1]), {}, "example input|must hold numbers"),
    "words": ("words", {}, "example input"),
    "nothing": ((), {}, "example input|can't take data"),
    "too many": ((torch.randn(3, IN), torch.randn(3, IN)), {}, "can't take data|can't be exported"),
    "NaN": (torch.full((3, IN), torch.nan), {}, "NaN"),
}  # fmt: skip


@pytest.mark.parametrize(("example", "more", "match"), WRONG_EXAMPLES.values(), ids=WRONG_EXAMPLES)
def test_examples_that_the_model_can_not_take(example: Any, more: dict[str, Any], match: str, tmp_path: Path) -> None:
    refused(match, slrprop.export_onnx, network(), tmp_path / "model.onnx", example, **more)
    assert list(tmp_path.iterdir()) == []


# The command line


def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What a failing command prints to stderr."""
    monkeypatch.setattr(sys, "argv", ["slrprop", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code not in (0, None)
    return capsys.readouterr().err


WRONG_COMMANDS = {
    "paper table nonsense": "no experiment is called 'nonsense'; there are",
    "paper run nonsense": "no experiment is called 'nonsense'; there are",
    "paper table room-mlp": "",
    "paper table room-mlp --run-dir file": "file",
    "paper run room-mlp --data missing": "data folder 'missing' holds neither",
    "paper run room-mlp --data data": "room",
    "paper run lenet5-mnist --data data": "mnist",
    "paper figures --output out": "",
    "demo --output file/inside": "file/inside",
}


@pytest.mark.parametrize(("arguments", "match"), WRONG_COMMANDS.items(), ids=WRONG_COMMANDS)
def test_a_command_ends_in_one_sentence(
    arguments: str, match: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a file")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "room_occupancy.csv").write_text("date,time\n1,2\n")
    (tmp_path / "data" / "mnist.npz").write_bytes(b"no zip")
    text = command(capsys, monkeypatch, *arguments.split())
    assert re.fullmatch(f"error: [^\n]*{match}[^\n]*\n", text), text


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["methods", "--nonsense"], ["paper", "run"], ["paper", "run", "room-mlp", "--seeds", "-1"]],
    ids=" ".join,
)
def test_a_misspelt_command_shows_how_to_get_help(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = command(capsys, monkeypatch, *arguments)
    assert "Error" in text
    assert "--help" in text


def test_the_process_ends_with_a_code_and_no_traceback(tmp_path: Path) -> None:
    done = python("import sys; from slrprop.cli import main; main()", "paper", "table", "nonsense", folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: no experiment is called 'nonsense'[^\n]*\n", done.stderr)


@pytest.mark.parametrize("name", ["model", "data", "method", "layers", "rank", "sparsity_rate", "problem"])
def test_settings_that_have_options_of_their_own(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slrprop.export_onnx(network(), tmp_path / "model.onnx", samples()[0])
    monkeypatch.chdir(tmp_path)
    text = command(capsys, monkeypatch, *f"plan model.onnx --method svd -o plan.json --set {name}=2".split())
    assert re.fullmatch(f"error: [^\n]*{name}[^\n]*\n", text), text


def test_a_setting_of_deep_brackets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slrprop.export_onnx(network(), tmp_path / "model.onnx", samples()[0])
    monkeypatch.chdir(tmp_path)
    arguments = ["plan", "model.onnx", "--method", "svd", "-o", "plan.json", "--set", "bits=" + 9999 * "["]
    assert command(capsys, monkeypatch, *arguments).startswith("error: bits must be 32, 8 or 4")


@pytest.mark.parametrize("bits", [3, "4", True, 4.0, None, torch.tensor(4)], ids=repr)
def test_bits(bits: Any) -> None:
    refused("bits must be 32, 8 or 4", plan, method="svd", bits=bits)


@pytest.mark.parametrize("sweeps", [-1, 1.5, True, "2", None], ids=repr)
@pytest.mark.parametrize("method", ["nested", "slr_refit"])
def test_sweeps(method: str, sweeps: Any) -> None:
    refused("sweeps must be a whole number from 0", plan, method=method, sweeps=sweeps)


@pytest.mark.parametrize(
    ("method", "name"),
    [("slr", "sparsity_rate"), ("magnitude", "density"), ("low_rank_plus_sparse", "density"), ("nisp", "keep"), ("ddlr", "gain")],
)  # fmt: skip
def test_numbers_too_large_for_a_float(method: str, name: str) -> None:
    refused(f"{name} must be", plan, method=method, **{name: 10**400})


@pytest.mark.parametrize("method", ["slr", "slrprop", "slr_refit"])
@pytest.mark.parametrize("zero", ["weights", "inputs"])
def test_costs_where_no_neuron_changes_anything(method: str, zero: str) -> None:
    model, (inputs, labels) = network(), samples()
    if zero == "weights":
        for weight in model.parameters():
            weight.data.zero_()
    else:
        inputs = torch.zeros_like(inputs)
    made = plan(model=model, data=(inputs, labels), method=method)
    assert torch.isfinite(slrprop.apply(model, made)(inputs)).all()


def test_a_plan_is_not_applied_onto_its_own_model(tmp_path: Path) -> None:
    slrprop.export_onnx(network(), tmp_path / "model.onnx", samples()[0])
    before = (tmp_path / "model.onnx").read_bytes()
    made = slrprop.plan(tmp_path / "model.onnx", None, "svd", rank=2)
    refused("is the model itself", slrprop.apply, tmp_path / "model.onnx", made, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == before


@pytest.mark.parametrize("given", [None, "plan.json", Path("plan.json"), {}], ids=repr)
def test_what_is_no_plan(given: Any) -> None:
    refused("plan must be a slrprop plan", slrprop.apply, network(), given)
