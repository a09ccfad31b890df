"""Names and help in every language: nothing is missing, nothing is left over, and every page shows what it is about."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOCALES, DOCS = ROOT / "locales", ROOT / "web" / "docs"
LANGUAGES = {"en", "zh", "ja", "es"}
NODES = re.findall(r'node_id="(\w+)"', "".join(path.read_text(encoding="utf-8") for path in (ROOT / "nodes").glob("*.py")))
PAGES = [DOCS / f"{node}.md" for node in NODES]
PAGES += [DOCS / node / f"{language}.md" for node in NODES for language in sorted(LANGUAGES - {"en"})]
LARGEST_PICTURE = 80_000  # bytes
OWN_MARKS = {"zh": r"[\u4e00-\u9fff]", "ja": r"[\u3040-\u30ff]", "es": r"\b(de|el|la|los|con|que|un|en|sin|se)\b"}
# What the page's own message format reads: a name in braces, a linked message, plural forms.
MARKS = re.compile(r"\{'[|@]'\}")


def words(language, file="nodeDefs.json"):
    """Return a language's texts by their dotted keys."""

    def flat(value, prefix):
        if isinstance(value, str):
            return {prefix: value}
        return {key: text for name, inner in value.items() for key, text in flat(inner, f"{prefix}.{name}").items()}

    return flat(json.loads((LOCALES / language / file).read_text(encoding="utf-8")), file)


def test_the_languages_are_there_with_the_same_files():
    files = {folder.name: {path.name for path in folder.iterdir()} for folder in LOCALES.iterdir()}
    assert set(files) == LANGUAGES
    assert all(found == files["en"] for found in files.values())


@pytest.mark.parametrize("language", sorted(LANGUAGES - {"en"}))
def test_every_text_of_english_is_in_the_language_and_no_other(language):
    for path in (LOCALES / "en").iterdir():
        english, found = words("en", path.name), words(language, path.name)
        assert set(english) - set(found) == set(), "missing"
        assert set(found) - set(english) == set(), "left over"
        assert all(text.strip() for text in found.values())


@pytest.mark.parametrize("language", sorted(OWN_MARKS))
def test_descriptions_and_tooltips_are_in_their_language(language):
    texts = {key: text for key, text in words(language).items() if key.endswith(("description", "tooltip"))}
    assert len(texts) > 40
    long = {key: text for key, text in texts.items() if len(text) > 40}
    assert not [key for key, text in long.items() if not re.search(OWN_MARKS[language], text)]


@pytest.mark.parametrize("language", sorted(LANGUAGES))
def test_no_text_has_a_mark_that_the_page_reads_as_its_own(language):
    for key, text in words(language).items():
        assert not re.search(r"[{}|@]", MARKS.sub("", text)), key
        english = words("en")[key]
        assert sorted(MARKS.findall(text)) == sorted(MARKS.findall(english)), key


@pytest.mark.parametrize("language", sorted(LANGUAGES - {"en"}))
def test_numbers_papers_and_choices_are_those_of_english(language):
    told = re.compile(r"arXiv \d+\.\d+|\b\d+(?:\.\d+)?x\b|models/flexi_schedules(?:/tuned)?|all-full|deepcache|32x32")
    for key, english in words("en").items():
        assert set(told.findall(words(language)[key])) == set(told.findall(english)), key


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_every_node_has_help_with_a_picture_an_example_and_when_not_to_use_it(page):
    text = page.read_text(encoding="utf-8")
    node = page.stem if page.parent == DOCS else page.parent.name
    title = words("en" if page.parent == DOCS else page.stem)[f"nodeDefs.json.{node}.display_name"]
    assert text.startswith(f"# {title}\n")
    assert re.findall(r"!\[[^\]]+\]\((.+?)\)", text) == [f"pictures/{node}.png"]
    assert len(re.findall(r"^## .+$", text, re.MULTILINE)) >= 2


def test_every_page_of_help_is_of_a_node_and_every_picture_is_small():
    assert {path for path in DOCS.rglob("*.md")} == set(PAGES)
    pictures = set((DOCS / "pictures").iterdir())
    assert {path.name for path in pictures} == {f"{node}.png" for node in NODES}
    assert all(path.stat().st_size < LARGEST_PICTURE for path in pictures)


@pytest.mark.parametrize("node", NODES)
def test_help_in_every_language_has_the_same_codes_and_letters(node):
    codes = {
        page: set(re.findall(r"`([^`]+)`", page.read_text(encoding="utf-8")))
        for page in PAGES
        if node in page.parts or page.stem == node
    }
    english = codes.pop(DOCS / f"{node}.md")
    assert len(codes) == 3
    for page, found in codes.items():
        assert found == english, page


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_help_in_every_language_has_as_many_points_and_sections(page):
    english = page if page.parent == DOCS else page.parent.with_suffix(".md")
    counts = [
        [len(re.findall(sign, path.read_text(encoding="utf-8"), re.MULTILINE)) for sign in (r"^- ", r"^## ", r"^\| ")]
        for path in (page, english)
    ]
    assert counts[0] == counts[1]
