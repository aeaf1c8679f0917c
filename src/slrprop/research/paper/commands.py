"""``slrprop paper``: the experiments of the SLRProp article."""

import importlib
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from slrprop.checks import need_extra, require_choice
from slrprop.errors import SlrpropError
from slrprop.files import holding, made_folder, replacing, together
from slrprop.research import module
from slrprop.terminal import Cluster, Json, Quiet, Workers, show_json, show_table

STUDIES = {"spiking-mnist": "spiking_study", "interpret-room": "interpret_study"}  # their modules

paper = typer.Typer(
    no_args_is_help=True,
    help="The experiments of the SLRProp article (Sensors 23(5):2718, 2023), and of two other fields.",
)

Name = Annotated[str, typer.Argument(help="lenet5-mnist, room-mlp, vgg16-cifar10 or vgg16-cifar100")]
AnyName = Annotated[
    str, typer.Argument(help=f"lenet5-mnist, room-mlp, vgg16-cifar10, vgg16-cifar100, {' or '.join(STUDIES)}")
]
DataFolder = Annotated[
    Path | None, typer.Option("--data", help="Folder with the data sets; default: $SLRPROP_DATA, else downloaded.")
]
Output = Annotated[Path, typer.Option("--output", help="Folder to write to.")]
RunFolder = Annotated[Path, typer.Option("--run-dir", help="Folder for trained networks and results.")]
Database = Annotated[
    str | None,
    typer.Option("--database", help="postgresql://... (extra postgresql), or an SQLite file; default: in --run-dir."),
]
Rows = Annotated[
    Path | None,
    typer.Option(
        "--rows", help="Go on from the rows in a NAME.csv that --output wrote; the networks must be the same."
    ),
]
Seeds = Annotated[
    int, typer.Option("--seeds", min=1, help="How many: each draws its samples and trains (VGG16: once).")
]
FIGURES = {
    "lenet5-mnist": ("figure4", "LeNet-5 on MNIST (Figure 4)"),
    "room-mlp": ("figure5", "Room occupancy, MLP (Figure 5)"),
    "vgg16-cifar10": ("figure2", "VGG16 on CIFAR-10 (Figure 2)"),
    "vgg16-cifar100": ("figure3", "VGG16 on CIFAR-100 (Figure 3)"),
}


