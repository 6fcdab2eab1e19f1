"""The notebook's assembly: what it makes of sources, what it refuses, and how it is run."""

import ast
import contextlib
import copy
import itertools
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import bs4
import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import complete_notebook  # noqa: E402
import create_enhanced_notebook  # noqa: E402
import extend_notebook  # noqa: E402
import notebook_builder as nbb  # noqa: E402
from notebook_builder import Project, Stage, build, flat_script  # noqa: E402
from notebook_page import make_page  # noqa: E402
from notebook_runner import Kernels, inject_overrides, run_notebook  # noqa: E402
from notebook_sources import BuildError, read_source  # noqa: E402

MAGIC = next(
    cell.source
    for cell in read_source(
        ROOT / "notebooks/sections/01_environment.py", "", "01_environment", "section"
    ).cells
    if nbb.MAGIC_TAG in cell.tags
)

STAGES = (
    Stage("create", "create_enhanced_notebook.py", ("00_start", "01_data")),
    Stage("extend", "extend_notebook.py", ("02_model",)),
    Stage("complete", "complete_notebook.py", ("03_end",)),
)

TOOLBOX = {
    "sizes": '''
        """Sizes."""

        import sys

        UNIT = 10


        class Size:
            def __init__(self, value: int) -> None:
                self.value = value


        def double(size: int) -> int:
            return 2 * size + UNIT


        def divide(size: int) -> float:
            return size / 0
    ''',
    "areas": '''
        """Areas, and a test of what a notebook cell might spoil: %magic, \\\\n and ünïcödé."""

        from emotion_toolbox.sizes import double


        def area(side: int) -> int:
            return double(side) * side
    ''',
    "unused": "from emotion_toolbox.areas import area\n\nNOTHING = area\n",
}

STORY = {
    "config": '''
        """Settings."""

        # %% [markdown]
        # ### Settings

        # %%
        import os
        from dataclasses import dataclass


        @dataclass
        class Config:
            SIZE: int = 2


        # %% [markdown]
        # Where things are.

        # %%
        import math


        def here() -> str:
            # ls is no command, and % is no magic
            return os.getcwd() + str(math.pi)
    ''',
    "data": '''
        """Data."""

        # %% [markdown]
        # ### Data

        # %%
        import os

        import numpy as np

        from emotion_toolbox.sizes import UNIT, Size, double
        from pkg.config import Config

        SCALE = 3


        def load(cfg: Config) -> np.ndarray:
            return np.full(cfg.SIZE, SCALE)


        def larger(size: int) -> int:
            return double(Size(size).value) + UNIT
    ''',
    "plots/__init__": '"""Plots."""',
    "plots/curve": '''
        """Curves."""

        # %%
        from collections import Counter, OrderedDict


        def curve() -> list[int]:
            return list(Counter(OrderedDict()))
    ''',
}

SECTIONS = {
    "00_start": f"""
# %% [markdown]
# # A small notebook

# %% tags=["install"]
import importlib.util
import sys

assert importlib.util.find_spec("json"), sys.executable

# %% [markdown] tags=["toolbox"]
# ## Toolbox

# %% tags=["magic"]
{MAGIC}

# %% [markdown]
# ## Settings come first

# %%
from pkg.config import Config, here

# %% tags=["parameters"]
OVERRIDES: dict[str, object] = {{}}
""",
    "01_data": """
        # %% [markdown]
        # ## Data

        # %%
        # %matplotlib inline
        import sys
        from pathlib import Path

        from pkg.data import load

        values = load(Config())
        run_dir = Path("results") / "a-run"
        print(values.tolist(), OVERRIDES, sys.executable)
    """,
    "02_model": """
        # %% [markdown]
        # ## Model

        # %%
        import numpy as np

        from pkg.data import SCALE

        # %%
        values = values + np.ones(2) * SCALE
    """,
    "03_end": """
        # %% [markdown]
        # ## End

        # %%
        from collections import Counter, defaultdict

        from emotion_toolbox.areas import area
        from pkg.plots.curve import curve

        # %% [markdown]
        # Draw.

        # %%
        print(curve(), Counter(), defaultdict(int), here(), area(3))
    """,
}


class Tree:
    """A small project in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.project = Project(root / "pkg", root / "sections", root / "emotion_toolbox")
        self.output = root / "work" / "nb.ipynb"
        self.output.parent.mkdir(parents=True)
        self.write("pkg/__init__.py", "")
        for name, text in STORY.items():
            self.write(f"pkg/{name}.py", text)
        for name, text in TOOLBOX.items():
            self.write(f"emotion_toolbox/{name}.py", text)
        for name, text in SECTIONS.items():
            self.write(f"sections/{name}.py", text)

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")

    def section(self, text: str, name: str = "03_end") -> None:
        self.write(f"sections/{name}.py", text)

    def plain(self) -> None:
        """Sections that a busy machine is not slow at."""
        for name in SECTIONS:
            self.section("# %%\nx = 1\n", name)

    def build(self, number: int = 3) -> nbformat.NotebookNode:
        return build(STAGES, self.project, number)

    def sources(self) -> list[str]:
        return [cell.source for cell in self.build().cells]

    def stage(self, number: int) -> int:
        return nbb.run_stages(STAGES, number, self.output, self.project)

    def main(self, *arguments: object) -> int:
        argv = ["--output", str(self.output), *map(str, arguments)]
        return complete_notebook.main(argv, STAGES, self.project)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


# --- what is built ------------------------------------------------------------------------------


def test_the_story_is_told_in_order(tree: Tree) -> None:
    assert [(c.id, c.source.split("\n")[0]) for c in tree.build().cells] == [
        ("start-01", "# A small notebook"),
        ("start-02", "import importlib.util"),
        ("start-03", "## Toolbox"),
        ("start-04", MAGIC.split("\n")[0]),
        ("toolbox-sizes", "%%toolbox sizes.py"),
        ("toolbox-areas", "%%toolbox areas.py"),
        ("start-05", "## Settings come first"),
        ("start-06", "### Settings"),
        ("start-07", "import os"),
        ("start-08", "Where things are."),
        ("start-09", "import math"),
        ("start-10", "OVERRIDES: dict[str, object] = {}"),
        ("data-01", "## Data"),
        ("data-02", "### Data"),
        ("data-03", "import numpy as np"),
        ("data-04", "%matplotlib inline"),
        ("model-01", "## Model"),
        ("model-02", "values = values + np.ones(2) * SCALE"),
        ("end-01", "## End"),
        ("end-02", "from collections import Counter, OrderedDict"),
        ("end-03", "Draw."),
        ("end-04", "from collections import defaultdict"),
    ]


def test_each_import_stands_once_at_the_top_of_the_first_cell_that_has_it(tree: Tree) -> None:
    cells = {cell.id: cell.source for cell in tree.build().cells}
    assert cells["start-07"].startswith("import os\nfrom dataclasses import dataclass\n\n\n@data")
    assert cells["data-03"].split("\n\n") == [
        "import numpy as np",
        "from emotion_toolbox.sizes import UNIT, Size, double",
        "SCALE = 3",
        "\ndef load(cfg: Config) -> np.ndarray:\n    return np.full(cfg.SIZE, SCALE)",
        "\ndef larger(size: int) -> int:\n    return double(Size(size).value) + UNIT",
    ]
    assert cells["data-04"] == textwrap.dedent(
        """\
        %matplotlib inline

        values = load(Config())
        run_dir = Path("results") / "a-run"
        print(values.tolist(), OVERRIDES, sys.executable)"""
    )
    assert cells["end-04"] == textwrap.dedent(
        """\
        from collections import defaultdict

        from emotion_toolbox.areas import area

        print(curve(), Counter(), defaultdict(int), here(), area(3))"""
    )
    story = "\n".join(source for name, source in cells.items() if not name.startswith("toolbox"))
    assert "pkg" not in story
    lines = [line for line in story.split("\n") if re.match("(import|from) ", line)]
    assert len(lines) == len(set(lines))


def test_imports_alone_wait_for_the_next_code(tree: Tree) -> None:
    tree.section(
        """
        # %% [markdown]
        # This introduces a picture.

        # %%
        # for the lines
        import json

        from pkg.data import SCALE  # noqa: F401

        # %%
        from csv import reader

        # %% [markdown]
        # So does this.

        # %%
        import json


        def dump(): return json, reader


        # %%
        import wave
        """
    )
    assert tree.sources()[-4:] == [
        "This introduces a picture.",
        "So does this.",
        "import json\nfrom csv import reader\n\n\ndef dump(): return json, reader",
        "import wave",
    ]


def test_a_long_import_is_wrapped_and_words_to_the_formatter_go(tree: Tree) -> None:
    names = ", ".join(f"a_name_of_some_length_{number}" for number in range(9))
    tree.section(
        f"# %%\nfrom torch import (\n    eye, {names},\n)  # fmt: skip\n\nx = 1  # fmt: skip\n"
    )
    statement, code = tree.sources()[-1].split("\n\n")
    assert code == "x = 1"
    assert statement.startswith("from torch import (\n    eye, a_name_of_some_length_0, ")
    assert max(map(len, statement.split("\n"))) <= 100 and statement.endswith("_8,\n)")
    (node,) = ast.parse(statement).body
    assert isinstance(node, ast.ImportFrom)
    assert [alias.name for alias in node.names] == ["eye", *names.split(", ")]


def test_an_import_that_is_partly_known_brings_the_rest(tree: Tree) -> None:
    tree.section("# %%\nfrom dataclasses import dataclass, field\n\nfield(dataclass)\n", "02_model")
    sources = {cell.id: cell.source for cell in tree.build().cells}
    assert sources["model-01"] == "from dataclasses import field\n\nfield(dataclass)"


def test_modules_imported_in_one_cell_come_in_the_order_they_need(tree: Tree) -> None:
    start = SECTIONS["00_start"].replace(
        "from pkg.config import Config, here",
        "from pkg.data import load\nfrom pkg.config import Config, here",
    )
    tree.section(start, "00_start")
    sources = tree.sources()
    assert sources.index("### Settings") < sources.index("### Data")


def test_magics_come_out_as_magics_and_comments_stay(tree: Tree) -> None:
    tree.section(
        '''
        # %%
        # %%time
        # !echo hello
        # ls is a comment
        # % so is this
        text = """
        # %matplotlib in a string
        """
        if text:
            # %pip list
            pass
        ''',
    )
    source = tree.sources()[-1]
    assert source.split("\n") == [
        "%%time",
        "!echo hello",
        "# ls is a comment",
        "# % so is this",
        'text = """',
        "# %matplotlib in a string",
        '"""',
        "if text:",
        "    %pip list",
        "    pass",
    ]
    flat = flat_script(tree.build())
    ast.parse(flat)
    assert "    # %pip list" in flat
    assert "\n# %%time" in flat
    assert "\n# !echo hello" in flat


