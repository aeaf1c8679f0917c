"""The comparison's rows as tables: who keeps how much of the original in how many bytes."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from slrprop.errors import SlrpropError
from slrprop.files import holding, replacing
from slrprop.research.comparison.contenders import CONTENDERS, ORIGINAL
from slrprop.research.comparison.run import SLOW_SEEDS, Comparison
from slrprop.research.experiments import Experiment
from slrprop.research.tables import markdown, plus_minus
from slrprop.tune import EPOCHS, LEAST_STEPS

LEVELS = ("weights", "calibrated", "tuned", "trained")
KNOWN = {contender.name: contender for contender in CONTENDERS}
NEAR = "≈"  # marks what is within one standard error of the best
NONE = "-"


@dataclass(frozen=True)
class Lead:
    """Points of accuracy or agreement by which one contender is ahead of another: mean of the per-seed differences, its error."""

    points: float
    error: float
    seeds: int

    @property
    def clear(self) -> bool:
        """Ahead by more than one standard error; as much (all by one seed, say) is not more."""
        return self.points > self.error and not math.isclose(self.points, self.error, rel_tol=1e-6)

    def __str__(self) -> str:
        return f"{abs(self.points):.2f}" + (f" ± {self.error:.2f}" if self.seeds > 1 else " (one seed)")


class Results:
    """One network's rows by contender, size and seed; contenders in their order, those that no longer exist left out.

    Raises:
        SlrpropError: there are no rows of it.
    """

    def __init__(self, experiment: Experiment, rows: Iterable[Comparison]) -> None:
        self.experiment = experiment
        self.rows = [row for row in rows if row.experiment == experiment.name]
        self.originals = {row.seed: row for row in self.rows if row.method == ORIGINAL}
        self.cells: dict[tuple[str, int], dict[int, Comparison]] = {}
        for row in self.rows:
            if row.method in KNOWN and row.seed in self.originals:
                self.cells.setdefault((row.method, row.size), {})[row.seed] = row
        if not self.cells:
            raise SlrpropError(
                f"there are no results of {experiment.name} yet; compute them with: slrprop compare {experiment.name}"
            )
        self.total = next(iter(self.originals.values())).bytes
        self.sizes = sorted({size for _, size in self.cells})
        measured = {name for name, _ in self.cells}
        self.names = [name for level in LEVELS for name in KNOWN if name in measured and KNOWN[name].level == level]

    @cached_property
    def most(self) -> int:
        """The most seeds that any cell has."""
        return max(map(len, self.cells.values()))

    def least(self, size: int) -> int:
        """Seeds that a cell needs to be judged: as many as slow contenders have, where any has them at this size."""
        return min(SLOW_SEEDS, max(len(self.cell(name, size)) for name in self.names))

    def cell(self, name: str, size: int) -> dict[int, Comparison]:
        """Rows by seed; empty where the contender can't reach the size."""
        return self.cells.get((name, size), {})

    def lost(self, name: str, size: int) -> float:
        """Mean points of accuracy lost from the original of the same seed."""
        rows = self.cell(name, size)
        return statistics.mean(self.originals[seed].accuracy - row.accuracy for seed, row in rows.items())

    def reaching(self, size: int, levels: Iterable[str] = LEVELS) -> list[str]:
        """The contenders of these levels whose rows at the size can be judged."""
        least = self.least(size)
        return [name for name in self.names if KNOWN[name].level in levels and len(self.cell(name, size)) >= least]

    def best(self, size: int, names: Iterable[str]) -> str | None:
        """Who loses fewest points (against the originals of its own seeds, as not all have the same seeds)."""
        judged = set(self.reaching(size))
        known = [name for name in names if name in judged]
        return min(known, key=lambda name: self.lost(name, size)) if known else None

    def lead(self, first: str, second: str, size: int, what: str = "accuracy") -> Lead | None:
        """By how much the first is ahead, over the seeds that both have; None where there are none.

        Args:
            what: ``accuracy``, or ``agreement`` with the original.
        """
        one, other = self.cell(first, size), self.cell(second, size)
        apart = [getattr(one[seed], what) - getattr(other[seed], what) for seed in one if seed in other]
        if not apart:
            return None
        error = statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else 0.0
        return Lead(statistics.mean(apart), error, len(apart))

    def near(self, name: str, size: int, best: str) -> bool:
        """Whether a contender is not clearly behind the best."""
        lead = self.lead(best, name, size)
        return lead is not None and not lead.clear

    @cached_property
    def frontier(self) -> list[str]:
        """Who is the best of a level, or near the best of all, at some size; plain SVD and the product's own choices."""
        chosen = {name for name in self.names if name == "SVD" or name.startswith("auto")}
        for size in self.sizes:
            best = self.best(size, self.names)
            chosen |= {name for name in self.reaching(size) if best is not None and self.near(name, size, best)}
            chosen |= {self.best(size, self.reaching(size, (level,))) or "" for level in LEVELS}
        return [name for name in self.names if name in chosen]


