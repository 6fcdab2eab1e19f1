"""Assemble the notebook, stage by stage, from its sections and the package they import.

One rule does it: the first time a section imports from a module of the package, that module's own
cells stand there in its place. So the notebook, opened alone, carries all of its code, and every
definition in it is one that the tests import.
"""

import argparse
import ast
import difflib
import io
import itertools
import json
import os
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from notebook_sources import (
    INSTALL_TAG,
    BuildError,
    Cell,
    Import,
    Source,
    cell_imports,
    namespace_problems,
    read_source,
    source_problems,
)

ROOT = Path(__file__).resolve().parent
NOTEBOOK = ROOT / "notebooks" / "Improved_CNN_Transfer_Learning_Enhanced.ipynb"
LINE_LENGTH = 100
MAGIC = re.compile(r"# (%{1,2}|!)[A-Za-z]")  # as a section writes it
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
    imports_note: str  # the prose before the stage's imports


@dataclass(frozen=True)
class Project:
    """Where the sources are."""

    package: Path = ROOT / "emotion_transfer"
    sections: Path = ROOT / "notebooks" / "sections"

    def label(self, path: Path) -> str:
        """`path` as messages show it."""
        root = self.package.parent
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


# --- from sources to cells ----------------------------------------------------------------------


class Assembly:
    """The notebook as far as it has been told: the modules and imports already introduced."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.package = project.package.name
        self.modules: dict[str, Source] = {}  # introduced, in order
        self.sources: list[Source] = []  # modules and sections used, in order
        self.imported: set[Import] = set()
        self._read: dict[str, Source] = {}

    def stage_cells(self, stage: Stage) -> list[NotebookNode]:
        """The cells of the next stage, with its imports gathered into one of them."""
        told = len(self.sources)
        cells = [(name, cell) for name in stage.sections for cell in self._section(name)]
        new = {i for s in self.sources[told:] for i in self._gathered(s)} - self.imported
        if new:
            at = _imports_position([cell for _, cell in cells])
            section = cells[max(at - 1, 0)][0] if cells else stage.sections[0]
            note = Cell("markdown", stage.imports_note.strip())
            cells[at:at] = [(section, note), (section, Cell("code", format_imports(new)))]
            self.imported |= new
        return _as_nodes(cells, stage.name)

    def _section(self, name: str) -> list[Cell]:
        path = self.project.sections / f"{name}.py"
        section = self._source(path, name, is_module=False)
        self._check_names(section)
        cells = [new for cell in section.cells for new in self._expand(section, cell)]
        self.sources.append(section)
        return cells

    def _expand(self, section: Source, cell: Cell) -> Iterator[Cell]:
        """A section's cell, after the cells of modules it is the first to import from."""
        if INSTALL_TAG in cell.tags:
            yield _with_magics(cell)
            return
        own = {i.module: i for i in cell_imports(cell) if self._is_own(i)}
        for name in self._in_order(own):
            yield from self._introduce(name, section.at(own[name].line))
        yield from _tidy(cell, magics=True)

    def _in_order(self, names: Iterable[str]) -> Iterator[str]:
        """The modules not introduced yet, each after those of them that it imports from."""
        pending = [name for name in names if name not in self.modules]
        while pending:
            for name in pending:
                needs = {i.module for i in self._module(name).imports()} - {name}
                if not needs & set(pending):
                    break
            else:
                name = pending[0]  # they import each other; _introduce says so
            pending.remove(name)
            yield name

    def _introduce(self, name: str, asked: str) -> Iterator[Cell]:
        module = self._module(name)
        for item in module.imports():
            if self._is_own(item) and item.module not in self.modules:
                raise BuildError(
                    f"{module.at(item.line)}: {name} imports from {item.module}, which is not in "
                    f"the notebook yet where {asked} asks for {name}; write a cell "
                    f"`from {item.module} import {item.name}` in a section before that"
                )
        self._check_names(module)
        self.modules[name] = module
        self.sources.append(module)
        for cell in module.cells:
            yield from _tidy(cell)

    def _check_names(self, source: Source) -> None:
        """Refuse an import of a name that its module of the package does not define."""
        for item in source.imports():
            if not self._is_own(item):
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
        base = self.project.package.parent.joinpath(*name.split("."))
        path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        if not path.is_file():
            raise BuildError(f"{asked}: there is no {name} ({self.project.label(path)})")
        return self._source(path, name, is_module=True)

    def _source(self, path: Path, name: str, is_module: bool) -> Source:
        if name not in self._read:
            source = read_source(path, self.project.label(path), name, is_module)
            if problems := source_problems(source, self.package):
                raise BuildError("\n".join(problems))
            self._read[name] = source
        return self._read[name]

    def _is_own(self, item: Import) -> bool:
        return item.module.startswith(self.package + ".")

    def _gathered(self, source: Source) -> list[Import]:
        """The imports of `source` that belong in the notebook's import cells."""
        items = (i for c in source.cells if INSTALL_TAG not in c.tags for i in cell_imports(c))
        return [item for item in items if not self._is_own(item)]


