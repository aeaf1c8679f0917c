"""Weights whose columns are permutations of one sequence: packing, seeds, the form, its module and its ONNX nodes."""

import copy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from torch import nn

import slrprop
from slrprop import SlrpropError
from slrprop.fit.regression import Regression
from slrprop.forms import Fit, Shared
from slrprop.forms.permutations import entry_bits, pack, packed_bytes, seeded, unpack, words
from slrprop.methods.permuted import PermutedSettings, fitted, refined
from slrprop.network.torch.modules import layer_from
from slrprop.research.networks import LeNet5
from slrprop.research.permuted import PermutedLinear, permute, train


@st.composite
def shared(draw, dtype=torch.float64):
    m, n = draw(st.integers(1, 40)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    sequence, scale, offset = (torch.randn(size, generator=generator, dtype=dtype) for size in (m, n, n))
    offset = offset if draw(st.booleans()) else None
    if draw(st.booleans()):
        return Shared(sequence, scale, offset, seed=draw(st.integers(0, 2**63 - 1)))
    places = torch.stack([torch.randperm(m, generator=generator) for _ in range(n)])
    return Shared.of(sequence, scale, offset, places)


@pytest.mark.parametrize(("m", "n"), [(1, 4), (2, 3), (3, 7), (5, 5), (120, 84), (257, 3), (70_000, 2), (140_000, 1)])
def test_packing_is_exact_and_takes_the_bits_it_should(m, n):
    places = seeded(3, m, n)
    packed = pack(places)
    assert packed.dtype == np.uint8 and len(packed) == packed_bytes(m, n) == -(-m * n * entry_bits(m) // 8)
    assert np.array_equal(unpack(packed, m, n), places)
    assert 2 ** entry_bits(m) >= m > 2 ** (entry_bits(m) - 1) or m == 1


@given(st.integers(1, 70), st.integers(1, 9), st.integers(0, 99))
@settings(deadline=None)
def test_any_entries_are_packed(m, n, seed):
    places = np.random.default_rng(seed).integers(0, m, (n, m))
    assert np.array_equal(unpack(pack(places), m, n), places)


def test_packed_bits_are_the_entries_in_order():
    assert pack(np.array([[0, 1, 2, 3, 4]])).tolist() == [0b000_001_01, 0b0_011_100_0]


def test_seeds_are_reproducible():
    """Pinned: a stored seed must always give these permutations."""
    assert words(0, 0, 1).tolist() == [0xE220A8397B1DCDAF]  # the published first word of SplitMix64
    assert words(1234567, 0, 2).tolist() == [6457827717110365317, 3203168211198807973]
    assert seeded(0, 7, 3).tolist() == [[0, 3, 2, 4, 6, 5, 1], [5, 6, 4, 0, 2, 1, 3], [1, 0, 3, 5, 6, 4, 2]]
    assert seeded(2**63 - 1, 6, 1).tolist() == [[2, 1, 5, 3, 0, 4]]
    assert np.array_equal(seeded(5, 11, 4)[:2], seeded(5, 11, 2))


def test_seeded_permutations_are_permutations_and_look_random():
    places = seeded(1, 300, 200)
    assert (np.sort(places, 1) == np.arange(300)).all()
    assert abs(np.corrcoef(places[:, :-1].ravel(), places[:, 1:].ravel())[0, 1]) < 0.02
    assert np.abs(places.mean(0) - 149.5).max() < 5 * 300 / (12 * 200) ** 0.5


@given(shared())
@settings(deadline=None)
def test_the_form_is_its_definition(form):
    m, n = form.shape
    weight = form.dense()
    for j in range(n):
        want = form.scale[j] * form.sequence[form.places[j].long()]
        torch.testing.assert_close(weight[:, j], want if form.offset is None else want + form.offset[j])
    assert form.numbers == m + n + (0 if form.offset is None else n)
    assert form.bytes == 8 * form.numbers + (8 if form.seed is not None else packed_bytes(m, n))
    assert form.multiplications == m * n and not form.faster


@given(shared(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_round_trips_are_exact(form, random):
    again = slrprop.forms.restored(form.description(), form.arrays())
    assert isinstance(again, Shared) and (again.seed is None) == (form.seed is None)
    assert torch.equal(again.dense(), form.dense())
    assert torch.equal(form.with_matrices(form.matrices()).dense(), form.dense())
    rows, columns = (list(range(side)) for side in form.shape)
    random.shuffle(rows)
    random.shuffle(columns)
    moved = form.permuted(torch.tensor(rows), torch.tensor(columns))
    assert torch.equal(moved.dense(), form.dense()[rows][:, columns]) and moved.numbers == form.numbers
    assert torch.equal(form.permuted(columns=torch.tensor(columns)).dense(), form.dense()[:, columns])
    assert form.permuted() is form


@given(shared(), st.booleans(), st.sampled_from([(), (3,), (2, 3)]))
@settings(deadline=None)
def test_layers_compute_with_the_form(form, has_bias, batch):
    bias = torch.arange(form.shape[1], dtype=torch.float64) if has_bias else None
    layer = layer_from(Fit(form).over(bias))
    x = torch.randn(*batch, form.shape[0], dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ form.dense() + (0 if bias is None else bias))
    assert torch.equal(layer.factors().dense(), form.dense()) and torch.equal(layer.weight.T, form.dense())


def test_the_gradient_of_the_sequence_is_the_sum_over_the_weights_that_share_a_place():
    torch.manual_seed(0)
    start = torch.randn(7).double(), torch.randn(5).double(), torch.randn(5).double()
    layer = layer_from(Fit(Shared(*start, seed=2)).over(torch.zeros(5, dtype=torch.float64)))
    x, form = torch.randn(9, 7, dtype=torch.float64), layer.factors()
    weight = form.dense().detach().requires_grad_()
    ((x @ weight + layer.bias) ** 3).sum().backward()
    (layer(x) ** 3).sum().backward()
    want = torch.zeros(7, dtype=torch.float64)
    for j in range(5):
        for i in range(7):
            want[form.places[j, i]] += form.scale[j].detach() * weight.grad[i, j]
    torch.testing.assert_close(layer.sequence.grad, want)
    torch.testing.assert_close(layer.offset.grad, weight.grad.sum(0))


@pytest.mark.parametrize("gain", [1.0, 2**0.5])
def test_outputs_start_with_the_right_variance(gain):
    torch.manual_seed(0)
    layer = PermutedLinear(500, 400, seed=0, gain=gain)
    y = layer(torch.randn(1000, 500))
    assert y.var().item() == pytest.approx(gain**2, rel=0.02)
    assert y.var(0).max().item() < 1.3 * gain**2  # each output, not only their mean
    assert PermutedLinear(1, 3, seed=0)(torch.ones(2, 1)).tolist() == [[1, 1, 1]] * 2


def test_only_the_seed_is_stored(tmp_path):
    model = nn.Sequential(nn.Linear(200, 150), nn.ReLU(), nn.Linear(150, 4))
    permuted = permute(model, ["0"], seed=11)
    assert isinstance(permuted[0], PermutedLinear) and torch.equal(permuted[2].weight, model[2].weight)
    slrprop.save(permuted, tmp_path / "small.safetensors")
    again = slrprop.load(model, tmp_path / "small.safetensors")
    x = torch.randn(6, 200)
    assert torch.equal(again(x), permuted(x))
    assert sorted(dict(again[0].state_dict())) == ["bias", "scale", "seed", "sequence"]
    assert (tmp_path / "small.safetensors").stat().st_size < 4 * (200 + 2 * 150 + 604) + 1500
    other = permute(model, ["0"], seed=12)
    other.load_state_dict(permuted.state_dict())
    assert torch.equal(other(x), permuted(x)) and torch.equal(copy.deepcopy(other)(x), permuted(x))


def test_a_permuted_network_learns(digits):
    x, y = digits
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 80), nn.ReLU(), nn.Linear(80, 10))
    permuted = permute(model, seed=1)
    assert sum(p.numel() for p in permuted.parameters()) == (64 + 2 * 96) + (96 + 2 * 80) + (80 + 2 * 10)
    permuted[4].requires_grad_(False)
    before = permuted[4].sequence.clone()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[:1200], y[:1200]), 64, shuffle=True)
    train(permuted, loader, epochs=20, learning_rate=1e-2)
    assert (permuted(x[1200:]).argmax(1) == y[1200:]).float().mean() > 0.85
    assert torch.equal(permuted[4].sequence, before) and not permuted.training
    with pytest.raises(SlrpropError, match="training needs labels"):
        train(permuted, x)


