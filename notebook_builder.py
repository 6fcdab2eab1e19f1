"""Assemble the notebook, stage by stage, from its sections and the two packages they import.

One rule does it. The first time a section imports from the story, that module's own cells stand
there in its place. An import from the toolbox stays an import, and the file travels in a cell of
its own. So the notebook, opened alone, carries all of its code, and every definition in it is one
that the tests import.
"""

import argparse
import ast
import base64
import difflib
import hashlib
import io
import itertools
import json
import re
import shutil
import sys
import time
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from emotion_toolbox.files import write_text
from notebook_sources import (
    INSTALL_TAG,
    BuildError,
    Cell,
    Import,
    Packages,
    Source,
    namespace_problems,
    read_source,
    same_scope,
    source_problems,
)

ROOT = Path(__file__).resolve().parent
NOTEBOOK = ROOT / "notebooks" / "Improved_CNN_Transfer_Learning_Enhanced.ipynb"
MAGIC_TAG = "magic"  # the cell that defines %%toolbox; the toolbox's files follow it
TOOLBOX_TAG = "toolbox"  # the cells of these files, and the heading above them
TOOLBOX_CELL = "%%toolbox "  # how a cell with a file begins
COMMAND = re.compile(r"# (%{1,2}|!)[A-Za-z]")  # a magic or a shell command, as a section writes it
PICTURE = re.compile(r"(?<=\]\()[\w./-]+\.png(?=\))")  # a file of the repository, in prose
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


@dataclass(frozen=True)
class Stage:
    """One of the scripts that build the notebook, and the sections it is answerable for."""

    name: str
    script: str
    sections: tuple[str, ...]  # file names under notebooks/sections, without .py


@dataclass(frozen=True)
class Project:
    """Where the sources are."""

    story: Path = ROOT / "emotion_transfer"
    sections: Path = ROOT / "notebooks" / "sections"
    toolbox: Path = ROOT / "emotion_toolbox"

    def label(self, path: Path) -> str:
        """`path` as messages show it."""
        root = self.story.parent
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


# --- from sources to cells ----------------------------------------------------------------------


