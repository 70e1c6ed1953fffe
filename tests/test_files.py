"""Files are whole or not there."""

import pytest

from mmbivit.files import atomic_writer, remove_parts


def test_content_appears_at_the_end(tmp_path):
    path = tmp_path / "new" / "file.bin"
    with atomic_writer(path) as file:
        file.write(b"content")
        assert not path.exists()
    assert path.read_bytes() == b"content"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "file.bin"
    path.write_bytes(b"before")
    with pytest.raises(error), atomic_writer(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_only_our_temporary_files_are_removed(tmp_path):
    names = ["a.pth", "a.pth.12.part", "b.part", "c.12.part.txt", "last_checkpoint.7.part"]
    for name in names:
        (tmp_path / name).touch()
    assert sorted(path.name for path in remove_parts(tmp_path)) == ["a.pth.12.part", "last_checkpoint.7.part"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "b.part", "c.12.part.txt"]
