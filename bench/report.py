"""Tables and plots from benchmark files: `python -m bench.report FILE.json ... [--plots FOLDER]`.

Prints every table of the files as Markdown, tables of one name as one. With a folder, what was
compared by kind of graph becomes bars of time, and time against edges a log-log line.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

Rows = list[dict[str, Any]]
PER_STEP = "_per_step_s"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--plots", type=Path, help="folder for PNG figures")
    options = parser.parse_args(argv)
    found: dict[str, Rows] = {}
    for file in options.files:
        report = json.loads(file.read_text())
        about = ", ".join(f"{key} {value}" for key, value in report.pop("about", {}).items())
        smoke = " (smoke run: sizes are tiny)" if report.pop("smoke", False) else ""
        print(f"{file}: {about}{smoke}\n")
        numbers = {name: x for name, x in report.items() if not isinstance(x, list | dict)}
        tables = {name: x for name, x in report.items() if name not in numbers}
        if numbers:
            tables[file.stem] = numbers
        for name, content in tables.items():
            found.setdefault(name, []).extend(rows_of(content))
    for name, rows in found.items():
        print(f"## {name}\n\n{markdown(rows)}\n")
        if options.plots is not None:
            options.plots.mkdir(parents=True, exist_ok=True)
            draw(name, rows, options.plots)


def rows_of(content: Any) -> Rows:
    """Rows, from a list of them, a dict of named ones, or a single one."""
    if isinstance(content, list):
        return content if all(isinstance(row, dict) for row in content) else [{"": content}]
    if isinstance(content.get("rows"), list):
        return content["rows"]
    if content and all(isinstance(value, dict) for value in content.values()):
        return [{"name": name} | value for name, value in content.items()]
    return [content]


def markdown(rows: Rows) -> str:
    """A table with a column for every key that any row has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[_text(row.get(column)) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return "" if value is None else str(value)


def draw(name: str, rows: Rows, folder: Path) -> None:
    """The figure that a table calls for, if any."""
    if all({"kind", "method", "wall_least_s"} <= row.keys() for row in rows):
        figure = bars(rows)
    elif all("edges" in row and any(key.endswith(PER_STEP) for key in row) for row in rows):
        figure = lines_of(rows)
    else:
        return
    figure.savefig(folder / f"{name}.png", dpi=150)
    plt.close(figure)


def bars(rows: Rows) -> Any:
    """Time of each method on each kind; hatched where it did not arrive."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = plt.subplots(figsize=(7, 1 + 0.9 * len(kinds)), layout="constrained")
    height = 0.8 / len(methods)
    for k, method in enumerate(methods):
        mine = [row for row in rows if row["method"] == method]
        at = [kinds.index(row["kind"]) + k * height for row in mine]
        drawn = axes.barh(at, [row["wall_least_s"] for row in mine], height, label=method)
        for bar, row in zip(drawn, mine, strict=True):
            bar.set_hatch("" if row.get("steps") else "///")
    axes.set(xscale="log", xlabel="seconds (hatched: not arrived)")
    axes.set_yticks(np.arange(len(kinds)) + 0.4 - height / 2, kinds)
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=3, fontsize="small")
    return figure


def lines_of(rows: Rows) -> Any:
    """Time of a step against edges, beside a line of exponent 1."""
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    edges = np.array([row["edges"] for row in rows], float)
    for key in dict.fromkeys(key for row in rows for key in row if key.endswith(PER_STEP)):
        axes.loglog(edges, [row[key] for row in rows], "o-", label=key.removesuffix(PER_STEP))
    first = min(value for key, value in rows[0].items() if key.endswith(PER_STEP))
    axes.loglog(edges, first * edges / edges[0], "k:", label="exponent 1")
    axes.set(xlabel="edges", ylabel="seconds a step")
    axes.legend()
    return figure


if __name__ == "__main__":
    main()
