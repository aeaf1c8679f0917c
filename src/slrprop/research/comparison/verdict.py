"""Who wins where and by how much, computed from the rows."""

from slrprop.research.comparison.results import KNOWN, LEVELS, Lead, Results, amount
from slrprop.research.tables import plus_minus

OURS = ("nested", "low rank, two-sided", "SLR cost, refitted", "auto")  # the beginnings of their names
ARTICLES = ("SLR weight", "SLR activation", "SLR cost", "SLR cost+weight", "SLR cost+activation", "SLRProp")
PLAIN = "SVD"


def verdict(results: Results) -> list[tuple[str, list[str]]]:
    """Headings and sentences."""
    told = [("Best at each size", [winner(results, size, LEVELS) for size in results.sizes])]
    untrained = LEVELS[:2]
    lines = [
        winner(results, size, untrained)
        for size in results.sizes
        if (best := results.best(size, results.reaching(size, untrained))) != results.best(size, results.names) and best
    ]
    told.append(("Best at each size without training, where that is another", lines))
    told.append(
        ("The product's own choice", [auto(results, name) for name in results.names if name.startswith("auto")])
    )
    told.append(("The articles' SLR and SLRProp against plain SVD", articles(results)))
    return [(heading, lines) for heading, lines in told if lines]


def winner(results: Results, size: int, levels: tuple[str, ...]) -> str:
    """Who is best at a size, and how far ahead of plain SVD, of the weights level and of the best that is not ours."""
    names = results.reaching(size, levels)
    best = results.best(size, names)
    if best is None:
        return f"{amount(size)}: nobody reaches it."
    accuracy = plus_minus([row.accuracy for row in results.cell(best, size).values()])
    others = [name for name in names if not name.startswith(OURS)]
    parts = [
        f"{amount(size)}: **{best}**, {accuracy} % ({_lost(results.lost(best, size))})",
        _over(results, best, PLAIN if results.cell(PLAIN, size) else None, size, "plain SVD"),
        _over(results, best, results.best(size, results.reaching(size, ("weights",))), size, "the weights level"),
    ]
    if best in others:
        ours = results.best(size, [name for name in names if name.startswith(OURS)])
        lead = None if ours is None else results.lead(best, ours, size)
        parts.append("nothing of ours reaches it" if lead is None else f"the best of ours, {ours}, is {_behind(lead)}")
    else:
        other = results.best(size, others)
        parts += [_over(results, best, other, size, "the baselines"), _unjudged(results, best, other, size, levels)]
    return "; ".join(part for part in parts if part) + "."


def _lost(points: float) -> str:
    return f"{abs(points):.2f} points {'lost' if points >= 0 else 'gained'}"


def _over(results: Results, best: str, other: str | None, size: int, group: str) -> str:
    """By how much the best is ahead of the best of a group."""
    if other is None:
        return f"out of reach for {group}"
    if other == best:
        return ""
    lead = results.lead(best, other, size)
    named = group if group == "plain SVD" else f"the best of {group} ({other})"
    return f"no seed in common with {named}" if lead is None else f"{_ahead(lead)} {named}"


def _unjudged(results: Results, best: str, other: str | None, size: int, levels: tuple[str, ...]) -> str:
    """The baseline of too few seeds that is nearest to the best, if it is nearer than the best of those that are judged."""
    judged = results.reaching(size)
    few = [
        (lead.points, name, lead)
        for name in results.names
        if KNOWN[name].level in levels and name not in judged and not name.startswith(OURS)
        if (lead := results.lead(best, name, size)) is not None
    ]
    known = None if other is None else results.lead(best, other, size)
    if not few or (known is not None and min(few)[0] >= known.points):
        return ""
    _, name, lead = min(few)
    return f"of too few seeds to be judged, {name} is {_behind(lead)}"


def _ahead(lead: Lead) -> str:
    return f"{lead} {'ahead of' if lead.points >= 0 else 'behind'}"


def _behind(lead: Lead) -> str:
    return f"{lead} {'behind' if lead.points >= 0 else 'ahead'}"


def leader(results: Results, name: str, rivals: list[str], size: int, what: str) -> tuple[str, Lead] | None:
    """The rival furthest ahead of a contender; a clearly leading one with fewer seeds, if none with all of them is."""
    leads = [(rival, lead) for rival in rivals if (lead := results.lead(rival, name, size, what)) is not None]
    seeds = len(results.cell(name, size))
    full = [found for found in leads if found[1].seeds == seeds]
    few = [found for found in leads if found[1].seeds < seeds]
    tops = [max(group, key=lambda found: found[1].points) for group in (full, few) if group]
    return next((found for found in tops if found[1].clear), tops[0] if tops else None)


def auto(results: Results, name: str) -> str:
    """In how many cells a choice of the product is best, or near the best, of its level and below; where it is not."""
    told = f"{name}: best or within one standard error of the best of its level and below in {standing(results, name, 'accuracy')}."
    only = KNOWN[name].faster and not all(KNOWN[rival].faster for rival in results.names)
    if only:
        told += f" Among what is computed faster too, in {standing(results, name, 'accuracy', only)}."
    seen = standing(results, name, "agreement", only)
    return (
        f"{told} By agreement with the original, which is what it can see, {'among those ' if only else ''}in {seen}."
    )


def standing(results: Results, name: str, what: str, faster: bool = False) -> str:
    """How a choice of the product stands by accuracy or agreement; among forms that are computed faster alone, if so asked."""
    below = LEVELS[: LEVELS.index(KNOWN[name].level) + 1]
    best, near, lost, cells = 0, 0, [], 0
    for size in results.sizes:
        known = [rival for rival in results.reaching(size, below) if KNOWN[rival].faster or not faster]
        rivals = [rival for rival in known if rival != name]
        cells += bool(known)
        if known and not results.cell(name, size):
            first = results.best(size, rivals)
            lost.append(f"{amount(size)}, where it has no plan and {first} has")
            continue
        found = leader(results, name, rivals, size, what)
        if found is None or found[1].points <= 0:
            best += bool(known)
        elif not found[1].clear:
            near += 1
        else:
            few = f", over {found[1].seeds} seeds" if 1 < found[1].seeds < len(results.cell(name, size)) else ""
            lost.append(f"{amount(size)}: {found[0]} is {found[1]} ahead{few}")
    text = f"{best + near} of {cells} cells (best in {best})"
    return f"{text}; not at {'; '.join(lost)}" if lost else text


def articles(results: Results) -> list[str]:
    """Each variant's difference from plain SVD at every size that both reach."""
    lines, ahead, behind, cells = [], 0, 0, 0
    for name in ARTICLES:
        reached = [size for size in results.sizes if name in results.reaching(size)]
        leads = [(size, lead) for size in reached if (lead := results.lead(name, PLAIN, size)) is not None]
        if not leads:
            continue
        cells += len(leads)
        ahead += sum(lead.clear for _, lead in leads)
        behind += sum(lead.points < -lead.error for _, lead in leads)
        told = ", ".join(f"{amount(size)} {'+' if lead.points > -0.005 else '-'}{lead}" for size, lead in leads)
        lines.append(f"{name} less SVD: {told}.")
    if not cells:
        return []
    judged = (
        "they do not beat it"
        if ahead == 0
        else "more often behind than ahead"
        if ahead < behind
        else "more often ahead than behind"
        if ahead > behind
        else "as often ahead as behind"
    )
    return [
        f"At equal bytes, {judged}: ahead by more than one standard error in {ahead} of {cells} cells, behind in {behind}.",
        *lines,
    ]
