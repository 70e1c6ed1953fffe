"""The notebook is committed without outputs, and its cells run in turn, on pictures of the user's."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmbivit import config_path
from mmbivit.deploy import load

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
SETTINGS = {"PLAN": "PLAN = QUICK", "PICTURES": "PICTURES = []"}

FLOAT = """
_base_ = "{base}"
train_cfg = dict(max_iters=2)
param_scheduler = []
"""
BINARY = """
_base_ = "{base}"
train_cfg = dict(max_iters=2)
param_scheduler = []
custom_hooks = _base_.custom_hooks
custom_hooks[0].switch_iter = 1
custom_hooks[1].interval = 1
default_hooks = dict(logger=dict(interval=1))
"""

# As a notebook does it: cells share their names, and what the last expression of a cell returns is shown.
RUNNER = """
import ast, json, sys
names, shown = {}, []
for cell in json.load(sys.stdin):
    body = ast.parse(cell).body
    last = ast.Expression(body.pop().value) if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    value = eval(compile(last, "cell", "eval"), names) if last else None
    if hasattr(value, "savefig"):
        value.savefig(f"figure{len(shown)}.png")
        shown.append([len(value.axes), sum(len(axes.texts) for axes in value.axes)])
found = {title: [result["img_path"] for result in results] for title, results in names["results"].items()}
json.dump(dict(shown=shown, found=found), open("shown.json", "w"))
"""


def code_cells() -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_it_is_committed_without_outputs_and_installs_first():
    cells = code_cells()
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    assert [i for i, cell in enumerate(cells) if any("%pip install" in line for line in cell["source"])] == [0]
    for setting in SETTINGS.values():
        lines = [line for cell in cells for line in cell["source"] if line.startswith(setting)]
        assert len(lines) == 1  # what the test below edits


@pytest.mark.slow
def test_its_cells_run(tmp_path):
    pictures = []
    for i, shape in enumerate([(90, 120, 3), (120, 90, 3), (200, 200, 3)]):
        pictures.append(tmp_path / f"mine{i}.jpg")
        cv2.imwrite(str(pictures[-1]), np.random.default_rng(i).integers(0, 255, shape, dtype=np.uint8))
    plan = ["tiny", 8, 3]
    for name, text in (("mask_rcnn_swin_float_quick", FLOAT), ("mask_rcnn_sibivit_quick", BINARY)):
        file = tmp_path / f"tiny_{name}.py"
        file.write_text(text.format(base=config_path(f"digits/{name}").as_posix()))
        plan.append(str(file))
    edited = {
        SETTINGS["PLAN"]: f"from mmbivit.demo import DemoPlan; PLAN = DemoPlan(*{plan!r})",
        SETTINGS["PICTURES"]: f"PICTURES = {[str(picture) for picture in pictures]!r}",
    }
    cells = []
    for cell in code_cells():
        text = "".join(line for line in cell["source"] if not line.startswith("%"))  # commands of notebooks
        for before, after in edited.items():
            text = text.replace(before, after)
        ast.parse(text)
        cells.append(text)
    folder = tmp_path / "notebook"
    folder.mkdir()
    result = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(cells),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    shown = json.loads((folder / "shown.json").read_text())
    assert shown["found"] == dict.fromkeys(("float", "SI-BiViT", "packed"), [str(picture) for picture in pictures])
    scenes, curves, detections, attention = shown["shown"]
    assert scenes[0] == 3 and scenes[1] > 3  # scenes of the validation set, with the names of their digits
    assert detections[0] == 9 and curves[0] >= 3 and attention[0] >= 5
    packed = load(folder / "work_dirs" / "tutorial" / "sibivit.safetensors")
    assert packed.dataset_meta["classes"] == tuple("0123456789")
    assert "layers on bits" in result.stdout  # the table of the export
