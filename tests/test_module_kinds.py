"""Models as people have them: masks, norms and parametrisations in place, compiled, quantised, exported, from a hub."""

import copy
import io
from collections import OrderedDict, UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import slrprop
from slrprop.fit.quantize import quantised as in_bits
from slrprop.forms import Dense, Fit, Form, LowRank, LowRankPlusSparse, Narrowed, Shared, Sparse, SparseLowRank
from slrprop.forms.base import KINDS
from slrprop.linalg import truncated_svd
from slrprop.network import TorchNetwork
from slrprop.network.torch.find import operator_of
from slrprop.network.torch.modules import FactoredLayer, layer_from
from slrprop.network.torch.network import swapped

torch.set_num_threads(1)
X, Y = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 4


def net(*more: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4), *more)


def masks(model: nn.Sequential) -> None:
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.random_unstructured(model[0], "weight", 0.2)  # a second method: torch keeps a container of both
    prune.ln_structured(model[2], "weight", 0.25, n=2, dim=0)
    prune.l1_unstructured(model[2], "bias", 0.3)


def of_each(norm: Callable[[nn.Module], Any]) -> Callable[[nn.Sequential], None]:
    def put(model: nn.Sequential) -> None:
        norm(model[0])
        norm(model[2])

    put.__name__ = f"{norm.__module__.rpartition('.')[2]}.{norm.__name__}"
    return put


def bias_too(model: nn.Sequential) -> None:
    nn.utils.parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    nn.utils.parametrize.register_parametrization(model[2], "weight", nn.Tanh())


COMPUTED = [
    masks,
    of_each(nn.utils.weight_norm),
    of_each(nn.utils.spectral_norm),
    of_each(parametrizations.weight_norm),
    of_each(parametrizations.spectral_norm),
    of_each(parametrizations.orthogonal),
    bias_too,
]


def computed(put: Callable[[nn.Sequential], None]) -> nn.Sequential:
    model = net()
    put(model)
    return model.train()


@torch.no_grad()
def baked(model: nn.Sequential, twin: nn.Sequential) -> nn.Sequential:
    """The model with the weights that torch computes in evaluation mode, in plain layers."""
    twin.load_state_dict(model.state_dict())
    twin.eval()(X)
    plain = net()
    for mine, theirs in zip(twin, plain, strict=True):
        if isinstance(theirs, nn.Linear):
            theirs.weight.copy_(mine.weight)
            theirs.bias.copy_(mine.bias)
    return plain.eval()


def everything(model: nn.Module) -> list[Any]:
    """What planning must not change."""
    found: list[Any] = [torch.get_rng_state()]
    for module in model.modules():
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        hanging = [value for value in vars(module).values() if isinstance(value, Tensor)]
        found += [module.training, [(id(t), t.clone(), t.requires_grad, t.grad) for t in (*tensors, *hanging)]]
        found += [list(module._forward_pre_hooks.values()), list(module._forward_hooks.values())]
    return found


def assert_untouched(before: list[Any], after: list[Any]) -> None:
    for one, two in zip(before, after, strict=True):
        if isinstance(one, Tensor):
            assert torch.equal(one, two)
        elif isinstance(one, (list, tuple)):
            assert_untouched(list(one), list(two))
        else:
            assert one is two or one == two


@pytest.mark.parametrize("put", COMPUTED, ids=lambda put: put.__name__)
def test_a_computed_weight_is_read_and_replaced(put: Callable[[nn.Sequential], None], tmp_path: Path) -> None:
    model = computed(put)
    model(X).sum().backward()  # leaves weights behind that are no leaves of the graph
    calls: list[str] = []
    model[0].register_forward_pre_hook(lambda module, inputs: calls.append("mine"))
    want = baked(model, computed(put))
    before = everything(model)
    assert [info.shape for info in slrprop.inspect(model)] == [(16, 20), (20, 20), (20, 4)]
    made = [slrprop.plan(model, (X, Y), method=method, rank=4) for method in ("svd", "low_rank", "slrprop")]
    assert slrprop.measure(model, (X, Y)).auc == pytest.approx(slrprop.measure(want, (X, Y)).auc)
    assert_untouched(before, everything(model))
    for name, linear in (("0", want[0]), ("2", want[2])):
        torch.testing.assert_close(TorchNetwork(model, None).weight(name), linear.weight.T)
    for plan in made:
        small, twin = slrprop.apply(model, plan).eval(), copy.deepcopy(want)
        calls.clear()
        for layer in plan.layers:
            twin.get_submodule(layer.name).weight.data = layer.factors.dense().T
            if layer.bias is not None:
                twin.get_submodule(layer.name).bias.data = layer.bias
        torch.testing.assert_close(small(X), twin(X), rtol=1e-4, atol=1e-5)
        assert calls == ["mine"]
        slrprop.save(small, tmp_path / "small.safetensors")
        back = slrprop.load(computed(put), tmp_path / "small.safetensors").eval()
        torch.testing.assert_close(back(X), small(X), rtol=0, atol=0)
    assert_untouched(before[1:], everything(model)[1:])


