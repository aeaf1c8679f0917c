"""The ADMM against an interior-point solver on small problems, and what must hold of its results."""

import cvxpy
import numpy as np
import pytest
import torch

from slrprop import SlrpropError
from slrprop.fit.admm import Programme, singular_value_threshold, soft_threshold, solve

NORMS = {
    "net_trim": (soft_threshold, lambda w: float(w.abs().sum()), lambda w: cvxpy.sum(cvxpy.abs(w))),
    "ddlr": (singular_value_threshold, lambda w: float(torch.linalg.svdvals(w).sum()), cvxpy.normNuc),
}
METHODS = pytest.mark.parametrize("method", NORMS)


def layer(m=6, n=5, p=30, seed=0):
    """Samples, weight and bias of one layer, float64."""
    generator = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((p, m), (m, n), (n,)))
    return x, w, b


def programme(relu, gain, changed=False, **sizes):
    x, w, b = layer(**sizes)
    z = x @ w + b
    if not changed:
        return Programme.parallel(x, z, relu, gain)
    x = x + 0.1 * layer(**(sizes | {"seed": 1}))[0]
    return Programme.cascade(x, z, relu, gain, x @ w + b)


def optimum(problem, norm):
    """The least norm by cvxpy and Clarabel."""
    w, b = cvxpy.Variable((problem.x.shape[1], problem.y.shape[1])), cvxpy.Variable((1, problem.y.shape[1]))
    response = problem.x.numpy() @ w + np.ones((len(problem.x), 1)) @ b
    active = np.ones(problem.y.shape) if problem.active is None else problem.active.numpy().astype(float)
    ceiling = problem.ceiling.numpy() if isinstance(problem.ceiling, torch.Tensor) else problem.ceiling
    constraints = [
        cvxpy.norm(cvxpy.multiply(active, response - problem.y.numpy()), "fro") <= problem.eps,
        cvxpy.multiply(1 - active, response - ceiling) <= 0,
    ]
    return cvxpy.Problem(cvxpy.Minimize(norm(w)), constraints).solve(solver="CLARABEL")


@METHODS
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("changed", [False, True], ids=["V=0", "V=response"])
@pytest.mark.parametrize("gain", [0.02, 0.15, 0.5])
def test_same_optimum_as_an_interior_point_solver(method, relu, changed, gain):
    proximal, norm, convex = NORMS[method]
    problem = programme(relu, gain, changed)
    found = solve(problem, proximal, iterations=5000, tolerance=1e-6)
    assert found.converged and max(found.primal, found.dual) <= 1e-6
    assert max(found.violation) < 1e-4
    assert norm(found.weight) == pytest.approx(optimum(problem, convex), rel=1e-4)


@METHODS
@pytest.mark.parametrize("p", [3, 10])
def test_fewer_samples_than_inputs_and_dead_inputs(method, p):
    proximal, norm, convex = NORMS[method]
    x, w, b = layer(m=8, p=p)
    x[:, 2] = 0
    problem = Programme.parallel(x, x @ w + b, True, 0.1)
    found = solve(problem, proximal, iterations=5000, tolerance=1e-6)
    assert max(found.violation) < 1e-4
    assert norm(found.weight) == pytest.approx(optimum(problem, convex), rel=1e-4)
    assert found.weight[2].abs().max() < 1e-6  # a weight that nothing sees is nothing


@METHODS
@pytest.mark.parametrize("relu", [True, False])
def test_no_room_gives_the_layer_back(method, relu):
    x, w, b = layer(p=400)
    found = solve(Programme.parallel(x, x @ w + b, relu, 0.0), NORMS[method][0], iterations=20000, tolerance=1e-7)
    torch.testing.assert_close(found.weight, w, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.bias, b, rtol=0, atol=1e-4)


@METHODS
@pytest.mark.parametrize("relu", [True, False])
def test_room_for_everything_gives_zero(method, relu):
    found = solve(programme(relu, 1.0), NORMS[method][0])
    assert found.converged and not found.weight.any()
    assert max(found.violation) < 1e-4


@METHODS
@pytest.mark.parametrize("relu", [True, False])
def test_more_room_never_needs_a_larger_norm(method, relu):
    proximal, norm, _ = NORMS[method]
    norms = [
        norm(solve(programme(relu, gain), proximal, tolerance=1e-5).weight) for gain in (0.01, 0.05, 0.2, 0.4, 0.8)
    ]
    assert norms == sorted(norms, reverse=True)


@METHODS
def test_the_start_of_rho_does_not_matter(method):
    proximal, norm, _ = NORMS[method]
    norms = [norm(solve(programme(True, 0.2), proximal, rho, tolerance=1e-6).weight) for rho in (0.1, 1.0, 100.0)]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)


def test_results_are_exactly_sparse_and_exactly_of_low_rank():
    problem = programme(True, 0.3, m=20, n=16, p=80)
    assert 0 < (solve(problem, soft_threshold).weight == 0).sum() < 320
    s = torch.linalg.svdvals(solve(problem, singular_value_threshold).weight)
    assert ((s < 1e-12 * s[0]) | (s > 1e-4 * s[0])).all() and s[-1] < 1e-12 * s[0]


@METHODS
def test_the_limit_of_iterations_is_told(method):
    found = solve(programme(True, 0.1), NORMS[method][0], iterations=3)
    assert found.iterations == 3 and not found.converged and found.primal > 1e-4


def test_violation_is_what_the_constraints_say():
    x, w, b = layer()
    z = x @ w + b
    problem = Programme.parallel(x, z, True, 0.0)
    assert max(problem.violation(w, b)) < 1e-15
    worse = problem.violation(w, b + 1)
    y, active = z.relu(), z > 0
    assert worse.error == pytest.approx(float(active.sum().sqrt() / y.norm()))
    assert worse.ceiling == pytest.approx(float(((z + 1).relu() * ~active).norm() / y.norm()))


@pytest.mark.parametrize("transposed", [False, True])
def test_singular_value_threshold_is_the_proximal_step(transposed):
    w = layer(m=7, n=4)[1]
    w = w.T if transposed else w
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    torch.testing.assert_close(singular_value_threshold(w, 1.0), (u * (s - 1).clamp_min(0)) @ vt)
    assert not singular_value_threshold(w, float(s[0]) + 1).any()


@pytest.mark.parametrize(
    ("x", "y", "eps", "message"),
    [
        (torch.ones(3, 2), torch.ones(4, 2), 1.0, r"as many rows, got \(3, 2\) and \(4, 2\)"),
        (torch.ones(3, 2), torch.full((3, 2), torch.nan), 1.0, "NaN or infinite"),
        (torch.ones(3, 2), torch.ones(3, 2), -1.0, "at least 0, got -1.0"),
        (torch.ones(3, 2), torch.ones(3, 2), float("nan"), "at least 0, got nan"),
    ],
)
def test_bad_problems(x, y, eps, message):
    with pytest.raises(SlrpropError, match=message):
        Programme(x, y, eps)
