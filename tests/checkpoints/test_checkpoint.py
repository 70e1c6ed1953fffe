"""Loading: weights of mmdet, timm and the official Swin, other architectures, and files that are not to be trusted."""

import argparse
import logging
import os
import pickle
import re

import numpy as np
import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader, load_checkpoint
from torch import nn

from mmbivit.apis.checkpoints import fetch_checkpoints
from mmbivit.checkpoints import checkpoint_path, save_atomically, use_safe_loading
from mmbivit.models import BinarySwinTransformer, load_checkpoint_file, load_pretrained
from tests.swin_weights import ARCH, make_timm_swin, official_keys


def float_swin(**kwargs):
    return BinarySwinTransformer(arch=ARCH, recipe="float", out_indices=(1,), drop_path_rate=0.0, **kwargs)


def binary_swin(**kwargs):
    kwargs = dict(arch=ARCH, mlp_ratio=3, spatial_interaction=dict(ratio=1.0), out_indices=(1,)) | kwargs
    return BinarySwinTransformer(**kwargs)


@pytest.fixture
def timm_swin():
    return make_timm_swin()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch.hub."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("source", ["timm", "official"])
def test_float_weights_reproduce_timms_outputs(timm_swin, source):
    state = timm_swin.state_dict()
    model = float_swin().eval()
    model.load_state_dict(state if source == "timm" else official_keys(state), strict=True)
    images = torch.randn(2, 3, 112, 112)
    expected = timm_swin.forward_features(images).permute(0, 3, 1, 2)
    torch.testing.assert_close(model(images)[0], expected, rtol=1e-4, atol=1e-4)


def test_a_detector_checkpoint_goes_through_mmengines_loader(tmp_path):
    from mmdet.models.backbones import SwinTransformer

    class Detector(nn.Module):
        def __init__(self, backbone):
            super().__init__()
            self.backbone = backbone
            self.neck = nn.Linear(2, 2)

    reference = SwinTransformer(**ARCH, strides=(4, 2), out_indices=(1,), drop_path_rate=0.0)
    source = Detector(reference)
    torch.save(dict(state_dict=source.state_dict()), tmp_path / "detector.pth")
    target = Detector(float_swin())
    load_checkpoint(target, str(tmp_path / "detector.pth"), strict=True)
    images = torch.randn(1, 3, 40, 52)
    reference.eval(), target.eval()
    torch.testing.assert_close(target.backbone(images)[0], reference(images)[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(target.neck.weight, source.neck.weight)


def test_a_float_checkpoint_initialises_a_binary_student_and_says_so_once(monkeypatch):
    lines = []
    monkeypatch.setattr("mmbivit.checkpoints.fitting.print_log", lambda *args: lines.append(args))
    teacher, student = float_swin(), binary_swin()
    for parameter in teacher.parameters():
        nn.init.normal_(parameter)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    assert student.load_state_dict(teacher.state_dict(), strict=True)
    after, source = student.state_dict(), teacher.state_dict()
    for stage, block in ((0, 0), (1, 1)):
        stem = f"stages.{stage}.blocks.{block}."
        assert torch.equal(after[stem + "norm1.weight"], source[stem + "norm1.weight"])
        assert torch.equal(after[stem + "attn.qkv.weight"], source[stem + "attn.qkv.weight"])
        fc1, fc2 = source[stem + "mlp.fc1.weight"].numpy(), source[stem + "mlp.fc2.weight"].numpy()
        width = len(after[stem + "mlp.fc1.weight"])
        strength = np.linalg.norm(fc1, axis=1) * np.linalg.norm(fc2, axis=0)
        keep = np.sort(np.argsort(-strength)[:width])
        assert width == len(fc1) * 3 // 4
        assert np.array_equal(after[stem + "mlp.fc1.weight"].numpy(), fc1[keep])
        assert np.array_equal(after[stem + "mlp.fc1.bias"].numpy(), source[stem + "mlp.fc1.bias"].numpy()[keep])
        assert np.array_equal(after[stem + "mlp.fc2.weight"].numpy(), fc2[:, keep])
        for key in ("mlp.si.fc1.weight", "attn.qkv.input_quantizer.gamma", "norm1.running_var"):
            assert torch.equal(after[stem + key], before[stem + key])
    ((message, _, level),) = lines
    assert "weights are of a float network" in message
    assert level == logging.WARNING
    student.load_state_dict(after)
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(embed_dims=16),
            r"patch_embed\.proj\.weight has shape \(16, 3, 4, 4\), this network expects \(8, 3, 4, 4\)",
        ),
        (dict(depths=(2, 3)), r"it has stages\.1\.blocks\.2\.\S+, which this network has not"),
        (dict(num_heads=(2, 2)), r"stages\.0\.blocks\.0\.attn\.relative_position_bias_table has shape \(169, 2\)"),
    ],
)
def test_a_checkpoint_of_another_arch_is_an_error_that_names_the_key(change, message):
    other = binary_swin(arch=ARCH | change)
    with pytest.raises(ValueError, match="checkpoint is of another arch: .*" + message):
        binary_swin().load_state_dict(other.state_dict(), strict=False)


