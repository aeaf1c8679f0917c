"""What is never written over, what is written together, and what a killed run leaves."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from torch.nn import Linear
from typer.testing import CliRunner

import slrprop
from slrprop import SlrpropError, cli
from slrprop.data import Data
from slrprop.files import PREFIX, replacing, scratch, together
from slrprop.report import write_report
from slrprop.search import compress

OUTSIDE = {"save_as_external_data": True, "size_threshold": 0}


def model_file(path: Path, sizes: tuple[int, int, int] = (40, 60, 30), **where: object) -> Path:
    """Two layers of rank 4; its weights beside it, where asked."""
    random, (k, m, n) = np.random.default_rng(0), sizes
    a, b = ((random.standard_normal((m, 4)) @ random.standard_normal((4, n)) / 9).astype(np.float32) for m, n in ((k, m), (m, n)))  # fmt: skip
    nodes = [helper.make_node("MatMul", ["x", "a"], ["h"], "one"), helper.make_node("MatMul", ["h", "b"], ["y"], "two")]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size]) for name, size in (("x", k), ("y", n))]  # fmt: skip
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], [numpy_helper.from_array(a, "a"), numpy_helper.from_array(b, "b")])  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path, **where)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose data file has the name that an output would give its own, plans, samples, and what else people have."""
    os.chdir(tmp_path)
    model = model_file(tmp_path / "model.onnx", location="small.onnx.data", **OUTSIDE)
    model_file(tmp_path / "other.onnx")
    np.savez("data.npz", x=np.random.default_rng(1).standard_normal((60, 40)).astype(np.float32))
    slrprop.plan(model, None, "svd", rank=2).save("plan.json")
    slrprop.plan(model, "data.npz", "low_rank", rank=2).save("fitted.json")
    for name in ("weights.safetensors", "mine.onnx.data", "report.md", "page.html", "notes.json", "text.onnx"):
        (tmp_path / name).write_text("mine")
    Path("twin.onnx").hardlink_to(model)
    Path("link.onnx").symlink_to(model)
    Path("samples.onnx").symlink_to("data.npz")
    Path("away").mkdir()
    Path("away.onnx").symlink_to("away/there.onnx")
    os.mkfifo("pipe")
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


PLAN, APPLY = "plan model.onnx --calibration data.npz --method low_rank --rank 2 -o", "apply model.onnx plan.json -o"
COMPRESS = "compress model.onnx --calibration data.npz --max-bytes 60% --level weights -o"
REFUSED = {
    f"{PLAN} model.onnx": "is the model itself, which stays",
    f"{PLAN} twin.onnx": "is the model itself, which stays",
    f"{PLAN} data.npz": "is the data, which stays",
    f"{PLAN} small.onnx.data": "is there already and is no plan of slrprop",
    f"{PLAN} notes.json": "is there already and is no plan of slrprop",
    f"{PLAN} weights.json": "weights.safetensors' is there already and is not beside the plan 'weights.json' alone, but beside no plan",
    f"{PLAN} fitted.txt": "fitted.safetensors' is there already and is not beside the plan 'fitted.txt' alone, but beside fitted.json",
    f"{PLAN} /dev/null": "it is no regular file",
    f"{PLAN} pipe": "it is no regular file",
    f"{PLAN} away": "it is a folder",
    f"{PLAN} .": "it is a folder",
    f"{PLAN} none/plan.json": "its folder does not exist",
    f"{APPLY} small.onnx": "small.onnx.data' is the model's external data, which stays",
    f"{APPLY} small.onnx.data": "is the model's external data, which stays",
    f"{APPLY} plan.json": "is the plan, which stays",
    "apply model.onnx fitted.json -o fitted.safetensors": "is the plan's factors, which stays",
    f"{APPLY} data.npz --calibration data.npz": "is the data, which stays",
    f"{APPLY} data.npz": "is there already and is no ONNX model",
    f"{APPLY} link.onnx": "is the model itself, which stays",
    f"{APPLY} mine.onnx": "mine.onnx.data' is there already and is not the external data that slrprop wrote",
    f"{APPLY} away.onnx": "is a link to a file in another folder, where its external data would not be found",
    f"{APPLY} /dev/null": "it is no regular file",
    f"{COMPRESS} small.onnx": "small.onnx.data' is the model's external data, which stays",
    f"{COMPRESS} twin.onnx": "is the model itself, which stays",
    f"{COMPRESS} samples.onnx": "is the data, which stays",
    f"{COMPRESS} text.onnx": "is there already and is no ONNX model",
    f"{COMPRESS} new.onnx --report report.md": "is there already and is not what slrprop writes",
    f"{COMPRESS} new.onnx --report page.html": "is there already and is not what slrprop writes",
}


def test_nothing_that_is_read_or_foreign_is_written_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, entries = content(folder), sorted(folder.rglob("*"))
    monkeypatch.setattr(sys.modules["slrprop.search.compress"], "Judge", None)  # refused before any work
    for command, told in REFUSED.items():
        error = CliRunner().invoke(cli.app, command.split()).exception
        assert isinstance(error, SlrpropError) and told in str(error), (command, error)
    assert content(folder) == before and sorted(folder.rglob("*")) == entries


