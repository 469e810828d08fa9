"""Markdown from a run: `python -m bench.training.report FILE.json ... [--metric NAME] [--out F]`.

With `--against METHOD` one table of all files: a row a method, a column a problem, each after the
last step that all its methods have reached.

Each method stands at its own best rate of the grid, the one with the lowest median over seeds;
seeds that diverged count as infinite. The spread is the distance between the quartiles. Marked are
the best median, and those that lie within one spread of it, the lesser of their own and the best's.
With `--out` the medians of all files, a row a problem, are written as JSON too.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import markdown

SAID = {
    "equal": "equal weights",
    "gradient_norms": "gradient norms, every step",
    "gradient_norms_100": "gradient norms, every 100",
    "gradient_norms_1000": "gradient norms, every 1,000",
    "momentum_config": "M-ConFIG, K updates a step",
    "small_gain": "fair",
    "small_gain_gains": "fair, row gains",
    "small_gain_reference": "default",
}
"""Methods as readers know them."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--metric", help="default: the one that ranks the problem's methods")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--against", help="a method, whose figures the others' are divided by")
    options = parser.parse_args(argv)
    read = [json.loads(file.read_text()) for file in options.files]
    # a stage of bench.device has a report in each row
    reports = [report for file in read for report in file.get("rows", [file])]
    if options.against is None:
        for report in reports:
            print(table(report, options.metric))
        rows = [medians(report, options.metric) for report in reports]
    else:
        rows = compared(together(reports), options.against)
        print(markdown(rows))
    if options.out is not None:
        runs = [report["about"]["command"] for report in reports]
        found = {"about": reports[0]["about"], "runs": runs}
        options.out.write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n")


def together(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Reports of one problem as one; of a method and rate that two have, the later's."""
    found: dict[str, dict[str, Any]] = {}
    for report in reports:
        case = report["settings"]["case"]
        old = found.get(case, report)
        found[case] = report | {"cells": old["cells"] | report["cells"]}
    return list(found.values())


def compared(reports: list[dict[str, Any]], against: str) -> list[dict[str, Any]]:
    """A row a method: median of the seeds at its best rate, by problem, and over `against`'s.

    The ratio's median over problems, and the least of them: the problem on which `against` loses
    most to the method. A column is a problem and the steps after which it stands.
    """
    columns: dict[str, dict[str, float]] = {}
    for report in reports:
        settings, cells = report["settings"], list(report["cells"].values())
        last = dict.fromkeys({cell["method"] for cell in cells}, 0)
        for cell in cells:
            last[cell["method"]] = max(last[cell["method"]], cell["steps"][-1])
        step = min(last.values())
        best = best_rates([until(cell, step) for cell in cells], settings["metric"])
        columns[f"{settings['case']} {step}"] = {m: row["median"] for m, row in best.items()}
    methods = sorted({name for column in columns.values() for name in column})
    rows, said = [], SAID.get(against, against)
    for name in methods:
        row: dict[str, Any] = {"method": SAID.get(name, name)}
        row |= {key: column.get(name) for key, column in columns.items()}
        pairs = [(c[name], c[against]) for c in columns.values() if {name, against} <= c.keys()]
        ratios = [theirs / ours for theirs, ours in pairs]
        rows.append(row | {f"median over {said}": float(np.median(ratios)), "least": min(ratios)})
    rows.sort(key=lambda row: row[f"median over {said}"])
    return [{k: _finite(v) for k, v in row.items()} for row in rows]


def until(cell: dict[str, Any], step: int) -> dict[str, Any]:
    """A cell as if its run had ended at that step."""
    end = cell["steps"].index(step) + 1
    return cell | {"metrics": {name: rows[:end] for name, rows in cell["metrics"].items()}}


def _finite(x: Any) -> Any:
    return None if isinstance(x, float) and not math.isfinite(x) else x


def table(report: dict[str, Any], metric: str | None = None) -> str:
    """The Markdown table of a report."""
    settings, cells = report["settings"], list(report["cells"].values())
    if not cells:
        return f"{settings['case']}: no run is finished\n"
    metric = metric or settings["metric"]
    rows = sorted(best_rates(cells, metric).values(), key=lambda row: row["median"])
    rates = ", ".join(f"{rate:g}" for rate in sorted({cell["rate"] for cell in cells}))
    lines = [
        f"{settings['case']}: {metric} after {settings['steps']} steps, "
        f"{len(settings['seeds'])} seeds, rates {rates}",
        "",
        "| method | best rate | median | quartiles | least to most | diverged | ms a step | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["quartiles"]
        mark = "best" if row is rows[0] else "within one spread" if within(row, rows[0]) else ""
        lines.append(
            f"| {row['method']} | {row['rate']:g} | {row['median']:.4g} | {low:.4g} to {high:.4g} "
            f"| {row['least']:.4g} to {row['most']:.4g} | {row['diverged']} "
            f"| {row['ms_per_step']:.2f} | {mark} |"
        )
    return "\n".join(lines) + "\n"


def medians(report: dict[str, Any], metric: str | None = None) -> dict[str, Any]:
    """A report in one row: what was run, and each method's median at its best rate."""
    settings = report["settings"]
    metric = metric or settings["metric"]
    best = best_rates(list(report["cells"].values()), metric).values()
    facts = {"problem": settings["case"], "measure": metric.replace("_", " ")}
    facts |= {"steps": settings["steps"], "seeds": len(settings["seeds"])}
    finite = {r["method"]: _finite(r["median"]) for r in best}
    return facts | {SAID.get(name, name): finite[name] for name in sorted(finite)}


def best_rates(cells: list[dict[str, Any]], metric: str) -> dict[str, dict[str, Any]]:
    """Each method's figures at the rate with the lowest median."""
    best: dict[str, dict[str, Any]] = {}
    for cell in cells:
        final = np.array([math.inf if x is None else x for x in cell["metrics"][metric][-1]])
        # quartiles of seeds that are there: interpolating between infinities gives nan
        low, median, high = np.quantile(final, (0.25, 0.5, 0.75), method="nearest")
        median = float(np.median(final)) if np.isfinite(final).all() else float(median)
        row = {
            "method": cell["method"],
            "rate": cell["rate"],
            "median": median,
            "quartiles": (float(low), float(high)),
            "least": float(final.min()),
            "most": float(final.max()),
            "diverged": int(np.isinf(final).sum()),
            "ms_per_step": cell["ms_per_step"],
        }
        old = best.get(cell["method"])
        if old is None or row["median"] < old["median"]:
            best[cell["method"]] = row
    return best


def within(row: dict[str, Any], best: dict[str, Any]) -> bool:
    """Whether the median lies within one spread of the best median."""
    spreads = [r["quartiles"][1] - r["quartiles"][0] for r in (row, best)]
    return row["median"] - best["median"] <= min(spreads)


if __name__ == "__main__":
    main()
