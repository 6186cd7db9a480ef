"""The two texts of the demo: the same every time, and apart from each other."""

from pathlib import Path

import pytest

from node import corpus
from node.corpus import Docstring


@pytest.fixture(scope="module")
def docstrings() -> tuple[Docstring, ...]:
    return corpus.stdlib_docstrings()


@pytest.fixture(scope="module")
def topics() -> dict[str, str]:
    return corpus.pydoc_topics()


def paragraphs(text: str) -> set[str]:
    words = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return {paragraph for paragraph in words if len(paragraph) >= 60}


def library(root: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source, encoding="utf-8")
    return root


def test_docstrings_come_in_the_order_of_paths_and_lines(tmp_path: Path) -> None:
    root = library(
        tmp_path,
        {
            "b.py": '"""Module b."""\ndef f():\n    """F.\n\n    Block:\n        indented.\n    """\n',
            "a/x.py": 'class C:\n    """C."""\n    def m(self):\n        """M."""\n'
            'async def g():\n    """G."""\n',
        },
    )
    assert corpus.stdlib_docstrings(root) == (
        Docstring("a/x.py", "C."),
        Docstring("a/x.py", "M."),
        Docstring("a/x.py", "G."),
        Docstring("b.py", "Module b."),
        Docstring("b.py", "F.\n\nBlock:\n    indented."),
    )


def test_a_text_counts_once_and_an_empty_one_never(tmp_path: Path) -> None:
    source = (
        'def f():\n    """Same."""\ndef g():\n    """Same."""\ndef h():\n    """ """\ndef i():\n    pass\n'
    )
    assert corpus.stdlib_docstrings(library(tmp_path, {"a.py": source})) == (Docstring("a.py", "Same."),)


@pytest.mark.parametrize(
    "name",
    [
        "pydoc_data/topics.py",
        "site-packages/numpy/x.py",
        "test/test_os.py",
        "idlelib/idle_test/x.py",
        "lib2to3/main.py",
        "pdb.py",
    ],
)
def test_what_is_not_the_library_itself_is_not_read(tmp_path: Path, name: str) -> None:
    root = library(tmp_path, {name: '"""Not this."""\n', "os.py": '"""This."""\n'})
    assert corpus.stdlib_docstrings(root) == (Docstring("os.py", "This."),)


def test_files_are_parsed_and_not_run(tmp_path: Path) -> None:
    root = library(tmp_path, {"a.py": '"""A."""\nraise SystemExit("was imported")\nx = "\\d"\n'})
    assert corpus.stdlib_docstrings(root) == (Docstring("a.py", "A."),)


def test_a_library_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no docstrings under .*; use a Python installation that has"):
        corpus.stdlib_docstrings(tmp_path)


def test_the_real_library_gives_the_same_docstrings_again(docstrings: tuple[Docstring, ...]) -> None:
    assert corpus.stdlib_docstrings() == docstrings
    assert len({text for _, text in docstrings}) == len(docstrings) > 3000
    assert sum(len(text) for _, text in docstrings) > 1_000_000


def test_no_paragraph_of_the_topics_is_among_the_docstrings(
    docstrings: tuple[Docstring, ...], topics: dict[str, str]
) -> None:
    everything = " ".join(" ".join(text.split()) for _, text in docstrings)
    private = set().union(*map(paragraphs, topics.values()))
    assert len(private) > 500
    seen = sorted(paragraph for paragraph in private if paragraph in everything)
    # Another Python may share a sentence between library and reference; a file of it must not slip in.
    assert sum(map(len, seen)) <= 0.002 * sum(map(len, private)), seen


def test_topics_are_the_reference_without_trailing_blanks(topics: dict[str, str]) -> None:
    assert list(topics) == sorted(topics)
    assert {"assert", "compound", "strings", "with"} <= topics.keys()
    assert topics["assert"].startswith('The "assert" statement')
    assert all(
        text == "\n".join(line.rstrip() for line in text.strip().split("\n")) for text in topics.values()
    )


def test_a_paragraph_stays_in_the_largest_topic_that_has_it() -> None:
    shared, own = (
        "a sentence that stands in two of the topics",
        "a sentence of the small topic alone, so it stays",
    )
    topics = {"large": f"{shared}\n\n{'x ' * 60}", "part": shared, "small": f"Note:\n\n{shared}\n\n{own}"}
    assert corpus.distinct_topics(topics) == {"large": topics["large"].strip(), "small": f"Note:\n\n{own}"}


@pytest.mark.parametrize("num_nodes", [1, 4, 8])
def test_every_topic_has_one_place(topics: dict[str, str], num_nodes: int) -> None:
    by_node, held_out = corpus.split_topics(topics, num_nodes, 0.15)
    parts = [*by_node, held_out]
    assert len(by_node) == num_nodes
    assert all(parts)
    names = [name for part in parts for name in part]
    assert sorted(names) == sorted(set(names)) == list(corpus.distinct_topics(topics))
    private = [set().union(*map(paragraphs, part.values())) for part in parts]
    assert len(set().union(*private)) == sum(map(len, private))


def test_nodes_have_equally_much_and_the_share_is_held_out(topics: dict[str, str]) -> None:
    by_node, held_out = corpus.split_topics(topics, 4, 0.15)
    characters = [sum(map(len, part.values())) for part in by_node]
    assert max(characters) < 1.05 * min(characters)
    share = sum(map(len, held_out.values())) / (sum(characters) + sum(map(len, held_out.values())))
    assert 0.1 < share <= 0.15
    assert len(held_out) >= 4


def test_the_split_depends_on_nothing_but_its_arguments(topics: dict[str, str]) -> None:
    backwards = dict(reversed(topics.items()))
    assert corpus.split_topics(backwards, 4, 0.15) == corpus.split_topics(topics, 4, 0.15)


@pytest.mark.parametrize("count", [0, 7])
def test_a_whole_number_of_topics_can_be_held_out(topics: dict[str, str], count: int) -> None:
    assert len(corpus.split_topics(topics, 3, count)[1]) == count


@pytest.mark.parametrize(
    ("num_nodes", "held_out", "message"),
    [
        (0, 0.1, "num_nodes must be at least 1, got 0"),
        (2, 1.0, "between 0 and 1, or a whole number of topics, got 1.0"),
        (2, float("nan"), "between 0 and 1, or a whole number of topics, got nan"),
        (2, -1, "held_out must be a number of topics or a share between 0 and 1, got -1"),
        (3, 1, "3 nodes need as many topics, but 2 of 3 are left; hold out fewer"),
    ],
)
def test_an_impossible_split_is_refused(num_nodes: int, held_out: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        corpus.split_topics({"a": "text of a", "b": "text of b", "c": "text of c"}, num_nodes, held_out)


def test_the_digest_tells_where_one_text_ends() -> None:
    assert corpus.digest(["ab", "c"]) != corpus.digest(["a", "bc"])
    assert corpus.digest([]) == "cae66941d9efbd404e4d88758ea67670"  # BLAKE2b-128 of nothing
