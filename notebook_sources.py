"""Read the notebook's sources, and refuse what would break once they share one namespace.

A source is a section or a module of the story, in percent format, or a file of the toolbox. In a
notebook the sections and the story live in one namespace, as if pasted one after the other. What
that would break is refused here, with the file and the line.
"""

import ast
import builtins
import itertools
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import jupytext  # type: ignore[import-untyped,unused-ignore]

PERCENT = {"extension": ".py", "format_name": "percent", "comment_magics": False}
INSTALL_TAG = "install"  # a cell with this tag may import as it needs
LINE_LENGTH = 100

FORBIDDEN = {
    "TYPE_CHECKING": "import the name plainly; in a notebook nothing is imported twice",
    "__file__": "in a notebook it is elsewhere or missing; take the path as an argument",
    "__package__": "a notebook is no package",
    "__spec__": "a notebook is no module",
}
BUILTINS = {name for name in dir(builtins) if not name.startswith("_")}
NOTEBOOK_NAMES = {"display", "get_ipython", "In", "Out"}  # IPython's own; `display` may be imported


class BuildError(Exception):
    """The notebook cannot be built; the message names the place and the fix."""


@dataclass(frozen=True)
class Packages:
    """The names of the two packages."""

    story: str
    toolbox: str

    def holder(self, module: str) -> str | None:
        """The package that `module` is or belongs to."""
        top = module.partition(".")[0]
        return top if top in (self.story, self.toolbox) else None


# --- cells and what they import -----------------------------------------------------------------


@dataclass(frozen=True)
class Import:
    """One imported name: ``import module [as alias]`` or ``from module import name [as alias]``."""

    module: str
    name: str | None = None
    alias: str | None = None
    line: int = field(default=0, compare=False)

    @property
    def binds(self) -> str:
        """The name it brings into the namespace."""
        return self.alias or self.name or self.module.partition(".")[0]

    def __str__(self) -> str:
        return spell([self])


def imports_of(node: ast.AST) -> list[Import]:
    """The names that an import statement brings; none for any other node."""
    if isinstance(node, ast.Import):
        return [Import(a.name, None, a.asname, node.lineno) for a in node.names]
    if isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        return [Import(module, a.name, a.asname, node.lineno) for a in node.names]
    return []


def spell(items: list[Import]) -> str:
    """One statement that imports all of `items`, which come from one statement."""
    names = [(item.name or item.module, item.alias) for item in items]
    members = ", ".join(f"{name} as {alias}" if alias else name for name, alias in names)
    start = f"from {items[0].module} import " if items[0].name else "import "
    if len(start + members) <= LINE_LENGTH or not items[0].name:
        return start + members
    lines = textwrap.fill(members + ",", LINE_LENGTH - 4, break_on_hyphens=False)
    return f"{start}(\n{textwrap.indent(lines, '    ')}\n)"


@dataclass(frozen=True)
class Cell:
    """One cell of a source. `body` holds a code cell's statements with the file's line numbers."""

    kind: str  # "markdown", "code" or "raw"
    source: str
    tags: tuple[str, ...] = ()
    line: int = 1  # where the source starts in the file
    body: tuple[ast.stmt, ...] = ()

    def imports(self) -> list[Import]:
        """The imports at the top level of the cell."""
        return [item for statement in self.body for item in imports_of(statement)]

    def with_imports(self, wanted: Iterable[Import]) -> "Cell":
        """The cell importing only what is `wanted`, less the blank lines that the rest leaves."""
        wanted = set(wanted)
        lines = self.source.split("\n")
        for statement in self.body:
            if imported := imports_of(statement):
                start, end = statement.lineno - self.line, statement.end_lineno or statement.lineno
                lines[start : end - self.line + 1] = ["\0"] * (end - statement.lineno + 1)
                if kept := [item for item in imported if item in wanted]:
                    lines[start] = spell(kept)
        gaps = re.compile(r"\n*\0[\n\0]*")  # the longest of the blank runs around them stays
        source = gaps.sub(lambda gap: max(gap[0].split("\0"), key=len), "\n".join(lines))
        return replace(self, source=source.strip("\n"))


@dataclass(frozen=True)
class Binding:
    """A name that a source binds at its top level, other than by an import."""

    name: str
    line: int
    defines: bool  # a function or class, or anything in a module; else a variable of a run cell
    nested: bool  # in an if, a loop or a try, so perhaps in one of several branches


@dataclass(frozen=True)
class Source:
    """A section, a module of the story or a file of the toolbox, as cells."""

    label: str  # its path as errors show it
    name: str  # "03_data", "emotion_transfer.model" or "emotion_toolbox.cache"
    kind: str  # "section", "story" or "toolbox"
    cells: tuple[Cell, ...]

    def at(self, line: int) -> str:
        """The place that starts an error message."""
        return f"{self.label}:{line}"

    def imports(self) -> list[Import]:
        """Every import at the top level of a cell; of a toolbox file, every import."""
        if self.kind == "toolbox":
            nodes = (node for cell in self.cells for s in cell.body for node in ast.walk(s))
            return [item for node in nodes for item in imports_of(node)]
        return [item for cell in self.cells for item in cell.imports()]

    def bindings(self) -> list[Binding]:
        """What the source defines or assigns at its top level."""
        module = self.kind != "section"
        return [b for cell in self.cells for s in cell.body for b in _bindings(s, module)]


