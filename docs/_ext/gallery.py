"""Notebooks for the site: executed ones, or their sources as they are."""

import shutil
from pathlib import Path

import jupytext
import nbformat


def fill(target: Path, sources: Path, executed: str | None) -> None:
    """Make `target` hold one `.ipynb` per notebook and nothing older.

    Args:
      target: folder of the site; git ignores what is in it.
      sources: folder of the jupytext sources.
      executed: folder of executed notebooks; None for none.

    Raises:
      FileNotFoundError: a folder of executed notebooks that holds none.
    """
    target.mkdir(exist_ok=True)
    for old in target.glob("*.ipynb"):
        old.unlink()
    if executed is None:
        for source in sorted(sources.glob("*.py")):
            nbformat.write(jupytext.read(source), target / f"{source.stem}.ipynb")
        return
    found = sorted(Path(executed).glob("*.ipynb"))
    if not found:
        raise FileNotFoundError(f"SMALLGAIN_NOTEBOOKS = {executed} holds no .ipynb")
    for notebook in found:
        shutil.copy(notebook, target)
