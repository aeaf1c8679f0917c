"""Channels between layers: what batch norms, pooling and a flatten carry goes and moves with them, in modules and files."""

import copy
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import slrprop
from slrprop import Plan, SlrpropError
from slrprop.arrange import arranged
from slrprop.data import Data
from slrprop.forms import Dense, Narrowed
from slrprop.methods.slr import kept
from slrprop.network import OnnxNetwork, TorchNetwork
from slrprop.network.junction import Junction
from slrprop.relevance import propagated
from tests.onnx_models import run
from tests.test_batch_norm import Net, norm
from tests.test_onnx_graphs import graph_file

REMOVAL = ("apoz", "lrp", "nisp", "redundant", "taylor")


def dense():
    """Dense layers with batch norm before and behind the activation."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 20), norm(nn.BatchNorm1d, 20), nn.ReLU(),
        nn.Linear(20, 16, bias=False), nn.ReLU(), norm(nn.BatchNorm1d, 16), nn.Linear(16, 5),
    ).eval()  # fmt: skip


def maps():
    """Convolutions with batch norm and pooling between, and a dense head behind a flatten."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), norm(nn.BatchNorm2d, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, bias=False),
        norm(nn.BatchNorm2d, 12), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12 * 4, 10), nn.ReLU(), nn.Linear(10, 5),
    ).eval()  # fmt: skip


SHAPES = {dense: (12,), maps: (3, 12, 12)}
CARRIED = {
    dense: {"0": Junction(("0",), ("1",), {"3": 1}), "3": Junction(("3",), ("5",), {"6": 1})},
    maps: {"0": Junction(("0",), ("1",), {"4": 9}), "4": Junction(("4",), ("5",), {"9": 4}), "9": Junction(("9",), (), {"11": 1})},
}  # fmt: skip


