"""Convolutions through both doors: the mathematics of patches, forms, files, fits and refusals."""

import copy
import itertools

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

import slrprop
from slrprop import SlrpropError
from slrprop.data import Data
from slrprop.fit.sides import Sides
from slrprop.forms import Dense, LowRank, Narrowed, Sparse, SparseLowRank, Spatial, Tucker, express, restored
from slrprop.linalg import truncated_svd
from slrprop.methods import METHODS, Problem
from slrprop.methods.slr import SLRSettings
from slrprop.network import open_network
from slrprop.network.torch.find import operator_of
from slrprop.operators import Convolution, times
from slrprop.operators.convolution import POSITIONS
from tests.onnx_models import run


@st.composite
def convolutions(draw):
    """A convolution of one or two axes, and an input for it."""
    axes = draw(st.integers(1, 2))

    def sides(least, most):
        return tuple(draw(st.lists(st.integers(least, most), min_size=axes, max_size=axes)))

    kernel, dilation = sides(1, 3), sides(1, 2)
    padding = tuple(zip(sides(0, 2), sides(0, 2), strict=True))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = [r + draw(st.integers(0, 9)) for r in reach]
    torch.manual_seed(draw(st.integers(0, 99)))
    operator = Convolution(kernel, sides(1, 3), padding, dilation)
    return operator, torch.randn(3, draw(st.integers(1, 4)), *size, dtype=torch.float64)


