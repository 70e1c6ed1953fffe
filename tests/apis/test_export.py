"""Export of trained checkpoints."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mmbivit.apis import export_onnx

TOOLS = Path(__file__).parents[2] / "tools" / "deployment"


def test_the_tool_writes_a_classifier_as_onnx(
    classifier_configs, classifier, image_folders, tmp_path, monkeypatch, capsys
):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network, checkpoint = classifier
    out = tmp_path / "made" / "classifier.onnx"
    words = [TOOLS / "export_onnx.py", classifier_configs["binary"], checkpoint, out, "--size", 32, 36]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    runpy.run_path(words[0], run_name="__main__")

    printed = capsys.readouterr().out
    assert "ONNX Runtime: " in printed and f"Wrote {out}, {out.stat().st_size / 1e6:.1f} MB." in printed
    assert [file.name for file in out.parent.iterdir()] == ["classifier.onnx"]
    images = torch.randn(3, 3, 32, 36)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = network(images)
    # Two runtimes add in different orders: about 1e-6. A flipped bit would change an output by 1e-2.
    tolerance = 1e-5 * float(expected.abs().max())
    np.testing.assert_allclose(session.run(["logits"], {"images": images.numpy()})[0], expected, atol=tolerance)


def test_checkpoints_that_cannot_be_onnx_are_named(configs, detector, float_checkpoint, tmp_path):
    pytest.importorskip("onnxscript")
    model, checkpoint = detector

    def refuse(message, config=configs["binary"], file=checkpoint, error=ValueError):
        with pytest.raises(error, match=message):
            export_onnx(config, file, tmp_path / "x.onnx", size=(32, 32), check=False)

    state = model.state_dict() | {"backbone.training_stage": torch.tensor(1)}
    torch.save(dict(state_dict=state), tmp_path / "stage1.pth")
    refuse("in training stage 1", file=tmp_path / "stage1.pth")
    refuse("is of a float network, the config's is binary", file=float_checkpoint)
    refuse("checkpoint no.pth does not exist", file="no.pth", error=FileNotFoundError)
