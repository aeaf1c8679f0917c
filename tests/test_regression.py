"""Regressions of layers: moments, targets, metrics and best factors, each against another way to compute it."""

import copy
import dataclasses
import itertools
import threading

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap

import slrprop
from slrprop import SlrpropError
from slrprop.data import Data
from slrprop.fit.calibration import METRIC_DAMPING, Calibration
from slrprop.fit.pairs import Compressed
from slrprop.forms import Dense
from slrprop.forms.blocks import members
from slrprop.linalg import truncated_svd
from slrprop.methods import base as methods_base
from slrprop.methods import refit as refit_module
from slrprop.methods.low_rank import LowRankSettings
from slrprop.methods.nested import SHAPES, Level, NestedSettings
from slrprop.methods.refit import Refit
from slrprop.methods.slr_refit import SLRRefitSettings, refitted
from slrprop.network import OnnxNetwork, TorchNetwork, open_network
from slrprop.plan import Plan
from tests.test_reduced_rank import random_matrix, weighted_error


def calibration_of(model, x, size=512):
    data = Data((x, None), size)
    return Calibration(TorchNetwork(model, data), data)


def narrowed_by(model, name, rank):
    """What a layer computes at a low rank, with another bias."""
    linear = model.get_submodule(name)
    svd = truncated_svd(linear.weight.detach().T.double(), rank)
    bias = 0.1 * torch.arange(linear.out_features, dtype=torch.float64)
    return Compressed(Dense(svd.left @ svd.vt), bias)


def put(model, compressed):
    """A copy of the model with the compressed layers in it."""
    twin = copy.deepcopy(model)
    for name, now in compressed.items():
        linear = twin.get_submodule(name)
        linear.weight.data, linear.bias.data = now.weight.T.to(linear.weight).contiguous(), now.bias.to(linear.weight)
    return twin


def seen(model, name, x):
    """A layer's (inputs, outputs)."""
    found = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, given, y: found.append((given[0], y)))
    with torch.no_grad():
        model(x)
    handle.remove()
    return tuple(torch.cat([pair[i].flatten(0, -2) for pair in found]).double() for i in range(2))


def jacobian_metric(model, name, x, scores=lambda output: output):
    """Mean of ``J H J^T`` by torch.func: the outputs' Jacobian in a layer's bias; and its damping."""
    parameters = dict(model.named_parameters())
    key = f"{name}.bias"

    def run(bias, sample):
        return scores(functional_call(model, parameters | {key: bias}, (sample[None],)))[0]

    jacobians = vmap(jacrev(run), (None, 0))(parameters[key].detach(), x).double()  # p x c x n
    jacobians = jacobians.detach()
    centred = jacobians - jacobians.mean(1, keepdim=True) if jacobians.shape[1] > 1 else jacobians
    metric = torch.einsum("pcn,pck->nk", centred, centred) / len(x)
    return metric + METRIC_DAMPING * metric.diagonal().mean() * torch.eye(len(metric), dtype=torch.float64)