@paper.command("train")
def paper_train(
    name: Annotated[
        str,
        typer.Argument(
            help="lenet5-mnist, room-mlp, vgg16-cifar10, vgg16-cifar100, resnet20-cifar10 or resnet8-cifar10"
        ),
    ],
    seeds: Seeds = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")] = "auto",
    data: DataFolder = None,
    run_dir: RunFolder = Path("runs/paper"),
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train the network of an experiment; where that is long, a second call goes on after the last finished epoch.

    Example: slrprop paper train vgg16-cifar10
    """
    require_choice("device", device, ("auto", "cpu", "cuda"))
    experiments = module("experiments")
    training = module("training")
    experiment = experiments.find_experiment(name, experiments.TRAINED)
    loaded = experiment.load_data(data)
    told = []
    for seed in dict.fromkeys(map(experiment.training, range(seeds))):
        model = experiments.trained(experiment, seed, loaded, run_dir, training.device_of(device))
        path = experiments.weights_of(experiment, seed, run_dir)
        found = importlib.import_module("slrprop.measure").measure(model, (loaded.x_test, loaded.y_test))
        told.append({"seed": seed, "accuracy": found.accuracy, "file": str(path), "sha256": training.digest(path)})
        if not as_json:
            typer.echo(f"seed {seed}: {found.accuracy:.2f} % of the test set; {path}, SHA-256 {told[-1]['sha256']}")
    if as_json:
        show_json(told)


@paper.command("run")
def paper_run(
    name: AnyName,
    seeds: Seeds = 10,
    methods: Annotated[
        list[str] | None, typer.Option("--method", help="Only this one, like 'slr cost'; can be given several times.")
    ] = None,
    data: DataFolder = None,
    run_dir: RunFolder = Path("runs/paper"),
    database: Database = None,
    rows: Rows = None,
    workers: Workers = 1,
    cluster: Cluster = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train, and sweep methods and ranks; a second call goes on where the first one stopped.

    Example: slrprop paper run lenet5-mnist --seeds 10 --workers 4
    """
    store = _store(name, run_dir, database)
    if name in STUDIES:
        study = module(STUDIES[name])
        load, run = module("datasets").DATASETS[study.DATASET], study.run
    else:
        experiment, sweep = module("experiments").find_experiment(name), module("paper.run")
        sweep.methods_of(experiment, methods or ())  # a wrong name is told before the work
        load, run = experiment.load_data, partial(sweep.run, experiment)
    if rows is not None:
        store.take_in(rows, name)
    new = run(load(data), run_dir, seeds=seeds, store=store, workers=workers, cluster=cluster, methods=methods or ())
    count = len(store.results(name))
    told = {"experiment": name, "new": new, "rows": count, "database": store.name}
    show_json(told) if as_json else typer.echo(f"{new} new rows; all {count} of {name} are in {store.name}")


def _store(name: str, run_dir: Path, database: str | None) -> Any:
    """What holds the rows of the sweep, or of a study."""
    place = database or run_dir / "results.sqlite"
    if name not in STUDIES:
        return module("paper.run").paper_store(place)
    study = module(STUDIES[name])
    return module("store").Store(place, study.ROW, study.KEYS)


def _results(name: str, run_dir: Path, database: str | None) -> tuple[Any, Any, Any]:
    results = module("paper.results")
    experiment = module("experiments").find_experiment(name)
    return experiment, _store(name, run_dir, database).results(name), results


@paper.command("table")
def paper_table(
    name: AnyName,
    output: Annotated[Path | None, typer.Option(help="Also write NAME.csv and NAME.md here.")] = None,
    run_dir: RunFolder = Path("runs/paper"),
    database: Database = None,
    as_json: Json = False,
) -> None:
    """Print our figures, mean ± deviation over seeds, and the published ones in brackets.

    Of spiking-mnist and interpret-room the figures are written too.

    Example: slrprop paper table room-mlp --output docs/paper
    """
    if name in STUDIES:
        _show_study(name, output, run_dir, database, as_json)
        return
    experiment, found, results = _results(name, run_dir, database)
    lines = results.table(experiment, found)
    if as_json:
        show_json([asdict(result) for result in found])
    else:
        title = f"{name}: test set, % (published in brackets); rate: compression rate of {experiment.layers[0]}"
        show_table(lines[0], lines[1:], title)
    if output is not None:
        with together():
            module("tables").write_csv(found, made_folder(output) / f"{name}.csv")
            with replacing(output / f"{name}.md", holding("| " + " | ".join(lines[0]))) as part:
                part.write_text(module("tables").markdown(lines))


@paper.command("figures")
def paper_figures(
    output: Output = Path("docs/paper"),
    run_dir: RunFolder = Path("runs/paper"),
    database: Database = None,
    as_json: Json = False,
) -> None:
    """Draw the article's figures of all experiments that there are results of, as PNG and SVG.

    Example: slrprop paper figures --output docs/paper
    """
    need_extra("matplotlib", "research")
    made_folder(output)
    written = []
    with together():
        for name, (file, title) in FIGURES.items():
            experiment, found, results = _results(name, run_dir, database)
            if not found:
                continue
            drawn = results.figure(experiment, found, title)
            for kind in ("png", "svg"):
                path = output / f"{file}.{kind}"
                module("tables").save_figure(drawn, path)
                written.append(str(path))
    if not written:
        raise SlrpropError(f"there are no results yet; compute them with: slrprop paper run {next(iter(FIGURES))}")
    show_json(written) if as_json else typer.echo(f"Written: {', '.join(written)}")


def _show_study(name: str, output: Path | None, run_dir: Path, database: str | None, as_json: bool) -> None:
    """Print a study's page; write its rows, page and figures."""
    need_extra("matplotlib", "research")
    study, found = module(STUDIES[name]), _store(name, run_dir, database).results(name)
    if not found:
        raise SlrpropError(f"there are no results of {name} yet; compute them with: slrprop paper run {name}")
    page = study.page(found)
    show_json([asdict(row) for row in found]) if as_json else typer.echo(page)
    if output is not None:
        tables = module("tables")
        with together():
            tables.write_csv(found, made_folder(output) / f"{name}.csv")
            with replacing(output / f"{name}.md", holding(page.splitlines()[0])) as part:
                part.write_text(page)
            for file, drawn in study.figures(found, run_dir).items():
                for kind in ("png", "svg"):
                    tables.save_figure(drawn, output / f"{file}.{kind}")
