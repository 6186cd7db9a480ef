"""Datasets on disk, as Hugging Face `datasets` saves them: their rows, names of classes, and what is refused.

`saved_dataset` was written by datasets 5.2.0:

    features = Features({"text": Value("string"), "label": ClassLabel(names=["negative", "positive"]), "id": Value("int64")})
    Dataset.from_dict({"text": ["so nice", "so so", "well", "bad\\nline"], "label": [1, 0, 1, 0], "id": [1, 2, 3, 4]},
                      features=features).save_to_disk("saved_dataset", num_shards=2)
"""  # noqa: E501

import json
import shutil
import sys
from pathlib import Path

import pyarrow
import pytest

from node.reading import read_records
from node.records import DataError

SAVED = Path(__file__).with_name("saved_dataset")
PAIR = ("text", "label")


@pytest.fixture
def copy(tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(SAVED, tmp_path / "copy"))


@pytest.fixture
def save(tmp_path):
    """Saves columns of any types in the same form."""

    def save_table(columns, name="made", **features):
        folder = tmp_path / name
        folder.mkdir()
        table = pyarrow.table(columns)
        with (
            pyarrow.OSFile(str(folder / "data.arrow"), "wb") as sink,
            pyarrow.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table)
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
        (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
        return folder

    return save_table


def values(paths, fields, labels=None, **columns):
    return [record.values for record in read_records(paths, fields, columns, labels)]


def test_rows_of_all_files_with_the_names_of_classes():
    expected = [
        ("so nice", "positive"),
        ("so so", "negative"),
        ("well", "positive"),
        ("bad\nline", "negative"),
    ]
    assert values([SAVED], PAIR) == expected
    places = [record.place for record in read_records([SAVED], PAIR)]
    assert places == [f"{SAVED}[{index}]" for index in range(4)]


def test_classes_are_known_by_number_to_a_task_that_knows_no_names():
    assert values([SAVED], PAIR, labels=("0", "1")) == [
        ("so nice", "1"),
        ("so so", "0"),
        ("well", "1"),
        ("bad\nline", "0"),
    ]


def test_all_classes_go_by_names_or_all_by_numbers(save):
    """Of classes named "1" and "2", a task of 0 and 1 would take both for its 1, one by name and one by number."""
    columns = {"text": ["bad", "good"], "label": [0, 1]}
    folder = save(columns, label={"_type": "ClassLabel", "names": ["1", "2"]})
    assert values([folder], PAIR, labels=("0", "1")) == [("bad", "0"), ("good", "1")]
    assert values([folder], PAIR, labels=("1", "2")) == [("bad", "1"), ("good", "2")]
    swapped = save(columns, "swapped", label={"_type": "ClassLabel", "names": ["1", "0"]})
    assert values([swapped], PAIR, labels=("0", "1")) == [("bad", "1"), ("good", "0")]
    some = save(columns, "some", label={"_type": "ClassLabel", "names": ["negative", "positive"]})
    three = ("negative", "neutral", "positive")
    assert values([some], PAIR, labels=three) == [("bad", "negative"), ("good", "positive")], (
        "fewer are there"
    )


def test_any_column_may_be_the_label_or_the_text(save):
    assert values([SAVED], PAIR, label="id")[0] == ("so nice", "1")
    folder = save(
        {"a": ["x", "y"], "b": ["good", "bad"], "c": pyarrow.array(["z", "w"], pyarrow.large_string())}
    )
    assert values([folder], PAIR, text="c", label="b") == [("z", "good"), ("w", "bad")]


def test_datasets_and_files_follow_each_other(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "first"}')
    assert [text for (text,) in values([tmp_path / "a.jsonl", SAVED], ("text",))][:2] == ["first", "so nice"]


def test_a_class_without_a_name_is_its_number(save):
    folder = save({"text": ["x", "y"], "label": [-1, 7]}, label={"_type": "ClassLabel", "names": ["a"]})
    assert values([folder], PAIR) == [("x", "-1"), ("y", "7")]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"text": ["x"], "gold": ["y"]}, r"made: no column 'label'; the columns there are 'text', 'gold'\."),
        ({"text": ["x", None], "label": [1, 1]}, r"made\[1\]: 'text' is None, not text"),
        ({"text": ["x"], "label": [0.5]}, r"made\[0\]: 'label' is 0\.5, not text"),
        ({"text": [["x"]], "label": [1]}, r"made\[0\]: 'text' is \['x'\], not text"),
        ({"text": [3], "label": [1]}, r"made\[0\]: 'text' is 3, not text"),
        ({"text": [], "label": []}, r"made: the dataset is empty"),
    ],
)
def test_what_cannot_be_used_is_said_with_the_row(save, columns, words):
    with pytest.raises(DataError, match=words):
        values([save(columns)], PAIR)


def test_of_several_splits_one_is_asked_for(copy, tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=rf"holds the splits train, test; name one, as {tmp_path}/train"):
        values([tmp_path], PAIR)


def test_a_directory_that_is_no_dataset(tmp_path):
    with pytest.raises(DataError, match="is a directory, but no dataset as `save_to_disk`"):
        values([tmp_path], PAIR)


def test_an_empty_dataset(copy):
    (copy / "state.json").write_text('{"_data_files": []}')
    with pytest.raises(DataError, match="copy: the dataset is empty"):
        values([copy], PAIR)


def test_rows_behind_a_table_of_indices_are_refused(copy):
    (copy / "state.json").write_text('{"_data_files": [], "_indices_files": [{"filename": "indices.arrow"}]}')
    with pytest.raises(DataError, match="save it again with a newer version of datasets"):
        values([copy], PAIR)


@pytest.mark.parametrize("content", [b"", b"hello", None])
def test_a_damaged_or_missing_file_is_named(copy, content):
    file = copy / "data-00001-of-00002.arrow"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow: cannot be read: "):
        values([copy], PAIR)


@pytest.mark.parametrize("cut", [100, 500, 790])
def test_a_file_that_was_cut_off_is_named(copy, cut):
    file = copy / "data-00001-of-00002.arrow"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow: cannot be read: "):
        values([copy], PAIR)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_description_is_named(copy, content):
    (copy / "state.json").write_text(content)
    with pytest.raises(DataError, match=r"state\.json: (cannot be read|is no JSON object)"):
        values([copy], PAIR)


def test_without_pyarrow_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"read with pyarrow; install it: pip install 'zo-swarm\[datasets\]'"):
        values([SAVED], PAIR)