class TestMoments:
    @pytest.mark.parametrize("shift", [0.0, 300.0])
    @pytest.mark.parametrize("compressed", [False, True])
    def test_they_are_those_of_the_module_itself(self, compressed, shift, trained, calibration):
        """Also where means are large: nothing cancels."""
        model = copy.deepcopy(trained).double()
        with torch.no_grad():
            model[2].bias += shift
            model[4].bias -= model[4].weight.sum(1) * shift
        x = calibration[0].double()
        before = {"0": narrowed_by(model, "0", 7)} if compressed else {}
        task = calibration_of(model, x).regression("4", before)
        inputs, _ = seen(put(model, before), "4", x)
        _, wanted = seen(model, "4", x)
        torch.testing.assert_close(task.mean, inputs.mean(0))
        torch.testing.assert_close(task.target_mean, wanted.mean(0))
        want = torch.from_numpy(np.cov(inputs.numpy(), rowvar=False, bias=True))
        assert (task.covariance - want).norm() < 1e-9 * want.norm()
        xs, zs = task.samples()
        assert torch.equal(xs, inputs) or torch.allclose(xs, inputs)
        torch.testing.assert_close(zs, wanted)

    def test_batches_do_not_matter(self, trained, calibration):
        model, x = copy.deepcopy(trained).double(), calibration[0].double()
        before = {"0": narrowed_by(model, "0", 7)}
        one, many = (calibration_of(model, x, size).regression("2", before) for size in (300, 13))
        for name in ("weight", "mean", "covariance", "target_mean", "metric"):
            torch.testing.assert_close(getattr(one, name), getattr(many, name), rtol=1e-7, atol=1e-9)

    def test_one_large_constant_input_leaves_the_others_alone(self):
        """Nothing is added to the variances of the others that they would notice."""
        generator = torch.Generator().manual_seed(0)
        x = 0.01 * torch.randn(200, 6, dtype=torch.float64, generator=generator)
        x[:, 2] = 1e6
        task = calibration_of(nn.Sequential(nn.Linear(6, 4)).double(), x).regression("0", {})
        want = torch.from_numpy(np.cov(x.numpy(), rowvar=False, bias=True))
        assert (task.covariance - want).abs().max() < 1e-8 * want.max()
        assert torch.linalg.eigvalsh(task.damped(1e-6)).min() > 0

    @pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
    def test_inputs_that_never_change(self, value):
        """A layer that always sees the same is fitted all the same: its bias makes the output right."""
        torch.manual_seed(0)
        x = torch.full((50, 6), value)
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
        for method in ("low_rank", "nested", "dense"):
            plan = slrprop.plan(model, x, method=method, layers=["0"], rank=1)
            got, want = slrprop.apply(model, plan)(x), model(x)
            torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * max(1.0, value))

    @pytest.mark.parametrize("removed", [0, 30, 96])
    def test_the_anchored_target_is_least_squares(self, removed, trained, calibration):
        """From the compressed inputs to the original pre-activations, pulled to the original weight a little; with neurons removed."""
        model, x = copy.deepcopy(trained).double(), calibration[0].double()
        before = {"0": narrowed_by(model, "0", 12)}
        before["0"].weight[:, :removed] = before["0"].bias[:removed] = 0
        task = calibration_of(model, x).regression("2", before)
        inputs, _ = seen(put(model, before), "2", x)
        _, wanted = seen(model, "2", x)
        centred, goal = inputs - inputs.mean(0), wanted - wanted.mean(0)
        ridge = (1e-4 * centred.square().sum() / centred.shape[1]).sqrt()
        stacked = torch.cat([centred, ridge * torch.eye(centred.shape[1], dtype=torch.float64)])
        right = torch.cat([goal, ridge * task.original])
        want = torch.linalg.lstsq(stacked, right).solution
        if removed == 96:  # no input varies, nothing pulls
            assert torch.equal(task.weight, task.original)
            return
        torch.testing.assert_close(task.weight, want, rtol=1e-6, atol=1e-8)
        assert torch.equal(task.weight[:removed], task.original[:removed])
        error = (centred @ task.weight - goal).square().sum()
        assert error < 0.9 * (centred @ task.original - goal).square().sum()

    @pytest.mark.parametrize("name", ["2", "4"])
    def test_chains_and_whole_runs_give_the_same(self, name, trained, calibration, monkeypatch):
        before = {"0": narrowed_by(trained, "0", 7)}
        chain = calibration_of(trained, calibration[0])
        assert chain.pairs._entry(name, before) == "0"
        short = chain.regression(name, before)
        whole = calibration_of(trained, calibration[0])
        monkeypatch.setattr(whole.pairs, "_entry", lambda *given: None)
        long = whole.regression(name, before)
        for field in ("weight", "mean", "covariance", "target_mean", "metric"):
            torch.testing.assert_close(getattr(short, field), getattr(long, field), rtol=1e-4, atol=1e-5)

    def test_batch_norm_is_no_plain_chain(self, calibration):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(64, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 20)).eval()
        model[1].running_mean.uniform_(-1, 1)
        before = {"0": narrowed_by(model, "0", 5)}
        found = calibration_of(model, calibration[0])
        assert found.pairs._entry("3", before) is None
        task = found.regression("3", before)
        inputs, _ = seen(put(model, before), "3", calibration[0])
        torch.testing.assert_close(task.mean, inputs.mean(0), rtol=1e-4, atol=1e-5)

    def test_files_and_modules_are_the_same(self, trained, calibration, tmp_path):
        x = calibration[0]
        slrprop.export_onnx(trained, tmp_path / "model.onnx", x[:4])
        data = Data((x, None))
        network = OnnxNetwork(tmp_path / "model.onnx", data)
        torch_side, onnx_side = calibration_of(trained, x), Calibration(network, data)
        first, second = network.order[:2]
        narrow = narrowed_by(trained, "0", 7)
        for mine, theirs in ((torch_side.regression("0", {}), onnx_side.regression(first, {})), (
            torch_side.regression("2", {"0": narrow}),
            onnx_side.regression(second, {first: narrow}),
        )):  # fmt: skip
            assert mine.relu == theirs.relu
            for field in ("weight", "bias", "mean", "covariance", "target_mean", "metric"):
                torch.testing.assert_close(getattr(mine, field), getattr(theirs, field), rtol=1e-4, atol=1e-5)

    def test_corrected_biases_make_the_mean_output_right(self, trained, calibration):
        before = {"0": narrowed_by(trained, "0", 7)}
        task = calibration_of(trained, calibration[0]).regression("2", before)
        weight = task.low_rank(3)[0] @ task.low_rank(3)[1]
        after = put(trained, before | {"2": Compressed(Dense(weight), task.corrected_bias(weight))})
        (_, got), (_, want) = seen(after, "2", calibration[0]), seen(trained, "2", calibration[0])
        torch.testing.assert_close(got.mean(0), want.mean(0), rtol=1e-4, atol=1e-4)

    def test_layers_that_no_sample_reaches(self, trained, calibration):
        task = calibration_of(trained, calibration[0])
        task.network.order = ()
        task.network.stream = lambda names, data, whole=True: iter(())
        with pytest.raises(SlrpropError, match="layer '2' saw no sample of the calibration data"):
            task.regression("2", {})