class Assembly:
    """The notebook as far as it has been told: what is already introduced and imported."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.packages = Packages(project.story.name, project.toolbox.name)
        self.told: dict[str, Source] = {}  # sections and modules of the story, in order
        self.imported: set[Import] = set()
        self.has_magic = False
        self._read: dict[str, Source] = {}

    def section(self, name: str) -> Iterator[Cell]:
        """The cells of the next section, with those of modules it is the first to import from."""
        path = self.project.sections / f"{name}.py"
        yield from self._tell(self._source(path, name, "section"))

    def _tell(self, source: Source) -> Iterator[Cell]:
        """The cells of `source`; a cell of imports alone is none, they wait for the next one."""
        self._check_names(source)
        waiting: list[Cell] = []
        for cell in source.cells:
            if cell.kind != "code" or INSTALL_TAG in cell.tags:
                self.imported |= set(cell.imports())
                yield _as_written(cell, source.kind)
                continue
            if source.kind == "section":
                asked = {i.module: source.at(i.line) for i in cell.imports() if self._in_story(i)}
                for name in asked:
                    yield from self._introduce(name, asked)
            self.has_magic |= MAGIC_TAG in cell.tags
            waiting.append(cell)
            if not _only_imports(cell):
                yield self._joined(source, waiting)
                waiting = []
        if waiting and (left := self._joined(source, waiting)).source:
            yield left
        self.told[source.name] = source

    def _introduce(self, name: str, asked: Mapping[str, str]) -> Iterator[Cell]:
        """A module's cells, once, after those that it needs of the modules `asked` for with it."""
        module = self._module(name)
        later = {other: where for other, where in asked.items() if other != name}
        for item in module.imports() if name not in self.told else ():
            if self._in_story(item) and item.module not in self.told:
                if item.module not in later:
                    raise BuildError(
                        f"{module.at(item.line)}: {name} imports from {item.module}, which is not "
                        f"in the notebook yet where {asked[name]} asks for {name}; write a cell "
                        f"`from {item.module} import {item.name}` in a section before that"
                    )
                yield from self._introduce(item.module, later)
        if name not in self.told:
            yield from self._tell(module)

    def _joined(self, source: Source, cells: Sequence[Cell]) -> Cell:
        """The last of `cells` under the imports of them all, less what the notebook has already."""
        texts = []
        for cell in cells:
            new = {i for i in cell.imports() if not self._in_story(i)} - self.imported
            if not self.has_magic and (early := [i.line for i in new if self._in_toolbox(i)]):
                raise BuildError(
                    f"{source.at(min(early))}: imports from the toolbox, which the notebook has "
                    f"only after a section's cell tagged {MAGIC_TAG!r}; put that before"
                )
            self.imported |= new
            written = _as_written(cell.with_imports(new), source.kind).source
            if _only_imports(cell):
                written = re.sub(r"(?m)^#.*\n?", "", written).strip("\n")
            texts.append(written)
        return replace(cells[-1], source=_stack([text for text in texts if text]))

    def toolbox_cells(self) -> list[Cell]:
        """A cell for every file of the toolbox that is needed, each after those it imports."""
        found: dict[str, Source] = {}

        def visit(name: str, asked: str, chain: tuple[str, ...]) -> None:
            if name in chain:
                raise BuildError(f"{asked}: {' -> '.join([*chain, name])} is a circle of imports")
            if name not in found:
                file = self._module(name, asked)
                self._check_names(file)
                for item in file.imports():
                    if self._in_toolbox(item):
                        visit(item.module, file.at(item.line), (*chain, name))
                found[name] = file

        for source in self.told.values():
            for item in source.imports():
                if self._in_toolbox(item):
                    visit(item.module, source.at(item.line), ())
        return [_toolbox_cell(file) for file in found.values()]

    def _check_names(self, source: Source) -> None:
        """Refuse an import of a name that its module does not define."""
        for item in source.imports():
            if not self.packages.holder(item.module):
                continue
            module = self._module(item.module, source.at(item.line))
            names = {binding.name for binding in module.bindings()}
            if item.name not in names:
                close = difflib.get_close_matches(item.name or "", names, n=1)
                hint = f"; did you mean `{close[0]}`?" if close else ""
                if item.name in {i.binds for i in module.imports()}:
                    hint = ", it imports it; import it from where it is defined"
                raise BuildError(
                    f"{source.at(item.line)}: {item.module} does not define `{item.name}`{hint}"
                )

    def _module(self, name: str, asked: str = "") -> Source:
        package, *inside = name.split(".")
        story = package == self.packages.story
        base = (self.project.story if story else self.project.toolbox).joinpath(*inside)
        path = base / "__init__.py" if story and base.is_dir() else base.with_suffix(".py")
        if not path.is_file():
            raise BuildError(f"{asked}: there is no {name} ({self.project.label(path)})")
        return self._source(path, name, "story" if story else "toolbox")

    def _source(self, path: Path, name: str, kind: str) -> Source:
        if name not in self._read:
            source = read_source(path, self.project.label(path), name, kind)
            if problems := source_problems(source, self.packages):
                raise BuildError("\n".join(problems))
            self._read[name] = source
        return self._read[name]

    def _in_story(self, item: Import) -> bool:
        return self.packages.holder(item.module) == self.packages.story

    def _in_toolbox(self, item: Import) -> bool:
        return self.packages.holder(item.module) == self.packages.toolbox


def _only_imports(cell: Cell) -> bool:
    imports = [s for s in cell.body if isinstance(s, ast.Import | ast.ImportFrom)]
    return 0 < len(imports) == len(cell.body) and not COMMAND.search(cell.source)


def _stack(texts: Sequence[str]) -> str:
    """Import statements above the code that needs them, with the blank lines in between."""
    *imports, code = texts or [""]
    if code.startswith("%%"):  # a cell magic must come first
        magic, _, code = code.partition("\n")
        return "\n".join([magic, *imports, code])
    gap = "\n\n\n" if re.match("@|(def|class|async) ", code) else "\n\n"
    gap = "\n" if re.match("(from|import) ", code) else gap
    return gap.join(["\n".join(imports), code]) if imports else code