@given(convolutions(), st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_patches_times_the_matrix_are_the_convolution(case, outputs):
    operator, x = case
    weight = torch.randn(outputs, x.shape[1], *operator.kernel, dtype=torch.float64)
    matrix = operator.matrix(weight)
    assert torch.equal(operator.stored(matrix), weight)
    y = operator.enter(x, matrix)
    padded = functional.pad(x, [side for pair in reversed(operator.padding) for side in pair])
    plain = {1: functional.conv1d, 2: functional.conv2d}[len(operator.kernel)]
    torch.testing.assert_close(y, plain(padded, weight, None, operator.stride, 0, operator.dilation))
    assert operator.made(tuple(x.shape[2:])) == tuple(y.shape[2:])
    rows, made = operator.inputs(x, 5), operator.outputs(y, 5)
    torch.testing.assert_close(rows @ matrix, made)
    assert len(made) == len(x) * min(POSITIONS, y[0, 0].numel())
    assert torch.equal(operator.outputs(y), y.movedim(1, -1).flatten(0, -2))


def test_a_sample_is_seen_at_the_same_places_whatever_goes_with_it():
    operator, x = Convolution((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)), torch.randn(8, 2, 20, 20)
    whole = operator.inputs(x, 3)
    parts = [operator.inputs(x[:5], 3), operator.inputs(x[5:], 8)]
    assert torch.equal(whole, torch.cat(parts)) and len(whole) == 8 * POSITIONS
    assert not torch.equal(operator.inputs(x, 3), operator.inputs(x, 4))


def forms_for(operator: Convolution, m: int, n: int) -> list:
    weight, channels = torch.randn(m, n, dtype=torch.float64), m // operator.unit
    some = torch.arange(channels) % 3 != 1
    rows, svd = some.repeat_interleave(operator.unit), truncated_svd(weight, min(m, n, 4))
    few = weight * (torch.rand(m, n) < 0.4)
    columns = torch.arange(n) % 2 == 0
    found = [Dense(weight), LowRank.from_svd(svd), Sparse.of(few), Narrowed.cut(weight, rows, columns)]
    found.append(SparseLowRank.shorten(svd, 1, ~rows, ~columns))
    kernel, core = operator.kernel, torch.randn(2 * operator.unit, 3, dtype=torch.float64)
    found.append(Tucker(kernel, torch.randn(channels, 2).double(), core, torch.randn(3, n).double()))
    if len(kernel) == 2:
        sides = channels * kernel[0], 3 * kernel[1]
        found.append(Spatial(kernel, torch.randn(sides[0], 3).double(), torch.randn(sides[1], n).double()))
    return found


@given(convolutions(), st.integers(2, 6))
@settings(deadline=None, max_examples=30)
def test_every_form_computes_what_its_matrix_does(case, outputs):
    operator, x = case
    for form in forms_for(operator, x.shape[1] * operator.unit, outputs):
        want = operator.enter(x, form.dense())
        torch.testing.assert_close(express(form, operator, x), want)
        torch.testing.assert_close(times(operator.inputs(x), form), operator.outputs(want, 0))
        again = restored(form.description(), form.arrays())
        assert torch.equal(again.dense(), form.dense()) and again.numbers == form.numbers
        order = torch.randperm(x.shape[1])
        rows = (order[:, None] * operator.unit + torch.arange(operator.unit)).flatten()
        columns = torch.randperm(outputs)
        torch.testing.assert_close(form.permuted(rows, columns).dense(), form.dense()[rows][:, columns])


class Small(nn.Module):
    """Convolutions of all kinds, a residual sum, a dense head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.b = nn.Conv2d(16, 24, (3, 5), (2, 1), (1, 2))
        self.deep = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.c = nn.Conv2d(24, 24, 2, padding="same", dilation=2)
        self.point = nn.Conv2d(24, 24, 1)
        self.up = nn.ConvTranspose2d(24, 16, 3, 2, 1, output_padding=1)
        self.fc = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x)).relu()
        x = self.deep(self.b(x).relu()).tanh()
        x = self.c(x).relu() + self.point(x)
        return self.fc(self.up(x).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    made = Small().eval()
    made.norm.running_mean.normal_()
    made.norm.running_var.uniform_(0.5, 2)
    for parameter in made.parameters():
        parameter.data.mul_(1.5)
    return made


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Smooth ones, so that patches are alike."""
    torch.manual_seed(1)
    return functional.interpolate(torch.randn(48, 3, 5, 5), size=(12, 12), mode="bilinear")


@pytest.fixture(scope="module")
def path(net, images, tmp_path_factory):
    target = tmp_path_factory.mktemp("conv") / "net.onnx"
    slrprop.export_onnx(net, target, images[:3])
    return target


FITTED = {
    "svd": {"rank": 5},
    "slr cost": {"rank": 6},
    "slr weight": {"rank": 6},
    "low_rank": {"rank": 5},
    "nested": {"rank": 8, "shape": "half"},
    "spatial": {"rank": 6},
    "tucker": {"keep": 0.5},
    "dense": {"bits": 8},
    "rtn": {"bits": 4},
    "obs": {"density": 0.3},
    "low_rank_plus_sparse": {},
}
PACKED = {f"{name} {bits}": FITTED[name] | {"bits": bits} for name, bits in (("low_rank", 4), ("nested", 8), ("spatial", 8), ("tucker", 4), ("obs", 4), ("dense", 4))}  # fmt: skip


@pytest.mark.parametrize("name", [*FITTED, *PACKED])
def test_both_doors_carry_out_the_same_plan(name, net, path, images, tmp_path):
    """The module, its export, its saved state, and the file: all compute with the same factors."""
    method, *criterion = name.split()[:1] if name in PACKED else name.split()
    given = {**FITTED, **PACKED}[name] | ({"criterion": criterion[0]} if criterion else {})
    plan = slrprop.plan(net, images, method=method, **given)
    assert plan.layers
    small = slrprop.apply(net, plan)
    want = small(images).detach()
    dense = copy.deepcopy(net)  # in which channels keep their order
    for layer in plan.layers:
        old, operator = net.get_submodule(layer.name), operator_of(net.get_submodule(layer.name))
        twin = type(old)(old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, dilation=old.dilation, groups=old.groups, **({"output_padding": old.output_padding} if layer.name == "up" else {})) if layer.name != "fc" else nn.Linear(16, 6)  # fmt: skip
        bias = layer.fit.over(torch.zeros(layer.shape[1]) if old.bias is None else old.bias.detach()).bias.value
        twin.weight.data, twin.bias.data = (
            operator.stored(layer.factors.dense().detach()).contiguous(),
            bias.clone(),
        )
        parent = dense.get_submodule(layer.name.rpartition(".")[0])
        setattr(parent, layer.name.rpartition(".")[2], twin)
    torch.testing.assert_close(want, dense(images), rtol=1e-3, atol=1e-4)
    assert slrprop.export_onnx(small, tmp_path / "small.onnx", images[:3]) < 1e-4
    (got,) = run(tmp_path / "small.onnx", {"x": images})
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-3, atol=1e-4)
    slrprop.save(small, tmp_path / "small.safetensors")
    assert torch.equal(slrprop.load(net, tmp_path / "small.safetensors")(images), small(images))
    filed = slrprop.plan(path, images, method=method, **given)
    parity = slrprop.apply(path, filed, tmp_path / "file.onnx", data=images)
    assert max(parity.outputs.values()) < 1e-4
    assert [layer.shape for layer in filed.layers] == [layer.shape for layer in plan.layers]
    if "norm" not in {layer.name for layer in plan.layers} and method in ("svd", "rtn"):
        (got,) = run(tmp_path / "file.onnx", {"x": images})
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=0.2, atol=0.1)  # batch norm was folded


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A network without batch norm, the same in both doors."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)).eval()  # fmt: skip
    target = tmp_path_factory.mktemp("plain") / "plain.onnx"
    slrprop.export_onnx(model, target, torch.randn(3, 3, 12, 12))
    return model, target


