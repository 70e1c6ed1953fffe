"""The command lines of the analysis: every picture of a real run, and one line for what cannot be drawn."""

import re
import xml.etree.ElementTree
from pathlib import Path

import cv2
import pytest

from tests.tools.test_tools import call

CHECKPOINTS = ("balancing", "attention", "activations", "conflict")


@pytest.fixture
def arguments(two_stage_run, coco, configs, float_checkpoint) -> dict[str, list]:
    """Arguments of each picture of the two-stage run."""
    network = [configs["binary"], two_stage_run / "epoch_2.pth"]
    image = sorted((coco / "val2017").iterdir())[0]
    teacher = ["--teacher-checkpoint", float_checkpoint]
    return dict(
        balancing=network,
        attention=[*network, image, *teacher, "--block", "stages.1.blocks.0", "--query", 3, 5],
        activations=[*network, image],
        flips=[two_stage_run],
        curves=[two_stage_run, "--keys", "loss", "lr"],
        detections=[image, "--model", "1 bit", *network, "--model", "float", configs["float"], float_checkpoint],
        interaction=[configs["binary"], "--shape", 64, 96],
        conflict=[*network, "--batches", 1, *teacher],
    )


def test_every_picture_is_drawn(monkeypatch, arguments, tmp_path, capsys):
    for number, (name, values) in enumerate(arguments.items()):
        out = tmp_path / "pictures" / f"{name}{('.png', '.svg')[number % 2]}"
        assert call(monkeypatch, "analysis_tools/plot.py", name, *values, "--out", out) == 0, name
        assert f"Wrote {out}." in capsys.readouterr().out
        if out.suffix == ".png":
            pixels = cv2.imread(str(out))
            assert min(pixels.shape[:2]) > 150 and pixels.std() > 5, name
        else:
            assert xml.etree.ElementTree.parse(out).getroot().tag.endswith("svg"), name


def test_the_numbers_of_interaction_and_conflict_are_printed(monkeypatch, arguments, tmp_path, capsys):
    call(monkeypatch, "analysis_tools/plot.py", "interaction", *arguments["interaction"], "--out", tmp_path / "a.png")
    # 64 x 96 pixels are 16 x 24 tokens and 3 x 4 windows of 49, then 8 x 12 and 2 x 2: 2 * 49 * 48 in each, 3 times
    assert re.search(rf"attention alone\D*{16 * 2 * 49 * 48:,}", printed := capsys.readouterr().out)
    assert re.search(rf"3 times\D*{3 * 16 * 2 * 49 * 48:,}", printed)
    call(monkeypatch, "analysis_tools/plot.py", "conflict", *arguments["conflict"], "--out", tmp_path / "a.png")
    assert "stages.1.blocks.0" in capsys.readouterr().out


def one_line(capsys) -> str:
    """The one line that a tool wrote to stderr, without log and progress."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("picture", CHECKPOINTS)
def test_a_stage_1_checkpoint_is_refused(monkeypatch, arguments, two_stage_run, picture, tmp_path, capsys):
    values = [arguments[picture][0], two_stage_run / "epoch_1.pth", *arguments[picture][2:]]
    assert call(monkeypatch, "analysis_tools/plot.py", picture, *values, "--out", tmp_path / "a.png") == 1
    assert "epoch_1.pth is of training stage 1" in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "values, message",
    [
        (["curves", "EMPTY"], "is empty; give the --work-dir of a training run"),
        (["flips", "MISSING"], "does not exist"),
        (["curves", "RUN", "--keys", "los"], "has no 'los'; did you mean"),
        (["curves", "RUN", "--out", "a.pdf"], "a.pdf: a picture is written as its name ends; allowed: .png, .svg"),
        (["interaction", "MISSING"], "does not exist"),
        (["interaction", "FLOAT"], "give a config with a binary recipe"),
        (["balancing", "FLOAT", "FLOAT_CHECKPOINT"], "has no spatial interaction, so there are no balancing factors"),
    ],
)
def test_what_cannot_be_drawn_gets_one_line(
    monkeypatch, two_stage_run, configs, float_checkpoint, values, message, tmp_path, capsys
):
    (tmp_path / "empty").mkdir()
    places = dict(EMPTY=tmp_path / "empty", MISSING=tmp_path / "missing", RUN=two_stage_run, FLOAT=configs["float"])
    places["FLOAT_CHECKPOINT"] = float_checkpoint
    values = [places.get(value, value) for value in values]
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "analysis_tools/plot.py", *values) == 1
    assert message in one_line(capsys)


def test_the_report_passes_every_option_on(monkeypatch, tmp_path, capsys):
    seen = {}

    def write_report(*args, **kwargs):
        seen.update(args=args, kwargs=kwargs)
        (tmp_path / "page.html").write_text("x" * 300_000)
        return tmp_path / "page.html"

    monkeypatch.setattr("mmbivit.report.write_report", write_report)
    options = "--out p.html --checkpoint c.pth --data-root d --float-checkpoint f.pth --images 2 --no-eval"
    assert call(monkeypatch, "analysis_tools/report.py", "w", *options.split()) == 0
    options = dict(checkpoint="c.pth", data_root="d", float_checkpoint="f.pth", num_images=2, evaluate=False)
    assert seen == dict(args=("w", "p.html"), kwargs=options)
    assert "page.html, 0.3 MB." in capsys.readouterr().out


def test_the_report_of_an_empty_work_dir_is_one_line(monkeypatch, tmp_path, capsys):
    assert call(monkeypatch, "analysis_tools/report.py", tmp_path) == 1
    assert f"{tmp_path} has no config: give a work dir" in one_line(capsys)


def test_pictures_have_help(monkeypatch, capsys):
    assert call(monkeypatch, "analysis_tools/plot.py", "--help") == 0
    pictures = set(re.findall(r"^    (\w+)\b", capsys.readouterr().out, re.MULTILINE))
    assert pictures >= {*CHECKPOINTS, "flips", "curves", "detections", "interaction"}
    documented = (Path(__file__).parents[2] / "docs" / "analysis.md").read_text()
    assert all(f"plot.py {picture} " in documented for picture in pictures)
