"""The directive `measured`: a table of a file that a benchmark wrote, with where it comes from.

:::{measured} solver.json gradient
:::

names a file of `bench/results` and a list of rows in it; `:columns: edges seconds` takes only
these. Below the table stand the command, the commit, and the machine, but for `:continued:`, where
another table of the same file follows.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from bench.report import markdown

FOLDER = Path(__file__).parents[2] / "bench" / "results"


class Measured(SphinxDirective):
    required_arguments = 2
    option_spec: ClassVar = {"columns": str.split, "continued": directives.flag}

    def run(self) -> list[nodes.Node]:
        name, table = self.arguments
        path = FOLDER / name
        self.env.note_dependency(str(path))
        report = json.loads(path.read_text())
        rows = report[table]
        if (columns := self.options.get("columns")) is not None:
            rows = [{key: row[key] for key in columns if key in row} for row in rows]
            rows = [row for row in rows if len(row) == len(columns)]
        end = "" if "continued" in self.options else about(report["about"], report.get("runs", ()))
        return self.parse_text_to_nodes(f"{markdown(rows)}\n\n{end}")


def about(found: dict[str, Any], runs: Sequence[str] = ()) -> str:
    """Where a table comes from; `runs` are the commands, where there were several."""
    commands = "`, `".join(runs or [found["command"]])
    made = f"`{commands}`, commit {found['commit']}, {found['date']}"
    return f"*{made}: {found['cores']} cores, {found['device']}, jax {found['jax']}.*"


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("measured", Measured)
    return {"parallel_read_safe": True}
