"""The page of an executed notebook, which needs no network: nbconvert's, with a table of contents,
formulas as MathML, and the toolbox folded. The template is in notebooks/page.
"""

import html
import re
from pathlib import Path
from typing import Any

from jinja2 import pass_context
from jinja2.runtime import Context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode

CONTENTS = "<!-- contents -->"  # where the template wants them
HEADING = re.compile(r'<h([23]) id="([^"]*)">(.*?)<a class="anchor-link".*', re.DOTALL)


def formula(latex: str, display: str) -> str:
    """`latex` as MathML, which browsers draw themselves; as it is where that cannot be done."""
    try:
        return convert(latex.strip(), display=display)
    except Exception:  # a run must not lose its page to a formula
        return f"<code>{html.escape(latex)}</code>"


class Renderer(IPythonRenderer):
    """Markdown as HTML, remembering the headings."""

    def __init__(self, headings: list[str], **options: Any) -> None:
        super().__init__(escape=False, embed_images=True, **options)
        self.headings = headings

    def heading(self, text: str, level: int, **attrs: Any) -> str:
        """A heading with an id."""
        self.headings.append(super().heading(text, level, **attrs))
        return self.headings[-1]

    def block_math(self, body: str) -> str:
        """A formula on a line of its own."""
        return formula(body, "block")

    def inline_math(self, body: str) -> str:
        """A formula in the text."""
        return formula(body, "inline")

    def latex_environment(self, name: str, body: str) -> str:
        """Aligned equations, say."""
        return formula(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")


class Page(HTMLExporter):
    """nbconvert's exporter with our template and renderer."""

    def __init__(self) -> None:
        folder = str(Path(__file__).resolve().parent / "notebooks")
        super().__init__(template_name="page", extra_template_basedirs=[folder])  # type: ignore[no-untyped-call]
        self.headings: list[str] = []

    @pass_context
    def markdown2html(self, context: Context, source: str) -> str:
        """The filter that the template calls for prose."""
        attachments = context.get("cell", {}).get("attachments", {})
        renderer = Renderer(self.headings, attachments=attachments)
        return MarkdownWithMath(renderer=renderer).render(source)


def make_page(notebook: NotebookNode, title: str) -> str:
    """The page, with its images inside and links to its headings of level 2 and 3."""
    exporter = Page()
    page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": title}})
    found = [match for text in exporter.headings if (match := HEADING.match(text))]
    links = [f'<a class="level{h[1]}" href="#{h[2]}">{h[3]}</a>' for h in found]
    return str(page).replace(CONTENTS, "\n".join(links), 1)
