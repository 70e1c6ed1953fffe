"""Thousands of damaged files: each is read, or refused in one line, soon, without a crash and without much memory.

``MMBIVIT_FUZZ=100 pytest tests/robustness/test_fuzz_files.py`` takes a hundred times as many, from other seeds too.
"""

import argparse
import contextlib
import copy
import io
import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.logging import HistoryBuffer

from mmbivit.apis import export_packed, predict
from mmbivit.apis.checkpoints import load_classifier
from mmbivit.apis.config import load_config
from mmbivit.apis.options import ConfigOptions
from mmbivit.checkpoints import load_checkpoint_file, load_pretrained
from mmbivit.deploy import load, pack, save
from mmbivit.deploy.conversion import convert_checkpoint
from mmbivit.deploy.header import read_header
from tests.deploy.networks import binary_swin
from tests.packed_files import changed, trained
from tests.robustness.mutations import ROUNDS, limits, mutate_bytes, mutate_value, refused
from tests.swin_weights import make_classifier, make_timm_swin
from tests.tiny import CLASSES

pytest.importorskip("resource", reason="limits of time and memory are those of Unix")


@pytest.fixture
def rng(request) -> random.Random:
    """Random numbers that are each test's own, and others with more rounds."""
    return random.Random(f"{request.node.name}{ROUNDS}")


