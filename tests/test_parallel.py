"""Work in parts, locally and on a real Ray cluster of two nodes: the same rows, whatever is lost on the way."""

import dataclasses
import os
import pickle
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slrprop import SlrpropError
from slrprop.data import Data
from slrprop.fit.calibration import Calibration
from slrprop.fit.statistics import Moments, moments
from slrprop.network import TorchNetwork
from slrprop.parallel import each
from slrprop.research.datasets import Dataset
from slrprop.research.experiments import EXPERIMENTS, train_missing
from slrprop.research.paper import run
from slrprop.research.paper.run import paper_store
from tests.tasks import ROWS, fails, meet, square, write

SEEDS, CELLS = 4, 15  # 7 methods x 2 ranks and the original


def told(results):
    """Rows without the seconds that they took."""
    return [str(dataclasses.replace(row, seconds=0.0)) for row in results]


def raises(*_, **__):
    raise ConnectionError("no route\nto it")


@pytest.fixture(scope="module")
def tiny(digits):
    x, y = digits
    x = torch.nn.functional.interpolate(x.view(-1, 1, 8, 8), 32)
    lenet = EXPERIMENTS["lenet5-mnist"]
    short = dataclasses.replace(lenet.recipe, epochs=1)
    experiment = dataclasses.replace(lenet, ranks=(2, 8), calibration=60, recipe=short)
    return experiment, Dataset(x[:400], y[:400], x[600:700], y[600:700])


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """The rows of one process."""
    folder = tmp_path_factory.mktemp("alone")
    store = paper_store(folder / "results.sqlite")
    assert run.run(*tiny, folder, SEEDS, store) == SEEDS * CELLS
    return folder, told(store.results())


class TestProcesses:
    def test_every_task_comes_back_with_its_result(self):
        assert list(each(square, range(5), (7,))) == [(task, task * task + 7) for task in range(5)]
        assert list(each(square, [], (7,), workers=2)) == []
        with pytest.raises(SlrpropError, match="workers must be a whole number from 1, got 0"):
            each(square, [1], (7,), workers=0)

    @pytest.mark.parametrize("workers", [1, 2])
    def test_what_a_task_raises_arrives(self, workers):
        with pytest.raises(SlrpropError, match=r"^too much was asked for$"):
            list(each(fails, ["too much"] * 2, workers=workers))

    def test_a_worker_that_dies_is_one_sentence(self):
        with pytest.raises(SlrpropError, match="one of 2 worker processes died"):
            list(each(fails, ["dies"] * 2, workers=2))

    def test_an_interrupt_stops_the_workers(self, tmp_path):
        code = (
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # ignored in the background
            "from slrprop.parallel import each; from tests.tasks import wait; "
            f"list(each(wait, range(4), ({str(tmp_path)!r},), workers=2))"
        )
        found = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        while not (tmp_path / "1").exists() and found.poll() is None:
            time.sleep(0.05)
        start = time.perf_counter()
        found.send_signal(signal.SIGINT)
        try:
            assert "KeyboardInterrupt" in found.communicate(timeout=60)[1]
        finally:
            found.kill()
        assert time.perf_counter() - start < 40 and not (tmp_path / "2").exists()

    def test_workers_make_the_rows_of_one_process(self, tiny, alone, tmp_path):
        folder, rows = alone
        store = paper_store(tmp_path / "results.sqlite")
        assert run.run(*tiny, folder, SEEDS, store, workers=2) == SEEDS * CELLS
        assert told(store.results()) == rows
        assert run.run(*tiny, folder, SEEDS, store, workers=2) == 0


