"""From the raw figures of `bench_curriculum.py learn` to its table and its plot. Pure but for `write_plot`.

A run: {"selector", "seed", "points", "effective_generated", "effective_trained"}, where a point is {"step", "accuracy",
"rollouts", "tokens", "seconds"}: measured on held-out rows, with the costs of training so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bench_common import hardware_text, table

COSTS = ("tokens", "rollouts", "seconds")
BASELINE = "uniform"
Curve = list[tuple[float, float]]
"""(cost so far, accuracy), in order of cost."""


def first_reached(curve: Curve, target: float) -> float | None:
    """The cost at which the accuracy first comes to `target`, linear between evaluations; None: never."""
    if curve[0][1] >= target:
        return curve[0][0]
    for (cost, accuracy), (next_cost, next_accuracy) in zip(curve, curve[1:], strict=False):
        if next_accuracy >= target:
            return cost + (next_cost - cost) * (target - accuracy) / (next_accuracy - accuracy)
    return None


def reached_for_good(curve: Curve, target: float) -> float | None:
    """Like `first_reached`, but counted from the last time that the accuracy was below `target`."""
    below = [i for i, (_, accuracy) in enumerate(curve) if accuracy < target]
    return first_reached(curve[below[-1] :] if below else curve, target)


def curve(points: Sequence[dict[str, Any]], cost: str) -> Curve:
    return [(point[cost], point["accuracy"]) for point in points]


def mean_points(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points averaged over runs, at the steps that all of them were evaluated at."""
    by_step = [{point["step"]: point for point in run["points"]} for run in runs]
    steps = sorted(set.intersection(*(set(points) for points in by_step)))
    keys = ("accuracy", *COSTS)
    return [{"step": step} | {key: fmean(points[step][key] for points in by_step) for key in keys} for step in steps]


def by_selector(runs: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        groups.setdefault(run["selector"], []).append(run)
    return groups


def selector_figures(runs: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One selector against uniform: where it ends, and what it cost to get where uniform ended.

    "of_uniform": for each cost, the share of what uniform spent in all that the mean curve needs to reach uniform's
    mean accuracy at its end (first, and for good). "per_seed": the same for each seed against uniform's run of that
    seed; None where the accuracy was not reached.
    """
    ends = [run["points"][-1]["accuracy"] for run in runs]
    figures: dict[str, Any] = {
        "start": fmean(run["points"][0]["accuracy"] for run in runs),
        "end": {"mean": fmean(ends), "low": min(ends), "high": max(ends), "seeds": len(ends)},
        "effective_generated": fmean(run["effective_generated"] for run in runs),
        "effective_trained": fmean(run["effective_trained"] for run in runs),
    }
    figures |= {cost: fmean(run["points"][-1][cost] for run in runs) for cost in COSTS}
    if baseline:
        ours, theirs = mean_points(runs), mean_points(baseline)
        target = fmean(run["points"][-1]["accuracy"] for run in baseline)
        figures["target"] = target
        figures["of_uniform"] = {
            cost: {
                "first": _share(first_reached(curve(ours, cost), target), theirs[-1][cost]),
                "for_good": _share(reached_for_good(curve(ours, cost), target), theirs[-1][cost]),
            }
            for cost in COSTS
        }
        pairs = {run["seed"]: run["points"] for run in baseline}
        figures["per_seed"] = {
            cost: {
                run["seed"]: _share(
                    first_reached(curve(run["points"], cost), pairs[run["seed"]][-1]["accuracy"]),
                    pairs[run["seed"]][-1][cost],
                )
                for run in runs
                if run["seed"] in pairs
            }
            for cost in COSTS
        }
    return figures


def _share(cost: float | None, whole: float) -> float | None:
    return None if cost is None else cost / whole


def render(raw: dict[str, Any]) -> str:
    """The tables, as markdown."""
    groups = by_selector(raw["runs"])
    baseline = groups.get(BASELINE, [])
    figures = {name: selector_figures(runs, baseline) for name, runs in groups.items()}
    parts = [f"Hardware: {hardware_text(raw['hardware'])}", f"Settings: {raw['settings']}"]
    starts = {round(run["points"][0]["accuracy"], 6) for run in raw["runs"]}
    if len(starts) > 1 and not raw["settings"].get("start_per_seed"):
        parts.append(f"WARNING: the runs do not begin at one accuracy, but at {sorted(starts)}")
    heading = ["selector", "seeds", "accuracy at start", "at end: mean (min..max)", "effective ratio, generated"]
    heading += ["effective ratio, trained on", "rollouts", "generated tokens", "seconds"]
    rows = [
        [
            name,
            f["end"]["seeds"],
            f"{f['start']:.3f}",
            f"{f['end']['mean']:.3f} ({f['end']['low']:.3f}..{f['end']['high']:.3f})",
            f"{f['effective_generated']:.2f}",
            f"{f['effective_trained']:.2f}",
            f"{f['rollouts']:,.0f}",
            f"{f['tokens']:,.0f}",
            f"{f['seconds']:.1f}",
        ]
        for name, f in figures.items()
    ]
    parts.append(table(heading, rows))
    if baseline:
        target = next(iter(figures.values()))["target"]
        parts.append(
            f"What it took to reach {target:.3f}, the mean accuracy of uniform at its end, as a share of all that "
            "uniform spent. On the mean curve: when it was first reached / after which it was never below again. By "
            "seed: first reached, against the end of uniform's run of the same seed."
        )
        heading = ["selector", *(f"{cost}, mean curve" for cost in COSTS), *(f"{cost}, by seed" for cost in COSTS)]
        rows = []
        for name, f in figures.items():
            mean = [f"{_text(f['of_uniform'][c]['first'])} / {_text(f['of_uniform'][c]['for_good'])}" for c in COSTS]
            seeds = [", ".join(_text(share) for share in f["per_seed"][cost].values()) for cost in COSTS]
            rows.append([name, *mean, *seeds])
        parts.append(table(heading, rows))
    return "\n\n".join(parts) + "\n"


def _text(share: float | None) -> str:
    return "never" if share is None else f"{share:.2f}"


def write_plot(raw: dict[str, Any], path: Path) -> None:
    """Held-out accuracy against generated tokens and against seconds: mean over seeds, band from min to max."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = by_selector(raw["runs"])
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, constrained_layout=True)
    for panel, cost in zip(panels, ("tokens", "seconds"), strict=True):
        for name, runs in groups.items():
            points = mean_points(runs)
            steps = {point["step"] for point in points}
            at = list(zip(*([p["accuracy"] for p in run["points"] if p["step"] in steps] for run in runs), strict=True))
            costs = [point[cost] for point in points]
            (line,) = panel.plot(costs, [point["accuracy"] for point in points], label=f"{name} ({len(runs)} seeds)")
            panel.fill_between(costs, list(map(min, at)), list(map(max, at)), color=line.get_color(), alpha=0.15, lw=0)
        if BASELINE in groups:
            end = fmean(run["points"][-1]["accuracy"] for run in groups[BASELINE])
            panel.axhline(end, color="grey", lw=0.8, ls="--")
        panel.set_xlabel({"tokens": "generated tokens", "seconds": "seconds of training, evaluation excluded"}[cost])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("held-out accuracy (greedy)")
    panels[0].legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
