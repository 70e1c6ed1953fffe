"""Loading: weights of mmdet, timm and the official Swin, other architectures, and files that are not to be trusted."""

import os
import pickle

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import load_checkpoint
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from torch import nn

from mmbivit.models import BinarySwinTransformer, load_checkpoint_file, load_pretrained
from mmbivit.models.checkpoint import checkpoint_path

ARCH = dict(embed_dims=8, depths=(2, 2), num_heads=(1, 2))


def float_swin(**kwargs):
    return BinarySwinTransformer(arch=ARCH, recipe="float", out_indices=(1,), drop_path_rate=0.0, **kwargs)


def binary_swin(**kwargs):
    kwargs = dict(arch=ARCH, mlp_ratio=3, spatial_interaction=dict(ratio=1.0), out_indices=(1,)) | kwargs
    return BinarySwinTransformer(**kwargs)


@pytest.fixture
def timm_swin():
    model = TimmSwin(
        img_size=112, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=7, num_classes=3, drop_path_rate=0.0
    )
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    return model.eval()


def official_keys(timm_state):
    """timm's state dict under the names of the official files: patch merging ends a stage, buffers are saved."""
    state = {}
    for key, value in timm_state.items():
        if key.startswith("layers.1.downsample."):
            key = key.replace("layers.1.", "layers.0.")
        state[key.replace("head.fc.", "head.")] = value
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(16, 49, 49)
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    return state


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


def test_a_float_checkpoint_initialises_a_binary_student():
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
    with pytest.raises(FileNotFoundError, match="missing.pth does not exist"):
        load_checkpoint_file(str(tmp_path / "missing.pth"))


def test_urls_are_downloaded_once_into_the_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    calls = []

    def download(url, path):
        calls.append(url)
        if "offline" in url:
            raise OSError("no route to host")
        torch.save({}, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        assert checkpoint_path("https://example.org/a/weights.pth?x=1") == tmp_path / "checkpoints" / "weights.pth"
    assert len(calls) == 1
    with pytest.raises(
        FileNotFoundError, match=r"https://example.org/offline.pth could not be downloaded .*: no route to host"
    ):
        checkpoint_path("https://example.org/offline.pth")
