"""Files are written whole or not at all."""

import os

import pytest

from flexi_core.files import replace_file, write_text


def test_the_file_appears_when_the_block_ends_and_not_before(tmp_path):
    path = tmp_path / "a.bin"
    with replace_file(path) as temporary:
        temporary.write_bytes(b"new")
        assert temporary.parent == tmp_path  # a rename is atomic within one folder only
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_in_the_block_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="half way"), replace_file(path) as temporary:
        temporary.write_bytes(b"ne")
        raise RuntimeError("half way")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt), replace_file(tmp_path / "a.bin"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError), replace_file(tmp_path / "none" / "a.bin"):
        pytest.fail("the block ran")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_file_is_as_readable_as_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        with replace_file(tmp_path / "a.bin") as temporary:
            temporary.write_bytes(b"x")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (tmp_path / "a.bin").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_text_is_written_whole_in_a_folder_that_is_made(tmp_path):
    path = tmp_path / "new" / "page.md"
    write_text(path, "grün\n")
    assert path.read_text(encoding="utf-8") == "grün\n" and [*path.parent.iterdir()] == [path]


def test_what_a_killed_write_left_goes_with_the_next_one_and_another_writers_stays(tmp_path):
    left, at_work, others = (tmp_path / f".{name}.part" for name in ("s.json.abc", "s.json.def", "t.json.abc"))
    for file in (left, at_work, others):
        file.write_text("half")
    for file in (left, others):
        os.utime(file, (0, 0))
    write_text(tmp_path / "s.json", "whole")
    assert {file.name for file in tmp_path.iterdir()} == {"s.json", at_work.name, others.name}
