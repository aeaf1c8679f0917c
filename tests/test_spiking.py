"""The spiking network against a plain oracle, its pruning, and the study that compares the strategies."""

import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from typer.testing import CliRunner

from slrprop import SlrpropError, cli
from slrprop.research import spiking_study as study
from slrprop.research.datasets import Dataset
from slrprop.research.spiking import Operations, Pruning, SpikingNetwork, SpikingSettings, Training, fewest
from slrprop.research.store import Store

SHORT = SpikingSettings(steps=60, rate=300.0)
IMAGES = np.random.default_rng(0).random((40, 30)).astype(np.float32) * (
    np.random.default_rng(1).random((40, 30)) < 0.6
)


def network(neurons=12, seed=0, settings=SHORT):
    found = SpikingNetwork.untrained(30, neurons, seed, settings)
    found.weight *= 10  # so that few inputs make spikes
    return found


def oracle(net, image, random, s, learn=True):
    """The network's definition, neuron by neuron, in float64 but for the weights: spikes, and the weights and thresholds after learning."""
    starts, inputs, ties = net._input_spikes(image, random)
    w, theta, (n, m) = net.weight.copy(), net.theta * np.exp(-s.steps / s.theta_tau), net.weight.shape
    v, ref, vi, refi = [s.rest] * m, [0] * m, [s.rest_i] * m, [0] * m
    pre, post, sent, heard, counts = np.zeros(n), np.zeros(m), [0] * m, [0] * m, [0] * m
    for t in range(s.steps):
        pre *= np.exp(-1 / s.trace)
        current = [-s.inhibition * (sum(heard) - heard[j]) for j in range(m)]
        for i in inputs[starts[t] : starts[t + 1]]:
            current = [current[j] + float(w[i, j]) for j in range(m)]
            pre[i] = 1
            w[i] = np.maximum(w[i] - s.depression * post, 0)
        post *= np.exp(-1 / s.trace)
        crossed = []
        for j in range(m):
            v[j] = np.exp(-1 / s.tau) * (v[j] - s.rest) + s.rest
            v[j], ref[j] = (v[j] + current[j], 0) if ref[j] <= 0 else (v[j], ref[j] - 1)
            if v[j] >= s.threshold + theta[j]:
                crossed.append(j)
                v[j], ref[j], theta[j] = s.reset, s.refractory, theta[j] + s.theta_step
        for j in range(m):
            vi[j] = np.exp(-1 / s.tau_i) * (vi[j] - s.rest_i) + s.rest_i
            vi[j], refi[j] = (vi[j] + s.excitation * sent[j], 0) if refi[j] <= 0 else (vi[j], refi[j] - 1)
            heard[j] = int(vi[j] >= s.threshold_i)
            if heard[j]:
                vi[j], refi[j] = s.reset_i, s.refractory_i
        sent = [0] * m
        if crossed:
            winner = crossed[int(ties[t] * len(crossed))]
            sent[winner], post[winner] = 1, 1
            counts[winner] += 1
            seen = pre > 0
            w[seen, winner] = np.minimum(w[seen, winner] + s.potentiation * pre[seen], 1)
    return counts, w * (s.weight_sum / w.sum(0, dtype=float)), theta


def test_learning_is_the_definition():
    net, settings = network(), SHORT._replace(weight_sum=60.0, depression=1e-3)
    net.settings = settings
    for index in range(4):
        counts, weight, theta = oracle(net, IMAGES[index], np.random.default_rng(index), settings)
        assert net.learn(IMAGES[index], np.random.default_rng(index)).tolist() == counts and sum(counts) > 3
        np.testing.assert_allclose(net.weight, weight, rtol=1e-5)
        np.testing.assert_allclose(net.theta, theta, rtol=1e-12)
        net.weight = weight.astype(np.float32)


def test_plain_inference_equals_the_compiled_and_changes_nothing(tmp_path):
    net = network()
    Training(net, 40).run(IMAGES)
    before = net.weight.copy(), net.theta.copy()
    counts = net.respond(IMAGES, 3)
    assert (
        (counts == net.respond(IMAGES, 3, compiled=False)).all()
        and counts.sum() > 100
        and (counts > 0).any(0).sum() > 3
    )
    assert all((one == other).all() for one, other in zip(before, (net.weight, net.theta), strict=True))
    assert (counts != net.respond(IMAGES, 4)).any()