def _tidy(cell: Cell, magics: bool = False) -> Iterator[Cell]:
    """`cell` without its imports; nothing at all where only comments would be left."""
    imports = [s for s in cell.body if isinstance(s, ast.Import | ast.ImportFrom)]
    rest = cell.without(imports) if imports else cell
    rest = _with_magics(rest) if magics else rest
    emptied = len(imports) == len(cell.body) > 0
    comments = all(line.startswith("#") or not line for line in rest.source.split("\n"))
    if not (emptied and comments):
        yield rest


def _with_magics(cell: Cell) -> Cell:
    """A section's cell with ``# %magic`` and ``# !command`` as a notebook writes them.

    jupytext would do this too, but it takes a comment such as ``# ls is short`` for a command.
    """
    if cell.kind != "code":
        return cell
    lines = cell.source.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(cell.source + "\n").readline):
        row, column = token.start
        magic = token.type == tokenize.COMMENT and MAGIC.match(token.string)
        if magic and not lines[row - 1][:column].strip():
            lines[row - 1] = lines[row - 1][:column] + token.string.removeprefix("# ")
    return Cell(cell.kind, "\n".join(lines), cell.tags)


def _imports_position(cells: list[Cell]) -> int:
    """After the install cell where there is one, else before the stage's first code cell."""
    install = [i for i, cell in enumerate(cells) if INSTALL_TAG in cell.tags]
    if install:
        return install[-1] + 1
    return next((i for i, cell in enumerate(cells) if cell.kind == "code"), len(cells))


def _as_nodes(cells: list[tuple[str, Cell]], stage: str) -> list[NotebookNode]:
    """Notebook cells, numbered within their section, with white-listed metadata."""
    counts: Counter[str] = Counter()
    nodes = []
    for section, cell in cells:
        counts[section] += 1
        metadata: dict[str, Any] = {"stage": stage}
        if cell.tags:
            metadata["tags"] = list(cell.tags)
        node: dict[str, Any] = {
            "id": f"{section.partition('_')[2]}-{counts[section]:02d}",
            "cell_type": cell.kind,
            "metadata": metadata,
            "source": cell.source,
        }
        if cell.kind == "code":
            node |= {"execution_count": None, "outputs": []}
        nodes.append(as_node(node))
    return nodes


def build(stages: Sequence[Stage], project: Project | None = None) -> NotebookNode:
    """The notebook that `stages`, the first of all up to the last wanted, make of the sources.

    Raises:
        BuildError: naming file, line and fix of everything that would break.
    """
    names = [section for stage in stages for section in stage.sections]
    ids = Counter(name.partition("_")[2] for name in names)
    for name in names:
        if not re.fullmatch(r"\d\d_[a-z][a-z0-9_]*", name) or ids[name.partition("_")[2]] > 1:
            raise BuildError(f"section {name!r}: call it NN_name, with a name of its own")
    assembly = Assembly(project or Project())
    cells = [cell for stage in stages for cell in assembly.stage_cells(stage)]
    if problems := namespace_problems(assembly.sources, assembly.package):
        raise BuildError("\n".join(problems))
    notebook = {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}
    return as_node(notebook)


def as_node(content: Mapping[str, Any]) -> NotebookNode:
    """A dictionary as nbformat's own type, all the way down."""
    node: NotebookNode = nbformat.from_dict(content)  # type: ignore[no-untyped-call]
    return node


# --- imports ------------------------------------------------------------------------------------


