"use strict";
(() => {
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const { points, layers, chosen } = facts;
  const el = (id) => document.getElementById(id);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const safe = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const short = (count) => {
    for (const [unit, value] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) if (count >= value) return `${+(count / value).toPrecision(3)} ${unit}`;
    return `${count} B`;
  };
  const number = (value) => (value === 0 || (Math.abs(value) >= 0.001 && Math.abs(value) < 1e5) ? String(+value.toPrecision(4)) : value.toExponential(2));
  const quality = (value) => (facts.percent ? `${value.toFixed(2)} %` : number(value));
  const time = (seconds) => `${+(1e3 * seconds).toPrecision(3)} ms`;
  const metric = facts.metric.replace("_", " ");
  const methods = [...new Set(layers.flatMap((layer) => layer.candidates.map((x) => x.method)))].filter((name) => name !== "dense");
  const config = { displayModeBar: false, responsive: true };
  let picked = chosen;
  let axis = "bytes";

  function axisStyle(title) {
    return { title: { text: title, font: { size: 13 }, standoff: 8 }, gridcolor: colour("line"), linecolor: colour("line"), zeroline: false, automargin: true, fixedrange: true, tickfont: { size: 12 } };
  }

  function layout(height, extra) {
    const back = colour("back");
    return {
      height, paper_bgcolor: back, plot_bgcolor: back, font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("text") },
      margin: { l: 12, r: 12, t: 10, b: 12 }, showlegend: false, hovermode: "closest", dragmode: false,
      hoverlabel: { bgcolor: colour("panel"), bordercolor: colour("line"), align: "left", font: { color: colour("text"), size: 12 } }, ...extra,
    };
  }

  // Ticks 1, 2, 5, 10, ... of a logarithmic axis, thinned out to what fits
  function ticks(values, label, room) {
    const low = Math.min(...values), high = Math.max(...values);
    let found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) for (const digit of [1, 2, 5]) found.push(digit * 10 ** power);
    found = found.filter((tick) => tick >= low * 0.85 && tick <= high * 1.15);
    while (found.length > room) found = found.filter((_, index) => index % 2 === (found.length - 1) % 2);
    if (found.length < 2) found = low === high ? [low] : [low, high];
    const edge = Math.max((Math.log10(high) - Math.log10(low)) * 0.04, 0.01);
    return { type: "log", tickvals: found, ticktext: found.map(label), range: [Math.log10(low) - edge, Math.log10(high) + edge] };
  }

  const planLines = (point) => {
    const lines = point.plan.flatMap((place, index) => (place ? [`${safe(layers[index].name)}: ${layers[index].candidates[place].form}`] : []));
    const rest = lines.length - 10;
    return (rest > 0 ? [...lines.slice(0, 10), `and ${rest} more`] : lines).join("<br>") || "original";
  };
  const hover = (index) => {
    const point = points[index];
    const parts = [`<b>${short(point.bytes)}</b>`];
    if (point.latency !== null) parts.push(time(point.latency));
    if (point.quality !== null) parts.push(`${metric} ${quality(point.quality)}`);
    return `${parts.join(", ")}<br>${planLines(point)}`;
  };

  function drawCurve() {
    const place = (index) => points[index][axis];
    const all = points.map((_, index) => index).filter((index) => place(index) !== null);
    const known = all.filter((index) => points[index].quality !== null);
    const damaged = all.filter((index) => points[index].damage > 0);
    const name = (indices) => indices.map(hover);
    const at = (indices, key) => ({ x: indices.map(place), y: indices.map((index) => points[index][key]), customdata: indices, text: name(indices), hovertemplate: "%{text}<extra></extra>" });
    const ends = [0, chosen].filter((index, order, both) => place(index) !== null && both.indexOf(index) === order);
    const [low, high] = facts.interval;
    const worse = facts.change === "drop" ? -1 : 1; // the direction that is for the worse
    const bar = { type: "data", symmetric: false, color: colour("c1"), thickness: 1.5, width: 5,
      array: ends.map((index) => (index && low !== null ? Math.max(0, worse * ((worse > 0 ? high : low) - facts.drop)) : 0)),
      arrayminus: ends.map((index) => (index && low !== null ? Math.max(0, worse * (facts.drop - (worse > 0 ? low : high)) * 1) : 0)) };
    const traces = [
      { ...at(known, "quality"), mode: known.length > 1 ? "lines+markers" : "markers", name: "search part", line: { color: colour("quiet"), width: 1.5 }, marker: { color: colour("c0"), size: 9 } },
      { x: ends.map(place), y: ends.map((index) => facts.quality[index ? 1 : 0]), customdata: ends, error_y: bar, mode: "markers", name: "check part", marker: { symbol: "diamond", size: 12, color: colour("c1") },
        text: ends.map((index) => `<b>${index === chosen ? "chosen" : "original"}, check part</b><br>${metric} ${quality(facts.quality[index ? 1 : 0])}<br>${hover(index)}`), hovertemplate: "%{text}<extra></extra>" },
      { ...at(damaged, "damage"), yaxis: "y2", mode: "markers", name: "predicted damage", marker: { color: damaged.map((index) => (points[index].quality === null ? colour("back") : colour("c0"))), size: 8, line: { color: colour("c0"), width: 1.5 } } },
      { ...at(damaged.filter((index) => index === chosen), "damage"), yaxis: "y2", mode: "markers", name: "chosen", marker: { symbol: "diamond", size: 12, color: colour("c1") } },
    ];
    if (facts.comparable) {
      const real = known.filter((index) => points[index].divergence > 0);
      traces.push({ ...at(real, "divergence"), yaxis: "y2", mode: "markers", name: "measured divergence", marker: { symbol: "x-thin", size: 8, line: { color: colour("c2"), width: 2 } } });
    }
    const narrow = el("curve").clientWidth < 600;
    const label = axis === "bytes" ? short : time;
    const values = all.map(place);
    const legend = [["c0", "●", "search part"], ["c1", "◆", "check part, and the chosen plan"], ["c0", "○", "predicted, not measured"], ...(facts.comparable ? [["c2", "×", "measured divergence"]] : [])];
    el("curve-legend").replaceChildren(...legend.map(([key, sign, words]) => {
      const item = document.createElement("span"), mark = document.createElement("b");
      mark.style.color = colour(key);
      mark.textContent = sign + " ";
      item.append(mark, words);
      return item;
    }));
    Plotly.react("curve", traces, layout(narrow ? 440 : 480, {
      xaxis: { ...axisStyle(axis === "bytes" ? "file size" : "latency of one sample"), ...ticks(values, label, narrow ? 4 : 9), anchor: "y2" },
      yaxis: { ...axisStyle(`${metric}${facts.percent ? ", %" : ""}`), domain: [0.47, 1] },
      yaxis2: { ...axisStyle(facts.comparable ? "divergence" : "relative error"), domain: [0, 0.4], type: "log", dtick: 1, exponentformat: "power", minorloglabels: "none" },
      shapes: line(),
    }), config);
  }

  const line = () => (points[picked][axis] === null ? [] : [{ type: "line", xref: "x", yref: "paper", x0: points[picked][axis], x1: points[picked][axis], y0: 0, y1: 1, line: { color: colour("accent"), width: 1.5, dash: "dot" } }]);

  function pick(index) {
    picked = index;
    const point = points[index];
    el("step").value = index;
    const what = index === chosen ? "chosen" : index === 0 ? "original" : "not chosen";
    el("step-name").textContent = `${index} of ${points.length - 1} (${what})`;
    el("step").setAttribute("aria-valuetext", `${el("step-name").textContent}, ${short(point.bytes)}`);
    const entries = [["file", (point.exact ? "" : "about ") + short(point.bytes)], ["share of the original", `${((100 * point.bytes) / facts.bytes[0]).toFixed(1)} %`],
      [`${metric}, search part`, point.quality === null ? "not measured" : quality(point.quality)], ["predicted damage", point.damage === null ? "unknown" : number(point.damage)]];
    if (point.divergence !== null) entries.push(["measured divergence", number(point.divergence)]);
    if (point.latency !== null) entries.push(["latency", time(point.latency)]);
    el("picked").replaceChildren(...entries.map(([term, value]) => {
      const box = document.createElement("div"), dt = document.createElement("dt"), dd = document.createElement("dd");
      dt.textContent = term;
      dd.textContent = value;
      box.append(dt, dd);
      return box;
    }));
    el("command").replaceChildren(...point.command.split(" ").flatMap((word, at) => {
      const node = document.createElement("span");
      node.textContent = word;
      return at ? [" ", node] : [node];
    }));
    el("about").hidden = point.exact;
    const table = el("plan"), row = (cells, tag, changed) => {
      const tr = document.createElement("tr");
      cells.forEach((text, at) => {
        const cell = document.createElement(at ? tag : "th");
        cell.textContent = text;
        if (changed && at === 1) cell.className = "changed";
        tr.append(cell);
      });
      return tr;
    };
    const head = document.createElement("thead"), body = document.createElement("tbody");
    head.append(row(["layer", "form", "bytes", "relative error"], "th"));
    layers.forEach((layer, at) => {
      const x = layer.candidates[point.plan[at]];
      body.append(row([layer.name, x.form, x.bytes.toLocaleString("en"), number(x.error)], "td", point.plan[at] !== layer.place));
    });
    table.replaceChildren(head, body);
    if (el("curve").data) Plotly.relayout("curve", { shapes: line() });
  }

  const mark = (x, words) => ({
    shape: { type: "line", xref: "x", yref: "paper", x0: x, x1: x, y0: 0, y1: 1, line: { color: colour("c1"), width: 1.5, dash: "dash" } },
    note: { x, y: 1, xref: "x", yref: "paper", text: words, showarrow: false, font: { color: colour("c1"), size: 12 }, xanchor: "left", yanchor: "top", xshift: 4 },
  });

  const charts = {
    values(box, layer) {
      const y = layer.singular_values;
      if (!y.length) return (box.textContent = "Not known: no candidate of this layer needed them.");
      let sum = 0;
      const text = y.map((value) => `${((100 * (sum += value * value)) / layer.energy).toFixed(1)} %`);
      const marks = layer.rank ? [mark(layer.rank, `rank ${layer.rank}`)] : [];
      const trace = { x: y.map((_, index) => index + 1), y, text, mode: y.length > 60 ? "lines" : "lines+markers", line: { color: colour("c0"), width: 1.8 }, marker: { size: 4 }, fill: "tozeroy", fillcolor: colour("c0") + "1f",
        hovertemplate: "rank %{x}: %{y:.4g}<br>%{text} of the weight's energy up to here<extra></extra>" };
      Plotly.react(box, [trace], layout(240, { xaxis: axisStyle("rank"), yaxis: { ...axisStyle("singular value"), rangemode: "tozero" }, shapes: marks.map((m) => m.shape), annotations: marks.map((m) => m.note) }), config);
    },
    candidates(box, layer) {
      const index = layer.candidates.map((_, place) => place);
      const at = (places) => ({ x: places.map((i) => layer.candidates[i].bytes), y: places.map((i) => layer.candidates[i].error), cliponaxis: false, text: places.map((i) => layer.candidates[i].form), hovertemplate: "%{text}<br>%{x:,} bytes, error %{y:.3g}<extra></extra>" });
      const best = index.filter((i) => layer.candidates[i].hull).sort((a, b) => layer.candidates[a].bytes - layer.candidates[b].bytes);
      const traces = [{ ...at(best), mode: "lines", name: "hull", hoverinfo: "skip", hovertemplate: undefined, line: { color: colour("quiet"), width: 1.5 } }];
      for (const method of ["dense", ...methods]) {
        const mine = index.filter((i) => layer.candidates[i].method === method);
        if (mine.length) traces.push({ ...at(mine), mode: "markers", name: method, marker: { size: 7, color: method === "dense" ? colour("muted") : colour("c" + [0, 2, 3, 4, 5][methods.indexOf(method) % 5]), symbol: ["circle", "triangle-up", "square", "cross"][Math.max(0, methods.indexOf(method)) % 4] } });
      }
      traces.push({ ...at([layer.place]), mode: "markers", name: "chosen", marker: { symbol: "diamond", size: 12, color: colour("c1") } });
      const values = layer.candidates.map((x) => x.bytes);
      Plotly.react(box, traces, layout(240, { showlegend: true, legend: { x: 1, y: 1, xanchor: "right", yanchor: "top", bgcolor: "rgba(0,0,0,0)" }, xaxis: { ...axisStyle("bytes in the file"), ...ticks(values, short, box.clientWidth < 420 ? 4 : 6) }, yaxis: { ...axisStyle("relative error"), rangemode: "tozero" } }), config);
    },
    relevance(box, layer) {
      if (!layer.relevance.length) return (box.textContent = "Not known.");
      const sides = ["rows (inputs)", "columns (outputs)"];
      const traces = layer.relevance.flatMap((scores, side) => {
        const order = scores.map((_, i) => i).sort((a, b) => scores[b] - scores[a]);
        const step = Math.max(1, Math.ceil(order.length / 800));
        const bits = layer.kept ? layer.kept[side] : null;
        const groups = bits ? [["1", "full rank", "c0"], ["0", "shortened", "c5"]] : [[null, "all alike", "c0"]];
        return groups.map(([bit, words, key]) => {
          const mine = order.map((neuron, place) => [place, neuron]).filter(([place, neuron]) => place % step === 0 && (bit === null || bits[neuron] === bit));
          return { x: mine.map(([place]) => place + 1), y: mine.map(([, neuron]) => scores[neuron]), text: mine.map(([, neuron]) => `neuron ${neuron}: ${words}`), yaxis: side ? "y2" : "y", xaxis: side ? "x2" : "x", mode: "markers", cliponaxis: false,
            marker: { size: 4, color: colour(key), opacity: bit === "0" ? 0.65 : 1 }, name: words, showlegend: side === 0, hovertemplate: `${sides[side]}, %{text}<br>relevance %{y:.4g}<extra></extra>` };
        });
      });
      const axes = (side) => ({ ...axisStyle(sides[side]), domain: side ? [0.58, 1] : [0, 0.42], anchor: side ? "y2" : "y", nticks: 4 });
      Plotly.react(box, traces, layout(240, { showlegend: layer.kept !== null, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" }, xaxis: axes(0), xaxis2: axes(1), yaxis: { ...axisStyle("relevance"), rangemode: "tozero" }, yaxis2: { ...axisStyle(""), anchor: "x2", rangemode: "tozero" } }), config);
    },
    kept(box, layer) {
      box.replaceChildren();
      const words = (kind, text) => {
        const node = document.createElement("div");
        node.className = kind;
        node.textContent = text;
        return node;
      };
      if (!layer.kept) return box.append(words("", ""), words("", layer.rank ? `This form treats all neurons alike: every row and column has rank ${layer.rank}.` : ["dense", "rtn"].includes(layer.method) ? "The layer is dense: every row and column is whole." : "This form has no ranks."));
      const canvas = document.createElement("canvas");
      const sharp = Math.max(1, devicePixelRatio || 1); // one dot of the screen is one part, so that nothing flickers
      const [rows, columns] = [206, Math.max(60, box.clientWidth - 28)].map((room, side) => shares(layer.kept[side], Math.round(room * sharp)));
      canvas.width = columns.length;
      canvas.height = rows.length;
      canvas.style.imageRendering = "pixelated";
      const shades = ["quiet", "half", "c0"].map((name) => colour(name).match(/[0-9a-f]{2}/gi).map((part) => parseInt(part, 16)));
      const image = new ImageData(columns.length, rows.length);
      rows.forEach((row, i) => columns.forEach((column, j) => {
        const parts = [(1 - row) * (1 - column), row * (1 - column) + (1 - row) * column, row * column];
        for (let c = 0; c < 3; c++) image.data[4 * (i * columns.length + j) + c] = parts[0] * shades[0][c] + parts[1] * shades[1][c] + parts[2] * shades[2][c];
        image.data[4 * (i * columns.length + j) + 3] = 255;
      }));
      canvas.getContext("2d").putImageData(image, 0, 0);
      const count = (side) => `${[...layer.kept[side]].filter((bit) => bit === "1").length} of ${layer.kept[side].length}`;
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `rows at full rank: ${count(0)}; columns: ${count(1)}`);
      const legend = words("legend", "");
      for (const [key, text] of [["c0", `both kept: rank ${layer.rank}`], ["half", "one kept"], ["quiet", `neither: rank ${layer.reduced_rank}`]]) {
        const item = document.createElement("span"), swatch = document.createElement("i");
        swatch.style.background = colour(key);
        item.append(swatch, text);
        legend.append(item);
      }
      box.append(words("side", `rows: ${count(0)} kept`), canvas, words("below", `columns: ${count(1)} kept`), legend);
    },
  };

  // The share of ones in at most `most` equal parts of a string of bits
  function shares(bits, most) {
    const parts = Math.min(bits.length, most);
    return Array.from({ length: parts }, (_, part) => {
      const mine = bits.slice(Math.floor((part * bits.length) / parts), Math.floor(((part + 1) * bits.length) / parts));
      return [...mine].filter((bit) => bit === "1").length / mine.length;
    });
  }

  const drawLayer = (box) => box.querySelectorAll("[data-chart]").forEach((node) => charts[node.dataset.chart](node, layers[box.dataset.layer]));
  const drawAll = () => {
    drawCurve();
    document.querySelectorAll("details.layer[open]").forEach(drawLayer);
  };

  pick(chosen);
  drawAll();
  el("curve").on("plotly_click", (event) => pick(event.points[0].customdata));
  el("step").addEventListener("input", (event) => pick(Number(event.target.value)));
  document.querySelectorAll("details.layer").forEach((box) => box.addEventListener("toggle", () => box.open && drawLayer(box)));
  document.querySelectorAll("[data-axis]").forEach((button) => button.addEventListener("click", () => {
    axis = button.dataset.axis;
    document.querySelectorAll("[data-axis]").forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
    drawCurve();
  }));
  el("copy").addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(el("command").textContent);
      el("copy").textContent = "Copied";
      setTimeout(() => (el("copy").textContent = "Copy"), 1500);
    } catch {
      getSelection().selectAllChildren(el("command"));
    }
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) requestAnimationFrame(drawAll);
    width = innerWidth;
  });
})();