class Block(nn.Module):
    """Self-attention and two dense layers with residuals, a mean over tokens and a head."""

    def __init__(self, in_place=False):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.wide, self.narrow, self.head = nn.Linear(8, 20), nn.Linear(20, 8), nn.Linear(8, 3)
        self.in_place = in_place

    def forward(self, x):
        h = x + 0
        q, k, v = self.q(h), self.k(h), self.v(h)
        mixed = self.out((q @ k.mT).softmax(-1) @ v)
        h = h.add_(mixed) if self.in_place else h + mixed
        inner = self.wide(h)
        inner = inner.relu_() if self.in_place else inner.relu()
        return self.head((h + self.narrow(inner)).mean(1))


@pytest.fixture
def blocks():
    torch.manual_seed(5)
    plain = Block().eval()
    written = Block(in_place=True).eval()
    written.load_state_dict(plain.state_dict())
    return plain, written, torch.randn(50, 6, 8)


def assert_same_task(one, other):
    for name in ("weight", "bias", "mean", "covariance", "target_mean", "metric", "root"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-7)


class TestManyLayers:
    NAMES = ("q", "k", "v", "out", "wide", "narrow", "head")

    def test_siblings_read_the_same_tensor(self, blocks, tmp_path):
        plain, written, x = blocks
        slrprop.export_onnx(plain, tmp_path / "block.onnx", x[:2])
        data = Data((x, None))
        for network in (TorchNetwork(plain, data), TorchNetwork(written, data)):
            assert network.siblings("q") == network.siblings("v") == {"q", "k", "v"}
            assert all(network.siblings(name) == {name} for name in self.NAMES[3:])
        network = OnnxNetwork(tmp_path / "block.onnx", data)
        assert sorted(map(len, map(network.siblings, network.names))) == [1, 1, 1, 1, 3, 3, 3]

    def test_a_tensor_written_to_is_another(self):
        class Grown(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x):
                x = x + 0
                x += self.a(x)
                return self.b(x)

        model, x = Grown(), torch.randn(20, 4)
        found = calibration_of(model, x)
        assert found.network.siblings("a") == {"a"}
        torch.testing.assert_close(found.regression("a", {}).mean, x.double().mean(0))

    def test_what_is_written_to_later_is_as_the_layer_saw_it(self, blocks):
        plain, written, x = blocks
        one, other = (calibration_of(model, x) for model in (plain, written))
        for name in self.NAMES:
            assert_same_task(one.regression(name, {}), other.regression(name, {}))

    @pytest.mark.parametrize("kept", [1 << 30, 4000, 0])
    def test_prepared_together_they_are_as_one_by_one(self, kept, blocks, monkeypatch):
        for module in ("pairs", "calibration"):
            monkeypatch.setattr(f"slrprop.fit.{module}.bound", lambda: kept)
        plain, _, x = blocks
        alone, together = (calibration_of(plain, x, 17) for _ in range(2))
        together.prepare(self.NAMES)
        before = {name: narrowed_by(plain, name, 3) for name in ("q", "k", "v", "out")}
        for name in self.NAMES:
            assert_same_task(alone.regression(name, {}), together.regression(name, {}))
            seen = {key: value for key, value in before.items() if key != name and self.NAMES.index(key) < self.NAMES.index(name)}  # fmt: skip
            assert_same_task(alone.regression(name, seen), together.regression(name, seen))

    def test_few_runs_are_enough(self, blocks, monkeypatch):
        """All metrics and moments in a run each; siblings behind compressed layers share one."""
        plain, _, x = blocks
        calls, real = [], TorchNetwork.call
        monkeypatch.setattr(TorchNetwork, "call", lambda self, batch: calls.append(1) or real(self, batch))
        found = calibration_of(plain, x)
        calls.clear()
        found.prepare(self.NAMES)
        assert len(calls) == 3  # metrics, rows, moments
        before = {name: narrowed_by(plain, name, 3) for name in ("q", "k", "v")}
        found.regression("out", before)
        assert len(calls) == 4
        assert found.regression("k", {"q": before["q"]}) is found.regression("k", {})
        assert len(calls) == 4

    def test_a_frozen_network_has_the_same_metric_and_stays_frozen(self, blocks):
        plain, _, x = blocks
        want = calibration_of(plain, x).regression("q", {}).metric
        plain.requires_grad_(False)
        plain.head.requires_grad_(True)
        torch.testing.assert_close(calibration_of(plain, x).regression("q", {}).metric, want)
        assert [p.requires_grad for p in plain.parameters()] == [False] * 12 + [True] * 2


