"""Sphinx settings: `python -m sphinx -W --keep-going -b html docs OUT`.

SMALLGAIN_NOTEBOOKS names a folder of executed notebooks, as `.ci/notebooks.py` leaves it. Without
it the gallery shows the sources, without outputs.
"""

import os
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import gallery  # noqa: E402

project = "smallgain_jax"
author = "the smallgain_jax authors"
project_copyright = author
version = release = installed_version("smallgain_jax")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_nb",
    "mathml",
    "docstrings",
    "measured",
]
exclude_patterns = ["_ext"]
templates_path = []
html_theme = "furo"
html_title = f"smallgain_jax {version}"
html_math_renderer = "mathml"
html_copy_source = html_show_sphinx = False
html_css_files = ["site.css"]
html_static_path = ["_static"]

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_merge_streams = True
suppress_warnings = ["myst.header"]  # notebooks may start at any level

# docstrings give shape, dtype and unit, which annotations do not
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Log-parameters", "returns_style")]
python_maximum_signature_line_length = 80

gallery.fill(HERE / "notebooks", HERE.parent / "notebooks", os.environ.get("SMALLGAIN_NOTEBOOKS"))