@pytest.mark.parametrize(("m", "n"), [(1, 3), (5, 3), (120, 84), (257, 64)])
@pytest.mark.parametrize("way", ["packed", "seed"])
def test_exported_layers_equal_the_module_and_their_files_are_small(m, n, way, tmp_path):
    torch.manual_seed(0)
    layer = PermutedLinear(m, n, seed=4)
    if way == "packed":
        layer = layer_from(Fit(layer.factors().permuted(torch.randperm(m))).over(torch.randn(n)))
    path = tmp_path / "layer.onnx"
    slrprop.export_onnx(layer, path, torch.randn(3, m))
    if m > 100:
        overhead = 5000  # nodes and names
        assert path.stat().st_size < layer.factors().bytes + overhead
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "folded.onnx"), 3
    onnxruntime.InferenceSession(path, options)
    assert [node.op_type for node in onnx.load(tmp_path / "folded.onnx").graph.node] == ["Gemm"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PermutedLinear(4, 3, seed=-1), "seed must be a whole number from 0 to 2\\^63 - 1, got -1"),
        (lambda: PermutedLinear(4, 3, seed=True), "seed must be a whole number"),
        (lambda: PermutedLinear(0, 3, seed=0), "in_features must be a whole number from 1, got 0"),
        (lambda: Shared(torch.ones(4), torch.ones(3), torch.ones(2), seed=0), "takes a sequence"),
        (lambda: Shared(torch.ones(4), torch.ones(3), None), "either packed permutations or a seed"),
        (lambda: Shared(torch.ones(4), torch.ones(3), None, torch.ones(2).byte()), "are 3 bytes, got torch.uint8"),
        (lambda: Shared(torch.ones(3), torch.ones(1), None, torch.tensor([255]).byte()).dense(), "place 3 of 3"),
        (lambda: permute(nn.Linear(2, 2), "fc"), "no dense layer of the model is called 'fc'"),
        (lambda: permute(nn.ReLU()), "it has none"),
    ],
)
def test_mistakes_are_one_sentence(build, message):
    with pytest.raises(SlrpropError, match=message):
        build()