class Straying(nn.Module):
    """A network that leaves a layer out where a batch is small."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        x = self.a(x).tanh()
        return self.c(x + self.b(x) if len(x) > 5 else x)


class TestLockstep:
    """What lies before a layer is run once for all layers; every layer sees what it sees in a run of its own."""

    NAMES = TestManyLayers.NAMES

    def networks(self, blocks, folder, size, batch=None):
        plain, written, x = blocks
        slrprop.export_onnx(plain, folder / "block.onnx", x[:2])
        if batch is not None:
            proto = onnx.load(folder / "block.onnx")
            proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
            onnx.save(proto, folder / "block.onnx")
        data = Data((x, None), size)
        models = (folder / "block.onnx",) if batch is not None else (plain, written, folder / "block.onnx")
        return [(open_network(model, data), data) for model in models]

    @staticmethod
    def walked(network, data, together, planned, kept=True):
        """Every layer's regression behind the planned ones before it; ``kept``: with the original outputs at hand."""
        found = Calibration(network, data)
        found.prepare(network.order)
        assert found.pairs.together
        found.pairs.together = together
        found.pairs.outputs = found.pairs.outputs if kept else {}
        before, tasks = {}, []
        for place, name in enumerate(network.order):
            tasks.append(found.regression(name, dict(before)))
            if place in planned:
                before[name] = Compressed(Dense(tasks[-1].weight * 1.1 - 0.02), tasks[-1].bias + 0.1)
        found.rest()
        return tasks

    @pytest.mark.parametrize("size", [50, 17])
    @pytest.mark.parametrize("planned", [range(7), (1, 4, 5)])
    @pytest.mark.parametrize("batch", [None, 8])
    def test_layers_see_what_they_see_one_by_one(self, batch, planned, size, blocks, tmp_path):
        for network, data in self.networks(blocks, tmp_path, size, batch):
            apart, together = (self.walked(network, data, way, planned) for way in (False, True))
            for one, other in zip(apart, together, strict=True):
                assert_same_task(one, other)

    def test_nothing_is_run_twice(self, blocks, tmp_path, monkeypatch):
        calls, real = [], TorchNetwork.call
        monkeypatch.setattr(TorchNetwork, "call", lambda self, batch: calls.append(1) or real(self, batch))
        (network, data), _, (file, _) = self.networks(blocks, tmp_path, 17)
        calls.clear()
        self.walked(network, data, True, range(7))
        # each of three batches: metrics, rows, moments, the head's own metric; then once through the original and the compressed
        assert len(calls) == 3 * 4 + 3 + 3
        self.walked(file, data, True, range(7))
        run = [piece.nodes for piece in file.pieces.values()]
        assert sum(map(len, run)) == len(frozenset().union(*run)) < len(file.graph.nodes)

    def test_outputs_that_are_too_many_to_keep_are_computed_on_the_way(self, blocks, tmp_path, monkeypatch):
        calls, real = [], TorchNetwork.call
        monkeypatch.setattr(TorchNetwork, "call", lambda self, batch: calls.append(1) or real(self, batch))
        for network, data in self.networks(blocks, tmp_path, 17):
            want = self.walked(network, data, True, range(7))
            calls.clear()
            for one, other in zip(want, self.walked(network, data, True, range(7), kept=False), strict=True):
                assert_same_task(one, other)
            # no more than above, where the head's take one more run each already
            assert len(calls) == (3 * 4 + 3 + 3 if isinstance(network, TorchNetwork) else 0)

    def test_going_back_begins_anew(self, blocks, tmp_path):
        for network, data in self.networks(blocks, tmp_path, 17):
            found = Calibration(network, data)
            found.prepare(network.order)
            first, last = network.order[3], network.order[5]
            changed = {
                first: Compressed(Dense(network.weight(first).double() * 0.5), torch.ones(8, dtype=torch.float64))
            }
            want = found.regression(last, changed)
            assert_same_task(
                found.regression(network.order[4], dict(changed)), found.regression(network.order[4], changed)
            )
            assert_same_task(want, found.regression(last, dict(changed)))
            other = {first: changed[first]._replace(bias=torch.zeros(8, dtype=torch.float64))}
            assert not torch.equal(want.mean, found.regression(last, other).mean)
            found.rest()

    def test_what_a_batch_leaves_out_is_seen_one_by_one(self):
        model, x = Straying().eval(), torch.randn(20, 4)
        data = Data((x, None), 8)  # the last batch has 4
        found, alone = (Calibration(TorchNetwork(model, data), data) for _ in range(2))
        found.prepare(("a", "b", "c"))
        found.pairs.together = True
        before = {"a": narrowed_by(model, "a", 2)}
        assert_same_task(found.regression("b", before), alone.regression("b", before))
        assert not found.pairs.together

    def test_a_sequence_across_a_layer_is_seen_one_by_one(self, tmp_path):
        rng = np.random.default_rng(0)
        weights = {name: rng.standard_normal((6, 6)).astype("f") for name in "abc"}
        graph = onnx.parser.parse_graph(
            """
            g (float[N, 6] x, float[6, 6] a, float[6, 6] b, float[6, 6] c) => (float[N, 6] y) {
                one = Constant <value = int64 {1}> ()
                two = Constant <value = int64 {2}> ()
                u = MatMul (x, a)
                parts = SplitToSequence <axis = 0> (u, two)
                v = ConcatFromSequence <axis = 0> (parts)
                w = MatMul (v, b)
                r = Relu (w)
                n = SequenceLength (parts)
                k = Cast <to = 1> (n)
                s = Div (r, k)
                y = MatMul (s, c)
            }"""
        )
        del graph.input[1:]
        graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in weights.items())
        onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]), tmp_path / "s.onnx")
        data = Data((torch.randn(20, 6), None), 10)
        network = open_network(tmp_path / "s.onnx", data)
        found, alone = Calibration(network, data), Calibration(network, data)
        found.prepare(network.order)
        first, second, third = network.order
        before = {first: Compressed(Dense(network.weight(first).double() * 0.5), torch.zeros(6, dtype=torch.float64))}
        assert found.pairs.together
        assert_same_task(found.regression(second, before), alone.regression(second, before))
        before[second] = Compressed(Dense(network.weight(second).double() * 0.7), torch.zeros(6, dtype=torch.float64))
        assert_same_task(found.regression(third, before), alone.regression(third, before))
        assert not found.pairs.together

    def test_no_thread_stays(self, blocks, monkeypatch):
        threads = set(threading.enumerate())
        slrprop.plan(blocks[0], (blocks[2], None), method="low_rank", rank=2)
        plan = slrprop.plan(blocks[0], Data((blocks[2], None), 17), method="low_rank", rank=2)
        assert len(plan.layers) == 7
        fail = methods_base.Problem.weight
        monkeypatch.setattr(
            methods_base.Problem, "weight", lambda self, name: 1 / 0 if name == "narrow" else fail(self, name)
        )
        with pytest.raises(ZeroDivisionError):
            slrprop.plan(blocks[0], Data((blocks[2], None), 17), method="low_rank", rank=2)
        for thread in set(threading.enumerate()) - threads:
            thread.join(5)
            assert not thread.is_alive()

    def test_what_a_module_raises_on_the_way_is_told(self, blocks, monkeypatch):
        plain, _, x = blocks
        found = calibration_of(plain, x, 17)
        found.prepare(self.NAMES)
        monkeypatch.setattr(Block, "forward", lambda self, x: self.q(x) @ torch.ones(3))
        with pytest.raises(SlrpropError, match=r"the model can't take data of shape \(17, 6, 8\)"):
            found.regression("out", {"q": narrowed_by(plain, "q", 3)})


