"""From the runs of `bench_grpo_selection.py` to its tables and its plot. Pure but for `write_plot`.

A run: {"arm", "seed", "points", "finished"}, where a point is {"step", "accuracy", "seconds", "generated", "trained",
...}: measured on held-out rows, with the costs of training so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bench_common import hardware_text, table
from bench_report import curve, first_reached, reached_for_good

COSTS = {"generated": "generated tokens", "trained": "trained tokens", "seconds": "seconds", "step": "steps"}
BASELINE = "uniform"
Runs = Sequence[dict[str, Any]]


def mean_points(runs: Runs) -> list[dict[str, float]]:
    """Points averaged over runs, at the steps that all of them were evaluated at."""
    by_step = [{point["step"]: point for point in run["points"]} for run in runs]
    steps = sorted(set.intersection(*(set(points) for points in by_step)))
    keys = ("accuracy", *COSTS)
    return [{key: fmean(points[step][key] for points in by_step) for key in keys} for step in steps]


def cost_shares(runs: Runs, baseline: Runs, cost: str) -> dict[str, Any]:
    """What it cost to reach the accuracy that uniform ended with, as a share of all that uniform spent.

    "first", "for_good": on the mean curve. "per_seed": first reached, against uniform's run of that seed. None: never.
    """
    ours, theirs = curve(mean_points(runs), cost), curve(mean_points(baseline), cost)
    whole, target = theirs[-1]
    by_seed = {run["seed"]: curve(run["points"], cost)[-1] for run in baseline}
    return {
        "first": _share(first_reached(ours, target), whole),
        "for_good": _share(reached_for_good(ours, target), whole),
        "per_seed": {
            run["seed"]: _share(first_reached(curve(run["points"], cost), by_seed[run["seed"]][1]), whole_of_seed)
            for run in runs
            if run["seed"] in by_seed
            for whole_of_seed in (by_seed[run["seed"]][0],)
        },
    }


def _share(cost: float | None, whole: float) -> float | None:
    return None if cost is None else cost / whole


def seconds_a_step(runs: Runs) -> dict[str, float]:
    """Mean seconds of a rollout step by part; "other" is what no part of the trainer's clock holds."""
    ends = [run["points"][-1] for run in runs]
    parts = {part: fmean(end["parts"][part] / end["step"] for end in ends) for part in ends[0]["parts"]}
    return parts | {"other": fmean(end["seconds"] / end["step"] for end in ends) - sum(parts.values())}


def render(raw: dict[str, Any]) -> str:
    """The tables, as markdown. Runs that did not come to their end are counted, and left out of all means."""
    groups: dict[str, list[dict[str, Any]]] = {arm: [] for arm in raw["settings"]["arms"]}
    for run in raw["runs"]:
        groups.setdefault(run["arm"], []).append(run)
    done = {arm: [run for run in runs if run["finished"]] for arm, runs in groups.items()}
    baseline = done.get(BASELINE, [])
    parts = [f"Hardware: {hardware_text(raw['hardware'])}", f"Settings: {raw['settings']}"]
    seeds = len(raw["settings"]["seeds"])
    parts += [
        f"WARNING: {arm}: {len(runs)} of {seeds} runs came to their end; see runs/*.log"
        for arm, runs in done.items()
        if len(runs) < seeds
    ]
    done = {arm: runs for arm, runs in done.items() if runs}
    if not done:
        return "\n\n".join(parts) + "\n"
    parts.append("At the end, mean (min..max) over seeds:\n\n" + _ends(done))
    if baseline:
        target = mean_points(baseline)[-1]["accuracy"]
        parts.append(
            f"What it took to reach {target:.3f}, the mean accuracy of uniform at its end, as a share of all that "
            "uniform spent. On the mean curve: first / for good. By seed: "
            "seconds when it was first reached, against the end of uniform's run of the same seed.\n\n"
            + _against_uniform(done, baseline)
        )
    parts.append("Milliseconds of a rollout step, mean, by part:\n\n" + _times(done))
    return "\n\n".join(parts) + "\n"


