"""Execute every notebook source from a clean kernel: `python .ci/notebooks.py OUT`."""

import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

out = Path(sys.argv[1])
for source in sorted(Path("notebooks").glob("*.py")):
    notebook = jupytext.read(source)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    nbformat.write(notebook, out / f"{source.stem}.ipynb")
    print(f"executed {source}")
