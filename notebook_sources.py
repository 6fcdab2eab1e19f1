"""Read the notebook's sources, and refuse what would break once they share one namespace.

A source is a module of the package or a section: Python in percent format, read by jupytext. Each
works by itself when imported; in a notebook all of them live in the same one, as if pasted one
after the other. What that would break is refused here, with the file and the line.
"""

import ast
import builtins
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import jupytext  # type: ignore[import-untyped,unused-ignore]

PERCENT = {"extension": ".py", "format_name": "percent", "comment_magics": False}
INSTALL_TAG = "install"  # a cell with this tag runs before any import, so it keeps its own

FORBIDDEN = {
    "TYPE_CHECKING": "import the name plainly; in a notebook nothing is imported twice",
    "__file__": "a notebook has no such file; take the path as an argument",
    "__package__": "a notebook is no package",
    "__spec__": "a notebook is no module",
}
BUILTINS = {name for name in dir(builtins) if not name.startswith("_")}
NOTEBOOK_NAMES = {"display", "get_ipython", "In", "Out"}  # IPython's own; `display` may be imported


class BuildError(Exception):
    """The notebook cannot be built; the message names the place and the fix."""


@dataclass(frozen=True)
class Cell:
    """One cell of a source. `body` holds a code cell's statements with the file's line numbers."""

    kind: str  # "markdown", "code" or "raw"
    source: str
    tags: tuple[str, ...] = ()
    line: int = 1  # where the source starts in the file
    body: tuple[ast.stmt, ...] = ()

    def without(self, statements: Iterable[ast.stmt]) -> "Cell":
        """The cell less the lines of `statements` and the blank lines they leave behind."""
        lines: list[str | None] = list(self.source.split("\n"))
        for statement in statements:
            for number in range(statement.lineno, (statement.end_lineno or statement.lineno) + 1):
                lines[number - self.line] = None
        return replace(self, source=_close_gaps(lines).strip("\n"))


def _close_gaps(lines: list[str | None]) -> str:
    """Join `lines`; where some were removed, the longest of the blank runs around them stays."""
    kept: list[str] = []
    for gap, group in itertools.groupby(lines, key=lambda line: not (line and line.strip())):
        run = list(group)
        if gap and None in run:
            blanks = (
                len(list(g)) for k, g in itertools.groupby(run, key=lambda x: x is None) if not k
            )
            kept += [""] * max(blanks, default=0)
        else:
            kept += [line for line in run if line is not None]
    return "\n".join(kept)


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

    @property
    def target(self) -> str:
        """The dotted name of what is imported, however it is spelt."""
        return f"{self.module}.{self.name}" if self.name else self.module

    def __str__(self) -> str:
        statement = (
            f"from {self.module} import {self.name}" if self.name else f"import {self.module}"
        )
        return f"{statement} as {self.alias}" if self.alias else statement


@dataclass(frozen=True)
class Binding:
    """A name that a source binds at its top level, other than by an import."""

    name: str
    line: int
    defines: bool  # a function or class, or anything in a module; else a variable of a run cell
    nested: bool  # in an if, a loop or a try, so perhaps in one of several branches


@dataclass(frozen=True)
class Source:
    """A module of the package, or a section, as cells."""

    label: str  # its path as errors show it
    name: str  # "emotion_transfer.data" or "03_data"
    is_module: bool
    cells: tuple[Cell, ...]

    def at(self, line: int) -> str:
        """The place that starts an error message."""
        return f"{self.label}:{line}"

    def imports(self) -> list[Import]:
        """Every import at the top level of a cell, install cells included."""
        return [item for cell in self.cells for item in cell_imports(cell)]

    def bindings(self) -> list[Binding]:
        """What the source defines or assigns at its top level."""
        return [b for cell in self.cells for s in cell.body for b in _bindings(s, self.is_module)]


