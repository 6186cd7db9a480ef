"""Rows of files: which fields are found where, and in which words a bad row is refused."""

import json

import pytest

from node.reading import read_records
from node.records import DataError

PAIR = ("text", "label")


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        file = tmp_path / name
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return file

    return write_file


def values(paths, fields, **columns):
    return [record.values for record in read_records(paths, fields, columns)]


def test_a_table_names_its_columns_in_the_first_line(write):
    file = write("a.tsv", "id\tlabel\ttext\r\n7\tgood\tso nice\r\n\r\n8\tbad\tso so\r\n")
    assert values([file], PAIR) == [("so nice", "good"), ("so so", "bad")]
    assert values([file], PAIR, label="id") == [("so nice", "7"), ("so so", "8")]
    assert [record.place for record in read_records([file], PAIR)] == [f"{file}, line 2", f"{file}, line 4"]


def test_a_table_without_names_is_read_by_number(write):
    file = write("a.tsv", "so nice\t1\tmore\nso so\t0\tmore\n")
    assert values([file], PAIR, text="1", label="2") == [("so nice", "1"), ("so so", "0")]


def test_quotes_and_spaces_are_part_of_a_cell(write):
    file = write("a.tsv", 'text\tlabel\n "a" b \t1\n')
    assert values([file], PAIR) == [(' "a" b ', "1")]


def test_a_label_may_be_a_number_in_json_and_columns_have_any_names(write):
    rows = [{"sentence": "a", "gold": 1, "more": None}, {"sentence": "b", "gold": "0"}]
    file = write("a.jsonl", "\n".join(map(json.dumps, rows)))
    assert values([file], PAIR, text="sentence", label="gold") == [("a", "1"), ("b", "0")]


def test_files_of_several_kinds_follow_each_other(write):
    files = [write("b.tsv", "text\nx\ny\n"), write("a.txt", "z\n"), write("c.jsonl", '{"text": "w"}')]
    assert values(files, ("text",)) == [("x",), ("y",), ("z\n",), ("w",)]
    assert values(files[::-1], ("text",)) == [("w",), ("z\n",), ("x",), ("y",)]


@pytest.mark.parametrize(
    ("name", "content", "columns", "words"),
    [
        (
            "a.txt",
            "x",
            {},
            r"a\.txt: rows of text and label are expected, as \.jsonl, \.tsv or a saved dataset$",
        ),
        ("a.csv", "x", {}, r"a\.csv: rows of text and label are expected"),
        ("a.tsv", "", {}, r"a\.tsv: the file is empty"),
        ("a.tsv", "text\tlabel\n\n", {}, r"a\.tsv: no row follows the names of the columns"),
        (
            "a.tsv",
            "text\tgold\na\t1\n",
            {},
            r"a\.tsv: no column 'label'; the first line names 'text', 'gold'\.",
        ),
        ("a.tsv", "text\tgold\na\t1\n", {}, r"with --column label=NAME, or give all columns by number"),
        ("a.tsv", f"{'long ' * 20}\t1\n", {}, r"the first line names '(long ){7}long…', '1'"),
        ("a.tsv", "text\tlabel\na\t1\nb\n", {}, r"a\.tsv, line 3: 1 cells, the first line has 2"),
        (
            "a.tsv",
            "a\t1\nb\n",
            {"text": "1", "label": "2"},
            r"line 2: 1 cells, the first line has 2",
        ),
        ("a.tsv", "a\t1\nb\t1\tc\n", {"text": "1", "label": "2"}, r"line 2: 3 cells, the first line has 2"),
        ("a.tsv", "a\t1\n", {"text": "0", "label": "2"}, r"line 1: no column 0; there are 2, counted from 1"),
        (
            "a.jsonl",
            '{"text": "a", "gold": 1}',
            {},
            r"line 1: no field 'label'; the fields there are 'text', 'gold'",
        ),
        ("a.jsonl", "{}", {}, r"line 1: no field 'text'; the fields there are none\. .*--column text=NAME"),
        ("a.jsonl", '{"text": "a", "label": 0.5}', {}, r"line 1: 'label' is 0\.5, not text"),
        ("a.jsonl", '{"text": 1, "label": 1}', {}, r"line 1: 'text' is 1, not text"),
        ("a.jsonl", '{"text": "a", "label": null}', {}, r"line 1: 'label' is null, not text"),
        (
            "a.jsonl",
            '{"s": "a"}\n[]',
            {"text": "s", "label": "s"},
            r'line 2: .*an object like \{"s": "\.\.\."',
        ),
        ("a.tsv", b"text\tlabel\n\xff\t1", {}, r"a\.tsv, line 2: byte 0xff .* is not UTF-8"),
    ],
)
def test_what_cannot_be_used_is_said_with_file_and_line(write, name, content, columns, words):
    with pytest.raises(DataError, match=words):
        list(read_records([write(name, content)], PAIR, columns))


def test_no_file():
    with pytest.raises(DataError, match="no data file was named"):
        list(read_records([], PAIR))