def format_imports(items: Iterable[Import]) -> str:
    """Import statements in the order and shape that ruff gives them."""
    items = set(items)
    standard = {i for i in items if i.module.partition(".")[0] in sys.stdlib_module_names}
    blocks = [_import_block(standard), _import_block(items - standard)]
    return "\n\n".join(block for block in blocks if block)


def _import_block(items: set[Import]) -> str:
    plain = [item for item in items if item.name is None]
    statements = [str(i) for i in sorted(plain, key=lambda i: (_natural(i.module), i.alias or ""))]
    groups: dict[tuple[str, str | None], list[Import]] = {}  # one from-statement each
    for item in sorted((item for item in items if item.name), key=_member_key):
        groups.setdefault((item.module, item.alias and str(item)), []).append(item)
    for group in sorted(groups.values(), key=lambda g: (_natural(g[0].module), _member_key(g[0]))):
        members = [str(item).partition(" import ")[2] for item in group]
        statements.append(_from_statement(group[0].module, members))
    return "\n".join(statements)


def _from_statement(module: str, members: list[str]) -> str:
    line = f"from {module} import {', '.join(members)}"
    if len(line) <= LINE_LENGTH:
        return line
    return f"from {module} import (\n" + "".join(f"    {name},\n" for name in members) + ")"


def _natural(text: str) -> list[tuple[int, int, str]]:
    """Sort key that ignores case and puts ``conv2`` before ``conv10``."""
    parts = re.findall(r"\d+|\D", text.lower())
    return [
        (1, 0, part)
        if not part.isdigit()
        else (0, -1, part)
        if part[0] == "0"
        else (0, int(part), "")
        for part in parts
    ]


def _member_key(item: Import) -> tuple[int, list[tuple[int, int, str]], str]:
    """Constants, then classes, then the rest."""
    name = item.name or ""
    kind = 0 if len(name) > 1 and name.isupper() else 1 if name[:1].isupper() else 2
    return kind, _natural(name), item.alias or ""


# --- stages and the file ------------------------------------------------------------------------


def write_stage(
    stages: Sequence[Stage], output: Path, project: Project | None = None, fresh: bool = False
) -> bool:
    """Write the last of `stages` into the notebook at `output`, dropping whatever came after it.

    With `fresh`, all of `stages` are written, whatever the file holds. Returns whether it changed.

    Raises:
        BuildError: if the earlier stages are not in the file as their sources give them.
    """
    notebook = build(stages, project)
    if stages[:-1] and not fresh:
        require_stages(stages[:-1], notebook, output)
    text = notebook_text(notebook).encode()
    if output.is_file() and output.read_bytes() == text:
        return False
    write_atomically(output, text)
    return True


def require_stages(earlier: Sequence[Stage], built: NotebookNode, output: Path) -> None:
    """Refuse a notebook whose `earlier` stages are missing, stale or edited by hand."""
    cells = read_notebook(output, earlier[0]).cells
    for stage in earlier:
        again = f"run `{_command(stage, output)}`"
        present = [cell for cell in cells if cell.metadata.get("stage") == stage.name]
        if not present:
            raise BuildError(
                f"{output} has no cells of stage {stage.name!r}; {again} first, then the later ones"
            )
        expected = [cell for cell in built.cells if cell.metadata.stage == stage.name]
        if found := first_difference(expected, present, ignore_outputs=True):
            raise BuildError(
                f"{output}, stage {stage.name!r}: {found}\nEdited by hand, or older than its "
                f"sources; {again} again, then the later ones"
            )
    stray = [cell.get("id", "?") for cell in cells if not cell.metadata.get("stage")]
    if stray:
        raise BuildError(
            f"{output}: cell {stray[0]} belongs to no stage; nothing is added to the notebook by "
            f"hand: put it into a section, run `{_command(earlier[0], output)}` and the later ones"
        )


def _command(stage: Stage, output: Path) -> str:
    option = "" if output == NOTEBOOK else f" --output {output}"
    return f"python {stage.script}{option}"


