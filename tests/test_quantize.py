"""Forms in few bits: packing, scales, rounding that compensates itself, and what is stored of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import slrprop
from slrprop import SlrpropError
from slrprop.data import Data
from slrprop.fit.calibration import Calibration
from slrprop.fit.quantize import bias_in_few_bits, compensating, quantised, rounded, scales_of
from slrprop.fit.regression import ROUNDING_DAMPING, Spread
from slrprop.forms import Bias, Dense, Fit, LowRank, Quantized, SparseLowRank, restored
from slrprop.forms.blocks import pack_levels, unpack_levels
from slrprop.forms.quantized import CODES, packed, unpacked
from slrprop.linalg import truncated_svd
from slrprop.network import TorchNetwork

BITS = [4, 8]


def random_matrix(m, n, seed=0):
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def forms(m=14, n=10, seed=0):
    """A weight's forms, by name."""
    svd = truncated_svd(random_matrix(m, n, seed), 6)
    short = [torch.arange(side) % 2 == 0 for side in (m, n)]
    return {
        "dense": Dense(random_matrix(m, n, seed)),
        "low_rank": LowRank.from_svd(svd),
        "sparse_low_rank": SparseLowRank.shorten(svd, 2, *short),
        "one_block": SparseLowRank.shorten(svd, 0, *short),
    }


@pytest.fixture(scope="module")
def tasks(trained, calibration):
    """Every layer's regression on the original inputs."""
    data = Data(calibration)
    calibration = Calibration(TorchNetwork(trained, data), data)
    return {name: calibration.regression(name, {}) for name in ("0", "2", "4")}


def error(task, weight, metric=False):
    """Weighted squared error relative to the weight's own."""
    wide = (lambda r: r) if not metric else (lambda r: r @ task.metric)
    rest = task.weight - weight.double()
    return float(
        (rest * (task.covariance @ wide(rest))).sum() / (task.weight * (task.covariance @ wide(task.weight))).sum()
    )


