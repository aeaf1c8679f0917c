"""Networks nobody here wrote: plan, apply, save, export and exact costs on every kind of module code."""

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import slrprop
from slrprop.linalg import truncated_svd
from slrprop.network.torch.find import operator_of
from slrprop.network.torch.modules import FactoredLayer
from slrprop.operators import Convolution, MatMul, Operator
from tests.oracle import mean_loss, naive_cost

torch.set_num_threads(1)
IN, WIDE, OUT, RANK, REDUCED = 10, 12, 4, 2, 1
MLP, FRL = ("first", "middle", "last"), ("first", "middle")
METHODS = {
    "svd": {"method": "svd"},
    **{f"slr {criterion}": {"method": "slr", "criterion": criterion} for criterion in ("weight", "activation", "cost")},
    "slrprop": {"method": "slrprop"},
}


def itself(result: Tensor) -> Tensor:
    return result


class Case(NamedTuple):
    """A model with samples; ``dense`` names its dense layers and convolutions, ``chain`` those that slrprop treats (none: it refuses)."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    targets: Tensor | None = None
    dense: tuple[str, ...] = MLP
    chain: tuple[str, ...] = ()
    left_dense: tuple[str, ...] = ()
    bypassed: tuple[str, ...] = ()  # dense layers that nobody calls as modules
    looked_up: tuple[str, ...] = ()  # embeddings
    read: Callable[[Any], Tensor] = itself  # the class scores in the model's result

    @property
    def batches(self) -> list[tuple[Tensor, ...]]:
        parts = self.inputs if self.targets is None else (*self.inputs, self.targets)
        return [tuple(tensor[part] for tensor in parts) for part in (slice(0, 5), slice(5, None))]

    @property
    def treated(self) -> list[str]:
        return [name for name in self.dense if name not in self.left_dense + self.bypassed]

    @torch.no_grad()
    def results(self, model: nn.Module) -> list[Any]:
        """What the model returns for every batch in evaluation mode; its mode is put back."""
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        found = [model(*batch[: len(self.inputs)]) for batch in self.batches]
        for module, mode in modes:
            module.training = mode
        return found

    def scores(self, model: nn.Module) -> Tensor:
        return torch.cat([self.read(result) for result in self.results(model)])

    def plan(self, **settings: Any) -> slrprop.Plan:
        return slrprop.plan(self.model, self.batches, rank=RANK, **settings)


class Net(nn.Module):
    """A module whose forward is a function of it and its inputs."""

    def __init__(self, run: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Any:
        return self.run(self, x) if other is None else self.run(self, x, other)


class AnyNumber(Net):
    """The same for any number of inputs."""

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def features(*shape: int) -> Tensor:
    return torch.randn(8, *(shape or (IN,)))


def labels(*shape: int) -> Tensor:
    return torch.randint(OUT, (8, *shape))


def mlp(run: Callable[..., Any], bias: bool = True, **more: nn.Module) -> Net:
    first, middle, last = (nn.Linear(*sides, bias=bias) for sides in ((IN, WIDE), (WIDE, WIDE), (WIDE, OUT)))
    return Net(run, **{"first": first, "middle": middle, "last": last} | more)


def hidden(net: Any, x: Tensor) -> Tensor:
    return net.middle(net.first(x).relu()).relu()


def plain(net: Any, x: Tensor) -> Tensor:
    return net.last(hidden(net, x))


def nested() -> Case:
    block = nn.Sequential(nn.Sequential(nn.Linear(IN, WIDE), nn.ReLU()), nn.ModuleDict({"in": nn.Linear(WIDE, WIDE)}))
    net = mlp(lambda net, x: net.last(net.first(net.block[1]["in"](net.block[0](x))).tanh()), block=block)
    net.first, net.middle = nn.Linear(WIDE, WIDE), nn.Identity()
    names = ("block.0.0", "block.1.in", "first", "last")
    return Case(net, (features(),), labels(), (names[2], names[3], *names[:2]), names[:3])


def used_twice() -> Case:
    net = mlp(lambda net, x: net.last(net.middle(hidden(net, x)).relu()))
    return Case(net, (features(),), labels())


def two_names() -> Case:
    shared = nn.Linear(WIDE, WIDE)
    net = mlp(lambda net, x: net.last(net.twin(hidden(net, x)).relu()), middle=shared, twin=shared)
    return Case(net, (features(),), labels())


def tied_linears() -> Case:
    net = mlp(lambda net, x: net.last(net.twin(hidden(net, x)).relu()), twin=nn.Linear(WIDE, WIDE))
    net.twin.weight = net.middle.weight
    return Case(net, (features(),), labels(), (*MLP, "twin"), (*FRL, "twin"), left_dense=("middle", "twin"))


def tied_embedding() -> Case:
    net = mlp(lambda net, x: plain(net, net.embedding(x)), embedding=nn.Embedding(14, IN))
    net.last = nn.Linear(WIDE, 14, bias=False)
    net.embedding = nn.Embedding(14, WIDE)
    net.first = nn.Linear(WIDE, WIDE)
    net.last.weight = net.embedding.weight
    tokens = torch.randint(14, (8, 3))
    return Case(
        net, (tokens,), tokens.roll(1, 1), chain=FRL, left_dense=("last", "embedding"), looked_up=("embedding",)
    )


def embedding() -> Case:
    net = mlp(lambda net, x: plain(net, net.embedding(x)), embedding=nn.Embedding(30, IN))
    return Case(net, (torch.randint(30, (8, 3)),), labels(3), chain=FRL, looked_up=("embedding",))


def non_contiguous() -> Case:
    net = mlp(plain)
    for layer in (net.first, net.middle):
        layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
    return Case(net, (features(),), labels(), chain=FRL)


def no_bias() -> Case:
    return Case(mlp(plain, bias=False), (features(),), labels(), chain=FRL)


def tokens() -> Case:
    return Case(mlp(plain), (features(3, IN),), labels(3), chain=FRL)


def batch_norm() -> Case:
    norm = nn.BatchNorm1d(WIDE)
    norm.running_mean, norm.running_var = torch.randn(WIDE), torch.rand(WIDE) + 0.5

    def run(net: Any, x: Tensor) -> Tensor:
        return net.last(net.drop(net.middle(net.norm(net.first(x)).relu()).relu()))

    return Case(mlp(run, norm=norm, drop=nn.Dropout(0.5)), (features(),), labels(), chain=FRL)


def inplace_relu() -> Case:
    act = nn.ReLU(inplace=True)
    net = nn.Sequential(nn.Linear(IN, WIDE), act, nn.Linear(WIDE, WIDE), act, nn.Linear(WIDE, OUT))
    return Case(net, (features(),), labels(), ("0", "2", "4"), ("0", "2"))


def residual() -> Case:
    def run(net: Any, x: Tensor) -> Tensor:
        inner = net.first(x).relu()
        inner += net.middle(inner)
        return net.last(inner)

    return Case(mlp(run), (features(),), labels())


def encoder_layer() -> Case:
    net = nn.Sequential(nn.TransformerEncoderLayer(WIDE, 2, 16, batch_first=True), nn.Linear(WIDE, OUT))
    return Case(net, (features(3, WIDE),), labels(3), ("0.linear1", "0.linear2", "1"))


def attention() -> Case:
    def run(net: Any, x: Tensor) -> Tensor:
        x = net.first(x)
        return net.last(net.middle(x + net.attention(x, x, x, need_weights=False)[0]).relu().mean(1))

    net = mlp(run, attention=nn.MultiheadAttention(WIDE, 2, batch_first=True))
    return Case(net, (features(3, IN),), labels())


def lstm() -> Case:
    net = mlp(lambda net, x: net.last(net.middle(net.lstm(net.first(x))[0][:, -1]).relu()))
    net.lstm = nn.LSTM(WIDE, WIDE, batch_first=True)
    return Case(net, (features(3, IN),), labels(), chain=("middle",))


def returns_tuple() -> Case:
    """The second output is the hidden layer, in its order."""

    def run(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        inner = hidden(net, x)
        return net.last(inner), inner

    return Case(mlp(run), (features(),), labels(), chain=FRL, read=lambda result: result[0])


def returns_dict() -> Case:
    net = mlp(lambda net, x: {"twice": x * 2, "logits": plain(net, x)})
    return Case(net, (features(),), labels(), chain=FRL, read=lambda result: result["logits"])


def returns_object() -> Case:
    net = mlp(lambda net, x: SimpleNamespace(logits=plain(net, x), loss=None))
    return Case(net, (features(),), labels(), chain=FRL, read=lambda result: result.logits)


def two_inputs() -> Case:
    net = mlp(lambda net, a, b: net.last(net.middle(net.first(a) * net.other(b)).relu()), other=nn.Linear(6, WIDE))
    return Case(net, (features(), features(6)), labels(), (*MLP, "other"), ("middle",))


def softmax() -> Case:
    net = mlp(lambda net, x: plain(net, x).softmax(-1))
    return Case(net, (features(),), labels(), chain=FRL, read=torch.log)


def log_softmax() -> Case:
    net = mlp(lambda net, x: net.end(plain(net, x)), end=nn.LogSoftmax(-1))
    return Case(net, (features(),), labels(), chain=FRL)


def no_targets() -> Case:
    return Case(mlp(plain), (features(),), chain=FRL)


def real_targets() -> Case:
    return Case(mlp(plain), (features(),), features(OUT), chain=FRL)


class Cube(torch.autograd.Function):
    """A function that vmap can't batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