class TestStore:
    def test_many_writers_of_one_file(self, tmp_path):
        store = paper_store(tmp_path / "results.sqlite")
        assert sorted(each(write, range(6), (store,), workers=2)) == [(task, len(ROWS)) for task in range(6)]
        assert told(store.results()) == told(ROWS)

    def test_a_row_that_is_there_stays(self, tmp_path):
        store = paper_store(tmp_path / "results.sqlite")
        for accuracy in (90.0, 80.0):
            store.add(dataclasses.replace(ROWS[0], accuracy=accuracy))
        assert [row.accuracy for row in store.results()] == [90.0]

    def test_mistakes_are_one_sentence(self, tmp_path, monkeypatch):
        (tmp_path / "text").write_text("no database" * 100)
        for place, sentence in {
            tmp_path / "text": "text' can't be opened: .*not a database",
            "mysql://host/name": "must be a path or postgresql://..., got 'mysql://...'",
            "postgresql://host:port/": r"must be postgresql://user:password@host/name \(in the password @ as %40, \? as %3F\), got 'postgresql://host:port/'",
            "postgresql://me:top secr@t/x@host:p/n": r"got 'postgresql://me:\*\*\*@host:p/n'",
            "postgresql://host/n?user=me&password=secr@t": r"got 'postgresql://host/n\?user=me&password=\*\*\*'",
            "postgresql://127.0.0.1:9/n?user=me&password=secret": r"'postgresql://127.0.0.1:9/n' can't be opened: .*onnection",
            tmp_path / "text" / "r.sqlite": "the folder '.*text' can't be used .*; name another one",
        }.items():
            with pytest.raises(SlrpropError, match=sentence) as error:
                paper_store(place)
            assert ("secr" not in str(error.value) and error.value.__cause__ is None) or isinstance(place, Path)
        monkeypatch.setitem(sys.modules, "psycopg", None)
        with pytest.raises(SlrpropError, match=r"pip install 'slrprop\[postgresql\]'"):
            paper_store("postgresql://host/name")

    @pytest.mark.parametrize("name", ["a?b=c.sqlite", "100%41 d.sqlite", "file:a b#c;d.sqlite", "password=x y"])
    def test_a_path_is_a_path(self, name, tmp_path):
        paper_store(tmp_path / name).add(ROWS[0])
        assert paper_store(tmp_path / name).results() == ROWS[:1]
        assert all(path.name.startswith(name) for path in tmp_path.iterdir())

    def test_postgresql(self, postgresql):
        store = paper_store(postgresql)
        assert "secret" in postgresql and "secret" not in store.name
        with ThreadPool(4) as pool:
            pool.map(lambda _: write(_, pickle.loads(pickle.dumps(store))), range(4))
        assert told(store.results("tiny")) == told(ROWS)
        with pytest.raises(
            SlrpropError, match=r"'postgresql://slrprop:\*\*\*@/missing.*can't be opened: .*does not exist"
        ):
            paper_store(postgresql.replace("/postgres?", "/missing?"))


def _programs():
    found = shutil.which("pg_ctl")
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return Path(found).resolve().parent if found else places[-1].parent if places else None


