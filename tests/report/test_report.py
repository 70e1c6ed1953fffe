"""The page of a whole run: a tiny two-stage detector and a classifier, and what is said where parts are missing."""

import base64
import re
import shutil
from html import unescape

import pytest
import torch

from mmbivit.analysis import model_size
from mmbivit.apis.checkpoints import load_trained_model
from mmbivit.apis.config import load_config
from mmbivit.report import write_report
from mmbivit.report.accuracy import Accuracy, evaluate_run
from mmbivit.report.run import open_run, spread
from tests.browser import headless_browser
from tests.conftest import train_two_stages

PARTS = ["Training", "Accuracy", "Size and operations", "Spatial interaction", "Balancing factors", "Sign flips"]
PARTS += ["Attention", "Activations", "Examples", "Environment and config"]


@pytest.fixture(scope="module")
def page(two_stage_run, tmp_path_factory):
    """Its page."""
    return write_report(two_stage_run, tmp_path_factory.mktemp("page") / "detector.html", num_images=2)


def text_of(html: str, heading: str) -> str:
    """The HTML of one section, without the alignment of tables."""
    found = re.search(rf"<h2>{heading}</h2>(.*?)</section>", html, re.DOTALL)
    return unescape(re.sub(r' class="(text|number)"', "", found[1]))


def test_a_detectors_page_has_every_part_and_no_problem(page, two_stage_run):
    html = page.read_text()
    assert re.findall("<h2>(.*?)</h2>", html) == PARTS
    assert 'class="problem"' not in html
    assert "tiny_binary" in html and "epoch_2.pth, training stage 2" in html
    assert [path.name for path in two_stage_run.glob("*.html")] == []
    pictures = re.findall(r'<img src="data:image/(svg\+xml|png);base64,([^"]+)"', html)
    assert len(pictures) == 8
    assert all(base64.b64decode(content)[:5] in (b"\x89PNG\r", b"<?xml") for _, content in pictures)
    environment = text_of(html, "Environment and config")
    assert f"PyTorch: {torch.__version__}" in environment and "mmbivit.DecoupledTrainingHook" in environment


def test_numbers_are_those_of_evaluation_and_counts(page, two_stage_run):
    html = page.read_text()
    run = open_run(two_stage_run)
    accuracy = evaluate_run(run)
    (person,) = accuracy.detection["bbox"]
    # of one class, so its AP is that of all, which mmdet rounds
    assert (person.name, person.objects) == ("person", 2)
    assert person.ap == pytest.approx(accuracy.metrics["coco/bbox_mAP"], abs=5.1e-4)
    assert person.ap50 == pytest.approx(accuracy.metrics["coco/bbox_mAP_50"], abs=5.1e-4)
    section = text_of(html, "Accuracy")
    masks = accuracy.detection["segm"][0]
    cells = [person.ap, person.ap50, masks.ap, masks.ap50]
    row = "".join(f"<td>{cell}</td>" for cell in ["person", 2, *(f"{value:.3f}" for value in cells)])
    assert row in section.replace("\n", "")
    size = model_size(run.model)
    assert f"<dt>Packed</dt><dd>{size.packed_bytes / 1e3:.2f} kB</dd>" in html


def test_a_browser_shows_the_page_of_a_run(page):
    with headless_browser() as browser:
        tab = browser.new_page(viewport=dict(width=390, height=844))
        problems = []
        tab.on("console", lambda message: problems.append(message.text))
        tab.goto(page.as_uri())
        assert problems == []
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        assert tab.locator("h2").all_text_contents() == PARTS
        sizes = tab.eval_on_selector_all("img", "all => all.map(i => [i.naturalWidth, i.clientWidth])")
        assert len(sizes) == 8 and all(natural > 0 and shown > 300 for natural, shown in sizes)


@pytest.fixture(scope="module")
def moved(two_stage_run, tmp_path_factory):
    """The same run without its log, whose data and float detector cannot be found any more."""
    folder = tmp_path_factory.mktemp("moved") / "detector"
    shutil.copytree(two_stage_run, folder)
    for log in folder.glob("*/vis_data/scalars.json"):
        log.unlink()
    for log in folder.glob("*/*.log"):
        log.unlink()
    config = folder / "tiny_binary.py"
    text = re.sub(r"data_root = '[^']*'", "data_root = '/nowhere/'", config.read_text())
    config.write_text(re.sub(r"'[^']*epoch_1.pth'", "'/nowhere/float.pth'", text))
    return folder


