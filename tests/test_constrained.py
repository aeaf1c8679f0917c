"""Net-Trim and DDLR as methods: what the plan holds is the solution of each layer's programme."""

import copy

import pytest
import torch

import slrprop
from slrprop import SlrpropError
from slrprop.fit.admm import Programme, singular_value_threshold, soft_threshold, solve
from slrprop.methods.ddlr import numerical_rank

LAYERS = ["0", "2"]
PROXIMAL = {"net_trim": soft_threshold, "ddlr": singular_value_threshold}
METHODS = pytest.mark.parametrize("method", PROXIMAL)


def arrays(module):
    return module.weight.detach().T.double(), module.bias.detach().double()


@METHODS
def test_layers_are_their_programmes_solutions(method, trained, calibration):
    made = slrprop.plan(trained, calibration, method=method, layers=LAYERS, gain=0.3)
    x = calibration[0].double()
    for layer in made.layers:
        weight, bias = arrays(trained.get_submodule(layer.name))
        z = x @ weight + bias
        programme = Programme.parallel(x, z, True, 0.3)
        found = solve(programme, PROXIMAL[method])
        torch.testing.assert_close(layer.factors.dense().double(), found.weight, rtol=0, atol=2e-3)
        torch.testing.assert_close(layer.bias.double(), found.bias, rtol=0, atol=2e-3)
        assert max(programme.violation(layer.factors.dense().double(), layer.bias.double())) < 1e-3
        assert layer.notes["error_violation"] < 1e-3 and layer.notes["ceiling_violation"] < 1e-3
        assert layer.notes["converged"] == 1 and layer.notes["iterations"] > 1
        x = z.relu()


@METHODS
def test_cascade_is_held_to_the_error_the_original_weight_makes(method, trained, calibration):
    made = slrprop.plan(trained, calibration, method=method, layers=LAYERS, gain=0.3, sequential=True)
    first, second = made.layers
    x = calibration[0].double()
    weight, bias = arrays(trained[0])
    then = ((x @ weight + bias).relu() @ arrays(trained[2])[0]) + arrays(trained[2])[1]
    now = (x @ first.factors.dense().double() + first.bias.double()).relu()
    response = now @ arrays(trained[2])[0] + arrays(trained[2])[1]
    programme = Programme.cascade(now, then, True, 0.3, response)
    error = float(((response - then.relu()) * (then > 0)).norm())
    assert programme.eps == pytest.approx(1.1**0.5 * error)
    assert max(programme.violation(second.factors.dense().double(), second.bias.double())) < 1e-3
    found = solve(programme, PROXIMAL[method])
    torch.testing.assert_close(second.factors.dense().double(), found.weight, rtol=0, atol=5e-3)


@METHODS
def test_more_gain_stores_less(method, trained, calibration):
    sizes = []
    for gain in (0.2, 0.4, 0.7):
        made = slrprop.plan(trained, calibration, method=method, layers=LAYERS, gain=gain)
        sizes.append(made.numbers)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]


@METHODS
def test_a_linear_layer_is_held_everywhere(method, trained, calibration):
    made = slrprop.plan(trained, calibration, method=method, layers=["4"], gain=0.5)
    if not made.layers:  # ten outputs are few: low rank may not pay
        assert "would store" in made.left_dense["4"]
        return
    x = calibration[0].double()
    for name in LAYERS:
        weight, bias = arrays(trained.get_submodule(name))
        x = (x @ weight + bias).relu()
    weight, bias = arrays(trained[4])
    y = x @ weight + bias
    layer = made.layers[0]
    error = (x @ layer.factors.dense().double() + layer.bias.double() - y).norm() / y.norm()
    assert float(error) == pytest.approx(0.5, abs=1e-3)  # the bound is used up


@METHODS
def test_a_layer_without_bias_gets_one(method, trained, calibration):
    bare = copy.deepcopy(trained)
    bare[0].bias = None
    made = slrprop.plan(bare, calibration, method=method, layers=["0"], gain=0.4)
    small = slrprop.apply(bare, made)
    x = calibration[0]
    first = made.layers[0]
    torch.testing.assert_close(small(x), bare[1:](x @ first.factors.dense() + first.bias), rtol=1e-4, atol=1e-4)


@METHODS
def test_the_limit_of_iterations_is_noted(method, trained, calibration):
    made = slrprop.plan(trained, calibration, method=method, layers=["0"], gain=0.6, iterations=5)
    assert made.layers[0].notes["iterations"] == 5 and made.layers[0].notes["converged"] == 0
    assert "iterations 5, converged 0" in str(made)


@METHODS
def test_few_bits_keep_the_programmes_bias(method, trained, calibration):
    """The rounding error's mean goes into the bias, nothing else does."""
    whole, packed = (
        slrprop.plan(trained, calibration, method=method, layers=["0"], gain=0.3, bits=bits).layers[0]
        for bits in (32, 8)
    )
    shift = calibration[0].mean(0) @ (whole.factors.dense() - packed.factors.dense())
    torch.testing.assert_close(packed.bias, whole.bias + shift, rtol=0, atol=0.02 * float(whole.bias.abs().max()))


@METHODS
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_a_layer_may_vanish(method, bits, trained, calibration):
    """With room for everything only the bias is left."""
    made = slrprop.plan(trained, calibration, method=method, layers=["0"], gain=1.5, bits=bits)
    assert not made.layers[0].factors.dense().any()
    assert slrprop.apply(trained, made)(calibration[0]).std(0).max() < 1e-5


@pytest.mark.parametrize("bits", [32, 4])
def test_factors_never_hold_more_numbers_than_the_matrix(bits, trained, calibration):
    made = slrprop.plan(trained, calibration, method="ddlr", layers=["0"], gain=0.001, bits=bits)
    if bits == 32:
        assert made.left_dense["0"] == "ddlr would store 24,960 bytes instead of 24,960"
    else:
        assert made.layers[0].numbers == 64 * 96


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gain": 0}, "gain must be a number above 0, got 0"),
        ({"gain": "a lot"}, "gain must be a number above 0, got 'a lot'"),
        ({"gain": float("nan")}, "gain must be a number above 0, got nan"),
        ({"rho": -1.0}, r"rho must be a number above 0, got -1\.0"),
        ({"iterations": 0}, "iterations must be a whole number from 1, got 0"),
    ],
)
@METHODS
def test_bad_settings(method, given, message, trained, calibration):
    with pytest.raises(SlrpropError, match=message):
        slrprop.plan(trained, calibration, method=method, **given)


def test_numerical_rank():
    u, _ = torch.linalg.qr(torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert numerical_rank((u * torch.tensor([1.0, 1e-2, 1e-3, 1e-6])) @ u.T) == 3
    assert numerical_rank(torch.zeros(3, 4, dtype=torch.float64)) == 1
