"""``slrprop compare``: every method at equal stored bytes."""

import importlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from slrprop.checks import need_extra
from slrprop.errors import SlrpropError
from slrprop.files import made_folder, together
from slrprop.research import module
from slrprop.research.paper.commands import Database, DataFolder, Rows, Seeds
from slrprop.terminal import Cluster, Json, Quiet, Workers, show_json, show_table

GROUPS = ("fast", "slow", "all")


def chosen(text: str, slow: dict[str, bool]) -> set[str]:
    """The contenders that a list names; a name may have commas in it, so the longest that fits is taken.

    Args:
        text: names and groups (``fast``, ``slow``, ``all``) with commas between.
        slow: every contender, and whether it is slow.

    Raises:
        SlrpropError: a part is neither a name nor a group.
    """
    parts, found = [part.strip() for part in text.split(",")], set()
    while parts:
        fitting = [end for end in range(len(parts), 0, -1) if ", ".join(parts[:end]) in (*slow, *GROUPS)]
        if not fitting:
            raise SlrpropError(
                f"no contender begins with '{parts[0]}'; there are {', '.join(GROUPS)}, or names: {'; '.join(slow)}"
            )
        name, parts = ", ".join(parts[: fitting[0]]), parts[fitting[0] :]
        found |= {other for other in slow if name in (other, "all", "slow" if slow[other] else "fast")}
    return found


def compare(
    name: Annotated[
        str,
        typer.Argument(
            help="lenet5-mnist, lenet300-mnist, room-mlp, vgg16-cifar10, vgg16-cifar100 or resnet20-cifar10",
            show_default=False,
        ),
    ],
    sizes: Annotated[
        str, typer.Option("--bytes", help="Stored bytes of the treated layers: 4.4kB, or shares of the original's.")
    ] = "1%,2%,4%,8%,16%,32%",
    seeds: Seeds = 10,
    contenders: Annotated[str, typer.Option(help="fast, slow, all, or names with commas between.")] = "all",
    data: DataFolder = None,
    run_dir: Annotated[Path, typer.Option("--run-dir", help="Folder for trained networks and results.")] = Path(
        "runs/compare"
    ),
    output: Annotated[
        Path | None, typer.Option("--output", help="Also write NAME.csv, NAME.md, NAME.png and NAME.svg here.")
    ] = None,
    database: Database = None,
    rows: Rows = None,
    workers: Workers = 1,
    cluster: Cluster = None,
    table_only: Annotated[bool, typer.Option("--table-only", help="Compute nothing; show what there is.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compress a network by every contender at equal stored bytes; a second call goes on where the first one stopped.

    Latencies of several workers disturb each other: measure those of the first seed with one.

    Example: slrprop compare lenet5-mnist --bytes 1%,4.4kB,8% --contenders fast --output docs/comparison
    """
    store = module("store").Store
    need_extra("matplotlib", "research")
    experiments = module("experiments")
    experiment = experiments.find_experiment(name, experiments.COMPARED)
    run = module("comparison.run")
    limits = [size.strip() for size in sizes.split(",")]
    for size in limits:
        importlib.import_module("slrprop.search.result").parse_size(size, 1e9, "--bytes")
    names = chosen(contenders, {contender.name: contender.slow for contender in run.CONTENDERS})
    path = run_dir / "results.sqlite"
    if table_only and database is None and rows is None and not path.exists():
        raise SlrpropError(f"there is no '{path}' to show results from")
    kept = store(database or path, run.Comparison, run.KEYS)
    if rows is not None:
        kept.take_in(rows, name)
    if not table_only:
        loaded = experiment.load_data(data)
        run.compare(
            experiment, loaded, run_dir, limits, seeds, kept, lambda contender: contender.name in names,
            workers=workers, cluster=cluster,
        )  # fmt: skip
    tables = module("comparison.results")
    results = tables.Results(experiment, kept.results(name))
    if as_json:
        show_json([asdict(row) for row in results.rows])
    else:
        lines = tables.accuracy_table(results, plain=True)
        show_table(
            lines[0], lines[1:], f"{name}: test accuracy, %; * best, {tables.NEAR} within one standard error of it"
        )
    if output is not None:
        written = write(results, output)
        if not as_json:
            typer.echo(f"Written: {', '.join(map(str, written))}")


def write(results: Any, folder: Path) -> list[Path]:
    """Write a network's rows, page and figures."""
    tables = module("comparison.results")
    name = results.experiment.name
    paths = [made_folder(folder) / f"{name}.{kind}" for kind in ("csv", "md", "png", "svg")]
    files = module("tables")
    verdicts = module("comparison.verdict").verdict(results)
    drawn = module("comparison.figure").figure(results)
    with together():
        files.write_csv(results.rows, paths[0])
        tables.write(paths[1], tables.page(results, verdicts))
        for path in paths[2:]:
            files.save_figure(drawn, path)
    return paths