def custom_autograd() -> Case:
    net = mlp(lambda net, x: net.last(Cube.apply(net.middle(Cube.apply(net.first(x))))))
    return Case(net, (features(),), labels(), chain=FRL)


def branch_by_value() -> Case:
    """After each dense layer Python looks at values."""

    def run(net: Any, x: Tensor) -> Tensor:
        for layer in (net.first, net.middle):
            x = layer(x)
            x = x.tanh() if x.sum() > 0 else x.sigmoid()
        return net.last(x)

    return Case(mlp(run), (features(),), labels())


def branch_by_batch() -> Case:
    """The second batch goes another way than the first."""

    def run(net: Any, x: Tensor) -> Tensor:
        act = torch.relu if len(x) == 5 else torch.tanh
        return net.last(act(net.middle(act(net.first(x)))))

    return Case(mlp(run), (features(),), labels(), chain=FRL)


def numpy_inside() -> Case:
    def run(net: Any, x: Tensor) -> Tensor:
        inner = net.middle(net.first(x).relu()).detach().numpy()
        return net.last(torch.from_numpy(inner.clip(0, None)))

    return Case(mlp(run), (features(),), labels())


def by_weight() -> Case:
    """The forward reads weight and bias of a layer instead of calling it."""

    def run(net: Any, x: Tensor) -> Tensor:
        return net.last(net.middle(functional.linear(x, net.first.weight, net.first.bias).relu()).relu())

    return Case(mlp(run), (features(),), labels(), chain=("middle",), bypassed=("first",))


