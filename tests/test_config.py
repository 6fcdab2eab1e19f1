"""The configuration: what is promised by default, what is refused, and how it travels as text."""

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emotion_toolbox.errors import ConfigError
from emotion_toolbox.files import project_root, resolve_path
from emotion_toolbox.settings import settings_hash, settings_to_json
from emotion_transfer.commands.settings import parse_setting
from emotion_transfer.config import (
    SMALL_SET,
    EnhancedConfig,
    cache_size,
    make_config,
    profile_for,
    thaw_epochs,
    train_size,
)

FACTS = {f.name: f.metadata for f in dataclasses.fields(EnhancedConfig)}
FIELDS = {f.name: f.type for f in dataclasses.fields(EnhancedConfig)}
PAIRS = {"THAW_EPOCHS", "CROP_SCALE"}
CHOICES = {n: f["choices"] for n, f in FACTS.items() if f["choices"] and n != "BASELINES"}
RANGES = {n: (f["low"], f["high"]) for n, f in FACTS.items() if f["low"] is not None}
# What may have another value when a run is resumed, because it cannot change what is learnt.
NEUTRAL = {
    "DATASET", "DATA_ROOT", "IMAGES_ROOT", "ALLOW_DUPLICATES", "MAX_BAD_FRACTION",
    "NEAR_DUPLICATE_BITS", "RUN_NAME", "OUTPUT_ROOT", "CACHE", "CACHE_DIR", "NUM_WORKERS",
    "BASELINES", "BOOTSTRAP", "CHECKPOINT_EVERY", "CHECKPOINT_STEPS", "TTA",
    "CHECKPOINT_KEEP", "ON_SAVE_ERROR", "MAX_BAD_STEPS",
}  # fmt: skip
FLOATS = [n for n, t in FIELDS.items() if t is float]
INTS = [n for n, t in FIELDS.items() if t in (int, int | None)]
TEXTS = [n for n, t in FIELDS.items() if t in (str, str | None)]
FLAGS = [n for n, t in FIELDS.items() if t is bool]


def test_defaults_are_the_promised_ones() -> None:
    promised = {
        "MODEL_NAME": "resnet50", "BATCH_SIZE": 32, "EPOCHS": 40, "LR_BACKBONE": 3e-5,
        "LR_HEAD": 3e-3, "DROPOUT": 0.4, "LABEL_SMOOTHING": 0.1, "MIXUP_ALPHA": 0.2,
        "CUTMIX_ALPHA": 1.0, "WEIGHT_DECAY": 1e-4, "WARMUP_EPOCHS": 3, "PATIENCE": 8,
        "GRAD_CLIP": 1.0, "IMG_SIZE": 224, "SEED": 42,
    }  # fmt: skip
    cfg = EnhancedConfig()
    assert {name: getattr(cfg, name) for name in promised} == promised
    assert thaw_epochs(cfg) == (3, 10)
    assert cache_size(cfg) == 256
    assert make_config() == cfg


def test_every_field_is_of_a_kind_tested_below() -> None:
    tuples = {"THAW_EPOCHS", "CROP_SCALE", "BASELINES"}
    assert set(FLOATS) | set(INTS) | set(TEXTS) | set(FLAGS) | tuples == set(FIELDS)
    assert set(FLOATS) | set(INTS) | PAIRS == set(RANGES), "a number without a range"
    assert all(None not in bounds for bounds in RANGES.values())


def test_every_field_says_what_it_means_in_a_few_words() -> None:
    for name, facts in FACTS.items():
        assert 10 <= len(facts["meaning"]) <= 60 and "|" not in facts["meaning"], name


def test_models_fits_and_baselines_are_those_that_there_are() -> None:
    from emotion_toolbox.decoding import FITS
    from emotion_toolbox.sample import DEFAULT_ROOT
    from emotion_transfer.baselines import BASELINE_MAKERS

    assert CHOICES["FIT"] == FITS
    assert set(FACTS["BASELINES"]["choices"]) == set(BASELINE_MAKERS)
    assert EnhancedConfig().DATA_ROOT == DEFAULT_ROOT