def cell_imports(cell: Cell) -> list[Import]:
    """The imports at the top level of `cell`, one item a name."""
    items: list[Import] = []
    for node in cell.body:
        if isinstance(node, ast.Import):
            items += [Import(a.name, None, a.asname, node.lineno) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            items += [Import(module, a.name, a.asname, node.lineno) for a in node.names]
    return items


# --- reading ------------------------------------------------------------------------------------


def read_source(path: Path, label: str, name: str, is_module: bool) -> Source:
    """Read the percent-format file at `path`; its docstring is dropped, as it would print itself.

    Raises:
        BuildError: if the file cannot be read or a cell is not Python.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BuildError(f"{label}: cannot be read: {error}") from None
    lines = text.split("\n")
    cells: list[Cell] = []
    position = 0
    for raw in jupytext.reads(_without_docstring(text, label), fmt=PERCENT).cells:
        source = raw.source.strip("\n")
        tags = tuple(raw.metadata.get("tags", ()))
        if raw.cell_type != "code":
            cells.append(Cell(raw.cell_type, source.rstrip(), tags))
        elif source.strip():
            position = _find_lines(lines, source.split("\n"), position)
            cells.append(_code_cell(source, tags, position + 1, label))
            position += source.count("\n") + 1
    return Source(label, name, is_module, tuple(cells))


def _without_docstring(text: str, label: str) -> str:
    """`text` with blank lines for the file's docstring, so that line numbers stay."""
    body = _parse(text, label).body
    lines = text.split("\n")
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        start, end = body[0].lineno - 1, body[0].end_lineno or body[0].lineno
        in_a_cell = any(line.startswith("# %%") for line in lines[:start])
        if isinstance(body[0].value.value, str) and not in_a_cell:
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


def _find_lines(lines: list[str], wanted: list[str], start: int) -> int:
    """Index at which `wanted` stands in `lines`; jupytext keeps cells but not where they were."""
    for index in range(start, len(lines)):
        if lines[index : index + len(wanted)] == wanted:
            return index
    return start


def _code_cell(source: str, tags: tuple[str, ...], line: int, label: str) -> Cell:
    return Cell("code", source, tags, line, tuple(_parse(source, label, line).body))


# --- what a source binds ------------------------------------------------------------------------


def _bindings(statement: ast.stmt, is_module: bool) -> Iterator[Binding]:
    """Names bound by a top-level `statement`, not looking inside functions and classes."""
    nested = not isinstance(
        statement,
        ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign,
    )
    for node in _same_scope(statement):
        name: str | None = None
        defines = is_module
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
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


def _same_scope(node: ast.AST) -> Iterator[ast.AST]:
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
        yield from _same_scope(child)


# --- refusals: one source -----------------------------------------------------------------------


def source_problems(source: Source, package: str) -> list[str]:
    """What in `source` could not work in a notebook, by itself."""
    found: list[tuple[int, str]] = []
    for cell in source.cells:
        keeps_imports = INSTALL_TAG in cell.tags
        for statement in cell.body:
            for node in ast.walk(statement):
                found += _name_problems(node)
                if isinstance(node, ast.Import | ast.ImportFrom):
                    found += _import_problems(node, package, keeps_imports)
                    if node is not statement and not keeps_imports:
                        found.append((node.lineno, f"`{ast.unparse(node)}` {NOT_AT_TOP}"))
        if not keeps_imports:
            found += _shared_lines(cell)
    counts = Counter(b.name for b in source.bindings() if b.defines and not b.nested)
    twice = {name for name, count in counts.items() if count > 1}
    for binding in source.bindings():
        if binding.name in twice and binding.defines:
            found.append(
                (binding.line, f"`{binding.name}` is defined twice in this file; rename one")
            )
    return [f"{source.at(line)}: {problem}" for line, problem in sorted(set(found))]


NOT_AT_TOP = (
    "stands inside a function or block; import at the top level of a cell, so that the notebook's "
    "import cell can gather it"
)


def _name_problems(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Names that mean something in a module and nothing in a notebook."""
    if isinstance(node, ast.Name | ast.Attribute):
        name = node.id if isinstance(node, ast.Name) else node.attr
        own = isinstance(node, ast.Name) or name == "TYPE_CHECKING"
        if own and name in FORBIDDEN:
            yield node.lineno, f"uses {name}: {FORBIDDEN[name]}"
    elif isinstance(node, ast.If) and "__name__" in {
        n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)
    }:
        yield (
            node.lineno,
            "has a __main__ guard, which is true in a notebook; move the command line elsewhere",
        )


def _import_problems(
    node: ast.Import | ast.ImportFrom, package: str, keeps_imports: bool
) -> Iterator[tuple[int, str]]:
    """Spellings of an import that the builder cannot gather or inline."""
    text, line = f"`{ast.unparse(node)}`", node.lineno
    spell = f"write `from {package}.MODULE import NAME`"
    own = [a for a in node.names if _is_own(a.name, package)]
    if isinstance(node, ast.Import):
        if own:
            yield line, f"{text} makes a module object, which a notebook does not have; {spell}"
        return
    if node.level:
        yield line, f"{text} is relative; {spell}"
        return
    module = node.module or ""
    if any(alias.name == "*" for alias in node.names):
        yield line, f"{text}: a star import hides which names it brings; list them"
    if module == "__future__":
        yield line, f"{text} would change every later cell; do without"
    if any(alias.name in FORBIDDEN for alias in node.names):
        yield line, f"{text}: {FORBIDDEN['TYPE_CHECKING']}"
    if module == package:
        yield line, f"{text} makes a module object, which a notebook does not have; {spell}"
    elif _is_own(module, package):
        if keeps_imports:
            yield line, f"{text} in a cell tagged {INSTALL_TAG}; import it in a later cell"
        for alias in node.names:
            if alias.asname:
                yield line, f"{text}: the notebook has the name only as `{alias.name}`; use that"


def _is_own(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _shared_lines(cell: Cell) -> Iterator[tuple[int, str]]:
    """Imports that share a line with another statement, so cannot be cut out."""
    for first, second in itertools.pairwise(cell.body):
        if second.lineno <= (first.end_lineno or first.lineno) and (
            isinstance(first, ast.Import | ast.ImportFrom)
            or isinstance(second, ast.Import | ast.ImportFrom)
        ):
            yield second.lineno, "an import shares its line with another statement; split the line"


# --- refusals: all sources together -------------------------------------------------------------


@dataclass
class Owner:
    """Who holds a name in the notebook's namespace."""

    kind: str  # "import", "definition" or "variable"
    where: str
    text: str

    @property
    def label(self) -> str:
        """The file alone."""
        return self.where.rpartition(":")[0]


def namespace_problems(sources: Iterable[Source], package: str) -> list[str]:
    """Names that two sources, or two spellings of an import, would fight over."""
    owners: dict[str, Owner] = {}
    spellings: dict[str, Owner] = {}
    problems: list[str] = []
    for source in sources:
        for item in source.imports():
            if not _is_own(item.module, package):
                new = Owner("import", source.at(item.line), str(item))
                problems += _claim_import(item, new, owners, spellings)
        for binding in source.bindings():
            kind = "definition" if binding.defines else "variable"
            new = Owner(kind, source.at(binding.line), binding.name)
            problems += _claim_name(binding.name, new, owners)
    return problems


def _claim_import(
    item: Import, new: Owner, owners: dict[str, Owner], spellings: dict[str, Owner]
) -> Iterator[str]:
    same = spellings.setdefault(item.target, new)
    if same.text != new.text:
        yield f"{new.where}: `{new.text}`, but {same.where} has `{same.text}`; spell both alike"
        return
    old = owners.get(item.binds)
    submodules = old is not None and _plain(old.text) and _plain(new.text)
    if old is not None and old.text != new.text and not submodules:
        yield _clash(item.binds, new, old)
    yield from _shadows_builtin(item.binds, new)
    owners.setdefault(item.binds, new)


def _plain(text: str) -> bool:
    """Whether an import is ``import a`` or ``import a.b``: both bind `a` to the same module."""
    return re.fullmatch(r"import [\w.]+", text) is not None


def _claim_name(name: str, new: Owner, owners: dict[str, Owner]) -> Iterator[str]:
    old = owners.setdefault(name, new)
    if old is new:
        yield from _shadows_builtin(name, new)
    elif old.kind == new.kind and (new.kind == "variable" or old.label == new.label):
        pass  # run cells may assign again; within one file, source_problems has looked already
    else:
        yield _clash(name, new, old)


def _clash(name: str, new: Owner, old: Owner) -> str:
    say = {"import": "imports", "definition": "defines", "variable": "assigns"}
    return (
        f"{new.where}: {say[new.kind]} `{name}`, which {old.where} {say[old.kind]} too; in one "
        "notebook they would be the same name, so rename one"
    )


def _shadows_builtin(name: str, new: Owner) -> Iterator[str]:
    if name in BUILTINS or (name in NOTEBOOK_NAMES and new.kind != "import"):
        yield f"{new.where}: `{name}` would hide the built-in for every later cell; rename it"
