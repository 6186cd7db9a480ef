"""What the commands of benchmarks have in common: how they explain themselves, and where their figures go."""

import argparse
import json
import shutil
import sys
from pathlib import Path
from textwrap import fill
from typing import Any, Final

from rich.console import Console
from rich.table import Table

DIRECTORY: Final = Path("docs/results")


def command_line(name: str, about: str) -> argparse.ArgumentParser:
    """A benchmark's command line, its documentation as the help.

    Args:
        name: its module's.
        about: its module's documentation; paragraphs are wrapped to the terminal, what is indented is left as it is.
    """
    width = shutil.get_terminal_size().columns - 2
    paragraphs = (each if each.startswith(" ") else fill(each, width) for each in about.strip().split("\n\n"))
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description="\n\n".join(paragraphs),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_json(to: argparse.ArgumentParser) -> None:
    """The option to print figures as JSON."""
    to.add_argument("--json", action="store_true", help="print one JSON object instead")


def add_out(to: argparse.ArgumentParser, what: str, default: Path | None = None) -> None:
    """The option to keep figures in a directory, the repository's if it is not named.

    Args:
        to: a benchmark's command line.
        what: what is kept, as in "join.json and join.md".
        default: where they are kept without the option; nowhere if None.
    """
    without = "" if default is None else f"; without it, in {default}"
    to.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        nargs="?",
        const=DIRECTORY,
        default=default,
        help=f"keep {what} in DIR ({DIRECTORY}){without}",
    )


def deliver(
    name: str, figures: dict[str, Any], page: str, options: argparse.Namespace, shown: Table | str
) -> None:
    """Write figures and their page if that was asked for, and print them.

    Args:
        name: of the files.
        figures: all there is.
        page: the same in Markdown.
        options: of a command line with `--json`, and with or without `--out`.
        shown: what is printed, if JSON was not asked for.
    """
    folder: Path | None = getattr(options, "out", None)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
        (folder / f"{name}.md").write_text(page, "utf-8")
    if options.json:
        sys.stdout.write(json.dumps(figures) + "\n")
    elif isinstance(shown, str):
        sys.stdout.write(shown.rstrip("\n") + "\n")
    else:
        Console().print(shown)