def written(model, path, shape):
    """A module of layers in a row as a file whose nodes have the modules' names, batch norms left between."""
    nodes, tensors, tensor = [], {}, "x"

    def kept(name, value):
        tensors[name] = value.detach().numpy()
        return name

    for name, module in model.named_children():
        sides = {"kernel_shape": [2, 2], "strides": [2, 2]}
        ins, op, more = [], type(module).__name__, {}
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            ins = [kept(f"{name}.{key}", value) for key, value in module.named_parameters()]
            conv = isinstance(module, nn.Conv2d)
            op, more = ("Conv", {"pads": list(module.padding) * 2}) if conv else ("Gemm", {"transB": 1})
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            parts = ("weight", "bias", "running_mean", "running_var")
            ins, op = [kept(f"{name}.{key}", getattr(module, key)) for key in parts], "BatchNormalization"
        else:
            op = {"ReLU": "Relu", "MaxPool2d": "MaxPool", "AvgPool2d": "AveragePool"}.get(op, op)
            more = sides if "Pool" in op else {}
        nodes.append(helper.make_node(op, [tensor, *ins], [f"y{name}"], name, **more))
        tensor = f"y{name}"
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *shape])],
        [helper.make_tensor_value_info(tensor, TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def samples(kind, count=60):
    random = torch.Generator().manual_seed(1)
    return torch.randn(count, *SHAPES[kind], generator=random), torch.randint(0, 5, (count,), generator=random)


def with_zeros(model, plan):
    """The original with the plan's weights multiplied out, zeros and all."""
    twin = copy.deepcopy(model)
    for layer in plan.layers:
        module = twin.get_submodule(layer.name)
        module.weight.data = layer.factors.dense().T.reshape(module.weight.shape).contiguous()
        if layer.bias is not None:
            module.bias = nn.Parameter(layer.bias.to(module.weight))
    return twin


def outputs(path, x):
    (found,) = run(path, {"x": x.numpy()})
    return torch.from_numpy(found)


@pytest.mark.parametrize("kind", SHAPES)
def test_both_doors_find_the_same_junctions(kind, tmp_path):
    model, (x, y) = kind(), samples(kind)
    network = TorchNetwork(model, Data((x, y)))
    file = OnnxNetwork(written(model, tmp_path / "full.onnx", SHAPES[kind]), None)
    for name in network.names:
        want = CARRIED[kind].get(name)
        assert network.junction(name) == want
        other = file.junction(name)
        assert (other and (other.makers, other.readers)) == (want and (want.makers, want.readers))
        assert other is None or other.carriers == tuple(f"y{norm}" for norm in want.carriers)
    assert network.apart("11" if kind is maps else "6") == "no layer reads its outputs"


@pytest.mark.parametrize("method", REMOVAL)
@pytest.mark.parametrize("kind", SHAPES)
def test_channels_go_from_all_that_carry_them(kind, method, tmp_path):
    model, (x, y) = kind(), samples(kind)
    full = written(model, tmp_path / "full.onnx", SHAPES[kind])
    made = slrprop.plan(model, (x, y), method=method, keep=0.5)
    small = slrprop.apply(model, made)
    for name, junction in CARRIED[kind].items():
        if name in {layer.name for layer in made.layers}:
            (reader, rows), count = *junction.readers.items(), model.get_submodule(name).weight.shape[0]
            assert small.get_submodule(name).weight.shape[0] == count // 2
            assert [small.get_submodule(norm).num_features for norm in junction.carriers] == [count // 2] * len(
                junction.carriers
            )
            assert small.get_submodule(reader).weight[0].numel() == count // 2 * rows
    assert "0" in {layer.name for layer in made.layers} or method in ("taylor", "lrp")
    with torch.no_grad():
        want = with_zeros(model, made)(x)
        torch.testing.assert_close(small(x), want, rtol=1e-5, atol=1e-5)
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").junctions == made.junctions
    slrprop.save(small, tmp_path / "small.safetensors")
    assert torch.equal(slrprop.load(model, tmp_path / "small.safetensors")(x), small(x))
    assert slrprop.export_onnx(small, tmp_path / "exported.onnx", x[:3]) < 1e-4

    in_file = slrprop.plan(full, (x, y), method=method, keep=0.5)
    slrprop.apply(full, in_file, tmp_path / "small.onnx", x)
    onnx.checker.check_model(str(tmp_path / "small.onnx"), full_check=True)
    assert [layer.name for layer in in_file.layers] == [layer.name for layer in made.layers]
    torch.testing.assert_close(outputs(tmp_path / "small.onnx", x), want, rtol=1e-4, atol=1e-4)
    plain = slrprop.plan(model, (x, y), method=method, keep=0.5, refit=False, refit_head=False, bias_correction=False)
    slrprop.apply(full, renamed(plain), tmp_path / "plain.onnx", x)
    assert not any(node.op_type in ("Gather", "Slice") for node in onnx.load(tmp_path / "plain.onnx").graph.node)
    with torch.no_grad():
        want = slrprop.apply(model, plain)(x)
        torch.testing.assert_close(outputs(tmp_path / "plain.onnx", x), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(want, with_zeros(model, plain)(x), rtol=1e-5, atol=1e-5)


def renamed(plan):
    """A module's plan for the file that :func:`written` makes of it."""
    moved = (Junction(one.makers, tuple(f"y{name}" for name in one.carriers), one.readers) for one in plan.junctions)
    return Plan(plan.layers, plan.left_dense, tuple(moved))


@pytest.mark.parametrize("kind", SHAPES)
def test_sets_are_slices_behind_batch_norm(kind, tmp_path):
    """Sparse low rank: channels are put in another order together with what carries them, and nothing else changes."""
    model, (x, y) = kind(), samples(kind)
    full = written(model, tmp_path / "full.onnx", SHAPES[kind])
    made = slrprop.plan(model, (x, y), method="slr", criterion="weight", rank=4)
    small = slrprop.apply(model, made)
    sets = small[int(next(iter(CARRIED[kind])))].factors().sets
    assert sets.order is None and not torch.equal(small[1].running_mean, model[1].running_mean)
    slrprop.apply(full, renamed(made), tmp_path / "small.onnx", x)
    with torch.no_grad():
        want = with_zeros(model, made)(x)
        torch.testing.assert_close(small(x), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outputs(tmp_path / "small.onnx", x), want, rtol=1e-4, atol=1e-5)


def test_slrprop_over_convolutions(tmp_path):
    """Relevance of a channel: the sum over all of its rows, through batch norm, pooling and the flatten."""
    model, (x, y) = maps(), samples(maps)
    full = written(model, tmp_path / "full.onnx", SHAPES[maps])
    made = slrprop.plan(model, (x, y), method="slrprop", rank=2)
    assert [layer.name for layer in made.layers] == ["0", "4", "9"]
    weights = {name: model.get_submodule(name).weight.detach().flatten(1).T for name in ("0", "4")}
    scores = slrprop.relevance.cost(model, "9", (x, y), rank=2).rows
    for name, channels, unit in (("4", 12, 4), ("0", 8, 9)):
        rows = propagated(weights[name], scores.unflatten(0, (channels, unit if name == "4" else -1)).sum(1))
        scores = rows.unflatten(0, (-1, 9)).sum(1)
        layer = next(layer for layer in made.layers if layer.name == name)
        assert torch.equal(layer.factors.row_levels.reshape(-1, 9)[:, 0] == 2, kept(scores, 0.5))
    in_file = slrprop.plan(full, (x, y), method="slrprop", rank=2)
    assert [(layer.name, layer.kept_rows, layer.kept_columns) for layer in in_file.layers] == [
        (layer.name, layer.kept_rows, layer.kept_columns) for layer in made.layers
    ]
    slrprop.apply(full, in_file, tmp_path / "small.onnx", x)
    with torch.no_grad():
        torch.testing.assert_close(
            outputs(tmp_path / "small.onnx", x), slrprop.apply(model, made)(x), rtol=1e-4, atol=1e-4
        )


def test_channels_that_no_layer_reads_go():
    """Some rows of a channel are read, and it stays; none, and it goes, whatever layer reads it."""
    model, (x, y) = maps(), samples(maps)
    network = TorchNetwork(model, Data((x, y)))
    rows = torch.ones(12, 4, dtype=torch.bool)
    rows[3], rows[5, :3] = False, False
    form = Narrowed.cut(network.weight("9"), rows.flatten())
    moved, orders = arranged({"9": form}, network.junctions(["9"]), lambda name: Dense(network.weight(name)))
    assert torch.equal(orders["4"], orders["5"]) and sorted(orders["5"].tolist()) == [c for c in range(12) if c != 3]
    assert (moved["4"].shape, moved["9"].shape) == ((72, 11), (44, 10))


BETWEEN = {
    "flatten": ([("Flatten", ["y"], {})], 16, ""),
    "global pool": ([("GlobalAveragePool", ["y"], {}), ("Flatten", [0], {})], 1, ""),
    "mean": ([("ReduceMean", ["y"], {"axes": [-1, 2], "keepdims": 0})], 1, ""),
    "mean of another axis": ([("ReduceMean", ["y"], {"axes": [1, 2], "keepdims": 0})], 4, "'ReduceMean' stands behind it"),
    "open reshape": ([("Reshape", ["y", "open"], {})], 16, ""),
    "closed reshape": ([("Reshape", ["y", "closed"], {"allowzero": 1})], 16, ""),
    "mixing reshape": ([("Reshape", ["y", "mixing"], {})], 8, "'Reshape' stands behind it"),
    "SiLU": ([("Sigmoid", ["y"], {}), ("Mul", ["y", 0], {}), ("Flatten", [1], {})], 16, ""),
    "a gate": ([("Flatten", ["y"], {}), ("Softmax", [0], {"axis": 1}), ("Mul", [0, 1], {})], 16, "what it makes has 2 uses"),
    "a slope each": ([("PRelu", ["y", "slope"], {}), ("Flatten", [0], {})], 16, "'PRelu' stands behind it"),
}  # fmt: skip


@pytest.mark.parametrize("case", BETWEEN)
def test_what_stands_between_nodes(case, tmp_path):
    """A convolution of 8 channels on 4 x 4 places, and a dense layer; channels really go, or it is said why not."""
    between, rows, told = BETWEEN[case]
    nodes = [helper.make_node("Conv", ["x", "k"], ["y"], "conv")]
    for place, (op, inputs, more) in enumerate(between):
        nodes.append(
            helper.make_node(op, [f"h{one}" if isinstance(one, int) else one for one in inputs], [f"h{place}"], **more)
        )
    nodes.append(helper.make_node("Gemm", [f"h{len(between) - 1}", "w"], ["z"], "head"))
    random = np.random.default_rng(0)
    numbers = {"k": (8, 3, 3, 3), "w": (rows * 8 if case[:4] != "mean" or rows == 1 else 4, 5), "slope": (8, 1, 1)}
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in numbers.items()}
    tensors |= {"open": np.array([0, -1]), "closed": np.array([-1, 128]), "mixing": np.array([-1, 64])}
    if case == "mixing reshape":
        tensors["w"] = tensors["w"][:64]
    path = graph_file(tmp_path / "m.onnx", nodes, tensors, ["n", 3, 6, 6], outputs=("z",))
    network, x = OnnxNetwork(path, None), torch.rand(6, 3, 6, 6)
    assert network.junction("conv") == (
        None if told else Junction(("conv",), ("h0",) if case == "closed reshape" else (), {"head": rows})
    )
    assert told in network.apart("conv")
    if not told:
        made = slrprop.plan(path, x, method="nisp", keep=0.5, layers=["conv"])
        slrprop.apply(path, made, tmp_path / "small.onnx", x)
        shapes = {tuple(tensor.dims) for tensor in onnx.load(tmp_path / "small.onnx").graph.initializer}
        assert {(4, 3, 3, 3), (4 * rows, 5)} <= shapes


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.a = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 3)
        self.b, self.c = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)
        self.eval()

    def forward(self, x):
        return self.c(self.b(self.a(self.first(x))).relu()).mean((2, 3))