def test_it_is_frozen_and_hashable() -> None:
    cfg = EnhancedConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.EPOCHS = 3  # type: ignore[misc]
    assert {cfg: 1}[make_config()] == 1


def test_constructor_validates_too() -> None:
    with pytest.raises(ConfigError, match="EPOCHS"):
        EnhancedConfig(EPOCHS=0)
    with pytest.raises(ConfigError, match="EPOCHS"):
        dataclasses.replace(EnhancedConfig(), EPOCHS=-1)


def wrong_values() -> list[tuple[str, Any]]:
    """For every field values of a wrong type, outside its range or choices, or not a number."""
    cases: list[tuple[str, Any]] = []
    for name in FLOATS:
        low, high = RANGES[name]
        outside = [low - abs(low) - 1e-6, high * 1.01 + 1, math.nan, math.inf, -math.inf]
        cases += [(name, v) for v in [*outside, "1", None, True, (1.0,), {}, 1j, 10**400]]
    for name in INTS:
        low, high = RANGES[name]
        wrong = [int(low) - 1, int(high) + 1, 1.5, float(low), math.nan, "3", False, [3], 10**400]
        cases += [(name, v) for v in wrong]
        if FIELDS[name] is int:
            cases.append((name, None))
    for name in TEXTS:
        cases += [(name, v) for v in ("", "  ", "a\0b", 3, 2.5, True, ["a"], b"x", Path("x"))]
        if FIELDS[name] is str:
            cases.append((name, None))
    for name in CHOICES:
        cases += [(name, v) for v in ("nonsense", CHOICES[name][0].swapcase(), "auto ")]
    for name in FLAGS:
        cases += [(name, v) for v in (0, 1, "True", None, 1.0, [])]
    cases += [("THAW_EPOCHS", v) for v in (3, (3,), (3, 4, 5), (5, 3), (-1, 3), (1.5, 2), ("a", 1))]
    cases += [("CROP_SCALE", v) for v in (0.5, (0.5,), (0, 1), (0.8, 0.5), (0.5, 1.1), (-1, 1))]
    cases += [("CROP_SCALE", v) for v in ((math.nan, 1), (0.5, math.nan), None, ("a", "b"))]
    cases += [("BASELINES", v) for v in ("majority", ("nonsense",), (3,), None, {"majority": 1})]
    cases += [("RUN_NAME", v) for v in ("a/b", "/abs", ".", "..", "a\\b", "x/", "C:")]
    return cases


@pytest.mark.bad_table
@pytest.mark.parametrize(("name", "value"), wrong_values())
def test_wrong_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({name: value})
    message = str(caught.value)
    assert name in message
    if name in CHOICES and isinstance(value, str) and value.strip() and "\0" not in value:
        assert all(choice in message for choice in CHOICES[name])
    if name in RANGES:
        assert all(str(bound) in message for bound in RANGES[name])


@pytest.mark.parametrize(
    "name", sorted(set(RANGES) - PAIRS - {"CACHE_SIZE", "TRAIN_SIZE", "ACCUMULATE"})
)
def test_both_ends_of_a_range_are_allowed(name: str) -> None:
    for bound in RANGES[name]:
        value = float(bound) if FIELDS[name] is float else int(bound)
        assert getattr(make_config({name: value}), name) == bound


