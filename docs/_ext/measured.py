"""The directive `measured`: a table of a file that a benchmark wrote, with where it comes from.

:::{measured} solver.json gradient
:::

names a file of `bench/results` and a list of rows in it. Below the table stand the command, the
commit, and the machine.
"""

import json
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

FOLDER = Path(__file__).parents[2] / "bench" / "results"


class Measured(SphinxDirective):
    required_arguments = 2

    def run(self) -> list[nodes.Node]:
        name, table = self.arguments
        path = FOLDER / name
        self.env.note_dependency(str(path))
        report = json.loads(path.read_text())
        text = [*markdown(report[table]), "", about(report["about"])]
        return self.parse_text_to_nodes("\n".join(StringList(text, source=str(path))))


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a table."""
    columns = list(rows[0])
    cells = [columns, ["---"] * len(columns)]
    cells += [[shown(row[column]) for column in columns] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in cells]


def shown(value: Any) -> str:
    """A cell: three digits of a number, a hyphen for what there is not."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if value is None else str(value)


def about(found: dict[str, Any]) -> str:
    """Where a table comes from."""
    made = f"`{found['command']}`, commit {found['commit']}, {found['date']}"
    return f"*{made}: {found['cores']} cores, {found['device']}, jax {found['jax']}.*"


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("measured", Measured)
    return {"parallel_read_safe": True}
