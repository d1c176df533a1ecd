"""The documentation as a site: ``make docs``."""

import sib_ext

project, author, version, release = "sib_ext", "The sib_ext authors", sib_ext.__version__, sib_ext.__version__
project_copyright = author
html_title = f"sib_ext {version}"
html_theme = "furo"
html_show_copyright = html_show_sphinx = False

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["images/*"]
nitpicky = True

myst_heading_anchors = 4
nb_execution_mode = "cache"  # notebooks are stored without results, and run where the site is built
nb_execution_timeout = 1200  # s, of a cell
nb_execution_raise_on_error = True
copybutton_exclude = ".linenos, .gp, .go"  # what is typed, not what is printed

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say types, shapes and ranges
napoleon_numpy_docstring = False