def _as_written(cell: Cell, kind: str) -> Cell:
    """`cell` without words to the formatter and, of a section, with magics as a notebook has them.

    jupytext would do the latter too, but it takes a comment such as ``# ls is short`` for one.
    """
    if cell.kind != "code":
        return cell
    lines = cell.source.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(cell.source + "\n").readline):
        row, comment = token.start[0] - 1, token.string
        if token.type != tokenize.COMMENT:
            continue
        if comment == "# fmt: skip":
            lines[row] = lines[row].removesuffix(f"  {comment}")
        elif kind == "section" and lines[row].strip() == comment and COMMAND.match(comment):
            lines[row] = lines[row].replace("# ", "", 1)
    return replace(cell, source="\n".join(lines))


def _toolbox_cell(file: Source) -> Cell:
    """The file as it is. Colab shows the title for the folded cell; it wants it in a line."""
    package, _, name = file.name.partition(".")
    title = f"{TOOLBOX_CELL}{name}.py\n# @title {package}/{name}.py\n"
    return Cell("code", title + file.cells[0].source, (TOOLBOX_TAG,))


def is_toolbox(cell: Mapping[str, Any]) -> bool:
    """Whether a cell of a notebook is a file of the toolbox."""
    return bool(cell["source"].startswith(TOOLBOX_CELL))


def _node(identity: str, cell: Cell, stage: str, project: Project) -> dict[str, Any]:
    """A notebook cell with white-listed metadata."""
    metadata: dict[str, Any] = {"stage": stage}
    node: dict[str, Any] = {"id": identity, "cell_type": cell.kind, "metadata": metadata}
    node["source"] = cell.source
    if cell.tags:
        metadata["tags"] = list(cell.tags)
    if cell.kind == "code":
        node |= {"execution_count": None, "outputs": []}
        if {TOOLBOX_TAG, MAGIC_TAG} & {*cell.tags}:  # folded in JupyterLab and in Colab
            metadata |= {"jupyter": {"source_hidden": True}, "cellView": "form"}
    elif TOOLBOX_TAG in cell.tags:
        metadata["jp-MarkdownHeadingCollapsed"] = True
    if cell.kind == "markdown" and (names := PICTURE.findall(cell.source)):
        node["source"] = PICTURE.sub(lambda x: f"attachment:{Path(x[0]).name}", cell.source)
        files = {Path(name).name: project.story.parent / name for name in names}
        text = {name: base64.b64encode(path.read_bytes()).decode() for name, path in files.items()}
        node["attachments"] = {name: {"image/png": png} for name, png in text.items()}
    return node


def build(
    stages: Sequence[Stage], project: Project | None = None, number: int | None = None
) -> NotebookNode:
    """What `stages`, all of them, make of the sources: the cells of the first `number` of them.

    Raises:
        BuildError: naming file, line and fix of everything that would break.
        OSError: naming a picture that the prose shows and that cannot be read.
    """
    names = [section for stage in stages for section in stage.sections]
    ids = Counter(name.partition("_")[2] for name in names)
    for name in names:
        if not re.fullmatch(r"\d\d_[a-z][a-z0-9_]*", name) or ids[name.partition("_")[2]] > 1:
            raise BuildError(f"section {name!r}: call it NN_name, with a name of its own")
    project = project or Project()
    assembly = Assembly(project)
    told = [(s.name, n, list(assembly.section(n))) for s in stages for n in s.sections]
    if problems := namespace_problems(assembly.told.values(), assembly.packages):
        raise BuildError("\n".join(problems))
    cells = []
    wanted = {stage.name for stage in stages[:number]}
    for stage, section, own in (part for part in told if part[0] in wanted):
        for count, cell in enumerate(own, start=1):
            name = f"{section.partition('_')[2]}-{count:02d}"
            cells.append(_node(name, cell, stage, project))
            for file in assembly.toolbox_cells() if MAGIC_TAG in cell.tags else ():
                name = file.source.split("\n")[0].removeprefix(TOOLBOX_CELL).removesuffix(".py")
                cells.append(_node(f"toolbox-{name}", file, stage, project))
    metadata = METADATA | {"generated": fingerprint(cells)}
    return as_node({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5})