def test_position_bias_tables_are_interpolated_to_another_window():
    source, target = float_swin(), float_swin(window_size=5)
    key = "stages.0.blocks.0.attn.relative_position_bias_table"
    ramp = torch.arange(13.0)[:, None].expand(13, 13).reshape(169, 1)
    target.load_state_dict(source.state_dict() | {key: ramp})
    table = target.state_dict()[key].view(9, 9)
    torch.testing.assert_close(table[4], torch.full((9,), 6.0))  # the centre stays the centre
    assert (table[1:, 0] > table[:-1, 0]).all()
    torch.testing.assert_close(table, table[:, :1].expand(9, 9))


def test_convert_weights_off_takes_our_names_only(timm_swin):
    result = float_swin(convert_weights=False).load_state_dict(timm_swin.state_dict(), strict=False)
    assert "layers.0.blocks.0.attn.qkv.weight" in result.unexpected_keys


def test_init_cfg_loads_a_backbone_with_its_stage(tmp_path):
    model = binary_swin()
    model.set_stage(1)
    nn.init.normal_(model.stages[0].blocks[0].mlp.si.alpha)
    state = {f"backbone.{key}": value for key, value in model.state_dict().items()} | {"head.weight": torch.ones(1)}
    torch.save(dict(state_dict=state), tmp_path / "classifier.pth")
    init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "classifier.pth"), prefix="backbone.")
    loaded = binary_swin(init_cfg=init_cfg)
    loaded.init_weights()
    assert loaded.stage == 1
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    with pytest.raises(ValueError, match=r"no key that starts with prefix='encoder\.'"):
        load_pretrained(loaded, dict(state_dict=state), prefix="encoder")
    with pytest.raises(ValueError, match="init_cfg.type='Kaiming' is unknown; allowed: 'Pretrained'"):
        binary_swin(init_cfg=dict(type="Kaiming")).init_weights()


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


class GetAttribute:
    """Refers to a method by getattr, as MMEngine's log history does, but of another class."""

    def __reduce__(self):
        return getattr, (np.ndarray, "tofile")


def test_mmengines_log_history_loads_and_code_does_not_run(tmp_path):
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save(dict(state_dict={}, message_hub=dict(log_scalars=dict(loss=history))), tmp_path / "good.pth")
    loaded = load_checkpoint_file(str(tmp_path / "good.pth"))["message_hub"]["log_scalars"]["loss"]
    assert loaded.current() == 2.0 and loaded.mean() == 1.5

    trap = tmp_path / "trap"
    for value in (Malicious(str(trap)), GetAttribute()):
        torch.save(dict(state_dict={}, extra=value), tmp_path / "bad.pth")
        with pytest.raises(ValueError, match="bad.pth is no checkpoint that can be loaded safely"):
            load_checkpoint_file(str(tmp_path / "bad.pth"))
    assert not trap.exists()
    with open(tmp_path / "bad.pth", "wb") as file:
        pickle.dump(Malicious(str(trap)), file)
    with pytest.raises(ValueError, match="can be loaded safely"):
        load_checkpoint_file(str(tmp_path / "bad.pth"))
    assert not trap.exists()


