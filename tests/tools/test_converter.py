"""``tools/model_converters/swin_to_mmbivit.py``: files in, files and an account of them out."""

import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch

from mmbivit.models import load_checkpoint_file
from tests.swin_weights import make_classifier, make_timm_swin

TOOL = Path(__file__).parents[2] / "tools" / "model_converters" / "swin_to_mmbivit.py"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the tool and returns its exit code, output and errors."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["swin_to_mmbivit.py", *map(str, args)])
        monkeypatch.delenv("MMBIVIT_DEBUG", raising=False)
        code = 0
        try:
            runpy.run_path(str(TOOL), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def source(tmp_path):
    torch.save(make_timm_swin().state_dict(), tmp_path / "timm.pth")
    return tmp_path / "timm.pth"


def test_there_and_back(run, source, tmp_path):
    own, back = tmp_path / "new" / "own.pth", tmp_path / "back.pth"
    code, out, _ = run(source, own)
    assert code == 0 and f"Wrote {own} with mmbivit's names." in out
    assert "63 keys mapped, 0 skipped, 0 without a place, 0 missing" in out
    make_classifier().load_state_dict(load_checkpoint_file(str(own))["state_dict"], strict=True)

    code, out, _ = run(own, back, "--to", "timm", "--prefix", "backbone.", "--verbose")
    assert code == 0 and f"Wrote {back} with timm's names." in out
    rows = [[cell.strip() for cell in line.split("│")] for line in out.splitlines() if "│" in line]
    assert ["", "backbone.stages.1.blocks.0.mlp.norm.weight", "layers.1.blocks.0.norm2.weight", ""] in rows
    assert ["", "backbone.training_stage", "timm has no training stages", ""] in rows
    before, after = torch.load(source, weights_only=True), torch.load(back, weights_only=True)
    assert before.keys() == after.keys() and all(torch.equal(after[key], value) for key, value in before.items())


def test_timm_names_are_sources(run, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: make_timm_swin())
    name = "timm://swin_tiny_patch4_window7_224.ms_in1k"
    assert run(name, tmp_path / "own.pth")[0] == 0
    assert load_checkpoint_file(str(tmp_path / "own.pth"))["meta"]["source"] == name


def test_mistakes_are_one_line_and_write_nothing(run, source, tmp_path):
    state = torch.load(source, weights_only=True)
    odd = ["layers.0.blocks.0.attn.logit_scale", "layers.1.blocks.0.attn.logit_scale"]
    torch.save(state | dict.fromkeys(odd, torch.ones(1)), tmp_path / "v2.pth")
    torch.save({"conv1.weight": torch.ones(1)}, tmp_path / "resnet.pth")
    binary = make_classifier(recipe="sibivit").state_dict()
    torch.save(binary, tmp_path / "binary.pth")
    target = tmp_path / "out.pth"
    for args, message in (
        ([source, source], "timm.pth exists already; give another name, or --overwrite"),
        ([tmp_path / "no.pth", target], "no.pth does not exist"),
        ([tmp_path / "v2.pth", target], "2 keys of v2.pth have no place in a Swin network, first layers.0.blocks.0"),
        ([tmp_path / "resnet.pth", target, "--allow-unplaced"], "resnet.pth is of another architecture"),
        ([tmp_path / "binary.pth", target, "--to", "timm"], "binary.pth is of a binary network, which timm has not"),
        ([source, target, "--prefix", "encoder."], "no key that starts with prefix='encoder.'"),
        (["timm://swin_tiny_patch4_window7_223", target], "mean swin_tiny_patch4_window7_224"),
    ):
        code, out, err = run(*args)
        assert code == 1 and message in err
        assert err.startswith("error: ") and err.count("\n") == 1
        assert all(f"without a place: {key}" in out for key in odd) == ("v2" in str(args[0]))
        assert not target.exists()

    assert run(tmp_path / "v2.pth", target, "--allow-unplaced")[0] == 0
    make_classifier().load_state_dict(load_checkpoint_file(str(target))["state_dict"], strict=True)
    assert run(source, target, "--overwrite")[0] == 0
    assert load_checkpoint_file(str(target))["meta"]["source"] == "timm.pth"


def test_debug_shows_the_traceback(run, source):
    with pytest.raises(ValueError, match="exists already"):
        run(source, source, "--debug")
