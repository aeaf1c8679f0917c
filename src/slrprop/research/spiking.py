"""A spiking network that learns without labels, and loses neurons while it does (Guo et al., Electronics 9(7):1059, 2020).

The network is Diehl and Cook's (Frontiers in Computational Neuroscience 9:99, 2015) in the simplification of BindsNET: every pixel feeds
every excitatory neuron; each of these drives one inhibitory neuron, which inhibits all others; weights learn by spike timing (STDP).
A pruned neuron leaves the matrix, which stays dense and gets smaller. The article's constants are not published: those here are ours.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
from numpy.typing import NDArray
from safetensors.numpy import save

from slrprop.checks import require_choice, require_count
from slrprop.errors import SlrpropError, first_line
from slrprop.files import replacing
from slrprop.research import module

FORMAT = "slrprop-spiking"
STRATEGIES = ("constant number", "constant threshold", "adaptive threshold")
Array = NDArray[Any]


class SpikingSettings(NamedTuple):
    """Constants of the network: steps of 1 ms, potentials in mV, times in ms; ``_i`` are those of inhibitory neurons."""

    steps: int = 250  # that an image is shown
    rate: float = 128.0  # Hz of a white pixel's spikes
    rest: float = -65.0
    reset: float = -60.0
    threshold: float = -52.0  # theta is added to it
    tau: float = 100.0
    refractory: int = 5
    theta_step: float = 0.05  # by which a spike raises its neuron's threshold
    theta_tau: float = 1e7
    rest_i: float = -60.0
    reset_i: float = -45.0
    threshold_i: float = -40.0
    tau_i: float = 10.0
    refractory_i: int = 2
    excitation: float = 22.5  # from an excitatory neuron to its inhibitory one
    inhibition: float = 120.0  # from that one to every other neuron
    depression: float = 1e-4  # of a weight at an input's spike, times the trace of the neuron's spikes
    potentiation: float = 1e-2  # of a weight at the neuron's spike, times the trace of the input's spikes
    trace: float = 20.0
    weight_sum: float = 78.4  # of a neuron's incoming weights, after every image


DEFAULTS = SpikingSettings()


@dataclass
class Operations:
    """What the article's energy is made of, as counts: ``synaptic`` (spikes x fan-out), weight ``updates``, and the ``images`` they are for.

    Updates: an input's spike changes a weight of each neuron, a neuron's spike one of each input, and the sums are restored after each image.
    """

    synaptic: int = 0
    updates: int = 0
    images: int = 0


@dataclass(eq=False)
class SpikingNetwork:
    """Weights (inputs x neurons, float32, in [0, 1]), thresholds ``theta`` (neurons,), and which digit each neuron stands for.

    ``proportions`` (classes x neurons): how a neuron's spikes are shared among the classes, once :meth:`label` was called.
    """

    weight: Array
    theta: Array
    settings: SpikingSettings = DEFAULTS
    proportions: Array | None = None
    operations: Operations = field(default_factory=Operations)  # counted since the network was made

    @classmethod
    def untrained(
        cls, inputs: int, neurons: int, seed: int = 0, settings: SpikingSettings = DEFAULTS
    ) -> "SpikingNetwork":
        """Weights drawn from [0, 0.3)."""
        require_count("neurons", neurons, 1)
        weight = 0.3 * np.random.default_rng(seed).random((inputs, neurons), np.float32)
        return cls(weight, np.zeros(neurons), settings)

    @property
    def neurons(self) -> int:
        return int(self.weight.shape[1])

    @property
    def bytes(self) -> int:
        """Bytes of everything that inference needs."""
        return sum(array.nbytes for array in self._arrays().values())

    def _arrays(self) -> dict[str, Array]:
        arrays = {"weight": self.weight, "theta": self.theta}
        return arrays if self.proportions is None else arrays | {"proportions": self.proportions}

    def kept(self, neurons: Array) -> "SpikingNetwork":
        """A network of these neurons only (indices); it has no labels, and its own count of operations."""
        return SpikingNetwork(np.ascontiguousarray(self.weight[:, neurons]), self.theta[neurons], self.settings)

    def learn(self, image: Array, random: np.random.Generator) -> Array:
        """Show an image (inputs,), values in [0, 1], and let the weights learn from it; spikes of each neuron (neurons,)."""
        return self._shown(image, random, True)

    def respond(self, images: Array, seed: int = 0, compiled: bool = True) -> Array:
        """Spikes of each neuron for images (p, inputs), nothing learned: (p, neurons).

        Args:
            seed: the input spikes of image i are drawn from (seed, i).
            compiled: False computes the same spikes in plain numpy, without the extra ``research``.
        """
        streams = (np.random.default_rng((seed, index)) for index in range(len(images)))
        shown = self._shown if compiled else self._shown_plainly
        return np.stack([shown(image, random) for image, random in zip(images, streams, strict=True)])

    def _input_spikes(self, image: Array, random: np.random.Generator) -> tuple[Array, Array, Array]:
        """Where each step's spikes begin, the inputs they are of, and a number in [0, 1) a step that decides among equals."""
        if np.shape(image) != self.weight.shape[:1] or not (0 <= np.min(image) <= np.max(image) <= 1):
            raise SlrpropError(f"an image of this network has {len(self.weight)} values in [0, 1], got shape {np.shape(image)}, {np.min(image):g} to {np.max(image):g}")  # fmt: skip
        active = np.flatnonzero(image)
        chance = (image[active] * self.settings.rate / 1000).astype(np.float32)
        drawn = random.random((self.settings.steps, len(active)), np.float32) < chance
        spikes = np.flatnonzero(drawn)  # several times as fast as by two axes
        step, place = divmod(spikes, max(len(active), 1))
        starts = np.searchsorted(step, np.arange(self.settings.steps + 1))
        return starts, active[place], random.random(self.settings.steps)

    @property
    def _decays(self) -> tuple[float, float, float]:
        return tuple(math.exp(-1 / tau) for tau in (self.settings.tau, self.settings.tau_i, self.settings.trace))  # type: ignore[return-value]

    def _shown(self, image: Array, random: np.random.Generator, learn: bool = False) -> Array:
        show = module("spiking_loop").show
        starts, inputs, ties = self._input_spikes(image, random)
        counts, inhibitory = show(self.weight, self.theta, starts, inputs, ties, self.settings, self._decays, learn)
        spikes, pixels = int(counts.sum()), len(self.weight)
        self.operations.synaptic += len(inputs) * self.neurons + spikes + inhibitory * (self.neurons - 1)
        self.operations.updates += learn * (len(inputs) * self.neurons + spikes * pixels + self.weight.size)
        self.operations.images += 1
        return np.asarray(counts)

    def _shown_plainly(self, image: Array, random: np.random.Generator) -> Array:
        """What the compiled loop does, without learning: the same sums in the same order."""
        s, (keep, keep_i, _), zeros = self.settings, self._decays, np.zeros(self.neurons)
        starts, inputs, ties = self._input_spikes(image, random)
        counts, resting, resting_i = (np.zeros(self.neurons, np.int64) for _ in range(3))
        v, v_i, driven, inhibiting = zeros + s.rest, zeros + s.rest_i, zeros, zeros
        for t in range(s.steps):
            current = -s.inhibition * (inhibiting.sum() - inhibiting)
            for i in inputs[starts[t] : starts[t + 1]]:
                current += self.weight[i]
            v = keep * (v - s.rest) + s.rest + np.where(resting <= 0, current, 0.0)
            over = np.flatnonzero(v >= s.threshold + self.theta)
            resting = np.maximum(resting - 1, 0)
            v[over], resting[over] = s.reset, s.refractory
            v_i = keep_i * (v_i - s.rest_i) + s.rest_i + np.where(resting_i <= 0, s.excitation * driven, 0.0)
            fired, resting_i, driven = v_i >= s.threshold_i, np.maximum(resting_i - 1, 0), np.zeros(self.neurons)
            v_i[fired], resting_i[fired], inhibiting = s.reset_i, s.refractory_i, fired.astype(float)
            if len(over):
                winner = over[int(ties[t] * len(over))]
                driven[winner] = 1.0
                counts[winner] += 1
        return counts

    def label(self, counts: Array, targets: Array, classes: int = 10) -> None:
        """Proportion weighting: which class each neuron stands for, from its spikes (p, neurons) for images of known class (p,)."""
        rates = np.stack(
            [counts[targets == k].mean(0) if (targets == k).any() else 0 * self.theta for k in range(classes)]
        )
        self.proportions = (rates / np.maximum(rates.sum(0), 1e-9)).astype(np.float32)

    def classify(self, counts: Array) -> Array:
        """The class (p,) whose neurons spiked most on average (p, neurons), each weighed by that class's share of its spikes."""
        if self.proportions is None:
            raise SlrpropError("the network's neurons stand for no classes yet; call label first")
        votes = np.zeros((len(counts), len(self.proportions)))
        for k, shares in enumerate(self.proportions):
            own = self.proportions.argmax(0) == k
            if own.any():
                votes[:, k] = counts[:, own] @ shares[own] / own.sum()
        return votes.argmax(1)

    def save(self, path: str | Path) -> None:
        """Write the network as safetensors, its settings in the header.

        Raises:
            SlrpropError: the file can't be written; an existing one stays as it was.
        """
        counted = {name: json.dumps(value) for name, value in vars(self.operations).items()}
        head = {"format": FORMAT, "settings": json.dumps(self.settings._asdict()), **counted}
        with replacing(path) as part:
            part.write_bytes(save(self._arrays(), head))

    @classmethod
    def load(cls, path: str | Path) -> "SpikingNetwork":
        """A network that :meth:`save` wrote.

        Raises:
            SlrpropError: no such file, or another one.
        """
        try:
            with safetensors.safe_open(path, "np") as file:
                head = file.metadata() or {}
                if head.get("format") != FORMAT:
                    raise SlrpropError(f"'{path}' holds no spiking network; its header says {head.get('format')!r}")
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                settings = SpikingSettings(**json.loads(head["settings"]))
                counted = Operations(*(int(head[name]) for name in ("synaptic", "updates", "images")))
            return cls(arrays["weight"], arrays["theta"], settings, arrays.get("proportions"), counted)
        except SlrpropError:
            raise
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise SlrpropError(f"'{path}' can't be read as a spiking network: {first_line(error)}") from error