def test_a_refitted_head_with_a_mask_comes_back_from_its_file(tmp_path: Path) -> None:
    """It is dense afterwards, and so has other names than in the original."""
    model = net()
    prune.l1_unstructured(model[4], "weight", 0.5)
    made = slrprop.plan(model, (X, Y), method="taylor", layers=["0", "2"])
    small = slrprop.apply(model, made).eval()
    assert type(small[4]) is nn.Linear
    slrprop.save(small, tmp_path / "small.safetensors")
    torch.testing.assert_close(slrprop.load(model, tmp_path / "small.safetensors").eval()(X), small(X), rtol=0, atol=0)


@pytest.mark.parametrize(
    "norm",
    [nn.utils.weight_norm, parametrizations.weight_norm, prune.identity],
    ids=["hook", "parametrisation", "mask"],
)
def test_what_is_not_replaced_keeps_its_computed_weight(norm: Callable[..., Any], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))
    norm(model[0], "weight")
    x = torch.randn(8, 2, 8)
    model(x).sum().backward()
    small = slrprop.apply(model, slrprop.plan(model, (x, Y[:8]), method="svd", rank=2, layers="2"))
    small[0].bias.data += 1
    assert not torch.equal(small.eval()(x), model.eval()(x))
    assert set(small.state_dict()) >= set(model[0].state_dict(prefix="0."))
    if norm is nn.utils.weight_norm:
        assert slrprop.export_onnx(small, tmp_path / "small.onnx", x) < 1e-4
    assert [layer.shape for layer in slrprop.inspect(model)] == [(6, 4), (24, 24), (24, 4)]
    assert slrprop.inspect(model).other == "Linear 4 %"
    want = model.eval()[0](x)
    whole = slrprop.apply(model, slrprop.plan(model, (x, Y[:8]), method="svd", rank=4, layers="0", bits=8))
    torch.testing.assert_close(whole.eval()[0](x), want, rtol=0.05, atol=0.05)
    slrprop.save(whole, tmp_path / "whole.safetensors")
    assert torch.equal(slrprop.load(model, tmp_path / "whole.safetensors").eval()(x), whole(x))


class Tagged(nn.Linear):
    """What its parent reads of it, a replacement would lack."""

    def __init__(self, *sides: int) -> None:
        super().__init__(*sides)
        self.scale = 3.0


class WithMethod(nn.Linear):
    def norm(self) -> Tensor:
        return self.weight.norm()


class Renamed(nn.Linear):
    """Like any other."""

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)


class Parent(nn.Module):
    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.last = first, nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        factor = getattr(self.first, "scale", 1.0) * (self.first.norm() if hasattr(self.first, "norm") else 1)
        return self.last(self.first(x) * factor)


def own_weight() -> nn.Linear:
    layer = nn.Linear(16, 20)
    weight = layer.weight
    del layer._parameters["weight"]
    layer.raw = weight
    layer.register_forward_pre_hook(lambda module, inputs: setattr(module, "weight", module.raw * 2))
    layer.weight = weight * 2
    return layer


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (Tagged(16, 20), "it is a Tagged with its own 'scale', which a replacement would lack"),
        (WithMethod(16, 20), "it is a WithMethod with its own 'norm', which a replacement would lack"),
        (own_weight(), "its weight or bias is computed by code that a replacement would lack"),
        (Renamed(16, 20), ""),
    ],
    ids=["attribute", "method", "own hook", "nothing of its own"],
)
def test_a_layer_that_its_parent_reads_is_left_and_named(first: nn.Linear, reason: str) -> None:
    model = Parent(first)
    for data in (None, (X, Y)):
        made = slrprop.plan(model, data, method="svd", rank=2)
        assert made.left_dense == ({"first": reason} if reason else {})
    small = slrprop.apply(model, made)
    assert isinstance(small.last, FactoredLayer) and small(X).shape == (24, 4)
    if reason:
        with pytest.raises(slrprop.SlrpropError, match=rf"layer 'first' can't be factored: {reason}; leave it out"):
            slrprop.plan(model, (X, Y), method="svd", rank=2, layers="first")