def test_a_magic_beside_imports_stays_and_a_cell_magic_stays_first(tree: Tree) -> None:
    tree.section("# %%\nimport csv\n\n# %%\n# %load_ext autoreload\nimport json\n")
    assert tree.sources()[-1] == "import csv\n\n%load_ext autoreload\nimport json"
    tree.section("# %%\nimport csv\n\n# %%\n# %%time\ncsv\n")
    assert tree.sources()[-1] == "%%time\nimport csv\ncsv"


def test_a_cell_without_imports_of_its_own_vanishes(tree: Tree) -> None:
    tree.section("# %%\n# for the lines\nfrom pkg.data import load  # noqa: F401\n\n# %%\nload\n")
    assert tree.sources()[-1] == "load"
    assert not any("for the lines" in source for source in tree.sources())


def test_a_cell_of_comments_stays(tree: Tree) -> None:
    tree.section("# %%\n# try it here\n")
    assert tree.sources()[-1] == "# try it here"


def test_gaps_that_imports_leave_are_closed(tree: Tree) -> None:
    tree.section(
        "# %%\na = '''\n\n\n\n'''\n\n\nfrom pkg.data import load\n\n\n\nb = 1\n\n\n\n\nc = 2\n\n\n"
    )
    assert tree.sources()[-1] == "a = '''\n\n\n\n'''\n\n\n\nb = 1\n\n\n\n\nc = 2"


def test_docstrings_of_files_are_dropped_and_prose_in_quotes_is_not(tree: Tree) -> None:
    tree.section('"""A section."""\n\n# %% [markdown]\n"""\nProse.\n"""\n\n# %%\n"""Kept."""\n')
    assert tree.sources()[-2:] == ["Prose.", '"""Kept."""']
    tree.section('# %% [markdown]\n"""\nProse.\n"""\n')
    assert tree.sources()[-1] == "Prose."
    tree.write("pkg/extra.py", '"""Two\n\nlines."""\n\nEXTRA = 1\n')
    tree.section("# %%\nfrom pkg.extra import EXTRA\n")
    assert tree.sources()[-1] == "EXTRA = 1"


