"""The documents against the code: what they name exists, what they claim about bytes and codes is so."""

import ast
import re
import shlex
from pathlib import Path
from typing import get_args, get_type_hints

import msgspec
import pytest
import typer

import benchmarks.bandwidth.cli
import coordinator.cli
import node.cli
from coordinator.membership import TRANSITIONS, Presence
from transport import exits, messages
from transport.exits import Exit
from zo import commit
from zo.manifest import Manifest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [
        *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(ROOT / "docs").glob("*.md"),
    ]
)
GUIDE = ROOT / "docs" / "guide.md"
PROTOCOL = ROOT / "docs" / "protocol.md"
PROGRAMS = {
    "zo-coordinator": coordinator.cli.app,
    "zo-node": node.cli.app,
    "zo-bench": benchmarks.bandwidth.cli.app,
}
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def each_document(function):
    return pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)(function)


def blocks(text, *kinds):
    return [content for kind, content in FENCE.findall(text) if kind.split(" ")[0] in kinds]


def spans(text):
    """Inline code outside of code blocks, line breaks taken out."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def options_by_command(program):
    group = typer.main.get_command(PROGRAMS[program])
    return {
        name: {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
        | {"--help"}
        for name, command in group.commands.items()
    }


def command_lines(text):
    """(program, rest) of every call of our programs in shell blocks and inline code."""
    lines = [line for block in blocks(text, "sh") for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *spans(text)]:
        # The quoted arguments of other programs are no calls: kill -9 $(pgrep -f 'zo-node join').
        found = re.match(r"(?:\S*/)?(zo-coordinator|zo-node|zo-bench)\s+([a-z].*)$", line.strip())
        if found:
            yield found.group(1), re.split(r"\s[|&;#]", found.group(2))[0]


def sections(text):
    """(title, body) of every heading."""
    parts = re.split(r"^#{1,6} (.*)$", FENCE.sub("", text), flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def anchor(title):
    """How a heading is linked to on the usual forges."""
    plain = re.sub(r"[`*]", "", title).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


@each_document
def test_every_command_and_option_exists(document):
    for program, rest in command_lines(document.read_text("utf-8")):
        command, *arguments = shlex.split(rest)
        known = options_by_command(program)
        assert command in known, f"{program} {rest}"
        for argument in arguments:
            if re.match(r"--?[a-z]", argument):
                assert argument.partition("=")[0] in known[command], f"{program} {rest}"


@each_document
def test_every_option_named_alone_belongs_to_some_command(document):
    known = {
        option
        for program in PROGRAMS
        for options in options_by_command(program).values()
        for option in options
    }
    ours = known | {"--json", "--quick", "--out", "--again"}  # of the benchmarks
    for span in spans(document.read_text("utf-8")):
        if span.startswith("--"):
            assert span.split()[0] in ours, span


def test_the_guide_shows_every_command():
    text = GUIDE.read_text("utf-8") + (ROOT / "docs" / "bandwidth.md").read_text("utf-8")
    shown = {(program, rest.split()[0]) for program, rest in command_lines(text)}
    for program in PROGRAMS:
        for command in options_by_command(program):
            if (program, command) != ("zo-node", "demo"):  # shown as `make demo`
                assert (program, command) in shown


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for document in DOCUMENTS:
        text = document.read_text("utf-8")
        lines = [line for block in blocks(text, "sh") for line in block.splitlines()]
        for line in [*lines, *spans(text)]:
            if found := re.match(r"make ([a-z]+)\b", line):
                assert found.group(1) in targets, line


@each_document
def test_links_between_documents_resolve(document):
    text = FENCE.sub("", document.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, fragment = target.partition("#")
        file = (document.parent / name).resolve() if name else document
        assert file.exists(), target
        if fragment:
            assert fragment in {anchor(title) for title, _ in sections(file.read_text("utf-8"))}, target


@each_document
def test_files_that_are_named_exist(document):
    for span in spans(document.read_text("utf-8")):
        if re.fullmatch(r"(zo|transport|coordinator|node|benchmarks|tests|docs)/[\w./]+\.\w+", span):
            assert (ROOT / span).exists(), span


@each_document
def test_modules_that_are_run_exist(document):
    for module in re.findall(r"python -m ([a-z_.]+)", document.read_text("utf-8")):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module


def test_the_file_tree_lists_what_is_there():
    (tree,) = [
        block
        for block in blocks((ROOT / "CONTRIBUTING.md").read_text("utf-8"), "text")
        if block.startswith("zo/")
    ]
    folder = ROOT
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = ROOT / name
            assert folder.is_dir(), line
        else:
            assert (folder / name).exists(), line


def test_tests_that_are_named_exist():
    written = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text("utf-8"), re.MULTILINE)
    }
    for document in DOCUMENTS:
        named = {span for span in spans(document.read_text("utf-8")) if re.fullmatch(r"test_\w+", span)}
        assert named <= written, named - written


def test_the_exit_codes_are_those_of_the_code():
    """The meaning in the guide is the docstring in exits.py, word for word."""
    meaning_by_name = {}
    (definition,) = [
        item
        for item in ast.parse(Path(exits.__file__).read_text("utf-8")).body
        if isinstance(item, ast.ClassDef)
    ]
    for item, after in zip(definition.body, [*definition.body[1:], None], strict=True):
        if isinstance(item, ast.Assign):
            says = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            meaning_by_name[item.targets[0].id] = " ".join(after.value.value.split()) if says else None
    body = dict(sections(GUIDE.read_text("utf-8")))["Exit codes"]
    rows = re.findall(r"^\| (\d+) \| `?(\w*)`? \| (.*?) \|$", body, re.MULTILINE)
    assert [int(code) for code, _, _ in rows] == sorted({*map(int, Exit), 1, 2})
    for code, name, meaning in rows:
        if int(code) in set(Exit):
            assert name == Exit(int(code)).name
            assert meaning_by_name[name] in (None, meaning)


def test_the_transitions_are_those_of_the_members():
    body = dict(sections((ROOT / "ARCHITECTURE.md").read_text("utf-8")))["State machines"]
    documented = {
        (Presence(each.strip()), Presence(after))
        for before, after in re.findall(r"^\| ([a-z, ]+) \| .* \| ([a-z]+) \|$", body, re.MULTILINE)
        if before != "from"
        for each in before.split(",")
    }
    assert documented == {(before, after) for (before, _), after in TRANSITIONS.items()}


def test_the_fields_of_the_manifest_are_those_of_the_code():
    """The meanings are the descriptions in zo/manifest.py, word for word."""
    expected = []
    for section in msgspec.structs.fields(Manifest):
        if issubclass(getattr(section.type, "__origin__", section.type), msgspec.Struct):
            hints = get_type_hints(section.type, include_extras=True)
            expected += [(f"{section.name}.{name}", description(hint)) for name, hint in hints.items()]
        else:
            expected.append((section.name, description(section.type)))
    body = dict(sections(PROTOCOL.read_text("utf-8")))["The manifest"]
    assert re.findall(r"^\| ([a-z_.]+) \| (.+) \|$", body, re.MULTILINE) == expected


def description(hint):
    metas = [each for each in hint.__metadata__ if isinstance(each, msgspec.Meta)]
    return next(each.description for each in metas if each.description)


def message_types():
    """Every message there is, by name; what is only a part of another has no tag, and is no extension."""
    candidates = [*vars(messages).values(), *vars(commit).values()]
    return {
        each.__name__: each
        for each in candidates
        if isinstance(each, type)
        and issubclass(each, msgspec.Struct)
        and (each.__struct_config__.tag is not None or each in (messages.Report, messages.Brief))
    }


def test_the_tags_are_those_of_the_messages():
    headings = [title for title, _ in sections(PROTOCOL.read_text("utf-8"))]
    documented = dict(re.findall(r"(\w+) \(tag (\d+)", "\n".join(headings)))
    extended = set(re.findall(r"(\w+) \(extension, ", "\n".join(headings)))
    tags = {name: each.__struct_config__.tag for name, each in message_types().items()}
    assert documented == {name: str(tag) for name, tag in tags.items() if tag is not None}
    assert extended == {name for name, tag in tags.items() if tag is None}


def test_the_fields_are_those_of_the_messages():
    for title, body in sections(PROTOCOL.read_text("utf-8")):
        if found := re.match(r"(\w+) \((?:tag \d+|extension), ", title):
            _, _, table = body.partition("| field | type | |\n")
            rows = re.findall(r"^\| (\w+) \|", table.partition("\n\n")[0], re.MULTILINE)
            assert rows == list(message_types()[found.group(1)].__struct_fields__), title


def test_every_message_has_examples_that_are_its_bytes():
    seen = set()
    for kind, content in FENCE.findall(PROTOCOL.read_text("utf-8")):
        if not kind.startswith("hex "):
            continue
        name = kind.split()[1]
        frame = bytes.fromhex(content)
        kind = message_types()[name]
        if kind is commit.Revert:  # never a frame of its own
            assert msgspec.msgpack.encode(msgspec.msgpack.decode(frame, type=kind)) == frame
        else:
            is_from_node = kind in get_args(messages.FromNode)
            decode = messages.decode_from_node if is_from_node else messages.decode_from_coordinator
            assert type(decode(frame)) is kind
            assert messages.encode(decode(frame)) == frame
        seen.add(name)
    assert seen == set(message_types())


@each_document
def test_documents_are_about_the_project_alone(document):
    """No path of a developer's machine, and lines that a terminal can show."""
    text = document.read_text("utf-8")
    assert not re.search(r"(?<![\w.~-])/(work|tmp|home|root)/", text)
    assert max(map(len, FENCE.sub("", text).splitlines())) < 400