def really_permuted(m, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sequence, scale, offset = (torch.randn(k, generator=generator, dtype=torch.float64) for k in (m, n, n))
    places = torch.stack([torch.randperm(m, generator=generator) for _ in range(n)])
    return Shared.of(sequence.exp(), scale, offset, places).dense()


@pytest.mark.parametrize(("m", "n"), [(1, 3), (2, 5), (30, 1), (40, 25)])
def test_a_weight_that_is_permuted_is_fitted_exactly(m, n):
    """Scales of both signs and offsets included."""
    weight = really_permuted(m, n)
    torch.testing.assert_close(fitted(weight).dense(), weight, rtol=1e-9, atol=1e-9)
    task = Regression("", weight, weight, weight[0], weight[:, 0], torch.eye(m, dtype=torch.float64), weight[0], None, None, False, None)  # fmt: skip
    torch.testing.assert_close(PermutedSettings(refine=3).fit(task).dense(), weight, rtol=1e-8, atol=1e-8)


def test_a_permuted_network_is_found_again_through_the_api(calibration):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))
    model[0].weight.data = really_permuted(64, 50).T.float().contiguous() / 8
    made = slrprop.plan(model, calibration, method="permuted", layers="0", refit_head=False)
    assert made.layers[0].bytes == 4 * (64 + 2 * 50) + 64 * 50 * 6 // 8
    x = calibration[0]
    torch.testing.assert_close(slrprop.apply(model, made)(x), model(x), rtol=1e-4, atol=1e-4)


