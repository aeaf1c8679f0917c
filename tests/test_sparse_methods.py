"""The methods that keep single weights, against their definitions."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from onnx import TensorProto
from sklearn.linear_model import Lasso, MultiTaskLasso

import slrprop
from slrprop import SlrpropError
from slrprop.data import Data
from slrprop.fit import sparsity
from slrprop.fit.quantize import quantised
from slrprop.fit.sparsity import SupportedSquares, damped, largest, largest_per_output, least_squares, squared_error
from slrprop.forms import Quantized
from slrprop.linalg import reduced_rank, truncated_svd
from slrprop.methods import METHODS, group_lasso, lasso, low_rank_plus_sparse, magnitude, obd, obs, wanda
from slrprop.methods.base import Problem
from slrprop.network import TorchNetwork
from slrprop.tune import TuneSettings, distilled

SPARSE = ("magnitude", "wanda", "obd", "obs", "lasso", "group_lasso", "low_rank_plus_sparse")


def problem(m=14, n=9, seed=0, samples=60):
    """A weight, inputs of which two are dead and two are the same, their Hessian, and an outputs' metric."""
    generator = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(samples, m, generator=generator, dtype=torch.float64)
        @ torch.randn(m, m, generator=generator).double()
    )
    x[:, :2] = 0
    x[:, 3] = x[:, 4]
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    root = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return weight, x, damped(x.T @ x / samples), damped(root @ root.T)


@given(
    arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(-3, 3)),
    st.integers(0, 150),
    st.sampled_from((torch.float64, torch.float32, torch.bfloat16)),
)
def test_the_largest_are_the_first_of_the_sorted(scores, count, dtype):
    scores = torch.from_numpy(scores).to(dtype)
    first = scores.reshape(-1).argsort(descending=True, stable=True)[:count]
    assert largest(scores, count).reshape(-1).nonzero()[:, 0].tolist() == sorted(first.tolist())
    order = scores.argsort(dim=0, descending=True, stable=True)
    assert torch.equal(largest_per_output(scores, count), order.argsort(dim=0) < count)


def test_damping_makes_singular_covariances_invertible():
    _, x, hessian, _ = problem()
    covariance = x.T @ x / len(x)
    assert torch.linalg.matrix_rank(covariance) < 14 == torch.linalg.matrix_rank(hessian)
    torch.testing.assert_close(hessian - covariance, 1e-3 * covariance.diagonal().mean() * torch.eye(14).double())
    torch.testing.assert_close(damped(5 * covariance), 5 * hessian)
    assert torch.equal(damped(torch.zeros(3, 3)), torch.eye(3).double())


def test_least_squares_on_a_support_is_that_on_the_samples():
    weight, x, _, _ = problem()
    hessian, support = x.T @ x / len(x), torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    support[[0, 1, 3]] = False  # what the samples do not determine
    got = least_squares(hessian, weight, support)
    for j in range(weight.shape[1]):
        index = support[:, j].nonzero()[:, 0]
        want = torch.linalg.lstsq(x[:, index], x @ weight[:, j]).solution
        torch.testing.assert_close(got[index, j], want)
    assert not got[~support].any()