def test_what_hangs_on_a_plain_layer_goes_over() -> None:
    model = Parent(nn.Linear(16, 20))
    model.first.scale = 2.0
    made = slrprop.plan(model, (X, Y), method="svd", rank=16, layers="first")
    assert made.left_dense  # rank 16 would not be smaller
    small = slrprop.apply(model, slrprop.plan(model, (X, Y), method="svd", rank=2, layers="first"))
    assert isinstance(small.first, FactoredLayer) and small.first.scale == 2.0


class Strided(nn.Module):
    """Reads what its layers are made with, as Whisper's encoder does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.conv = nn.Embedding(40, 16, padding_idx=1), nn.Conv1d(16, 32, 3, stride=2, padding=1)
        self.head = nn.Linear(32, 4)

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids.clamp(0, self.words.num_embeddings - 1)
        hidden = self.conv(self.words(ids).movedim(1, 2)).relu().sum(2) * self.conv.stride[0] / self.words.padding_idx
        return self.head(hidden / (self.conv.in_channels + self.conv.kernel_size[0] + self.head.in_features))


def test_what_a_layer_was_made_with_can_still_be_read(tmp_path: Path) -> None:
    model, ids = Strided().eval(), torch.randint(0, 44, (24, 10), generator=torch.Generator().manual_seed(0))
    for method, bits in (("low_rank", 32), ("svd", 8)):
        plan = slrprop.plan(model, ids, method=method, rank=2, bits=bits, layers=["words", "conv", "head"])
        assert [layer.name for layer in plan.layers] == ["words", "conv", "head"]
        small, twin = slrprop.apply(model, plan), copy.deepcopy(model)
        for layer in plan.layers:
            part, weight = twin.get_submodule(layer.name), layer.factors.dense()
            part.weight.data = operator_of(part).stored(weight).contiguous()
            bias = layer.bias
            if bias is not None:
                part.bias.data = bias
        torch.testing.assert_close(small(ids), twin(ids), rtol=1e-4, atol=1e-5)
        slrprop.save(small, tmp_path / "small.safetensors")
        assert torch.equal(slrprop.load(Strided(), tmp_path / "small.safetensors").eval()(ids), small(ids))
        assert slrprop.export_onnx(small, tmp_path / "small.onnx", ids[:3]) < 1e-4


def compiled_whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_part(model: nn.Sequential) -> nn.Module:
    return nn.Sequential(torch.compile(model[:3], backend="eager"), model[3], torch.compile(model[4], backend="eager"))


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_forward(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


COMPILED = [compiled_whole, compiled_part, compiled_in_place]


@pytest.mark.parametrize("wrap", COMPILED, ids=lambda wrap: wrap.__name__)
def test_a_compiled_model_is_treated_as_it_was_written(wrap: Callable[..., nn.Module], tmp_path: Path) -> None:
    plain = net().eval()
    other = compiled_part(plain) if wrap is compiled_part else plain
    model = wrap(copy.deepcopy(plain)).eval()
    model(X)  # compiled code fires no hooks
    for method in ("low_rank", "slrprop"):
        made, expected = (slrprop.plan(m, (X, Y), method=method, rank=3) for m in (model, plain))
        assert [layer.factors.dense().tolist() for layer in made.layers] == [
            layer.factors.dense().tolist() for layer in expected.layers
        ]
        small = slrprop.apply(model, made)
        assert type(small) is type(model)
        torch.testing.assert_close(small(X), slrprop.apply(plain, expected)(X))
    assert not any("_orig_mod" in layer.name for layer in made.layers)
    slrprop.save(small, tmp_path / "small.safetensors")
    for fresh in (model, other):
        torch.testing.assert_close(slrprop.load(fresh, tmp_path / "small.safetensors").eval()(X), small(X))
    assert slrprop.measure(small, (X, Y), against=model).agreement > 0
    if wrap is compiled_part:
        assert slrprop.export_onnx(small, tmp_path / "small.onnx", X) < 1e-4


def test_plans_of_compiled_models_fit_the_model_itself() -> None:
    plain = net()
    made = slrprop.plan(torch.compile(plain, backend="eager"), (X, Y), method="svd", rank=3)
    assert [layer.name for layer in made.layers] == [
        layer.name for layer in slrprop.plan(plain, (X, Y), method="svd", rank=3).layers
    ]
    torch.testing.assert_close(slrprop.apply(plain, made)(X), slrprop.apply(compiled_whole(plain), made)(X))


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv1d(3, 2), nn.Flatten(), nn.Linear(9, 4))


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(net(), {nn.Linear})


def half_quantised() -> nn.Module:
    return nn.Sequential(torch.ao.quantization.quantize_dynamic(net()[:1], {nn.Linear}), *net()[1:])


def exported() -> nn.Module:
    return torch.export.export(net(), (X,)).module()


def unflattened() -> nn.Module:
    return torch.export.unflatten(torch.export.export(net(), (X,)))


REFUSED = {
    lazy: r"layer '0' is not initialised \(it has no values yet\); load the model's weights, or run it once, first",
    quantised: r"module '0' is quantised already \(Linear\); give the model as it was before",
    half_quantised: r"module '0\.0' is quantised already",
    exported: "an exported program can't be rewritten; give the module that it was exported from",
    unflattened: "an exported program can't be rewritten; give the module that it was exported from",
    lambda: torch.export.export(net(), (X,)): "got ExportedProgram; give the module that it was exported from",
    lambda: torch.jit.script(
        net()
    ): "a scripted or traced model can't be rewritten; give the module that it was made from",
    lambda: torch.jit.trace(net(), X): "a scripted or traced model can't be rewritten",
    lambda: net().to("meta"): r"layer '0' is not initialised \(it has no values yet\)",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_what_can_not_be_rewritten_is_said_in_one_sentence(make: Callable[[], Any]) -> None:
    model, data = make(), (X, Y)
    made = slrprop.plan(net(), data, method="svd", rank=2)
    for act in (
        lambda: slrprop.inspect(model),
        lambda: slrprop.plan(model, data, method="svd", rank=2),
        lambda: slrprop.apply(model, made),
        lambda: slrprop.compress(model, data, max_bytes="50%"),
        lambda: slrprop.measure(model, data),
    ):
        with pytest.raises(slrprop.SlrpropError, match=REFUSED[make]):
            act()


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_part_stays_as_it_is() -> None:
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(16, 16), nn.ReLU())), nn.Linear(16, 16))
    small = slrprop.apply(model, slrprop.plan(model, (X, X), method="svd", rank=2))
    assert isinstance(small[1], FactoredLayer) and small(X).shape == (24, 16)
    assert slrprop.inspect(model).other.startswith("RecursiveScriptModule ")


def test_a_model_that_can_not_be_copied_is_said_so() -> None:
    model = net()
    model.stream = io.TextIOWrapper(io.BytesIO())
    with pytest.raises(slrprop.SlrpropError, match=r"the model can't be copied \(.*TextIOWrapper"):
        slrprop.apply(model, slrprop.plan(model, None, method="svd", rank=2))


@pytest.mark.parametrize(
    "make",
    [lambda model: torch.compile(model.forward, backend="eager"), lambda model: lambda x: model[2](model[0](x))],
    ids=["compiled", "written"],
)
def test_a_function_that_would_run_the_original_is_refused(make: Callable[[nn.Module], Any]) -> None:
    model = net()
    model.forward = make(model)  # type: ignore[method-assign]
    made = slrprop.plan(net(), None, method="svd", rank=2)
    with pytest.raises(
        slrprop.SlrpropError,
        match=r"module '' has a function in the place of its forward, which in a copy would run the original",
    ):
        slrprop.apply(model, made)


def test_random_numbers_that_a_model_draws_are_put_back() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    model = net(Noisy())
    before = torch.get_rng_state()
    for method in ("low_rank", "svd"):
        slrprop.plan(model, (X, Y), method=method, rank=2)
    assert torch.equal(torch.get_rng_state(), before)


def of_every_form() -> dict[str, Form]:
    """20 x 20 factors of every form, by kind."""
    torch.manual_seed(0)
    weight, some = torch.randn(20, 20), torch.arange(20) % 3 > 0
    low, svd = LowRank(torch.randn(20, 3), torch.randn(3, 20)), truncated_svd(weight, 4)
    made = (
        low,
        SparseLowRank.shorten(svd, 2, some, some.flip(0)),
        Narrowed.cut(weight, some, some.flip(0)),
        Sparse.of(weight * (torch.rand(20, 20) < 0.3)),
        LowRankPlusSparse(low, Sparse.of(weight * (torch.rand(20, 20) < 0.1))),
        Shared(torch.randn(20), torch.randn(20), torch.randn(20), seed=3),
    )
    assert {form.kind for form in made} == set(KINDS) - {"dense", "quantized", "table", "spatial", "tucker"}
    return {form.kind: form for form in made}


@pytest.mark.parametrize("packed", [False, True])
def test_torch_export_of_every_form(packed: bool, tmp_path: Path) -> None:
    forms = of_every_form() | {"dense": Dense(torch.randn(20, 20))}
    names = [f"{kind}_layer" for kind in forms]
    original = nn.Sequential(OrderedDict((name, nn.Linear(20, 20)) for name in names)).eval()
    layers = {
        name: layer_from(Fit(in_bits(form, 4 + 4 * (turn % 2)) if packed else form).over(torch.randn(20) / 9))
        for turn, (name, form) in enumerate(zip(names, forms.values(), strict=True))
    }
    small = swapped(original, layers).eval()
    slrprop.save(small, tmp_path / "small.safetensors")
    loaded = slrprop.load(original, tmp_path / "small.safetensors").eval()  # was never run
    x = torch.randn(8, 20)
    want = small(x[:5])
    for one in (loaded, small):
        program = torch.export.export(one, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
        torch.testing.assert_close(program.module()(x[:5]), want)
    kept = io.BytesIO()
    torch.export.save(program, kept)
    again = torch.export.load(io.BytesIO(kept.getvalue())).run_decompositions()
    torch.testing.assert_close(again.module()(x[:5]), want)


class FromAHub(nn.Module):
    """A stand-in with the interface of a Hugging Face model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = {"hidden": 16}
        self.embeddings, self.encoder, self.head = nn.Embedding(30, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        x = self.encoder(self.embeddings(input_ids)).relu()
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = self.head((x * mask[..., None]).sum(1))
        return {"logits": logits} if labels is None else {"loss": logits.sum(), "logits": logits}

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()

    def push_to_hub(self, name: str) -> str:
        return name


IDS = torch.randint(30, (24, 5), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(5) < 4).long().repeat(24, 1)


def named(part: slice = slice(None), **more: Tensor) -> UserDict[str, Tensor]:
    """Like transformers' BatchEncoding."""
    return UserDict({"input_ids": IDS[part], "attention_mask": MASK[part], **more})


HALVES = (slice(0, 12), slice(12, 24))
GIVEN: dict[str, Any] = {
    "batches of (mapping, labels)": [(named(part), Y[part]) for part in HALVES],
    "batches with a label": [named(part, label=Y[part]) for part in HALVES],
    "batches with targets": [dict(named(part, targets=Y[part])) for part in HALVES],
    "(mapping, labels)": (dict(named()), Y),
    "one mapping": named(labels=Y),
}


@pytest.mark.parametrize("data", GIVEN.values(), ids=GIVEN)
def test_batches_by_name(data: Any) -> None:
    model = FromAHub()
    want = 100 * float((model(IDS, MASK)["logits"].argmax(1) == Y).double().mean())
    assert slrprop.measure(model, data).accuracy == pytest.approx(want)
    made = slrprop.plan(model, data, method="slr", criterion="cost", rank=2)
    assert made == slrprop.plan(model, GIVEN["batches of (mapping, labels)"], method="slr", criterion="cost", rank=2)


def test_onnx_of_inputs_by_name(tmp_path: Path) -> None:
    """In another order than the arguments, with targets and an argument that is None."""
    example = (dict(reversed({**named(label=Y), "labels": None}.items())), Y)
    model = FromAHub()
    small = slrprop.apply(model, slrprop.plan(model, (named(), Y), method="low_rank", rank=2, bits=8))
    assert slrprop.export_onnx(small, tmp_path / "small.onnx", example) < 1e-4
    assert {slot.name for slot in onnx.load(tmp_path / "small.onnx").graph.input} == {"input_ids", "attention_mask"}
    assert slrprop.measure(tmp_path / "small.onnx", (named(), Y), against=small).agreement == 100


def test_a_rewritten_model_is_not_stored_by_its_library(tmp_path: Path) -> None:
    model = nn.ModuleDict({"inner": FromAHub()})
    model.forward = lambda *args, **named: model["inner"](*args, **named)  # type: ignore[method-assign]
    inner = model["inner"]
    small = slrprop.apply(inner, slrprop.plan(inner, (named(), Y), method="low_rank", rank=2))
    slrprop.save(small, tmp_path / "small.safetensors")
    for one in (small, copy.deepcopy(small), slrprop.load(FromAHub(), tmp_path / "small.safetensors")):
        torch.testing.assert_close(one(IDS, MASK)["logits"], small(IDS, MASK)["logits"])
        for store in (one.save_pretrained, one.push_to_hub):
            with pytest.raises(slrprop.SlrpropError, match=r"rewritten.*random weights; store it by slrprop\.save"):
                store(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    inner.save_pretrained(tmp_path / "folder")
    assert (tmp_path / "folder").exists()


def test_a_real_model_from_a_hub(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 30,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    config = transformers.BertConfig(**sizes, num_labels=4)
    model = transformers.BertForSequenceClassification(config).eval()
    data = [(transformers.BatchEncoding(dict(named(part))), Y[part]) for part in HALVES]
    small = slrprop.apply(model, slrprop.plan(model, data, method="low_rank", rank=2, bits=4))
    assert slrprop.export_onnx(small, tmp_path / "small.onnx", data[0]) < 1e-4
    with pytest.raises(slrprop.SlrpropError, match="random weights"):
        small.save_pretrained(tmp_path / "folder")
    slrprop.save(small, tmp_path / "small.safetensors")
    back = slrprop.load(transformers.BertForSequenceClassification(config), tmp_path / "small.safetensors").eval()
    program = torch.export.export(back, (), dict(named()))
    torch.testing.assert_close(program.module()(**named()).logits, small(**named()).logits)


def test_numbers_elsewhere_have_the_same_words_in_both_doors(tmp_path: Path) -> None:
    def own(kind: type[nn.Module]) -> type[nn.Module]:
        """Computes in its own way, and so is no layer."""
        return type(f"My{kind.__name__}", (kind,), {"forward": lambda self, *inputs: kind.forward(self, *inputs)})

    parts = (
        own(nn.Embedding)(50, 8),
        own(nn.Conv1d)(8, 8, 3),
        own(nn.ConvTranspose2d)(8, 8, 3),
        nn.BatchNorm1d(200),
        nn.LSTM(8, 8),
        nn.GRUCell(8, 8),
    )
    model = nn.ModuleList([*parts, own(nn.Conv2d)(4, 4, 5), nn.EmbeddingBag(20, 8)])
    parametrizations.weight_norm(model[1])
    assert (
        slrprop.inspect(model).other
        == "BatchNorm 22 %, Conv 17 %, ConvTranspose 16 %, LSTM 16 %, Embedding 16 %, GRU 12 %"
    )
    plain = nn.ModuleList([nn.Embedding(50, 8), nn.Conv1d(8, 8, 3), nn.ConvTranspose2d(8, 8, 3), nn.LSTM(8, 8)])
    assert [layer.shape for layer in slrprop.inspect(plain)] == [(50, 8), (24, 8), (72, 8)]
    assert slrprop.inspect(plain).other == "LSTM 33 %"
    arrays = {"table": (50, 8), "filter": (8, 8, 3), "W": (1, 32, 8), "R": (1, 32, 8), "scale": (8,)}
    arrays |= {"side": (8, 50), "map": (8, 8, 12)}
    made = [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in arrays.items()]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
        helper.make_node("Conv", ["t", "filter"], ["c"]),
        helper.make_node("InstanceNormalization", ["c", "scale", "scale"], ["n"]),
        helper.make_node("LSTM", ["n", "W", "R"], ["y"], hidden_size=8),
        helper.make_node("Gather", ["side", "ids"], ["columns"], axis=1),
        helper.make_node("Conv", ["map", "t"], ["correlated"]),
    ]
    slots = [helper.make_tensor_value_info(*slot) for slot in (("ids", 7, [2, 10]), ("y", 1, None))]
    graph = helper.make_graph(nodes, "g", slots[:1], slots[1:], made)
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    found = slrprop.inspect(tmp_path / "model.onnx")
    assert [layer.shape for layer in found] == [(50, 8), (24, 8)]
    assert found.other == "Conv 34 %, LSTM 22 %, Embedding 18 %"


def test_state_that_is_no_tensor_is_refused_when_it_is_stored(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 3}

        def set_extra_state(self, state: Any) -> None: ...

    assert slrprop.inspect(nn.Sequential(Extra(4, 4)))
    with pytest.raises(slrprop.SlrpropError, match=r"the model keeps '0\._extra_state' \(dict\) in its state"):
        slrprop.save(nn.Sequential(Extra(4, 4)), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
