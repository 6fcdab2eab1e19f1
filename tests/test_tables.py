"""Reading splits: what is accepted, and that everything else is named with file and row."""

import csv
import json
import re
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_run import listed

from emotion_toolbox.errors import DataError
from emotion_toolbox.sample import SAMPLE_ROOT, uses_sample
from emotion_toolbox.sources import read_source
from emotion_toolbox.tables import (
    LABEL_COLUMNS,
    MIKELS_CLASSES,
    PATH_COLUMNS,
    SPLITS,
    EmotionData,
    order_of,
    read_table,
)
from emotion_transfer.config import QUICK_PROFILE, EnhancedConfig, make_config

Config = Callable[..., EnhancedConfig]


def write_splits(root: Path, **tables: str | bytes) -> Path:
    """A data set of CSVs only (no image is opened here); `tables` replace the good ones."""
    root.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        good = f"path,label\n{split}/a.jpg,joy\n{split}/b.jpg,calm\n"
        content = tables.get(split, good)
        raw = content if isinstance(content, bytes) else content.encode()
        (root / f"{split}.csv").write_bytes(raw)
    return root


def write_sample(root: Path) -> Path:
    """The same, and said to be the sample."""
    (write_splits(root) / "stats.json").write_text('{"synthetic": true, "images_root": "."}')
    return root


def load(root: Path, **overrides: object) -> EmotionData:
    return listed(make_config({"DATA_ROOT": str(root), **overrides}))


# ------------------------------------------------------------------- what is read


def test_the_tiny_data_set(tiny_config: Config, tiny_root: Path) -> None:
    data = listed(tiny_config())
    assert data.classes == ("calm", "joy", "rage")
    assert not data.synthetic and data.name == "tiny" and data.root == tiny_root
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 24,
        "val": 12,
        "test": 12,
    }
    expected = pd.DataFrame(
        {"train": [8] * 3, "val": [4] * 3, "test": [4] * 3},
        index=pd.Index(["calm", "joy", "rage"], name="class"),
    )
    pd.testing.assert_frame_equal(data.counts(), expected, check_dtype=False)
    train = data.splits["train"]
    assert train.labels.dtype == np.int64
    for i in range(len(train)):
        assert train.path(i).is_file()
        assert data.classes[train.labels[i]] in train.files[i]
    assert train.where(3) == f"{tiny_root / 'train.csv'} row 5 ({train.files[3]})"


def test_select_keeps_files_labels_and_rows_together(tiny_config: Config) -> None:
    train = listed(tiny_config()).splits["train"]
    by_mask = train.select(np.arange(24) % 5 == 2)
    by_index = train.select(np.array([2, 7, 12, 17, 22]))
    for chosen in (by_mask, by_index):
        assert list(chosen.files) == [train.files[i] for i in (2, 7, 12, 17, 22)]
        assert chosen.rows.tolist() == [4, 9, 14, 19, 24]
        np.testing.assert_array_equal(chosen.labels, train.labels[2::5])
    assert len(train.select(np.zeros(24, bool))) == 0


@pytest.mark.parametrize("path_name", PATH_COLUMNS)
@pytest.mark.parametrize("label_name", LABEL_COLUMNS)
def test_accepted_column_names(tmp_path: Path, path_name: str, label_name: str) -> None:
    file = tmp_path / "a.csv"
    file.write_text(f"extra, {label_name} ,{path_name}\n1,joy,a.jpg\n2,calm,b.jpg\n")
    table = read_table(file)
    assert table["path"].tolist() == ["a.jpg", "b.jpg"]
    assert table["label"].tolist() == ["joy", "calm"]
    assert table["row"].tolist() == [2, 3]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_the_separator_is_recognised(tmp_path: Path, separator: str) -> None:
    file = tmp_path / "table.csv"
    file.write_text(separator.join(["path", "label", "who"]) + f"\na{separator}joy{separator}x\n")
    table = read_table(file)
    assert table.to_dict("records") == [{"path": "a", "label": "joy", "who": "x", "row": 2}]