def fingerprint(cells: Iterable[Mapping[str, Any]]) -> str:
    """A digest of what a hand might edit; the notebook's metadata hold that of what was built."""
    texts = [[cell.get(key) for key in ("id", "cell_type", "source")] for cell in cells]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def as_node(content: Mapping[str, Any]) -> NotebookNode:
    """A dictionary as nbformat's own type, all the way down."""
    node: NotebookNode = nbformat.from_dict(content)  # type: ignore[no-untyped-call]
    return node


# --- budgets ------------------------------------------------------------------------------------


def budgets(notebook: NotebookNode) -> dict[str, tuple[int, int]]:
    """How much a reader faces, and the most it may be; lines are those that are not blank."""
    folded = [_lines(cell) for cell in notebook.cells if is_toolbox(cell)]
    cells = [cell for cell in notebook.cells if not is_toolbox(cell)]
    code = [cell for cell in cells if cell.cell_type == "code"]
    lines = {cell.id: _lines(cell) for cell in code}
    settings = max((lines.pop(c.id) for c in code if "class EnhancedConfig" in c.source), default=0)
    calls = [_calls(cell) if cell.cell_type == "code" else [] for cell in cells]
    shown, trains = (
        next((i for i, names in enumerate(calls) if any(map(call, names))), len(cells))
        for call in (re.compile(r"plot_\w+|keep_figure").fullmatch, "fit".__eq__)
    )
    return {
        "visible code cells": (len(code), 80),
        "visible code lines": (sum(lines.values()) + settings, 850),
        "longest visible code cell": (max(lines.values(), default=0), 45),
        "the cell of EnhancedConfig": (settings, 75),
        "toolbox cells": (len(folded), 20),
        "toolbox lines": (sum(folded), 4190),
        "cells before the first picture of the data": (shown, 35),
        "cells before training starts": (trains, 110),
    }


def _lines(cell: NotebookNode) -> int:
    return sum(bool(line.strip()) for line in cell.source.split("\n"))


def _calls(cell: NotebookNode) -> list[str]:
    """The functions that a cell calls by name, outside of what it defines."""
    nodes = same_scope(ast.parse(_without_magics(cell.source)))
    return [ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)]


# --- stages and the file ------------------------------------------------------------------------