def test_python_writes_over_its_own_kind_only(folder: Path) -> None:
    plan, before = slrprop.Plan.load("plan.json"), content(folder)
    found = compress("other.onnx", Data("data.npz"), max_bytes="60%", level="weights")
    for write in (
        lambda: plan.save("model.onnx"),
        lambda: slrprop.save(Linear(2, 2), "weights.safetensors"),
        lambda: write_report(found, "report.md"),
        lambda: slrprop.apply("other.onnx", plan, "data.npz"),
    ):
        with pytest.raises(SlrpropError, match="is there already and is"):
            write()
    assert content(folder) == before
    for _ in range(2):  # over what it wrote itself
        slrprop.Plan.load("fitted.json").save("again.json")
        write_report(found, "again.md", ["slrprop", "compress", "--cluster", "ray://me:secret@host:1", "-o", "s.onnx"])
        assert "ray://me:\\*\\*\\*@host:1" in Path("again.md").read_text()
        assert "secret" not in Path("again.md").read_text()
    plan = slrprop.plan("model.onnx", "data.npz", "dense", bits=8)
    for _ in range(2):
        slrprop.apply("model.onnx", plan, "again.onnx")
    Path("keep.onnx").write_bytes(Path("again.onnx").read_bytes())
    with pytest.raises(SlrpropError, match=r"again.onnx.data' is there already and is read by 'keep.onnx' too"):
        slrprop.apply("model.onnx", plan, "again.onnx")
    Path("again.onnx").unlink()
    with pytest.raises(SlrpropError, match=r"again.onnx.data' is there already and is not the external data"):
        slrprop.apply("model.onnx", plan, "again.onnx")


def test_links_are_followed(folder: Path) -> None:
    for name in ("first.onnx", "first.onnx", "gone.onnx"):
        Path("way.onnx").unlink(missing_ok=True)
        Path("way.onnx").symlink_to(Path("away") / name)
        slrprop.apply("other.onnx", slrprop.Plan.load("plan.json"), "way.onnx")
        assert Path("way.onnx").is_symlink() and slrprop.inspect(Path("away") / name)


def test_all_or_nothing(tmp_path: Path) -> None:
    with pytest.raises(SlrpropError, match=r"'.*b' could not be written \(it is a folder\)"), together():
        for name in ("a", "b"):
            with replacing(tmp_path / name) as part:
                part.write_text("new")
        (tmp_path / "b").mkdir()  # meanwhile
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_bytes_are_those_on_disk(folder: Path) -> None:
    """Where the data lie beside the file, its name is in it for every tensor."""
    budget, name = 9000, "a name that is much longer than that of the model.onnx"
    said = json.loads(
        CliRunner().invoke(cli.app, [*COMPRESS.replace("60%", str(budget)).split(), name, "--json"]).stdout
    )
    real = sum(path.stat().st_size for path in folder.glob(f"{name}*"))
    assert said["bytes"][1] == real == slrprop.measure(name, "data.npz", "model.onnx").bytes <= budget
    unnamed = compress("model.onnx", "data.npz", max_bytes=budget, level="weights")
    slrprop.apply("model.onnx", unnamed.plan, "by plan.onnx")
    assert sum(path.stat().st_size for path in folder.glob("by plan.onnx*")) < unnamed.bytes[1] <= budget


def test_a_file_that_would_grow_is_not_written(folder: Path) -> None:
    model_file(folder / "narrow.onnx", (7, 6, 7))
    plan = slrprop.plan("narrow.onnx", None, "svd", rank=3, layers="one")  # 3 numbers fewer, and a node more
    with pytest.raises(
        SlrpropError, match=r"would take \d{3} bytes, and the original takes \d{3}; nothing was written"
    ):
        slrprop.apply("narrow.onnx", plan, "more.onnx")
    assert not Path("more.onnx").exists()


HELD = """
import signal, sys, time, types
from pathlib import Path
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup would have it ignored
sys.modules["slrprop"] = package = types.ModuleType("slrprop")  # without torch, which takes seconds
package.__path__ = [sys.argv[2]]
from slrprop import cli, files
def app():
    with files.scratch(Path(sys.argv[1])), files.replacing(Path(sys.argv[1]) / "out.onnx") as part:
        part.write_text("half")
        print("ready", flush=True)
        time.sleep(100)
cli.app = app
cli.main()
"""


def test_what_signals_leave(tmp_path: Path) -> None:
    """SIGTERM and SIGHUP: nothing. SIGKILL: what the next run removes, which leaves a living run's alone, and others'."""
    ends = {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGKILL: -9}
    runs = {number: subprocess.Popen([sys.executable, "-c", HELD, str(tmp_path), str(Path(slrprop.__file__).parent)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for number in ends}  # fmt: skip
    try:
        for run in runs.values():
            assert run.stdout is not None and run.stdout.readline() == "ready\n"
        foreign = [tmp_path / name for name in (".slrprop-notes", f"{PREFIX}file_abc", "out.onnx")]
        foreign[0].mkdir()
        foreign[1].write_text("mine")
        foreign[2].write_text("old")
        with scratch(tmp_path):
            assert len(list(tmp_path.iterdir())) == len(foreign) + 2 * len(runs) + 1
        for left, (number, code) in zip((4, 2, 2), ends.items(), strict=True):
            runs[number].send_signal(number)
            told = runs[number].communicate(timeout=120)[1]
            assert runs[number].returncode == code and "Traceback" not in told
            assert len(list(tmp_path.iterdir())) == len(foreign) + left
        with scratch(tmp_path):
            pass
        assert sorted(tmp_path.iterdir()) == sorted(foreign) and foreign[2].read_text() == "old"
    finally:
        for run in runs.values():
            run.kill()
            run.communicate()