@pytest.mark.parametrize(
    ("content", "paths", "labels"),
    [
        ('path, label\n"a, b", "joy"\n c, calm\n', ["a, b", "c"], ["joy", "calm"]),
        ('"path", "label"\na, "x, y"\n', ["a"], ["x, y"]),
        ('path; label\n"a; b"; "joy"\n', ["a; b"], ["joy"]),
        ("path ,label \na ,joy \n", ["a "], ["joy"]),  # looked for without spaces if missing
        ("Path,LABEL\na,joy\n", ["a"], ["joy"]),
        ('"Filename";"Class"\r\n"a";"joy"\r\n', ["a"], ["joy"]),
        (",path,label,\n0,a,joy,\n1,b,calm,\n", ["a", "b"], ["joy", "calm"]),  # pandas's index
        ("sep=;\r\npath;label\r\na, b;joy\r\n", ["a, b"], ["joy"]),  # Excel says its separator
        ("\tpath\tlabel\n0\ta, b\tjoy; calm\n", ["a, b"], ["joy; calm"]),
        ("path;label;note\na;joy;one, two, three, four\n", ["a"], ["joy"]),
        ('path,label,"x;y;z"\na,joy,1\n', ["a"], ["joy"]),
        ('path,label\na"b.jpg,joy\n', ['a"b.jpg'], ["joy"]),
    ],
)
def test_what_people_and_spreadsheets_write(
    tmp_path: Path, content: str, paths: list[str], labels: list[str]
) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(content.encode())
    table = read_table(file)
    assert table["path"].tolist() == paths and table["label"].tolist() == labels


@given(
    rows=st.lists(
        st.tuples(*[st.text(st.characters(codec="utf-8", exclude_characters="\0\r"))] * 3),
        min_size=1,
    ),
    separator=st.sampled_from(",;\t"),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_what_a_csv_writer_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str, str]],
    separator: str,
    end: str,
) -> None:
    file = tmp_path_factory.mktemp("table") / "a.csv"
    rows = [(p.replace("\n", "") + "p", q.replace("\n", "") + "q", other) for p, q, other in rows]
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, delimiter=separator, lineterminator=end, quoting=csv.QUOTE_ALL)
        writer.writerows([("label", "path", "note"), *rows])
    table = read_table(file)
    labels = [unicodedata.normalize("NFC", row[0].strip()) for row in rows]
    assert table["label"].tolist() == labels
    assert table["path"].tolist() == [row[1] for row in rows]
    assert table["note"].tolist() == [row[2] for row in rows]