@dataclass(frozen=True)
class Pruning:
    """How neurons go while the network learns; the fewer its spikes since the last time, the sooner a neuron goes.

    *constant number*: as many at every time. *constant threshold*: those below ``factor`` x the mean count of all neurons when
    pruning began. *adaptive threshold*: below ``factor`` x the mean count of the neurons that are left (the article's third; its
    constants are not published, these are ours). At the end those still too many go at once.

    Args:
        target: neurons that stay.
        start, end: the share of the images behind which pruning first looks, and is to be done.
        interval: images between two times.
        slow: theta_step is multiplied by (share that stays) ** slow. With 1 thresholds grow as fast as before, although the
            neurons that stay spike more often (ours).
    """

    strategy: str
    target: int
    start: float = 0.4
    end: float = 0.9
    factor: float = 0.5
    interval: int = 250
    slow: float = 0.0

    def __post_init__(self) -> None:
        require_choice("strategy", self.strategy, STRATEGIES)
        require_count("target", self.target, 1)
        require_count("interval", self.interval, 1)


def fewest(counts: Array, many: int) -> Array:
    """The indices of all but the ``many`` neurons with the fewest spikes; among equals the first go."""
    return np.sort(np.argsort(counts, kind="stable")[many:])


@dataclass(eq=False)
class Training:
    """A network on its way through ``total`` images; what is needed to go on from there.

    ``recent``: each neuron's spikes since pruning last looked; ``pruned``: how many have gone, by the images shown until then.
    """

    network: SpikingNetwork
    total: int
    seed: int = 0
    shown: int = 0
    recent: Array = field(default_factory=lambda: np.zeros(0))
    first_mean: float = 0.0
    pruned: dict[int, int] = field(default_factory=dict)

    def run(
        self, images: Array, pruning: Pruning | None = None, until: int | None = None,
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    ) -> SpikingNetwork:  # fmt: skip
        """Show ``images`` (p, inputs) in turn, up to number ``until``; returns the network, which pruning replaces by smaller ones."""
        if pruning and pruning.target > self.network.neurons:
            raise SlrpropError(
                f"target must be at most the network's {self.network.neurons} neurons, got {pruning.target}"
            )
        stop = self.total if until is None else until
        if len(self.recent) != self.network.neurons:
            self.recent = np.zeros(self.network.neurons)
        interval = pruning.interval if pruning else Pruning.interval
        for index in progress(range(self.shown, stop)):
            self.recent += self.network.learn(images[index % len(images)], np.random.default_rng((self.seed, index, 1)))
            self.shown = index + 1
            if self.shown % interval == 0 or self.shown == self.total:
                if pruning:
                    self._prune(pruning)
                if self.shown != self.total:
                    self.recent[:] = 0
        return self.network

    def _prune(self, pruning: Pruning) -> None:
        excess, counts = self.network.neurons - pruning.target, self.recent
        if self.shown <= pruning.start * self.total or excess <= 0:
            return
        self.first_mean = self.first_mean or float(counts.mean())
        if self.shown == self.total:
            many = excess
        elif pruning.strategy == "constant number":
            times = (pruning.end * self.total - self.shown) // pruning.interval + 1
            many = math.ceil(excess / max(times, 1))
        else:
            mean = self.first_mean if pruning.strategy == "constant threshold" else float(counts.mean())
            many = int((counts < pruning.factor * mean).sum())
        if many := min(many, excess):
            stay = fewest(counts, many)
            before, self.network, self.recent = self.network, self.network.kept(stay), counts[stay]
            step = before.settings.theta_step * (len(stay) / before.neurons) ** pruning.slow
            self.network.settings = before.settings._replace(theta_step=step)
            self.network.operations = before.operations
            self.pruned[self.shown] = many