def write(path: Path, data: bytes) -> None:
    """Write a new file; some file systems take milliseconds to overwrite one, as they write it to the disk at once."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def read_mutated(good: list[bytes], path: Path, read, rng: random.Random, count: int) -> int:
    """Read that many mutations of some files in turn, and return how many were refused."""
    count *= ROUNDS
    number = 0
    for i in range(count):
        write(path, mutate_bytes(good[i % len(good)], rng, good[i * 7 % len(good)]))
        number += refused(lambda: read(path))
    assert count // 5 < number < count  # mutations that damage nothing, or everything alike, would test nothing
    return number


def checkpoint_content() -> dict:
    weights = {f"backbone.{i}.weight": torch.arange(6.0).view(2, 3) for i in range(3)}
    history = dict(log_scalars=dict(loss=HistoryBuffer([1.0, 2.0], [1, 1])))
    optimizer = dict(state={0: dict(step=torch.tensor(1.0))}, param_groups=[dict(lr=np.float64(0.1))])
    meta = dict(epoch=1, cfg="x" * 50, dataset_meta=dict(classes=("a", "b")), args=argparse.Namespace(lr=1))
    return dict(state_dict=weights, meta=meta, message_hub=history, optimizer=optimizer)


@pytest.mark.filterwarnings("ignore")  # torch's, of other protocols of pickle
def test_checkpoints(tmp_path, rng):
    files = []
    for zipped in (True, False):
        for protocol in (2, 4):
            torch.save(checkpoint_content(), buffer := io.BytesIO(), pickle, protocol, zipped)
            files.append(buffer.getvalue())
    path = tmp_path / "x.pth"
    read_mutated(files, path, lambda path: load_checkpoint_file(str(path)), rng, 4000)


@pytest.mark.filterwarnings("ignore")
def test_weights_that_are_almost_those_of_the_model(tmp_path, rng):
    model, swin, path = make_classifier(), make_timm_swin().state_dict(), tmp_path / "x.pth"
    states = (model.state_dict(), swin, {f"backbone.{key}": value for key, value in swin.items()})
    small = dict(state_dict=dict.fromkeys(("a", "b"), torch.ones(2)), meta=dict(dataset_meta=dict(classes=["a"])))
    number = 0
    for i in range(200 * ROUNDS):
        state = {**states[i % 3]}
        for _ in range(rng.choice((1, 1, 2, 5))):
            key = rng.choice(list(state))
            value = state[key]
            shape, dtype = rng.choice(((1, 1), (3, 8), (7, 2), (0, 4))), rng.choice((torch.int64, torch.complex64))
            changes = [mutate_value(None, rng), torch.ones(shape, dtype=dtype), torch.ones(1).expand(1000, 1000)]
            if isinstance(value, torch.Tensor):
                changes += [value[None], value.flatten()[:-1], value.double(), value.T if value.ndim == 2 else value]
            state[key] = rng.choice(changes)
            if rng.random() < 0.3:
                state[rng.choice((key[:-1], key.replace("stages.0", "stages.9"), f"module.{key}"))] = state.pop(key)
        content = {**small, "state_dict": state} if i % 2 else mutate_value({**small, "state_dict": state}, rng)
        torch.save(content, buffer := io.BytesIO())
        write(path, buffer.getvalue())
        reads = (
            lambda: load_classifier(model, path),
            lambda: load_pretrained(model.backbone, load_checkpoint_file(str(path))),
            lambda: convert_checkpoint(str(path)),
        )
        number += refused(reads[i // 3 % 3])
    assert 50 * ROUNDS < number < 200 * ROUNDS


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> bytes:
    """A packed backbone."""
    path = tmp_path_factory.mktemp("packed") / "x.safetensors"
    save(pack(binary_swin(window_size=4)), path)
    return path.read_bytes()


def test_packed_files(packed, tmp_path, rng):
    path = tmp_path / "x.safetensors"
    size = int.from_bytes(packed[:8], "little") + 8  # most of it is tensors, of which any bits are fine

    def mutated(data: bytes, rng: random.Random) -> bytes:
        return mutate_bytes(data[:size], rng, data) + data[size:] if rng.random() < 0.8 else mutate_bytes(data, rng)

    images, number = torch.zeros(1, 3, 24, 24), 0
    for _ in range(400 * ROUNDS):
        write(path, mutated(packed, rng))
        number += refused(lambda: load(path)(images))
    assert number > 200 * ROUNDS


@pytest.fixture(scope="module")
def packed_models(configs, classifier_configs, tmp_path_factory) -> dict[str, Path]:
    """Packed files of a whole detector and a whole classifier."""
    folder = tmp_path_factory.mktemp("packed_models")
    files = {}
    for name, config, classes, scope in (
        ("detector", configs["binary"], ("person",), "mmdet"),
        ("classifier", classifier_configs["binary"], CLASSES, "mmengine"),
    ):
        files[name] = folder / f"{name}.safetensors"
        trained(config, folder / f"{name}.pth", classes, scope)
        export_packed(config, folder / f"{name}.pth", files[name])
    return files


@pytest.mark.parametrize("kind", ["detector", "classifier"])
def test_packed_models_that_load_predict(packed_models, coco, image_folders, tmp_path, rng, kind):
    good, header = packed_models[kind], read_header(packed_models[kind])
    image = next(dict(detector=coco, classifier=image_folders)[kind].rglob("*.png"))
    number = 0
    for _ in range(60 * ROUNDS):
        name = rng.choice(("model", "model", "pipeline", "dataset_meta", "architecture"))
        entry = json.dumps(mutate_value(getattr(header, name), rng), default=str, skipkeys=True)
        file = changed(good, tmp_path, **{name: entry})
        if refused(lambda file=file: load(file)):
            number += 1
        elif read_header(file).pipeline:
            with limits():
                predict(None, file, [image], tmp_path)
    assert 20 * ROUNDS < number < 60 * ROUNDS


@pytest.fixture(scope="module")
def config(classifier_configs) -> dict:
    """A whole config as plain data."""
    return json.loads(json.dumps(Config.fromfile(classifier_configs["float"]).to_dict()))


@pytest.mark.parametrize("suffix", ["json", "yaml", "py"])
def test_bytes_of_configs(config, classifier_configs, tmp_path, rng, suffix):
    texts = dict(json=json.dumps(config), yaml=yaml.safe_dump(config), py=classifier_configs["float"].read_text())
    good = texts[suffix].encode()
    read_mutated([good, good[: len(good) // 2]], tmp_path / f"x.{suffix}", load_config, rng, 150)


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_values_of_configs(config, tmp_path, rng, suffix):
    path, number = tmp_path / f"x.{suffix}", 0
    for _ in range(150 * ROUNDS):
        changed = mutate_value(copy.deepcopy(config), rng)
        dump = json.dumps(changed, default=str, skipkeys=True) if suffix == "json" else yaml.dump(changed)
        write(path, dump.encode())
        number += refused(lambda: load_config(path))
    assert 5 * ROUNDS < number < 150 * ROUNDS


def test_options(classifier_configs, tmp_path, rng, capsys):
    parser = argparse.ArgumentParser(prog="tool", exit_on_error=True)
    parser.add_argument("--cfg-options", nargs="+", action=ConfigOptions)
    cfg = Config(dict(model=dict(type="x", backbone=dict(a=[dict(b=1)], c=(1, 2)))))
    cfg.dump(tmp_path / "x.json")
    good = [
        "model.backbone.a.0.b=2",
        "model.backbone.c=[(1,2),[3,'x']]",
        "model.backbone.c=1,2",
        "load_from=a=b",
        "model.type=None",
    ]
    number = 0
    for _ in range(400 * ROUNDS):
        words = [mutate_bytes(rng.choice(good).encode(), rng).decode("latin1") for _ in range(rng.choice((1, 1, 2)))]
        words = [word.lstrip("-") for word in words]
        try:
            options = parser.parse_args(["--cfg-options", *words]).cfg_options
        except SystemExit as stop:
            assert stop.code == 2 and "tool: error: " in capsys.readouterr().err
            number += 1
            continue
        number += refused(lambda options=options: load_config(tmp_path / "x.json", options))
    assert 50 * ROUNDS < number < 400 * ROUNDS


@pytest.mark.parametrize(
    "text",
    [
        *(bracket * 10**5 for bracket in ("[", "{", "- ", "? ", "[[]", "!!python/tuple [", "&a [*a,")),
        *("[" * depth + "]" * depth for depth in (1500, 10**5)),
        "a: &a [*a]\nmodel: *a",
        "9" * 10**5,
        "\x00\ufffe",
        "_base_: ./nothing.yaml",
        "custom_imports: {imports: [no.such.module]}",
        "model: {type: '{{$NO_SUCH_VARIABLE}}'}\n_base_: 5",
    ],
    ids=range(15),
)
def test_nested_and_strange_configs(text, tmp_path):
    for suffix in ("yaml", "json", "py"):
        path = tmp_path / f"x.{suffix}"
        path.write_text(text)
        with contextlib.suppress(UnicodeEncodeError):
            assert refused(lambda path=path: load_config(path))