class TestPacking:
    @given(st.lists(st.integers(-8, 7), max_size=40), st.sampled_from(BITS))
    @hypothesis_settings(deadline=None)
    def test_numbers_come_back(self, numbers, bits):
        """Odd counts and none too."""
        codes = torch.tensor(numbers, dtype=torch.float32)
        stored = packed(codes, bits)
        assert stored.dtype == torch.uint8 and len(stored) == -(-len(numbers) * bits // 8)
        assert torch.equal(unpacked(stored, bits, (len(numbers),)), codes)

    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("shape", [(0, 3), (1, 1), (3, 5), (16, 16)])
    def test_whole_ranges_of_matrices_come_back(self, bits, shape):
        low, high = CODES[bits]
        codes = torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(0)).float()
        assert torch.equal(unpacked(packed(codes, bits), bits, shape), codes)

    def test_the_first_of_two_is_in_the_lower_half(self):
        assert packed(torch.tensor([1.0, -1.0, 7.0]), 4).tolist() == [0xF1, 0x07]

    @pytest.mark.parametrize("stored", [torch.zeros(2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int8), torch.zeros(3, 1, dtype=torch.uint8)])  # fmt: skip
    def test_arrays_of_another_size_or_kind(self, stored):
        with pytest.raises(SlrpropError, match="5 numbers of 4 bits take 3 bytes, got"):
            unpacked(stored, 4, (5,))

    @given(st.lists(st.integers(0, 6), max_size=40), st.integers(1, 9))
    @hypothesis_settings(deadline=None)
    def test_levels_come_back(self, numbers, blocks):
        levels = torch.tensor([min(number, blocks) for number in numbers], dtype=torch.uint8)
        lowest = min(levels.tolist(), default=0)
        stored = pack_levels(levels, blocks, lowest)
        assert torch.equal(unpack_levels(stored, len(numbers), lowest, blocks), levels)
        bits = (blocks - min(lowest, 1)).bit_length()  # as many as tell the levels apart
        assert stored.nbytes == -(-len(numbers) * bits // 8)

    def test_levels_that_do_not_fit(self):
        stored = pack_levels(torch.tensor([0, 1, 2, 1], dtype=torch.uint8), 2, 0)
        with pytest.raises(SlrpropError, match="the levels of 5 neurons take 2 bytes, got"):
            unpack_levels(stored, 5, 0, 2)
        with pytest.raises(SlrpropError, match="a neuron's level is 3, but there are 2 blocks"):
            unpack_levels(torch.tensor([0xFF], dtype=torch.uint8), 4, 0, 2)


class TestScales:
    @given(st.integers(1, 6), st.integers(1, 6), st.sampled_from(BITS), st.integers(0, 99), st.integers(0, 1))
    @hypothesis_settings(deadline=None, max_examples=50)
    def test_no_other_clip_is_better(self, m, n, bits, seed, axis):
        """And clipping nothing is among them, so the error is at most half a step of the whole range."""
        matrix = random_matrix(m, n, seed)
        low, high = CODES[bits]
        codes, scale = rounded(matrix, axis, bits)
        assert torch.equal(scale, scale.half().double()) and scale.shape == (matrix.shape[1 - axis],)
        assert torch.equal(codes, codes.round()) and low <= codes.min() and codes.max() <= high
        wide = scale.unsqueeze(axis)
        mine = (codes * wide - matrix).square().sum(axis)
        plain = (matrix.abs().amax(axis) / high).half().double().unsqueeze(axis)
        theirs = ((matrix / plain).round().clamp(low, high) * plain - matrix).square().sum(axis)
        assert (mine <= theirs * (1 + 1e-12)).all()

    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("bits", BITS)
    def test_whole_numbers_stay_what_they_are(self, axis, bits):
        """What is on the grid already is stored exactly."""
        low, high = CODES[bits]
        codes = torch.randint(low + 1, high + 1, (9, 7), generator=torch.Generator().manual_seed(0)).double()
        codes[0], codes[:, 0] = high, high
        matrix = codes * 2.0**-5
        found, scale = rounded(matrix, axis, bits)
        assert torch.equal(found * scale.unsqueeze(axis), matrix)

    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("factor", [1e-3, 1.0, 1e4])
    def test_size_does_not_matter_as_far_as_scales_reach(self, bits, factor):
        matrix = random_matrix(30, 20)
        relative = [
            float(((codes * scale - factor * matrix) / factor).square().sum() / matrix.square().sum())
            for codes, scale in [rounded(factor * matrix, 0, bits)]
        ]
        assert relative[0] < (5e-4 if bits == 8 else 2e-2)

    @pytest.mark.parametrize("value", [0.0, 1e-30])
    def test_nothing_is_zero(self, value):
        for bits in BITS:
            codes, scale = rounded(torch.full((5, 4), value, dtype=torch.float64), 0, bits)
            assert not codes.any() and torch.isfinite(scale).all() and (scale > 0).all()

    def test_vectors_have_one_scale(self):
        codes, scale = rounded(torch.tensor([0.5, -1.0, 0.25], dtype=torch.float64), 0, 8)
        assert scale.shape == (1,) and (codes * scale - torch.tensor([0.5, -1.0, 0.25])).abs().max() < 1e-2
        assert scales_of(torch.zeros(0, dtype=torch.float64), 0, 8).shape == (1,)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e8])
    @pytest.mark.parametrize("bits", BITS)
    def test_what_no_scale_can_hold_is_refused(self, bits, value):
        matrix = random_matrix(5, 4)
        matrix[2, 3] = value
        with pytest.raises(SlrpropError, match=r"can't be stored in [48] bits"):
            quantised(Dense(matrix), bits)


def slow_rounding(matrix, scale, bits, covariance):
    """Row after row by solving for what the rows left should be now: the least error given those rounded already."""
    low, high = CODES[bits]
    order = covariance.diagonal().argsort(descending=True)
    c = covariance + ROUNDING_DAMPING * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    codes, now = torch.zeros_like(matrix), matrix.clone()
    for place in range(len(order)):
        done, left = order[: place + 1], order[place + 1 :]
        row = order[place]
        codes[row] = (now[row] / scale[row]).round().clamp(low, high)
        if len(left):
            wrong = (codes * scale - matrix)[done]
            now[left] = matrix[left] - torch.linalg.solve(c[left][:, left], c[left][:, done] @ wrong)
    return codes


