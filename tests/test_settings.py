"""Settings as a class declares them: checked, compared, written down; on a class of its own."""

import ast
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jupytext
import pytest

from emotion_toolbox.errors import ConfigError
from emotion_toolbox.settings import (
    changed_settings,
    check_values,
    forget,
    make_settings,
    neutral,
    setting,
    settings_among,
    settings_hash,
    settings_to_json,
    shaping_values,
)
from emotion_transfer.commands.settings import parse_setting, settings_table

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Tea:
    """Settings of another subject: the module must know none by name."""

    LEAF: str = setting("green", "what is brewed", choices=("green", "black"))
    MINUTES: float = setting(3.0, "how long", low=0.5, high=10)
    CUPS: int | None = setting(None, "None: enough", low=1, high=12)
    WATER: tuple[float, float] = setting((70.0, 80.0), "degrees", low=0, high=100)
    ADDED: tuple[str, ...] = setting((), "into the cup", choices=("milk", "lemon"))
    ICED: bool = setting(False, "cold?")
    NAME: str = neutral("auto", "of the pot", plain_name=True)
    NOTE: str | None = neutral(None, "for the guests")

    def __post_init__(self) -> None:
        check_values(self)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("LEAF", "herbal", 'one of "green", "black"'),
        ("LEAF", None, 'one of "green", "black"'),
        ("MINUTES", 0.4, "a number from 0.5 to 10"),
        ("MINUTES", float("nan"), "a number from 0.5 to 10"),
        ("MINUTES", True, "a number from 0.5 to 10"),
        ("CUPS", 1.5, "a whole number from 1 to 12, or None"),
        ("WATER", (80, 70), "a list of 2, never falling, each a number from 0 to 100"),
        ("WATER", (80.0,), "a list of 2, never falling, each a number from 0 to 100"),
        ("WATER", None, "a list of 2, never falling, each a number from 0 to 100"),
        ("ADDED", "milk", 'a list, each one of "milk", "lemon"'),
        ("ADDED", ["milk", "mud"], 'a list, each one of "milk", "lemon"'),
        ("ICED", 1, "True or False"),
        ("NAME", "a/b", "a plain folder name"),
        ("NAME", "..", "a plain folder name"),
        ("NOTE", " ", "a text, not blank, or None"),
    ],
)
def test_what_is_refused_and_how_it_is_said(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_settings(Tea, {name: value})
    shown = value if not isinstance(value, list) else tuple(value)
    assert str(caught.value).startswith(f"impossible settings:\n  {name}=")
    assert str(caught.value).endswith(f" must be {allowed}") and repr(shown)[:3] in str(
        caught.value
    )


def test_a_value_of_any_length_gives_a_message_of_some_lines() -> None:
    with pytest.raises(ConfigError) as caught:
        make_settings(Tea, {"LEAF": "x" * 100_000})
    assert len(str(caught.value)) < 400


def test_equal_settings_are_equal_however_they_are_written() -> None:
    one = make_settings(Tea, {"MINUTES": 4, "WATER": [70, 80], "ADDED": ["milk"]})
    other = make_settings(Tea, {"MINUTES": 4.0, "WATER": (70.0, 80.0), "ADDED": ("milk",)})
    assert one == other and settings_hash(one) == settings_hash(other)
    assert [type(v) for v in (one.MINUTES, *one.WATER)] == [float] * 3


@pytest.mark.parametrize("given", [[1], [], "MINUTES=3", {"MINUTES"}, 3, ("MINUTES", 3)])
def test_overrides_that_are_no_dictionary(given: Any) -> None:
    for refuse in (lambda: make_settings(Tea, given), lambda: settings_among(Tea, {}, given)):
        with pytest.raises(ConfigError, match="OVERRIDES must be {"):
            refuse()


def test_overrides_win_over_a_profile() -> None:
    tea = make_settings(Tea, {"CUPS": 2}, {"CUPS": 3, "MINUTES": 5})
    assert (tea.CUPS, tea.MINUTES, tea.LEAF) == (2, 5.0, "green")
    assert make_settings(Tea) == make_settings(Tea, None, {}) == Tea()


def test_variables_called_like_settings(capsys: pytest.CaptureFixture[str]) -> None:
    """papermill -p CUPS 4 makes a variable beside OVERRIDES; it is taken, and that is said."""
    names = {"CUPS": 4, "SUGAR": 2, "sugar": 1, "OVERRIDES": {}, "Tea": Tea}
    assert settings_among(Tea, names) == {"CUPS": 4}
    assert settings_among(Tea, names, {"CUPS": 9, "ICED": True}) == {"CUPS": 4, "ICED": True}
    assert capsys.readouterr().out == "taken from variables: CUPS = 4\n" * 2
    assert settings_among(Tea, {"cups": Tea}, {"ICED": True}) == {"ICED": True}
    assert capsys.readouterr().out == ""
    with pytest.raises(ConfigError, match=r'cups = 3 .*OVERRIDES = {"CUPS": 3}'):
        settings_among(Tea, {"cups": 3})


def test_no_other_variable_of_the_notebook_is_called_like_a_setting() -> None:
    """Else it would be taken for one when the cell is run again."""
    from emotion_transfer.config import EnhancedConfig

    names = {f.name for f in fields(EnhancedConfig)}
    files = [*(ROOT / "emotion_transfer").glob("*.py"), *ROOT.glob("notebooks/sections/*.py")]
    assert files
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        inside = {id(n) for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for n in ast.walk(c)}
        stored = {
            node.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            if id(node) not in inside
        }
        assert not stored & names, file
        if file.parent.name == "sections":  # these two hold neither numbers nor texts
            alike = {name.upper() for name in stored} & names
            assert alike <= {"DEVICE", "BASELINES"}, file


def run_settings_section(names: dict[str, Any], beside: str) -> None:
    """Run the notebook's settings cells on the variables `names`, with a cell after the parameters.

    That is where papermill puts what it is given.
    """
    section = jupytext.read(ROOT / "notebooks/sections/02_settings.py")
    for cell in (cell for cell in section.cells if cell.cell_type == "code"):
        exec(cell.source, names)
        if "parameters" in cell.metadata.get("tags", ()):
            exec(beside, names)


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        ("EPOCHS = 1", (1, 42, "auto")),
        ("EPOCHS = 1\nDATA_ROOT = 'some/folder'", (1, 42, "files")),
        ("OVERRIDES = {'EPOCHS': 5, 'SEED': 3}; EPOCHS = 2", (2, 3, "auto")),
    ],
)
def test_parameters_of_papermill_reach_the_configuration(
    beside: str, expected: tuple[int, int, str]
) -> None:
    names: dict[str, Any] = {}
    run_settings_section(names, beside)
    shaped = names["cfg"].EPOCHS, names["cfg"].SEED, names["cfg"].DATASET
    assert shaped == expected