def test_the_fit_is_least_squares_and_refining_never_raises_the_error():
    torch.manual_seed(0)
    weight = torch.randn(30, 20, dtype=torch.float64)
    form = fitted(weight)
    for j in range(20):  # scale and offset of a column by the definition
        features = torch.stack([form.sequence[form.places[j].long()], torch.ones(30, dtype=torch.float64)], 1)
        want = features @ torch.linalg.lstsq(features, weight[:, j : j + 1]).solution
        torch.testing.assert_close(form.dense()[:, j : j + 1], want)
    x = torch.randn(100, 30, dtype=torch.float64) * torch.rand(30).square()
    metric = x.T @ x

    def error(form):
        off = form.dense() - weight
        return float((off * (metric @ off)).sum())

    errors = [error(form if not rounds else refined(form, weight, metric, rounds)) for rounds in range(6)]
    assert all(after <= before for before, after in pairwise(errors)) and errors[-1] < 0.9 * errors[0]


def test_the_refined_sequence_solves_its_normal_equations():
    """After many rounds no change of the sequence, a scale or an offset lowers the error."""
    torch.manual_seed(0)
    weight, root = torch.randn(8, 5, dtype=torch.float64), torch.randn(20, 8, dtype=torch.float64)
    metric = root.T @ root
    form = refined(fitted(weight), weight, metric, 200)
    parts = {name: value.clone().requires_grad_() for name, value in form.matrices().items()}
    off = form.with_matrices(parts).dense() - weight
    (off * (metric @ off)).sum().backward()
    for value in parts.values():
        assert value.grad.abs().max() < 1e-3 * metric.diagonal().sum()


def test_layers_that_would_grow_are_left_dense(calibration):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 3), nn.ReLU(), nn.Linear(3, 1)).half().float()
    made = slrprop.plan(model, calibration[0], method="permuted", refit_head=False)
    assert [layer.name for layer in made.layers] == ["0"] and "would store" in made.left_dense["2"]
    with pytest.raises(SlrpropError, match="refine must be a whole number from 0, got -1"):
        slrprop.plan(model, calibration[0], method="permuted", refine=-1)


@pytest.mark.parametrize("opset", [11, 13, 18])
@pytest.mark.parametrize("way", ["packed", "seed"])
def test_onnx_files_are_small_and_compute_the_same(opset, way, tmp_path):
    """Through the writer of files, Gemm with a transposed weight; a seed from opset 18, else packed."""
    random = np.random.default_rng(0)
    weight, bias = random.standard_normal((70, 90)).astype(np.float32), random.standard_normal(70).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "dense", transB=1)],
        "g",
        [helper.make_tensor_value_info("x", 1, ["batch", 90])],
        [helper.make_tensor_value_info("y", 1, ["batch", 70])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7), path)
    made = slrprop.plan(path, random.standard_normal((200, 90)).astype(np.float32), method="permuted")
    if way == "seed":
        form = Shared(torch.randn(90), torch.randn(70), None, seed=5)
        made = replace(made, layers=(replace(made.layers[0], fit=Fit(form), numbers=form.numbers, bytes=form.bytes),))
    parity = slrprop.apply(path, made, tmp_path / "small.onnx")
    assert max(parity.outputs.values()) < 1e-4
    form = made.layers[0].factors
    packed = 0 if form.seed is None else packed_bytes(90, 70) * (opset < 18)
    assert (tmp_path / "small.onnx").stat().st_size < form.bytes + packed + 280 + 5000 < path.stat().st_size


def test_counted_architectures_have_their_known_sizes():
    """Parameters as their authors' or torchvision's models have them."""
    from benchmarks.permuted import ARCHITECTURES, stored_bytes

    known = {
        "LeNet-5": 61_706,
        "AlexNet (two groups)": 60_965_224,
        "VGG16, ImageNet": 138_357_544,
        "ResNet-50": 25_557_032,
        "MobileNetV2": 3_504_872,
    }
    assert {name: ARCHITECTURES[name].total for name in known} == known
    lenet = ARCHITECTURES["LeNet-5"]
    assert stored_bytes(lenet, 0, packed=False, offset=False) == 4 * lenet.total
    model = permute(LeNet5())
    stored = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert stored == stored_bytes(lenet, 3, packed=False, offset=False)