class TestCompensation:
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("shape", [(9, 5), (150, 3)])
    def test_rows_take_up_the_errors_of_those_before(self, bits, shape):
        """The recursion over the Cholesky factor is the sequence of least-squares problems it stands for."""
        m, n = shape
        x = random_matrix(3 * m, m, 1) @ random_matrix(m, m, 2)
        matrix, c = random_matrix(m, n), x.T @ x / len(x)
        scale = scales_of(matrix, 0, bits).expand_as(matrix)
        codes = compensating(matrix, scale, bits, Spread.of(c))
        assert torch.equal(codes, slow_rounding(matrix, scale, bits, c))

    def test_without_correlation_it_is_plain(self):
        matrix = random_matrix(12, 6)
        plain, scale = rounded(matrix, 0, 4)
        found, same = rounded(matrix, 0, 4, Spread.of(torch.diag(torch.rand(12, dtype=torch.float64) + 0.1)))
        assert torch.equal(plain, found) and torch.equal(scale, same)

    @pytest.mark.parametrize("bits", BITS)
    def test_dead_inputs_and_few_samples(self, bits):
        x = random_matrix(4, 12)
        x[:, 3:6] = 0
        matrix = random_matrix(12, 6, 1)
        codes, _ = rounded(matrix, 0, bits, Spread.of(x.T @ x))
        low, high = CODES[bits]
        assert torch.isfinite(codes).all() and low <= codes.min() and codes.max() <= high
        codes, _ = rounded(matrix, 0, bits, Spread.of(torch.zeros(12, 12, dtype=torch.float64)))
        assert torch.equal(codes, rounded(matrix, 0, bits)[0])

    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("name", ["0", "2", "4"])
    def test_real_layers_lose_less_by_it(self, bits, name, tasks):
        task, gained = tasks[name], []
        low = LowRank(*task.low_rank(6))
        for form in (Dense(task.weight), low):
            wanted = form.dense()
            plain, found = quantised(form, bits), quantised(form, bits, task)
            rest = [weight.dense().double() - wanted for weight in (plain, found)]
            if form is not low:
                gained.append(error(task, found.dense()) / error(task, plain.dense()))
            else:  # its right factor is fitted to the weight again
                gained.append(error(task, found.dense()) / error(task, plain.dense()))
            assert all(torch.isfinite(part).all() for part in rest)
        assert max(gained) <= 1.02 and float(np.mean(gained)) < 0.95

    @pytest.mark.parametrize("bits", BITS)
    def test_nested_blocks_lose_less_by_it(self, bits, trained, calibration, tasks):
        made = slrprop.plan(trained, calibration, method="nested", layers=["2"], rank=12, sequential=False)
        form, task = made.layers[0].factors, tasks["2"]
        double = form.with_matrices({name: matrix.double() for name, matrix in form.matrices().items()})
        plain, found = (error(task, quantised(double, bits, given).dense(), True) for given in (None, task))
        assert found < plain

    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("size", [1.0, 1e-4, 1e-9, 1e-20])
    def test_components_that_hold_nothing_yet_are_used(self, size, bits, tasks):
        """One of vanishing size takes up what rounding the others left; its right factor needs no huge numbers for that."""
        task = tasks["2"]
        left, right = task.low_rank(4)
        more, across = (random_matrix(*shape) for shape in ((96, 2), (2, 80)))
        form = LowRank(torch.cat([left, size * more], 1), torch.cat([right, size * across]))
        found, without = quantised(form, bits, task), quantised(LowRank(left, right), bits, task)
        assert max(matrix.abs().max() for matrix in found.plain().matrices().values()) < 1e3
        assert error(task, found.dense()) < error(task, without.dense())

    @pytest.mark.parametrize("rank", [64, 96, 128])
    def test_ranks_above_what_there_is(self, rank, trained, calibration):
        """The last block of a nested form has nothing to hold but rounding errors."""
        for bits in BITS:
            made = slrprop.plan(trained, calibration, method="nested", layers=["0"], rank=rank, shape="three-wide", bits=bits, sweeps=2)  # fmt: skip
            for layer in made.layers[:1]:
                plain = layer.factors.plain() if layer.method == "nested" else layer.factors
                assert max(matrix.abs().max() for matrix in plain.matrices().values()) < 1e3

    @pytest.mark.parametrize("form", forms())
    def test_eight_bits_come_closer_than_four(self, form):
        wanted = forms()[form].dense()
        eight, four = ((quantised(forms()[form], bits).dense() - wanted).norm() for bits in (8, 4))
        assert eight < 0.1 * four and eight < 0.02 * wanted.norm()


