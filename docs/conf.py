"""Sphinx: the documents of this folder, and the API from its docstrings."""

import importlib.metadata

project = "metastore"
author = "The metastore authors"
project_copyright = "2026, The metastore authors"
release = importlib.metadata.version("metastore")

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
]
root_doc = "index"
exclude_patterns = ["_build"]
html_title = f"metastore {release}"

autodoc_typehints = "none"  # the signature says it once, as it is written
autodoc_member_order = "bysource"
myst_heading_anchors = 3
numpydoc_class_members_toctree = False
numpydoc_show_class_members = False
# Links to Python and numpy would need the network: "offline once installed".
nitpick_ignore_regex = [("py:.*", r"(?!metastore).*")]
