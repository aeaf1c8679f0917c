import json
import math
import re
import shutil
import sys
from collections import OrderedDict
from dataclasses import replace
from html import unescape

import pytest
import torch
from torch import nn

import slrprop
from slrprop import SlrpropError
from slrprop.data import Data
from slrprop.report import write_report
from slrprop.report.words import command_for, milliseconds, short_size, size
from slrprop.search import BudgetError, compress
from slrprop.search.judge import Judge

HOSTILE = "<script>hacked=1</script>|<img src=x onerror=hacked=1>&amp;`*"
COMMAND = "slrprop compress net.onnx --calibration 'my data.npz' --max-drop 1 --confident --report r.html -o small.onnx"


@pytest.fixture(scope="module")
def model(trained):
    """The trained network, one of its layers with a hostile name, and with sparse low rank worth choosing."""
    torch.manual_seed(0)
    parts = OrderedDict((name, part) for name, part in zip(["a", "b", HOSTILE, "d", "e"], trained, strict=True))
    return nn.Sequential(parts).eval()


@pytest.fixture(scope="module")
def data(digits):
    x, y = digits
    return x[1200:], y[1200:]


@pytest.fixture(scope="module")
def made(model, data):
    """A compression with sparse low rank chosen; latencies are made up, so that the page has them."""
    found = compress(model, data, max_drop=4.0, methods={"slr": {"criterion": "weight", "sparsity_rate": 0.3}})
    assert any(layer.kept_rows for layer in found.plan.layers) and found.chosen > 0
    timed = tuple(
        replace(point, latency=1e-3 / (1 + step)) if step % 2 else point for step, point in enumerate(found.points)
    )
    return replace(found, points=timed, latency=(1e-3, 2.5e-4), left_dense={"tied": "its weight is also 'x'"})