def test_coupled_least_squares_is_the_optimum_of_the_whole():
    weight, _, hessian, metric = problem()
    support = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    got = least_squares(hessian, weight, support, metric, iterations=500)
    big, where = torch.kron(hessian, metric), support.reshape(-1).nonzero()[:, 0]
    want = torch.linalg.solve(big[where][:, where], big[where] @ weight.reshape(-1))
    torch.testing.assert_close(got[support], want, rtol=1e-5, atol=1e-7)
    errors = [
        squared_error(weight, least_squares(hessian, weight, support, metric, s), hessian, metric) for s in (1, 3, 9)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_outputs_are_solved_on_one_thread_and_the_others_come_back():
    def threads():
        return [pool["num_threads"] for pool in sparsity.POOLS.info() if pool["user_api"] == "blas"]

    weight, _, hessian, _ = problem()
    before = threads()
    inside = [threads() for _ in SupportedSquares(hessian, weight > 0)._outputs()]
    assert before and all(set(found) == {1} for found in inside) and threads() == before


def test_thin_and_large_supports_are_treated_alike(monkeypatch):
    weight, _, hessian, metric = problem()
    support = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    want = least_squares(hessian, weight, support, metric), SupportedSquares(hessian, support).removal_costs(weight)
    for name, value in {"THIN": 1, "SMALL": 0, "CHUNK": 3, "bound": lambda: 0}.items():
        monkeypatch.setattr(sparsity, name, value)
    torch.testing.assert_close(least_squares(hessian, weight, support, metric), want[0])
    torch.testing.assert_close(SupportedSquares(hessian, support).removal_costs(weight), want[1])


def test_removal_costs_are_the_errors_of_removal():
    """OBS: what is said of one weight's removal is what least squares without it costs, and the update is the published one."""
    weight, _, hessian, _ = problem(m=8, n=2)
    inverse = torch.linalg.inv(hessian)
    costs = obs.saliency(weight, hessian)
    full = torch.ones_like(weight, dtype=torch.bool)
    torch.testing.assert_close(SupportedSquares(hessian, full).removal_costs(weight), costs)
    for q in range(8):
        support = full.clone()
        support[q, 0] = False
        got = least_squares(hessian, weight, support)
        torch.testing.assert_close(squared_error(weight, got, hessian) / 2, float(costs[q, 0]))
        update = -weight[q, 0] / inverse[q, q] * inverse[:, q]
        torch.testing.assert_close(got[:, 0], weight[:, 0] + update, rtol=1e-6, atol=1e-8)
    least = int(costs.argmin())
    found, support = obs.one_shot(weight, hessian, weight.numel() - 1)
    assert not support.reshape(-1)[least] and support.sum() == weight.numel() - 1
    torch.testing.assert_close(found, least_squares(hessian, weight, support))


@pytest.mark.parametrize("block", [1, 5, 128])
def test_sparsegpt_keeps_everything_or_the_asked_share(block):
    weight, _, hessian, _ = problem()
    torch.testing.assert_close(obs.sparsegpt(weight, hessian, 1.0, block)[0], weight)
    for density in (0.1, 0.35, 0.8):
        found, support = obs.sparsegpt(weight, hessian, density, block)
        assert int(support.sum()) == round(weight.numel() * density) and not found[~support].any()
        assert squared_error(weight, found, hessian) < squared_error(weight, weight * support, hessian)


def test_sparsegpt_with_one_input_left_out_is_obs():
    """The removed input's own errors spread over the later ones as exact least squares on those would."""
    weight, _, hessian, _ = problem(m=6, n=1)
    weight[0] = 1e-9  # removed first, by far the cheapest
    weight[1:] += 3
    found, support = obs.sparsegpt(weight, hessian, 5 / 6, 128)
    assert support[:, 0].tolist() == [False] + 5 * [True]
    torch.testing.assert_close(found, least_squares(hessian, weight, support), rtol=1e-6, atol=1e-12)


def test_wanda_without_differences_of_the_inputs_is_magnitude_per_output():
    weight = problem()[0]
    assert torch.equal(wanda.support(weight, torch.ones(14), 5), largest_per_output(weight.abs(), 5))
    norms = torch.arange(1.0, 15)
    by_hand = torch.stack([largest(weight[:, j].abs() * norms, 5) for j in range(9)], 1)
    assert torch.equal(wanda.support(weight, norms, 5), by_hand)


def test_obd_is_half_the_weight_squared_times_the_diagonal():
    weight, _, hessian, metric = problem()
    big = torch.kron(hessian, metric).diagonal().reshape(weight.shape)
    torch.testing.assert_close(obd.saliency(weight, hessian, metric), big * weight**2 / 2)


def test_magnitude_keeps_the_largest():
    weight = problem()[0]
    kept = magnitude.pruned(weight, 20)
    assert kept.numbers == 20 and kept.entries.abs().min() >= weight[~kept.support()].abs().max()


def test_lasso_is_scikit_learns():
    weight, _, hessian, _ = problem()
    root = torch.linalg.cholesky(hessian, upper=True) * 14**0.5
    want = (
        Lasso(0.3, fit_intercept=False, tol=1e-10, max_iter=100_000).fit(root.numpy(), (root @ weight).numpy()).coef_.T
    )
    found, support = lasso.lasso(weight, hessian, int((want != 0).sum()))
    assert np.array_equal(support.numpy(), want != 0) and not found[~support].any()
    for count in (0, 1, 7, 40, weight.numel()):
        found, support = lasso.lasso(weight, hessian, count)
        assert int(support.sum()) == count and not found[~support].any()


def test_group_lasso_is_scikit_learns():
    weight, _, hessian, _ = problem()
    root = torch.linalg.cholesky(hessian, upper=True) * 14**0.5
    price = 0.5
    model = MultiTaskLasso(price * 9**0.5, fit_intercept=False, tol=1e-10, max_iter=100_000)
    want = model.fit(root.numpy(), (root @ weight).numpy()).coef_.T
    got = group_lasso.group_lasso(weight, hessian, price, group_lasso.step_size(hessian), steps=20_000)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-4)
    assert 0 < int((got != 0).any(1).sum()) < 14
    for count in (1, 5, 14):
        found, kept = group_lasso.kept_inputs(weight, hessian, count)
        assert int(kept.sum()) == count and not found[~kept].any()


