"""The experiments: which network on which data, which layers, which ranks, and how it is trained."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm.auto import tqdm

from slrprop.errors import SlrpropError
from slrprop.files import replacing
from slrprop.paper.datasets import DATASETS, Dataset
from slrprop.paper.networks import Headed, LeNet5, LeNet300, RoomMLP


def shifted(images: Tensor) -> Tensor:
    """Move a batch of images by one random offset of up to 2 pixels (the border is blank)."""
    dx, dy = torch.randint(-2, 3, (2,)).tolist()
    return images.roll((dx, dy), (2, 3))


@dataclass(frozen=True)
class Experiment:
    """One network of the article on its data set.

    ``layers`` are the layer before the FRL and the FRL; ``calibration`` is the number of training samples that
    the scores see.
    """

    name: str
    dataset: str
    network: Callable[..., Headed]
    layers: tuple[str, str]
    ranks: tuple[int, ...]
    calibration: int
    epochs: int
    batch: int
    learning_rate: float
    augment: Callable[[Tensor], Tensor] | None = None

    def load_data(self, folder: str | Path | None = None) -> Dataset:
        """Read or download the data set."""
        return DATASETS[self.dataset](folder)


EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment("lenet5-mnist", "mnist", LeNet5, ("fc3", "fc4"), (2, 4, 8, 16, 32), 10_000, 15, 64, 3e-3, shifted),
        Experiment("room-mlp", "room", RoomMLP, ("fc2", "fc3"), (2, 4, 8, 16), 1_000, 4, 64, 1e-4),
    )
}


LENET300 = Experiment("lenet300-mnist", "mnist", LeNet300, ("fc1", "fc2"), (), 10_000, 10, 64, 2e-3)
COMPARED = EXPERIMENTS | {LENET300.name: LENET300}  # with what other articles than SLRProp's measure on


def find_experiment(name: str, among: Mapping[str, Experiment] = EXPERIMENTS) -> Experiment:
    """The experiment of that name, or an error that lists the names."""
    if name not in among:
        raise SlrpropError(f"no experiment is called '{name}'; there are {', '.join(among)}")
    return among[name]


def fit(model: nn.Module, experiment: Experiment, data: Dataset, label: str) -> None:
    """Train in place: AdamW (weight decay 0.01), one-cycle learning rate, cross-entropy."""
    steps = -(-len(data.x_train) // experiment.batch) * experiment.epochs
    optimizer = torch.optim.AdamW(model.parameters(), lr=experiment.learning_rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, experiment.learning_rate, total_steps=steps)
    model.train()
    with tqdm(total=steps, desc=label, unit="step", mininterval=1) as bar:
        for _ in range(experiment.epochs):
            for chosen in torch.randperm(len(data.x_train)).split(experiment.batch):
                x = data.x_train[chosen]
                x = experiment.augment(x) if experiment.augment else x
                loss = nn.functional.cross_entropy(model(x), data.y_train[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    model.eval()


def trained(experiment: Experiment, seed: int, data: Dataset, folder: Path) -> Headed:
    """The experiment's network trained from ``seed``; read from ``folder`` if it was trained there before."""
    path = folder / f"{experiment.name}-seed{seed}.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = experiment.network()
        if path.exists():
            model.load_state_dict(load_file(path))
            return model.eval()
        fit(model, experiment, data, f"{experiment.name} seed {seed}")
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_bytes(save(model.state_dict()))
    return model
