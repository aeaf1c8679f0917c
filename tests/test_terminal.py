"""What reaches the terminal is what was meant, and nothing else leaves the machine or stays on it."""

import json
import os
import pty
import re
import subprocess
import sys
import termios

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

import slrprop
from slrprop import cli, parallel, progress
from slrprop.errors import SlrpropError, printable
from slrprop.progress import Progress
from slrprop.report.layout import _plain

HOSTILE = "[/]\x1b[2J\nfake: 1\u202egnp"
SEEN = "[/]\\x1b[2J\\nfake: 1\\u202egnp"
runner = CliRunner()


@pytest.fixture
def hostile(tmp_path):
    """A classifier whose layers, outputs, operators and file have names that would draw on a terminal."""
    random = np.random.default_rng(0)
    made = {name: random.normal(size=size).astype(np.float32) for name, size in (("a", (16, 24)), ("b", (24, 4)))}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], HOSTILE),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "b"], ["y" + HOSTILE], "last"),
    ]
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size])]
        for name, size in (("x", 16), ("y" + HOSTILE, 4))
    ]
    graph = helper.make_graph(nodes, "g", *ends, [numpy_helper.from_array(value, name) for name, value in made.items()])
    path = tmp_path / "a[" / "b].onnx"
    path.parent.mkdir()
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    x = random.normal(size=(40, 16)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x, targets=random.integers(0, 4, 40))
    return path, tmp_path / "d.npz"


def shown(*arguments):
    """What a command prints, both streams, after it is seen that nothing raw reached them."""
    found = runner.invoke(cli.app, [str(argument) for argument in arguments])
    assert found.exception is None or isinstance(found.exception, (SystemExit, SlrpropError)), found.exception
    told = found.output + str(found.exception or "")
    assert "\x1b[2J" not in told and "\u202e" not in told and "\nfake" not in told
    return told


def test_names_from_a_model_are_shown_and_never_obeyed(hostile, tmp_path):
    path, data = hostile
    assert SEEN in shown("inspect", path)
    assert SEEN in shown("plan", path, "--method", "svd", "--rank", 2, "-o", tmp_path / "plan.json")
    assert f"output 'y{SEEN}'" in shown("apply", path, tmp_path / "plan.json", "-o", tmp_path / "small.onnx")
    assert "b].onnx" in shown("measure", path, "--data", data)
    told = shown("compress", path, "--calibration", data, "--max-bytes", "90%", "--level", "weights", "-o", tmp_path / "c.onnx",
                 "--report", tmp_path / "report.md")  # fmt: skip
    assert f"why {SEEN}" in told or SEEN in told
    assert "\x1b" not in (tmp_path / "report.md").read_text()
    assert SEEN in shown("plan", path, "--method", "svd", "--layers", "none", "-o", tmp_path / "plan.json")


def test_an_error_is_one_line_whatever_it_names(hostile):
    with pytest.raises(SlrpropError) as error:
        slrprop.plan(hostile[0], None, method="svd", layers="none")
    assert SEEN in str(error.value) and "\n" not in str(error.value)


def test_printable_keeps_what_can_be_seen():
    assert printable("Größe 漢字 'x' \\ 100 %") == "Größe 漢字 'x' \\ 100 %"
    assert printable("\udc80\x07\u2066\u200b") == "\\udc80\\x07\\u2066\\u200b"
    assert _plain("a\nb|c") == "a\\\\nb\\|c"


SILENT = """
import ctypes, os, struct, sys, time
KILL, ALLOW, SOCKET = 0x80000000, 0x7FFF0000, {"x86_64": 41, "aarch64": 198}[os.uname().machine]
def op(code, yes, no, k): return struct.pack("HBBI", code, yes, no, k)
program = op(0x20, 0, 0, 0) + op(0x15, 0, 1, SOCKET) + op(0x06, 0, 0, KILL) + op(0x06, 0, 0, ALLOW)
room = ctypes.create_string_buffer(program)
head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 4, ctypes.addressof(room)))
libc = ctypes.CDLL(None, use_errno=True)
assert not libc.prctl(38, 1, 0, 0, 0) and not libc.prctl(22, 2, head, 0, 0)  # from here on a socket ends the process
if sys.argv[1:] == ["socket"]:
    import socket
    socket.socket()
import slrprop
slrprop.apply("m.onnx", slrprop.plan("m.onnx", None, method="svd", rank=2), "o.onnx")
slrprop.measure("o.onnx", "d.npz", "m.onnx")
time.sleep(1.5)  # what would be sent is sent a moment later
print("quiet")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's")
def test_nothing_is_sent_and_no_file_is_left_elsewhere(hostile, tmp_path):
    """The runtime would write a device's number below HOME and look for a server."""
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir(), home.mkdir()
    for source, name in zip(hostile, ("m.onnx", "d.npz"), strict=True):
        (work / name).write_bytes(source.read_bytes())
    known = {
        key: value
        for key, value in os.environ.items()
        if key in ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "OPENBLAS_CORETYPE")
    }
    given = known | {"HOME": str(home), "TMPDIR": str(home)}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-c", SILENT, *arguments], cwd=work, env=given, capture_output=True, text=True
        )

    done = run()
    assert done.stdout == "quiet\n" and done.returncode == 0, done.stderr
    assert sorted(path.name for path in work.iterdir()) == ["d.npz", "m.onnx", "o.onnx"]
    assert list(home.rglob("*")) == []
    assert run("socket").returncode < 0, "the check itself must be able to fail"