class TestInOrder:
    """Layers of a plan, one after the other."""

    @pytest.mark.parametrize("bits", [32, 8])
    @pytest.mark.parametrize("method", ["low_rank", "nested", "dense"])
    def test_mean_outputs_are_right(self, method, bits, trained, calibration):
        given = {} if (method, bits) == ("dense", 8) else {"bits": bits}
        if method == "dense" and bits == 32:
            return  # which saves nothing
        made = slrprop.plan(trained, calibration, method=method, layers=["0", "2"], rank=5, **given)
        small = slrprop.apply(trained, Plan(made.layers))  # neurons in their own order
        for name in ("0", "2", "4"):
            (_, got), (_, want) = seen(small, name, calibration[0]), seen(trained, name, calibration[0])
            fits = [layer.fit for layer in made.layers if layer.name == name]
            biases = [fit.bias.value for fit in fits if fit.bias is not None and fit.bias.scale is not None]
            step = 2 * biases[0].abs().max() / 127 if biases else 0  # the bias is rounded too
            assert (got.mean(0) - want.mean(0)).abs().max() <= 1e-4 + step

    def test_the_head_is_refitted_by_least_squares(self, trained, calibration):
        made = slrprop.plan(trained, calibration, method="low_rank", layers=["0", "2"], rank=5)
        plain = slrprop.plan(trained, calibration, method="low_rank", layers=["0", "2"], rank=5, refit_head=False)
        assert [layer.name for layer in made.layers] == ["0", "2", "4"] and made.layers[2].method == "dense"
        assert [layer.fitted for layer in plain.layers] == [layer.fitted for layer in made.layers[:2]]
        x, _ = seen(slrprop.apply(trained, Plan(plain.layers)), "4", calibration[0])
        _, z = seen(trained, "4", calibration[0])
        x, z = x - x.mean(0), z - z.mean(0)
        best = torch.linalg.lstsq(x, z, driver="gelsd").solution
        error, least = ((x @ weight - z).square().sum() for weight in (made.layers[2].factors.dense().double(), best))
        assert least <= error <= 1.05 * least

    def test_each_layer_sees_what_the_compressed_ones_give(self, trained, calibration):
        """The second layer of a plan is the one fitted alone behind the first."""
        made = slrprop.plan(trained, calibration, method="low_rank", layers=["0", "2"], rank=5)
        first = made.layers[0]
        before = {"0": Compressed(first.factors, first.bias.double())}
        task = calibration_of(trained, calibration[0]).regression("2", before)
        want = LowRankSettings(rank=5).fit(task).dense()
        torch.testing.assert_close(made.layers[1].factors.dense().double(), want, rtol=1e-3, atol=1e-5)
        alone = slrprop.plan(trained, calibration, method="low_rank", layers=["0", "2"], rank=5, sequential=False)
        single = slrprop.plan(trained, calibration, method="low_rank", layers=["2"], rank=5)
        assert torch.equal(alone.layers[1].factors.dense(), single.layers[0].factors.dense())
        assert not torch.equal(alone.layers[1].factors.dense(), made.layers[1].factors.dense())

    @pytest.mark.parametrize("settings", [{"method": "low_rank", "bits": 4}, {"method": "nested"}, {"method": "wanda"}])
    def test_factors_lead_where_their_dense_weight_does(self, settings, trained, calibration):
        """A layer behind factors sees what it sees behind the matrix that they make."""
        made = slrprop.plan(trained, calibration, layers=["0"], refit_head=False, **settings).layers[0].factors
        bias = torch.ones(96, dtype=torch.float64)
        behind = [
            calibration_of(trained, calibration[0]).regression("4", {"0": Compressed(form, bias)})
            for form in (Dense(made.dense().double()), made)
        ]
        for what in ("mean", "covariance"):
            torch.testing.assert_close(*(getattr(task, what) for task in behind), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(*(task.covariance @ task.weight for task in behind), rtol=1e-4, atol=1e-5)


class Residual(nn.Module):
    """No chain leads out of ``inner``."""

    def __init__(self, classes=5, softmax=False, times=1):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(8, 7), nn.Linear(7, 7), nn.Linear(7, classes)
        self.softmax, self.times = softmax, times

    def forward(self, x):
        h = torch.tanh(self.first(x))
        for _ in range(self.times):
            h = h + torch.tanh(self.inner(h))
        output = self.last(h)
        return output.softmax(-1) if self.softmax else output


def residual(**given):
    torch.manual_seed(2)
    return Residual(**given).eval(), torch.randn(40, 8)


class TestMetric:
    def test_too_many_outputs_weigh_alike(self, trained, calibration, monkeypatch):
        monkeypatch.setattr("slrprop.fit.calibration.METRIC_OUTPUTS", 79)
        found = calibration_of(trained, calibration[0])
        found.prepare(("0", "2", "4"))
        assert [found.regression(name, {}).metric is None for name in ("0", "2", "4")] == [True, True, False]

    @pytest.mark.parametrize("name", ["0", "2", "4"])
    def test_of_chains_by_jacobians(self, name, trained, calibration):
        x = calibration[0][:60]
        metric = calibration_of(trained, x).regression(name, {}).metric
        torch.testing.assert_close(metric, jacobian_metric(trained, name, x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("classes", [5, 1])
    @pytest.mark.parametrize("name", ["first", "inner", "last"])
    def test_without_a_chain_by_jacobians(self, name, classes):
        model, x = residual(classes=classes)
        found = calibration_of(model, x, 17)
        assert (found.network.chain(name) is None) == (name == "first" or name == "inner")
        torch.testing.assert_close(found.regression(name, {}).metric, jacobian_metric(model, name, x), rtol=1e-4, atol=1e-6)  # fmt: skip

    @pytest.mark.parametrize("name", ["inner", "last"])
    def test_of_probabilities_it_is_that_of_the_logits(self, name):
        """Whether a chain leads to a final softmax or not, outputs are compared as scores."""
        (plain, x), (ending, _) = residual(), residual(softmax=True)
        want, got = (calibration_of(model, x).regression(name, {}).metric for model in (plain, ending))
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)

    def test_of_a_layer_called_twice_reaches_through_the_second_call(self):
        model, x = residual(times=2)
        metric = calibration_of(model, x).regression("inner", {}).metric
        weight, bias = model.inner.weight.detach(), model.inner.bias.detach()

        def run(moves, sample):
            h = torch.tanh(model.first(sample))
            for move in moves:
                h = h + torch.tanh(h @ weight.T + bias + move)
            return model.last(h)

        jacobians = vmap(jacrev(run), (None, 0))(torch.zeros(2, 7), x).detach().double()  # p x c x calls x n
        centred = jacobians - jacobians.mean(1, keepdim=True)
        want = torch.einsum("pcan,pcak->nk", centred, centred) / (2 * len(x))
        want += METRIC_DAMPING * want.diagonal().mean() * torch.eye(7, dtype=torch.float64)
        torch.testing.assert_close(metric, want, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("size", [400, 20])
    @pytest.mark.parametrize("chain", [True, False])
    def test_of_many_classes_by_probes(self, chain, size):
        """Random directions differ from sample to sample and batch to batch, so that their noise averages out."""
        torch.manual_seed(0)
        model = residual(classes=40)[0]
        x = torch.randn(400, 8)
        name = "last" if chain else "inner"
        metric = calibration_of(model, x, size).regression(name, {}).metric
        want = jacobian_metric(model, name, x)
        assert (metric - want).norm() < 0.1 * want.norm()
        again = calibration_of(model, x, size).regression(name, {}).metric
        assert torch.equal(metric, again)

    def test_a_network_that_ignores_a_layer_has_none(self):
        class Deaf(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

            def forward(self, x):
                return self.b(x) + 0 * self.a(x).sum(-1, keepdim=True)

        task = calibration_of(Deaf(), torch.randn(20, 4)).regression("a", {})
        assert task.metric is None and task.root is None
        assert torch.isfinite(NestedSettings(rank=2, shape="half").fit(task).dense()).all()


@pytest.fixture(scope="module")
def task(trained, calibration):
    """The regression of layer '2' behind a compressed layer '0'."""
    return calibration_of(trained, calibration[0]).regression("2", {"0": narrowed_by(trained, "0", 12)})


def rest_of(refit):
    """What the blocks leave."""
    return refit.task.weight - refit.factors().dense()


def sweeps_of(refit, count):
    """The weighted error before and after each of some sweeps."""
    errors = []
    for _ in range(count):
        errors.append(weighted_error(rest_of(refit), refit.covariance, refit.task.metric))
        refit.sweep()
    return [*errors, weighted_error(rest_of(refit), refit.covariance, refit.task.metric)]


class TestNested:
    def test_one_level_is_low_rank(self, task, monkeypatch):
        monkeypatch.setitem(SHAPES, "one", (Level(1, 1, 1),))
        nested = NestedSettings(rank=5, shape="one").fit(task)
        low = LowRankSettings(rank=5).fit(task)
        torch.testing.assert_close(nested.dense(), low.dense())
        assert nested.numbers == low.numbers

    def test_two_levels_with_the_same_sets_are_slr_refit(self, task, monkeypatch):
        """Half of the neurons, a quarter of the rank for all: what SLR at these rates shortens."""
        nested = NestedSettings(rank=8, shape="half", sweeps=3).fit(task)
        rows, columns = nested.row_levels == 2, nested.column_levels == 2
        settings = SLRRefitSettings(rank=8, reduction_rate=0.25, sweeps=3)
        slr = refitted(task, settings, rows, columns)
        assert settings.reduced_rank == 2 and torch.equal(slr.row_levels, nested.row_levels)
        torch.testing.assert_close(slr.dense(), nested.dense())

    @pytest.mark.parametrize("shape", SHAPES)
    def test_sweeps_never_raise_the_error(self, shape, task):
        settings = NestedSettings(rank=11, shape=shape, sweeps=0)
        start = settings.fit(task)
        refit = Refit(task, 8)
        for level, left in enumerate(start.left):
            rows, columns = members(start.row_levels, level), members(start.column_levels, level)
            refit.add(rows, columns, left.shape[1])
        errors = sweeps_of(refit, 4)
        assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(errors))
        assert errors[-1] < errors[0]

    @pytest.mark.parametrize("shape", ["half", "four"])
    @pytest.mark.parametrize("unweighted", [{}, {"metric": None, "root": None}])
    def test_the_principal_part_of_a_wide_layer_is_fitted_like_a_matrix(self, shape, unweighted, task, monkeypatch):
        """A weight of rank 7, of which 8 components are all."""
        weight = LowRankSettings(rank=7).fit(task).dense()
        narrow, settings = (
            dataclasses.replace(task, weight=weight, **unweighted),
            NestedSettings(rank=2, shape=shape, sweeps=2),
        )
        whole = settings.fit(narrow)
        monkeypatch.setattr(refit_module, "THIN", 8)
        assert Refit(narrow, settings.rank).wanted.left.shape[1] == 8
        thin = settings.fit(narrow)
        assert torch.equal(thin.row_levels, whole.row_levels) and torch.equal(thin.column_levels, whole.column_levels)
        torch.testing.assert_close(thin.dense(), whole.dense())

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("rank", [1, 6, 40, 200])
    def test_sets_are_nested_and_sizes_are_as_said(self, shape, rank, task):
        settings = NestedSettings(rank=rank, shape=shape, sweeps=0)
        found = settings.fit(task)
        m, n = task.weight.shape
        assert found.numbers == settings.stored_numbers(m, n)
        for level, (rows, columns, k) in enumerate(settings.sizes(m, n)):
            assert (found.left[level].shape, found.right[level].shape) == ((rows, k), (k, columns))
            assert int((found.row_levels > level).sum()) == rows

    def test_a_block_is_the_best_of_its_rank(self, task):
        """By random search around it: no other factors on these neurons come nearer."""
        refit = Refit(task, 8)
        rows, columns = torch.arange(0, 96, 2), torch.arange(0, 80, 3)
        refit.add(rows, columns, 3)
        best = weighted_error(rest_of(refit), refit.covariance, task.metric)
        best_left, best_right = refit.blocks[0].left, refit.blocks[0].right
        for seed in range(20):
            left = best_left + 1e-3 * random_matrix(*best_left.shape, seed)
            right = best_right + 1e-3 * random_matrix(*best_right.shape, seed + 50)
            rest = task.weight.clone()
            rest[rows[:, None], columns] -= left @ right
            assert weighted_error(rest, refit.covariance, task.metric) >= best

    def test_more_sweeps_and_ranks_come_nearer(self, task):
        def error(**given):
            rest = task.weight - NestedSettings(shape="three", **given).fit(task).dense()
            return weighted_error(rest, task.covariance, task.metric)

        assert error(rank=8, sweeps=4) < error(rank=8, sweeps=0)
        assert error(rank=16) < error(rank=8) < error(rank=4)

    @pytest.mark.parametrize("rate", [0.0, 0.5, 0.99])
    def test_slr_refit_stores_what_slr_stores(self, rate, trained, calibration):
        """Also where nothing is shortened, or everything."""
        for name in ("sparsity_rate", "reduction_rate"):
            made, slr = (
                slrprop.plan(trained, calibration, method=method, layers=["2"], rank=6, criterion="weight", **{name: rate})
                for method in ("slr_refit", "slr")
            )  # fmt: skip
            assert made.layers[0].numbers <= slr.layers[0].numbers

    def test_parts_of_larger_ranks_are_the_smaller_ones(self, task):
        first = [factor.clone() for factor in task.low_rank(9)]
        small = task.low_rank(4)
        again = calibration_again(task).low_rank(4)
        torch.testing.assert_close(small[0] @ small[1], again[0] @ again[1])
        torch.testing.assert_close(task.low_rank(9)[0], first[0])


def calibration_again(task):
    """The same regression that knows nothing yet."""
    fields = {name: getattr(task, name) for name, field in task.__dataclass_fields__.items() if field.init}
    return type(task)(**fields)