def amount(count: float) -> str:
    """Bytes in three digits."""
    scaled, unit = (count / 1e6, "MB") if count >= 1e6 else (count / 1e3, "kB")
    return f"{scaled:.{0 if scaled >= 100 else 1}f} {unit}"


def title(name: str) -> str:
    """A contender's name, and whether only the file gets smaller."""
    return name if KNOWN[name].faster else f"{name} (size only: no faster)"


def _grouped(names: list[str], cells: dict[str, list[str]], header: list[str]) -> list[list[str]]:
    """Header and one line per contender, the level's name on the first of its lines."""
    lines, before = [["level", "contender", *header]], ""
    for name in names:
        level = KNOWN[name].level
        lines.append([level if level != before else "", title(name), *cells[name]])
        before = level
    return lines


def _columns(results: Results) -> list[str]:
    return [f"{amount(size)} ({100 * size / results.total:.2g} %)" for size in results.sizes]


def accuracy_table(results: Results, plain: bool = False) -> list[list[str]]:
    """Accuracy per contender and size: the best bold, the best of its level in italics, those near the best marked.

    Args:
        plain: without Markdown; the best is marked with ``*``.
    """
    cells: dict[str, list[str]] = {name: [] for name in results.names}
    for size in results.sizes:
        best = results.best(size, results.names)
        leaders = {results.best(size, results.reaching(size, (level,))) for level in LEVELS}
        for name in results.names:
            rows = results.cell(name, size)
            if not rows or best is None:
                cells[name].append(NONE)
                continue
            text = plus_minus([row.accuracy for row in rows.values()])
            if name == best:
                text = f"{text} *" if plain else f"**{text}**"
            else:
                text = f"*{text}*" if name in leaders and not plain else text
                text += f" {NEAR}" if results.near(name, size, best) else ""
            few = f" ({count_of(len(rows))})" if len(rows) < results.most else ""
            cells[name].append(text + few)
    lines = _grouped(results.names, cells, _columns(results))
    accuracy = plus_minus([row.accuracy for row in results.originals.values()])
    return [lines[0], ["", f"original, {amount(results.total)}", *[accuracy] * len(results.sizes)], *lines[1:]]


def answers_table(results: Results) -> list[list[str]]:
    """Agreement with the original and mean loss, of those on or near the frontier."""
    cells = {name: [_answers(results.cell(name, size)) for size in results.sizes] for name in results.frontier}
    return _grouped(results.frontier, cells, _columns(results))


def _answers(rows: dict[int, Comparison]) -> str:
    if not rows:
        return NONE
    return f"{statistics.mean(row.agreement for row in rows.values()):.2f} / {statistics.mean(row.loss for row in rows.values()):.4f}"


