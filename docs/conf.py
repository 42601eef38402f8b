"""The site that `make docs` writes to build/site.

Sphinx with furo: docstrings have Sphinx's roles, autodoc shows defaults and inherited names as Python has them, and the
tree of sources is the repository, so that links between its Markdown files hold in both. The pages load nothing from
elsewhere.
"""

import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import PycodeError
from sphinx.pycode import ModuleAnalyzer

ROOT = Path(__file__).parents[1]

project = "fdcr_fast"
author = "the authors of fdcr_fast"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib.autodoc_pydantic"]
include_patterns = ["docs/**", "benchmarks/results/*.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]
exclude_patterns = [".*", "build", "runs", "csrc", "examples", "fdcr_fast", "tests", "docs/conf.py"]
root_doc = "docs/index"

html_theme = "furo"
html_title = "fdcr_fast"
html_extra_path = ["index.html"]  # leads from the folder to docs/index.html
html_show_copyright = False
html_copy_source = False
pygments_style, pygments_dark_style = "friendly", "monokai"

myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_mock_imports = ["flwr", "nvflare", "byzfl"]
autodoc_preserve_defaults = True
for framework in autodoc_mock_imports:  # else their sources are looked for, and for that they are imported
    ModuleAnalyzer.cache["module", framework] = PycodeError("mocked")
maximum_signature_line_length = 90
napoleon_use_ivar = True
autodoc_pydantic_model_member_order = "bysource"
autodoc_pydantic_model_show_json = False
autodoc_pydantic_model_show_config_summary = False
autodoc_pydantic_model_show_validator_summary = False
autodoc_pydantic_model_show_validator_members = False
autodoc_pydantic_model_show_field_summary = False
autodoc_pydantic_field_list_validators = False
autodoc_pydantic_field_show_constraints = False


def sources(app: Sphinx, docname: str, source: list[str]) -> None:
    """The site's first page begins with the README, with its links as they are from docs/."""
    if docname == root_doc:
        readme = (ROOT / "README.md").read_text()
        readme = re.sub(r"\]\((docs/)?(?=\w)(?!\w+:)", lambda found: "](" if found[1] else "](../", readme)
        source[0] = readme + source[0]
    else:
        source[0] = source[0].replace("](../README.md", "](index.md")


def setup(app: Sphinx) -> None:
    """Let Sphinx call what is above."""
    app.connect("source-read", sources)
