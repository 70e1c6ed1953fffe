"""The benchmark of whole detectors on a tiny one: what is compared computes the same, and the tables say so."""

import io
import json
import statistics

import pytest
import torch
from rich.console import Console

from mmbivit.deploy.around import packed_layers
from mmbivit_benchmarks.packed import detector_run, make_detector_report, run_detector_benchmark
from mmbivit_benchmarks.packed.detector_run import fastest
from mmbivit_benchmarks.packed.detectors import CONFIGS, PARTS, Parts, detect, make_detectors

TINY = {
    "model.backbone.arch": dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)),
    "model.neck.in_channels": [16, 32, 64, 128],
    "model.neck.out_channels": 32,
    "model.rpn_head.in_channels": 32,
    "model.rpn_head.feat_channels": 32,
    "model.roi_head.bbox_roi_extractor.out_channels": 32,
    "model.roi_head.mask_roi_extractor.out_channels": 32,
    "model.roi_head.bbox_head.in_channels": 32,
    "model.roi_head.bbox_head.fc_out_channels": 320,
    "model.roi_head.mask_head.in_channels": 32,
    "model.roi_head.mask_head.conv_out_channels": 32,
}
SHAPE = (1, 96, 128)


@pytest.fixture(scope="module")
def images():
    return torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(1))


def test_parts_are_those_of_one_inference(images):
    for name, (_, model) in make_detectors(images, TINY).items():
        parts = Parts(model, images)
        parts.run()
        whole, found = detect(model, images)[0].pred_instances, parts.values["mask_post"][0]
        assert torch.equal(found.bboxes, whole.bboxes) and torch.equal(found.masks, whole.masks), name
        assert parts.found == (len(parts.values["proposals"][0]), len(found)) and len(found) > 10
        layers = packed_layers(model)
        assert bool(layers) == (name == "whole")


def test_everything_is_measured_and_in_the_tables(images, monkeypatch):
    monkeypatch.setattr(detector_run, "TENSOR_PARTS", ("neck", "rpn"))  # exporting others takes half a minute
    # The memory of one of them in a process of its own, as all are in earnest: each takes seconds to start.
    in_process = detector_run._memory

    def memory(name, *args):
        return (in_process if name == "float" else detector_run._measure_here)(name, *args)

    monkeypatch.setattr(detector_run, "_memory", memory)
    results = json.loads(json.dumps(run_detector_benchmark(SHAPE, 1, 1, TINY)))
    assert list(results["parts"]) == list(PARTS)
    for part, rows in results["parts"].items():
        assert all(rows[name]["ms"] for name in ("float", *CONFIGS)), part
        assert not [row for row in rows.values() if "problem" in row and "pip install" not in row["problem"]], rows
        name, time = fastest(rows)
        assert name not in CONFIGS and 0 < time <= statistics.median(rows["float"]["ms"])
    assert (
        results["files"]["half"]
        < results["files"]["whole"]
        < results["files"]["float_heads"]
        < results["files"]["float"]
    )
    assert all(row.get("peak", 0) >= row.get("loaded", 1) for row in results["memory"].values()), results["memory"]
    console = Console(file=io.StringIO(), width=132, markup=False)
    console.print(make_detector_report(results))
    text = console.file.getvalue()
    assert all(title in text for title in (*PARTS.values(), "whole, measured", "peak memory", "its file"))