def run_stages(
    stages: Sequence[Stage], number: int, output: Path, project: Project | None, fresh: bool = False
) -> int:
    """Write the first `number` of `stages` into the notebook at `output`, and nothing after them.

    Unless all are to be written `fresh`, only the last of these may differ from what the file
    holds: the others must be in it as their sources give them. Says what was done, and returns the
    exit status.
    """
    what = "all stages" if fresh else f"stage {stages[number - 1].name!r}"
    try:
        notebook = build(stages, project, number)
        if number > 1 and not fresh:
            require_stages(stages[: number - 1], notebook, output)
        text = notebook_text(notebook)
        unchanged = output.is_file() and output.read_bytes() == text.encode()
        if not unchanged:
            keep_copy(output)
            write_text(output.resolve(), text)
    except (BuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{output}: {what} {'unchanged' if unchanged else 'written'}")
    return 0


def keep_copy(output: Path) -> None:
    """Copy the notebook at `output` beside it if it holds what no build would give back."""
    if output.is_file() and (reason := touched(output)):
        stem = f"{output.stem}.before-{time.strftime('%Y%m%d-%H%M%S')}"
        names = (f"{stem}{'' if n == 1 else f'-{n}'}{output.suffix}" for n in itertools.count(1))
        copy = next(path for name in names if not (path := output.with_name(name)).exists())
        shutil.copy2(output, copy)
        print(f"{output}: {reason}; kept as {copy.name}")


def touched(path: Path) -> str | None:
    """What was done to the notebook at `path` since it was built; None for nothing."""
    try:
        content = read_notebook(path)
    except BuildError:
        return "is not as it was built"
    if content.get("metadata", {}).get("generated") != fingerprint(content.cells):
        return "was edited by hand"
    has_outputs = any(cell.get("outputs") or cell.get("execution_count") for cell in content.cells)
    return "has outputs" if has_outputs else None


def require_stages(earlier: Sequence[Stage], built: NotebookNode, output: Path) -> None:
    """Refuse a notebook whose `earlier` stages are missing, stale or edited by hand."""
    try:
        cells = read_notebook(output).cells
    except BuildError as error:
        raise BuildError(f"{error}; run `{_command(earlier[0], output)}` first") from None
    for stage in earlier:  # a cell of no stage is an edit of the first
        own = stage.name, *([None] if stage == earlier[0] else [])
        present = [cell for cell in cells if cell.metadata.get("stage") in own]
        expected = [cell for cell in built.cells if cell.metadata.stage == stage.name]
        if found := first_difference(expected, present, ignore_outputs=True):
            raise BuildError(
                f"{output}, stage {stage.name!r}: {found}\nMissing, edited by hand, or older than "
                f"its sources; run `{_command(stage, output)}` first, then the later ones"
            )


def _command(stage: Stage, output: Path) -> str:
    return f"python {stage.script}" + ("" if output == NOTEBOOK else f" --output {output}")


def read_notebook(path: Path) -> NotebookNode:
    """The notebook at `path`; raises ``BuildError`` where there is none."""
    if not path.exists():
        raise BuildError(f"{path} does not exist")
    try:
        content = as_node(json.loads(path.read_text(encoding="utf-8")))
        for cell in content.cells:
            cell.source = "".join(cell.source)  # a file may hold it as a list of lines
            cell.setdefault("metadata", as_node({}))
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        kind = type(error).__name__
        raise BuildError(f"{path} is not a notebook ({kind}: {str(error)[:80]})") from None
    return content


def notebook_text(notebook: NotebookNode) -> str:
    """The notebook as the file holds it: the same bytes for the same sources, every time."""
    text: str = nbformat.writes(notebook, version=nbformat.NO_CONVERT)  # type: ignore[no-untyped-call]
    return text.rstrip("\n") + "\n"


# --- check --------------------------------------------------------------------------------------


def check(stages: Sequence[Stage], output: Path, project: Project | None = None) -> str | None:
    """None where the file at `output` is byte for byte what the sources give, else what differs."""
    built = build(stages, project)
    if output.is_file() and output.read_bytes() == notebook_text(built).encode():
        return None
    try:
        found = first_difference(built.cells, read_notebook(output).cells)
    except BuildError as error:
        return str(error)
    return f"{output}: {found or 'the cells are right, but the metadata or the layout differ'}"


def first_difference(
    expected: Sequence[NotebookNode], present: Sequence[NotebookNode], ignore_outputs: bool = False
) -> str | None:
    """What first sets the cells `present` in a file apart from those the sources give."""
    ids = [[cell.get("id", "without an id") for cell in cells] for cells in (expected, present)]
    if extra := [identity for identity in ids[1] if identity not in ids[0]]:
        return f"cell {extra[0]} is not in the sources"
    if missing := [identity for identity in ids[0] if identity not in ids[1]]:
        return f"cell {missing[0]} is missing"
    if ids[0] != ids[1]:
        return "the cells stand in another order"
    for ours, theirs in zip(expected, present, strict=True):
        if not ignore_outputs and (theirs.get("outputs") or theirs.get("execution_count")):
            return f"cell {ours.id} has outputs; the notebook is kept without"
        old, new = (
            [str(c.get("metadata", {}).get("tags")), *c.source.split("\n")] for c in (theirs, ours)
        )
        if old != new or ours.cell_type != theirs.cell_type:
            diff = difflib.unified_diff(old, new, "the notebook", "the sources", n=2, lineterm="")
            return "\n".join([f"cell {ours.id} differs:", *itertools.islice(diff, 30)])
    return None


# --- tools --------------------------------------------------------------------------------------


def flat_script(notebook: NotebookNode) -> str:
    """All code cells but the toolbox's as one file, magics commented out, for ruff and mypy."""
    cells = [c for c in notebook.cells if c.cell_type == "code" and not is_toolbox(c)]
    return "\n\n".join(f"# %% {cell.id}\n{_without_magics(cell.source)}\n" for cell in cells)


def _without_magics(source: str) -> str:
    try:
        ast.parse(source)
    except SyntaxError:
        return re.sub(r"(?m)^(\s*)(?=[%!])", r"\1# ", source)
    return source


def stage_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every stage has."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=kind)
    text = "the notebook to write"
    parser.add_argument("--output", type=Path, default=NOTEBOOK, metavar="PATH", help=text)
    return parser
