"""Checkpoints that want to run code, waste memory or corrupt it: none does, unless its file is trusted by name."""

import functools
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from mmbivit.checkpoints import load_checkpoint_file, trust_checkpoints
from mmbivit.checkpoints.loaders import load_from_checkpoint_file, use_safe_loading

MULTIARRAY = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray


class Call:
    """Unpickled, it calls a function, and then fills what that returned with a state."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call

    def __call__(self):
        """What a file says that it calls must look as if it could be."""


@pytest.fixture
def trap(tmp_path) -> Path:
    """A folder that nothing may make."""
    return tmp_path / "trap"


def mkdir(trap) -> Call:
    return Call(os.mkdir, str(trap))


load_anything = functools.partial(torch.load, weights_only=False)


CODE = {
    "function": mkdir,
    "system": lambda trap: Call(os.system, f"mkdir {trap}"),
    "process": lambda trap: Call(subprocess.check_call, ["mkdir", str(trap)]),
    "exec": lambda trap: Call(exec, f"import os; os.mkdir({str(trap)!r})"),
    "eval": lambda trap: Call(eval, f"__import__('os').mkdir({str(trap)!r})"),
    "method": lambda trap: Call(Path.mkdir, Path(trap)),
    "partial": lambda trap: Call(Call(functools.partial, os.mkdir, str(trap))),
    "getattr": lambda trap: Call(Call(getattr, Path, "mkdir"), Path(trap)),
    "getattr of an array": lambda trap: Call(Call(getattr, np.ones(3), "tofile"), str(trap)),
    "getattr of the history": lambda trap: Call(Call(getattr, HistoryBuffer, "__init__"), str(trap)),
    "array in a file": lambda trap: Call(np.ndarray.tofile, np.ones(3), str(trap)),
    "another checkpoint": lambda trap: Call(load_anything, str(trap.with_name("inner.pth"))),
    "from torch's own": lambda trap: Call(
        torch._tensor._rebuild_from_type_v2, os.mkdir, torch.Tensor, (str(trap),), {}
    ),
    "state": lambda trap: Call(HistoryBuffer, state=dict(statistics_methods=dict(mean=mkdir(trap)))),
}
PLACES = {
    "top": lambda bad: bad,
    "beside the weights": lambda bad: dict(state_dict={}, extra=bad),
    "weight": lambda bad: dict(state_dict={"backbone.norm.weight": bad}),
    "key": lambda bad: dict(state_dict={bad: torch.ones(1)}),
    "meta": lambda bad: dict(state_dict={}, meta=dict(dataset_meta=dict(classes=[bad]))),
    "message_hub": lambda bad: dict(state_dict={}, message_hub=dict(log_scalars=dict(loss=bad))),
    "optimizer": lambda bad: dict(state_dict={}, optimizer=dict(state={0: dict(step=[bad])}, param_groups=[])),
    "deep": lambda bad: dict(model=functools.reduce(lambda inner, _: [dict(a=(inner,))], range(50), bad)),
}
FORMATS = {
    "zip": lambda content, path: torch.save(content, path),
    "old": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "protocol 4": lambda content, path: torch.save(content, path, pickle_protocol=4),
    "pickle": lambda content, path: path.write_bytes(pickle.dumps(content)),
    "text pickle": lambda content, path: path.write_bytes(pickle.dumps(content, protocol=0)),
}


def refuse(path: Path, *words: str) -> str:
    """Check that a file is refused in one line that names it."""
    with pytest.raises(ValueError) as caught:
        load_checkpoint_file(str(path))
    message = str(caught.value)
    assert message.startswith(f"{path} is no checkpoint") and "\n" not in message
    assert all(word in message for word in words), message
    return message


@pytest.mark.parametrize("code", CODE)
def test_no_code_runs_from_any_place_in_any_format(code, tmp_path, trap):
    torch.save(mkdir(trap), tmp_path / "inner.pth")
    path = tmp_path / "bad.pth"
    for put in PLACES.values():
        for save in FORMATS.values():
            save(put(CODE[code](trap)), path)
            refuse(path)
            assert not trap.exists()


def test_the_attacks_are_real(tmp_path, trap):
    """Without our loader they run code."""
    torch.save(mkdir(trap), tmp_path / "inner.pth")
    for code in ("function", "system", "process", "exec", "eval", "method", "partial", "another checkpoint", "state"):
        torch.save(dict(state_dict={}, extra=CODE[code](trap)), tmp_path / "bad.pth")
        torch.load(tmp_path / "bad.pth", weights_only=False)
        assert trap.is_dir()
        trap.rmdir()


def test_the_refusal_says_why_and_what_trust_would_allow(tmp_path, trap):
    torch.save(dict(state_dict={}, extra=mkdir(trap)), tmp_path / "bad.pth")
    message = refuse(tmp_path / "bad.pth", "can be loaded safely: ", "posix.mkdir", "--trust-checkpoint loads it with")
    assert len(message) < 350 and "add_safe_globals" not in message and "PyTorch" not in message
    torch.save(dict(state_dict={}, extra=Call(functools.partial, print)), tmp_path / "other.pth")
    message = refuse(
        tmp_path / "other.pth", "can be loaded safely: Unsupported global: GLOBAL functools.partial was not"
    )
    assert "add_safe_globals" not in message
    (tmp_path / "short.pth").write_bytes((tmp_path / "bad.pth").read_bytes()[:-40])
    assert "trust" not in refuse(tmp_path / "short.pth", "or not all of one")


def test_only_trusted_files_run_code_and_only_for_a_while(tmp_path, trap, monkeypatch):
    warnings = []
    monkeypatch.setattr("mmbivit.checkpoints.safe_loading.print_log", lambda text, *args: warnings.append(text))
    bad, other, link = tmp_path / "bad.pth", tmp_path / "other.pth", tmp_path / "link.pth"
    torch.save(dict(state_dict={}, extra=mkdir(trap)), bad)
    other.write_bytes(bad.read_bytes())
    link.symlink_to(bad)
    with trust_checkpoints(str(bad), None):
        refuse(other)
        assert not trap.exists()
        load_checkpoint_file(str(link))
        assert trap.is_dir()
        trap.rmdir()
        load_checkpoint_file(str(bad))
        trap.rmdir()
    refuse(bad)
    assert not trap.exists()
    assert len(warnings) == 1
    assert f"{link} is loaded with all that it holds, and can run any code" in warnings[0]


def test_trust_does_not_make_damaged_files_loadable(tmp_path):
    (tmp_path / "bad.pth").write_bytes(b"no checkpoint")
    with trust_checkpoints(tmp_path / "bad.pth"):
        refuse(tmp_path / "bad.pth", "or not all of one")


def test_a_downloaded_file_is_trusted_by_its_url(tmp_path, trap, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda url, path: torch.save(dict(state_dict={}, extra=mkdir(trap)), path)
    )
    url = "https://example.org/weights.pth"
    with pytest.raises(ValueError, match=r"https://example.org/weights.pth is no checkpoint that can be loaded safely"):
        load_checkpoint_file(url)
    with trust_checkpoints(url):
        load_checkpoint_file(url)
    assert trap.is_dir()


@pytest.mark.parametrize("variable", ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_the_environment_cannot_switch_safe_loading_off(tmp_path, trap, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    torch.save(dict(state_dict={}, extra=mkdir(trap)), tmp_path / "bad.pth")
    refuse(tmp_path / "bad.pth")
    assert not trap.exists()


SCHEMES = ("", "./", "file:", "http://e.org/", "https://e.org/", "timm://", "torchvision://", "modelzoo://")
SCHEMES += ("open-mmlab://", "openmmlab://", "mmcls://", "s3://", "a:s3://", "petrel://", "pavi://")


@pytest.fixture
def safe_loading(monkeypatch):
    monkeypatch.setattr(CheckpointLoader, "_schemes", CheckpointLoader._schemes.copy())
    use_safe_loading()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_of_mmengine_goes_through_our_loaders(safe_loading, scheme):
    assert CheckpointLoader._get_checkpoint_loader(f"{scheme}x.pth").__module__ == load_from_checkpoint_file.__module__
    loaders = CheckpointLoader._schemes.values()
    assert {loader.__module__ for loader in loaders} == {load_from_checkpoint_file.__module__}


def test_published_models_are_loaded_safely(safe_loading, tmp_path, trap, monkeypatch):
    weights = {"backbone.norm.weight": torch.ones(2), "head.weight": torch.zeros(3)}
    content = [dict(state_dict=weights), dict(state_dict={}, extra=mkdir(trap))]
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path: torch.save(content[0], path))
    for name in ("torchvision://resnet18", "open-mmlab://vgg16_caffe", "mmcls://vgg11"):
        for i, what in enumerate(("good", "bad")):
            monkeypatch.setattr(torch.hub, "get_dir", lambda folder=tmp_path / name[:5] / what: str(folder))
            content.insert(0, content.pop(1)) if i else None
            if what == "good":
                loaded = CheckpointLoader.load_checkpoint(name, "cpu")["state_dict"]
                assert set(loaded) == ({"norm.weight"} if "mmcls" in name else set(weights))
            else:
                with pytest.raises(ValueError, match="is no checkpoint that can be loaded safely"):
                    CheckpointLoader.load_checkpoint(name, "cpu")
        content.reverse()
    assert not trap.exists()
    with pytest.raises(ValueError, match="torchvision://resnet5: MMEngine knows no model .* mean 'resnet50'"):
        CheckpointLoader.load_checkpoint("torchvision://resnet5", "cpu")
    with pytest.raises(ValueError, match="s3://bucket/x.pth is on storage that cannot be read safely"):
        CheckpointLoader.load_checkpoint("s3://bucket/x.pth", "cpu")


def dtype(state) -> Call:
    """A float64 of NumPy whose state a file makes inconsistent."""
    return Call(np.dtype, "f8", False, True, state=state)


def array(dtype, values=b"A" * 32) -> Call:
    return Call(MULTIARRAY._reconstruct, np.ndarray, (0,), b"b", state=(1, (4,), dtype, False, values))


@pytest.mark.parametrize(
    "bad",
    [
        array(dtype((3, "<", None, None, None, -1, -1, 0x3F))),
        array(dtype((3, "<", None, None, None, -1, -1, 0x3F)), [1.0, 2.0, 3.0, 4.0]),
        array(dtype((3, "<", None, None, None, -1, -1, 0x3D))),
        array(dtype((3, "<", (np.dtype("f8"), (1000,)), None, None, -1, -1, 0))),
        array(dtype((3, "<", None, ("a",), {"a": (np.dtype("f8"), 1 << 40)}, -1, -1, 0))),
        Call(MULTIARRAY.scalar, dtype((3, "<", None, None, None, -1, -1, 0x3F)), np.zeros(3)),
        Call(MULTIARRAY.scalar, np.dtype("O"), b"A" * 8),
        array(np.dtype("O")),
        array(np.dtype([("a", "O")])),
        Call(np.ndarray, (4,), "O", b"A" * 32),
        Call(MULTIARRAY._reconstruct, np.ndarray, (2**40,), "O"),
        Call(MULTIARRAY._reconstruct, np.ndarray, (-1,), "f8"),
    ],
)
def test_arrays_of_numpy_are_plain_numbers_or_refused(bad, tmp_path):
    torch.save(dict(state_dict={}, extra=bad), tmp_path / "bad.pth")
    try:
        loaded = load_checkpoint_file(str(tmp_path / "bad.pth"))["extra"]
    except ValueError as error:
        assert "\n" not in str(error)
        return
    assert type(loaded) is np.ndarray and loaded.dtype.isbuiltin == 1 and loaded.nbytes <= 32
    assert np.isfinite(loaded.copy()).all()


def test_the_log_history_comes_back_as_numbers_alone(tmp_path):
    history = HistoryBuffer([1.0, 2.0, 4.0], [1, 1, 1])
    torch.save(dict(state_dict={}, a=history), tmp_path / "good.pth")
    loaded = load_checkpoint_file(str(tmp_path / "good.pth"))["a"]
    assert type(loaded) is HistoryBuffer and loaded.mean() == pytest.approx(7 / 3)
    assert [list(part) for part in loaded.data] == [[1, 2, 4], [1, 1, 1]]
    loaded.update(5.0)
    assert loaded.current() == 5

    before = dict(HistoryBuffer._statistics_methods)
    state = dict(_log_history=np.ones(1), _count_history=np.ones(1), max_length=9, statistics_methods=dict(mean=set))
    bad = HistoryBuffer.__new__(HistoryBuffer)
    bad.__dict__.update(state)
    HistoryBuffer.__getstate__, original = lambda self: state, HistoryBuffer.__getstate__
    try:
        torch.save(dict(state_dict={}, a=bad), tmp_path / "bad.pth")
    finally:
        HistoryBuffer.__getstate__ = original
    assert load_checkpoint_file(str(tmp_path / "bad.pth"))["a"].mean() == 1
    assert HistoryBuffer._statistics_methods == before


def test_small_files_cannot_unpack_to_much(tmp_path):
    path = tmp_path / "bad.pth"
    torch.save(dict(state_dict=dict(a=torch.zeros(10**6))), tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    assert path.stat().st_size < 10**4
    refuse(path, "it is compressed, and unpacks to 400")
    load_checkpoint_file(str(tmp_path / "plain.pth"))
    for huge in (torch.zeros(1).expand(10**12), Call(torch.Tensor, 10**8), torch.empty(10**8, device="meta")):
        torch.save(dict(state_dict=dict(a=[huge])), path)
        refuse(path, "bytes, more than the file")
    view = torch.arange(9.0)
    torch.save(dict(state_dict=dict(a=view[:3], b=view.expand(2, 9))), path)  # what shares memory is no attack
    assert load_checkpoint_file(str(path))["state_dict"]["b"].shape == (2, 9)


def test_content_that_refers_to_itself_ends(tmp_path):
    content = dict(state_dict={})
    content["self"] = [content]
    torch.save(content, tmp_path / "loop.pth")
    assert load_checkpoint_file(str(tmp_path / "loop.pth"))["self"][0]["state_dict"] == {}


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes and links there")
def test_paths_that_are_no_files(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.pth")  # reading it would wait for ever
    (tmp_path / "loop.pth").symlink_to("loop.pth")
    (tmp_path / "none.pth").symlink_to("nowhere")
    (tmp_path / "folder.pth").mkdir()
    for name in ("pipe.pth", "loop.pth", "none.pth", "folder.pth", "a\nb.pth", "~/x.pth", "/dev/zero", "file:///etc/x"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            load_checkpoint_file(str(tmp_path / name) if ".pth" in name else name)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    seen = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path: seen.append(path) or torch.save({}, path))
    load_checkpoint_file("https://example.org/../../../a/..%2f..%2fevil.pth?x=/../y")
    assert [os.path.dirname(path) for path in seen] == [str(tmp_path / "hub" / "checkpoints")]


@pytest.mark.parametrize("names", [("../../trap/data.pkl",), ("/trap/data.pkl",), ("a/data.pkl", "b/../../trap/x")])
def test_names_in_an_archive_write_nowhere(tmp_path, trap, names):
    path = tmp_path / "in" / "bad.pth"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for name in (*names, "in/version", "in/byteorder"):
            archive.writestr(name, pickle.dumps(dict(state_dict={}), protocol=2))
    with pytest.raises(ValueError, match=r"bad.pth is no checkpoint"):
        load_checkpoint_file(str(path))
    assert sorted(os.listdir(tmp_path)) == ["in"] and os.listdir(path.parent) == ["bad.pth"]


@pytest.mark.parametrize(
    "content",
    [[1], 5, torch.ones(1), dict(state_dict=5), dict(state_dict=[torch.ones(1)]), dict(model="x"), {5: torch.ones(1)}],
)
def test_content_that_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "bad.pth")
    refuse(tmp_path / "bad.pth", "it holds")
