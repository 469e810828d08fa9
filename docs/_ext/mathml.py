"""Formulas as MathML, which browsers draw themselves: the site needs neither network nor LaTeX.

The conversion is docutils' own; a formula that it does not know fails the build.
"""

import re

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx

_DIGITS = re.compile(r"\\([td]?frac)(\d)(\d)")


def mathml(tex: str) -> str:
    """A formula as an inline `<math>` element."""
    # `\\tfrac12` is one half to LaTeX, and twelve over what follows to docutils
    tex = _DIGITS.sub(r"\\\1{\2}{\3}", " ".join(tex.split()))
    return latex2mathml.tex2mathml(tex, as_block=False)


def _inline(translator, node: nodes.math) -> None:
    translator.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def _block(translator, node: nodes.math_block) -> None:
    # limits beside their operators: below, they collide where no font with a table for
    # mathematics is installed
    display = mathml(node.astext()).replace(
        "<math ", '<math display="block" displaystyle="false" ', 1
    )
    translator.body += [translator.starttag(node, "div", CLASS="math"), display, "</div>\n"]
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
