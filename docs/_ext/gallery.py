"""Notebooks for the site: executed ones, or their sources as they are, and a page of cards."""

import base64
import re
import shutil
from pathlib import Path

import jupytext
import nbformat


def fill(target: Path, sources: Path, executed: str | None) -> None:
    """Make `target` hold one `.ipynb` per notebook, a figure of each, `cards.txt`, nothing older.

    Args:
      target: folder of the site; git ignores what is in it.
      sources: folder of the jupytext sources.
      executed: folder of executed notebooks; None for none.

    Raises:
      FileNotFoundError: a folder of executed notebooks that holds none.
    """
    target.mkdir(exist_ok=True)
    for old in (*target.glob("*.ipynb"), *target.glob("*.png")):
        old.unlink()
    if executed is None:
        for source in sorted(sources.glob("*.py")):
            nbformat.write(jupytext.read(source), target / f"{source.stem}.ipynb")
    else:
        found = sorted(Path(executed).glob("*.ipynb"))
        if not found:
            raise FileNotFoundError(f"SMALLGAIN_NOTEBOOKS = {executed} holds no .ipynb")
        for notebook in found:
            shutil.copy(notebook, target)
    cards = "\n".join(_card(path) for path in sorted(target.glob("*.ipynb")))
    (target / "cards.txt").write_text(f"::::{{container}} cards\n{cards}\n::::\n")


def _card(path: Path) -> str:
    """A notebook's title, first sentence and first figure, as Markdown."""
    notebook = nbformat.read(path, as_version=4)
    title, _, rest = notebook.cells[0].source.partition("\n")
    about = re.split(r"(?<=\.)\s", rest.strip().replace("\n", " "), maxsplit=1)[0]
    lines = [f"**[{title.lstrip('# ')}](notebooks/{path.name})**", about]
    figure = _first_figure(notebook)
    if figure is not None:
        path.with_suffix(".png").write_bytes(base64.b64decode(figure))
        # the text beside it is the link, so that a reader by ear hears it once
        lines.insert(0, f"![](notebooks/{path.stem}.png)")
    return ":::{container} card\n" + "\n\n".join(lines) + "\n:::"


def _first_figure(notebook: nbformat.NotebookNode) -> str | None:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    figures = (output.get("data", {}).get("image/png") for output in outputs)
    return next(filter(None, figures), None)
