"""Packed files: what is written, that it comes back to the last bit, and what becomes of any other file."""

import json
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

import mmbivit
from mmbivit.deploy import PackedSwinTransformer, load, pack, save
from mmbivit.deploy.header import read_header
from mmbivit.models import BinarySwinTransformer


@pytest.fixture(scope="module")
def packed() -> PackedSwinTransformer:
    """A tiny packed backbone whose statistics and thresholds are not those of initialisation."""
    generator = torch.Generator().manual_seed(0)
    backbone = BinarySwinTransformer(
        arch=dict(embed_dims=8, depths=(1, 1), num_heads=(1, 2)),
        spatial_interaction=dict(ratio=1.0),
        mlp_ratio=3,
        window_size=4,
        out_indices=(0, 1),
    ).eval()
    for tensor in backbone.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand(tensor.shape, generator=generator) / 5)
    return pack(backbone)


@pytest.fixture(scope="module")
def written(packed, tmp_path_factory) -> Path:
    """The file of it."""
    path = tmp_path_factory.mktemp("packed") / "folder" / "backbone.safetensors"
    save(packed, path)
    return path


@pytest.fixture
def changed(written, tmp_path):
    """Write the file again with other metadata or tensors."""

    def write(metadata=None, tensors=None, without=()) -> Path:
        with safe_open(written, "pt") as file:
            old = file.metadata()
        given = safetensors.torch.load_file(written) | (tensors or {})
        given = {name: tensor for name, tensor in given.items() if name not in without}
        new = {key: value for key, value in (old | (metadata or {})).items() if value is not None}
        safetensors.torch.save_file(given, tmp_path / "changed.safetensors", new)
        return tmp_path / "changed.safetensors"

    return write


def refusal(path: Path, error: type[Exception] = ValueError) -> str:
    """Return the message with which a file is refused: one line that names the file."""
    with pytest.raises(error) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_network_comes_back_to_the_last_bit(packed, written):
    loaded = load(written)
    assert type(loaded) is PackedSwinTransformer
    assert not loaded.training
    assert loaded.config == packed.config
    images = torch.randn(2, 3, 37, 50)
    for a, b in zip(packed(images), loaded(images), strict=True):
        assert torch.equal(a, b)
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_file_holds_tensors_and_text_only(packed, written):
    with safe_open(written, "pt") as file:
        metadata = file.metadata()
    assert metadata == {
        "format": "mmbivit.packed",
        "format_version": "2",
        "mmbivit_version": mmbivit.__version__,
        "kind": "backbone",
        "network": "PackedSwinTransformer",
        "architecture": json.dumps(packed.options),
    }
    tensors = safetensors.torch.load_file(written)
    assert tensors.keys() == packed.state_dict().keys()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32, torch.int32}
    for name, tensor in packed.state_dict().items():
        assert torch.equal(tensors[name], tensor)
    header = read_header(written)
    assert (header.kind, header.network, header.model) == ("backbone", "PackedSwinTransformer", None)
    assert type(packed).Config(**header.architecture) == packed.config


