"""Which errors become one line."""

import re
from pathlib import Path

import mmengine
import pytest
from mmengine.registry import MODELS
from PIL import Image
from torch.utils.data import DataLoader

from mmbivit.apis import UnusableImagesError, user_errors
from mmbivit.apis.config import load_config
from mmbivit.datasets import TimmDataset
from mmbivit.models.arch import check_arch


def line(capsys, action):
    with pytest.raises(SystemExit) as stop, user_errors():
        action()
    assert stop.value.code == 1
    return capsys.readouterr().err


def test_files_and_our_own_checks_become_one_line(capsys, monkeypatch):
    monkeypatch.delenv("MMBIVIT_DEBUG", raising=False)
    assert line(capsys, lambda: load_config("no/such.py")) == "error: config no/such.py does not exist\n"
    assert line(capsys, lambda: check_arch("huge")).startswith("error: arch='huge' is unknown; allowed: 'tiny'")
    assert (
        line(capsys, Path("no/such/file").read_text) == "error: [Errno 2] No such file or directory: 'no/such/file'\n"
    )


def test_each_image_that_cannot_be_used_is_a_line(capsys, monkeypatch):
    monkeypatch.setattr("mmbivit.apis.errors.is_user_error", lambda error: True)

    def fail():
        raise UnusableImagesError([], {Path("a.png"): "a.png is empty", Path("b.png"): "b.png is no image"})

    assert line(capsys, fail) == "error: a.png is empty\nerror: b.png is no image\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_names_the_file(capsys):
    expected = "error: [Errno 28] No space left on device: '/dev/full'\n"
    assert line(capsys, lambda: Path("/dev/full").write_text("x")) == expected
    assert line(capsys, lambda: mmengine.dump({"x": 1}, "/dev/full", file_format="json")) == expected


def test_unknown_type_in_a_config_becomes_one_line(capsys):
    message = line(capsys, lambda: MODELS.build(dict(type="NoSuchModel")))
    assert message.startswith("error: NoSuchModel is not in the")
    assert message.count("\n") == 1


def test_of_a_worker_process_only_the_error_itself_is_shown(capsys):
    text = "Caught FileNotFoundError in DataLoader worker process 0.\nOriginal Traceback:\nFileNotFoundError: a.jpg"

    def fail():
        raise FileNotFoundError(text)

    assert line(capsys, fail) == "error: FileNotFoundError: a.jpg\n"


def test_a_worker_process_reports_our_errors_and_the_defects_of_others(tmp_path, capsys):
    for label in ("a", "b"):
        (tmp_path / "train" / label).mkdir(parents=True)
        (tmp_path / "train" / label / "broken.png").write_bytes(b"no image")

    def load(pipeline):
        dataset = TimmDataset(tmp_path, pipeline=pipeline)
        return lambda: list(DataLoader(dataset, num_workers=1))

    assert re.match(r"error: \S+broken.png cannot be decoded", line(capsys, load([])))
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "a" / "broken.png")
    with pytest.raises(ValueError, match="elsewhere"), user_errors():
        load([raise_value_error])()


def raise_value_error(results):
    raise ValueError("from elsewhere")


@pytest.mark.parametrize("error", [ValueError("from elsewhere"), KeyError("a"), RuntimeError("b")])
def test_defects_keep_their_traceback(error):
    with pytest.raises(type(error)), user_errors():
        raise error


def test_debug_keeps_every_traceback(monkeypatch):
    with pytest.raises(FileNotFoundError), user_errors(debug=True):
        load_config("no/such.py")
    monkeypatch.setenv("MMBIVIT_DEBUG", "1")
    with pytest.raises(FileNotFoundError), user_errors():
        load_config("no/such.py")


def test_interruption_is_no_traceback(capsys):
    with pytest.raises(SystemExit) as stop, user_errors():
        raise KeyboardInterrupt
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
