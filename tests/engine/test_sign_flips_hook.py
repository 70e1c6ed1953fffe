"""Sign flips are counted right, logged in MMEngine's JSON, and go on after a resume."""

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from torch import nn

from mmbivit.binary import BinaryLinear
from tests.analysis.logs import logged
from tests.engine.toy import ToyModel, make_runner

LAYER = "backbone.stages.0.blocks.0.attn.qkv"


class Weights(Hook):
    """Copies the binary layers' weights before training and after each iteration."""

    def __init__(self):
        self.seen = []

    def copy(self, runner):
        layers = {name: m for name, m in runner.model.named_modules() if isinstance(m, BinaryLinear)}
        self.seen.append({name: layer.weight.detach().numpy().copy() for name, layer in layers.items()})

    before_train = copy

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.copy(runner)


def flips(before, after):
    """Flipped and all weights, counted one by one."""
    changed = size = 0
    for old_row, new_row in zip(before, after, strict=True):
        for old, new in zip(old_row >= np.mean(old_row), new_row >= np.mean(new_row), strict=True):
            changed += old != new
            size += 1
    return changed, size


def expected(before, after):
    counts = {name: flips(before[name], after[name]) for name in before}
    total = sum(changed for changed, _ in counts.values()) / sum(size for _, size in counts.values())
    layers = {f"sign_flips/{name}": changed / size for name, (changed, size) in counts.items()}
    return {"sign_flips": total, **layers}


@pytest.mark.parametrize("by_epoch, interval", [(True, None), (False, 2), (True, 3)])
def test_shares_are_those_of_weights_that_changed_sign(tmp_path, by_epoch, interval):
    weights = Weights()
    hooks = [weights, dict(type="mmbivit.SignFlipsHook", interval=interval)]
    switch = dict(switch_epoch=1) if by_epoch else dict(switch_iter=2)
    make_runner(tmp_path, switch, by_epoch=by_epoch, length=2 if by_epoch else 5, hooks=hooks).train()
    every = interval or 4
    entries = logged(tmp_path, "sign_flips")
    assert [entry.pop("step") for entry in entries] == list(range(every, len(weights.seen), every))
    for entry in entries:
        end = entry.pop("iter")
        wanted = expected(weights.seen[end - every], weights.seen[end])
        assert entry == pytest.approx(wanted, abs=1e-12)
        assert 0 < entry[f"sign_flips/{LAYER}"] < 0.5


def test_a_resumed_run_logs_what_an_uninterrupted_one_does(tmp_path):
    """The checkpoint lies between two looks, so the weights that were seen last are not those in it."""
    hooks = [dict(type="mmbivit.SignFlipsHook", interval=2)]
    checkpoint = dict(type="CheckpointHook", interval=3, by_epoch=False)
    options = dict(by_epoch=False, hooks=hooks, checkpoint=checkpoint, sampler="DefaultSampler")
    data = dict(sampler=dict(type="DefaultSampler", shuffle=False))  # MMEngine alone does not restore the order
    make_runner(tmp_path / "whole", dict(switch_iter=1), length=4, data=data, **options).train()
    make_runner(tmp_path / "killed", dict(switch_iter=1), length=3, data=data, **options).train()
    last = str(tmp_path / "killed" / "iter_3.pth")
    make_runner(
        tmp_path / "killed", dict(switch_iter=1), length=4, data=data, load_from=last, resume=True, **options
    ).train()
    whole, killed = (logged(tmp_path / name, "sign_flips") for name in ("whole", "killed"))
    assert [entry["step"] for entry in killed] == [2, 4]
    assert killed == whole


def test_a_checkpoint_of_a_run_without_the_hook_can_be_resumed(tmp_path):
    make_runner(tmp_path, dict(switch_epoch=1), length=2).train()
    hooks = [dict(type="mmbivit.SignFlipsHook")]
    last = str(tmp_path / "epoch_2.pth")
    make_runner(tmp_path, dict(switch_epoch=1), length=3, hooks=hooks, load_from=last, resume=True).train()
    assert [entry["step"] for entry in logged(tmp_path, "sign_flips")] == [12]
    assert {"sign_flips_signs"} <= torch.load(tmp_path / "epoch_3.pth", weights_only=False).keys()


def test_what_cannot_be_counted_is_refused(tmp_path):
    hooks = [dict(type="mmbivit.SignFlipsHook")]
    with pytest.raises(ValueError, match="set interval, in iterations"):
        make_runner(tmp_path, dict(switch_iter=1), by_epoch=False, hooks=hooks).train()
    with pytest.raises(ValueError, match=r"interval=0; allowed: an integer of 1 or more"):
        make_runner(tmp_path, None, hooks=[dict(type="mmbivit.SignFlipsHook", interval=0)])
    model = ToyModel(recipe="float", spatial_interaction=None)
    assert not any(isinstance(module, BinaryLinear) for module in model.modules() if isinstance(module, nn.Linear))
    with pytest.raises(ValueError, match="no layer with binary weights"):
        make_runner(tmp_path, None, model=model, hooks=hooks).train()


def test_signs_of_another_network_or_release_are_not_taken_over(tmp_path):
    """Their shape would be noticed at the first look only, perhaps an epoch later."""
    hooks = [dict(type="mmbivit.SignFlipsHook", interval=1)]
    make_runner(tmp_path, dict(switch_epoch=1), length=2, hooks=hooks).train()
    content = torch.load(tmp_path / "epoch_1.pth", weights_only=False)
    saved = content["sign_flips_signs"]
    assert saved[LAYER].dtype == torch.uint8 and saved[LAYER].shape == (24, 1)
    # Earlier releases packed 32 signs a word, which for up to 8 inputs has the same shape.
    odd = (torch.zeros(3), torch.zeros(2, 2, dtype=torch.uint8), torch.full((24, 1), -1, dtype=torch.int32))
    for name, tensor in zip([*[name for name in saved if name != LAYER][:2], LAYER], odd, strict=True):
        saved[name] = tensor
    torch.save(content, tmp_path / "odd.pth")
    odd = str(tmp_path / "odd.pth")
    make_runner(tmp_path, dict(switch_epoch=1), length=2, hooks=hooks, load_from=odd, resume=True).train()
    resumed = [entry[f"sign_flips/{LAYER}"] for entry in logged(tmp_path, "sign_flips") if entry["step"] == 5]
    assert len(resumed) == 2 and resumed[1] == resumed[0]  # taken over, words of -1 would be half of all signs
