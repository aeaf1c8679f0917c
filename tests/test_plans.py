"""Plans whose factors were fitted to data: two files that belong together, or one sentence."""

import dataclasses
import errno
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import slrprop
from slrprop import Plan, SlrpropError
from slrprop.plan import beside


def fitted(trained, calibration, **given):
    return slrprop.plan(trained, calibration, **({"method": "low_rank", "layers": ["0", "2"], "rank": 5} | given))


@pytest.fixture
def saved(trained, calibration, tmp_path):
    """The path of a saved plan."""
    fitted(trained, calibration).save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_factors_come_back_to_the_bit(trained, calibration, tmp_path):
    for bits in (32, 8, 4):
        plan = fitted(trained, calibration, method="nested", bits=bits)
        plan.save(tmp_path / "plan.json")
        for mine, theirs in zip(plan.layers, Plan.load(tmp_path / "plan.json").layers, strict=True):
            assert mine == theirs and mine.fit.arrays().keys() == theirs.fit.arrays().keys()
            assert all(torch.equal(value, theirs.fit.arrays()[key]) for key, value in mine.fit.arrays().items())


def test_the_same_plan_gives_the_same_files(trained, calibration, tmp_path):
    for name in ("a", "b"):
        fitted(trained, calibration, bits=4).save(tmp_path / f"{name}.json")
    for ending in ("json", "safetensors"):
        assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()


def test_plans_of_version_1_are_read(saved, trained, calibration):
    """Those named pairs of layers in the place of junctions; their checksum is theirs."""
    now = Plan.load(saved)
    old = json.loads(saved.read_text()) | {"version": 1}
    old["feeds"] = {junction["makers"][0]: next(iter(junction["readers"])) for junction in old.pop("junctions")}
    assert old["feeds"] == {"0": "2", "2": "4"}
    del old["sha256"]
    digest = hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()
    saved.write_text(json.dumps(old | {"sha256": digest}))
    x = calibration[0]
    assert Plan.load(saved) == now
    assert torch.equal(slrprop.apply(trained, Plan.load(saved))(x), slrprop.apply(trained, now)(x))
    old["layers"][0]["numbers"] += 1
    saved.write_text(json.dumps(old | {"sha256": digest}))
    with pytest.raises(SlrpropError, match="the plan is damaged: it differs from its checksum"):
        slrprop.apply(trained, Plan.load(saved))


def test_missing_factors(saved):
    beside(saved).unlink()
    with pytest.raises(SlrpropError, match=r"the factors of layer '0' can't be read from '.*plan.safetensors', which belongs beside the plan"):  # fmt: skip
        Plan.load(saved)


def test_a_folder_in_their_place(saved):
    beside(saved).unlink()
    beside(saved).mkdir()
    with pytest.raises(SlrpropError, match="can't be read from"):
        Plan.load(saved)


def test_factors_of_another_plan(saved, trained, calibration, tmp_path):
    fitted(trained, calibration, rank=6).save(tmp_path / "other.json")
    shutil.copy(tmp_path / "other.safetensors", beside(saved))
    with pytest.raises(SlrpropError, match=r"the factors of layer '0' in '.*' are not those of this plan; the file is damaged or another's"):  # fmt: skip
        Plan.load(saved)


def test_factors_of_the_same_settings_on_other_data(saved, trained, calibration, tmp_path):
    fitted(trained, (calibration[0][:100], None)).save(tmp_path / "other.json")
    shutil.copy(tmp_path / "other.safetensors", beside(saved))
    with pytest.raises(SlrpropError, match="are not those of this plan"):
        Plan.load(saved)