def test_operations_are_spikes_times_fan_out():
    net = network()
    _, inputs, _ = net._input_spikes(IMAGES[0], np.random.default_rng(0))
    spikes = net.learn(IMAGES[0], np.random.default_rng(0)).sum()
    # every spike of a neuron makes its inhibitory one spike in the next step, which all others feel in the one after
    assert net.operations.synaptic - len(inputs) * 12 - spikes in (spikes * 11, (spikes - 1) * 11)
    assert net.operations.updates == len(inputs) * 12 + spikes * 30 + 30 * 12
    half = net.kept(np.arange(6))
    half.respond(IMAGES)
    net.operations = Operations()
    net.respond(IMAGES)
    assert half.operations.updates == 0 and net.operations.images == 40
    assert net.operations.synaptic >= 1.9 * half.operations.synaptic


def trained_on(counts, pruning, total=100):
    """What a training does at the times when pruning looks, for neurons that always have the same counts."""
    training = Training(network(len(counts)), total)
    names = np.arange(len(counts))
    left = []
    for shown in range(pruning.interval, total + 1, pruning.interval):
        training.shown, training.recent = shown, np.asarray(counts, float)[names]
        training.network.theta = names.astype(float)
        training._prune(pruning)
        names = training.network.theta.astype(int)
        left.append(names.tolist())
    return left


def test_strategies():
    counts = [9, 0, 8, 1, 7, 2]
    number = trained_on(counts, Pruning("constant number", 3, start=0.4, end=0.8, interval=20))
    assert number == [[0, 1, 2, 3, 4, 5]] * 2 + [[0, 2, 4, 5], [0, 2, 4], [0, 2, 4]]
    constant = trained_on(counts, Pruning("constant threshold", 1, start=0.4, interval=20))
    assert constant == [[0, 1, 2, 3, 4, 5]] * 2 + [[0, 2, 4]] * 2 + [
        [0]
    ]  # below 0.5 x 4.5; what is left too many goes at the end
    adaptive = trained_on([9, 0, 8, 1, 7, 3], Pruning("adaptive threshold", 1, start=0.2, interval=20))
    assert adaptive == [
        [0, 1, 2, 3, 4, 5],
        [0, 2, 4, 5],
        [0, 2, 4],
        [0, 2, 4],
        [0],
    ]  # below half of 28 / 6, then of 27 / 4
    assert fewest(np.array([2, 1, 1, 5]), 1).tolist() == [0, 2, 3]


def test_pruned_neurons_leave_the_matrix_and_thresholds_may_be_slowed():
    training = Training(network(), 40)
    found = training.run(IMAGES, Pruning("adaptive threshold", 5, interval=4, slow=1.0))
    assert found.weight.shape == (30, 5) and found.weight.flags.c_contiguous and found.theta.shape == (5,)
    assert sum(training.pruned.values()) == 7 and min(training.pruned) > 16
    assert found.settings.theta_step == pytest.approx(SHORT.theta_step * 5 / 12)
    assert found.operations.images == 40
    with pytest.raises(SlrpropError, match="target must be at most the network's 12 neurons, got 13"):
        Training(network(), 40).run(IMAGES, Pruning("adaptive threshold", 13))
    with pytest.raises(SlrpropError, match="interval must be"):
        Pruning("adaptive threshold", 5, interval=0)
    for bad in (IMAGES[0][:20], np.zeros(40, np.float32), IMAGES[0] * 255, IMAGES[0] * np.nan):
        for compiled in (True, False):
            with pytest.raises(SlrpropError, match=r"an image of this network has 30 values in \[0, 1\], got shape"):
                network().respond(bad[None], compiled=compiled)
    with pytest.raises(
        SlrpropError, match="strategy must be one of constant number, constant threshold, adaptive threshold"
    ):
        Pruning("adaptive", 5)


def test_a_training_goes_on_from_a_file(tmp_path):
    pruning = Pruning("adaptive threshold", 6, start=0.5, interval=5)
    whole = Training(network(), 40, seed=7).run(IMAGES, pruning)
    Training(network(), 40, seed=7).run(IMAGES, until=20).save(tmp_path / "half.safetensors")
    half = SpikingNetwork.load(tmp_path / "half.safetensors")
    assert half.settings == SHORT and half.operations.images == 20
    rest = Training(half, 40, seed=7, shown=20).run(IMAGES, pruning)
    assert (
        (whole.weight == rest.weight).all()
        and (whole.theta == rest.theta).all()
        and whole.operations == rest.operations
    )


