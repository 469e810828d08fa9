"""The directive `measured`: a table of a file that a benchmark wrote, with where it comes from.

:::{measured} relaxation.json relaxation
:columns: kind, method, steps
:::

names a file of `bench/results`, a table in it, and the columns to show (all, unless told). Below
the table stand the command, the commit, and the machine.
"""

import json
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

FOLDER = Path(__file__).parents[2] / "bench" / "results"


class Measured(SphinxDirective):
    required_arguments = 2
    option_spec: ClassVar = {"columns": str, "where": str}

    def run(self) -> list[nodes.Node]:
        name, table = self.arguments
        path = FOLDER / name
        self.env.note_dependency(str(path))
        report = json.loads(path.read_text())
        columns = [c.strip() for c in self.options.get("columns", "").split(",") if c.strip()]
        key, _, value = self.options.get("where", "").partition("=")
        rows = [row for row in rows_of(report[table]) if not key or str(row[key]) == value]
        if not rows:
            raise self.error(f"{name} has no rows in {table!r}")
        text = [*markdown(rows, columns or list(rows[0])), "", about(report["about"])]
        return self.parse_text_to_nodes("\n".join(StringList(text, source=str(path))))


def rows_of(content: Any) -> list[dict[str, Any]]:
    """Rows, from a list of them or from a dict of named ones."""
    if isinstance(content, list):
        return content
    if all(isinstance(value, dict) for value in content.values()):
        return [{"": name} | value for name, value in content.items()]
    return [content]


def markdown(rows: list[dict[str, Any]], columns: list[str]) -> list[str]:
    """Lines of a table."""
    cells = [columns, ["---"] * len(columns)]
    cells += [[shown(row.get(column)) for column in columns] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in cells]


def shown(value: Any) -> str:
    """A cell: three digits of a number, a hyphen for what there is not."""
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    if isinstance(value, float):
        return f"{value:.3g}"
    return "-" if value is None else str(value)


def about(found: dict[str, Any]) -> str:
    """Where a table comes from."""
    made = f"`{found['command']}`, commit {found['commit']}, {found['date']}"
    return f"*{made}: {found['cores']} cores, {found['device']}, jax {found['jax']}.*"


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("measured", Measured)
    return {"parallel_read_safe": True}