@pytest.mark.parametrize("method", ["slr", "low_rank", "nested", "spatial", "tucker", "dense", "wanda"])
def test_scores_and_fits_are_the_same_through_both_doors(method, plain, images):
    model, path = plain
    given = {"rank": 4} if method in ("slr", "low_rank", "nested", "spatial") else {}
    one, other = (slrprop.plan(door, images, method=method, **given) for door in (model, path))
    assert len(one.layers) == len(other.layers) >= 2
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        assert (mine.kept_rows, mine.kept_columns) == (theirs.kept_rows, theirs.kept_columns)
        a, b = mine.factors.dense(), theirs.factors.dense()
        assert float((a - b).norm() / a.norm()) < (
            1e-4 if method != "dense" else 0.02
        )  # a code may fall to the other side


def test_shortened_channels_have_all_of_their_rows(plain, images):
    plan = slrprop.plan(plain[0], images, method="slr", layers="2", rank=6)
    levels = plan.layers[0].factors.row_levels.unflatten(0, (-1, 9))
    assert torch.equal(levels.min(1).values, levels.max(1).values) and len(levels.unique()) == 2


def test_the_cost_of_a_channel_is_that_of_the_network_without_its_tail(plain, images):
    model, _ = plain
    problem = Problem(open_network(model, data := Data(images)), data)
    costs = problem.cost("2", SLRSettings(rank=5, solver="full", reduction_rate=0.4))
    weight = operator_of(model[2]).matrix(model[2].weight.detach())
    svd = truncated_svd(weight, 5, "full")

    def loss(left: Tensor, right: Tensor, tail: tuple[Tensor, Tensor]) -> float:
        wide = left[:, :2] @ right[:2] + tail[0] @ tail[1]
        y = functional.conv2d(model[:2](images), operator_of(model[2]).stored(wide), model[2].bias, 2, 1)
        output = model[3:](y)
        return float(functional.kl_div(output.log_softmax(1), model(images).log_softmax(1), log_target=True, reduction="batchmean"))  # fmt: skip

    with torch.no_grad():
        left, right = svd.left, svd.vt
        base = loss(left, right, (left[:, 2:], right[2:]))
        for channel in (0, 5):
            cut = left[:, 2:].clone()
            cut[channel * 9 : channel * 9 + 9] = 0
            assert abs(loss(left, right, (cut, right[2:])) - base) == pytest.approx(float(costs.rows[channel]), rel=2e-3, abs=1e-7)  # fmt: skip
        for output in (1, 7):
            cut = right[2:].clone()
            cut[:, output] = 0
            assert abs(loss(left, right, (left[:, 2:], cut)) - base) == pytest.approx(float(costs.columns[output]), rel=2e-3, abs=1e-7)  # fmt: skip


@pytest.mark.parametrize(("high", "wide"), [(3, 3), (1, 9), (2, 5)])
def test_sides_come_to_least_squares(high, wide):
    """The second side is the best for a first one; each step of the alternation lowers the error; all ranks give the weight."""
    torch.manual_seed(0)
    channels, n = 4, 6
    m = channels * high * wide
    x = torch.randn(500, m, dtype=torch.float64) @ torch.randn(m, m, dtype=torch.float64)
    square, target = x.T @ x / len(x), torch.randn(m, n, dtype=torch.float64)
    half = torch.randn(n, n, dtype=torch.float64)
    metric = half @ half.T + torch.eye(n)
    sides = Sides(square, target, metric, torch.linalg.cholesky(metric), high, wide)

    def product(first: Tensor, second: Tensor) -> Tensor:
        return torch.einsum("cir,rjo->cijo", first.unflatten(0, (channels, high)), second.unflatten(0, (-1, wide))).flatten(0, 2)  # fmt: skip

    def error(first: Tensor, second: Tensor) -> float:
        rest = target - product(first, second)
        return float((rest.T @ square @ rest @ metric).trace())

    first = sides.start(3)
    second = sides.second(first)
    gradient = torch.autograd.functional.jacobian(lambda k: ((target - product(first, k)).T @ square @ (target - product(first, k))).trace(), second)  # fmt: skip
    assert float(gradient.norm()) < 1e-4 * float((square @ target).norm())
    errors = [error(first, second)]
    for _ in range(3):
        first = sides.first(first, second)
        errors.append(error(first, second))
        second = sides.second(first)
        errors.append(error(first, second))
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < errors[0]
    whole = sides.start(min(channels * high, wide * n))
    assert error(whole, sides.second(whole)) < 1e-6 * float((target.T @ square @ target @ metric).trace())


