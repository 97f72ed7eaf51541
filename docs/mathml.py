"""Equations as MathML with a font of their own: they need no script and no network to be read."""

import re
from importlib.resources import files

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number
from sphinx.util.typing import ExtensionMetadata
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)

# ziamath draws equations in Python; here it is wanted for the font it carries.
FONT = str(files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf")


def visit_inline(translator: HTML5Translator, node: nodes.math) -> None:
    """Write an equation within a sentence."""
    translator.body.append(to_mathml(node, "inline"))
    raise nodes.SkipNode


def visit_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    """Write an equation on lines of its own, with its number where it has a label."""
    classes = " ".join(["math", *node["classes"]])
    translator.body.append(translator.starttag(node, "div", CLASS=classes))
    if node["number"]:
        number = get_node_equation_number(translator, node)
        translator.body.append(f'<span class="eqno">({number})')
        translator.add_permalink_ref(node, "Link to this equation")
        translator.body.append("</span>")
    translator.body.append(to_mathml(node, "block"))
    translator.body.append("</div>")
    raise nodes.SkipNode


def to_mathml(node: nodes.math | nodes.math_block, display: str) -> str:
    """Convert ``node``'s LaTeX, and warn where the converter let a command through unread."""
    mathml = convert(with_known_environments(node.astext()), display=display)
    unread = re.search(r"<m[ion]>(&|\\[^<]*)</m", mathml)
    if unread:
        logger.warning("latex2mathml cannot read %r", unread[1], location=node)
    # A norm's bars would stretch to the height of everything beside them.
    return mathml.replace("<mo>&#x02016;</mo>", '<mo stretchy="false">&#x02016;</mo>')


def with_known_environments(latex: str) -> str:
    """Spell alignment the one way that latex2mathml reads; several lines alone are aligned too."""
    latex = re.sub(r"\\(begin|end)\{(aligned|align|split)\}", r"\\\1{align*}", latex)
    if r"\\" in latex and r"\begin" not in latex:
        return rf"\begin{{align*}}{latex}\end{{align*}}"
    return latex


def setup(app: Sphinx) -> ExtensionMetadata:
    """Offer the renderer to Sphinx under the name ``mathml``."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    app.add_css_file("mathml.css")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
