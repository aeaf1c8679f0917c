"""Training the experiments' networks. Where an epoch takes minutes, a killed run goes on after its last finished one."""

import csv
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from slrprop.errors import SlrpropError
from slrprop.files import replacing
from slrprop.progress import Progress
from slrprop.research.datasets import Dataset

PADDING = 4  # pixels that a cropped image may lose on a side
HOLE = 8  # pixels, the side of the square that is cut out of an image


def shifted(images: Tensor) -> Tensor:
    """Move a batch of images by one random offset of up to 2 pixels (the border is blank)."""
    dx, dy = torch.randint(-2, 3, (2,)).tolist()
    return images.roll((dx, dy), (2, 3))


def cropped(images: Tensor) -> Tensor:
    """Each image (b x c x h x w) moved by its own offset of up to 4 pixels, zeros moving in, and mirrored or not."""
    count, _, height, width = images.shape
    top, left = torch.randint(0, 2 * PADDING + 1, (2, count, 1)).to(images.device)
    mirrored = torch.rand(count, 1).to(images.device) < 0.5
    across = torch.arange(width, device=images.device)
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.where(mirrored, width - 1 - across, across)
    padded = nn.functional.pad(images, (PADDING,) * 4)
    picked = padded.permute(0, 2, 3, 1)[
        torch.arange(count, device=images.device)[:, None, None], rows[:, :, None], columns[:, None]
    ]
    return picked.permute(0, 3, 1, 2)