def files_table(results: Results) -> list[list[str]]:
    """Of the first seed that files were measured on: file, latency and times faster; median seconds to compress."""
    cells: dict[str, list[str]] = {}
    for name in results.frontier:
        rows = [row for size in results.sizes for row in results.cell(name, size).values()]
        seconds = f"{statistics.median(row.seconds for row in rows):.1f}"
        cells[name] = [seconds, *(_files(results.cell(name, size)) for size in results.sizes)]
    return _grouped(results.frontier, cells, ["seconds", *_columns(results)])


def _files(rows: dict[int, Comparison]) -> str:
    for _, row in sorted(rows.items()):
        if not math.isnan(row.latency):
            return (
                f"{amount(row.file_bytes)}, {1e6 * row.latency:.0f} µs, {row.faster:.{2 if row.faster < 10 else 0}f}x"
            )
    return NONE


def count_of(seeds: int) -> str:
    """``"1 seed"``, ``"3 seeds"``."""
    return f"{seeds} seed{'s' * (seeds != 1)}"


def measured_seeds(results: Results) -> str:
    """The seeds that files were measured on, in words."""
    seeds = sorted({row.seed for row in results.rows if not math.isnan(row.latency)})
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" if seeds else "no seed"


def absent(results: Results) -> str:
    """Which contenders have no row, in one sentence; empty if none."""
    missing = [contender.name for contender in CONTENDERS if contender.name not in results.names]
    return f"No row: {'; '.join(missing)}." if missing else ""


def page(results: Results, verdicts: list[tuple[str, list[str]]]) -> str:
    """The network's page: verdict, figure and tables, every number from the rows."""
    experiment, name = results.experiment, results.experiment.name
    original = next((row for row in results.originals.values() if not math.isnan(row.latency)), None)
    file = f"; the original's file: {amount(original.file_bytes)}, {1e6 * original.latency:.0f} µs" if original else ""
    layers = "all layers" if experiment.whole else " and ".join(experiment.layers)
    few = ", fewer where the table says so" if len(results.originals) > SLOW_SEEDS else ""
    parts = [
        f"# {name}: every contender at equal stored bytes",
        f"Written by `slrprop compare {name} --output`. How it is measured: [the comparison](README.md). Every row: [{name}.csv]({name}.csv).",
        f"Treated: {layers}, {amount(results.total)} in float32 with biases. {count_of(len(results.originals))}{few}; "
        f"calibration on {experiment.calibration:,} training samples; at most {experiment.tries} measured alternatives per size"
        + ("." if experiment.whole else f"; tuned: {EPOCHS} epochs of distillation, at least {LEAST_STEPS:,} steps."),
        "## Verdict",
        "Points of accuracy; ± is the standard error of the per-seed differences, over the seeds that both have.",
        *("\n\n".join((f"**{heading}**", "\n".join(f"- {line}" for line in lines))) for heading, lines in verdicts),
        f"![Accuracy lost against stored bytes, {name}]({name}.png)",
        "## Accuracy on the test set, %",
        f"Mean ± standard deviation over {count_of(results.most)} where no other number is given. Bold: the best of the column, by what is lost from the originals of the "
        f"same seeds; {NEAR}: within one standard error of it (paired by seed); italics: the best of its level; {NONE}: too small a size for it. "
        + f"Contenders of fewer than {count_of(SLOW_SEEDS)} are shown and not judged where others have as many."
        * (results.most >= SLOW_SEEDS),
        markdown(accuracy_table(results)).rstrip(),
        absent(results),
        "## Agreement with the original, % / mean loss",
        f"Means, of those on or near the frontier. The original's loss: {statistics.mean(row.loss for row in results.originals.values()):.4f}.",
        markdown(answers_table(results)).rstrip(),
        "## File, latency, times faster",
        f"Of the whole network's ONNX file, batch 1, one thread, on {measured_seeds(results)}{file}. Seconds to compress: median over sizes and seeds.",
        markdown(files_table(results)).rstrip(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path, holding("Written by `slrprop compare")) as part:
        part.write_text(text)