def cells_after_settings() -> list[ast.Module]:
    """The code cells of the sections that follow the settings, as trees."""
    files = sorted(ROOT.glob("notebooks/sections/*.py"))[3:]
    cells = [cell for file in files for cell in jupytext.read(file).cells]
    return [ast.parse(cell.source) for cell in cells if cell.cell_type == "code"]


def names_in(tree: ast.AST, context: type[ast.expr_context]) -> set[str]:
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Name))
    return {node.id for node in found if isinstance(node.ctx, context)}


@pytest.mark.parametrize(
    ("beside", "named"),
    [
        ("OVERRIDES = ['EPOCHS', 1]", "OVERRIDES must be"),
        ("OVERRIDES = {'EPOCH': 3}", "did you mean EPOCHS"),
        ("EPOCHS = 'many'", "EPOCHS='many' must be a whole number"),
        ("epochs = 1", "changes no setting"),
    ],
)
def test_what_was_made_before_does_not_outlive_a_wrong_setting(beside: str, named: str) -> None:
    """In a warm kernel, Run All goes on after a cell that failed: later cells must fail too."""
    cells = cells_after_settings()
    made = {name for cell in cells for name in names_in(cell, ast.Store)} | {"cfg"}
    names = dict.fromkeys(made, object())
    with pytest.raises(ConfigError, match=named):
        run_settings_section(names, beside)
    used = [names_in(cell, ast.Load) - names_in(cell, ast.Store) for cell in cells]
    assert sum(bool(names & made) for names in used) > 20
    for cell, needed in zip(cells, used, strict=True):
        assert needed & (made - names.keys()) or not needed & made, ast.unparse(cell)


def test_forget() -> None:
    names = {"cfg": 1, "model": 2, "other": 3}
    forget(names, "cfg model never_made")
    assert names == {"other": 3}