@pytest.fixture
def postgresql():
    """The URL of a server of our own, on a socket."""
    pytest.importorskip("psycopg")
    programs = _programs()
    if programs is None or not (programs / "initdb").exists():
        pytest.skip("no PostgreSQL server is installed")
    other = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if os.getuid() == 0:  # which the server refuses to be
            nobody = pwd.getpwnam("nobody")
            other = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)

        def call(program, *arguments):
            command = [programs / program, "-D", f"{folder}/data", *arguments]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, **other)
            assert done.returncode == 0, done.stdout + done.stderr

        call("initdb", "-A", "trust", "-U", "slrprop", "--no-sync")
        call("pg_ctl", "start", "-w", "-l", f"{folder}/log", "-o", f"-c listen_addresses= -c fsync=off -k {folder}")
        try:
            yield f"postgresql://slrprop:secret@/postgres?host={folder}"
        finally:
            call("pg_ctl", "stop", "-m", "immediate")


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU each; and the second node."""
    ray = pytest.importorskip("ray")
    utils = pytest.importorskip("ray.cluster_utils")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        settings = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False}
        started = utils.Cluster(initialize_head=True, head_node_args=settings)
        node = started.add_node(**settings)
        patch.setenv("RAY_ADDRESS", started.address)
        ray.init("auto", log_to_driver=False, logging_level="error")
        yield started, node
        ray.shutdown()
        started.shutdown()


class TestRay:
    def test_a_cluster_makes_the_same_rows_and_loses_none_with_a_node(self, cluster, tiny, alone, tmp_path):
        (started, node), (_, rows) = cluster, alone
        with pytest.raises(SlrpropError, match=r"^too much was asked for$"):
            list(each(fails, ["too much"], cluster="auto"))
        list(each(meet, range(2), (tmp_path,), cluster="auto"))
        train_missing(tiny[0], range(SEEDS), tiny[1], tmp_path, cluster="auto")

        whole = paper_store(tmp_path / "whole.sqlite")
        assert run.run(*tiny, tmp_path, 2, whole, cluster="auto") == 2 * CELLS
        assert told(whole.results()) == [row for row in rows if "seed=0" in row or "seed=1" in row]

        store, killed = paper_store(tmp_path / "results.sqlite"), []

        def kill():
            """Once both nodes are in the middle of a seed."""
            counts = Counter()
            while sum(0 < count < CELLS for count in counts.values()) < 2 and sum(counts.values()) < SEEDS * CELLS:
                counts = Counter(row.seed for row in store.results())
            started.remove_node(node, allow_graceful=False)
            killed.append(counts)

        killer = threading.Thread(target=kill)
        killer.start()
        assert run.run(*tiny, tmp_path, SEEDS, store, cluster="auto") == SEEDS * CELLS
        killer.join()
        assert sum(0 < count < CELLS for count in killed[0].values()) == 2
        assert told(store.results()) == rows

    def test_no_cluster(self, monkeypatch):
        with pytest.raises(SlrpropError, match="cluster must be 'auto' or ray://HOST:PORT, got 'localhost:6379'"):
            each(square, [1], (7,), cluster="localhost:6379")
        with pytest.raises(SlrpropError, match=r"got 'http://me:\*\*\*@host:1'$"):
            each(square, [1], (7,), cluster="http://me:secret@host:1")
        ray = pytest.importorskip("ray")
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", raises)
        with pytest.raises(SlrpropError, match=r"no Ray cluster answers at 'auto' \(no route\); start one with"):
            list(each(square, [1], (7,), cluster="auto"))
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(SlrpropError, match=r"pip install 'slrprop\[ray\]'"):
            list(each(square, [1], (7,), cluster="auto"))


class TestMoments:
    @settings(max_examples=50, deadline=None)
    @given(
        parts=st.lists(st.tuples(st.integers(0, 40), st.floats(-1e4, 1e4)), min_size=1, max_size=6),
        batches=st.lists(st.integers(1, 30), min_size=1, max_size=4),
        seed=st.integers(0, 9),
    )
    def test_parts_make_the_whole(self, parts, batches, seed):
        """Parts of any size about any mean, in batches of any size, equal the definition."""
        generator = torch.Generator().manual_seed(seed)
        data = [mean + torch.randn(count, 5, generator=generator, dtype=torch.float64) for count, mean in parts]
        if not sum(map(len, data)):
            return
        total = Moments(3, 2)
        for index, part in enumerate(data):
            summed = Moments(3, 2)
            for batch in part.split(batches[index % len(batches)]):
                summed.add(batch[:, :3], batch[:, 3:])
            total.merge(summed)
        whole = torch.cat(data)
        mean = whole.mean(0)
        want = (whole - mean).T @ (whole - mean)
        scale = want.diagonal().max()
        assert total.count == len(whole)
        torch.testing.assert_close(torch.cat([total.mean, total.target_mean]), mean, rtol=1e-12, atol=1e-9)
        assert (total.square - want[:3, :3]).abs().max() <= 1e-6 * scale
        assert (total.cross - want[:3, 3:]).abs().max() <= 1e-6 * scale

    def test_workers_sum_what_one_pass_sums(self, trained, calibration):
        x = calibration[0]
        x = torch.cat([x[:200], 5 + x[200:]])
        parts = [Data((x[:7], None)), Data((x[7:200], None), 50), Data((x[200:], None), 64)]
        found = moments(trained, ("2", "4"), parts, workers=2)
        data = Data((x, None))
        network = TorchNetwork(trained, data)
        once, merged = Calibration(network, data), Calibration(network, data, found)
        for name in found:
            one, other = once.regression(name, {}), merged.regression(name, {})
            for field in ("mean", "covariance", "target_mean", "weight"):
                want, got = getattr(one, field), getattr(other, field)
                assert (got - want).norm() <= 1e-6 * want.norm()
        with pytest.raises(SlrpropError, match="no layer is called 'first'"):
            moments(trained, ("first",), parts[:1])
