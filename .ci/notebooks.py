"""Execute every notebook from a clean kernel, two at a time: `python .ci/notebooks.py OUT`."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient


def execute(source: Path, out: Path) -> None:
    start = time.perf_counter()
    notebook = jupytext.read(source)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    nbformat.write(notebook, out / f"{source.stem}.ipynb")
    print(f"executed {source} in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        for done in [
            pool.submit(execute, path, out) for path in sorted(Path("notebooks").glob("*.py"))
        ]:
            done.result()
