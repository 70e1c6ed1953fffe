"""Settings of the documentation site, which ``make docs`` builds."""

import mmbivit

project = "mmbivit"
author = "the authors of mmbivit"
version = release = mmbivit.__version__
html_title = f"mmbivit {release}"
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False
exclude_patterns = ["work_dirs"]  # which the notebook writes

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
autodoc_type_aliases = {"Config": "mmengine.config.Config"}  # not the attribute of packed networks
autodoc_member_order = "bysource"
toc_object_entries_show_parents = "hide"
