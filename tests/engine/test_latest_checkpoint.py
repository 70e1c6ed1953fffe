"""Which checkpoint a run goes on from."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from mmbivit.engine import find_resumable_checkpoint, latest_checkpoint


@pytest.fixture
def messages(monkeypatch):
    """What is logged."""
    found = []
    monkeypatch.setattr(latest_checkpoint, "print_log", lambda message, *args: found.append(message))
    return found


def save(path: Path, without: str = "", **meta) -> Path:
    hub = dict(log_scalars={}, runtime_info={}, resumed_keys={})
    content = dict(state_dict={}, optimizer={}, message_hub=hub, meta=dict(epoch=1, iter=1) | meta)
    torch.save({key: value for key, value in content.items() if key != without}, path)
    return path


@pytest.fixture
def work_dir(tmp_path):
    """Three checkpoints, of which a relative pointer names the second."""
    folder = tmp_path / "run"
    folder.mkdir()
    for epoch in (2, 9, 10):
        save(folder / f"epoch_{epoch}.pth")
    (folder / "last_checkpoint").write_text("epoch_9.pth")
    return folder


def test_the_pointer_says_which(work_dir, tmp_path, monkeypatch, messages):
    assert find_resumable_checkpoint(work_dir) == work_dir / "epoch_9.pth"
    (work_dir / "last_checkpoint").write_text(str(work_dir / "epoch_2.pth"))  # as MMEngine writes it
    assert find_resumable_checkpoint(work_dir) == work_dir / "epoch_2.pth"
    monkeypatch.chdir(tmp_path)
    (work_dir / "last_checkpoint").write_text("run/epoch_2.pth\n")  # MMEngine's, of a relative work directory
    assert find_resumable_checkpoint("run") == Path("run/epoch_2.pth")
    assert messages == []


@pytest.mark.parametrize("pointer", ["epoch_9.pth", "{}/epoch_9.pth"])
def test_a_work_directory_may_be_moved(work_dir, tmp_path, pointer):
    (work_dir / "last_checkpoint").write_text(pointer.format(work_dir))
    shutil.move(work_dir, tmp_path / "moved")
    assert find_resumable_checkpoint(tmp_path / "moved") == tmp_path / "moved" / "epoch_9.pth"


def test_checkpoints_may_be_elsewhere(work_dir, tmp_path):
    other = tmp_path / "other" / "run"
    other.mkdir(parents=True)
    save(other / "epoch_3.pth")
    (work_dir / "last_checkpoint").write_text("../other/run/epoch_3.pth")
    assert find_resumable_checkpoint(work_dir).samefile(other / "epoch_3.pth")
    (other / "epoch_3.pth").write_bytes(b"")
    save(other / "epoch_2.pth")
    assert find_resumable_checkpoint(work_dir).samefile(other / "epoch_2.pth")
    (work_dir / "last_checkpoint").write_text("s3://bucket/run/epoch_3.pth")
    assert find_resumable_checkpoint(work_dir) == "s3://bucket/run/epoch_3.pth"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is no checkpoint, or not all of one"),
        (lambda path: path.write_bytes(b""), "is no checkpoint, or not all of one"),
        (Path.unlink, "does not exist"),
        (lambda path: save(path, without="optimizer"), "not its state (no optimizer)"),
        (lambda path: save(path, without="meta"), "not its state (no meta)"),
    ],
)
def test_the_newest_that_loads_is_taken_and_said(work_dir, damage, reason, messages):
    damage(work_dir / "epoch_9.pth")
    save(work_dir / "best_coco_bbox_mAP_epoch_11.pth", without="optimizer")  # what is best cannot be resumed
    assert find_resumable_checkpoint(work_dir) == work_dir / "epoch_10.pth"
    (out,) = messages
    assert "Going on from" in out and re.search(rf"epoch_9.pth:? .*{re.escape(reason)}", out) and "best_coco" in out


@pytest.mark.parametrize("pointer", [None, "", "\0", "\n", "no such file"])
def test_without_a_pointer_too(work_dir, pointer, messages):
    if pointer is None:
        (work_dir / "last_checkpoint").unlink()
    else:
        (work_dir / "last_checkpoint").write_text(pointer)
    assert find_resumable_checkpoint(work_dir) == work_dir / "epoch_10.pth"  # not 9, which comes last by name
    assert len(messages) == 1 and messages[0].startswith("Going on from")


def test_names_without_numbers_are_sorted_by_time(tmp_path):
    for age, name in enumerate(("new", "old", "older")):
        os.utime(save(tmp_path / f"{name}.pth"), (1e9 - age, 1e9 - age))
    assert find_resumable_checkpoint(tmp_path) == tmp_path / "new.pth"


def test_nothing_is_none_and_nothing_that_loads_is_an_error(tmp_path):
    assert find_resumable_checkpoint(tmp_path) is None
    assert find_resumable_checkpoint(tmp_path / "no such folder") is None
    (tmp_path / "epoch_1.pth").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"nothing in .* can be resumed: .*epoch_1.pth is no checkpoint"):
        find_resumable_checkpoint(tmp_path)
