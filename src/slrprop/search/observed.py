"""What a search knows of a layer besides its candidates, kept as plain numbers for reports."""

from dataclasses import dataclass

from slrprop.linalg import in_parts
from slrprop.methods.base import Problem
from slrprop.methods.slr import SLRSettings, scores_of
from slrprop.plan import LayerPlan
from slrprop.relevance.simple import weight_scores


@dataclass(frozen=True)
class Observed:
    """A layer of shape (m, n), inputs x outputs.

    ``sensitivity`` is the damage predicted per unit of the layer's relative squared error; ``singular_values`` are the
    largest ones, descending, as far as any candidate needed them, and ``energy`` is the sum of the squares of all.
    ``rows`` (m) and ``columns`` (n) are relevances of inputs and outputs by ``criterion``.
    """

    shape: tuple[int, int]
    sensitivity: float
    energy: float
    singular_values: list[float]
    criterion: str
    rows: list[float]
    columns: list[float]


def observed(problem: Problem, name: str, rank: int, sensitivity: float, chosen: LayerPlan | None) -> Observed:
    """What is known of a layer once its candidates up to ``rank`` were made (0: it has none); nothing is measured anew.

    The relevances are those the chosen form was made by where they are at hand (any criterion of SLR with the layers
    taken independently), else the sums of the weights' magnitudes.
    """
    weight = problem.weight(name).detach()
    values = problem.svd(name, rank, "auto").s.tolist() if rank else []
    criterion, scores = "weight", weight_scores(problem.weight(name))
    if chosen is not None and chosen.method == "slr":
        settings = SLRSettings(**chosen.settings)
        if settings.order == "independent" or "cost" not in settings.criterion:
            criterion, scores = settings.criterion, scores_of(problem, name, settings)
    m, n = weight.shape
    energy = sum(float(part.double().square().sum()) for (part,) in in_parts(weight))
    return Observed((m, n), sensitivity, energy, values, criterion, scores.rows.tolist(), scores.columns.tolist())