def test_columns_beside_the_two_are_kept_and_unnamed_ones_are_not(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text(",who,image,row,Class\n0, x ,a.jpg,77,joy\n")
    expected = {"path": "a.jpg", "label": "joy", "who": " x ", "row": 2}
    assert read_table(file).to_dict("records") == [expected]


def test_the_first_accepted_name_wins(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("file,class,path,label\nno.jpg,no,yes.jpg,yes\n")
    assert read_table(file).loc[0, ["path", "label"]].tolist() == ["yes.jpg", "yes"]


@pytest.mark.parametrize(
    ("content", "paths", "labels", "rows"),
    [
        (b"\xef\xbb\xbfpath,label\na,x\n", ["a"], ["x"], [2]),  # a byte order mark
        (b"path,label\r\na,x\r\nb,y\r\n", ["a", "b"], ["x", "y"], [2, 3]),
        (b"path,label\ra,x\rb,y", ["a", "b"], ["x", "y"], [2, 3]),
        (b"\n\npath,label\n\na,x\n  \n\nb,y\n\n", ["a", "b"], ["x", "y"], [5, 8]),
        (b'path,label\n"a,b.jpg","x"\n', ["a,b.jpg"], ["x"], [2]),
        (b'path,label\n"a""b",x\n', ['a"b'], ["x"], [2]),
        ("path,label\nbücher/日本 1.jpg,été\n".encode(), ["bücher/日本 1.jpg"], ["été"], [2]),
        (b"path,label\n a , x \n", [" a "], ["x"], [2]),  # spaces may belong to a file's name
        (b"path,note,label\na,\"two\nlines\",x\nb,'',y\n", ["a", "b"], ["x", "y"], [2, 4]),
        (b"path,label\na,NA\nb,1\nc,null\nd,01\n", list("abcd"), ["NA", "1", "null", "01"], None),
        (b"path,label\na,nan\nb,None\nc,1.0\nd,#N/A\n", list("abcd"), None, None),
        (b"path,label\n1,x\n001,x\n1e3,x\nNA,x\n", ["1", "001", "1e3", "NA"], None, None),
    ],
)
def test_text_stays_text_and_rows_are_lines(
    tmp_path: Path, content: bytes, paths: list[str], labels: list[str] | None, rows: list[int]
) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(content)
    table = read_table(file)
    assert table["path"].tolist() == paths
    if labels is not None:
        assert table["label"].tolist() == labels
    if rows is not None:
        assert table["row"].tolist() == rows


def test_labels_called_na_and_1_are_classes(tmp_path: Path) -> None:
    table = "path,label\n{0}1.jpg,NA\n{0}2.jpg,1\n{0}3.jpg,null\n"
    root = write_splits(tmp_path, **{s: table.format(s) for s in SPLITS})
    with pytest.warns(UserWarning, match="'NA' .* and 'null' "):
        assert load(root).classes == ("1", "NA", "null")


# ------------------------------------------------------------------- malformed CSVs

# content of train.csv, the row that must be named (None: the whole file), a word of the reason
MALFORMED: dict[str, tuple[str | bytes, int | None, str]] = {
    "empty file": ("", None, "empty"),
    "blank lines only": ("\n\n  \n", None, "empty"),
    "byte order mark only": (b"\xef\xbb\xbf", None, "empty"),
    "header only": ("path,label\n", None, "no image"),
    "header and blank lines": ("path,label\n\n\n", None, "no image"),
    "no header": ("a.jpg,joy\nb.jpg,calm\n", None, "no column path"),
    "no path column": ("name,label\na,joy\n", None, "no column path"),
    "no label column": ("path,score\na,joy\n", None, "no column label"),
    "a column in capitals too": ("Path,path,label\na,b,joy\n", 1, "column path twice"),
    "another column twice": ("path,label,x,x\na,joy,1,2\n", 1, "column x twice"),
    "column twice after blank lines": ("\n\npath,label,label\na,joy,x\n", 3, "twice"),
    "a quote inside a quoted path": ('path,label\n"a "big" one.jpg",joy\n', 2, "expected after"),
    "a tab too few": ("path\tlabel\na\tjoy\nb\n", 3, "1 values"),
    "a semicolon too many": ("path;label\na;joy;x\n", 2, "3 values"),
    "path twice": ("path,path,label\na,b,joy\n", 1, "twice"),
    "label twice": ("path,label,label\na,joy,calm\n", 1, "twice"),
    "Latin-1": ("path,label\na,joy\nb,été\n".encode("latin-1"), 3, "UTF-8"),
    "UTF-16": ("path,label\na,joy\n".encode("utf-16"), 1, "UTF-8"),
    "UTF-16 without a mark": ("path,label\na,joy\n".encode("utf-16-le"), 1, "UTF-16"),
    "NUL character": (b"path,label\na,joy\nb\0,calm\n", 3, "NUL"),
    "random bytes": (bytes(range(255, 0, -1)) * 4, 1, "UTF-8"),
    "a PNG": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", 1, "UTF-8"),
    "JSON": ('{"path": "a.jpg"}', None, "no column path"),
    "empty path": ("path,label\na,joy\n,calm\n", 3, "empty path"),
    "blank path": ("path,label\na,joy\n   ,calm\n", 3, "empty path"),
    "quoted empty path": ('path,label\n"",joy\n', 2, "empty path"),
    "empty label": ("path,label\na,joy\nb,\n", 3, "empty label"),
    "blank label": ("path,label\na,joy\nb,  \n", 3, "empty label"),
    "empty after blank lines": ("path,label\n\na,joy\n\nb,\n", 5, "empty label"),
    "commas only": ("path,label\na,joy\n,\n", 3, "empty path"),
    "a value too few": ("path,label\na,joy\nb\n", 3, "1 values where the header has 2"),
    "a value too many": ("path,label\na,joy\nb,calm,x\n", 3, "3 values"),
    "a value too many in every row": ("path,label\na,joy,x\nb,calm,y\n", 2, "3 values"),
    "two too many in every row": ("path,label\na,joy,x,z\nb,calm,y,z\n", 2, "4 values"),
    "comma in a path": ("path,label\na,b.jpg,joy\n", 2, "double quotes"),
    "trailing comma": ("path,label\na,joy,\n", 2, "3 values"),
    "quote never closed": ('path,label\n"a,joy\nb,calm\n', 2, "end of data"),
    "quote never closed, later": ('path,label\na,joy\nb,"calm\nc,joy\n', 3, "end of data"),
    "text after a quote": ('path,label\n"a"b,joy\n', 2, "expected after"),
    "quotes that swallow rows": ('path,label\n"a,joy\nb,calm\nc",joy\n', 2, "quotation mark"),
    "line break in a label": ('path,label\na,"joy\n"\n', 2, "quotation mark"),
    "endless value": ("path,label\na," + "x" * 200_000 + "\n", 2, "limit"),
    "one class": ("path,label\na,joy\nb,joy\n", None, "one class"),
    "same path twice": ("path,label\na,joy\nb,calm\na,joy\n", 4, "already"),
    "same path twice, two labels": ("path,label\na,joy\nb,calm\na,calm\n", 4, "already"),
    "same path, spelt differently": ("path,label\nx/a,joy\nb,calm\n./x//a,joy\n", 4, "already"),
}


@pytest.mark.bad_table
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_csvs_are_named_with_row_and_reason(tmp_path: Path, case: str) -> None:
    content, row, reason = MALFORMED[case]
    root = write_splits(tmp_path / "set", train=content)
    with pytest.raises(DataError) as caught:
        load(root)
    message = str(caught.value)
    assert str(root / "train.csv") in message
    assert reason in message
    if row is not None:
        assert f"{root / 'train.csv'} row {row} " in message
    assert len(message) < 1500


@pytest.mark.bad_table
@pytest.mark.parametrize("case", MALFORMED)
def test_prepare_says_of_a_table_what_the_notebook_says(tmp_path: Path, case: str) -> None:
    content = MALFORMED[case][0]
    (tmp_path / "a.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        table = read_table(tmp_path / "a.csv")
    except DataError as error:
        with pytest.raises(DataError, match=f"^{re.escape(str(error))}$"):
            read_source(tmp_path / "a.csv", tmp_path / "images")
    else:
        assert len(table) > 1  # a fault of the set, not of the table


@pytest.mark.parametrize("split", SPLITS)
def test_it_is_always_the_right_file(tmp_path: Path, split: str) -> None:
    root = write_splits(tmp_path, **{split: "path,label\nx,joy\ny,\n"})
    with pytest.raises(DataError, match=re.escape(f"{root / split}.csv row 3 has an empty label")):
        load(root)


def test_repeated_paths_name_both_places(tmp_path: Path) -> None:
    root = write_splits(tmp_path, val="path,label\nx,joy\n", test="path,label\ny,joy\nx,calm\n")
    with pytest.raises(DataError) as caught:
        load(root)
    for place in (f"{root / 'test.csv'} row 3 (x)", f"{root / 'val.csv'} row 2 (x)"):
        assert place in str(caught.value)


def test_an_unknown_label_names_file_row_and_known_classes(tmp_path: Path) -> None:
    val = "path,label\nx,joy\n\ny,bliss\nz,bliss\n"
    root = write_splits(tmp_path, val=val)
    with pytest.raises(DataError) as caught:
        load(root)
    message = str(caught.value)
    assert f"{root / 'val.csv'} row 4 has the unknown label 'bliss' (2 such rows)" in message
    assert "known: calm, joy" in message


def test_an_unknown_label_in_train_with_a_label_map(tmp_path: Path) -> None:
    root = write_splits(tmp_path, train="path,label\na,joy\nb,calm\nc,Joy\n")
    (root / "label_map.json").write_text('{"joy": 0, "calm": 1}')
    with pytest.raises(DataError, match="row 4 has the unknown label 'Joy'.*row to 'joy'$"):
        load(root)


# ------------------------------------------------------------------- spellings

NFC, NFD = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


def test_normal_forms_of_a_label_are_one_class(tmp_path: Path) -> None:
    assert NFC != NFD
    table = f"path,label\n{{0}}a,{NFC}\n{{0}}b,{NFD}\n{{0}}c,bar\n"
    root = write_splits(tmp_path, **{s: table.format(s) for s in SPLITS})
    assert load(root).classes == ("bar", NFC)
    (root / "label_map.json").write_text(json.dumps({NFD: 0, "bar": 1}))
    data = load(root)
    assert data.classes == (NFC, "bar")
    assert data.splits["train"].labels.tolist() == [0, 0, 1]
    (root / "label_map.json").write_text(json.dumps({NFD: 0, NFC: 1, "bar": 2}))
    with pytest.raises(DataError, match="numbered from 0 without gaps"):  # one name twice
        load(root)


@pytest.mark.parametrize(
    ("labels", "pairs"),
    [
        (["joy", "Joy", "calm"], [("'Joy' (3 images)", "'joy' (3 images)")]),
        (["0", "0.0", "1", "01", "10"], [("'0'", "'0.0'"), ("'01'", "'1'")]),
        (["nan", "NULL", "joy"], [("'NULL'", "'nan'", "may stand for none")]),
        (["-", "?", "Unknown", "joy"], [("'-'", "'?'", "'Unknown'", "may stand for none")]),
        (["very_sad", "very sad", "Very-Sad", "sad"], [("'very_sad'", "'very sad'", "'Very-Sad'")]),
        (["very  calm", "very calm", "joy"], [("'very  calm'", "'very calm'")]),
        (["joy", "joy\u200b", "calm"], [("'joy'", "'joy\\u200b'")]),
        (["stra\u00dfe", "STRASSE", "weg"], [("'STRASSE'", "'stra\u00dfe'")]),
        (["\uff11", "1", "2"], [("'1'", "'\uff11'")]),  # a wide digit
        (["None", "joy"], [("'None' (3 images)",)]),
        (["1", "-1", "1.5", "15", "1e5", "joy", "enjoy"], []),
    ],
)
def test_labels_that_may_be_one_are_warned_of(
    tmp_path: Path, labels: list[str], pairs: list[tuple[str, ...]]
) -> None:
    rows = "".join(f"{{0}}{i},{label}\n" for i, label in enumerate(labels))
    root = write_splits(tmp_path, **{s: "path,label\n" + rows.format(s) for s in SPLITS})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load(root)
    assert sorted(data.classes) == sorted(labels)  # a warning, no more
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == len(pairs)
    for names in pairs:
        assert any(all(name in message for name in names) for message in messages)


@pytest.mark.parametrize(
    ("there", "listed"),
    [
        (f"{NFC}/a.jpg", f"{NFD}/a.jpg"),
        (f"{NFD}/a.jpg", f"{NFC}/a.jpg"),
        (f"{NFD}/{NFD}.jpg", f"{NFC}/{NFD}.jpg"),
        ("x/a.jpg", "x\\a.jpg"),
        ("x/a.jpg", " x/a.jpg "),
        ("x/a.jpg", "x/a.jpg"),
        ("x\\a.jpg", "x\\a.jpg"),  # what is there as it is written is taken
        (" x/a.jpg ", " x/a.jpg "),
    ],
)
def test_an_image_is_found_under_another_spelling_of_its_path(
    tmp_path: Path, there: str, listed: str
) -> None:
    images = tmp_path / "images"
    (images / there).parent.mkdir(parents=True)
    (images / there).write_bytes(b"a picture")
    train = f'path,label\n"{listed}",joy\n"missing {NFD}.jpg",calm\n'
    root = write_splits(tmp_path / "set", train=train)
    split = load(root, IMAGES_ROOT=str(images)).splits["train"]
    assert split.path(0).read_bytes() == b"a picture"
    assert split.path(1) == images / f"missing {NFD}.jpg"  # as it is written, for the message
    absolute = write_splits(
        tmp_path / "set", train=train.replace(f'"{listed}', f'"{images}/{listed.lstrip()}')
    )
    if listed == listed.lstrip():
        assert load(absolute).splits["train"].path(0).read_bytes() == b"a picture"


def test_one_image_under_two_spellings_is_listed_twice(tmp_path: Path) -> None:
    (tmp_path / NFC).touch()
    root = write_splits(tmp_path, train=f"path,label\n{NFC},joy\n{NFD},calm\n")
    with pytest.raises(DataError, match="row 3 .* is listed already in .* row 2"):
        load(root)


# ------------------------------------------------------------------- the order of the classes


def test_without_a_label_map_other_classes_are_alphabetical(tmp_path: Path) -> None:
    table = "path,label\n{0}1,zebra\n{0}2,Ant\n{0}3,bee\n"
    root = write_splits(tmp_path, **{s: table.format(s) for s in SPLITS})
    assert load(root).classes == ("Ant", "bee", "zebra")


def test_without_a_label_map_the_official_classes_are_in_their_official_order(
    tmp_path: Path,
) -> None:
    official = (
        *("amusement", "awe", "contentment", "excitement"),
        *("anger", "disgust", "fear", "sadness"),
    )
    assert official == MIKELS_CLASSES
    rows = "".join(f"{{0}}{name},{name}\n" for name in sorted(official))
    root = write_splits(tmp_path, **{s: "path,label\n" + rows.format(s) for s in SPLITS})
    data = load(root)
    assert data.classes == official
    split = data.splits["val"]
    assert [data.classes[n] for n in split.labels] == sorted(official)


def test_classes_that_are_numbers_are_in_their_order(tmp_path: Path) -> None:
    rows = "".join(f"{{0}}{n},{n}\n" for n in (10, 2, 0, 1))
    root = write_splits(tmp_path, **{s: "path,label\n" + rows.format(s) for s in SPLITS})
    data = load(root)
    assert data.classes == ("0", "1", "2", "10")
    assert data.splits["test"].labels.tolist() == [3, 2, 0, 1]


@pytest.mark.parametrize(
    ("labels", "ordered"),
    [
        (["0.5", "10.0", "2.0", "1.0"], ["0.5", "1.0", "2.0", "10.0"]),
        (["1e3", "-2", "20", "-10"], ["-10", "-2", "20", "1e3"]),
        (["10", "2", "nan"], ["10", "2", "nan"]),
        (["10", "2", "joy"], ["10", "2", "joy"]),
    ],
)
def test_numbers_of_any_kind_are_in_order(labels: list[str], ordered: list[str]) -> None:
    assert list(order_of(labels)) == ordered


def test_some_of_the_official_classes_are_alphabetical(tmp_path: Path) -> None:
    table = "path,label\n{0}1,awe\n{0}2,anger\n"
    root = write_splits(tmp_path, **{s: table.format(s) for s in SPLITS})
    assert load(root).classes == ("anger", "awe")


@pytest.mark.parametrize("order", [("joy", "calm"), ("calm", "joy")])
def test_the_label_map_is_never_sorted_again(tmp_path: Path, order: tuple[str, str]) -> None:
    root = write_splits(tmp_path)
    backwards = dict(reversed(list({name: i for i, name in enumerate(order)}.items())))
    text = "\ufeff" + json.dumps(backwards)  # with a byte order mark, as some editors write
    (root / "label_map.json").write_text(text, encoding="utf-8")
    data = load(root)
    assert data.classes == order
    assert [data.classes[n] for n in data.splits["train"].labels] == ["joy", "calm"]


MALFORMED_MAPS: dict[str, str | bytes] = {
    "empty file": "",
    "not JSON": "joy: 0, calm: 1",
    "cut off": '{"joy": 0, "calm": 1',
    "not UTF-8": '{"é": 0, "calm": 1}'.encode("latin-1"),
    "a list": '["joy", "calm"]',
    "a list of pairs": '[["joy", 0], ["calm", 1]]',
    "text": '"joy"',
    "a number": "2",
    "null": "null",
    "empty object": "{}",
    "one class": '{"joy": 0}',
    "from one": '{"joy": 1, "calm": 2}',
    "with a gap": '{"joy": 0, "calm": 2}',
    "number twice": '{"joy": 0, "calm": 0}',
    "negative": '{"joy": -1, "calm": 0}',
    "numbers as text": '{"joy": "0", "calm": "1"}',
    "fractions": '{"joy": 0.0, "calm": 1.0}',
    "truth values": '{"joy": false, "calm": true}',
    "not a number": '{"joy": NaN, "calm": 0}',
    "null numbers": '{"joy": null, "calm": 0}',
    "turned around": '{"0": "joy", "1": "calm"}',
    "nested": '{"classes": {"joy": 0, "calm": 1}}',
    "name twice": '{"joy": 0, "calm": 1, "joy": 2}',
    "blank name": '{"joy": 0, "calm": 1, "": 2}',
    "spaces around a name": '{"joy ": 0, "calm": 1}',
    "very deep": "[" * 100_000,
    "huge number": '{"joy": 0, "calm": ' + "9" * 5000 + "}",
    "class without an image": '{"joy": 0, "calm": 1, "rage": 2}',
}


@pytest.mark.bad_table
@pytest.mark.parametrize("case", MALFORMED_MAPS)
def test_malformed_label_maps_are_named(tmp_path: Path, case: str) -> None:
    content = MALFORMED_MAPS[case]
    root = write_splits(tmp_path)
    raw = content if isinstance(content, bytes) else content.encode()
    (root / "label_map.json").write_bytes(raw)
    with pytest.raises(DataError) as caught:
        load(root)
    assert "label_map.json" in str(caught.value)


def test_a_label_map_that_is_no_file(tmp_path: Path) -> None:
    root = write_splits(tmp_path)
    (root / "label_map.json").mkdir()
    with pytest.raises(DataError, match=r"label_map\.json"):
        load(root)
    (root / "label_map.json").rmdir()
    (root / "label_map.json").symlink_to(tmp_path / "not mounted")
    with pytest.raises(DataError, match=r"label_map\.json"):
        load(root)


# ------------------------------------------------------------------- which data set


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project to stand in; the sample is not drawn but told from its folder."""
    (tmp_path / "create_enhanced_notebook.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("emotion_toolbox.sample.draw_sample", write_sample)
    return tmp_path


DEFAULT_ROOT = EnhancedConfig().DATA_ROOT


def test_auto_without_files_draws_the_sample(project: Path) -> None:
    data = listed(make_config())
    assert data.synthetic and data.name == "synthetic sample"
    assert data.root == project / SAMPLE_ROOT
    (project / DEFAULT_ROOT).mkdir(parents=True)
    assert listed(make_config()).synthetic  # the folder is there but empty
    (project / DEFAULT_ROOT / "README.md").touch()
    assert listed(make_config()).synthetic


def test_auto_with_files_uses_them(project: Path) -> None:
    write_splits(project / DEFAULT_ROOT)
    data = listed(make_config())
    assert not data.synthetic and data.name == "EmoSet_splits"
    assert listed(make_config({"DATASET": "sample"})).synthetic


@pytest.mark.parametrize("present", [("train",), ("val", "test"), ("test",)])
def test_auto_with_some_of_the_files_is_an_error(project: Path, present: tuple[str, ...]) -> None:
    root = write_splits(project / DEFAULT_ROOT)
    absent = [s for s in SPLITS if s not in present]
    for split in absent:
        (root / f"{split}.csv").unlink()
    with pytest.raises(DataError) as caught:
        listed(make_config())
    assert f"lacks {', '.join(f'{s}.csv' for s in absent)}" in str(caught.value)
    assert "emotion_transfer prepare" in str(caught.value)
    assert "--output" not in str(caught.value)  # which would mix another set into this folder


@pytest.mark.parametrize("where", ["elsewhere", DEFAULT_ROOT])
def test_a_folder_that_was_set_is_never_replaced_by_the_sample(project: Path, where: str) -> None:
    cfg = make_config({"DATA_ROOT": where})
    assert not uses_sample(cfg.DATASET, cfg.DATA_ROOT)
    with pytest.raises(DataError, match=r"lacks train.csv, val.csv, test.csv"):
        listed(cfg)
    (project / where).mkdir(parents=True)
    with pytest.raises(DataError, match="lacks"):
        listed(make_config({"DATA_ROOT": where}, QUICK_PROFILE))


def test_dataset_files_is_never_the_sample(project: Path) -> None:
    with pytest.raises(DataError, match='DATASET="sample"'):
        listed(make_config({"DATASET": "files"}))


@pytest.mark.parametrize("what", ["folder", "file", "a file instead of a folder"])
def test_a_data_set_on_a_disk_that_is_not_mounted_is_not_replaced(project: Path, what: str) -> None:
    root = project / DEFAULT_ROOT
    root.parent.mkdir(parents=True)
    if what == "folder":
        root.symlink_to(project / "mnt" / "emoset")
    elif what == "file":
        root.mkdir()
        (root / "train.csv").symlink_to(project / "mnt" / "train.csv")
    else:
        root.write_text("the data are on the other disk")
    assert not uses_sample(make_config().DATASET, make_config().DATA_ROOT)
    with pytest.raises(DataError, match="lacks"):
        listed(make_config())


def test_a_folder_called_train_csv_is_no_file(tmp_path: Path) -> None:
    root = write_splits(tmp_path)
    (root / "train.csv").unlink()
    (root / "train.csv").mkdir()
    with pytest.raises(DataError, match=r"lacks train\.csv"):
        load(root)


def test_images_root(tmp_path: Path) -> None:
    root = write_splits(tmp_path / "set")
    inside = load(root).splits["val"]
    assert inside.path(1) == root / "val/b.jpg"
    outside = load(root, IMAGES_ROOT=str(tmp_path / "images")).splits["val"]
    assert outside.path(1) == tmp_path / "images" / "val/b.jpg"


def test_the_sample_keeps_its_own_images_root(project: Path) -> None:
    data = listed(make_config({"DATASET": "sample", "IMAGES_ROOT": "elsewhere"}))
    assert data.splits["train"].images_root == project / SAMPLE_ROOT


def test_the_quick_profile_is_valid_and_quick() -> None:
    cfg = make_config({}, QUICK_PROFILE)
    assert cfg.EPOCHS < 10 and cfg.IMG_SIZE < 224
    assert make_config({"EPOCHS": 3}, QUICK_PROFILE).EPOCHS == 3