# --- reading ------------------------------------------------------------------------------------


def read_source(path: Path, label: str, name: str, kind: str) -> Source:
    """Read the file at `path`: the toolbox's as one cell, verbatim, all others in percent format.

    The docstring of a percent file is dropped, as a notebook would print it.

    Raises:
        BuildError: if the file cannot be read or a cell is not Python.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BuildError(f"{label}: cannot be read: {error}") from None
    if kind == "toolbox":
        return Source(label, name, kind, (_code_cell(text.strip("\n"), (), 1, label),))
    cells: list[Cell] = []
    end = 0
    for raw in jupytext.reads(_without_docstring(text, label), fmt=PERCENT).cells:
        source = raw.source.strip("\n")
        tags = tuple(raw.metadata.get("tags", ()))
        if raw.cell_type != "code":
            cells.append(Cell(raw.cell_type, source.rstrip(), tags))
        elif source.strip():
            start = max(("\n" + text).find("\n" + source, end), end)  # jupytext does not tell
            cells.append(_code_cell(source, tags, text.count("\n", 0, start) + 1, label))
            end = start + len(source)
    return Source(label, name, kind, tuple(cells))


def _without_docstring(text: str, label: str) -> str:
    """`text` with blank lines for the file's docstring, so that line numbers stay."""
    tree = _parse(text, label)
    lines = text.split("\n")
    if ast.get_docstring(tree) is not None:
        start, end = tree.body[0].lineno - 1, tree.body[0].end_lineno or 0
        if not any(line.startswith("# %%") for line in lines[:start]):
            lines[start:end] = [""] * (end - start)
    return "\n".join(lines)


def _parse(source: str, label: str, line: int = 1) -> ast.Module:
    """Parse a file, or the cell that starts at `line` of it; line numbers are the file's."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        where = line + (error.lineno or 1) - 1
        raise BuildError(f"{label}:{where}: this is not Python: {error.msg}") from None
    ast.increment_lineno(tree, line - 1)
    return tree


def _code_cell(source: str, tags: tuple[str, ...], line: int, label: str) -> Cell:
    return Cell("code", source, tags, line, tuple(_parse(source, label, line).body))


# --- what a source binds ------------------------------------------------------------------------


def _bindings(statement: ast.stmt, is_module: bool) -> Iterator[Binding]:
    """Names bound by a top-level `statement`, not looking inside functions and classes."""
    definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    nested = not isinstance(statement, definition | ast.Assign | ast.AnnAssign)
    for node in same_scope(statement):
        name: str | None = None
        defines = is_module
        if isinstance(node, definition):
            overload = any(ast.unparse(d).endswith("overload") for d in node.decorator_list)
            name, defines = (None if overload else node.name), True
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar):
            name = node.name
        elif isinstance(node, ast.MatchMapping):
            name = node.rest
        if name and name != "_":
            yield Binding(name, getattr(node, "lineno", statement.lineno), defines, nested)


def same_scope(node: ast.AST) -> Iterator[ast.AST]:
    """`node` and what lies below it in the same scope; of a comprehension, only its walruses."""
    yield node
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
        return
    if isinstance(node, ast.AnnAssign) and node.value is None:
        return  # a bare annotation binds nothing
    if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        yield from (n.target for n in ast.walk(node) if isinstance(n, ast.NamedExpr))
        return
    for child in ast.iter_child_nodes(node):
        yield from same_scope(child)


# --- refusals: one source -----------------------------------------------------------------------


def source_problems(source: Source, packages: Packages) -> list[str]:
    """What in `source` could not work in a notebook, by itself."""
    found: list[tuple[int, str]] = []
    for cell in source.cells:
        free = INSTALL_TAG in cell.tags or source.kind == "toolbox"
        for statement in cell.body:
            for node in ast.walk(statement):
                found += _name_problems(node)
                if isinstance(node, ast.Import | ast.ImportFrom):
                    found += _import_problems(node, source.kind, packages)
                    if node is not statement and not free:
                        found.append((node.lineno, f"`{ast.unparse(node)}` {NOT_AT_TOP}"))
        if INSTALL_TAG in cell.tags:
            own = [i for i in cell.imports() if packages.holder(i.module)]
            found += [(i.line, f"`{i}` in a cell tagged {INSTALL_TAG}; import later") for i in own]
        if not free:
            found += _shared_lines(cell)
    if source.kind != "toolbox":
        counts = Counter(b.name for b in source.bindings() if b.defines and not b.nested)
        twice = [b for b in source.bindings() if b.defines and counts[b.name] > 1]
        found += [(b.line, f"`{b.name}` is defined twice in this file; rename one") for b in twice]
    return [f"{source.at(line)}: {problem}" for line, problem in sorted(set(found))]


NOT_AT_TOP = (
    "stands inside a function or block; import at the top level of a cell, so that the notebook "
    "has it once, where it is first used"
)


def _name_problems(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Names that mean something in a module and nothing, or something else, in a notebook."""
    if isinstance(node, ast.Name | ast.Attribute):
        name = node.id if isinstance(node, ast.Name) else node.attr
        own = isinstance(node, ast.Name) or name == "TYPE_CHECKING"
        if own and name in FORBIDDEN:
            yield node.lineno, f"uses {name}: {FORBIDDEN[name]}"
    elif isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
        guard = "has a __main__ guard, which is true in a notebook"
        yield node.lineno, f"{guard}; move the command line elsewhere"