@pytest.fixture(scope="module")
def page(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(made, path, command=COMMAND, parity={"logits": 3.1e-7})
    return path


@pytest.fixture(scope="module")
def markdown(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.md"
    write_report(made, path, command=COMMAND, parity={"logits": 3.1e-7})
    return path.read_text()


def own(page):
    """The page without the plotting library."""
    text = page.read_text()
    start = text.index("<script>", text.index('id="facts"'))
    return text[:start] + text[text.index("</script>", start) :]


def facts(page):
    return json.loads(re.search(r'id="facts">(.*?)</script>', page.read_text(), re.DOTALL).group(1))


def shown(text):
    """Words as they read: no tags, no entities, no Markdown escapes, single spaces."""
    return re.sub(r"\s+", " ", re.sub(r"\\([\\`*_<>\[\]|])", r"\1", unescape(text)))


def test_both_kinds_say_what_was_found(made, page, markdown):
    before, after = made.quality
    values = [
        *map(size, made.bytes),
        f"{before:.2f} %",
        f"{after:.2f} %",
        f"{made.drop:.2f} points",
        f"{made.interval[0]:.2f} to {made.interval[1]:.2f} points",
        *map(milliseconds, made.latency),
        "at most 4.00 points",
        made.data_fingerprint,
        f"{made.seconds:.1f} s",
        torch.__version__,
        "its weight is also 'x'",
        "largest difference 3.1e-07",
        COMMAND,
        json.loads(made.plan.to_json())["sha256"],
        f"{torch.get_num_threads()} for the search (torch)",
        "measured on the check part of the data, which the search did not see",
        "rows of the weight belong to inputs, columns to outputs",
    ]
    for text in (shown(re.sub("<[^>]*>", "", own(page))), shown(markdown)):
        for value in values:
            assert value in text, value
        assert "Budget met" in text and re.search(rf"evaluations of a whole network\W*{made.evaluations}\b", text)
    assert "ratio" not in re.findall(r"\w+", shown(own(page)) + markdown)


def test_points_and_layers_are_those_of_the_compression(made, page, markdown):
    told = facts(page)
    assert len(told["points"]) == len(made.points) and told["chosen"] == made.chosen
    assert told["bytes"] == list(made.bytes) and told["quality"] == list(made.quality) and told["met"] is made.met
    names = list(made.curves)
    assert [layer["name"] for layer in told["layers"]] == names
    for index, (point, truth) in enumerate(zip(told["points"], made.points, strict=True)):
        plans = {layer.name: layer for layer in truth.plan.layers}
        for name, layer, place in zip(names, told["layers"], point["plan"], strict=True):
            form = layer["candidates"][place]
            assert form["method"] == (plans[name].method if name in plans else "dense")
            assert form["rank"] == (plans[name].settings["rank"] if name in plans else 0)
        assert point["quality"] == (None if truth.measured is None else truth.measured.quality)
        assert point["exact"] == (index == made.chosen or truth.measured is not None)
        asked = int(re.search(r"--max-bytes (\d+) -o small.onnx$", point["command"]).group(1))
        assert asked == point["bytes"] if point["exact"] else asked > point["bytes"] == truth.predicted_bytes
    for layer, name in zip(told["layers"], names, strict=True):
        assert len(layer["candidates"]) == len(made.curves[name])
        assert layer["before"] == made.curves[name][0].bytes
        assert layer["singular_values"] == pytest.approx(made.observed[name].singular_values, rel=1e-4)
        assert list(map(len, layer["relevance"])) == layer["shape"]
        for bits, count in zip(layer["kept"] or (), layer["shape"], strict=bool(layer["kept"])):
            assert len(bits) == count
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert sum(bool(re.match(r"\| \d+ (\(chosen\) )?\|", row)) for row in rows) >= len(made.points)


def test_a_relevance_is_that_of_the_criterion(made, model):
    weight = model.get_submodule(HOSTILE).weight.detach().abs().double()
    assert made.observed[HOSTILE].rows == pytest.approx(weight.sum(0).tolist())
    assert made.observed[HOSTILE].columns == pytest.approx(weight.sum(1).tolist())
    values = torch.linalg.svdvals(model.get_submodule(HOSTILE).weight.detach())
    seen = made.observed[HOSTILE]
    assert seen.singular_values == pytest.approx(values[: len(seen.singular_values)].tolist(), rel=1e-4)
    assert seen.energy == pytest.approx(float(values.square().sum()), rel=1e-4)


def test_the_command_of_a_point_makes_that_point_or_a_better_one(made, model, data, page):
    choosing_part, _ = Data(data).split(made.seed)  # nothing is fitted to data
    judge = Judge(model, choosing_part, None)
    points = facts(page)["points"]
    unmeasured = [index for index, point in enumerate(made.points) if index and point.measured is None]
    for index in (made.chosen, unmeasured[0], unmeasured[len(unmeasured) // 2], unmeasured[-1]):
        asked = int(re.search(r"--max-bytes (\d+)", points[index]["command"]).group(1))
        found = compress(model, data, max_bytes=asked, methods=made.settings["methods"])
        got, point = (judge.divergence(judge.outputs(slrprop.apply(model, plan))) for plan in (found.plan, made.points[index].plan))  # fmt: skip
        assert found.bytes[1] <= asked and (found.plan == made.points[index].plan or got < point)


def test_nothing_outside_the_file_is_named(page):
    text = own(page)
    assert not re.search(
        r"https?:|//[a-z]|@import|<link|<iframe|\bsrc=[\"']", re.sub(r"\s// .*", "", text.replace(HOSTILE, ""))
    )
    assert "default-src 'none'" in text


def test_hostile_names_stay_text(page, markdown):
    assert "<script>hacked" not in own(page) and "<img" not in own(page)
    assert page.read_text().count("</script>") == 3
    assert "<script>" not in markdown.replace("\\<script\\>", "")
    heads = [line for line in markdown.splitlines() if "hacked" in line and line.startswith("| ")]
    assert heads and all(len(re.split(r"(?<!\\)\|", line)) in (4, 5, 7, 9, 10) for line in heads)


def test_a_missed_budget_is_said_first(model, data, tmp_path):
    with pytest.raises(BudgetError) as caught:
        compress(model, data, max_drop=0.0, max_bytes="8%", confident=True)
    for name in ("r.html", "r.md"):
        write_report(caught.value.best, tmp_path / name)
        text = (tmp_path / name).read_text()
        assert text.index("Budget not met") < text.index("reached")
        assert "drop, upper end of its interval" in text
        assert "slrprop compress MODEL --calibration DATA --max-bytes" in text


def test_a_single_layer_and_undefined_numbers_are_no_problem(trained, data, tmp_path):
    found = compress(trained, data, max_bytes="90%", layers="0")
    found = replace(found, interval=(-math.inf, math.inf), observed={})
    for name in ("r.html", "r.md"):
        write_report(found, tmp_path / name)
    told = facts(tmp_path / "r.html")
    assert told["interval"] == [None, None] and not told["comparable"] and told["latency"] == [None, None]


def test_an_unknown_kind_and_a_missing_package_are_named(made, tmp_path, monkeypatch):
    with pytest.raises(SlrpropError, match=r"an \.html or an \.md file"):
        write_report(made, tmp_path / "report.pdf")
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(SlrpropError, match=r"pip install 'slrprop\[report\]'"):
        write_report(made, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())
    write_report(made, tmp_path / "report.md")


def test_commands_get_another_budget():
    assert command_for("", 7) == "slrprop compress MODEL --calibration DATA --max-bytes 7 -o OUT"
    assert (
        command_for(COMMAND, 7) == "slrprop compress net.onnx --calibration 'my data.npz' --max-bytes 7 -o small.onnx"
    )
    given = ["slrprop", "compress", "a b.onnx", "--max-bytes=25%", "--max-latency-ms", "2", "--seed", "3"]
    assert command_for(given, 7) == "slrprop compress 'a b.onnx' --seed 3 --max-bytes 7"


@pytest.mark.parametrize(("count", "text"), [(12, "12 B"), (999, "999 B"), (360376, "360 kB"), (4955912, "4.96 MB")])
def test_sizes_are_short(count, text):
    assert short_size(count) == text


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no Chromium with its chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


# the least contrast of any text, as WCAG defines it, and the smallest letters
READABLE = """
const parts = (text) => text.match(/[0-9.]+/g).map(Number);
const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0);
const behind = (node) => { for (; node; node = node.parentElement) { const c = parts(getComputedStyle(node).backgroundColor); if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
const found = [];
for (const node of document.querySelectorAll("body *")) {
  const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
  if (!own || ["SCRIPT", "STYLE"].includes(node.tagName) || !node.getClientRects().length) continue;
  const style = getComputedStyle(node), svg = node instanceof SVGElement;
  const [a, b] = [light(parts(svg ? style.fill : style.color)), light(behind(svg ? node.closest("div") : node))];
  found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), parseFloat(style.fontSize), node.textContent.trim().slice(0, 40)]);
}
return [found.sort((a, b) => a[0] - b[0])[0], found.sort((a, b) => a[1] - b[1])[0]];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_works_in_a_browser(browser, page, made, width, scheme):
    view = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", view)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(page.as_uri())
    run = browser.execute_script
    run("document.querySelectorAll('details').forEach((node) => (node.open = true))")
    browser.execute_async_script(
        "const done = arguments[0]; setTimeout(() => requestAnimationFrame(() => done()), 100)"
    )
    assert run("return document.documentElement.scrollWidth") <= width
    assert run("return getComputedStyle(document.body).backgroundColor") == (
        "rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 27)"
    )
    contrast, smallest = run(READABLE)
    assert contrast[0] >= 4.5, contrast
    assert smallest[1] >= 9, smallest  # exponents of the logarithmic axis
    told = facts(page)
    layers = len(told["layers"])
    assert run("return document.querySelectorAll('.js-plotly-plot').length") == 1 + 3 * layers
    assert run("return document.querySelectorAll('canvas').length") == sum(
        bool(layer["kept"]) for layer in told["layers"]
    )

    assert run("return document.getElementById('command').textContent") == told["points"][made.chosen]["command"]
    before = run("return document.getElementById('plan').innerText")
    move = "const s = document.getElementById('step'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))"
    run(move, 1)
    assert run("return document.getElementById('command').textContent") == told["points"][1]["command"]
    after = run("return document.getElementById('plan').innerText")
    assert after != before and HOSTILE in after
    assert "1 of" in run("return document.getElementById('step-name').textContent")
    run("document.getElementById('curve').emit('plotly_click', {points: [{customdata: arguments[0]}]})", made.chosen)
    assert run("return document.getElementById('plan').innerText") == before
    run("document.querySelector('[data-axis=latency]').click()")
    times = run("return document.getElementById('curve').data[2].x")
    assert times and max(times) <= 1e-3

    assert run("return window.hacked === undefined && document.querySelectorAll('img').length") == 0
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