@pytest.mark.parametrize("method", ["nisp", "redundant"])
def test_channels_go_before_a_depthwise_convolution(method):
    model, x = Depthwise(), torch.rand(6, 3, 6, 6)
    made = slrprop.plan(model, x, method=method, keep=0.5, refit_head=False)
    small = slrprop.apply(model, made)
    assert (small.first.out_channels, small.a.in_channels, small.a.out_channels) == (3, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(small(x), with_zeros(model, made)(x), rtol=1e-5, atol=1e-5)


def conv(run, **more):
    return Net(run, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 8, 1), head=nn.Linear(8, 4), **more)


STOPS = {
    "residual": (conv(lambda n, x: n.head((n.b(h := n.a(x)) + h).mean((2, 3)))), "what it makes has 2 uses"),
    "concat": (conv(lambda n, x: n.head(n.b(torch.cat([n.a(x)])).mean((2, 3)))), "'cat' stands behind it"),
    "returned": (conv(lambda n, x: (n.head(n.b(h := n.a(x).relu()).mean((2, 3))), h)), "the network returns what it makes"),
    "sizes": (conv(lambda n, x: n.head(n.b(n.a(x).view(-1, 8, 4, 4)).mean((2, 3)))), "'view' behind it says how many"),
    "shared norm": (
        conv(lambda n, x: n.head(n.norm(n.b(n.norm(n.a(x)))).mean((2, 3))), norm=nn.BatchNorm2d(8)),
        "a batch norm behind it has other uses",
    ),
    "channels last": (conv(lambda n, x: n.head(n.a(x).movedim(1, -1)).mean((1, 2))), "'movedim' stands behind it"),
    "depthwise": (Depthwise(), "'b', which reads it, must stay as it is: it is a convolution in 8 groups"),
}  # fmt: skip


