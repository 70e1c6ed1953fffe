"""Processes that would train different networks are refused; with real processes: tests/robustness/test_ranks.py."""

import pytest
import torch
from torch import nn

from mmbivit.engine import ranks_hook

from .toy import make_runner


def test_other_weights_on_another_rank_are_refused(tmp_path, monkeypatch):
    def gather(values):
        other = dict(values)
        if "checksum of the weights" in other:
            other["checksum of the weights"] ^= 1
        return [values, other]

    monkeypatch.setattr(ranks_hook, "all_gather_object", gather)
    with pytest.raises(ValueError, match=r"differ, checksum of the weights: \d+ on rank 0, \d+ on rank 1; give every"):
        make_runner(tmp_path, None, hooks=[dict(type="mmbivit.RanksHook")], length=1).train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_checksum_sees_every_weight(dtype):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(dtype)
    model[0].scale = nn.Parameter(torch.ones((), dtype=dtype))
    seen = {ranks_hook._checksum(model)}
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.reshape(-1)[-1] += 1
        seen.add(ranks_hook._checksum(model))
    assert len(seen) == 1 + len(list(model.parameters())) == 6