def test_the_proximal_step():
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    torch.testing.assert_close(group_lasso.shrunk(rows, 1 / 2**0.5), torch.tensor([[2.4, 3.2], [0.0, 0.0]]))


@pytest.mark.parametrize("variant", ["hassle", "grebdec", "oats"])
def test_low_rank_plus_sparse_has_both_limits(variant):
    weight, _, hessian, metric = problem()
    norms = torch.arange(1.0, 15, dtype=torch.float64)

    def made(rank, count):
        if variant == "oats":
            left, right, sparse, _ = low_rank_plus_sparse.oats(weight, norms, rank, count)
        else:
            left, right, sparse, _ = getattr(low_rank_plus_sparse, variant)(weight, hessian, metric, rank, count)
        return left @ right + sparse

    left, right = reduced_rank(weight, hessian, torch.linalg.cholesky(metric), 3)
    if variant == "oats":
        svd = truncated_svd(weight * norms[:, None], 3)
        left, right = svd.left / norms[:, None], svd.vt
    torch.testing.assert_close(made(3, 0), left @ right)
    only = {
        "hassle": lambda: obs.gradual(weight, hessian, 30, metric)[0],
        "grebdec": lambda: weight * largest(obd.saliency(weight, hessian, metric), 30),
        "oats": lambda: weight * wanda.support(weight, norms, 4),
    }[variant]()
    torch.testing.assert_close(made(0, 4 if variant == "oats" else 30), only)


def tasks(trained, calibration, metric=True):
    network = TorchNetwork(trained, Data(calibration))
    regression = Problem(network, Data(calibration)).calibration.regression("2", {}, metric)
    return replace(regression, samples=lambda: (_ for _ in ()).throw(AssertionError("samples are not needed")))


VARIANTS = [("obs", {"variant": variant}) for variant in obs.VARIANTS] + [
    *(("low_rank_plus_sparse", {"variant": variant}) for variant in low_rank_plus_sparse.VARIANTS),
    *((name, {}) for name in ("wanda", "obd", "lasso", "group_lasso")),
    ("lasso", {"refit": False}),
    ("group_lasso", {"refit": False}),
    ("obs", {"sensitivity": False}),
]


@pytest.mark.parametrize(("name", "extra"), VARIANTS)
def test_denser_is_nearer_and_sizes_are_exact(name, extra, trained, calibration):
    method = METHODS[name]
    task = tasks(trained, calibration, method.settings(**extra).weighted)
    metric = task.metric if name not in ("wanda", "lasso", "group_lasso") else None
    errors = []
    for density in (0.02, 0.1, 0.3, 0.6):
        chosen = method.settings(**extra, density=density)
        form = method.fit(task, chosen)
        assert form.numbers == chosen.stored_numbers(96, 80)
        errors.append(squared_error(task.weight, form.dense(), task.covariance, metric))
    assert errors[0] > errors[1] > errors[2] > errors[3] >= 0