def test_all_problems_of_the_fields_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({"EPOCHS": 0, "DROPOUT": 2.0, "AMP": "x"})
    assert all(name in str(caught.value) for name in ("EPOCHS", "DROPOUT", "AMP"))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"BATCH_SIZE": 32, "ACCUMULATE": 5}, "ACCUMULATE"),
        ({"BATCH_SIZE": 4, "ACCUMULATE": 4}, "BatchNorm"),
        ({"IMG_SIZE": 224, "CACHE_SIZE": 200}, "CACHE_SIZE"),
        ({"IMG_SIZE": 96, "TRAIN_SIZE": 128}, "TRAIN_SIZE=128 must not exceed IMG_SIZE=96"),
        ({"IMG_SIZE": 100, "CACHE_SIZE": 200}, "IMG_SIZE"),
    ],
)
def test_settings_that_contradict_each_other(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make_config(values)


def test_unknown_names_list_the_nearest_and_all() -> None:
    for wrong, right in (
        ("BATCHSIZE", "BATCH_SIZE"),
        ("epochs", "EPOCHS"),
        ("LR_HAED", "LR_HEAD"),
        ("MIXUP_ALHPA", "MIXUP_ALPHA"),
    ):
        with pytest.raises(ConfigError, match=f"did you mean {right}") as caught:
            make_config({wrong: 1})
        assert repr(wrong) in str(caught.value)
        assert all(name in str(caught.value) for name in FIELDS)
    with pytest.raises(ConfigError, match="no setting is called 'qqqq'; Settings"):
        make_config({"qqqq": 1})
    with pytest.raises(ConfigError):
        make_config({3: 1})  # type: ignore[dict-item]


@pytest.mark.parametrize("size", [32, 33, 96, 128, 224, 1024])
def test_the_profile_of_small_sets_fits_every_image_size(size: int) -> None:
    profile = profile_for(SMALL_SET - 1, size, synthetic=False)
    cfg = make_config({"IMG_SIZE": size}, profile)
    assert (cfg.START, cfg.HEAD) == ("probe", "multilevel")
    assert train_size(cfg) == pytest.approx(max(32, size * 7 / 8), abs=0.51)
    assert profile_for(SMALL_SET, size, synthetic=False) == {}
    own = make_config({"IMG_SIZE": size, "TRAIN_SIZE": None, "EPOCHS": 3}, profile)
    assert (train_size(own), own.EPOCHS) == (size, 3)


def test_overrides_win_over_the_profile() -> None:
    cfg = make_config({"EPOCHS": 7}, {"EPOCHS": 2, "IMG_SIZE": 96})
    assert (cfg.EPOCHS, cfg.IMG_SIZE) == (7, 96)


def test_a_folder_asked_for_is_never_the_default_one() -> None:
    default = EnhancedConfig().DATA_ROOT
    assert make_config().DATASET == "auto"
    assert make_config({"DATA_ROOT": default}).DATASET == "files"
    assert make_config({"DATA_ROOT": default, "DATASET": "auto"}).DATASET == "auto"


# ------------------------------------------------------------------- JSON


def strategy_of(name: str) -> st.SearchStrategy[Any]:
    kind = FIELDS[name]
    if name in CHOICES:
        return st.sampled_from(CHOICES[name])
    if name in RANGES and name not in PAIRS:
        low, high = RANGES[name]
        if kind is float:
            return st.floats(low, high) | st.integers(math.ceil(low), math.floor(high))
        numbers = st.integers(int(low), int(high))
        return numbers if kind is int else numbers | st.none()
    if kind is bool:
        return st.booleans()
    if name == "RUN_NAME":
        return st.from_regex(r"[\w-]{1,20}", fullmatch=True)
    text = st.text(min_size=1).filter(lambda t: t.strip() and "\0" not in t)
    if kind in (str, str | None):
        return text if kind is str else text | st.none()
    return {
        "THAW_EPOCHS": st.none() | st.tuples(st.integers(0, 9), st.integers(9, 99)),
        "CROP_SCALE": st.tuples(st.floats(0.01, 0.5), st.floats(0.5, 1)),
        "BASELINES": st.lists(st.sampled_from(FACTS["BASELINES"]["choices"])).map(tuple),
    }[name]


TIED = {
    "IMG_SIZE",
    "TRAIN_SIZE",
    "CACHE_SIZE",
    "BATCH_SIZE",
    "ACCUMULATE",
}  # tested by themselves above


@given(st.fixed_dictionaries({}, optional={n: strategy_of(n) for n in FIELDS if n not in TIED}))
@settings(max_examples=150, deadline=None)
def test_json_round_trip(values: dict[str, Any]) -> None:
    cfg = make_config(values)
    again = make_config(json.loads(settings_to_json(cfg)))
    assert again == cfg
    assert settings_hash(again) == settings_hash(cfg)
    assert [type(v) for v in dataclasses.astuple(again)] == [
        type(v) for v in dataclasses.astuple(cfg)
    ]
    json.loads(settings_to_json(cfg), parse_constant=pytest.fail)  # no NaN: any parser reads it


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "3", '"EPOCHS"', '{"EPOCH": 3}', '{"EPOCHS": NaN}', '{"EPOCHS": 0}'],
)
def test_text_that_is_no_configuration(text: str) -> None:
    with pytest.raises(ValueError):  # a ConfigError is one
        make_config(json.loads(text))


