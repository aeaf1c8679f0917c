import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slrprop import SlrpropError
from slrprop.checks import share
from slrprop.forms import Dense, Fit, LowRank, SparseLowRank, express, restored
from slrprop.linalg import SVD, truncated_svd
from slrprop.methods.slr import SLRSettings
from slrprop.network.torch.modules import layer_from
from slrprop.operators import MatMul
from tests.oracle import permuted_as_the_weight


@st.composite
def shortened(draw):
    """SLR factors of a random weight, and the article's cut of U and V to compare with."""
    m, n = draw(st.integers(2, 14)), draw(st.integers(2, 14))
    k = draw(st.integers(1, min(m, n)))
    rk = draw(st.integers(0, k - 1))
    rows = torch.tensor(draw(st.lists(st.booleans(), min_size=m, max_size=m)))
    columns = torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    svd = truncated_svd(torch.randn(m, n, generator=generator, dtype=torch.float64), k)
    u, vt = svd.left.clone(), svd.vt.clone()
    u[rows, rk:] = 0
    vt[rk:, columns] = 0
    return SparseLowRank.shorten(svd, rk, rows, columns), u, vt


@given(shortened())
@settings(deadline=None)
def test_shortened_factors_are_the_articles_cut(case):
    factors, u, vt = case
    torch.testing.assert_close(factors.dense(), u @ vt)
    assert factors.numbers == factors.multiplications == int((u != 0).sum() + (vt != 0).sum())


