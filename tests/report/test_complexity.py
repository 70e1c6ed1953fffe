"""Complexity of a config: beside its float twin, in every format, and on the command line."""

import csv
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from rich.console import Console
from torch import nn

import mmbivit.registry
from mmbivit import config_path, get_config
from mmbivit.analysis import Complexity, LayerComplexity, complexity
from mmbivit.report.complexity import (
    ConfigComplexity,
    complexity_table,
    config_complexity,
    default_shape,
    layer_records,
    readable,
    total_records,
    write_complexity,
)
from tests.models.test_backbone import ToyBackbone
from tests.tools.test_tools import call

COSTS = ("flops", "bops", "ops", "params", "size_bytes")


def costs(found: Complexity) -> list[float]:
    return [getattr(found, name) for name in COSTS]


@pytest.mark.parametrize("kind", ["detector", "classifier"])
def test_a_config_beside_the_same_in_float(kind, configs, classifier_configs):
    paths, size = (configs, 64) if kind == "detector" else (classifier_configs, 32)
    report = config_complexity(paths["binary"])
    cfg = Config.fromfile(paths["float"])
    with DefaultScope.overwrite_default_scope("mmdet" if kind == "detector" else "mmengine"):
        in_float = complexity(MODELS.build(cfg.model), (3, size, size))
    assert report.kind == kind and report.network.input_shape == (3, size, size)
    assert costs(report.as_float) == costs(in_float) and report.as_float.bops == 0 < report.network.bops
    assert costs(report.as_float.part("backbone")) == costs(in_float.part("backbone"))
    assert {row.name for row in report.as_float.rows} == {row.name for row in in_float.rows}
    assert report.network.assumption == ("for 20 regions and the masks of 5 detections" if kind == "detector" else "")
    names = ["backbone", "backbone, as float", kind, f"{kind}, as float"]
    records = total_records(report)
    assert [record["network"] for record in records] == names
    for record, found in zip(records, (report.network.part("backbone"), in_float.part("backbone")), strict=False):
        assert list(record.values())[1:] == costs(found)
    assert [list(record.values())[1:] for record in records[2:]] == [costs(report.network), costs(in_float)]
    assert config_complexity(paths["float"]).as_float is None


def test_neck_and_heads_that_are_binary_are_float_beside_it_too():
    report = config_complexity(config_path("digits/mask_rcnn_sibivit_full"), (112, 112))
    in_float = config_complexity(config_path("digits/mask_rcnn_swin_float"), (112, 112)).network
    assert costs(report.as_float) == costs(in_float)
    assert report.network.part("roi_head").bops > 0 == report.as_float.bops


def test_what_the_backbone_holds_itself_stays_its_own(classifier_configs, tmp_path):
    config = tmp_path / "positions.py"
    config.write_text(
        f"_base_ = '{classifier_configs['binary'].as_posix()}'\n"
        "model = dict(backbone=dict(use_abs_pos_embed=True, pretrain_img_size=32))"
    )
    report = config_complexity(config)
    row = next(row for row in report.as_float.rows if row.name == "backbone")
    assert row.params == report.network.part("backbone").rows[0].params == 8 * 8 * 8


def test_a_backbone_with_other_options_has_a_float_twin(tmp_path, monkeypatch):
    class Toy(ToyBackbone):
        binary_options = ("extra",)

        def __init__(self, extra=False, **kwargs):
            super().__init__(**kwargs)
            self.extra = nn.Linear(3, 3) if extra else None

    monkeypatch.setitem(mmbivit.registry.MODELS.module_dict, "Toy", Toy)
    config = tmp_path / "toy.py"
    config.write_text(
        "model = dict(type='mmbivit.ImageClassifier', num_classes=3, backbone=dict(type='mmbivit.Toy', extra=True))"
    )
    report = config_complexity(config, (32, 32))
    backbone = report.network.part("backbone")
    assert backbone.bops > 0 and backbone.params > sum(p.numel() for p in Toy().parameters())
    assert costs(report.as_float.part("backbone")) == costs(complexity(Toy(recipe="float"), (3, 32, 32)))


def test_the_shape_is_that_of_the_test_images(configs, tmp_path):
    assert default_shape(get_config("mask_rcnn_sibivit_swin_t")) == (800, 1344)  # 1333 in whole 32
    assert default_shape(get_config("digits/mask_rcnn_sibivit")) == (112, 112)
    assert default_shape(get_config("classification/sibivit_swin_t_imagenet")) == (224, 224)
    assert default_shape(get_config("classification/digits_sibivit")) == (32, 32)
    assert default_shape(Config(dict(model=dict(type="X")))) == (224, 224)
    step = dict(type="Resize", scale=(100, 60), keep_ratio=False)  # width, height
    loader = dict(dataset=dict(type="Wrapper", dataset=dict(pipeline=[dict(type="LoadImageFromFile"), step])))
    assert default_shape(Config(dict(model=dict(type="X"), val_dataloader=loader))) == (60, 100)
    report = config_complexity(configs["float"], (32, 96))
    assert report.network.input_shape == (3, 32, 96)
    assert report.caption.startswith(
        "For an input of 3 x 32 x 96, for 20 regions and the masks of 5 detections.\nFLOPs"
    )


ROWS = (
    LayerComplexity("backbone.fc", "BinaryLinear", ((1, 1),), 1, (1, 9), 0, 1_000_001, 12_345, 2_000),
    LayerComplexity("backbone.attn", "A|<b>", ((1, 1), (32, 1)), 2, (1, 4, 4), 7, 64, 0, 0),
    LayerComplexity("head", "Linear", ((32, 32),), 5, (), 999_960, 0, 999, 1_234_567),
)
REPORT = ConfigComplexity("a<b>|c.py", "classifier", Complexity(ROWS, (3, 8, 8)), None)