def test_what_cannot_be_made_says_why(moved, coco, tmp_path):
    out = write_report(moved, tmp_path / "page.html", data_root=str(coco), num_images=1, evaluate=False)
    html = out.read_text()
    assert re.findall("<h2>(.*?)</h2>", html) == PARTS
    assert "has no log of training" in text_of(html, "Training")
    assert "--no-eval" in text_of(html, "Accuracy")
    assert "--teacher-checkpoint" in text_of(html, "Attention") or "/nowhere/float.pth" in text_of(html, "Attention")
    assert "Without the float detector: " in text_of(html, "Examples") and "<img" in text_of(html, "Examples")
    assert "no log of it" in text_of(html, "Environment and config")
    assert "problem" not in text_of(html, "Balancing factors")


def test_a_checkpoint_of_stage_1_shows_what_there_is(two_stage_run, tmp_path):
    checkpoint = two_stage_run / "epoch_1.pth"
    html = write_report(two_stage_run, tmp_path / "page.html", checkpoint=checkpoint, evaluate=False).read_text()
    assert "epoch_1.pth, training stage 1" in html
    for part in ("Balancing factors", "Attention", "Activations"):
        assert "is of training stage 1" in text_of(html, part)
    assert "<img" in text_of(html, "Sign flips")


def test_a_float_detectors_page_has_no_binary_parts(configs, float_checkpoint, tmp_path):
    out = write_report(float_checkpoint.parent, tmp_path / "float.html", evaluate=False)
    headings = re.findall("<h2>(.*?)</h2>", out.read_text())
    assert headings == ["Training", "Accuracy", "Size and operations", "Examples", "Environment and config"]


def test_a_classifiers_page_has_the_accuracy_of_each_class(classifier_configs, float_classifier, tmp_path):
    work_dir = train_two_stages(classifier_configs["binary"], float_classifier, tmp_path / "classifier")
    html = write_report(work_dir, num_images=3).read_text()
    assert re.findall("<h2>(.*?)</h2>", html) == PARTS
    assert 'class="problem"' not in html
    run = open_run(work_dir)
    right = dict.fromkeys(("blue", "green", "red"), 0)
    dataset = run.test_dataset()
    model = load_trained_model(load_config(work_dir / "tiny_classifier_binary.py"), work_dir / "epoch_2.pth")
    for i in range(len(dataset)):
        item = dataset[i]
        logits = model(**model.data_preprocessor(dict(inputs=item["inputs"][None])))
        right[sorted(right)[item["labels"]]] += int(logits.argmax()) == item["labels"]
    section = text_of(html, "Accuracy").replace("\n", "")
    for name, count in right.items():
        assert f"<tr><td>{name}</td><td>3</td><td>{100 * count / 3:.1f}</td></tr>" in section
    assert f"<dd>{100 * sum(right.values()) / 9:.1f} %</dd>" in html


def test_a_detector_that_finds_nothing_has_a_page(two_stage_run, tmp_path, monkeypatch):
    monkeypatch.setattr("mmbivit.report.sections.evaluate_run", lambda run: Accuracy({}, {}, []))
    html = write_report(two_stage_run, tmp_path / "page.html", num_images=1).read_text()
    assert "Nothing was detected in the test data." in text_of(html, "Accuracy")


def test_wrong_input_gets_one_line(two_stage_run, tmp_path):
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        write_report(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="has no config"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="expected a name that ends in .html"):
        write_report(two_stage_run, tmp_path / "page.pdf")
    with pytest.raises(ValueError, match="num_images=9; allowed"):
        write_report(two_stage_run, tmp_path / "page.html", num_images=9)
    shutil.copy(two_stage_run / "tiny_binary.py", tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        write_report(tmp_path)


def test_examples_are_evenly_spread():
    assert spread(4, 8) == [0, 2, 4, 6]
    assert spread(4, 3) == [0, 1, 2]
    assert spread(2, 5) == [0, 2]