def weight_norm() -> Case:
    net = mlp(plain)
    parametrizations.weight_norm(net.middle)
    return Case(net, (features(),), labels(), chain=FRL)


def convolution() -> Case:
    net = mlp(lambda net, x: plain(net, net.conv(x).relu().flatten(1)), conv=nn.Conv2d(2, 6, 3, 2, 1))
    net.first = nn.Linear(6 * 2 * 3, WIDE)
    return Case(net, (features(2, 4, 5),), labels(), ("conv", *MLP), ("conv", *FRL))


def convolution_of_steps() -> Case:
    """Dilated, without a bias, its output added to its input."""

    def run(net: Any, x: Tensor) -> Tensor:
        steps = net.first(x).relu().transpose(1, 2)
        return net.last(net.middle((steps + net.conv(steps)).relu().mean(2)).relu())

    conv = nn.Conv1d(WIDE, WIDE, 3, padding=2, dilation=2, bias=False)
    return Case(mlp(run, conv=conv), (features(5, IN),), labels(), (*MLP, "conv"), ("middle",))


def one_output() -> Case:
    net = mlp(lambda net, x: plain(net, x).squeeze(-1))
    net.last = nn.Linear(WIDE, 1)
    return Case(net, (features(),), torch.randn(8), chain=(), left_dense=("last",), read=lambda y: y[:, None])