# ------------------------------------------------------------------- hash


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_the_hash_changes_with_what_shapes_the_result_and_nothing_else(name: str) -> None:
    other: dict[str, Any] = {
        "BATCH_SIZE": 64, "IMG_SIZE": 230, "CACHE_SIZE": 260, "ACCUMULATE": 2, "SEED": 1,
        "THAW_EPOCHS": (4, 5), "CROP_SCALE": (0.5, 1.0), "BASELINES": (), "NUM_WORKERS": 3,
        "CHECKPOINT_STEPS": 9, "TRAIN_SIZE": 192,
    }  # fmt: skip
    default = getattr(EnhancedConfig(), name)
    if name in other:
        value = other[name]
    elif name in CHOICES:
        value = next(v for v in CHOICES[name] if v != default)
    elif isinstance(default, bool):
        value = not default
    elif name in RANGES:
        value = type(default)(RANGES[name][0] if default != RANGES[name][0] else RANGES[name][1])
    else:
        value = "something_else"
    changed = settings_hash(dataclasses.replace(EnhancedConfig(), **{name: value}))
    assert (changed != settings_hash(EnhancedConfig())) == (name not in NEUTRAL)


def test_equal_settings_hash_equally() -> None:
    one, other = make_config({"ROTATION": 10, "CROP_SCALE": [0.6, 1]}), make_config()
    assert one == other and settings_hash(one) == settings_hash(other)
    assert isinstance(one.ROTATION, float) and isinstance(one.CROP_SCALE[1], float)
    assert len(settings_hash(one)) == 8 and int(settings_hash(one), 16) >= 0


# ------------------------------------------------------------------- derived values


@pytest.mark.parametrize(
    ("epochs", "warmup", "given", "expected"),
    [
        (40, 3, None, (3, 10)),
        (40, 0, None, (0, 10)),
        (4, 3, None, (3, 4)),
        (1, 0, None, (0, 0)),
        (8, 2, (2, 3), (2, 3)),
        (100, 30, None, (30, 31)),
    ],
)
def test_thaw_epochs(
    epochs: int, warmup: int, given: tuple[int, int] | None, expected: tuple[int, int]
) -> None:
    cfg = make_config({"EPOCHS": epochs, "WARMUP_EPOCHS": warmup, "THAW_EPOCHS": given})
    assert thaw_epochs(cfg) == expected


@pytest.mark.parametrize("img_size", range(32, 1025, 31))
def test_the_default_cache_size_is_always_allowed(img_size: int) -> None:
    side = cache_size(make_config({"IMG_SIZE": img_size}))
    assert side == round(img_size * 8 / 7)
    assert side == make_config({"IMG_SIZE": img_size, "CACHE_SIZE": side}).CACHE_SIZE


