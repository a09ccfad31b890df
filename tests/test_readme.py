"""The README is one page that a newcomer reads: short, in short sentences, and true."""

from __future__ import annotations

import re
from pathlib import Path

from search_tools.cli import COMMANDS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
MOST_WORDS = 30


def table(after: str, text: str = TEXT) -> list[list[str]]:
    """Return the rows of the first table behind a piece of text, without its head."""
    behind = text[text.index(after) :]
    lines = re.search(r"^\|.*\n\|[-|: ]+\|\n((?:\|.*\n)+)", behind, re.MULTILINE)[1].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def sentences(text: str) -> list[str]:
    """Return the sentences of a page: of its paragraphs, points and cells; code is one word, a link what it shows."""
    text = re.sub(r"^```.*?^```$", "\n", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]+`", "code", re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", text))
    text = re.sub(r"^#+ (.*)$", r"\n\1\n", text, flags=re.MULTILINE)
    text = re.sub(r"^ *[-*] ", "\n", text, flags=re.MULTILINE)
    parts = re.split(r"\n\s*\n|\|", text)
    return [sentence for part in parts for sentence in re.split(r"(?<=[.!?])\s+", " ".join(part.split())) if sentence]


def test_it_is_one_page():
    assert 5_000 <= len(TEXT.encode()) <= 7_000


def test_sentences_are_counted_as_people_read_them():
    text = "# A b\none\ntwo. Three `x y`!\n- four [five six](x.md)\n- 0.3.4 is\n\n| a b | c. D |\n|-|-|\n```\ncode here\n```\n"
    assert sentences(text) == ["A b", "one two.", "Three code!", "four five six", "0.3.4 is", "a b", "c.", "D", "-", "-"]


def test_no_sentence_is_long():
    assert not [sentence for sentence in sentences(TEXT) if len(sentence.split()) > MOST_WORDS]


def test_it_begins_with_what_it_is_in_one_sentence():
    first = TEXT.splitlines()[2]
    assert first.startswith("Flexiffusion") and first.endswith(".") and first.count(". ") == 0


def test_its_seven_rows_are_those_that_were_measured():
    rows = table("# Flexiffusion")
    assert len(rows) == 7
    assert rows == table("|", (ROOT / "docs" / "results" / "euler-5x.md").read_text(encoding="utf-8"))


def test_it_has_one_picture():
    assert len(re.findall(r"!\[[^]]+\]\([^)]+\)", TEXT)) == 1


def test_every_node_has_a_line():
    rows = table("## Nodes")
    linked = [re.fullmatch(r"\[(Flexi [^]]+)\]\((web/docs/\w+\.md)\)", row[0]).groups() for row in rows]
    assert {page for _, page in linked} == {f"web/docs/{path.name}" for path in (ROOT / "web" / "docs").glob("*.md")}
    assert len(linked) == len(set(linked)) == 14
    for name, page in linked:
        assert (ROOT / page).read_text(encoding="utf-8").startswith(f"# {name}"), page


def test_six_commands_have_a_line():
    verbs = [re.match(r"`flexi ([\w-]+)", row[0])[1] for row in table("## Commands")]
    assert len(verbs) == len(set(verbs)) == 6
    assert set(verbs) <= set(COMMANDS)


def test_its_two_commands_are_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert re.search(rf"^make {target} ", TEXT, re.MULTILINE)
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_least_version_of_the_host_is_that_of_the_pack():
    told = re.search(r"needs ComfyUI (\d+\.\d+\.\d+) or newer", (ROOT / "__init__.py").read_text(encoding="utf-8"))[1]
    assert f"ComfyUI {told} or newer" in TEXT