def test_cells_are_plain(tree: Tree) -> None:
    notebook = tree.build()
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert set(notebook.metadata) == {"kernelspec", "language_info", "generated"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.language_info == {"name": "python"}
    for cell in notebook.cells:
        assert cell.source == cell.source.strip("\n") != ""
        if cell.cell_type == "code":
            assert cell.execution_count is None and cell.outputs == []
    plain = {cell.id: {**cell.metadata} for cell in notebook.cells}
    folded = {"stage": "create", "tags": ["toolbox"]}
    assert plain.pop("start-03") == folded | {"jp-MarkdownHeadingCollapsed": True}
    folded |= {"jupyter": {"source_hidden": True}, "cellView": "form"}
    assert plain.pop("toolbox-sizes") == plain.pop("toolbox-areas") == folded
    assert plain.pop("start-04") == folded | {"tags": ["magic"]}
    assert all(set(metadata) <= {"stage", "tags"} for metadata in plain.values())
    assert [m["tags"] for m in plain.values() if "tags" in m] == [
        ["install"],
        ["parameters"],
    ]
    stages = [cell.metadata.stage for cell in notebook.cells]
    assert [stage for stage, _ in itertools.groupby(stages)] == ["create", "extend", "complete"]


def test_metadata_of_a_section_does_not_leak(tree: Tree) -> None:
    tree.section(
        "# ---\n# jupyter:\n#   clock: now\n# ---\n\n# %% Title [markdown] collapsed=true\n# Hi.\n"
    )
    notebook = tree.build()
    assert notebook.cells[-1].metadata == {"stage": "complete"}
    assert "jupyter" not in notebook.metadata


def test_raw_cells_stay(tree: Tree) -> None:
    tree.section("# %% [raw]\n# as it is\n")
    assert tree.build().cells[-1].cell_type == "raw"


def test_a_picture_in_prose_travels_in_the_notebook(tree: Tree) -> None:
    tree.section("# %% [markdown]\n# ![Curves](docs/curves.png) and [a link](docs/x.md)\n")
    with pytest.raises(OSError, match="curves.png"):
        tree.build()
    assert tree.main("--all") == 1  # said, not raised
    (tree.root / "docs").mkdir()
    (tree.root / "docs" / "curves.png").write_bytes(b"\x89PNG")
    notebook = tree.build()
    nbformat.validate(notebook)
    cell = notebook.cells[-1]
    assert cell.source == "![Curves](attachment:curves.png) and [a link](docs/x.md)"
    assert cell.attachments == {"curves.png": {"image/png": "iVBORw=="}}
    assert 'src="data:image/png;base64,iVBORw=="' in make_page(notebook, "")


def test_flat_script_is_clean(tree: Tree) -> None:
    path = tree.root / "flat.py"
    path.write_text(flat_script(tree.build()))
    ruff(path, "check", "--select", "F")
    assert "# %% data-04" in path.read_text() and "Areas" not in path.read_text()


def ruff(path: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "ruff", *arguments, "--isolated", "--line-length", "100"]
    result = subprocess.run([*command, str(path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


# --- the toolbox --------------------------------------------------------------------------------


def test_the_first_stage_has_the_toolbox_of_all(tree: Tree) -> None:
    """Each file once, verbatim, after what it imports, and none that is not needed."""
    cells = {cell.id: cell for cell in tree.build(1).cells if nbb.is_toolbox(cell)}
    assert list(cells) == ["toolbox-sizes", "toolbox-areas"]  # areas only stage 3 asks for
    for name in ("sizes", "areas"):
        text = (tree.root / "emotion_toolbox" / f"{name}.py").read_text("utf-8")
        magic, title, rest = cells[f"toolbox-{name}"].source.split("\n", 2)
        assert (magic, title) == (f"%%toolbox {name}.py", f"# @title emotion_toolbox/{name}.py")
        assert rest + "\n" == text


def test_the_toolbox_must_stand_before_its_use(tree: Tree) -> None:
    tree.section(SECTIONS["00_start"].replace('["magic"]', '["other"]'), "00_start")
    assert re.search("pkg/data.py:11: imports from the toolbox.*tagged 'magic'", refusal(tree))
    tree.section("# %%\nfrom emotion_toolbox.sizes import double\n\ndouble(1)\n", "00_start")
    assert refusal(tree).startswith("sections/00_start.py:2: imports from the toolbox")


TOOLBOX_REFUSALS = [
    ("from pkg.data import load\n", "areas.py:3: .*the toolbox must not import the story"),
    ("def f():\n    import pkg.data\n", "areas.py:4: .*the toolbox must not import the story"),
    ("from emotion_toolbox import sizes\n", "areas.py:3.*whole module.*emotion_toolbox.MODULE"),
    ("from emotion_toolbox.none import x\n", "areas.py:3: there is no emotion_toolbox.none"),
    ("from emotion_toolbox.sizes import x\n", "areas.py:3: emotion_toolbox.sizes does not define"),
    ("def f():\n    from emotion_toolbox.sizes import x\n", "areas.py:4: .*does not define `x`"),
    ("from emotion_toolbox.sizes import sys\n", "it imports it"),
    ("from emotion_toolbox.unused import NOTHING\n", "areas.* is a circle of imports"),
    ("from .sizes import double\n", "areas.py:3.*relative"),
    ("from emotion_toolbox.sizes import *\n", "star"),
    ("from typing import TYPE_CHECKING\n", "areas.py:3: .*TYPE_CHECKING"),
    ("WHERE = __file__\n", "areas.py:3: uses __file__"),
    ('if __name__ == "__main__":\n    pass\n', "areas.py:3: has a __main__ guard"),
    ("from emotion_toolbox.deep.er import x\n", "areas.py:3: .*one folder of files"),
    ("def f(:\n", "emotion_toolbox/areas.py:3: this is not Python"),
]


@pytest.mark.parametrize(("code", "message"), TOOLBOX_REFUSALS)
def test_a_toolbox_file_is_refused(tree: Tree, code: str, message: str) -> None:
    tree.write("emotion_toolbox/areas.py", f'"""Areas."""\n\n{code}\n\ndef area(x): return x\n')
    assert re.search(message, refusal(tree)), refusal(tree)


def test_a_toolbox_file_may_be_an_ordinary_module(tree: Tree) -> None:
    tree.write(
        "emotion_toolbox/areas.py",
        """
        from __future__ import annotations

        import numpy as np

        try:
            import nothing_of_the_kind
        except ImportError:
            nothing_of_the_kind = None
        load = filter = values = 1  # names of its own, whatever the story calls what


        def area(side):
            from emotion_toolbox.sizes import double as twice

            return twice(side)
        """,
    )
    tree.build()


class Shell:
    """A kernel in an empty folder, with the cells of a small notebook run in it."""

    def __init__(self, tree: Tree, cwd: Path, before: str = "pass") -> None:
        self.notebook = nbformat.v4.new_notebook()
        self.client = nbclient.NotebookClient(
            self.notebook, kernel_manager_class=Kernels, resources={"metadata": {"path": str(cwd)}}
        )
        self.client.create_kernel_manager()
        self.cells = {cell.id: cell.source for cell in code_cells(tree.build())}
        self.client.start_new_kernel()
        self.client.start_new_kernel_client()
        self(before)
        for name, source in self.cells.items():
            self(source)
            for file in ("errors", "files") if name == "start-04" else ():
                text = (ROOT / f"emotion_toolbox/{file}.py").read_text("utf-8")
                assert self(f"%%toolbox {file}.py\n{text}") == ""

    def __call__(self, source: str) -> str:
        """Run a cell; return what it prints, or fail with its traceback."""
        self.notebook.cells.append(nbformat.v4.new_code_cell(textwrap.dedent(source)))
        with contextlib.suppress(nbclient.exceptions.CellExecutionError):
            self.client.execute_cell(self.notebook.cells[-1], len(self.notebook.cells) - 1)
        outputs = self.notebook.cells[-1].outputs
        text = "".join(o.get("text", "") + "\n".join(o.get("traceback", [])) for o in outputs)
        return re.sub(r"\x1b\[[\d;]*m", "", text)

    def edit(self, name: str, old: str, new: str) -> str:
        """Edit the cell of a toolbox file as a reader might, and run it again."""
        assert old in self.cells[name]
        self.cells[name] = self.cells[name].replace(old, new)
        return self(self.cells[name])

    def close(self) -> None:
        if self.client.km is not None:
            self.client._cleanup_kernel()


@pytest.fixture
def shell(tree: Tree) -> Iterator[Shell]:
    empty = tree.root / "empty"
    empty.mkdir()
    empty.chmod(0o555)
    shell = Shell(tree, empty)
    yield shell
    shell.close()
    assert list(empty.iterdir()) == []


def test_what_stands_in_a_toolbox_cell_is_what_runs(shell: Shell) -> None:
    """In an empty folder that cannot be written to, with another such package installed."""
    code = "import emotion_toolbox.areas as x; print(x.__file__, x.area(3), area(3), larger(1))"
    where, *values = shell(code).split()
    assert values == ["48", "48", "22"]
    file = Path(where)
    assert not file.is_relative_to(ROOT) and file.parts[-2:] == ("emotion_toolbox", "areas.py")
    assert file.parent.parent.stat().st_mode & 0o077 == 0  # nobody else's
    assert shell("%%toolbox areas.py\n" + file.read_text("utf-8")) == ""
    assert file.read_text("utf-8") == shell.cells["toolbox-areas"].partition("\n")[2] + "\n"
    traceback = shell("from emotion_toolbox.sizes import divide\n\ndivide(1)")
    line = int(re.findall(r"File \S+/emotion_toolbox/sizes\.py:(\d+), in divide\(", traceback)[0])
    assert shell.cells["toolbox-sizes"].split("\n")[line].strip() == "return size / 0"
    assert "return double(side) * side" in shell("import inspect; print(inspect.getsource(area))")
    shell("import multiprocessing, pickle")
    shell("pool = multiprocessing.get_context('spawn').Pool(1)")
    assert shell("print(pool.apply(area, [3]), pool.apply(Size, [4]).value)") == "48 4\n"
    shell("pool.close(); pool.join()")
    assert shell("print(type(pickle.loads(pickle.dumps(Size(1)))) is Size)") == "True\n"


def test_an_edited_toolbox_cell_is_in_force_everywhere(shell: Shell) -> None:
    shell("size, before = Size(1), Size")
    assert shell("print(double(1), area(1), larger(1), UNIT)") == "12 12 22 10\n"
    assert shell.edit("toolbox-sizes", "2 * size", "5 * size") == ""  # as long as it was
    assert shell("print(double(1), area(1), larger(1), UNIT)") == "15 15 25 10\n"
    assert shell.edit("toolbox-sizes", "UNIT = 10", "UNIT = 20") == ""
    assert shell("print(double(1), area(1), larger(1), UNIT)") == "25 25 45 20\n"
    assert shell("print(Size is before, 'Size' in globals())") == "False True\n"
    assert "5 * size" in shell("import inspect; print(inspect.getsource(double))")
    shell("import multiprocessing; pool = multiprocessing.get_context('spawn').Pool(1)")
    assert shell("print(pool.apply(area, [1]))\npool.close(); pool.join()") == "25\n"
    shell("before = Size")
    for name in ("start-04", "toolbox-sizes", "toolbox-areas"):  # unchanged: nothing happens
        assert shell(shell.cells[name]) == ""
    assert shell("print(Size is before, area(1))") == "True 25\n"


def test_a_toolbox_edit_that_fails_changes_nothing(shell: Shell) -> None:
    for wrong, why in 2 * [
        ("UNIT = ten", "NameError: name 'ten'"),
        ("UNIT = (", "SyntaxError: '('"),
    ]:
        said = shell.edit("toolbox-sizes", "UNIT = 10", wrong)  # the same one again, too
        assert why in said and "sizes.py" in said
        assert shell("print(double(1), area(1), larger(1), UNIT)") == "12 12 22 10\n"
        shell.cells["toolbox-sizes"] = shell.cells["toolbox-sizes"].replace(wrong, "UNIT = 10")
    assert shell.edit("toolbox-sizes", "UNIT = 10", "UNIT = 30") == ""
    assert shell("print(double(1), area(1), larger(1), UNIT)") == "32 32 62 30\n"
    folder = Path(shell("print(FOLDER.name)").strip())
    assert folder.is_dir()
    shell.close()
    assert not folder.exists()


def test_the_cells_win_over_a_checkout_that_was_imported_before(tree: Tree) -> None:
    """The folder of the notebook has such a package too, and it was used in this kernel."""
    checkout = tree.root / "checkout"
    for name in ("__init__", "sizes", "areas", "extra"):
        text = "UNIT = -1\ndef double(x): return -1\ndef area(x): return -1\nEXTRA = 1\n"
        tree.write(f"checkout/emotion_toolbox/{name}.py", text)
    shell = Shell(tree, checkout, "import emotion_toolbox.extra, emotion_toolbox.areas")
    try:
        code = "print(area(3), double(1), larger(1), 'emotion_toolbox.extra' in sys.modules)"
        assert shell(code) == "48 12 22 False\n"
    finally:
        shell.close()


# --- what is refused ----------------------------------------------------------------------------


def refusal(tree: Tree) -> str:
    with pytest.raises(BuildError) as caught:
        tree.build()
    return str(caught.value)


SECTION_REFUSALS = [
    ("import pkg.data\n", "03_end.py:3.*whole module.*from pkg.MODULE import NAME"),
    ("import pkg\n", "whole module"),
    ("import pkg.data as d\n", "whole module"),
    ("from pkg import data\n", "03_end.py:3.*whole module"),
    ("import emotion_toolbox.sizes\n", "whole module.*from emotion_toolbox.MODULE import NAME"),
    ("from emotion_toolbox import sizes\n", "03_end.py:3.*whole module"),
    ("from pkg.plots import curve\n", "03_end.py:3: pkg.plots does not define `curve`"),
    ("from pkg.data import nothing\n", "03_end.py:3: pkg.data does not define `nothing`"),
    ("from pkg.data import laod\n", "did you mean `load`"),
    ("from emotion_toolbox.sizes import dubble\n", "03_end.py:3: .*did you mean `double`"),
    ("from pkg.data import Config\n", "it imports it"),
    ("from pkg.data import load as l\n", "only as `load`"),
    ("from emotion_toolbox.sizes import double as d\n", "only as `double`"),
    ("from pkg.none import x\n", r"03_end.py:3: there is no pkg.none \(pkg/none.py\)"),
    ("from emotion_toolbox.none import x\n", "there is no emotion_toolbox.none"),
    ("from . import data\n", "03_end.py:3.*relative"),
    ("from .data import load\n", "relative"),
    ("from pkg.data import *\n", "star"),
    ("from math import *\n", "03_end.py:3.*star"),
    ("from __future__ import annotations\n", "later cell"),
    ("from typing import TYPE_CHECKING\n", "TYPE_CHECKING"),
    ("import typing\nif typing.TYPE_CHECKING:\n    pass\n", "03_end.py:4.*TYPE_CHECKING"),
    ("print(__file__)\n", "03_end.py:3.*uses __file__"),
    ("def f():\n    import json\n", "03_end.py:4.*inside a function"),
    ("def f():\n    from pkg.data import load\n", "03_end.py:4.*inside a function"),
    ("try:\n    import json\nexcept ImportError:\n    pass\n", "03_end.py:4.*block"),
    ("import json; print(json)\n", "shares its line"),
    ("x = 1; import json\n", "shares its line"),
    ("def f():\n    return (\n", "03_end.py:.*not Python"),
    ("load = 1\n", r"03_end.py:3: assigns `load`, which pkg/data.py:\d+ defines too"),
    ("for SCALE in []:\n    pass\n", "assigns `SCALE`"),
    ("if (load := 3):\n    pass\n", "assigns `load`"),
    ("with open('x') as load:\n    pass\n", "assigns `load`"),
    ("[load := 1 for _ in []]\n", "assigns `load`"),
    ("try:\n    pass\nexcept OSError as load:\n    pass\n", "assigns `load`"),
    ("match 1:\n    case load:\n        pass\n", "assigns `load`"),
    ("np = 1\n", r"assigns `np`, which pkg/data.py:\d+ imports too"),
    ("double = 1\n", r"assigns `double`, which pkg/data.py:\d+ imports too"),
    ("import os\ndef os(): pass\n", "defines `os`"),
    ("def values(): pass\n", "01_data.py:11 assigns too"),
    ("def f(): pass\n\n\n# %%\ndef f(): pass\n", "`f` is defined twice in this file"),
    ("import numpy\n", r"`import numpy`, but pkg/data.py:\d+ has `import numpy as np`"),
    ("from json import dumps as np\n", "imports `np`"),
    ("import json as np\n", "imports `np`"),
    ("from os import path as p\nimport os.path\n", "03_end.py:4: `import os.path`.*spell both"),
    ("list = 3\n", "hide the built-in"),
    ("from os import open\n", "03_end.py:3: `open` would hide"),
    ("display = 3\n", "hide the built-in"),
]


@pytest.mark.parametrize(("code", "message"), SECTION_REFUSALS)
def test_a_section_is_refused(tree: Tree, code: str, message: str) -> None:
    tree.section(f"# %%\n\n{code}")
    assert re.search(message, refusal(tree)), refusal(tree)


MODULE_REFUSALS = [
    ('if __name__ == "__main__":\n    print(1)\n', "pkg/extra.py:3: has a __main__ guard"),
    ("WHERE = __file__\n", "pkg/extra.py:3: uses __file__"),
    ("from .data import load\n", "relative"),
    ("def g():\n    from math import pi\n", "extra.py:4.*inside a function"),
    ("def load(): pass\n", r"defines `load`, which pkg/data.py:\d+ defines too"),
    ("def double(): pass\n", r"defines `double`, which pkg/data.py:\d+ imports too"),
    ("class SCALE: pass\n", "defines `SCALE`"),
    ("values = 1\n", "01_data.py:11 assigns too"),
    ("A = 1\nA = 2\n", "pkg/extra.py:4: `A` is defined twice in this file"),
    ("def a(): pass\n\n\ndef a(): pass\n", "extra.py:6: `a` is defined twice"),
    ("def filter(): pass\n", "`filter` would hide the built-in"),
    ("import numpy as num\n", r"`import numpy as num`, but pkg/data.py:\d+ has"),
    ("from collections import namedtuple as np\n", "imports `np`"),
    ("from pkg.plots.curve import curve\n", "extra.py:3: pkg.extra imports from pkg.plots.curve"),
]


@pytest.mark.parametrize(("code", "message"), MODULE_REFUSALS)
def test_a_module_is_refused(tree: Tree, code: str, message: str) -> None:
    tree.write("pkg/extra.py", f'"""Extra."""\n\n{code}ONE = 1\n')
    tree.section("# %%\nfrom pkg.extra import ONE\n")
    assert re.search(message, refusal(tree)), refusal(tree)


def test_what_is_allowed(tree: Tree) -> None:
    tree.write(
        "pkg/extra.py",
        """
        # %%
        from typing import overload
        import torch
        import torch.nn.functional as F
        import torch.utils.data

        declared: int
        declared = 1
        declared += 1
        if declared:
            branch = 1
        else:
            branch = 2
        squares = [load for load in range(3)]


        @overload
        def twice(x: int) -> int: ...
        @overload
        def twice(x: str) -> str: ...
        def twice(x):
            values = load = torch, F
            return values, load


        class Named:
            load = 3
            def __file__(self): ...


        def _(): ...
        def _(): ...
        """,
    )
    tree.section(
        """
        # %%
        from pkg.extra import Named, twice
        from IPython.display import display
        values = [values for values in (1, 2)]
        display(values, twice, Named, torch.__file__)

        # %%
        values = 4
        for step in range(3):
            _ = step
        for step in range(3):
            pass
        """
    )
    tree.build()


def test_an_install_cell_may_import_as_it_needs(tree: Tree) -> None:
    text = """
        # %% tags=["install"]
        try:
            import google.colab
        except ImportError:
            pass
    """
    tree.section(text)
    assert "import google.colab" in tree.sources()[-1]
    tree.section('# %% tags=["install"]\nfrom pkg.data import load\n')
    assert "tagged install" in refusal(tree)


def test_a_module_before_what_it_needs_is_refused(tree: Tree) -> None:
    tree.section("# %%\nfrom pkg.data import load\n", "00_start")
    message = refusal(tree)
    assert re.search(r"pkg/data.py:12: pkg.data imports from pkg.config", message)
    assert "sections/00_start.py:2 asks for pkg.data" in message
    assert "`from pkg.config import Config` in a section before" in message


def test_modules_that_need_each_other_are_refused(tree: Tree) -> None:
    tree.write("pkg/one.py", "from pkg.two import B\nA = 1\n")
    tree.write("pkg/two.py", "from pkg.one import A\nB = 1\n")
    tree.section("# %%\nfrom pkg.one import A\nfrom pkg.two import B\n")
    assert "pkg.two imports from pkg.one, which is not in the notebook yet" in refusal(tree)


def test_all_problems_are_told_at_once(tree: Tree) -> None:
    tree.section("# %%\nprint(__file__)\n\n# %%\nfrom math import *\n")
    assert len(refusal(tree).splitlines()) == 2


def test_sections_need_names_of_their_own(tree: Tree) -> None:
    for names in (("start",), ("00_start", "01_start"), ("00_Start",), ("00-start",)):
        with pytest.raises(BuildError, match="NN_name"):
            build([Stage("create", "c.py", names)], tree.project)


def test_a_missing_section_is_named(tree: Tree) -> None:
    (tree.root / "sections" / "01_data.py").unlink()
    assert refusal(tree).startswith("sections/01_data.py: cannot be read")


# --- stages and the file ------------------------------------------------------------------------


def stages_in(path: Path) -> list[str]:
    stages = [cell["metadata"]["stage"] for cell in json.loads(path.read_text())["cells"]]
    return [stage for stage, _ in itertools.groupby(stages)]


def test_stages_add_up_and_run_again_in_any_order(tree: Tree) -> None:
    for number in (1, 2, 3):
        assert tree.stage(number) == 0
    whole = tree.output.read_bytes()
    assert whole.endswith(b"}\n") and whole.startswith(b'{\n "cells"')
    for number in (3, 3, 2, 2, 3, 1, 2, 3):
        assert tree.stage(number) == 0
        assert stages_in(tree.output) == ["create", "extend", "complete"][:number]
    assert tree.output.read_bytes() == whole


def test_an_unchanged_file_is_left_alone(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    assert tree.main("--all") == 0
    os.utime(tree.output, (1, 1))
    assert tree.main() == 0 and tree.main("--all") == 0
    assert tree.output.stat().st_mtime == 1
    assert capsys.readouterr().out.count(" unchanged\n") == 2
    assert [p.name for p in tree.output.parent.iterdir()] == ["nb.ipynb"]


@pytest.mark.parametrize(("number", "present"), [(2, 0), (3, 0), (3, 1)])
def test_a_missing_stage_names_the_script(
    tree: Tree, capsys: pytest.CaptureFixture[str], number: int, present: int
) -> None:
    for earlier in range(1, present + 1):
        tree.stage(earlier)
    before = tree.output.read_bytes() if present else None
    assert tree.stage(number) == 1
    error = capsys.readouterr().err
    assert f"run `python {STAGES[present].script} --output {tree.output}` first" in error
    assert (tree.output.read_bytes() if tree.output.exists() else None) == before


def edit(path: Path, change: str) -> str:
    """Change the second cell of the notebook at `path` as a hand might; return its id."""
    notebook = json.loads(path.read_text())
    cells = notebook["cells"]
    if change == "source":
        cells[1]["source"] = ["# edited\n", *cells[1]["source"]]
    elif change == "added":
        cells.insert(1, {**cells[1], "id": "mine", "metadata": {}})
        cells[1], cells[2] = cells[2], cells[1]
        path.write_text(json.dumps(notebook))
        return "mine"
    elif change == "swapped":
        cells[1], cells[2] = cells[2], cells[1]
    elif change == "tags":
        cells[1]["metadata"]["tags"] = ["other"]
    path.write_text(json.dumps(notebook))
    return str(cells[1]["id"])


@pytest.mark.parametrize("change", ["source", "added", "swapped", "tags"])
def test_a_hand_edit_of_an_earlier_stage_is_refused(
    tree: Tree, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    tree.stage(1)
    cell = edit(tree.output, change)
    before = tree.output.read_bytes()
    assert tree.stage(2) == 1
    error = capsys.readouterr().err
    assert cell in error or "stand in another order" in error
    assert "create_enhanced_notebook.py" in error
    assert tree.output.read_bytes() == before


def test_stale_sources_of_an_earlier_stage_are_refused(
    tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    tree.stage(1)
    tree.write("pkg/data.py", STORY["data"].replace("SCALE = 3", "SCALE = 4"))
    assert tree.stage(2) == 1
    error = capsys.readouterr().err
    assert "cell data-03 differs" in error and "-SCALE = 3\n+SCALE = 4" in error
    assert tree.stage(1) == tree.stage(2) == 0


def test_a_notebook_that_was_run_in_place_can_be_extended(tree: Tree) -> None:
    tree.stage(1)
    notebook = nbformat.read(tree.output, as_version=4)
    for number, cell in enumerate(code_cells(notebook)):
        cell.execution_count = number + 1
        cell.metadata["execution"] = {"iopub.execute_input": "now"}
        cell.outputs = [nbformat.v4.new_output("stream", text="x")]
    nbformat.write(notebook, tree.output)
    assert tree.stage(2) == 0
    assert all(not cell.outputs for cell in code_cells(nbformat.read(tree.output, as_version=4)))


@pytest.mark.parametrize("content", ["", "<<<<<<< HEAD", "[]", '{"cells": [1]}', '{"nbformat": 3}'])
def test_what_is_no_notebook_is_refused_and_rebuilt(
    tree: Tree, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    tree.output.write_text(content)
    assert tree.stage(2) == 1
    assert "is not a notebook" in capsys.readouterr().err
    assert tree.main("--check") == 1
    assert tree.stage(1) == tree.stage(2) == tree.stage(3) == tree.main("--check") == 0


def copies(tree: Tree) -> list[Path]:
    return sorted(tree.output.parent.glob("nb.before-*.ipynb"))


def test_what_a_build_would_lose_is_kept_beside_it(
    tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    tree.main("--all")
    tree.write("pkg/data.py", STORY["data"].replace("SCALE = 3", "SCALE = 4"))
    assert tree.main("--all") == 0 and copies(tree) == []  # other sources are no edit
    for change, reason in (
        ("outputs", "has outputs"),
        ("source", "was edited by hand"),
        ("added", "was edited by hand"),
        ("no notebook", "is not as it was"),
    ):
        if change == "outputs":
            notebook = nbformat.read(tree.output, as_version=4)
            code_cells(notebook)[0].outputs = [nbformat.v4.new_output("stream", text="x")]
            nbformat.write(notebook, tree.output)
        elif change == "no notebook":
            tree.output.write_text("<<<<<<< HEAD")
        else:
            edit(tree.output, change)
        before, known = tree.output.read_bytes(), copies(tree)
        capsys.readouterr()
        assert tree.main("--all") == 0
        (copy,) = set(copies(tree)) - set(known)
        assert copy.read_bytes() == before
        said = capsys.readouterr().out.splitlines()
        assert len(said) == 2 and reason in said[0] and said[0].endswith(f"kept as {copy.name}")
        assert tree.main("--check") == 0
    assert len(copies(tree)) == 4  # within a second, too


def test_the_scripts_know_their_stages() -> None:
    names = ["create", "extend", "complete"]
    assert [stage.name for stage in complete_notebook.STAGES] == names
    sections = [s for stage in complete_notebook.STAGES for s in stage.sections]
    assert [s[:2] for s in sections] == [f"{i:02d}" for i in range(len(sections))]
    assert {f"{s}.py" for s in sections} == {p.name for p in Project().sections.glob("*.py")}
    for stage in complete_notebook.STAGES:
        assert (ROOT / stage.script).is_file()


def test_the_scripts_write_their_stage(tree: Tree) -> None:
    arguments = ["--output", str(tree.output)]
    assert extend_notebook.main(arguments, STAGES, tree.project) == 1
    assert create_enhanced_notebook.main(arguments, STAGES, tree.project) == 0
    assert "toolbox-areas" in tree.output.read_text()
    assert extend_notebook.main(arguments, STAGES, tree.project) == 0
    assert stages_in(tree.output) == ["create", "extend"]


def test_bytes_do_not_depend_on_hash_order(tree: Tree) -> None:
    code = f"""
        import sys
        from pathlib import Path
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        import notebook_builder as b
        from test_builder import STAGES
        root = Path({str(tree.root)!r})
        project = b.Project(root / "pkg", root / "sections", root / "emotion_toolbox")
        sys.stdout.buffer.write(b.notebook_text(b.build(STAGES, project)).encode())
    """
    tree.section("# %%\nfrom typing import Any, Final, List, Literal\nimport json, csv, abc, ast\n")
    outputs = [
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            cwd=tree.root,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1] == nbb.notebook_text(tree.build()).encode()


# --- check --------------------------------------------------------------------------------------


def test_check_agrees_with_what_was_built(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    tree.main("--all")
    assert tree.main("--check") == 0
    assert "is what the sources give" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("source", "cell {} differs:.*-# edited"),
        ("added", "cell {} is not in the sources"),
        ("swapped", "the cells stand in another order"),
        ("tags", r"cell {} differs:.*-\['other'\]"),
    ],
)
def test_check_finds_a_hand_edit(
    tree: Tree, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    tree.main("--all")
    cell = edit(tree.output, change)
    before = tree.output.read_bytes()
    assert tree.main("--check") == 1
    error = capsys.readouterr().err
    assert re.search(message.format(cell), error, re.DOTALL)
    assert f"To fix it: python complete_notebook.py --all --output {tree.output}" in error
    assert tree.output.read_bytes() == before
    assert tree.main("--all") == tree.main("--check") == 0


def test_check_finds_what_is_missing_or_more(
    tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tree.main("--check") == 1
    assert "does not exist" in capsys.readouterr().err
    tree.stage(1)
    assert tree.main("--check") == 1
    assert "cell model-01 is missing" in capsys.readouterr().err
    tree.main("--all")
    notebook = nbformat.read(tree.output, as_version=4)
    code_cells(notebook)[0].execution_count = 3
    nbformat.write(notebook, tree.output)
    assert tree.main("--check") == 1
    assert "cell start-02 has outputs" in capsys.readouterr().err
    tree.main("--all")
    tree.output.write_text(tree.output.read_text() + "\n")
    assert tree.main("--check") == 1
    assert "the metadata or the layout" in capsys.readouterr().err


def test_check_prints_the_budgets(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    tree.write(
        "sections/02_model.py",
        """
        # %%
        class EnhancedConfig:
            A = 1

            B = 2

        def keep_figure(figure):
            plot_nothing()

        # %%
        plot_data = keep_figure
        plot_data(3)

        # %%
        if values is not None:
            result = fit(values)
    """,
    )
    tree.main("--all")
    capsys.readouterr()
    assert tree.main("--check") == 0
    said = dict(re.findall(r"(?m)^(.*\S) +(\d+ of \d+)", capsys.readouterr().out))
    built = tree.build().cells
    cells = [cell for cell in built if not nbb.is_toolbox(cell)]
    story = [cell.source for cell in cells if cell.cell_type == "code"]
    count = [sum(bool(line.strip()) for line in source.split("\n")) for source in story]
    at = {cell.id: index for index, cell in enumerate(cells)}
    toolbox = "".join(TOOLBOX[name] for name in ("sizes", "areas"))
    folded = 2 * 2 + sum(bool(line.strip()) for line in toolbox.split("\n"))
    assert said == {
        "visible code cells": f"{len(story)} of 80",
        "visible code lines": f"{sum(count)} of 850",
        "longest visible code cell": f"{max(count)} of 45",
        "the cell of EnhancedConfig": "5 of 75",
        "toolbox cells": "2 of 20",
        "toolbox lines": f"{folded} of 4190",
        "cells before the first picture of the data": f"{at['model-02']} of 35",
        "cells before training starts": f"{at['model-03']} of 110",
    }


def test_check_reports_broken_sources(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    tree.main("--all")
    tree.section("# %%\nprint(__file__)\n")
    assert tree.main("--check") == 1
    assert "03_end.py:2: uses __file__" in capsys.readouterr().err


def test_check_and_build_import_nothing_heavy() -> None:
    code = (
        "import sys; sys.path.insert(0, '.'); import complete_notebook; "
        "complete_notebook.main(['--check']); "
        "heavy = {'torch', 'numpy', 'emotion_transfer', 'nbclient', 'nbconvert'} & {*sys.modules}; "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# --- running ------------------------------------------------------------------------------------


def executed(tree: Tree, folder: str = "work/results/a-run") -> nbformat.NotebookNode:
    path = tree.root / folder / "nb_executed.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.with_suffix(".html").stat().st_size > 10_000
    return notebook


def text_of(cell: nbformat.NotebookNode) -> str:
    return "".join(
        o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in cell.outputs
    )


def test_execute_runs_every_cell_here(
    tree: Tree,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    elsewhere = tmp_path / "jupyter" / "kernels" / "python3"  # the user's python3 leads nowhere
    elsewhere.mkdir(parents=True)
    spec = {"argv": ["/nonexistent/python", "{connection_file}"], "display_name": "x"}
    (elsewhere / "kernel.json").write_text(json.dumps({**spec, "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    tree.section(
        """
        # %%
        import time

        import matplotlib.pyplot as plt
        from tqdm.auto import tqdm

        # %%
        figure, axis = plt.subplots()
        plt.show()

        # %%
        for epoch in tqdm(range(2), desc="epochs <b>"):
            for batch in tqdm(range(3), leave=False, desc="hidden bar"):
                time.sleep(0.01)
            print(f"epoch {epoch}", end="")
            time.sleep(0.5)
            print(f": loss {epoch / 10}\\nan epoch is over")
        print("a reader's output")
        """
    )
    assert tree.main("--execute", "--set", "EPOCHS=3", "BETAS=1") == 1
    assert "no setting is called 'BETAS'" in capfd.readouterr().err

    assert tree.main("--execute", "--set", "EPOCHS=3", "--set", "SEED=7") == 0
    notebook = executed(tree)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    said = capfd.readouterr()
    out = said.out.splitlines()
    assert f"ran all {len(cells)} code cells" in out[-3]
    assert [Path(line) for line in out[-2:]] == [
        tree.root / "work" / "results" / "a-run" / f"nb_executed{suffix}"
        for suffix in (".ipynb", ".html")
    ]
    assert [line for line in out if "epoch" in line] == ["epoch 0: loss 0.0", "epoch 1: loss 0.1"]
    assert "a reader's output" not in out
    shown = re.findall(r"(?m)^cell \d+/\d+  (\w+)$", said.out)
    assert shown == ["start", "toolbox", "start", "injected", "data", "model", "end"]
    assert not re.search("error|interrupt|warning", said.out + said.err, re.IGNORECASE)

    by_id = {cell.id: cell for cell in notebook.cells}
    injected = by_id["injected-parameters"]
    assert injected.metadata.tags == ["injected-parameters"]
    assert injected.source.startswith('OVERRIDES = {\n    **OVERRIDES,\n    "EPOCHS": 3,\n')
    assert notebook.cells[notebook.cells.index(injected) - 1].metadata.tags == ["parameters"]
    shown = text_of(by_id["data-04"])
    assert "[3, 3] {'EPOCHS': 3, 'SEED': 7}" in shown and sys.executable in shown

    page = (tree.root / "work" / "results" / "a-run" / "nb_executed.html").read_text()
    assert "data:image/png;base64," in page
    assert "epoch 1: loss 0.1\n" in text_of(cells[-1])  # the notebook has them too
    assert "hidden bar:" not in page and "epochs &lt;b&gt;:" not in page
    assert "widget-view" not in page and "widgets" not in notebook.metadata


def test_execute_does_not_touch_the_notebook(tree: Tree) -> None:
    """It runs what the sources give, whatever was done to the file."""
    tree.plain()
    tree.main("--all")
    notebook = nbformat.read(tree.output, as_version=4)
    notebook.cells[0].source = "raise ValueError('edited by hand')"
    nbformat.write(notebook, tree.output)
    before = tree.output.read_bytes()
    assert tree.main("--execute", "--all", "--results", tree.root / "kept") == 0
    assert tree.output.read_bytes() == before and copies(tree) == []
    assert [cell.source for cell in executed(tree, "kept").cells] == ["x = 1"] * 4


def test_a_named_error_is_shown_in_a_line(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    tree.section(
        """
        # %%
        class WrongSetting(ValueError):
            def _render_traceback_(self):
                return [f"WrongSetting: {self}"]

        # %%
        def deeper():
            raise WrongSetting("EPOCHS=-1 is negative")

        deeper()
        """
    )
    assert tree.main("--execute") == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: cell end-02 failed",
        "",
        "WrongSetting: EPOCHS=-1 is negative",
    ]


def test_a_failing_cell_is_shown_and_the_rest_kept(
    tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    tree.section(
        "# %%\nprint('so far')\n\n# %%\nraise ValueError('no such luck')\n\n# %%\nprint(1)\n"
    )
    assert tree.main("--execute", "--results", tree.root / "kept") == 1
    said = capsys.readouterr()
    assert "cell end-02 failed" in said.err and "raise ValueError('no such luck')" in said.err
    assert "ValueError: no such luck" in said.err and "\x1b" not in said.err
    assert said.out.splitlines()[-1] == str(tree.root / "kept" / "nb_executed.html")
    cells = code_cells(executed(tree, "kept"))
    assert text_of(cells[-3]) == "so far\n"
    assert cells[-2].outputs[-1].ename == "ValueError"
    assert cells[-1].execution_count is None


def test_memory_that_runs_out_gets_a_hint(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    tree.section("# %%\nraise RuntimeError('CUDA out of memory. Tried')\n")
    assert tree.main("--execute") == 1
    assert "lower BATCH_SIZE" in capsys.readouterr().err
    executed(tree)  # beside the run's results, which the kernel could still name


def test_a_cell_that_takes_too_long_is_stopped(
    tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    tree.plain()
    tree.section(
        """
        # %%
        import time

        print("begun")
        try:
            time.sleep(600)
        finally:
            time.sleep(6)
            print("tidied")
        """
    )
    assert tree.main("--execute", "--timeout", 4, "--results", tree.root / "kept") == 1
    error = capsys.readouterr().err
    assert "cell end-01 failed" in error and "did not end in time" in error and "--timeout" in error
    assert text_of(code_cells(executed(tree, "kept"))[-1]).startswith("begun\ntidied\n")


def test_a_kernel_that_dies_is_noticed(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    tree.section("# %%\nimport os\n\nos._exit(9)\n")
    assert tree.main("--execute") == 1
    error = capsys.readouterr().err
    assert "cell end-01 failed" in error and "os._exit(9)" in error
    assert "kernel died" in error and "lower BATCH_SIZE" in error
    assert code_cells(executed(tree))[-2].execution_count


def test_a_run_without_a_folder_goes_to_outputs(tree: Tree) -> None:
    tree.plain()
    elsewhere = tree.root / "elsewhere"
    elsewhere.mkdir()
    assert tree.main("--execute", "--cwd", elsewhere, "--timeout", -1) == 0
    executed(tree, "elsewhere/outputs")


def test_an_interrupted_run_is_kept(tree: Tree) -> None:
    tree.section(
        """
        # %%
        import time

        Path("begun").touch()
        try:
            time.sleep(600)
        except KeyboardInterrupt:
            time.sleep(6)  # a checkpoint takes its time
            Path("tidied").touch()
            raise
        """
    )
    code = f"""
        import sys
        from pathlib import Path
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        import complete_notebook, notebook_builder as b
        from test_builder import STAGES
        root = Path({str(tree.root)!r})
        project = b.Project(root / "pkg", root / "sections", root / "emotion_toolbox")
        argv = ["--output", {str(tree.output)!r}, "--execute"]
        sys.exit(complete_notebook.main(argv, STAGES, project))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=tree.root) as process:
        deadline = time.monotonic() + 120
        while not (tree.output.parent / "begun").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=120)
    assert process.returncode == 130, out + error
    assert "interrupted in cell end-01" in error and "never retrieved" not in error
    assert out.splitlines()[-1].endswith("nb_executed.html")
    assert (tree.output.parent / "tidied").exists()
    assert code_cells(executed(tree))[0].execution_count == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "EPOCHS"], "is not NAME=VALUE"),
        (["--set", "EPOCHS=0"], "EPOCHS=0 must be a whole number from 1"),
        (["--cwd", "/nonexistent"], "is not a folder"),
        (["--kernel", "no-such-kernel"], "knows no kernel 'no-such-kernel'"),
        (["--results", "/dev/null/x"], "--results: "),
    ],
)
def test_what_cannot_run_is_said(
    tree: Tree, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    results = ["--results", str(tree.root / "results")]
    assert tree.main("--execute", *results, *arguments) == 1
    assert message in capsys.readouterr().err


def test_set_needs_a_cell_to_go_to(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    tree.write("sections/00_start.py", SECTIONS["00_start"].replace(' tags=["parameters"]', ""))
    assert tree.main("--execute", "--set", "EPOCHS=2") == 1
    assert "no cell is tagged 'parameters'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--set", "EPOCHS=1"],
        ["--check", "--timeout", "3"],
        ["--check", "--execute"],
        ["--results", "x"],
    ],
)
def test_options_that_do_not_go_together(tree: Tree, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        tree.main(*arguments)
    assert caught.value.code == 2


def test_a_place_that_cannot_be_written_is_said(
    tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--output", "/dev/null/nb.ipynb", "--all"]
    assert complete_notebook.main(arguments, STAGES, tree.project) == 1
    assert capsys.readouterr().err.startswith("error: ")


# --- the page -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    tree = Tree(tmp_path_factory.mktemp("page") / "tree")
    tree.section(
        r"""
        # %% [markdown]
        # ## How `loss` works & why
        #
        # With $q_a < 1$ it costs
        #
        # $$\sum_a w_a H(q_a, p)$$
        #
        # and `$not_a_formula$` nothing; $\frac{$ is broken.
        #
        # ### In numbers
        #
        # \begin{align}a &= b\\c &= d\end{align}

        # %%
        from emotion_toolbox.areas import area

        print("x" * area(3))
        """
    )
    notebook = tree.build()
    notebook.cells[-1].outputs = [nbformat.v4.new_output("stream", text="x" * 300)]
    return make_page(notebook, "A title")


def test_the_page_has_contents_that_lead_somewhere(page: str) -> None:
    soup = bs4.BeautifulSoup(page, "html.parser")
    assert soup.title is not None and soup.title.text == "A title"
    (contents,) = soup.select("nav.contents")
    links = contents.select("a")
    assert [(link["class"], link.text.strip()) for link in links] == [
        (["level2"], "Toolbox"),
        (["level2"], "Settings come first"),
        (["level3"], "Settings"),
        (["level2"], "Data"),
        (["level3"], "Data"),
        (["level2"], "Model"),
        (["level2"], "How loss works & why"),
        (["level3"], "In numbers"),
    ]
    for link in links:
        assert soup.select(f'[id="{str(link["href"])[1:]}"]'), link


def test_the_page_draws_formulas_itself_and_needs_no_network(page: str) -> None:
    soup = bs4.BeautifulSoup(page, "html.parser")
    displays = [math["display"] for math in soup.select("math")]
    assert displays == ["inline", "block", "block"]
    assert [node.text for node in soup.select("math")[0].select("mi")] == ["q", "a"]
    assert len(soup.select("math munder, math msub, math mtable")) >= 4
    assert soup.find("code", string="$not_a_formula$") is not None
    assert soup.find("code", string=r"\frac{") is not None
    sources = [str(tag.get("src") or tag.get("href")) for tag in soup.select("[src], link[href]")]
    assert [source for source in sources if not source.startswith("data:")] == []
    assert not soup.select("script") and "@import" not in page


def test_the_page_folds_the_toolbox_and_wraps_long_lines(page: str) -> None:
    soup = bs4.BeautifulSoup(page, "html.parser")
    folded = soup.select("details.toolbox")
    lines = [len(textwrap.dedent(TOOLBOX[n]).strip().split("\n")) for n in ("sizes", "areas")]
    titles = [details.summary.text for details in folded if details.summary]
    assert re.fullmatch(r"%%toolbox, \d+ lines", titles[0])  # the cell that defines it
    assert titles[1:] == [
        f"emotion_toolbox/sizes.py, {lines[0]} lines",
        f"emotion_toolbox/areas.py, {lines[1]} lines",
    ]
    assert not any(details.has_attr("open") for details in folded)
    assert "class Size" in folded[1].text and "class Size" not in soup.find_all("pre")[-1].text
    assert re.search(r"pre[^{]*\{[^}]*white-space: pre-wrap", page)
    assert "@media print" in page


# --- the notebook itself ------------------------------------------------------------------------

# Settings with which the real notebook runs in minutes on a small machine.
TINY = {
    "DATASET": "sample",
    "MODEL_NAME": "efficientnet_lite0",
    "EPOCHS": 2,
    "IMG_SIZE": 64,
    "BATCH_SIZE": 16,
    "WARMUP_EPOCHS": 1,
    "BOOTSTRAP": 100,
    "BASELINES": ("majority",),
}


@pytest.fixture(scope="module")
def notebook() -> nbformat.NotebookNode:
    return build(complete_notebook.STAGES)


def test_the_committed_notebook_is_what_the_sources_give(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status = complete_notebook.main(["--check"])
    assert status == 0, capsys.readouterr().err


def test_ruff_finds_no_fault_in_the_notebook(
    notebook: nbformat.NotebookNode, tmp_path: Path
) -> None:
    path = tmp_path / "notebook.ipynb"
    path.write_text(nbb.notebook_text(notebook))
    ruff(path, "check", "--select", "F")
    script = tmp_path / "notebook.py"
    script.write_text(flat_script(notebook))
    ruff(script, "check", "--select", "F")


@pytest.mark.slow
def test_mypy_finds_no_fault_in_the_notebook(
    notebook: nbformat.NotebookNode, tmp_path: Path
) -> None:
    script = tmp_path / "notebook.py"
    script.write_text(flat_script(notebook))
    command = [sys.executable, "-m", "mypy", "--strict", "--allow-untyped-calls", str(script)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def code_lines(cell: nbformat.NotebookNode) -> int:
    """Lines of a cell that are neither blank nor comment nor docstring."""
    tree = ast.parse(flat_script(nbb.as_node({"cells": [cell]})))
    docstrings = {
        number
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node)
        for number in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    lines = enumerate(flat_script(nbb.as_node({"cells": [cell]})).split("\n"), start=1)
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in docstrings
        for number, line in lines
    )


def test_the_notebook_keeps_its_budgets(notebook: nbformat.NotebookNode) -> None:
    over = {name: both for name, both in nbb.budgets(notebook).items() if both[0] > both[1]}
    assert over == {}


def test_the_fold_ends_where_the_toolbox_does(notebook: nbformat.NotebookNode) -> None:
    """JupyterLab hides what follows a folded heading, up to the next of its level or above."""
    folded = [
        i for i, c in enumerate(notebook.cells) if "jp-MarkdownHeadingCollapsed" in c.metadata
    ]
    assert len(folded) == 1 and notebook.cells[folded[0]].source.startswith("## Toolbox\n")
    for cell in notebook.cells[folded[0] + 1 :]:
        if cell.cell_type == "markdown" and re.match("##? ", cell.source):
            break
        assert {*cell.metadata.get("tags", [])} & {"toolbox", "magic"}, cell.id


def test_the_notebook_has_its_rhythm(notebook: nbformat.NotebookNode) -> None:
    story = [cell for cell in notebook.cells if not nbb.is_toolbox(cell)]
    kinds = [cell.cell_type for cell in story]
    lengths = [code_lines(cell) for cell in story if cell.cell_type == "code"]
    after_prose = sum(pair == ("markdown", "code") for pair in itertools.pairwise(kinds))
    assert kinds[0] == "markdown"
    assert statistics.median(lengths) <= 12
    assert after_prose >= 0.8 * len(lengths)


def test_the_notebook_takes_settings_and_carries_its_packages(
    notebook: nbformat.NotebookNode,
) -> None:
    tags = [tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])]
    assert tags.count("parameters") == tags.count("install") == tags.count("magic") == 1
    carried = {cell.id.removeprefix("toolbox-") for cell in notebook.cells if nbb.is_toolbox(cell)}
    nodes = [*ast.walk(ast.parse(flat_script(notebook)))]
    imported = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    imported |= {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    assert not any(name.startswith("emotion_transfer") for name in imported)
    wanted = {name.partition(".")[2] for name in imported if name.startswith("emotion_toolbox")}
    assert wanted and wanted <= carried


def test_the_install_cell_asks_for_what_the_notebook_needs(
    notebook: nbformat.NotebookNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell,) = (c for c in notebook.cells if "install" in c.metadata.get("tags", []))
    commands: list[tuple[str, str]] = []

    class Shell:
        def run_line_magic(self, *command: str) -> None:
            commands.append(command)

    monkeypatch.setattr("IPython.get_ipython", Shell)
    exec(cell.source, {})
    ((magic, line),) = commands
    wanted = shlex.split(line)
    assert (magic, wanted[0]) == ("pip", "install")
    asked = {word for word in wanted[1:] if not word.startswith("-")}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    builds = {
        "nbformat",
        "nbclient",
        "nbconvert",
        "latex2mathml",
        "jupytext",
        "jupyter",
    }
    needed = {line for line in lines if line and line[0] != "#"}
    assert asked == {line for line in needed if line.partition(">=")[0] not in builds}
    there = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", *asked]
    result = subprocess.run(there, capture_output=True, text=True)  # all there: nothing is fetched
    assert result.returncode == 0 and "Would install" not in result.stdout, result.stderr


@pytest.mark.slow
def test_papermill_gives_settings(
    notebook: nbformat.NotebookNode, tiny_root: Path, tmp_path: Path
) -> None:
    """`papermill notebook.ipynb out.ipynb -p EPOCHS 1 -p DATA_ROOT DIR`, as far as the data."""
    pytest.importorskip("papermill")
    begun = copy.deepcopy(notebook)
    last = next(i for i, cell in enumerate(begun.cells) if "listed = load_data(" in cell.source)
    told = "print('told', cfg.EPOCHS, cfg.DATASET, listed.root.name)"
    begun.cells[last + 1 :] = [nbformat.v4.new_code_cell(told, id="told")]
    nbformat.write(begun, tmp_path / "in.ipynb")
    given = {"EPOCHS": "1", "DATA_ROOT": str(tiny_root), "MODEL_NAME": "efficientnet_lite0"}
    flags = [part for name, value in given.items() for part in ("-p", name, value)]
    command = [sys.executable, "-m", "papermill", "in.ipynb", "out.ipynb", "-k", "python3", *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    executed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    assert text_of(executed.cells[-1]) == f"told 1 files {tiny_root.name}\n"


@pytest.mark.slow
def test_the_notebook_runs_alone(
    notebook: nbformat.NotebookNode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In an empty folder; the installed packages are out of reach, and nothing else is written."""
    alone = copy.deepcopy(notebook)
    hide = f"""
        import importlib.machinery
        import sys

        class Hidden:
            def find_spec(name, path=None, target=None):
                spec = importlib.machinery.PathFinder.find_spec(name, path)
                if spec and str(spec.origin).startswith({str(ROOT / "emotion")!r}):
                    raise ModuleNotFoundError(name)

        sys.meta_path = [
            Hidden, *(finder for finder in sys.meta_path if "editable" not in str(finder))
        ]
    """
    alone.cells.insert(0, nbformat.v4.new_code_cell(textwrap.dedent(hide), id="hide"))
    told = "import emotion_toolbox\n\nprint(emotion_toolbox.__file__)"
    alone.cells.append(nbformat.v4.new_code_cell(told, id="told"))
    inject_overrides(alone, TINY)
    empty, results = tmp_path / "empty", tmp_path / "results"
    empty.mkdir()
    status = run_notebook(alone, "nb", cwd=empty, fallback=tmp_path / "none", results=results)
    assert status == 0, capsys.readouterr().err
    counts = [cell.execution_count for cell in code_cells(alone)]
    assert counts == list(range(1, len(counts) + 1))
    assert not Path(text_of(alone.cells[-1]).strip()).is_relative_to(ROOT)
    assert not (tmp_path / "none").exists()
    assert (results / "nb_executed.html").is_file()
    assert {path.name for path in empty.iterdir()} <= {"outputs", "cache", "data"}