def _import_problems(
    node: ast.Import | ast.ImportFrom, kind: str, packages: Packages
) -> Iterator[tuple[int, str]]:
    """Spellings of an import that the builder cannot follow, and directions it must not take."""
    text, line = f"`{ast.unparse(node)}`", node.lineno
    for item in imports_of(node):
        package = packages.holder(item.module)
        spelling = f"write `from {package or packages.story}.MODULE import NAME`"
        if item.module.startswith("."):
            yield line, f"{text} is relative; {spelling}"
        elif package == packages.story and kind == "toolbox":
            problem = f"{text}: the toolbox must not import the story; "
            yield line, problem + "take what it needs as an argument, or move that to the toolbox"
        elif package and (item.name is None or item.module == package):
            yield line, f"{text} imports a whole module; {spelling}"
        elif package == packages.toolbox and item.module.count(".") > 1:
            yield line, f"{text}: the toolbox is one folder of files; put the file into it"
        elif package and item.alias and kind != "toolbox":
            yield line, f"{text}: the notebook has the name only as `{item.name}`; use that"
        if item.name == "*":
            yield line, f"{text}: a star import hides which names it brings; list them"
        if item.module == "__future__" and kind != "toolbox":
            yield line, f"{text} would change every later cell; do without"
        if item.name in FORBIDDEN:
            yield line, f"{text}: {FORBIDDEN[item.name]}"


def _shared_lines(cell: Cell) -> Iterator[tuple[int, str]]:
    """Imports that share a line with another statement, so cannot be cut out."""
    for first, second in itertools.pairwise(cell.body):
        shared = second.lineno <= (first.end_lineno or first.lineno)
        if shared and (imports_of(first) or imports_of(second)):
            yield second.lineno, "an import shares its line with another statement; split the line"


# --- refusals: all sources together -------------------------------------------------------------


@dataclass(frozen=True)
class Owner:
    """Who holds a name in the notebook's namespace."""

    kind: str  # "imports", "defines" or "assigns"
    file: str
    where: str
    text: str  # the import, or the name


def namespace_problems(sources: Iterable[Source], packages: Packages) -> list[str]:
    """Names that two sources, or two spellings of an import, would fight over."""
    owners: dict[str, Owner] = {}
    spellings: dict[str, Owner] = {}
    problems: list[str] = []
    for source in sources:
        for item in source.imports():
            if packages.holder(item.module) != packages.story:
                new = Owner("imports", source.label, source.at(item.line), str(item))
                target = f"{item.module}.{item.name}" if item.name else item.module
                same = spellings.setdefault(target, new)
                if same.text == new.text:
                    problems += _claim(item.binds, new, owners)
                else:
                    had = f"`{new.text}`, but {same.where} has `{same.text}`; spell both alike"
                    problems.append(f"{new.where}: {had}")
        for binding in source.bindings():
            kind = "defines" if binding.defines else "assigns"
            new = Owner(kind, source.label, source.at(binding.line), binding.name)
            problems += _claim(binding.name, new, owners)
    return problems


def _claim(name: str, new: Owner, owners: dict[str, Owner]) -> Iterator[str]:
    """Why `new` cannot have `name`, where somebody else has it and may not share it."""
    old = owners.setdefault(name, new)
    alike = (old.kind, old.text) == (new.kind, new.text)
    one_file = old.file == new.file  # source_problems has looked already
    if old is new:
        if name in BUILTINS or (name in NOTEBOOK_NAMES and new.kind != "imports"):
            yield f"{new.where}: `{name}` would hide the built-in for every later cell; rename it"
    elif not (alike and (new.kind != "defines" or one_file)) and not _one_module(old, new):
        yield (
            f"{new.where}: {new.kind} `{name}`, which {old.where} {old.kind} too; in one notebook "
            "they would be the same name, so rename one"
        )


def _one_module(old: Owner, new: Owner) -> bool:
    """Whether both are ``import a`` or ``import a.b``, which bind `a` to the same module."""
    return all(re.fullmatch(r"import [\w.]+", owner.text) for owner in (old, new))
