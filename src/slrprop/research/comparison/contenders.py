"""What is compared: methods and their settings, the product's own choice among them."""

from dataclasses import dataclass

from slrprop.methods import METHODS
from slrprop.research.experiments import Experiment
from slrprop.search.path import LEVELS, SIZE_ONLY, Choice

ORIGINAL = "original"
NARROWER = "narrower network, trained"


@dataclass(frozen=True)
class Contender:
    """A way to make the dense layers small.

    Args:
        name: as it stands in the tables.
        level: what it uses: ``weights``, ``calibrated``, ``tuned``, or ``trained`` on labels.
        choices: the methods and settings that each layer's form is chosen from, by the search that all share.
        shares: a method that treats all layers together and is asked for shares of neurons instead.
        tuned: distilled afterwards.
        slow: run on fewer seeds.
        wide: can be run on layers of thousands of neurons.
        maps: takes convolutions alone.
    """

    name: str
    level: str
    choices: tuple[Choice, ...] = ()
    shares: Choice | None = None
    tuned: bool = False
    slow: bool = False
    wide: bool = True
    maps: bool = False

    def fits(self, experiment: Experiment) -> bool:
        """Whether an experiment's layers can be made small in this way."""
        if experiment.whole:
            return self.shares is None and not self.tuned and self.name != NARROWER
        return not self.maps and (self.wide or not experiment.wide)

    @property
    def faster(self) -> bool:
        """Whether all that it makes is also computed faster; else the file is smaller only, as a method's summary says."""
        return not any("size only" in METHODS[method].summary for method, _ in self.choices)


def _bits(
    name: str,
    level: str,
    method: str,
    *bits: int,
    slow: bool = False,
    wide: bool = True,
    maps: bool = False,
    **settings: object,
) -> list[Contender]:
    """The same method at several widths of numbers."""
    made = []
    for width in bits:
        few = {} if width == 32 else {"bits": width}
        title = name if width == 32 else f"{name}, {width} bits"
        made.append(Contender(title, level, ((method, dict(settings) | few),), slow=slow, wide=wide, maps=maps))
    return made


SHAPES = ("half", "third", "three-wide")
NESTED = {
    bits: tuple(("nested", {"shape": shape, "sweeps": 2} | ({} if bits == 32 else {"bits": bits})) for shape in SHAPES)
    for bits in (32, 8, 4)
}

CONTENDERS: tuple[Contender, ...] = (
    *_bits("SVD", "weights", "svd", 32, 8, 4),
    *(Contender(f"SLR {criterion}", "weights" if criterion == "weight" else "calibrated", (("slr", {"criterion": criterion}),), slow="cost" in criterion) for criterion in ("weight", "activation", "cost", "cost+weight", "cost+activation")),
    *_bits("SLR weight", "weights", "slr", 4, criterion="weight"),
    Contender("SLRProp", "calibrated", (("slrprop", {}),), slow=True),
    *_bits("SLR cost, refitted", "calibrated", "slr_refit", 32, 4, slow=True, criterion="cost"),
    *_bits("whitened SVD", "calibrated", "low_rank", 32, 4, metric="inputs"),
    *_bits("low rank, two-sided", "calibrated", "low_rank", 32, 8, 4),
    *_bits("spatial", "calibrated", "spatial", 32, 8, 4, maps=True),
    *_bits("Tucker-2", "calibrated", "tucker", 32, 8, 4, maps=True),
    Contender("nested", "calibrated", NESTED[32]),
    Contender("nested, 8 bits", "calibrated", NESTED[8]),
    Contender("nested, 4 bits", "calibrated", NESTED[4]),
    *_bits("low rank + sparse", "calibrated", "low_rank_plus_sparse", 32, 4, slow=True, wide=False),
    *_bits("magnitude", "weights", "magnitude", 32, 4),
    *_bits("Wanda", "calibrated", "wanda", 32),
    *_bits("OBD", "calibrated", "obd", 32),
    *_bits("OBS one-shot", "calibrated", "obs", 32, variant="one_shot", wide=False),
    *_bits("SparseGPT", "calibrated", "obs", 32, variant="sparsegpt", wide=False),
    *_bits("OBS gradual", "calibrated", "obs", 32, 8, 4, variant="gradual", slow=True, wide=False),
    *_bits("LASSO", "calibrated", "lasso", 32, slow=True, wide=False),
    *_bits("group LASSO", "calibrated", "group_lasso", 32, slow=True, wide=False),
    *_bits("Net-Trim", "calibrated", "net_trim", 32, slow=True, wide=False),
    *_bits("DDLR", "calibrated", "ddlr", 32, slow=True, wide=False),
    *(Contender(f"{title}{'' if bits == 32 else ', 4 bits'}", "calibrated", shares=(method, {} if bits == 32 else {"bits": bits})) for title, method in (("NISP", "nisp"), ("Taylor", "taylor"), ("LRP", "lrp"), ("APoZ", "apoz"), ("redundant features", "redundant")) for bits in (32, 4)),
    *_bits("dense", "calibrated", "dense", 8, 4),
    *_bits("dense, to nearest", "weights", "rtn", 8, 4),
    *_bits("permuted features", "calibrated", "permuted", 32, wide=False),
    Contender("auto, weights", "weights", LEVELS["weights"]),
    Contender("auto, calibrated", "calibrated", LEVELS["calibrated"]),
    Contender("auto and single weights", "calibrated", LEVELS["calibrated"] + SIZE_ONLY["calibrated"], slow=True, wide=False),
    Contender("SVD, 4 bits, tuned", "tuned", (("svd", {"bits": 4}),), tuned=True, slow=True),
    Contender("low rank, two-sided, 4 bits, tuned", "tuned", (("low_rank", {"bits": 4}),), tuned=True, slow=True),
    Contender("nested, 4 bits, tuned", "tuned", NESTED[4], tuned=True, slow=True),
    Contender("Taylor, 4 bits, tuned", "tuned", shares=("taylor", {"bits": 4}), tuned=True, slow=True),
    Contender("auto, tuned", "tuned", LEVELS["tuned"], tuned=True),
    Contender(NARROWER, "trained", slow=True),
)  # fmt: skip