def test_backbone_needs_torch_and_safetensors_alone(packed, written, tmp_path):
    images = torch.randn(1, 3, 32, 32)
    torch.save((images, packed(images)), tmp_path / "expected.pt")
    code = f"""
import sys
import torch
from mmbivit.deploy import load
images, expected = torch.load({str(tmp_path / "expected.pt")!r})
assert all(map(torch.equal, load({str(written)!r})(images), expected))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_tensors_may_share_memory_and_have_strides(packed, written, tmp_path):
    twin = load(written)
    affine = packed.norm0.affine
    twin.norm0.affine = affine.t().contiguous().t()  # another order in memory
    twin.stages[0].blocks[0].attn.in_affine = twin.stages[0].blocks[0].mlp.in_affine
    assert not twin.norm0.affine.is_contiguous()
    save(twin, tmp_path / "twin.safetensors")
    loaded = load(tmp_path / "twin.safetensors")
    assert torch.equal(loaded.norm0.affine, affine)
    block = loaded.stages[0].blocks[0]
    assert torch.equal(block.attn.in_affine, packed.stages[0].blocks[0].mlp.in_affine)
    block.attn.in_affine.zero_()
    assert block.mlp.in_affine.any()


def test_loaded_network_does_not_depend_on_its_file(packed, written, tmp_path):
    path = tmp_path / "gone.safetensors"
    path.write_bytes(written.read_bytes())
    loaded = load(path)
    path.write_bytes(b"")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, packed.state_dict()[name])


def test_failing_write_leaves_the_old_file(packed, tmp_path, monkeypatch):
    path = tmp_path / "old.safetensors"
    path.write_text("old")

    def full_disk(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save(packed, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_save_takes_packed_networks_and_names_of_safetensors(packed, tmp_path):
    with pytest.raises(ValueError, match=r"backbone.pth: .* ends in .safetensors"):
        save(packed, tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match="Linear is not packed: .*pack"):
        save(nn.Linear(2, 2), tmp_path / "linear.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_every_truncated_file_is_refused(written, tmp_path):
    content, path = written.read_bytes(), tmp_path / "cut.safetensors"
    assert len(content) < 50_000
    path.write_bytes(content)
    for length in reversed(range(len(content))):
        os.truncate(path, length)
        with pytest.raises(ValueError, match="is no packed file, or not all of one"):
            load(path)


def test_other_files_are_refused(tmp_path, packed):
    path = tmp_path / "other.safetensors"
    assert "does not exist" in refusal(path, FileNotFoundError)
    assert "does not exist" in refusal(tmp_path, FileNotFoundError)
    torch.save(packed.state_dict(), path)
    assert "it is a checkpoint of PyTorch" in refusal(path)
    path.write_text('{"format": "mmbivit.packed"}' * 100)
    assert "is no packed file" in refusal(path)
    safetensors.torch.save_file(packed.state_dict(), path)
    assert "is a safetensors file, but no packed network" in refusal(path)
    safetensors.torch.save_file(packed.state_dict(), path, {"format": "pt"})
    assert "is a safetensors file, but no packed network" in refusal(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (dict(format_version="4"), "has format version '4', this mmbivit reads 1 to 3: update mmbivit"),
        (dict(network="Linear"), "holds a 'Linear', which .* allowed: .*PackedSwinTransformer"),
        (dict(format_version="1" * 5000), "format version '111111111', this mmbivit reads 1 to 3: update mmbivit"),
        (dict(format_version="0"), "format version '0', .* export it again"),
        (dict(format_version="one"), "format version 'one', .* export it again"),
        (dict(format_version=None), "format version '', .* export it again"),
        (dict(kind="segmentor"), "says that it is a 'segmentor'; expected backbone, classifier, detector"),
        (dict(kind=None), "says that it is a None"),
        (dict(kind="classifier"), "'model' cannot be read: it is missing"),
        (dict(kind="detector"), "'model' cannot be read: it is missing"),
        (dict(architecture=None), "'architecture' cannot be read: it is missing"),
        (dict(architecture="{"), "'architecture' cannot be read: Expecting"),
        (dict(architecture="[]"), "it is a list, expected a dict"),
        (dict(architecture='{"embed_dims": NaN}'), "the number NaN is out of range"),
        (dict(architecture='{"embed_dims": 1e999}'), "the number 1e999 is out of range"),
        (dict(architecture='{"embed_dims": ' + "9" * 5000 + "}"), "the number 9{20} is out of range"),
        (dict(architecture='{"depths": ' + "[" * 30 + "]" * 30 + "}"), "nested too deeply"),
        (dict(architecture='{"depths": ' + "[" * 100_000 + "]" * 100_000 + "}"), "is damaged, its 'architecture'"),
        (dict(architecture='{"depths": [' + "1, " * 400_000 + "1]}"), "longer than 1048576 characters"),
    ],
)
def test_damaged_metadata_is_named(changed, metadata, message):
    assert re.search(message, refusal(changed(metadata)))


def architecture(packed: PackedSwinTransformer, **changes: object) -> dict[str, str]:
    return dict(architecture=json.dumps(packed.options | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(embed_dims=16), "does not fit the architecture that it describes: 'stages.0.*' is F32 .*, expected F32"),
        (dict(depths=[2, 1]), r"it lacks \d+ tensors, first 'stages.0.blocks.1"),
        (dict(depths=[1], num_heads=[1], hidden_dims=[24], scales=[0.3]), "cannot be built, .*out_indices"),
        (dict(si_hidden=None), r"it also has \d+ tensors, first 'stages.0.blocks.0.mlp.si_a"),
        (dict(window_size=5), "does not fit the architecture"),
        (dict(num_heads=[3, 2]), "cannot be built, .*does not divide 8 channels"),
        (dict(embed_dims="8"), "cannot be built"),
        (dict(scales=[None, 0.3]), "cannot be built"),
        (dict(_scope_="os"), "its architecture has '_scope_', which this version .* does not know"),
        (dict(type="Linear"), "its architecture has 'type'"),
        (dict(init_cfg=None), "its architecture has 'init_cfg'"),
    ],
)
def test_other_architectures_are_refused(packed, changed, changes, message):
    assert re.search(message, refusal(changed(architecture(packed, **changes))))


@pytest.mark.parametrize(
    "changes",
    [
        dict(embed_dims=1_000_000, num_heads=[2000, 4000], hidden_dims=[1_000_000, 1_000_000]),
        dict(hidden_dims=[999_999, 24]),
        dict(depths=[1_000_000, 1_000_000]),
        dict(window_size=31, si_hidden=961),
        dict(pos_embed_shape=[1_000_000, 1_000_000]),
        dict(in_channels=1_000_000, patch_size=1_000_000),
    ],
)
def test_huge_sizes_take_neither_memory_nor_time(packed, changed, changes, monkeypatch):
    path = changed(architecture(packed, **changes))
    allocated = []
    zeros = torch.zeros

    def watched(*args, **kwargs):
        allocated.append(0)  # before it fails, as for 10^18 numbers
        tensor = zeros(*args, **kwargs)
        allocated.append(0 if tensor.is_meta else tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch, "zeros", watched)
    start = time.perf_counter()
    refusal(path)
    assert time.perf_counter() - start < 5
    assert sum(allocated) == 0
    assert allocated


def test_missing_and_other_tensors_are_named(changed, packed):
    name = sorted(packed.state_dict())[-1]
    assert f"it lacks 1 tensors, first '{name}'" in refusal(changed(without=[name]))
    assert "it also has 1 tensors, first 'head'" in refusal(changed(tensors=dict(head=torch.zeros(1))))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda tensor: tensor[:-1], "F32 [{0}, {2}]"),
        (lambda tensor: tensor.t(), "F32 [{2}, {1}]"),
        (lambda tensor: tensor.double(), "F64 [{1}, {2}]"),
        (lambda tensor: tensor.to(torch.float8_e5m2), "F8_E5M2 [{1}, {2}]"),
        (lambda tensor: tensor.int(), "I32 [{1}, {2}]"),
        (lambda tensor: tensor[:-1].half(), "F16 [{0}, {2}]"),
        (lambda tensor: tensor[:0, 0], "F32 [0]"),
    ],
)
def test_tensors_of_other_shape_or_dtype_are_named(changed, packed, change, found):
    name = "stages.1.blocks.0.attn.relative_position_bias_table"
    tensor = packed.state_dict()[name]
    message = refusal(changed(tensors={name: change(tensor).contiguous()}))
    rows, heads = tensor.shape
    found = found.format(rows - 1, rows, heads)
    assert f"{name!r} is {found}, expected F32 [{rows}, {heads}]" in message


def test_any_changed_byte_of_the_header_is_survived(written, packed, tmp_path):
    content, path = written.read_bytes(), tmp_path / "changed.safetensors"
    (size,) = struct.unpack("<Q", content[:8])
    rng = np.random.default_rng(0)
    loaded = 0
    for position, value in zip(rng.integers(0, size + 8, 400), rng.integers(0, 256, 400), strict=True):
        path.write_bytes(content[:position] + bytes([value]) + content[position + 1 :])
        try:
            network = load(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:  # such as another version of mmbivit, or a scale
            network(torch.zeros(1, 3, 16, 16))
            loaded += 1
    assert loaded < 100


def test_any_values_of_tensors_are_survived(changed, packed):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in packed.state_dict().items():
        bits = torch.randint(-(2**31), 2**31, tensor.shape, generator=generator).to(torch.int32)
        tensors[name] = bits.view(tensor.dtype)  # floats of any kind too: infinities, not a number
    network = load(changed(tensors=tensors))
    assert [tuple(out.shape) for out in network(torch.randn(1, 3, 20, 30))] == [(1, 8, 5, 8), (1, 16, 3, 4)]
