"""Files are whole or not there."""

import errno
import os
import tempfile

import pytest

from mmbivit.files import atomic_writer, check_writable, remove_parts


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


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "file.bin"
    with pytest.raises(OSError, match=r"No space left on device: '.*file\.bin'$"), atomic_writer(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("path", "folder"),
    [("folder", False), ("file/x", False), ("file/x/y", True), ("file", True), ("full/x", False), ("full/x/y", True)],
)
def test_a_path_that_cannot_be_written_is_found_before(tmp_path, monkeypatch, path, folder):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    real = tempfile.TemporaryFile

    def on_a_read_only_disk(dir):
        if dir == tmp_path / "full":  # permissions do not stop root
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(dir=dir)

    monkeypatch.setattr("tempfile.TemporaryFile", on_a_read_only_disk)
    with pytest.raises(OSError, match=f"^--out .*{path}") as caught:
        check_writable("--out", tmp_path / path, folder)
    assert "\n" not in str(caught.value)


def test_looking_whether_a_path_can_be_written_changes_nothing(tmp_path):
    (tmp_path / "file").write_text("before")
    for path, folder in (("file", False), ("new", False), ("a/b/new", False), ("a/b", True), ("", True)):
        check_writable("--out", tmp_path / path, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "before"