def test_labels_and_files(tmp_path):
    net = network(3)
    with pytest.raises(SlrpropError, match="call label first"):
        net.classify(np.ones((1, 3)))
    net.label(np.array([[4, 0, 1], [2, 0, 1], [0, 3, 3]]), np.array([0, 0, 1]), classes=2)
    np.testing.assert_allclose(net.proportions, [[1, 0, 0.25], [0, 1, 0.75]])
    # class 1 has two neurons: (1 x 1 + 0.75 x 2) / 2 beats 1 x 1; 0.75 / 2 does not
    assert net.classify(np.array([[1, 1, 2], [1, 0, 1]])).tolist() == [1, 0]
    net.save(tmp_path / "net.safetensors")
    again = SpikingNetwork.load(tmp_path / "net.safetensors")
    assert (again.proportions == net.proportions).all() and again.bytes == net.bytes == 4 * 90 + 8 * 3 + 4 * 6
    save_file({"weight": net.weight}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for name, text in (
        ("other", "holds no spiking network"),
        ("broken", "can't be read as"),
        ("missing", "can't be read as"),
    ):
        with pytest.raises(SlrpropError, match=text):
            SpikingNetwork.load(tmp_path / f"{name}.safetensors")


@pytest.fixture
def small(digits, monkeypatch):
    x, y = digits
    x = torch.nn.functional.interpolate(x.view(-1, 1, 8, 8), 28)[:500]
    x = torch.nn.functional.pad(x, (2, 2, 2, 2))
    monkeypatch.setattr(study, "IMAGES", {100: 300, 400: 300, 800: 300})
    some = (study.UNPRUNED, study.STOPPED, study.STRATEGIES[-1], study.AFTER, study.SCRATCH)
    cells = [study._named(100, 0, method, 50, 40) for method in some]
    monkeypatch.setattr(
        study, "cells", lambda seeds, methods: [cell for cell in cells if not methods or cell[2] in methods]
    )
    return Dataset(x[:300], y[:300], x[400:], y[400:500])


def test_a_killed_study_goes_on_and_writes_its_page(small, tmp_path, monkeypatch):
    store, real = Store(tmp_path / "results.sqlite", study.ROW, study.KEYS), study._timed
    timed = []

    def stops(*args):
        if len(timed) == 3:
            raise KeyboardInterrupt
        timed.append(args)
        return real(*args, rounds=1)

    monkeypatch.setattr(study, "_timed", stops)
    with pytest.raises(KeyboardInterrupt):
        study.run(small, tmp_path, 1, store)
    assert len(store.results()) == 3
    monkeypatch.setattr(study, "_timed", lambda *args: real(*args, rounds=1))
    assert study.run(small, tmp_path, 1, store) == 2
    rows = {row.strategy: row for row in store.results()}
    assert rows["unpruned"].left == rows["unpruned, stopped"].left == 100 and rows["adaptive threshold"].left == 50
    assert rows["unpruned"].bytes >= 1.9 * rows["adaptive threshold"].bytes
    assert rows["unpruned"].synaptic > 1.8 * rows["adaptive threshold"].synaptic and rows["unpruned"].accuracy > 30
    command = ["paper", "table", "spiking-mnist", "--run-dir", str(tmp_path), "--output", str(tmp_path / "docs")]
    assert "Half of 100 neurons" in CliRunner().invoke(cli.app, command, catch_exceptions=False).stdout
    for name in ("spiking-mnist.md", "spiking-mnist.csv", "spiking-mnist.svg", "spiking-mnist-fields.png"):
        assert (tmp_path / "docs" / name).stat().st_size > 500


def test_the_sweep_has_every_cell_once():
    cells = study.cells(5)
    assert len(cells) == len(set(cells))
    assert {cell[:3] for cell in cells[:8]} == {(100, 0, method) for method in (study.UNPRUNED, *study.METHODS)}
    assert {
        (100, seed, "adaptive threshold", percent, 40) for seed in range(5) for percent in range(10, 80, 10)
    } <= set(cells)
    assert {
        (100, 4, "constant number", 50, 20),
        (100, 4, "constant number", 50, 60),
        (400, 0, "from scratch", 50, 0),
    } <= set(cells)
    with pytest.raises(SlrpropError, match="method must be one of unpruned"):
        study.cells(1, ["S3"])


def test_no_rows_and_no_extra(tmp_path, monkeypatch):
    runner = CliRunner()
    none = runner.invoke(cli.app, ["paper", "table", "spiking-mnist", "--run-dir", str(tmp_path)])
    assert "compute them with: slrprop paper run spiking-mnist" in str(none.exception)
    monkeypatch.delitem(sys.modules, "slrprop.research.spiking_loop", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(
        SlrpropError, match=r"needs the package 'numba'; install it with: pip install 'slrprop\[research\]'"
    ):
        network().respond(IMAGES)
    assert network().respond(IMAGES[:2], compiled=False).shape == (2, 12)