def test_damaged_factors_give_one_sentence(saved):
    """Every part of the file: cut off, a bit flipped, empty."""
    raw = beside(saved).read_bytes()
    damaged = [b"", raw[:7], raw[: len(raw) // 2], raw[:-1], raw + b"x"]
    damaged += [bytes([*raw[:at], raw[at] ^ 1, *raw[at + 1 :]]) for at in range(3, len(raw), len(raw) // 40)]
    for content in damaged:
        beside(saved).write_bytes(content)
        with pytest.raises(SlrpropError) as error:
            Plan.load(saved)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", ["missing", "more", "dtype", "shape"])
def test_arrays_that_were_changed(saved, change):
    arrays = safetensors.torch.load_file(beside(saved))
    key = "0/left"
    if change == "missing":
        del arrays[key]
    elif change == "more":
        arrays["0/middle"] = torch.ones(2)
    else:
        arrays[key] = arrays[key].half() if change == "dtype" else arrays[key].T.contiguous()
    safetensors.torch.save_file(arrays, beside(saved))
    with pytest.raises(SlrpropError, match="are not those of this plan"):
        Plan.load(saved)


@pytest.mark.parametrize(
    "form", [{}, {"kind": "none"}, {"kind": "sparse_low_rank", "shape": [64, 96], "lowest": [0, 0]}, {"kind": []}]
)
def test_descriptions_that_were_changed(saved, form):
    content = json.loads(saved.read_text())
    content["layers"][0]["form"] = form
    del content["sha256"]
    saved.write_text(json.dumps(content))
    with pytest.raises(SlrpropError):
        Plan.load(saved)


def test_a_plan_whose_factors_were_taken_out(saved, trained):
    content = json.loads(saved.read_text())
    content["layers"][0]["fitted"] = ""
    del content["sha256"]
    saved.write_text(json.dumps(content))
    with pytest.raises(SlrpropError, match="the plan lacks the fitted factors of layer '0'"):
        slrprop.apply(trained, Plan.load(saved))


@pytest.mark.parametrize("fails", [1, 2])
def test_what_could_not_be_written_leaves_the_old_plan_whole(fails, saved, trained, calibration, monkeypatch):
    """Whichever of the two files fails: the old ones stay, and nothing else."""
    before = {path: path.read_bytes() for path in saved.parent.iterdir()}
    calls = []
    for name in ("write_bytes", "write_text"):
        write = getattr(Path, name)

        def failing(self, content, *more, write=write):
            calls.append(self)
            if len(calls) == fails:
                write(self, content[: len(content) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(self, content, *more)

        monkeypatch.setattr(Path, name, failing)
    with pytest.raises(SlrpropError, match="No space left on device"):
        fitted(trained, calibration, rank=6).save(saved)
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in saved.parent.iterdir()} == before
    assert Plan.load(saved).layers[0].settings["rank"] == 5


def test_a_model_beside_the_plan_is_not_overwritten(trained, calibration, tmp_path):
    """The name is the likely one: small.safetensors and small.json."""
    slrprop.save(trained, tmp_path / "small.safetensors")
    before = (tmp_path / "small.safetensors").read_bytes()
    with pytest.raises(
        SlrpropError,
        match=r"small.safetensors' is there already and is not beside the plan 'small.json' alone, but beside no plan; move it away",
    ):
        fitted(trained, calibration).save(tmp_path / "small.json")
    assert (tmp_path / "small.safetensors").read_bytes() == before and not (tmp_path / "small.json").exists()
    slrprop.plan(trained, calibration, method="svd", rank=5).save(tmp_path / "small.json")  # which needs no factors


def test_a_plan_can_not_have_its_factors_name(trained, calibration, tmp_path):
    with pytest.raises(SlrpropError, match=r"give the plan another ending, like \.json"):
        fitted(trained, calibration).save(tmp_path / "plan.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_older_plan_is_overwritten(saved, trained, calibration):
    plan = fitted(trained, calibration, rank=6)
    plan.save(saved)
    assert Plan.load(saved) == plan


def test_names_that_begin_with_others(trained, calibration, tmp_path):
    """As in ONNX files, where 'dense' and 'dense/1' may both be layers."""
    plan = fitted(trained, calibration)
    named = [type(layer)(**vars(layer) | {"name": name}) for layer, name in zip(plan.layers, ("a", "a/b", "a/b/c"), strict=False)]  # fmt: skip
    made = Plan(tuple(named))
    made.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == made and [layer.factors.shape for layer in loaded.layers] == [layer.shape for layer in named]


def test_a_plan_from_before_a_setting_was_there_still_loads(trained, calibration, tmp_path):
    """Its checksum is of what it says; the setting takes its default."""
    made = slrprop.plan(trained, calibration, method="svd", layers=["0"], rank=4)
    (layer,) = made.layers
    old = dataclasses.replace(
        made,
        layers=(
            dataclasses.replace(layer, settings={k: v for k, v in layer.settings.items() if k != "compression_rate"}),
        ),
    )
    old.save(tmp_path / "old.json")
    assert "compression_rate" not in (tmp_path / "old.json").read_text()
    again = slrprop.apply(trained, slrprop.Plan.load(tmp_path / "old.json"))
    assert torch.equal(again(calibration[0]), slrprop.apply(trained, made)(calibration[0]))