def test_making_up_for_what_is_removed_pays(trained, calibration):
    """On real data, at one density: gradual OBS < one shot < SparseGPT < OBD, and LASSO refitted between."""
    task = tasks(trained, calibration)

    def error(name, **extra):
        form = METHODS[name].fit(task, METHODS[name].settings(density=0.1, **extra))
        return squared_error(task.weight, form.dense(), damped(task.covariance), task.metric)

    gradual, one_shot, sparsegpt = (error("obs", variant=variant) for variant in obs.VARIANTS)
    assert gradual < one_shot < sparsegpt < error("obd")
    assert gradual < error("lasso") < error("lasso", refit=False)


@pytest.mark.parametrize("name", ["obs", "low_rank_plus_sparse"])
def test_rounding_makes_up_for_its_errors(name, trained, calibration):
    task = tasks(trained, calibration)
    form = METHODS[name].fit(task, METHODS[name].settings(density=0.1))
    error = [
        squared_error(task.weight, made.dense().double(), task.covariance, task.metric)
        for made in (form, quantised(form, 8, task), quantised(form, 4, task), quantised(form, 4))
    ]
    assert error[1] < 1.02 * error[0] and error[2] < 0.8 * error[3]
    assert isinstance(quantised(form, 4, task), Quantized)


@pytest.mark.parametrize("name", SPARSE)
def test_ladders_go_up(name):
    method = METHODS[name]
    for m, n in ((400, 120), (96, 80), (4000, 4000), (10, 16)):
        sizes = [method.settings(**step).stored_numbers(m, n) for step in method.settings.ladder(m, n)]
        assert sizes == sorted(sizes) and sizes[-1] < m * n


@pytest.mark.parametrize("density", [0, -1, 1.5, "0.1", True, float("nan")])
def test_bad_densities(density):
    for name in SPARSE[:-1]:
        with pytest.raises(SlrpropError, match="density must be above 0 and at most 1"):
            METHODS[name].settings(density=density)


def test_a_file_of_a_whole_model_is_small(trained, digits, calibration, tmp_path):
    made = slrprop.plan(trained, calibration, method="obs", layers=["0", "2"], density=0.1)
    small = slrprop.apply(trained, made)
    assert slrprop.export_onnx(small, tmp_path / "small.onnx", digits[0][:5]) < 1e-4
    slrprop.export_onnx(trained, tmp_path / "model.onnx", digits[0][:5])
    before, after = ((tmp_path / f"{name}.onnx").stat().st_size for name in ("model", "small"))
    assert before - after > 4 * (64 * 96 + 96 * 80) - sum(layer.bytes for layer in made.layers[:2]) - 2 * 1600
    after, before = (slrprop.measure(model, (digits[0][1200:], digits[1][1200:])) for model in (small, trained))
    assert after.accuracy > before.accuracy - 2
    assert TensorProto.UINT8 in {tensor.data_type for tensor in onnx.load(tmp_path / "small.onnx").graph.initializer}


@pytest.mark.parametrize("method", ["obs", "low_rank_plus_sparse"])
@pytest.mark.parametrize("bits", [32, 4])
def test_sparse_plans_can_be_tuned(method, bits, trained, calibration):
    network = TorchNetwork(trained, Data(calibration))
    extra = {"rank": 2} if method == "low_rank_plus_sparse" else {}
    made = slrprop.plan(trained, calibration, method=method, layers=["0", "2"], density=0.05, bits=bits, **extra)
    better = distilled(network, Data(calibration), made, TuneSettings(epochs=2), quiet=True)
    assert [layer.bytes for layer in better.layers] == [layer.bytes for layer in made.layers]
    places = [
        (getattr(layer.factors, "codes", layer.factors)).indices()["gaps"]
        for layer in (*made.layers[:2], *better.layers[:2])
    ]
    assert torch.equal(places[0], places[2]) and torch.equal(places[1], places[3])
    slrprop.apply(trained, better)(calibration[0])
