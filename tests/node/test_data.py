"""Private data: what is read and packed, which batch a sample gets, and what is refused at which line."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.data import Windows, batch, pack, read_windows
from node.records import DataError


class Letters:
    """One token per character, its code point; 0 ends a text. A stand-in that makes packing plain to see."""

    eos_token_id: int | None = 0

    def __call__(self, texts, add_special_tokens, verbose):
        assert not add_special_tokens
        assert not verbose
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


class Endless(Letters):
    eos_token_id = None


def spell(windows: Windows) -> list[str]:
    return ["".join(chr(token) if token else "|" for token in window) for window in windows.tokens]


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    return write_file


def rows(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def test_a_text_is_packed_and_the_rest_is_counted(write):
    windows = read_windows([write("a.txt", "abcdefghijk")], Letters(), 4)
    assert spell(windows) == ["abcd", "efgh"]
    assert windows.tokens.dtype == np.int32
    assert str(windows) == "1 text, 11 tokens: 2 windows of 4, 3 tokens at the end left out"


def test_rows_have_the_end_of_text_token_between_them(write):
    windows = read_windows([write("a.jsonl", rows("abc", "de", "fg"))], Letters(), 3)
    assert spell(windows) == ["abc", "|de", "|fg"]
    assert (windows.num_texts, windows.num_tokens, windows.num_dropped) == (3, 9, 0)


def test_several_files_follow_each_other_in_the_order_given(write):
    files = [write("b.jsonl", rows("xy", "z")), write("a.txt", "abc")]
    assert spell(read_windows(files, Letters(), 4)) == ["xy|z", "|abc"]
    assert spell(read_windows(files[::-1], Letters(), 4)) == ["abc|", "xy|z"]


def test_other_fields_blank_lines_windows_line_ends_and_a_byte_order_mark_are_fine(write):
    content = b'\xef\xbb\xbf{"id": 7, "text": "ab"}\r\n\r\n{"text": "cd", "more": [1]}'
    assert spell(read_windows([write("a.jsonl", content)], Letters(), 5)) == ["ab|cd"]


def test_a_line_separator_inside_a_string_does_not_end_the_row(write):
    content = '{"text": "a\u2028b"}\n'
    assert spell(read_windows([write("a.jsonl", content)], Letters(), 3)) == ["a\u2028b"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "", r"a\.txt: the file is empty"),
        ("a.jsonl", "\n \n", r"a\.jsonl: the file is empty"),
        ("a.csv", "x", r"a\.csv: rows of text are expected, as \.jsonl, \.tsv, \.txt or a saved dataset"),
        ("a.txt", b"ab\ncd\n\xff", r"a\.txt, line 3: byte 0xff at offset 6 is not UTF-8"),
        ("a.txt", b"ab\ncd\xc3", r"a\.txt, line 2: byte 0xc3 at offset 5 is not UTF-8"),
        ("a.jsonl", rows("ab") + "{", r"a\.jsonl, line 2: .*every line is an object like"),
        ("a.jsonl", rows("ab") + '\n"cd"', r"a\.jsonl, line 3: Expected `object`, got `str`"),
        ("a.jsonl", rows("ab") + '{"txt": "cd"}', r"line 2: no field 'text'; the fields there are 'txt'"),
        ("a.jsonl", '{"text": 5}', r"line 1: 'text' is 5, not text"),
        ("a.jsonl", rows("ab", " "), r"line 2: the text is empty; remove the row"),
        ("a.txt", "ab", r"a\.txt: 2 tokens do not fill one window of 4; give this node more text"),
        ("a.txt", "a", r"a\.txt: 1 token do"),
    ],
)
def test_what_cannot_be_used_is_said_with_file_and_line(write, name, content, words):
    with pytest.raises(DataError, match=words):
        read_windows([write(name, content)], Letters(), 4)


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt: no such file"):
        read_windows([tmp_path / "nowhere.txt"], Letters(), 4)


def test_a_directory(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(DataError, match=r"a\.txt: is a directory, but no dataset as `save_to_disk`"):
        read_windows([tmp_path / "a.txt"], Letters(), 4)


def test_no_file():
    with pytest.raises(DataError, match="no data file was named"):
        read_windows([], Letters(), 4)


def test_several_texts_need_an_end_of_text_token():
    assert spell(pack(["abcd"], Endless(), 4)) == ["abcd"]
    with pytest.raises(DataError, match="2 texts need an end-of-text token"):
        pack(["abcd", "efgh"], Endless(), 4)


def test_a_window_of_one_token_predicts_nothing():
    with pytest.raises(ValueError, match="sequence_length must be at least 2, got 1"):
        pack(["abc"], Letters(), 1)


@given(st.lists(st.text(min_size=1), min_size=1), st.integers(2, 9))
def test_no_token_is_lost_or_moved(texts, sequence_length):
    stream = "\0".join(texts)
    if len(stream) < sequence_length:
        with pytest.raises(DataError):
            pack(texts, Letters(), sequence_length)
        return
    windows = pack(texts, Letters(), sequence_length)
    kept = [ord(letter) for letter in stream[: windows.tokens.size]]
    assert windows.tokens.ravel().tolist() == kept
    assert windows.tokens.size + windows.num_dropped == windows.num_tokens == len(stream)
    assert windows.num_dropped < sequence_length


def numbered(num_windows: int) -> Windows:
    tokens = np.repeat(np.arange(num_windows, dtype=np.int32)[:, None], 3, axis=1)
    return Windows(tokens=tokens, num_texts=1, num_tokens=tokens.size, num_dropped=0)


def test_a_sample_names_its_batch():
    windows = numbered(100)
    once, again = batch(windows, 8, 42, 7).tokens, batch(windows, 8, 42, 7).tokens
    assert np.array_equal(once, again)
    assert once.shape == (8, 3)
    assert once.dtype == np.int64
    assert not np.array_equal(once, batch(windows, 8, 42, 8).tokens)
    assert not np.array_equal(once, batch(windows, 8, 43, 7).tokens)


@given(st.integers(1, 20), st.integers(1, 50), st.integers(0, 2**64), st.integers(0, 2**32 - 1))
def test_a_batch_repeats_no_window_more_often_than_it_must(num_windows, batch_size, seed, sample):
    chosen = batch(numbered(num_windows), batch_size, seed, sample).tokens[:, 0]
    counts = np.bincount(chosen, minlength=num_windows)
    assert counts.sum() == batch_size
    assert counts.max() - counts.min() <= 1


def test_every_window_is_met():
    windows = numbered(50)
    met = {int(token) for sample in range(100) for token in batch(windows, 8, 1, sample).tokens[:, 0]}
    assert met == set(range(50))