# ------------------------------------------------------------------- NAME=VALUE


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("EPOCHS=5", ("EPOCHS", 5)),
        (" EPOCHS = 5 ", ("EPOCHS", 5)),
        ("LR_HEAD=1e-3", ("LR_HEAD", 1e-3)),
        ("MODEL_NAME=resnet50", ("MODEL_NAME", "resnet50")),
        ("MODEL_NAME='resnet50'", ("MODEL_NAME", "resnet50")),
        ('MODEL_NAME="resnet50"', ("MODEL_NAME", "resnet50")),
        ("DEBUG=True", ("DEBUG", True)),
        ("DEBUG=true", ("DEBUG", True)),
        ("CACHE=False", ("CACHE", False)),
        ("WEIGHTS=None", ("WEIGHTS", None)),
        ("WEIGHTS=null", ("WEIGHTS", None)),
        ("THAW_EPOCHS=(3, 10)", ("THAW_EPOCHS", (3, 10))),
        ("THAW_EPOCHS=[3,10]", ("THAW_EPOCHS", (3, 10))),
        ("BASELINES=('majority',)", ("BASELINES", ("majority",))),
        ('BASELINES=["majority", "linear_probe"]', ("BASELINES", ("majority", "linear_probe"))),
        ("BASELINES=()", ("BASELINES", ())),
        ("RUN_NAME=2026", ("RUN_NAME", "2026")),  # text stays text
        ("RUN_NAME=true", ("RUN_NAME", "true")),
        ("RUN_NAME=a=b", ("RUN_NAME", "a=b")),
        ("DATA_ROOT=/data/set (1)", ("DATA_ROOT", "/data/set (1)")),
        ("DATA_ROOT='/data/set (1)'", ("DATA_ROOT", "/data/set (1)")),
        ("DATA_ROOT=C:\\new\\data", ("DATA_ROOT", "C:\\new\\data")),
        ("DATA_ROOT=[1]", ("DATA_ROOT", "[1]")),
    ],
)
def test_parse_setting(text: str, expected: tuple[str, Any]) -> None:
    name, value = parse_setting(EnhancedConfig, text)
    cfg = make_config({name: value})
    assert (name, getattr(cfg, name)) == expected


@pytest.mark.parametrize(
    "text",
    ["EPOCHS=", "EPOCHS=five", "EPOCHS=5.5", "LR_HEAD=nan", "LR_HEAD=1e999", "LR_HEAD=Infinity"]
    + ["NOPE=3", "=3", "=", "DEBUG=yes", "DEBUG=1", "EPOCHS=[[", "EPOCHS=__import__('os')"]
    + ["EPOCHS=" + "[" * 50_000, "SEED=" + "9" * 5000, "DATA_ROOT=None", "THAW_EPOCHS=3"],
)
def test_settings_that_cannot_work_are_configuration_errors(text: str) -> None:
    with pytest.raises(ConfigError):
        make_config(dict([parse_setting(EnhancedConfig, text)]))


@pytest.mark.parametrize("text", ["", "EPOCHS", "EPOCHS 5", "EPOCHS:5"])
def test_settings_without_an_equals_sign(text: str) -> None:
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        parse_setting(EnhancedConfig, text)


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_setting_or_a_configuration_error(text: str) -> None:
    for setting in (text, f"EPOCHS={text}", f"DATA_ROOT={text}", f"CROP_SCALE={text}"):
        with contextlib.suppress(ConfigError):
            make_config(dict([parse_setting(EnhancedConfig, setting)]))


# ------------------------------------------------------------------- folders


def test_project_root_is_found_from_below_and_else_stays(tmp_path: Path) -> None:
    below = tmp_path / "project" / "notebooks" / "deep"
    below.mkdir(parents=True)
    assert project_root(below) == below.resolve()
    (tmp_path / "project" / "create_enhanced_notebook.py").touch()
    assert project_root(below) == (tmp_path / "project").resolve()
    assert project_root(tmp_path / "project") == (tmp_path / "project").resolve()
    assert project_root(tmp_path) == tmp_path.resolve()


def test_resolve_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "create_enhanced_notebook.py").touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert resolve_path("data/x") == tmp_path.resolve() / "data" / "x"
    assert resolve_path("~/x") == tmp_path / "home" / "x"
    assert resolve_path("/abs/x") == Path("/abs/x")


def test_the_home_of_nobody_is_a_named_error() -> None:
    with pytest.raises(ConfigError, match="~nobody-of-this-name/data.*whole path"):
        resolve_path("~nobody-of-this-name/data")
