"""The experiments: which network on which data, which layers, which ranks, and how it is trained."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn

from slrprop.errors import SlrpropError
from slrprop.files import made_folder, replacing
from slrprop.parallel import each
from slrprop.research import require_seen
from slrprop.research.datasets import DATASETS, Dataset
from slrprop.research.networks import VGG16, Headed, LeNet5, LeNet300, ResNet8, ResNet20, RoomMLP
from slrprop.research.training import Recipe, Trainer, cropped, cut_out, shifted, write_log
from slrprop.search.path import LEVELS


@dataclass(frozen=True)
class Experiment:
    """One network of the articles on its data set.

    ``layers`` are the layer before the FRL and the FRL, of a ``whole`` network all that hold a weight; ``calibration`` is the number of
    training samples that the scores see. ``trainings``: how many networks the seeds share, where each is not to have its own. ``levels``: those of
    the product's own choice that the sweep has too, at the bytes of SLR.
    """

    name: str
    dataset: str
    network: Callable[..., Headed]
    layers: tuple[str, ...]
    ranks: tuple[int, ...]
    calibration: int
    recipe: Recipe
    trainings: int | None = None
    levels: tuple[str, ...] = ()
    whole: bool = False

    def training(self, seed: int) -> int:
        """The seed that a seed's network was trained from."""
        return seed if self.trainings is None else seed % self.trainings

    def stored(self, model: nn.Module) -> tuple[int, int]:
        """Bytes and numbers of the two layers as they are saved."""
        tensors = [tensor for name in self.layers for tensor in model.get_submodule(name).state_dict().values()]
        return sum(tensor.nbytes for tensor in tensors), sum(tensor.numel() for tensor in tensors)

    def untrained_head(self) -> nn.Module:
        """The head without numbers, for its shapes."""
        with torch.device("meta"):
            return self.network().head()

    @property
    def wide(self) -> bool:
        """Whether one of the layers has thousands of neurons on both sides."""
        head = self.untrained_head()
        return max(min(head.get_parameter(f"{name}.weight").shape) for name in self.layers) > 2048

    @property
    def tries(self) -> int:
        """Evaluations per size that every method has to share its bytes among the layers."""
        return 2 if self.wide else 4

    def load_data(self, folder: str | Path | None = None) -> Dataset:
        """Read or download the data set."""
        return DATASETS[self.dataset](folder)


VGG = Recipe(
    epochs=36, batch=128, learning_rate=0.1, weight_decay=5e-4, momentum=0.9, smoothing=0.1, augment=cut_out,
    convolutional=True,
)  # fmt: skip
LENET = Recipe(epochs=15, batch=64, learning_rate=3e-3, augment=shifted)
ROOM = Recipe(epochs=4, batch=64, learning_rate=1e-4)
EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment("lenet5-mnist", "mnist", LeNet5, ("fc3", "fc4"), (2, 4, 8, 16, 32), 10_000, LENET),
        Experiment("room-mlp", "room", RoomMLP, ("fc2", "fc3"), (2, 4, 8, 16), 1_000, ROOM),
        Experiment("vgg16-cifar10", "cifar10", VGG16, ("fc6", "fc7"), (2, 4, 8, 16, 32, 64), 10_000, VGG, 1, tuple(LEVELS)),
        Experiment("vgg16-cifar100", "cifar100", partial(VGG16, 100), ("fc6", "fc7"), (2, 4, 8, 16, 32, 64), 10_000, VGG, 1, tuple(LEVELS)),
    )
}  # fmt: skip
LENET300 = Experiment(
    "lenet300-mnist", "mnist", LeNet300, ("fc1", "fc2"), (), 10_000, Recipe(epochs=10, batch=64, learning_rate=2e-3)
)


def residual(name: str, network: Callable[..., Headed], blocks: list[str], epochs: int) -> Experiment:
    """A residual network on CIFAR-10; ``blocks`` with two convolutions each, those of a new stage with a third one around them."""
    layers = [f"{block}.conv{turn}" for block in blocks for turn in (1, 2)]
    with torch.device("meta"):
        around = [name for name, part in network().named_modules() if name.endswith("downsample.0")]
    recipe = Recipe(epochs=epochs, batch=128, learning_rate=0.2, weight_decay=5e-4, momentum=0.9, augment=cropped, convolutional=True)  # fmt: skip
    return Experiment(name, "cifar10", network, ("conv1", *layers, *around, "fc"), (), 512, recipe, 1, whole=True)


RESNET20 = residual(
    "resnet20-cifar10", ResNet20, [f"layer{stage}.{turn}" for stage in (1, 2, 3) for turn in range(3)], 48
)
RESNET8 = residual("resnet8-cifar10", ResNet8, ["layer1.0", "layer2.0", "layer3.0"], 8)
TRAINED = EXPERIMENTS | {experiment.name: experiment for experiment in (RESNET20, RESNET8)}
COMPARED = EXPERIMENTS | {
    LENET300.name: LENET300,
    RESNET20.name: RESNET20,
}  # with what other articles than SLRProp's measure on


def find_experiment(name: str, among: Mapping[str, Experiment] = EXPERIMENTS) -> Experiment:
    """The experiment of that name, or an error that lists the names."""
    if name not in among:
        raise SlrpropError(f"no experiment is called '{name}'; there are {', '.join(among)}")
    return among[name]


def trained(experiment: Experiment, seed: int, data: Dataset, folder: Path, device: str = "cpu") -> Headed:
    """The experiment's network trained from ``seed``; read from ``folder`` if it was trained there before.

    Where an epoch takes minutes, what is finished of a training is kept there too and gone on from.
    """
    path = weights_of(experiment, seed, folder)
    seed = experiment.training(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = experiment.network()
        if path.exists():
            model.load_state_dict(load_file(path))
            return model.eval()
        made_folder(folder)
        checkpoint = path.with_suffix(".part") if experiment.recipe.convolutional else None
        trainer = Trainer(model, experiment.recipe, len(data.x_train), checkpoint, device)
        trainer.run(data, f"{experiment.name} seed {seed}")
    with replacing(path) as part:
        part.write_bytes(save(model.state_dict()))
    write_log(trainer.log, path.with_suffix(".csv"))
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return model


def train_missing(
    experiment: Experiment,
    seeds: Iterable[int],
    data: Dataset,
    folder: Path,
    workers: int = 1,
    cluster: str | None = None,
) -> None:
    """Train from the seeds that were not trained from before, each once.

    Raises:
        SlrpropError: a machine of the cluster has trained, and its file is not seen here.
    """
    wanted = dict.fromkeys(experiment.training(seed) for seed in seeds)
    missing = [seed for seed in wanted if not weights_of(experiment, seed, folder).exists()]
    for seed, _ in each(_train, missing, (experiment, data, folder), workers, cluster):
        require_seen(weights_of(experiment, seed, folder))


def _train(seed: int, experiment: Experiment, data: Dataset, folder: Path) -> None:
    trained(experiment, seed, data, folder)


def weights_of(experiment: Experiment, seed: int, folder: Path) -> Path:
    """Where the trained weights are kept."""
    return folder / f"{experiment.name}-seed{experiment.training(seed)}.safetensors"