class TestQuantized:
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("name", forms())
    def test_codes_are_whole_and_scales_are_half(self, name, bits):
        found = quantised(forms()[name], bits)
        low, high = CODES[bits]
        for codes in found.matrices().values():
            assert codes.dtype == torch.float32 and torch.equal(codes, codes.round())
            assert low <= codes.min() and codes.max() <= high
        assert {scale.dtype for scale in found.scales.values()} == {torch.float16}
        assert found.numbers <= forms()[name].numbers  # a block's components beyond its smaller side go
        stored = sum(-(-matrix.numel() * bits // 8) for matrix in found.matrices().values())
        stored += 2 * sum(len(scale) for scale in found.scales.values())
        assert found.bytes == stored + sum(array.nbytes for array in found.indices().values())

    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("name", forms())
    def test_what_is_stored_comes_back(self, name, bits):
        found = quantised(forms(15, 9)[name], bits)
        again = restored(found.description(), found.arrays())
        assert isinstance(again, Quantized) and torch.equal(again.dense(), found.dense())
        assert (again.bytes, again.numbers, again.description()) == (found.bytes, found.numbers, found.description())

    @given(st.randoms(use_true_random=False), st.sampled_from(sorted(forms())), st.sampled_from(BITS))
    @hypothesis_settings(deadline=None, max_examples=30)
    def test_permuted_forms_are_permuted_weights(self, random, name, bits):
        found = quantised(forms()[name], bits)
        rows, columns = list(range(14)), list(range(10))
        random.shuffle(rows)
        random.shuffle(columns)
        rows, columns = torch.tensor(rows), torch.tensor(columns)
        moved = found.permuted(rows, columns)
        torch.testing.assert_close(moved.dense(), found.dense()[rows][:, columns], rtol=1e-5, atol=1e-6)
        assert moved.bytes == found.bytes
        back = moved.permuted(rows.argsort(), columns.argsort())
        assert all(torch.equal(back.arrays()[key], value) for key, value in found.arrays().items())

    def test_rounding_a_permuted_weight_is_permuting_the_rounded(self):
        rows, columns = torch.randperm(14), torch.randperm(10)
        first = quantised(Dense(forms()["dense"].weight[rows][:, columns]), 4)
        assert torch.equal(first.dense(), quantised(forms()["dense"], 4).permuted(rows, columns).dense())

    def test_biases_take_eight_bits(self):
        bias, plain = torch.linspace(-3, 1, 10), Fit(quantised(forms()["dense"], 4))
        found = replace(plain, bias=bias_in_few_bits(bias))
        assert found.bytes(4) == plain.bytes(4) + 10 + 2 and plain.over(bias).bytes(4) == plain.bytes(4) + 40
        value = found.bias.value
        assert value.dtype == torch.float32 and (value - bias).abs().max() <= 0.5 * 3 / 127 + 1e-3
        again, order = Bias.restored(found.arrays(), 10), torch.randperm(10)
        assert torch.equal(again.value, value) and torch.equal(again.taken(order).value, value[order])
        assert Bias.restored(plain.arrays(), 10) is None
        assert torch.equal(Bias.restored(plain.over(bias).arrays(), 10).value, bias)
        for arrays in (found.arrays(), plain.over(bias).arrays()):
            with pytest.raises(SlrpropError, match="the bias takes a number for each of 9 outputs"):
                Bias.restored(arrays, 9)

    @pytest.mark.parametrize("name", forms())
    def test_damaged_arrays_are_refused(self, name):
        found = quantised(forms()[name], 4)
        description, arrays = found.description(), found.arrays()
        for key, array in arrays.items():
            for other in (array[:-1], array.to(torch.float32), None, array.reshape(1, -1)):
                changed = {k: v for k, v in arrays.items() if k != key} | ({} if other is None else {key: other})
                with pytest.raises(SlrpropError):
                    restored(description, changed)

    @pytest.mark.parametrize(
        "change",
        [{"bits": 3}, {"bits": "4"}, {"shapes": {"weight": [-1, 2]}}, {"shapes": {"weight": [2, "2"]}},
         {"shapes": {}}, {"shapes": []}, {"of": {"kind": "none"}}, {"of": 3}, {"shapes": {"weight": [2**40, 2**40]}}],
    )  # fmt: skip
    def test_damaged_descriptions_are_refused(self, change):
        found = quantised(forms()["dense"], 4)
        with pytest.raises(SlrpropError):
            restored(found.description() | change, found.arrays())

    def test_bad_parts_are_refused(self):
        codes = Dense(torch.ones(3, 2))
        scale = torch.ones(2, dtype=torch.float16)
        with pytest.raises(SlrpropError, match="quantised factors take 4 or 8 bits a number, got 2"):
            Quantized(codes, {"weight": scale}, 2)
        for wrong in ({}, {"weight": scale.float()}, {"weight": scale[:1]}):
            with pytest.raises(SlrpropError, match=r"of shape \(2,\), got"):
                Quantized(codes, wrong, 8)

    @pytest.mark.parametrize("bits", BITS)
    def test_zero_weights(self, bits, tasks):
        zero = Dense(torch.zeros(64, 96, dtype=torch.float64))
        assert not quantised(zero, bits, tasks["0"]).dense().any()
        low = LowRank(torch.zeros(64, 3, dtype=torch.float64), torch.zeros(3, 96, dtype=torch.float64))
        found = quantised(low, bits, tasks["0"])
        assert torch.isfinite(found.dense()).all()