def read_notebook(path: Path, first: Stage) -> NotebookNode:
    """The notebook at `path`; where there is none, the error says to run the `first` stage."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("nbformat") == 4 and all("metadata" in cell for cell in content["cells"]):
            for cell in content["cells"]:  # a file may hold a source as a list of lines
                cell["source"] = "".join(cell.get("source", ""))
            return as_node(content)
        problem = f"{path} is not a notebook of version 4"
    except FileNotFoundError:
        problem = f"{path} does not exist"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{path} is not a notebook ({type(error).__name__}: {str(error)[:80]})"
    raise BuildError(f"{problem}; run `{_command(first, path)}` first, then the later ones")


def notebook_text(notebook: NotebookNode) -> str:
    """The notebook as the file holds it: the same bytes for the same sources, every time."""
    text: str = nbformat.writes(notebook, version=nbformat.NO_CONVERT)  # type: ignore[no-untyped-call]
    return text.rstrip("\n") + "\n"


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` so that a reader sees the old file or the new one, never half of one."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --- check --------------------------------------------------------------------------------------


def check(stages: Sequence[Stage], output: Path, project: Project | None = None) -> str | None:
    """None where the file at `output` is byte for byte what the sources give, else what differs."""
    built = build(stages, project)
    if output.is_file() and output.read_bytes() == notebook_text(built).encode():
        return None
    try:
        cells = read_notebook(output, stages[0]).cells
    except BuildError as error:
        return str(error).partition(";")[0]
    found = first_difference(built.cells, cells)
    return f"{output}: {found or 'the cells are right, but the metadata or the layout differ'}"


def first_difference(
    expected: Sequence[NotebookNode], present: Sequence[NotebookNode], ignore_outputs: bool = False
) -> str | None:
    """What first sets the cells `present` in a file apart from those the sources give."""
    expected_ids = [cell.id for cell in expected]
    present_ids = [cell.get("id", "without an id") for cell in present]
    for ours, theirs in itertools.zip_longest(expected, present):
        if ours is None or (theirs and theirs.get("id") != ours.id and ours.id in present_ids):
            return f"cell {theirs.get('id', 'without an id')} is not in the sources, or not here"
        if theirs is None or (theirs.get("id") != ours.id and ours.id not in present_ids):
            return f"cell {ours.id} is missing"
        if ours.source != theirs.source:
            return f"cell {ours.id} differs:\n{_diff(theirs.source, ours.source)}"
        if ours.cell_type != theirs.cell_type:
            return f"cell {ours.id} is of type {theirs.cell_type}, not {ours.cell_type}"
        if ours.metadata.get("tags") != theirs.metadata.get("tags"):
            return f"cell {ours.id} has other tags"
        if not ignore_outputs and (theirs.get("outputs") or theirs.get("execution_count")):
            return f"cell {ours.id} has outputs; the notebook is kept without"
        if not ignore_outputs and ours != theirs:
            return f"cell {ours.id} has other metadata"
    return None if expected_ids == present_ids else "the cells stand in another order"


def _diff(theirs: str, ours: str, limit: int = 30) -> str:
    lines = list(
        difflib.unified_diff(
            theirs.splitlines(), ours.splitlines(), "the notebook", "the sources", lineterm="", n=2
        )
    )
    more = [f"... and {len(lines) - limit} lines more"] if len(lines) > limit else []
    return "\n".join(lines[:limit] + more)


# --- tools --------------------------------------------------------------------------------------


def flat_script(notebook: NotebookNode) -> str:
    """All code cells as one Python file, magics commented out, for ruff and mypy."""
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            parts.append(f"# %% {cell.id}\n{_without_magics(cell.source)}\n")
    return "\n\n".join(parts)


def _without_magics(source: str) -> str:
    try:
        ast.parse(source)
    except SyntaxError:
        return re.sub(r"(?m)^(\s*)(?=[%!])", r"\1# ", source)
    return source


def stage_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every stage has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=NOTEBOOK, metavar="PATH", help="the notebook to write"
    )
    return parser


def run_stage(
    stages: Sequence[Stage], output: Path, project: Project | None = None, fresh: bool = False
) -> int:
    """Write the last of `stages`, say what was done, and return the exit status."""
    try:
        changed = write_stage(stages, output, project, fresh)
    except (BuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    what = "all stages" if fresh else f"stage {stages[-1].name!r}"
    print(f"{output}: {what} {'written' if changed else 'unchanged'}")
    return 0