def test_broken_and_missing_files_are_named(tmp_path):
    torch.save(dict(state_dict={"a": torch.ones(100)}), tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    for name, data in (
        ("short.pth", content[: len(content) // 2]),
        ("empty.pth", b""),
        ("text.pth", b"not a checkpoint"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} is no checkpoint"):
            load_checkpoint_file(str(tmp_path / name))
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth is no checkpoint: it holds a list, expected a dict"):
        load_checkpoint_file(str(tmp_path / "list.pth"))
    with pytest.raises(FileNotFoundError, match="missing.pth does not exist"):
        load_checkpoint_file(str(tmp_path / "missing.pth"))


def test_timms_training_options_load(tmp_path):
    torch.save(dict(state_dict={}, arch="a", args=argparse.Namespace(lr=0.5, model="a")), tmp_path / "timm.pth.tar")
    assert load_checkpoint_file(str(tmp_path / "timm.pth.tar"))["args"].lr == 0.5
    torch.save(dict(args=argparse.Namespace(lr=Malicious(str(tmp_path / "trap")))), tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="can be loaded safely"):
        load_checkpoint_file(str(tmp_path / "bad.pth"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new" / "weights.pth"
    save_atomically(dict(a=1), file)
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        save_atomically(dict(a=2, b=lambda: None), file)
    assert load_checkpoint_file(str(file)) == dict(a=1)
    assert os.listdir(file.parent) == ["weights.pth"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["conv1.weight", "layer1.0.conv1.weight"], "none of its keys, such as conv1.weight, fits"),
        (["layers.0.blocks.0.attn.logit_scale", "norm.weight"], r"it has stages.0.blocks.0.attn.logit_scale, which"),
    ],
    ids=["resnet", "swin_v2"],
)
def test_other_architectures_are_refused(keys, message):
    with pytest.raises(ValueError, match="checkpoint is of another arch: " + message):
        load_pretrained(float_swin(), {key: torch.ones(16) for key in keys})


def test_urls_are_downloaded_once_into_the_hub_cache(hub, monkeypatch):
    calls = []

    def download(url, path):
        calls.append(url)
        if "offline" in url:
            raise OSError("no route to host")
        torch.save({}, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        assert checkpoint_path("https://example.org/a/weights.pth?x=1") == hub / "checkpoints" / "weights.pth"
    assert len(calls) == 1
    with pytest.raises(
        FileNotFoundError, match=r"https://example.org/offline.pth could not be downloaded .*: no route to host"
    ):
        checkpoint_path("https://example.org/offline.pth")


TIMM_NAME = "swin_tiny_patch4_window7_224.ms_in1k"


@pytest.fixture
def timm_calls(monkeypatch, timm_swin):
    """What timm is asked for; it gives the tiny Swin."""
    calls = []
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: calls.append((args, kwargs)) or timm_swin)
    return calls


def test_timm_names_become_local_files_once(hub, timm_calls, timm_swin, monkeypatch):
    barriers = []
    monkeypatch.setattr("mmbivit.checkpoints.fetch.barrier", lambda: barriers.append(1))
    for _ in range(2):
        path = checkpoint_path(f"timm://{TIMM_NAME}")
        assert path == hub / "checkpoints" / f"timm_{TIMM_NAME}.pth"
    assert timm_calls == [((TIMM_NAME,), dict(pretrained=True))]
    assert os.listdir(path.parent) == [path.name]
    assert len(barriers) == 2  # a rank that finds the file meets the one that has just written it
    for state in (torch.load(path, weights_only=True), load_checkpoint_file(f"timm://{TIMM_NAME}")):
        assert all(torch.equal(value, state[key]) for key, value in timm_swin.state_dict().items())


def test_mmengine_loads_timm_names(hub, timm_calls, timm_swin, monkeypatch):
    monkeypatch.setattr(CheckpointLoader, "_schemes", CheckpointLoader._schemes.copy())
    use_safe_loading()
    loaded = CheckpointLoader.load_checkpoint(f"timm://{TIMM_NAME}", map_location="cpu")
    assert set(loaded) == {"state_dict"} and set(loaded["state_dict"]) == set(timm_swin.state_dict())


def test_training_configs_get_local_files_for_timm_names(hub, timm_calls):
    name = f"timm://{TIMM_NAME}"
    pretrained = dict(type="Pretrained", checkpoint=name)
    model = dict(init_cfg=pretrained, backbone=dict(init_cfg=pretrained))
    cfg = Config(dict(load_from=name, model=model, custom_hooks=[dict(teacher=dict(init_cfg=pretrained))]))
    fetch_checkpoints(cfg)
    local = str(hub / "checkpoints" / f"timm_{TIMM_NAME}.pth")
    init_cfgs = (cfg.model.init_cfg, cfg.model.backbone.init_cfg, cfg.custom_hooks[0].teacher.init_cfg)
    assert [cfg.load_from, *(init_cfg.checkpoint for init_cfg in init_cfgs)] == [local] * 4
    assert len(timm_calls) == 1


def test_a_timm_name_without_its_scheme_is_recognised():
    name = "swin_tiny_patch4_window7_224.ms_in1k"
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist; timm's weights are timm://{name}"):
        checkpoint_path(name)


def test_unknown_timm_names_show_similar_ones(hub, timm_calls):
    for name in ("swin_tiny_patch4_window7_224.ms_in1", "swin_tiny_patch4_window8_224", "swin_tiny_patch4_window7"):
        with pytest.raises(ValueError, match=rf"timm://{name}: timm has no .* mean .*swin_tiny_patch4_window7_224\.ms"):
            checkpoint_path(f"timm://{name}")
    with pytest.raises(ValueError, match=r"timm://\.\./x: .* timm.list_models\(pretrained=True\) names"):
        checkpoint_path("timm://../x")
    assert not timm_calls


def test_timm_weights_out_of_reach_name_the_way_out(hub, monkeypatch):
    def offline(*args, **kwargs):
        raise RuntimeError("no connection to the hub\nand a long explanation")

    monkeypatch.setattr(timm, "create_model", offline)
    name = f"timm://{TIMM_NAME}"
    message = rf"^checkpoint {name} could not be downloaded to .*: no connection to the hub; give a local file instead"
    with pytest.raises(FileNotFoundError, match=message + "$"):
        checkpoint_path(name)
    cfg = Config(dict(float_checkpoint=name, load_from=name, model={}))
    with pytest.raises(FileNotFoundError, match=message + "; give the float model with --float-checkpoint FILE"):
        fetch_checkpoints(cfg)
    assert not re.search("part", "".join(os.listdir(hub / "checkpoints")))