def _ends(groups: dict[str, Runs]) -> str:
    kinds = [key for key in next(iter(groups.values()))[0]["points"][0] if key.startswith("accuracy/")]
    heading = ["arm", "seeds", "accuracy at start", "at end", *(f"{key.partition('/')[2]}, at end" for key in kinds)]
    heading += [
        "greedy, at end",
        "effective ratio, generated",
        "effective ratio, trained on",
        "generated tokens",
        "trained tokens",
    ]
    heading += ["rows trained", "seconds"]
    rows = []
    for arm, runs in groups.items():
        ends = [run["points"][-1] for run in runs]
        effective = [ratio for run in runs for point in run["points"] for ratio in point["effective"]]
        rows.append(
            [
                arm,
                len(runs),
                f"{fmean(run['points'][0]['accuracy'] for run in runs):.3f}",
                _spread([end["accuracy"] for end in ends]),
                *(f"{fmean(end[key] for end in ends):.3f}" for key in (*kinds, "greedy")),
                f"{fmean(effective):.2f}",
                f"{fmean(end['rows_with_advantage'] / max(end['rows'], 1) for end in ends):.2f}",
                *(f"{fmean(end[key] for end in ends):,.0f}" for key in ("generated", "trained", "rows")),
                f"{fmean(end['seconds'] for end in ends):.0f}",
            ]
        )
    return table(heading, rows)


def _against_uniform(groups: dict[str, Runs], baseline: Runs) -> str:
    rows = []
    for arm, runs in groups.items():
        shares = {cost: cost_shares(runs, baseline, cost) for cost in COSTS}
        mean = [f"{_text(share['first'])} / {_text(share['for_good'])}" for share in shares.values()]
        rows.append([arm, *mean, ", ".join(map(_text, shares["seconds"]["per_seed"].values()))])
    return table(["arm", *COSTS.values(), "seconds, by seed"], rows)


def _times(groups: dict[str, Runs]) -> str:
    times = {arm: seconds_a_step(runs) for arm, runs in groups.items()}
    used = [part for part in next(iter(times.values())) if any(found[part] > 5e-5 for found in times.values())]
    rows = [
        [arm, *(f"{1000 * found[part]:.0f}" for part in used), f"{1000 * sum(found.values()):.0f}"]
        for arm, found in times.items()
    ]
    return table(["arm", *(part.replace("_", " ") for part in used), "all"], rows)


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f} ({min(values):.3f}..{max(values):.3f})"


def _text(share: float | None) -> str:
    return "never" if share is None else f"{share:.2f}"


def write_plot(raw: dict[str, Any], path: Path) -> None:
    """Held-out accuracy against generated tokens, trained tokens and seconds: mean over seeds, band from min to max."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    costs = ("generated", "trained", "seconds")
    figure, panels = pyplot.subplots(1, len(costs), figsize=(15, 4.6), sharey=True, constrained_layout=True)
    for arm in raw["settings"]["arms"]:
        runs = [run for run in raw["runs"] if run["arm"] == arm and run["finished"]]
        if not runs:
            continue
        points = mean_points(runs)
        steps = {point["step"] for point in points}
        at = list(zip(*([p["accuracy"] for p in run["points"] if p["step"] in steps] for run in runs), strict=True))
        for panel, cost in zip(panels, costs, strict=True):
            spent = [point[cost] for point in points]
            style = "--" if arm == BASELINE else "-"
            (line,) = panel.plot(
                spent, [point["accuracy"] for point in points], style, label=f"{arm} ({len(runs)} seeds)"
            )
            panel.fill_between(spent, list(map(min, at)), list(map(max, at)), color=line.get_color(), alpha=0.1, lw=0)
    for panel, cost in zip(panels, costs, strict=True):
        panel.set_xlabel({"seconds": "seconds of training, evaluation excluded"}.get(cost, COSTS[cost]))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("held-out accuracy")
    panels[-1].legend(loc="lower right", fontsize=7)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