def test_a_refit_loses_less_than_the_weights_alone(net, images):
    """What spatial and Tucker forms lose of the outputs, beside the truncated weights at as many numbers."""
    lost = {}
    for method in ("svd", "low_rank", "spatial", "tucker"):
        given = {"keep": 0.5} if method == "tucker" else {"compression_rate": 0.4}
        plan = slrprop.plan(net, images, method=method, layers=["b", "c"], **given)
        chosen = [layer for layer in plan.layers if layer.name != "fc"]  # the head is refitted
        assert len(chosen) == 2
        assert all(c.numbers <= (0.4 if method != "tucker" else 0.7) * c.shape[0] * c.shape[1] for c in chosen)
        with torch.no_grad():
            lost[method] = float((slrprop.apply(net, plan)(images) - net(images)).norm())
    assert max(lost["spatial"], lost["tucker"], lost["low_rank"]) < lost["svd"]


def test_a_budget_is_met_on_convolutions(plain, images, tmp_path):
    model, path = plain
    found = slrprop.compress(path, images, max_bytes="60%", output=tmp_path / "small.onnx")
    assert found.met and {layer.name for layer in found.plan.layers} & {"node_conv2d", "node_conv2d_1"}
    slrprop.apply(path, found.plan, tmp_path / "small.onnx", data=images)
    assert (tmp_path / "small.onnx").stat().st_size <= 0.6 * path.stat().st_size
    assert slrprop.compress(model, images, max_bytes="60%").met


def graph_of(weight: np.ndarray, shape: list, bias: np.ndarray | None = None, op: str = "Conv", **attributes) -> onnx.ModelProto:  # fmt: skip
    """One convolution, its channels averaged."""
    tensors = [numpy_helper.from_array(weight, "w"), *([] if bias is None else [numpy_helper.from_array(bias, "b")])]
    nodes = [
        helper.make_node(op, ["x", "w", *(["b"] if bias is not None else [])], ["c"], "conv", **attributes),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]), helper.make_node("Flatten", ["p"], ["y"]),
    ]  # fmt: skip
    x, y = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape), helper.make_tensor_value_info("y", TensorProto.FLOAT, None)  # fmt: skip
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        ({"pads": [0, 2, 1, 0]}, ["n", 8, 9, 11]),
        ({"auto_pad": "SAME_UPPER"}, ["n", 8, "h", "w"]),
        ({"auto_pad": "SAME_LOWER", "strides": [2, 3]}, ["n", 8, 9, 11]),
        ({"auto_pad": "SAME_UPPER", "strides": [2, 2]}, ["n", 8, 9, 11]),
        ({"auto_pad": "VALID", "dilations": [2, 1]}, ["n", 8, 9, 11]),
        ({"kernel_shape": [3, 4], "strides": [1, 2]}, ["n", 8, "h", "w"]),
    ],
)
def test_borders_of_files(given, shape, tmp_path):
    random = np.random.default_rng(0)
    weight, bias = random.standard_normal((20, 8, 3, 4)).astype(np.float32), random.standard_normal(20).astype(np.float32)  # fmt: skip
    onnx.save(graph_of(weight, shape, bias, **given), tmp_path / "m.onnx")
    x = random.standard_normal((6, 8, 9, 11)).astype(np.float32)
    for method, rank in (("spatial", 6), ("low_rank", 5), ("svd", 20)):
        plan = slrprop.plan(tmp_path / "m.onnx", x, method=method, rank=rank, layers="conv") if rank < 20 else None
        if plan is None:
            continue
        parity = slrprop.apply(tmp_path / "m.onnx", plan, tmp_path / "s.onnx", data=x)
        assert max(parity.outputs.values()) < 1e-4
    network = open_network(str(tmp_path / "m.onnx"), data := Data(x))
    (flow,) = network.stream(("conv",), data)
    rows, made = flow.calls["conv"][0]
    torch.testing.assert_close(rows @ network.weight("conv") + network.bias("conv"), made, rtol=1e-4, atol=1e-4)