def cut_out(images: Tensor) -> Tensor:
    """Each image cropped as above, and a square of it set to zero (DeVries and Taylor 2017), fully or partly inside."""
    count, _, *sizes = images.shape
    within = []
    for size in sizes:
        centre = torch.randint(0, size, (count, 1)).to(images.device)
        offset = torch.arange(size, device=images.device) - centre
        within.append((offset >= -(HOLE // 2)) & (offset < HOLE - HOLE // 2))
    hole = within[0][:, None, :, None] & within[1][:, None, None, :]
    return cropped(images).masked_fill(hole, 0.0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained: cross-entropy, one-cycle learning rate up to ``learning_rate``.

    Args:
        momentum: of SGD (Nesterov); 0 is AdamW.
        smoothing: of the labels.
        convolutional: mostly convolutions: channels last, bfloat16 where the processor has it, a checkpoint every epoch.
    """

    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float = 0.01
    momentum: float = 0.0
    smoothing: float = 0.0
    augment: Callable[[Tensor], Tensor] | None = None
    convolutional: bool = False

    def told(self) -> str:
        """The settings as JSON, to know a checkpoint of other ones by."""
        return json.dumps(asdict(self) | {"augment": getattr(self.augment, "__name__", None)})


@dataclass(frozen=True)
class Epoch:
    """A line of the training log; accuracy in percent, both on the augmented training samples as they went by."""

    epoch: int
    learning_rate: float
    loss: float
    accuracy: float
    seconds: float
    device: str


def half(device: str) -> bool:
    """Whether bfloat16 is fast there."""
    return torch.cuda.is_bf16_supported() if device == "cuda" else torch.cpu._is_avx512_bf16_supported()


def device_of(name: str) -> str:
    """``cpu`` or ``cuda`` for ``auto``.

    Raises:
        SlrpropError: CUDA was asked for, and there is none.
    """
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise SlrpropError("the device 'cuda' was asked for, and torch sees none here; use --device cpu")
    return "cuda" if there and name == "auto" else name.replace("auto", "cpu")


class Trainer:
    """One training, epoch by epoch.

    Args:
        checkpoint: kept after every epoch, and gone on from; None keeps nothing.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, count: int, checkpoint: Path | None, device: str) -> None:
        self.model, self.recipe, self.checkpoint, self.device = model, recipe, checkpoint, device
        self.steps, self.log = -(-count // recipe.batch), list[Epoch]()
        self.layout = torch.channels_last if recipe.convolutional else torch.contiguous_format
        self._place(device, self.layout)
        rate, decay = recipe.learning_rate, recipe.weight_decay
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(model.parameters(), rate, recipe.momentum, weight_decay=decay, nesterov=True, fused=True)
            if recipe.momentum
            else torch.optim.AdamW(model.parameters(), rate, weight_decay=decay, fused=True)
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, rate, total_steps=self.steps * recipe.epochs, base_momentum=0.85, max_momentum=0.95
        )
        if checkpoint is not None and checkpoint.exists():
            self._go_on(checkpoint)

    def _place(self, device: str, layout: torch.memory_format) -> None:
        self.model.to(device=device, memory_format=layout)  # type: ignore[call-overload]

    def _state(self) -> dict[str, Tensor]:
        """Everything that the next epoch depends on."""
        found = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
        found["random"] = torch.get_rng_state()
        if self.device == "cuda":
            found["random_cuda"] = torch.cuda.get_rng_state()
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    def keep(self) -> None:
        """Write the checkpoint."""
        if self.checkpoint is not None:
            told = {"recipe": self.recipe.told(), "log": json.dumps([asdict(epoch) for epoch in self.log])}
            with replacing(self.checkpoint) as part:
                part.write_bytes(save(self._state(), told))

    def _go_on(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                told = file.metadata() or {}
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise SlrpropError(f"the checkpoint '{path}' can't be read ({error}); remove it to begin anew") from error
        if told.get("recipe") != self.recipe.told():
            raise SlrpropError(
                f"the checkpoint '{path}' is of a training with other settings; remove it, or name another folder"
            )
        self.log = [Epoch(**line) for line in json.loads(told["log"])]
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if rest:
                parts[kind][rest] = tensor
        self.model.load_state_dict(parts["model"])
        parameters, state = list(self.model.parameters()), dict[int, dict[str, Tensor]]()
        for name, tensor in parts["optimizer"].items():
            index, _, key = name.partition(".")
            like = parameters[int(index)]  # fused optimizers take the parameter's layout for granted
            laid = torch.empty_like(like).copy_(tensor) if tensor.shape == like.shape else tensor
            state.setdefault(int(index), {})[key] = laid.detach()
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        done = len(self.log) * self.steps
        self.schedule.load_state_dict(self.schedule.state_dict() | {"last_epoch": done - 1, "_step_count": done})
        if len(self.log) < self.recipe.epochs:
            self.schedule.step()
        torch.set_rng_state(tensors["random"])
        if self.device == "cuda" and "random_cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random_cuda"])

    def run(self, data: Dataset, label: str) -> None:
        """Train to the end; the model is on the CPU and in evaluation mode then."""
        recipe = self.recipe
        images, labels = data.x_train.to(self.device), data.y_train.to(self.device)
        low = recipe.convolutional and half(self.device)
        self.model.train()
        total = self.steps * recipe.epochs
        with Progress(total=total, initial=len(self.log) * self.steps, desc=label, unit="step") as bar:
            while len(self.log) < recipe.epochs:
                start, count = time.perf_counter(), len(images)
                losses, right = torch.zeros(2, dtype=torch.float64, device=self.device)  # summed where they are made
                for chosen in torch.randperm(count).to(self.device).split(recipe.batch):
                    x, y = images[chosen], labels[chosen]
                    x = recipe.augment(x) if recipe.augment else x
                    x = x.to(memory_format=self.layout) if recipe.convolutional else x
                    with torch.autocast(self.device, torch.bfloat16, enabled=low):
                        output = self.model(x)
                    loss = nn.functional.cross_entropy(output.float(), y, label_smoothing=recipe.smoothing)
                    self.optimizer.zero_grad()
                    loss.backward()
                    rate = float(self.schedule.get_last_lr()[0])
                    self.optimizer.step()
                    self.schedule.step()
                    losses += loss.detach() * len(y)
                    right += (output.argmax(1) == y).sum()
                    bar.update()
                mean, accuracy = float(losses) / count, 100 * float(right) / count
                spent = time.perf_counter() - start
                self.log.append(Epoch(len(self.log) + 1, rate, mean, accuracy, spent, self.device))
                bar.set_postfix_str(f"loss {mean:.3f}, {accuracy:.1f} % of training samples")
                self.keep()
        self._place("cpu", torch.contiguous_format)
        self.model.eval()


def fit(model: nn.Module, recipe: Recipe, data: Dataset, label: str) -> None:
    """Train in place on the CPU, keeping nothing."""
    Trainer(model, recipe, len(data.x_train), None, "cpu").run(data, label)


def write_log(log: list[Epoch], path: Path) -> None:
    """The training log as CSV."""
    with replacing(path) as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, list(Epoch.__annotations__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {key: round(value, 6) if isinstance(value, float) else value for key, value in asdict(epoch).items()}
            for epoch in log
        )


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
