"""The page of the command line is what the program says of itself, and what the other pages say of it exists.

`pytest tests/test_commands_page.py --commands docs/guide/commands.md` writes the page anew.
"""

from __future__ import annotations

import re
import shlex
import typing
from collections.abc import Iterator
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from search_tools.cli import COMMANDS, command

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "guide" / "commands.md"
ON_EVERY_VERB = {"--help"}
_DEFAULT = re.compile(r" \[default: ([^\]]+)\]$")


@cache
def verbs() -> dict[str, Any]:
    """Return the commands of the program by their names, as its parser has them."""
    return {name: command(name) for name in COMMANDS}


def options(verb: str) -> set[str]:
    """Return every way to write an option of a verb."""
    written = {name for given in verbs()[verb].params for name in (*given.opts, *given.secondary_opts)}
    return {name for name in written if name.startswith("-")} | ON_EVERY_VERB


def page() -> str:
    """Return the page of all verbs and options, as Markdown."""
    lines = [
        "# The command line",
        "",
        "Every verb of `flexi` with every option. `flexi VERB --help` says the same. The guide to searching is",
        "[search.md](search.md), the one to many machines [scaling.md](scaling.md).",
        "",
        "| verb | does |",
        "|-|-|",
        *(f"| [`flexi {name}`](#flexi-{name}) | {_cell(_first_line(verb))} |" for name, verb in verbs().items()),
    ]
    for name, verb in verbs().items():
        lines += ["", f"## flexi {name}", "", *_paragraphs(verb), "", f"`{_usage(name, verb)}`", ""]
        lines += ["| option | default | what it is |", "|-|-|-|", *(_row(name, given) for given in verb.params)]
    return "\n".join([*lines, "", f"Made by `pytest tests/{Path(__file__).name} --commands docs/guide/commands.md`.", ""])


def _first_line(verb: Any) -> str:
    return verb.help.splitlines()[0].rstrip(".")


def _paragraphs(verb: Any) -> Iterator[str]:
    for number, text in enumerate(verb.help.strip().split("\n\n")):
        yield from ([""] if number else []) + [" ".join(text.split())]


def _usage(name: str, verb: Any) -> str:
    arguments = [given for given in verb.params if given.param_type_name == "argument"]
    words = [given.name.upper() + ("..." if given.nargs == -1 else "") for given in arguments]
    words = [word if given.required else f"[{word}]" for word, given in zip(words, arguments, strict=True)]
    return " ".join(["flexi", name, *words, "[OPTIONS]"])


def _row(verb: str, given: Any) -> str:
    """Return an option's or an argument's line: how it is written, what it is when left out, what it says."""
    is_argument = given.param_type_name == "argument"
    written = given.name.upper() if is_argument else ", ".join((*given.opts, *given.secondary_opts))
    text, default = given.help or "", _default(given)
    if len(told := _DEFAULT.findall(text)) == 1 and "[default" not in _DEFAULT.sub("", text):
        text, default = _DEFAULT.sub("", text), told[0]
    kind = _kind(verb, given.name)
    if isinstance(kind, type) and issubclass(kind, Enum):
        text = f"{text} One of {', '.join(choice.value for choice in kind)}."
    return f"| `{written}` | {_cell(default)} | {_cell(text)} |"


def _kind(verb: str, name: str) -> Any:
    return typing.get_type_hints(command(verb).callback)[name]


def _default(given: Any) -> str:
    """Return a default as people read it; a required argument and an option that is off have none."""
    value = given.default.value if isinstance(given.default, Enum) else given.default
    if isinstance(value, bool):
        return "on" if value else ""
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if isinstance(value, int | str | Path) else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def test_the_page_of_commands_is_what_the_program_says(request):
    file = request.config.getoption("commands")
    if file:
        Path(file).write_text(page(), encoding="utf-8")
    said, written = page().splitlines(), PAGE.read_text(encoding="utf-8").splitlines()
    changed = [line for line in said if line not in written] + [line for line in written if line not in said]
    assert said == written, f"write it anew, with --commands {PAGE.relative_to(ROOT).as_posix()}: {changed[:4]}"


def test_every_verb_and_option_has_a_line():
    text = PAGE.read_text(encoding="utf-8")
    assert len(verbs()) >= 12
    for verb in verbs():
        part = text.split(f"\n## flexi {verb}\n")[1].split("\n## ")[0]
        told = {name for line in re.findall("^[|] `(--[^`]+)`", part, re.MULTILINE) for name in line.split(", ")}
        assert told == options(verb) - ON_EVERY_VERB, verb


def code_of(text: str) -> Iterator[str]:
    """Yield each line of the code blocks of a page, without comments, and each piece of code within its lines."""
    for number, part in enumerate(re.split(r"^```.*\n", text, flags=re.MULTILINE)):
        if number % 2:
            yield from (line.split(" #")[0].strip() for line in part.splitlines())
        else:
            yield from re.findall(r"`([^`\n]+)`", part)


def unknown_in(code: str) -> list[str]:
    """Return what a line that calls `flexi` has and the program has not."""
    _, *words = shlex.split(code.replace("'", ""))
    if not words or words[0].isupper() or words[0].startswith("-"):
        return [word for word in words[:1] if word.startswith("-") and word not in ON_EVERY_VERB]
    if words[0] not in verbs():
        return words[:1]
    return [word for word in words if word.startswith("--") and word.split("=")[0] not in options(words[0])]


def test_a_verb_and_an_option_that_do_not_exist_are_seen():
    assert unknown_in("flexi serch --steps 3") == ["serch"]
    assert unknown_in("flexi search --stepz 3 --steps=4 --json") == ["--stepz"]
    assert unknown_in("flexi report NAME --no-images") == []
    assert list(code_of("a `flexi x`\n```\nflexi y  # b\n```\n`flexi z`")) == ["flexi x", "flexi y", "flexi z"]


def test_every_command_that_a_page_shows_exists():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "web").rglob("*.md")]
    calls = [(page.name, code) for page in pages for code in code_of(page.read_text(encoding="utf-8"))]
    calls = [(page, code) for page, code in calls if code.split()[:1] == ["flexi"]]
    assert len(calls) > 50
    assert not [(*call, unknown) for call in calls if (unknown := unknown_in(call[1]))]


def test_every_option_that_the_guide_names_exists():
    known = {name for verb in verbs() for name in options(verb)}
    for path in (ROOT / "docs" / "guide").glob("*.md"):
        named = [code.split()[0] for code in code_of(path.read_text(encoding="utf-8")) if code.startswith("--")]
        assert not {name.split("=")[0].rstrip(",") for name in named} - known, path.name