def test_what_takes_fewer_bits_only_says_so(net, images):
    for layer, told in (("deep", "a convolution in 24 groups"), ("up", "a transposed convolution")):
        with pytest.raises(SlrpropError, match=f"method 'low_rank' can't treat layer '{layer}'.*{told}"):
            slrprop.plan(net, images, method="low_rank", layers=layer, rank=2)
        for scores in (slrprop.relevance.cost, slrprop.relevance.activation):
            with pytest.raises(SlrpropError, match=f"layer '{layer}' is {told}, .*ask for weight scores"):
                scores(net, layer, images)
    volume = nn.Sequential(nn.Conv3d(2, 6, 3), nn.Flatten(), nn.Linear(6 * 8, 3)).eval()
    data = torch.randn(20, 2, 4, 4, 4)
    with pytest.raises(SlrpropError, match="a convolution of three axes"):
        slrprop.plan(volume, data, method="svd", layers="0", rank=2)
    small = slrprop.apply(volume, slrprop.plan(volume, data, method="dense", bits=8))
    torch.testing.assert_close(small(data), volume(data), rtol=0.1, atol=0.05)


def test_refusals_in_one_sentence(tmp_path, images):
    circular = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(8 * 144, 4)).eval()  # fmt: skip
    with pytest.raises(
        SlrpropError, match="layer '0' can't be factored: its border is padded by 'circular' and not by zeros"
    ):
        slrprop.plan(circular, images, method="svd", layers="0", rank=2)
    assert slrprop.plan(circular, images, method="svd", rank=2).left_dense["0"].startswith("its border")
    twice = nn.Conv2d(3, 3, 3, padding=1)
    shared = nn.Sequential(twice, nn.ReLU(), twice, nn.Flatten(), nn.Linear(3 * 144, 4)).eval()
    small = slrprop.apply(shared, slrprop.plan(shared, images, method="dense", bits=8))
    torch.testing.assert_close(small(images), shared(images), rtol=0.1, atol=0.05)  # changed wherever it is used
    weight = np.random.default_rng(0).standard_normal((6, 3, 3, 3)).astype(np.float32)
    onnx.save(graph_of(weight, ["n", 3, "h", "w"], auto_pad="SAME_UPPER", strides=[2, 2]), tmp_path / "open.onnx")
    with pytest.raises(SlrpropError, match="its auto_pad 'SAME_UPPER' depends on the map's sides, which are open"):
        slrprop.plan(tmp_path / "open.onnx", images, method="svd", layers="conv", rank=2)
    onnx.save(graph_of(weight, ["n", 4, 9, 9], group=2), tmp_path / "groups.onnx")
    with pytest.raises(SlrpropError):
        slrprop.plan(tmp_path / "groups.onnx", torch.randn(4, 4, 9, 9), method="rtn", layers="conv")


def test_every_method_treats_convolutions_or_says_that_it_does_not(plain, images):
    """One battery: a plan that stores less and computes, or one sentence."""
    model, _ = plain
    for name, method in METHODS.items():
        try:
            plan = slrprop.plan(model, images, method=name, rank=3, layers=["0", "2"])
        except SlrpropError as error:
            assert "treat" in str(error) or "response layer" in str(error), name
            continue
        assert slrprop.apply(model, plan)(images).isfinite().all(), method


def test_batch_norm_behind_a_layer_goes_into_it(net, images, tmp_path):
    """The same outputs with fewer numbers; the plan and the saved state say so, and one option keeps it."""
    found = slrprop.compress(net, images, max_bytes="60%")
    assert found.plan.folded == {"a": "norm"} and found.met and not isinstance(found.model.norm, nn.BatchNorm2d)
    plain = slrprop.apply(net, slrprop.Plan((), folded={"a": "norm"}))
    torch.testing.assert_close(plain(images), net(images), rtol=1e-4, atol=1e-5)
    found.plan.save(tmp_path / "plan.json")
    again = slrprop.apply(net, slrprop.Plan.load(tmp_path / "plan.json"))
    torch.testing.assert_close(again(images), found.model(images))
    for model in (plain, found.model):
        slrprop.save(model, tmp_path / "model.safetensors")
        assert torch.equal(slrprop.load(net, tmp_path / "model.safetensors")(images), model(images))
    assert slrprop.export_onnx(found.model, tmp_path / "model.onnx", images[:3]) < 1e-4
    kept = slrprop.compress(net, images, max_bytes="60%", keep_batch_norm=True)
    assert kept.plan.folded == {} and isinstance(kept.model.norm, nn.BatchNorm2d)
    with pytest.raises(
        SlrpropError, match="the plan folds the batch norm 'norm' into 'a', which this model does not have"
    ):
        slrprop.apply(nn.Sequential(nn.Linear(3, 3)), slrprop.Plan((), folded={"a": "norm"}))