def tuned(prelude, *arguments, stderr=subprocess.PIPE):
    """A command in a process of its own, whose progress is told every few hundredths of a second."""
    code = "import sys; from slrprop.cli import main; from slrprop.progress import Progress; Progress.monitor_interval = 0.02\n"
    command = [sys.executable, "-c", f"{code}{prelude}\nmain()", *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=300)


def test_where_no_terminal_is_lines_say_how_far_the_work_is_and_quiet_says_nothing(hostile, tmp_path):
    path, data = hostile
    command = ["compress", path, "--calibration", data, "--max-bytes", "70%", "--level", "tuned", "--method", "low_rank",
               "--run-dir", tmp_path / "run", "-o", tmp_path / "c.onnx", "--json"]  # fmt: skip
    told = tuned("", *command)
    assert told.returncode == 0, told.stderr
    lines = [line for line in told.stderr.splitlines() if not line.startswith("note: ")]
    known = r"tuning: \d+ %, \d+ of \d+(, about \d+ (s|min) left)?"
    assert "\r" not in told.stderr and any(re.fullmatch(known, line) for line in lines), told.stderr
    quiet = tuned("", *command, "--quiet")
    assert quiet.returncode == 0 and not [line for line in quiet.stderr.splitlines() if not line.startswith("note: ")]
    for printed in (told.stdout, quiet.stdout):
        assert json.loads(printed)["file"] == str(tmp_path / "c.onnx")


def test_a_terminal_shows_a_bar():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    code = "from slrprop.progress import Progress\nlist(Progress(range(3), desc='fitting layers'))\nProgress.quiet = True\nlist(Progress(range(4)))"
    done = subprocess.run([sys.executable, "-c", code], stderr=theirs)
    os.close(theirs)
    shown = os.read(ours, 10000).decode()
    os.close(ours)
    assert done.returncode == 0 and "fitting layers: 100%|" in shown and "3/3" in shown and "/4" not in shown


def test_a_line_has_the_stage_its_share_and_what_is_left_and_comes_every_ten_seconds(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with Progress(total=30, desc="fitting layers", unit="layer") as bar:
        bar._time = lambda: bar.start_t + clock[0]
        seen = []
        for clock[0], done in ((5, 3), (10, 12), (15, 13), (20, 14), (700, 15)):
            bar.n = done
            bar.miniters = 1  # as tqdm's monitor does before it asks
            bar.refresh()
            bar.update(0)
            assert bar.miniters > 1e9, "the work itself never shows a line"
            seen.append(capsys.readouterr().err)
    assert seen[0] == seen[2] == "" == capsys.readouterr().err
    assert seen[1] == "fitting layers: 40 %, 12 of 30, about 15 s left\n"
    assert seen[3] == "fitting layers: 47 %, 14 of 30, about 23 s left\n"
    assert seen[4] == "fitting layers: 50 %, 15 of 30, about 12 min left\n"
    begun, open_ended = Progress(total=4, desc="tuning"), Progress(iter("ab"), desc="cost of head")
    assert begun.line() == "tuning: 0 %, 0 of 4"
    assert open_ended.line() == "cost of head: 0 so far"
    assert Progress.monitor_interval == 10


def test_a_quiet_process_and_a_worker_show_nothing(monkeypatch, capsys):
    monkeypatch.setattr(Progress, "quiet", False)
    runner.invoke(cli.app, ["plan", "none.onnx", "-o", "p.json", "--quiet"])
    assert Progress.quiet and list(Progress(range(3))) == [0, 1, 2] and Progress(total=2).disable
    runner.invoke(cli.app, ["plan", "none.onnx", "-o", "p.json"])
    assert not Progress.quiet and not Progress(total=2).disable
    parallel._start("call", ())
    assert Progress.quiet