def test_numbers_are_short_and_have_a_unit():
    assert readable(total_records(REPORT)) == [
        ["network", "FLOPs", "BOPs", "OPs", "parameters", "size"],
        ["backbone", "7", "1.000 M", "15.63 k", "12.35 k", "2.000 kB"],
        ["classifier", "1.000 M", "1.000 M", "1.016 M", "13.34 k", "1.237 MB"],
    ]
    assert readable(layer_records(REPORT.network))[2] == [
        *("backbone.attn", "A|<b>", "1 x 1, 32 x 1", "2", "1 x 4 x 4", "7", "64", "8", "0", "0 B"),
    ]


def test_csv_has_exact_numbers(tmp_path):
    write_complexity(REPORT, tmp_path / "new" / "totals.csv")
    write_complexity(REPORT, tmp_path / "layers.CSV", per_layer=True)
    with open(tmp_path / "new" / "totals.csv", newline="") as file:
        backbone, whole = csv.DictReader(file)
    assert backbone == dict(
        network="backbone", FLOPs="7", BOPs="1000065", OPs="15633.015625", parameters="12345", bytes="2000"
    )
    with open(tmp_path / "layers.CSV", newline="") as file:
        layers = list(csv.DictReader(file))
    assert [(row["module"], row["type"]) for row in layers] == [(row.name, row.type) for row in ROWS]
    for name in ("FLOPs", "BOPs", "parameters", "bytes"):
        assert sum(int(row[name]) for row in layers) == int(whole[name])
    assert layers[1]["OPs"] == "8"


class Cells(HTMLParser):
    """The text of each cell of a page, by tables and rows, and what else the page has."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.texts: dict[str, str] = {}
        self.last = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.last = tag
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_data(self, data):
        if self.last in ("td", "th") and data.strip():
            self.tables[-1][-1][-1] += data
        self.texts[self.last] = self.texts.get(self.last, "") + data


def test_the_page_has_both_tables_and_needs_nothing_else(tmp_path):
    write_complexity(REPORT, tmp_path / "page.html", per_layer=True)
    page = Cells((tmp_path / "page.html").read_text())
    assert page.tables == [readable(total_records(REPORT)), readable(layer_records(REPORT.network))]
    assert page.texts["h1"].strip() == page.texts["title"].strip() == "Complexity of a<b>|c.py"
    assert "b" not in page.tags and not {"script", "link", "img"} & {*page.tags}
    assert not {"src", "href"} & {*page.attributes} and "url(" not in page.texts["style"]
    assert "OPs = BOPs / 64 + FLOPs" in page.texts["p"]
    write_complexity(REPORT, tmp_path / "page.html")
    assert len(Cells((tmp_path / "page.html").read_text()).tables) == 1


def test_markdown_has_the_same(tmp_path):
    write_complexity(REPORT, tmp_path / "page.md", per_layer=True)
    lines = (tmp_path / "page.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|") and "---" not in line]
    expected = [*readable(total_records(REPORT)), *readable(layer_records(REPORT.network))]
    assert rows == [[cell.replace("|", r"\|") for cell in row] for row in expected]
    assert lines[3] == "| --- | ---: | ---: | ---: | ---: | ---: |"


def test_a_terminal_shows_all_numbers_in_80_columns():
    console = Console(width=80, record=True)
    console.print(complexity_table(total_records(REPORT), REPORT.config, REPORT.caption))
    text = console.export_text()
    assert all(cell in text for row in readable(total_records(REPORT)) for cell in row) and "a<b>|c.py" in text


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the tool and returns its exit code, output and errors."""

    def run(*args):
        return call(monkeypatch, "analysis_tools/complexity.py", *args), *capsys.readouterr()

    return run


def test_the_tool_counts_prints_and_writes(run, classifier_configs, tmp_path):
    config = classifier_configs["binary"]
    code, out, _ = run(config, "--shape", 32, 48, "--per-layer", "--out", tmp_path / "layers.csv")
    report = config_complexity(config, (32, 48))
    assert code == 0 and "For an input of 3 x 32 x 48." in out
    for row in readable(total_records(report))[1:]:
        assert re.search(r"\s+".join(map(re.escape, row)), out)
    assert "backbone.stages" in out
    with open(tmp_path / "layers.csv", newline="") as file:
        assert [row["module"] for row in csv.DictReader(file)] == [row.name for row in report.network.rows]


def test_mistakes_are_one_line(run, classifier_configs, configs, tmp_path):
    wrong = tmp_path / "wrong.py"
    backbone = dict(type="mmbivit.BinarySwinTransformer", in_channels=4, arch="tiny", out_indices=(3,))
    wrong.write_text(f"model = dict(type='mmbivit.ImageClassifier', num_classes=3, backbone={backbone})")
    for args, message in (
        (["no.py"], "config no.py does not exist"),
        (
            [configs["float"], "--out", "page.pdf"],
            "page.pdf: a report is written as its name ends; allowed: .html",
        ),
        ([configs["float"], "--shape", 0, 5], "--shape[0]=0"),
        ([classifier_configs["float"], "--out", configs["float"] / "page.md"], "tiny_float.py"),
        ([wrong], "ImageClassifier does not run on an input of 1 x 3 x 224 x 224: "),
    ):
        code, _, err = run(*args)
        assert code == 1 and message in err
        assert err.startswith("error: ") and err.count("\n") == 1
    assert run(configs["float"], "--shape", 5)[0] == 2


def test_a_network_without_a_backbone_has_one_row():
    report = replace(REPORT, network=Complexity(ROWS[2:], (3, 8, 8)))
    assert [record["network"] for record in total_records(report)] == ["classifier"]