def encoder_stack() -> Case:
    layer = nn.TransformerEncoderLayer(WIDE, 2, 16, batch_first=True, activation="gelu")
    net = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(WIDE, OUT))
    inner = tuple(f"0.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2))
    return Case(net, (features(3, WIDE),), labels(3), (*inner, "1"))


def alone() -> Case:
    """The model itself is the dense layer."""
    return Case(nn.Linear(IN, OUT), (features(),), labels(), ("",))


CASES = [
    nested, used_twice, two_names, tied_linears, tied_embedding, non_contiguous, no_bias, tokens, batch_norm,
    inplace_relu, residual, encoder_layer, attention, lstm, returns_tuple, returns_dict, returns_object, two_inputs,
    softmax, log_softmax, no_targets, real_targets, custom_autograd, branch_by_value, branch_by_batch, numpy_inside,
    by_weight, weight_norm, convolution, convolution_of_steps, embedding, one_output, encoder_stack, alone,
]  # fmt: skip


def build(make: Callable[[], Case], dtype: torch.dtype = torch.float64) -> Case:
    """The case in a dtype, its model in training mode."""
    torch.manual_seed(0)
    case = make()

    def cast(value: Any) -> Any:
        return value.to(dtype) if value is not None and value.is_floating_point() else value

    inputs = tuple(cast(value) for value in case.inputs)
    return case._replace(model=case.model.to(dtype).train(), inputs=inputs, targets=cast(case.targets))


@pytest.fixture(params=CASES, ids=lambda make: make.__name__)
def case(request: pytest.FixtureRequest) -> Case:
    return build(request.param)


def tensors(result: Any) -> list[Tensor]:
    """Every tensor in a model's result."""
    if isinstance(result, Tensor):
        return [result]
    result = vars(result) if isinstance(result, SimpleNamespace) else result
    parts = result.values() if isinstance(result, dict) else result if isinstance(result, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def assert_same(case: Case, model: nn.Module, other: nn.Module, tolerance: float = 1e-11) -> None:
    """All outputs agree."""
    for mine, theirs in zip(tensors(case.results(model)), tensors(case.results(other)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def state(model: nn.Module) -> tuple[str, list[bool], list[int]]:
    """A hash of the weights, every module's mode, and the number of every module's hooks."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    modules = list(model.modules())
    return digest.hexdigest(), [module.training for module in modules], [len(m._forward_hooks) for m in modules]


def operator_in(module: nn.Module) -> Operator:
    return module.operator if isinstance(module, FactoredLayer) else operator_of(module)


def planned(case: Case, plan: slrprop.Plan) -> nn.Module:
    """The model with what the plan's factors multiply out to."""
    weights = {
        layer.name: operator_of(case.model.get_submodule(layer.name)).stored(layer.factors.dense())
        for layer in plan.layers
    }
    return with_weights(case.model, weights)


def with_weights(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """A copy of the model whose named layers are torch's own with these weights, as torch stores them."""
    twin = copy.deepcopy(model)
    for name, weight in weights.items():
        old = twin.get_submodule(name)
        operator = operator_in(old)
        if isinstance(operator, Convolution):
            sides = [before for before, _ in operator.padding]
            kind = nn.Conv1d if len(operator.kernel) == 1 else nn.Conv2d
            layer = kind(weight.shape[1], len(weight), operator.kernel, operator.stride, sides, operator.dilation)
        else:
            layer = nn.Linear(*weight.T.shape) if isinstance(operator, MatMul) else nn.Embedding(*weight.shape)
        layer.weight = nn.Parameter(weight.detach().clone())
        layer.bias = getattr(old, "bias", None)
        for path, module in list(twin.named_modules(remove_duplicate=False)):
            if module is old and path:
                parent, _, key = path.rpartition(".")
                setattr(twin.get_submodule(parent), key, layer)
            elif module is old:
                twin = layer
    return twin


def test_inspect_finds_the_layers(case: Case) -> None:
    before = state(case.model)
    found = {info.name: info for info in slrprop.inspect(case.model)}
    assert set(found) == {*case.dense, *case.looked_up}
    modules = {name: case.model.get_submodule(name) for name in found}
    assert all(
        info.shape == operator_of(modules[name]).matrix(modules[name].weight).shape for name, info in found.items()
    )
    assert state(case.model) == before


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_plan_and_apply(case: Case, settings: dict[str, Any]) -> None:
    before = state(case.model)
    propagating = settings["method"] == "slrprop"
    if propagating and not case.chain:
        with pytest.raises(slrprop.SlrpropError, match=r"no final response layer was found.*name it with frl="):
            case.plan(**settings)
        assert state(case.model) == before
        return
    random = torch.get_rng_state()
    made = case.plan(**settings)
    asked = set(case.chain) if propagating else set(case.dense) - set(case.bypassed)
    asked |= set(case.looked_up if settings["method"] == "svd" else ())
    assert {layer.name for layer in made.layers} == asked - set(case.left_dense)
    assert set(made.left_dense) == asked & set(case.left_dense)
    small = slrprop.apply(case.model, made)
    assert state(case.model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in small.modules() if isinstance(module, FactoredLayer)] == [True] * len(
        made.layers
    )
    assert_same(case, small, planned(case, made))
    factored = {name: module for name, module in small.named_modules() if isinstance(module, FactoredLayer)}
    for module in factored.values():
        torch.testing.assert_close(module.weight, module.operator.stored(module.factors().dense()), rtol=0, atol=0)
    assert_same(case, small, with_weights(small, {name: module.weight for name, module in factored.items()}))


def test_plan_without_data(case: Case) -> None:
    made = slrprop.plan(case.model, None, method="svd", rank=RANK)
    assert {layer.name for layer in made.layers} == {*case.dense, *case.looked_up} - set(case.left_dense)
    assert_same(case, slrprop.apply(case.model, made), planned(case, made))


@pytest.mark.parametrize("method", ["svd", "slr", "slrprop"])
def test_plan_and_model_come_back_from_their_files(case: Case, method: str, tmp_path: Path) -> None:
    if method == "slrprop" and not case.chain:
        return
    made = case.plan(method=method)
    made.save(tmp_path / "plan.json")
    assert slrprop.Plan.load(tmp_path / "plan.json") == made
    small = slrprop.apply(case.model, made)
    assert_same(case, slrprop.apply(case.model, slrprop.Plan.load(tmp_path / "plan.json")), small)
    slrprop.save(small, tmp_path / "small.safetensors")
    back = slrprop.load(case.model, tmp_path / "small.safetensors")
    assert_same(case, back, small, tolerance=0)
    assert not torch.equal(case.scores(back), case.scores(case.model))


def test_an_uncompressed_model_comes_back_from_its_file(case: Case, tmp_path: Path) -> None:
    slrprop.save(case.model, tmp_path / "model.safetensors")
    assert_same(case, slrprop.load(case.model, tmp_path / "model.safetensors"), case.model, tolerance=0)


def test_costs_equal_the_naive_definition(case: Case) -> None:
    loss = "kl" if case.targets is None else "squared" if case.targets.is_floating_point() else "cross_entropy"
    before = state(case.model)
    for name in case.treated:
        got = slrprop.relevance.cost(case.model, name, case.batches, rank=RANK)
        assert state(case.model) == before
        output = case.scores(case.model)
        goals = [case.targets.reshape(output.shape) if loss == "squared" else output]  # what the oracle asks for first
        goal = goals[0]
        weight = case.model.get_submodule(name).weight.detach()
        twin, operator = with_weights(case.model, {name: weight}), operator_of(case.model.get_submodule(name))
        svd = truncated_svd(operator.matrix(weight), RANK)

        def scores(_: Tensor, goals: list[Any] = goals, twin: nn.Module = twin) -> Tensor:
            return goals.pop() if goals else case.scores(twin)

        rows, columns = naive_cost(scores, twin.get_submodule(name), svd, REDUCED, case.inputs[0], case.targets, loss)
        truncated = with_weights(case.model, {name: operator.stored(svd.left @ svd.vt)})
        base = mean_loss(case.scores, truncated, case.targets, goal, loss)
        assert got.baseline == pytest.approx(base, rel=1e-12)
        for mine, naive in ((got.rows, rows), (got.columns, columns)):
            assert (mine - naive).abs().max() <= 1e-12 * base, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [no_bias, residual, encoder_layer, softmax], ids=lambda make: make.__name__)
@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_half_precision(make: Callable[[], Case], dtype: torch.dtype, settings: dict[str, Any], tmp_path: Path) -> None:
    case = build(make, dtype)
    before = state(case.model)
    if settings["method"] == "slrprop" and not case.chain:
        return
    made = case.plan(**settings)
    small = slrprop.apply(case.model, made)
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    dense = with_weights(case.model, {layer.name: layer.factors.dense().T.to(dtype) for layer in made.layers})
    assert_same(case, small, dense, tolerance=0.1 if dtype == torch.bfloat16 else 0.02)
    slrprop.save(small, tmp_path / "small.safetensors")
    assert_same(case, slrprop.load(case.model, tmp_path / "small.safetensors"), small, tolerance=0)
    assert state(case.model) == before


@pytest.mark.parametrize(
    ("make", "layer", "other"),
    [
        (tied_linears, "middle", "twin.weight"),
        (tied_linears, "twin", "middle.weight"),
        (tied_embedding, "last", "embedding.weight"),
    ],
)
def test_a_named_tied_layer_is_refused(make: Callable[[], Case], layer: str, other: str) -> None:
    case = build(make)
    with pytest.raises(slrprop.SlrpropError, match=f"layer '{layer}' can't be factored: its weight is also {other}"):
        case.plan(method="svd", layers=layer)
    made = case.plan(method="svd")
    assert made.left_dense[layer] == f"its weight is also {other}"


@pytest.mark.parametrize("layers", ["first", ["first", "middle"]])
def test_a_layer_that_nobody_calls_is_refused(layers: Any) -> None:
    case = build(by_weight)
    for settings in METHODS.values():
        with pytest.raises(slrprop.SlrpropError, match=r"layer 'first' is not called as a module|can't treat"):
            case.plan(layers=layers, **settings)
    with pytest.raises(slrprop.SlrpropError, match="layer 'first' is not called as a module"):
        slrprop.relevance.cost(case.model, "first", case.batches, rank=RANK)


def test_the_projection_inside_attention_is_not_touched() -> None:
    case = build(attention)
    with pytest.raises(slrprop.SlrpropError, match=r"no layer is called 'attention\.out_proj'"):
        case.plan(method="svd", layers="attention.out_proj")
    small = slrprop.apply(case.model, case.plan(method="svd", layers="*"))
    assert type(small.attention.out_proj) is type(case.model.attention.out_proj)
    assert torch.equal(small.attention.out_proj.weight, case.model.attention.out_proj.weight)


def doubled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2


def doubled_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0] * 2,)


@pytest.mark.parametrize("settings", [METHODS["svd"], METHODS["slr activation"], METHODS["slr cost"]], ids=str)
@pytest.mark.parametrize("before", [False, True], ids=["forward hook", "forward pre-hook"])
def test_hooks_on_a_layer_keep_their_effect(before: bool, settings: dict[str, Any]) -> None:
    """Either the compressed layer has the hook too, or the layer stays dense with a reason."""
    case = build(no_bias)
    layer = case.model.middle
    _ = layer.register_forward_pre_hook(doubled_input) if before else layer.register_forward_hook(doubled)
    made = case.plan(layers=["first", "middle"], **settings)
    small = slrprop.apply(case.model, made)
    dense = copy.deepcopy(case.model)
    for planned in made.layers:
        dense.get_submodule(planned.name).weight.data = planned.factors.dense().T.contiguous()
    assert_same(case, small, dense)


def test_transposed_tied_weights_come_back_from_their_file(tmp_path: Path) -> None:
    """An autoencoder whose decoder is the encoder's transposed square weight."""
    case = build(no_bias)
    case.model.middle.weight, case.model.first = (
        nn.Parameter(torch.randn(WIDE, WIDE).double()),
        nn.Linear(IN, WIDE).double(),
    )
    case.model.twin = nn.Linear(WIDE, WIDE).double()
    case.model.twin.weight = nn.Parameter(case.model.middle.weight.detach().T)
    case.model.run = deep
    assert case.model.twin.weight.data_ptr() == case.model.middle.weight.data_ptr()
    assert set(case.plan(method="svd").left_dense) == {"middle", "twin"}
    for model in (case.model, slrprop.apply(case.model, case.plan(method="svd"))):
        slrprop.save(model, tmp_path / "model.safetensors")
        assert_same(case, slrprop.load(case.model, tmp_path / "model.safetensors"), model, tolerance=0)


def deep(net: Any, x: Tensor) -> Tensor:
    return net.last(net.twin(hidden(net, x)).relu())


EXPORTED = [
    two_names,
    convolution,
    convolution_of_steps,
    embedding,
    tokens,
    batch_norm,
    residual,
    encoder_layer,
    attention,
    returns_tuple,
    returns_dict,
    two_inputs,
]


@pytest.mark.parametrize("make", EXPORTED, ids=lambda make: make.__name__)
def test_onnx_parity(make: Callable[[], Case], tmp_path: Path) -> None:
    case = build(make, torch.float32)
    small = slrprop.apply(case.model, case.plan(method="slr", criterion="weight"))
    before = state(small)
    assert slrprop.export_onnx(small, tmp_path / "small.onnx", case.batches[0][: len(case.inputs)]) < 1e-4
    assert state(small) == before
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]


def test_onnx_of_a_forward_with_any_number_of_inputs(tmp_path: Path) -> None:
    case = build(two_inputs, torch.float32)
    model = AnyNumber(case.model.run, **dict(case.model.named_children()))
    assert slrprop.export_onnx(model, tmp_path / "model.onnx", case.inputs) < 1e-4


@pytest.mark.parametrize("make", [returns_object, branch_by_value], ids=lambda make: make.__name__)
def test_what_onnx_can_not_hold_is_refused(make: Callable[[], Case], tmp_path: Path) -> None:
    case = build(make, torch.float32)
    with pytest.raises(slrprop.SlrpropError, match=r"can't be exported to ONNX|model returns SimpleNamespace"):
        slrprop.export_onnx(case.model, tmp_path / "model.onnx", case.inputs[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_onnx_in_other_dtypes_is_right_or_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    case = build(no_bias, dtype)
    try:
        difference = slrprop.export_onnx(case.model, tmp_path / "model.onnx", case.inputs[0])
    except slrprop.SlrpropError:
        assert list(tmp_path.iterdir()) == []
    else:
        assert difference < 1e-2


def test_a_compressed_encoder_layer_computes_with_its_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused path of evaluation mode would rebuild the dense weights at every call."""
    case = build(encoder_layer)
    small = slrprop.apply(case.model, case.plan(method="svd"))
    called = []
    forward = FactoredLayer.forward
    monkeypatch.setattr(FactoredLayer, "forward", lambda module, x: called.append(module) or forward(module, x))
    case.results(small)
    assert {small[0].linear1, small[0].linear2} <= set(called)