@given(shortened(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_permuted_factors_are_the_permuted_weight(case, random):
    factors, _, _ = case
    permuted_as_the_weight(factors, random)


def gradients(y, blocks):
    """Of the sum of squares; zeros where an output depends on no block, as where all neurons are cut."""
    if not y.requires_grad:
        return [torch.zeros_like(block) for block in blocks]
    return torch.autograd.grad(y.square().sum(), blocks, allow_unused=True, materialize_grads=True)


@given(shortened())
@settings(deadline=None)
def test_products_are_those_of_the_dense_weight(case):
    """And differentiable; what is padded has zeros where a neuron takes no part, and nowhere else."""
    factors, _, _ = case
    made = factors.with_matrices({name: block.requires_grad_() for name, block in factors.matrices().items()})
    x = torch.randn(2, 3, factors.shape[0], dtype=torch.float64)
    y = express(made, MatMul(), x)
    torch.testing.assert_close(y, x @ factors.dense())
    blocks = list(made.matrices().values())
    for mine, want in zip(gradients(y, blocks), gradients(x @ made.dense(), blocks), strict=True):
        torch.testing.assert_close(mine, want)
    left, right = factors.padded()
    torch.testing.assert_close(left @ right, factors.dense())
    assert int((left != 0).sum() + (right != 0).sum()) == factors.numbers
    assert torch.equal(factors.read(), factors.row_levels > 0)
    assert not factors.dense()[~factors.read()].any()


@given(shortened())
@settings(deadline=None)
def test_stored_blocks_come_back(case):
    factors, _, _ = case
    again = restored(factors.description(), factors.arrays())
    assert torch.equal(again.dense(), factors.dense()) and torch.equal(again.row_levels, factors.row_levels)
    assert torch.equal(again.column_levels, factors.column_levels) and again.bytes == factors.bytes


@pytest.mark.parametrize(
    "change",
    [{"row_levels": None}, {"left_0": None}, {"right_1": None}, {"left_1": None}, {"row_levels": torch.zeros(9).byte()},
     {"column_levels": torch.zeros(1)}, {"column_levels": torch.full((1,), 255).byte()}, {"left_0": torch.ones(8)}],
)  # fmt: skip
def test_damaged_blocks_are_refused(change):
    short = [torch.arange(side) < side // 2 for side in (8, 6)]
    factors = SparseLowRank.shorten(truncated_svd(torch.randn(8, 6), 4), 2, *short)
    arrays = {key: value for key, value in (factors.arrays() | change).items() if value is not None}
    with pytest.raises(SlrpropError):
        restored(factors.description(), arrays)
    for description in (
        {"shape": [8]},
        {"lowest": [-1, 0]},
        {"shape": [8, "6"]},
        {"lowest": [0, 0]},
        {"shape": None},
    ):
        with pytest.raises(SlrpropError):
            restored(factors.description() | description, factors.arrays())


@given(shortened(), st.booleans(), st.sampled_from([(), (3,), (2, 3)]), st.booleans())
@settings(deadline=None)
def test_layers_compute_with_the_factors(case, has_bias, batch, ordered):
    factors, _, _ = case
    if ordered:
        factors = factors.permuted(factors.row_levels.argsort(), factors.column_levels.argsort(descending=True))
    bias = torch.arange(factors.shape[1], dtype=torch.float64) if has_bias else None
    layer = layer_from(Fit(factors).over(bias))
    x = torch.randn(*batch, factors.shape[0], dtype=torch.float64)
    want = x @ factors.dense() + (0 if bias is None else bias)
    torch.testing.assert_close(layer(x), want)
    assert torch.equal(layer.factors().dense(), factors.dense())
    torch.testing.assert_close(layer.weight.T, factors.dense())
    assert sum(p.numel() for p in layer.parameters()) == factors.numbers + (factors.shape[1] if has_bias else 0)
    if ordered:
        assert layer.factors().sets.order is None


@pytest.mark.parametrize(
    ("m", "n", "k", "want"),
    [
        (512, 4096, 2, 6914),
        (512, 4096, 16, 55312),
        (4096, 4096, 16, 98320),
        (400, 120, 8, 3128),
        (120, 84, 32, 4928),
        (4000, 4000, 8, 48008),
    ],
)
def test_stored_numbers_of_the_article(m, n, k, want):
    """The article's formula counts the k singular values; here they are folded into the left factor."""
    assert SLRSettings(rank=k).stored_numbers(m, n) == want - k
    if m < 1000:
        svd = SVD(torch.randn(m, k), torch.ones(k), torch.randn(k, n))
        short = [torch.arange(side) < share(side, 0.5) for side in (m, n)]
        assert SparseLowRank.shorten(svd, k // 2, *short).numbers == want - k


def test_low_rank_and_dense_sizes():
    low = LowRank.from_svd(truncated_svd(torch.randn(7, 5), 3))
    assert (low.shape, low.numbers, low.bytes, low.multiplications) == ((7, 5), 36, 144, 36)
    dense = Dense(torch.randn(7, 5).double())
    assert (dense.numbers, dense.bytes) == (35, 280)
    order = torch.tensor([4, 2, 0, 1, 3])
    assert torch.equal(low.permuted(columns=order).dense(), low.dense()[:, order])


def test_bytes_count_the_levels():
    factors = SparseLowRank.shorten(truncated_svd(torch.randn(8, 6), 4), 2, torch.arange(8) < 4, torch.arange(6) < 3)
    assert factors.bytes == 4 * factors.numbers + 1 + 1  # a bit a neuron


def test_share_is_exact():
    assert share(100, 0.29) == 29 and share(10, 0.99) == 9 and share(7, 0.5) == 3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LowRank(torch.ones(4, 2), torch.ones(3, 5)), "right factor must have shape 2 x any, got"),
        (lambda: LowRank(torch.ones(4), torch.ones(3, 5)), "left factor must have shape"),
        (lambda: Dense(torch.ones(4)), "dense weight must have shape"),
        (lambda: SparseLowRank((), (), torch.ones(3).byte(), torch.ones(3).byte()), "at least one; got 0 and 0"),
        (
            lambda: SparseLowRank((torch.ones(3, 1),), (torch.ones(1, 3),), torch.ones(3), torch.ones(3).byte()),
            "row levels must be one uint8",
        ),
        (
            lambda: SparseLowRank(
                (torch.ones(3, 1),), (torch.ones(1, 3),), 2 * torch.ones(3).byte(), torch.ones(3).byte()
            ),
            "at most 1",
        ),
        (
            lambda: SparseLowRank((torch.ones(2, 1),), (torch.ones(1, 3),), torch.ones(3).byte(), torch.ones(3).byte()),
            "left block 0 must have shape 3 x any",
        ),
        (
            lambda: SparseLowRank((torch.ones(3, 2),), (torch.ones(1, 3),), torch.ones(3).byte(), torch.ones(3).byte()),
            "right block 0 must have shape 2 x 3",
        ),
    ],
)
def test_inconsistent_shapes_are_refused(build, message):
    with pytest.raises(SlrpropError, match=message):
        build()
