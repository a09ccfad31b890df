"""The pages of the project: what they point at exists, and every page is found from an index."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS, RESULTS, HELP = ROOT / "docs", ROOT / "docs" / "results", ROOT / "web" / "docs"
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder, pattern in (("", "*.md"), ("docs", "**/*.md"), ("web/docs", "**/*.md"), ("benchmarks", "*.md"))
    for path in (ROOT / folder).glob(pattern)
)
PACKAGES = ("flexi_core", "search_tools", "nodes")
_OTHER_PLACES = ("http://", "https://", "mailto:")


def prose(text: str) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)


def links(text: str) -> list[str]:
    """Return where the links and pictures of a page lead."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(text)))


def anchors(text: str) -> set[str]:
    """Return the places of a page that can be linked, as GitHub names its headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *$", prose(text), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug, number = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"), 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found


def broken(path: Path, text: str) -> Iterator[str]:
    """Yield the links of a page that lead nowhere."""
    # The host takes the links of a node's page in another language from where the English one is.
    folder = HELP if path.parent.parent == HELP else path.parent
    for link in links(text):
        if link.startswith(_OTHER_PLACES):
            continue
        target, _, anchor = link.partition("#")
        file = (folder / target).resolve() if target else path
        if not _is_there(file) or (anchor and anchor not in anchors(text if file == path else _text(file))):
            yield link


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _is_there(file: Path) -> bool:
    """Return whether a file is there under this very name, as systems that tell cases apart ask for it."""
    return file == ROOT or (file.is_relative_to(ROOT) and file.name in _names(file.parent))


@cache
def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def test_a_link_to_nowhere_is_seen():
    page = "# One & two\n## `a_b` (c)\n[x](#one--two) [y](#a_b-c) [z](nowhere.md) [w](#three) [v](readme.md)"
    page += "\n```\n[u](code.md)\n```\n"
    assert list(broken(ROOT / "README.md", page)) == ["nowhere.md", "#three", "readme.md"]


def test_every_link_leads_somewhere():
    found = {page: list(broken(ROOT / page, _text(ROOT / page))) for page in PAGES}
    assert not {page: links for page, links in found.items() if links}


def test_every_page_and_picture_that_the_program_names_exists():
    found = []
    for path in [p for folder in (*PACKAGES, "web", "locales") for p in (ROOT / folder).rglob("*")]:
        if path.suffix in (".py", ".js", ".json", ".md", ".j2"):
            names = re.findall(r"\bdocs/[\w/-]+\.(?:md|json|png)\b", _text(path))
            found += [(path.relative_to(ROOT).as_posix(), name) for name in names]
    assert len(found) > 5
    assert not [(file, name) for file, name in found if not (ROOT / name).is_file()]


def test_every_page_of_the_docs_is_in_an_index():
    for index, folders in ((DOCS / "README.md", (DOCS, DOCS / "guide")), (RESULTS / "README.md", (RESULTS,))):
        listed = {(index.parent / link.partition("#")[0]).resolve() for link in links(_text(index))}
        pages = {path for folder in folders for path in folder.glob("*.md")} - {index}
        assert not pages - listed


def test_every_page_says_first_what_it_is_about():
    assert not [page for page in PAGES if not re.match(r"# \w.*\n\n", _text(ROOT / page))]


def test_results_name_what_made_them():
    named = [
        (page.name, script)
        for page in RESULTS.glob("*.md")
        for script in re.findall(r"python (benchmarks/\w+\.py)", _text(page))
    ]
    assert len(named) > 20
    assert not [(page, script) for page, script in named if not (ROOT / script).is_file()]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_writes_its_results_where_the_others_are(path):
    text = _text(path)
    for place in re.findall(r"^(?:RESULTS|PAGE|VERDICTS, PAGE) = (.+)$", text, re.MULTILINE):
        assert re.search(r'"docs" / "results"|"docs/results/|^\(RESULTS ', place), place


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/extending.md", "CONTRIBUTING.md"])
def test_every_file_and_name_that_a_page_for_developers_has_exists(page):
    text = _text(ROOT / page)
    code = re.findall(r"`([^`\n]+)`", text)
    files = [name for name in code if re.fullmatch(r"[\w./-]+(\.\w+|/)", name) and "/" in name]
    assert len(files) > 3
    assert not [name for name in files if not (ROOT / name).exists()]
    modules = {path.name for folder in (*PACKAGES, "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")}
    assert not set(re.findall(r"\b\w+\.py\b", text)) - modules  # in pictures too
    names = {name for name in code if re.fullmatch(r"_?[A-Za-z]\w*", name)} | set(re.findall(r"\.py: (\w+)", text))
    assert not names - _words()


@cache
def _words() -> frozenset[str]:
    """Return every word of the project's code, its tests and its settings."""
    files = [path for folder in (*PACKAGES, "tests", "web") for path in (ROOT / folder).rglob("*")]
    files += [ROOT / "pyproject.toml", ROOT / "Makefile", ROOT / ".comfyignore"]
    kinds = (".py", ".js", ".j2", ".toml", "")
    texts = (_text(path) for path in files if path.is_file() and path.suffix in kinds)
    return frozenset(word for text in texts for word in re.findall(r"\w+", text))
