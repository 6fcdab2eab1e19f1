"""The notebook's assembly: what it makes of sources, what it refuses, and how it is run."""

import ast
import copy
import importlib.metadata
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import complete_notebook  # noqa: E402
import create_enhanced_notebook  # noqa: E402
import extend_notebook  # noqa: E402
import notebook_builder as nbb  # noqa: E402
from notebook_builder import Project, Stage, build, flat_script, format_imports  # noqa: E402
from notebook_sources import BuildError, Import  # noqa: E402

STAGES = (
    Stage("create", "create_enhanced_notebook.py", ("00_start", "01_data"), "First imports."),
    Stage("extend", "extend_notebook.py", ("02_model",), "More imports."),
    Stage("complete", "complete_notebook.py", ("03_end",), "Last imports."),
)

MODULES = {
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
        import numpy as np

        from pkg.config import Config

        SCALE = 3


        def load(cfg: Config) -> np.ndarray:
            return np.full(cfg.SIZE, SCALE)
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
    "00_start": """
        # %% [markdown]
        # # A small notebook

        # %% tags=["install"]
        import importlib.util
        import sys

        assert importlib.util.find_spec("json"), sys.executable

        # %% [markdown]
        # Settings come first.

        # %%
        from pkg.config import Config, here

        # %% tags=["parameters"]
        OVERRIDES: dict[str, object] = {}
    """,
    "01_data": """
        # %% [markdown]
        # # Data

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
        # # Model

        # %%
        import numpy as np

        from pkg.data import SCALE

        # %%
        values = values + np.ones(2) * SCALE
    """,
    "03_end": """
        # %% [markdown]
        # # End

        # %%
        from collections import Counter, defaultdict
        from pkg.plots.curve import curve

        # %% [markdown]
        # Draw.

        # %%
        print(curve(), Counter(), defaultdict(int), here())
    """,
}