def test_changes_are_listed_where_they_shape_the_result() -> None:
    saved = json.loads(settings_to_json(Tea(CUPS=3, WATER=(60.0, 80.0), NAME="pot")))
    assert changed_settings(Tea(CUPS=3, WATER=(60.0, 80.0)), saved) == []
    assert changed_settings(Tea(NOTE="x"), saved) == [
        "  CUPS: 3 before, None now",
        "  WATER: (60.0, 80.0) before, (70.0, 80.0) now",
    ]
    assert changed_settings(Tea(CUPS=3, WATER=(60.0, 80.0)), {**saved, "SPOON": 1}) == [
        "  SPOON: 1 before, None now"
    ]
    assert changed_settings(Tea(), {}) == [
        "  LEAF: None before, 'green' now", "  MINUTES: None before, 3.0 now",
        "  WATER: None before, (70.0, 80.0) now", "  ADDED: None before, () now",
        "  ICED: None before, False now",
    ]  # fmt: skip


def test_the_hash_is_of_what_shapes_the_result() -> None:
    assert list(shaping_values(Tea())) == ["LEAF", "MINUTES", "CUPS", "WATER", "ADDED", "ICED"]
    plain = settings_hash(Tea())
    assert re.fullmatch("[0-9a-f]{8}", plain) and settings_hash(Tea(NAME="x", NOTE="y")) == plain
    others = [
        Tea(LEAF="black"),
        Tea(MINUTES=4.0),
        Tea(CUPS=1),
        Tea(ADDED=("milk",)),
        Tea(ICED=True),
    ]
    assert len({plain, *map(settings_hash, others)}) == 6


def test_json() -> None:
    tea = Tea(CUPS=3, ADDED=("lemon",), NOTE="Tee für zwei")
    assert json.loads(settings_to_json(tea))["ADDED"] == ["lemon"]
    assert make_settings(Tea, json.loads(settings_to_json(tea))) == tea


def test_parse_setting_reads_what_the_field_holds() -> None:
    assert parse_setting(Tea, "NOTE=3") == ("NOTE", "3")
    assert parse_setting(Tea, "NOTE=None") == ("NOTE", None)
    assert parse_setting(Tea, "CUPS=3") == ("CUPS", 3)
    assert parse_setting(Tea, "ADDED=['milk']") == ("ADDED", ["milk"])


def test_table() -> None:
    assert settings_table(Tea, ["CUPS", "NAME"]) == (
        "| name | default | meaning | allowed | in a run |\n"
        "|---|---|---|---|---|\n"
        "| `CUPS` | `None` | None: enough | a whole number from 1 to 12, or None | fixed |\n"
        "| `NAME` | `'auto'` | of the pot | a plain folder name | may change |"
    )
    assert len(settings_table(Tea).splitlines()) == 2 + len(fields(Tea))


# ------------------------------------------------------------------- the documents


def test_the_tables_in_the_documents_are_those_of_the_class() -> None:
    from emotion_transfer.commands.settings import FILES, MOST_USED, with_table
    from emotion_transfer.config import EnhancedConfig

    assert set(MOST_USED) <= {f.name for f in fields(EnhancedConfig)}
    for name, names in FILES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        assert with_table(text, names) == text, "run: python -m emotion_transfer settings --write"
    for name in MOST_USED:
        assert (ROOT / "README.md").read_text(encoding="utf-8").count(f"\n| `{name}` | ") == 1


def test_settings_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from emotion_transfer.commands.settings import main

    assert main([]) == 0
    printed = capsys.readouterr().out
    assert "| `EPOCHS` | `40` | passes over the training images |" in printed
    (tmp_path / "create_enhanced_notebook.py").touch()
    (tmp_path / "docs").mkdir()
    page = "# Title\n\n<!-- settings -->\nold rows\n<!-- /settings -->\n\nThe end.\n"
    (tmp_path / "README.md").write_text(page)
    (tmp_path / "docs/settings.md").write_text("<!-- settings -->\n<!-- /settings -->\n")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["--write"]) == 0
        full = (tmp_path / "docs/settings.md").read_text()
        assert full == f"<!-- settings -->\n{printed}<!-- /settings -->\n"
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# Title\n\n<!-- settings -->\n| name | ")
    assert text.endswith(" |\n<!-- /settings -->\n\nThe end.\n") and "old rows" not in text
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(ConfigError, match="README.md needs one place for the table"):
        main(["--write"])
    assert (tmp_path / "README.md").read_text() == "no markers"
