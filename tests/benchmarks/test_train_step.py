"""The benchmark of training steps on tiny networks: what it trains, what it counts, and its tables."""

import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn

from mmbivit.packed.kernels import available_paths
from mmbivit_benchmarks import train_step
from mmbivit_benchmarks.train_step import (
    PARTS,
    VARIANTS,
    Step,
    kept_bytes,
    make_step_report,
    run_step_benchmark,
    where_time_goes,
)

from .test_packed_detectors import TINY

SIZES = dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
CHANGES = TINY | {f"float_backbone.{key}": value for key, value in SIZES.items()}
SHAPE = (1, 64, 96)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_trains_what_its_name_says(name):
    variant = VARIANTS[name]
    step = Step("backbone", variant, SHAPE, changes=CHANGES | {"model.backbone.drop_path_rate": 0.0})
    backbone = step.model.backbone
    assert getattr(backbone, "stage", None) == variant.stage
    assert set(step.model(step.images, mode="loss")) == ({"loss", "loss_distill"} if variant.teacher else {"loss"})
    before = {key: value.clone() for key, value in step.model.state_dict().items()}
    step()
    changed = [key for key, value in step.model.state_dict().items() if not torch.equal(value, before[key])]
    assert any("stages.0" in key for key in changed) and any("stages.3" in key for key in changed)
    assert all(parameter.grad is None for parameter in step.model.parameters())


def test_each_storage_is_counted_once_and_parameters_are_not():
    class Squares(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(100))

        def loss(self):
            x = torch.ones(100, requires_grad=True) * 1
            return (x * x).sum() + (x.view(10, 10) * x.view(10, 10)).sum() + (self.factor * x).sum()

        @property
        def model(self):
            return self

    assert kept_bytes(Squares()) == 400


def test_shares_are_those_of_what_a_step_calls():
    changes = CHANGES | {"model.backbone.drop_path_rate": 0.0}
    shares = {name: where_time_goes(Step("backbone", VARIANTS[name], SHAPE, changes=changes)) for name in VARIANTS}
    assert all(sum(row.values()) == pytest.approx(1) and row["float products"] > 0 for row in shares.values())
    native = {name: row["native products"] > 0 and row["native attention"] > 0 for name, row in shares.items()}
    built = available_paths()[0] != "reference"
    assert native == {name: bool(v.stage) and v.keep_bits and built for name, v in VARIANTS.items()}


def test_detector_and_backbone_are_measured_and_in_the_tables(monkeypatch):
    # The memory of one of them in a process of its own, as all are in earnest: each takes seconds to start.
    in_process = train_step._memory

    def memory(make, shape, threads, device):
        if make.args[-1] is VARIANTS["float"]:
            return in_process(make, shape, threads, device)
        return train_step._peak_on_cpu(make, shape, threads)

    monkeypatch.setattr(train_step, "_memory", memory)
    for part, variants in zip(PARTS, [list(VARIANTS), ["float", "stage2", "stage2_floats"]], strict=True):
        results = run_step_benchmark(part, SHAPE, variants, 2, 1, memory=part == "backbone", changes=CHANGES)
        rows = json.loads(json.dumps(results))["rows"]
        assert all(len(row["ms"]) == 2 and row["kept"] > 0 for row in rows.values())
        assert not [row["problem"] for row in rows.values() if "problem" in row]
        assert all("peak" in row for row in rows.values()) == (part == "backbone")
        assert rows["stage2"]["kept"] < rows["stage2_floats"]["kept"]
        console = Console(file=io.StringIO(), width=132, markup=False)
        console.print(make_step_report(results))
        text = console.file.getvalue()
        assert all(VARIANTS[name].title in text for name in variants) and "step time, stage 2" in text