class Tree:
    """A small project in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.project = Project(root / "pkg", root / "sections")
        self.output = root / "work" / "nb.ipynb"
        self.output.parent.mkdir(parents=True)
        self.write("pkg/__init__.py", "")
        for name, text in MODULES.items():
            self.write(f"pkg/{name}.py", text)
        for name, text in SECTIONS.items():
            self.write(f"sections/{name}.py", text)

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip("\n"))

    def section(self, text: str, name: str = "03_end") -> None:
        self.write(f"sections/{name}.py", text)

    def build(self, upto: int = 3) -> nbformat.NotebookNode:
        return build(STAGES[:upto], self.project)

    def sources(self, upto: int = 3) -> list[str]:
        return [cell.source for cell in self.build(upto).cells]

    def stage(self, number: int) -> int:
        return nbb.run_stage(STAGES[:number], self.output, self.project)

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
        ("start-03", "First imports."),
        ("start-04", "import math"),
        ("start-05", "Settings come first."),
        ("start-06", "### Settings"),
        ("start-07", "@dataclass"),
        ("start-08", "Where things are."),
        ("start-09", "def here() -> str:"),
        ("start-10", "OVERRIDES: dict[str, object] = {}"),
        ("data-01", "# Data"),
        ("data-02", "### Data"),
        ("data-03", "SCALE = 3"),
        ("data-04", "%matplotlib inline"),
        ("model-01", "# Model"),
        ("model-02", "values = values + np.ones(2) * SCALE"),
        ("end-01", "# End"),
        ("end-02", "Last imports."),
        ("end-03", "from collections import Counter, OrderedDict, defaultdict"),
        ("end-04", "def curve() -> list[int]:"),
        ("end-05", "Draw."),
        ("end-06", "print(curve(), Counter(), defaultdict(int), here())"),
    ]


def test_the_imports_of_a_stage_stand_together_each_once(tree: Tree) -> None:
    cells = {cell.id: cell.source for cell in tree.build().cells}
    assert cells["start-04"] == textwrap.dedent(
        """\
        import math
        import os
        import sys
        from dataclasses import dataclass
        from pathlib import Path

        import numpy as np"""
    )
    everything = "\n".join(source for name, source in cells.items() if name != "start-02")
    assert "pkg" not in everything
    lines = [line for line in everything.split("\n") if re.match("(import|from) ", line)]
    assert len(lines) == len(set(lines))


def test_a_later_stage_imports_only_what_is_new(tree: Tree) -> None:
    tree.section("# %%\nfrom dataclasses import dataclass, field\nfield, dataclass\n", "02_model")
    cells = {cell.id: cell.source for cell in tree.build(2).cells}
    assert cells["model-01"] == "More imports."
    assert cells["model-02"] == "from dataclasses import field"


def test_a_stage_without_new_imports_has_no_import_cell(tree: Tree) -> None:
    assert "More imports." not in tree.sources(2)


def test_without_an_install_cell_imports_follow_the_leading_prose(tree: Tree) -> None:
    tree.section(
        "# %% [markdown]\n# # A\n\n# %% [markdown]\n# B\n\n# %%\nimport os\n\nos\n", "00_start"
    )
    tree.section("# %%\n1 + 1\n", "01_data")
    assert tree.sources(1) == ["# A", "B", "First imports.", "import os", "os", "1 + 1"]


def test_a_module_stands_before_a_cell_that_has_other_code(tree: Tree) -> None:
    sources = tree.sources(1)
    run = next(i for i, source in enumerate(sources) if "values = load" in source)
    assert sources[run - 1].startswith("SCALE = 3")
    assert sources[run] == textwrap.dedent(
        """\
        %matplotlib inline

        values = load(Config())
        run_dir = Path("results") / "a-run"
        print(values.tolist(), OVERRIDES, sys.executable)"""
    )


def test_modules_imported_in_one_cell_come_in_the_order_they_need(tree: Tree) -> None:
    tree.section("# %%\nfrom pkg.data import load\nfrom pkg.config import Config\n", "00_start")
    tree.section("# %%\nload\n", "01_data")
    sources = tree.sources(1)
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


def test_a_magic_beside_imports_survives_them(tree: Tree) -> None:
    tree.section("# %%\n# %load_ext autoreload\nimport json\n")
    assert tree.sources()[-2:] == ["import json", "%load_ext autoreload"]


def test_a_cell_of_imports_and_comments_vanishes(tree: Tree) -> None:
    tree.section("# %%\n# for the lines\nfrom pkg.data import load  # noqa: F401\n\n# %%\nload\n")
    assert tree.sources()[-1] == "load"
    assert not any("for the lines" in source for source in tree.sources())


def test_gaps_that_imports_leave_are_closed(tree: Tree) -> None:
    tree.section("# %%\na = '''\n\n\n\n'''\n\n\nimport json\n\n\n\nb = json\n\n\n\n\nc = 2\n\n\n")
    assert tree.sources()[-1] == "a = '''\n\n\n\n'''\n\n\n\nb = json\n\n\n\n\nc = 2"


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
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.language_info == {"name": "python"}
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"stage", "tags"}
        assert cell.source == cell.source.strip("\n") != ""
        if cell.cell_type == "code":
            assert cell.execution_count is None and cell.outputs == []
    assert [c.metadata.tags for c in notebook.cells if "tags" in c.metadata] == [
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


def test_flat_script_is_clean(tree: Tree) -> None:
    path = tree.root / "flat.py"
    path.write_text(flat_script(tree.build()))
    ruff(path, "check", "--select", "F")
    assert "# %% data-04" in path.read_text()


# --- imports as ruff has them -------------------------------------------------------------------


def ruff(path: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "ruff", *arguments, "--isolated", "--line-length", "100"]
    result = subprocess.run([*command, str(path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_imports_are_sorted_and_wrapped_as_ruff_does(tmp_path: Path) -> None:
    rng = random.Random(0)
    modules = ["os", "sys", "json", "torch", "torch.nn", "PIL", "a_b", "a1", "a10", "a2", "Zed"]
    modules += ["collections.abc", "concurrent.futures", "numpy"]
    names = ["alpha", "Beta", "GAMMA", "_d", "x1", "x10", "x2", "X", "Abc", "ABC", "aBC", "nn"]
    names += ["F", "conv2d", "Conv2D", "T_MAX", "lr_1", "LR_1", "x01", "_E"]
    for number in range(20):
        items = [Import(rng.choice(modules), rng.choice(names)) for _ in range(rng.randint(1, 60))]
        items += [Import(m) for m in rng.sample(modules, 5)]
        items += [Import("matplotlib.pyplot", None, "plt"), Import("numpy", None, "np")]
        items += [Import("torch", "nn", "tnn"), Import("torch", "Tensor", "A")]
        items += [
            Import("torch.optim.swa_utils", f"a_name_of_some_length_{i}") for i in range(number)
        ]
        rng.shuffle(items)
        path = tmp_path / f"imports_{number}.py"
        path.write_text(format_imports(items) + "\n")
    ruff(tmp_path, "check", "--select", "I")
    ruff(tmp_path, "format", "--check")


def test_imports_of_nothing_are_nothing() -> None:
    assert format_imports([]) == ""


# --- what is refused ----------------------------------------------------------------------------


def refusal(tree: Tree, upto: int = 3) -> str:
    with pytest.raises(BuildError) as caught:
        tree.build(upto)
    return str(caught.value)


SECTION_REFUSALS = [
    ("import pkg.data\n", "03_end.py:3.*module object.*from pkg.MODULE import NAME"),
    ("import pkg\n", "module object"),
    ("import pkg.data as d\n", "module object"),
    ("from pkg import data\n", "03_end.py:3.*module object"),
    ("from pkg.plots import curve\n", "03_end.py:3: pkg.plots does not define `curve`"),
    ("from pkg.data import nothing\n", "03_end.py:3: pkg.data does not define `nothing`"),
    ("from pkg.data import laod\n", "did you mean `load`"),
    ("from pkg.data import Config\n", "it imports it"),
    ("from pkg.data import load as l\n", "only as `load`"),
    ("from pkg.none import x\n", r"03_end.py:3: there is no pkg.none \(pkg/none.py\)"),
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
    message = refusal(tree, 1)
    assert re.search(r"pkg/data.py:9: pkg.data imports from pkg.config", message)
    assert "sections/00_start.py:2 asks for pkg.data" in message
    assert "`from pkg.config import Config` in a section before" in message


def test_modules_that_need_each_other_are_refused(tree: Tree) -> None:
    tree.write("pkg/one.py", "from pkg.two import B\nA = 1\n")
    tree.write("pkg/two.py", "from pkg.one import A\nB = 1\n")
    tree.section("# %%\nfrom pkg.one import A\nfrom pkg.two import B\n")
    assert "pkg.one imports from pkg.two" in refusal(tree)


def test_all_problems_are_told_at_once(tree: Tree) -> None:
    tree.section("# %%\nprint(__file__)\n\n# %%\nfrom math import *\n")
    assert len(refusal(tree).splitlines()) == 2


def test_sections_need_names_of_their_own(tree: Tree) -> None:
    for names in (("start",), ("00_start", "01_start"), ("00_Start",), ("00-start",)):
        with pytest.raises(BuildError, match="NN_name"):
            build([Stage("create", "c.py", names, "")], tree.project)


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
    elif change == "removed":
        return str(cells.pop(1)["id"])
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
    assert cell in error and "create_enhanced_notebook.py" in error
    assert tree.output.read_bytes() == before


def test_stale_sources_of_an_earlier_stage_are_refused(
    tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    tree.stage(1)
    tree.write("pkg/data.py", MODULES["data"].replace("SCALE = 3", "SCALE = 4"))
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


def test_the_scripts_know_their_stages(tmp_path: Path) -> None:
    names = ["create", "extend", "complete"]
    assert [stage.name for stage in complete_notebook.STAGES] == names
    sections = [s for stage in complete_notebook.STAGES for s in stage.sections]
    assert [s[:2] for s in sections] == [f"{i:02d}" for i in range(13)]
    for stage in complete_notebook.STAGES:
        assert (ROOT / stage.script).is_file()


def test_the_scripts_write_their_stage(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(create_enhanced_notebook, "CREATE", STAGES[0])
    monkeypatch.setattr(extend_notebook, "CREATE", STAGES[0])
    monkeypatch.setattr(extend_notebook, "EXTEND", STAGES[1])
    arguments = ["--output", str(tree.output)]
    assert extend_notebook.main(arguments, tree.project) == 1
    assert create_enhanced_notebook.main(arguments, tree.project) == 0
    assert extend_notebook.main(arguments, tree.project) == 0
    assert stages_in(tree.output) == ["create", "extend"]


def test_bytes_do_not_depend_on_hash_order(tree: Tree) -> None:
    code = f"""
        import sys
        from pathlib import Path
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        import notebook_builder as b
        from test_builder import STAGES
        root = Path({str(tree.root)!r})
        project = b.Project(root / "pkg", root / "sections")
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
        ("swapped", "cell"),
        ("tags", "cell {} has other tags"),
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
    capsys: pytest.CaptureFixture[str],
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
        """
    )
    assert tree.main("--all", "--execute", "--set", "EPOCHS=3", "BETAS=1") == 1
    assert "no setting is called 'BETAS'" in capsys.readouterr().err
    assert not tree.output.exists()

    assert tree.main("--all", "--execute", "--set", "EPOCHS=3", "--set", "SEED=7") == 0
    notebook = executed(tree)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    out = capsys.readouterr().out.splitlines()
    assert f"ran {len(cells)} of {len(cells)} code cells" in out[-3]
    assert [Path(line) for line in out[-2:]] == [
        tree.root / "work" / "results" / "a-run" / f"nb_executed{suffix}"
        for suffix in (".ipynb", ".html")
    ]

    by_id = {cell.id: cell for cell in notebook.cells}
    injected = by_id["injected-parameters"]
    assert injected.metadata.tags == ["injected-parameters"]
    assert injected.source.startswith('OVERRIDES = {\n    **OVERRIDES,\n    "EPOCHS": 3,\n')
    assert notebook.cells[notebook.cells.index(injected) - 1].metadata.tags == ["parameters"]
    shown = text_of(by_id["data-04"])
    assert "[3, 3] {'EPOCHS': 3, 'SEED': 7}" in shown and sys.executable in shown

    assert "epochs <b>: 100% |████████████████████| 2/2 [" in text_of(cells[-1])
    page = (tree.root / "work" / "results" / "a-run" / "nb_executed.html").read_text()
    assert "data:image/png;base64," in page and "epochs &lt;b&gt;: 100% |█" in page
    assert not any("hidden bar" in text_of(cell) for cell in cells)
    assert "widget-view" not in page and "widgets" not in notebook.metadata
    assert not code_cells(nbformat.read(tree.output, as_version=4))[0].outputs  # the built one


def test_a_failing_cell_is_shown_and_the_rest_kept(
    tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    tree.section(
        "# %%\nprint('so far')\n\n# %%\nraise ValueError('no such luck')\n\n# %%\nprint(1)\n"
    )
    assert tree.main("--all", "--execute", "--results", tree.root / "kept") == 1
    said = capsys.readouterr()
    assert "cell end-02 failed" in said.err and "    raise ValueError('no such luck')" in said.err
    assert "ValueError: no such luck" in said.err and "\x1b" not in said.err
    assert said.out.splitlines()[-1] == str(tree.root / "kept" / "nb_executed.html")
    cells = code_cells(executed(tree, "kept"))
    assert text_of(cells[-3]) == "so far\n"
    assert cells[-2].outputs[-1].ename == "ValueError"
    assert cells[-1].execution_count is None


def test_memory_that_runs_out_gets_a_hint(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    tree.section("# %%\nraise RuntimeError('CUDA out of memory. Tried')\n")
    assert tree.main("--all", "--execute") == 1
    assert "lower BATCH_SIZE" in capsys.readouterr().err
    executed(tree)  # beside the run's results, which the kernel could still name


def test_a_cell_that_takes_too_long_is_stopped(
    tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in SECTIONS:  # none that a busy machine could be slow at
        tree.section("# %%\nx = 1\n", name)
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
    assert tree.main("--all", "--execute", "--timeout", 4, "--results", tree.root / "kept") == 1
    error = capsys.readouterr().err
    assert "cell end-03 failed" in error and "did not end in time" in error and "--timeout" in error
    assert text_of(code_cells(executed(tree, "kept"))[-1]).startswith("begun\ntidied\n")


def test_a_kernel_that_dies_is_noticed(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    tree.section("# %%\nimport os\n\n# %%\nos._exit(9)\n")
    assert tree.main("--all", "--execute") == 1
    error = capsys.readouterr().err
    assert "cell end-01 failed" in error and "os._exit(9)" in error
    assert "kernel died" in error and "lower BATCH_SIZE" in error
    assert code_cells(executed(tree))[-2].execution_count


def test_a_run_without_a_folder_goes_to_outputs(tree: Tree) -> None:
    for name in SECTIONS:
        tree.section("# %%\nx = 1\n", name)
    elsewhere = tree.root / "elsewhere"
    elsewhere.mkdir()
    assert tree.main("--all", "--execute", "--cwd", elsewhere, "--timeout", -1) == 0
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
        project = b.Project(root / "pkg", root / "sections")
        argv = ["--output", {str(tree.output)!r}, "--all", "--execute"]
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
    assert "interrupted in cell end-03" in error and "never retrieved" not in error
    assert out.splitlines()[-1].endswith("nb_executed.html")
    assert (tree.output.parent / "tidied").exists()
    assert code_cells(executed(tree))[0].execution_count == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "EPOCHS"], "is not NAME=VALUE"),
        (["--set", "EPOCHS=0"], "EPOCHS=0 must lie between"),
        (["--cwd", "/nonexistent"], "is not a folder"),
        (["--kernel", "no-such-kernel"], "knows no kernel 'no-such-kernel'"),
        (["--results", "/dev/null/x"], "--results: "),
    ],
)
def test_what_cannot_run_is_said(
    tree: Tree, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    results = ["--results", str(tree.root / "results")]
    assert tree.main("--all", "--execute", *results, *arguments) == 1
    assert message in capsys.readouterr().err


def test_set_needs_a_cell_to_go_to(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    tree.write("sections/00_start.py", SECTIONS["00_start"].replace(' tags=["parameters"]', ""))
    assert tree.main("--all", "--execute", "--set", "EPOCHS=2") == 1
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


def test_execute_needs_the_earlier_stages(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    assert tree.main("--execute") == 1
    assert "create_enhanced_notebook.py" in capsys.readouterr().err


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


def test_the_notebook_has_its_rhythm(notebook: nbformat.NotebookNode) -> None:
    kinds = [cell.cell_type for cell in notebook.cells]
    lengths = [code_lines(cell) for cell in code_cells(notebook)]
    after_prose = sum(pair == ("markdown", "code") for pair in itertools.pairwise(kinds))
    assert kinds[0] == "markdown"
    assert statistics.median(lengths) <= 15
    assert max(lengths) <= 65
    assert kinds.count("markdown") >= 0.7 * len(lengths)
    assert after_prose >= 0.65 * len(lengths)


def test_the_notebook_takes_settings_and_needs_no_package(notebook: nbformat.NotebookNode) -> None:
    tags = [tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])]
    assert tags.count("parameters") == 1
    assert tags.count("install") == 1
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(flat_script(notebook)))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert "emotion_transfer" not in imported


def test_the_install_cell_asks_for_what_is_missing_or_too_old(
    notebook: nbformat.NotebookNode,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (cell,) = (c for c in notebook.cells if "install" in c.metadata.get("tags", []))
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: calls.append(command))
    space: dict[str, object] = {}
    exec(cell.source, space)
    assert calls == [] and "nothing to install" in capsys.readouterr().out
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    builds = {"nbformat", "nbclient", "nbconvert", "jupytext", "jupyter", "ipywidgets"}
    wanted = {line for line in lines if line and line[0] != "#"}
    assert set(space["REQUIRED"]) == {r for r in wanted if r.partition(">=")[0] not in builds}

    def version(name: str) -> str:
        if name == "captum":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"timm": "0.9.16", "torch": "2.12.0.dev20260101+cu130"}.get(name, original(name))

    original = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", version)
    exec(cell.source, {})
    assert [command[-2:] for command in calls] == [["timm>=1.0.9", "captum>=0.8"]]
    assert calls[0][1:4] == ["-m", "pip", "install"]


@pytest.mark.slow
def test_the_notebook_runs_alone(
    notebook: nbformat.NotebookNode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from notebook_runner import inject_overrides, run_notebook

    alone = copy.deepcopy(notebook)
    hide = nbformat.v4.new_code_cell(
        'import sys\n\nsys.modules["emotion_transfer"] = None', id="hide"
    )
    alone.cells.insert(0, hide)
    inject_overrides(alone, TINY)
    empty, results = tmp_path / "empty", tmp_path / "results"
    empty.mkdir()
    status = run_notebook(alone, "nb", cwd=empty, fallback=tmp_path / "none", results=results)
    assert status == 0, capsys.readouterr().err
    counts = [cell.execution_count for cell in code_cells(alone)]
    assert counts == list(range(1, len(counts) + 1))
    assert not (tmp_path / "none").exists()
    assert (results / "nb_executed.html").is_file()
    written = {path.relative_to(empty).parts[0] for path in empty.rglob("*")}
    assert "outputs" in written
