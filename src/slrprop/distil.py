"""The training loop of distillation: samples and mixtures of them, the original's answers, the best epoch by held-out samples."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slrprop.checks import Count, Positive, Seed, hold
from slrprop.losses import rows_of
from slrprop.progress import Progress

HELD_OUT = 0.1  # of the data, to choose the epoch by
LEAST_HELD_OUT = 1000  # few are mixed with one another again and again
EPOCHS, LEAST_STEPS = 40, 1000
MIXTURES, LEAST_MIXED = 4, 2**15  # of all samples, then they come again; more of them where samples are few
KEPT = 2**30  # bytes of the original's answers; where they would take more it answers anew in every step
RATES = 1.0, 0.1  # of the learning rate, one after the other
Inputs = dict[Any, Tensor]  # by position or name, samples first
Forward = Callable[[Inputs], Tensor]


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """How factors are fine-tuned.

    Args:
        epochs: passes over the data, the best of which by the held-out divergence is kept (0 is the start); None: 40, and where
            samples are few and mixed as many as make 1 000 steps.
        learning_rate: of Adam in the first half of the epochs, decaying to zero by a cosine; the other half begins at the best so
            far with a tenth of it, which is what a plan needs that is good from the start.
        batch: samples per step.
        temperature: of the softmax of both networks.
        mixup: whether a half of the samples, on average, are mixed with another one, in shares drawn evenly, in the steps and those
            held out; inputs of whole numbers never are.
        seed: of the order of the samples and of the mixtures.
    """

    epochs: Count | None = None
    learning_rate: Positive = 3e-3
    batch: Count = 256
    temperature: Positive = 2.0
    mixup: bool = True
    seed: Seed = 0

    def __post_init__(self) -> None:
        hold(self)


def _at(inputs: Inputs, places: Tensor | slice) -> Inputs:
    return {key: x[places] for key, x in inputs.items()}


def _parts(inputs: Inputs, most: int) -> Iterator[Inputs]:
    """The samples, so many at a time."""
    for start in range(0, len(next(iter(inputs.values()))), most):
        yield _at(inputs, slice(start, start + most))


def trained(
    student: Forward, teacher: Forward, inputs: Inputs, layers: nn.ModuleList, chosen: TuneSettings, quiet: bool, most: int,
    real_valued: Callable[[Tensor], bool],
) -> dict[str, float]:  # fmt: skip
    """Train the layers in place; what was reached."""
    count = len(next(iter(inputs.values())))
    held = int(count * HELD_OUT)
    random = torch.Generator().manual_seed(chosen.seed)
    order = torch.randperm(count, generator=random)
    aside, rest = order[:held], order[held:]
    mixing = chosen.mixup and all(x.is_floating_point() for x in inputs.values())

    def mixtures(places: Tensor, ways: int) -> tuple[Tensor, Tensor]:
        """So many partners and shares of theirs for each of these samples (ways x p)."""
        partners = torch.stack([places[torch.randperm(len(places), generator=random)] for _ in range(ways)])
        shares = torch.rand(partners.shape, generator=random)
        return partners, shares * (torch.rand(partners.shape, generator=random) < 0.5)

    def mixed(places: Tensor, partners: Tensor, shares: Tensor) -> Inputs:
        found = _at(inputs, places)
        if not mixing:
            return found
        others = _at(inputs, partners)
        return {key: x.lerp(others[key], shares.to(x).reshape(-1, *[1] * (x.ndim - 1))) for key, x in found.items()}

    def answers(run: Forward, x: Inputs) -> Tensor:
        with torch.no_grad():
            return torch.cat([rows_of(run(part)) for part in _parts(x, min(most, 1024))])

    ways = -(-LEAST_HELD_OUT // held) if mixing else 1
    held_parts = [mixed(aside, *way) for way in zip(*mixtures(aside, ways), strict=True)]
    held_inputs = {key: torch.cat([part[key] for part in held_parts]) for key in inputs}
    wanted = answers(teacher, held_inputs)
    numbers = real_valued(wanted[:1])

    def held_out() -> float:
        return float(distance(answers(student, held_inputs), wanted, 1.0, numbers))

    best = before = held_out()
    kept, reached, epoch = copy.deepcopy(layers.state_dict()), 0, 0
    an_epoch = -(-len(rest) // chosen.batch)
    epochs = chosen.epochs or max(EPOCHS, -(-LEAST_STEPS // an_epoch) if mixing else 0)
    ways = min(max(MIXTURES, -(-LEAST_MIXED // len(rest))), epochs) if mixing else 1
    partners, shares = mixtures(rest, ways)
    known = _kept(teacher, held_inputs, wanted, ways, len(rest))
    with Progress(total=epochs * an_epoch, desc="tuning", unit="step", disable=quiet) as bar:
        for rate, passes in zip(RATES, (epochs - epochs // 2, epochs // 2), strict=True):
            layers.load_state_dict(kept)
            optimizer = torch.optim.Adam(layers.parameters(), rate * chosen.learning_rate, fused=True)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, passes * an_epoch))
            for done in range(1, passes + 1):
                way = epoch % ways
                for places in torch.randperm(len(rest), generator=random).split(chosen.batch):
                    x = mixed(rest[places], partners[way, places], shares[way, places])
                    if known is not None and epoch >= ways:
                        target = known[way, places].flatten(0, 1)
                    else:
                        target = answers(teacher, x)
                        if known is not None:
                            known[way, places] = target.reshape(len(places), *known.shape[2:])
                    optimizer.zero_grad()
                    apart = most if len(target) % len(places) == 0 else len(places)
                    for part, goal in zip(
                        _parts(x, apart), target.split(apart * len(target) // len(places)), strict=True
                    ):
                        loss = distance(rows_of(student(part)), goal, chosen.temperature, numbers)
                        (loss * (len(goal) / len(target))).backward()
                    optimizer.step()
                    schedule.step()
                    bar.update()
                epoch += 1
                if done % max(1, epochs // EPOCHS) and done < passes:
                    continue  # so many held-out samples would take longer than the few that it learns from
                found = held_out()
                if found < best:
                    best, kept, reached = found, copy.deepcopy(layers.state_dict()), epoch
    layers.load_state_dict(kept)
    return {"tuned_epochs": float(reached), "divergence_before": before, "divergence_after": best}


def _kept(teacher: Forward, x: Inputs, wanted: Tensor, ways: int, count: int) -> Tensor | None:
    """Room for the original's answers to ``count`` samples in so many ways; None where it takes too much, or an output is of no sample of its own.

    Args:
        x, wanted: some samples and the rows that it answers (:func:`slrprop.losses.rows_of`).
    """
    samples = len(next(iter(x.values())))
    each = wanted.numel() * wanted.element_size() // samples
    probe = _at(x, slice(7))
    with torch.no_grad():
        by_sample = len(teacher(probe)) == min(7, samples)
    if not by_sample or ways * count * each > KEPT:
        return None
    return wanted.new_empty(ways, count, len(wanted) // samples, wanted.shape[1])


def distance(outputs: Tensor, wanted: Tensor, temperature: float, real_valued: bool = False) -> Tensor:
    """Mean divergence of outputs (p x c) from the wanted ones; the mean squared distance of real-valued or single ones."""
    if real_valued or outputs.shape[1] < 2:
        return (outputs - wanted).square().mean()
    log_q, log_p = (wanted / temperature).log_softmax(-1), (outputs / temperature).log_softmax(-1)
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(-1).mean()