@pytest.mark.parametrize("case", STOPS)
def test_what_stops_a_junction_is_said(case):
    model, told = STOPS[case]
    x = torch.rand(6, 3, 6, 6)
    network = TorchNetwork(model, Data(x))
    assert network.junction("a") is None and told in network.apart("a")
    if network.next_layer("a") is None:
        with pytest.raises(SlrpropError, match=rf"method 'nisp' can't treat layer 'a' \({told}"):
            slrprop.plan(model, x, method="nisp", layers=["a"])
    else:  # the layer that reads it alone gets smaller
        made = slrprop.plan(model, x, method="nisp", layers=["a"], keep=0.5, refit_head=False)
        small = slrprop.apply(model, made)
        assert [layer.name for layer in made.layers] == ["b"] and small.a.out_channels == 8


@pytest.mark.parametrize(
    "carrier, told",
    [("0", "'0' is a batch norm of 20 channels"), ("5", "'5' is a batch norm of 20"), ("x", "'x' is a")],
)
def test_a_plan_whose_carriers_are_not_there(carrier, told, tmp_path):
    model, data = dense(), samples(dense)
    made = slrprop.plan(model, data, method="nisp", layers=["0"], keep=0.5)
    other = replace(made, junctions=(Junction(("0",), (carrier,), {"3": 1}),))
    with pytest.raises(SlrpropError, match=f"the plan says that {told}.*; it was made for another model"):
        slrprop.apply(model, other)
    with pytest.raises(SlrpropError, match="the plan says that '0' feeds '3', which it does not in this model"):
        slrprop.apply(written(model, tmp_path / "full.onnx", (12,)), other, tmp_path / "small.onnx")
