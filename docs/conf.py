"""How Sphinx builds these pages."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

# The extension beside this file.
sys.path.insert(0, str(Path(__file__).parent))
from mathml import FONT

project = "commhooks"
author = "commhooks contributors"
copyright = "2026, commhooks contributors"  # noqa: A001 (Sphinx chose the name)
version = release = installed_version("commhooks")

extensions = [
    "mathml",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

# The pages can be built without the extra `frameworks`.
autodoc_mock_imports = ["lightning", "transformers"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
# "Attributes:" sections stay within their class; entries of their own would clash with autodoc's.
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

# Sphinx warns about an inventory only when every one of its locations fails. The local one is
# empty, so without a network the build goes on, and names of other projects are plain text.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", (None, "offline.inv")),
    "torch": ("https://docs.pytorch.org/docs/stable", (None, "offline.inv")),
}
intersphinx_timeout = 5

html_theme = "furo"
html_title = "commhooks"
html_static_path = ["mathml.css", "pages.css", FONT]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_sourcelink = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
