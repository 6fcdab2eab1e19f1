"""The name and the folder of a run."""

import dataclasses
import shutil

import pytest
from small_run import listed

from emotion_toolbox.errors import ConfigError
from emotion_toolbox.report import make_run_folder


def name_of(cfg) -> str:
    return run_name(cfg, listed(cfg))


def test_a_run_keeps_its_name_where_its_data_are_moved(tiny_config, tiny_root, tmp_path):
    before = name_of(tiny_config())
    assert before.startswith("tiny-efficientnet_lite0-")
    (tmp_path / "far").mkdir()
    tiny_root.rename(tmp_path / "far" / "tiny")
    assert name_of(tiny_config(DATA_ROOT=str(tmp_path / "far" / "tiny"))) == before


def test_other_data_of_the_same_name_get_another_run(tiny_config, tiny_root, tmp_path):
    before = name_of(tiny_config())
    other = shutil.copytree(tiny_root, tmp_path / "far" / "tiny")
    table = other / "val.csv"
    rows = table.read_text().splitlines()
    table.write_text("\n".join(rows[:-1]) + "\n")
    assert name_of(tiny_config(DATA_ROOT=str(other))) != before
    assert name_of(tiny_config(SEED=7)) != before
    assert name_of(tiny_config(RUN_NAME="mine")) == "mine"


def test_a_folder_that_cannot_be_made_is_named(tiny_config, tmp_path):
    (tmp_path / "outputs").write_text("a file")
    cfg = tiny_config()
    with pytest.raises(ConfigError, match=r"OUTPUT_ROOT=.*choose another folder"):
        make_run_folder(cfg, listed(cfg))
    made = make_run_folder(dataclasses.replace(cfg, OUTPUT_ROOT=str(tmp_path / "b")), listed(cfg))
    assert (made / "figures").is_dir()
