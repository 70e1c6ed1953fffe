"""Repeated augmentation against orders worked out by hand."""

import pytest
import torch
from mmengine.registry import DATA_SAMPLERS as ROOT_DATA_SAMPLERS

from mmbivit import config_path
from mmbivit.apis import load_config
from mmbivit.datasets import RepeatAugSampler

OPTIONS = dict(type="mmbivit.RepeatAugSampler", num_repeats=3)


def sampler_of(monkeypatch, rank, world_size, size=4, **options):
    monkeypatch.setattr("mmbivit.datasets.repeat_aug.get_dist_info", lambda: (rank, world_size))
    return RepeatAugSampler(range(size), **{"selected_round": 0, **options})


def test_repeats_go_to_different_ranks(monkeypatch):
    ranks = [sampler_of(monkeypatch, rank, 2, seed=5) for rank in (0, 1)]
    for epoch in (0, 1):
        a, b, *_ = torch.randperm(4, generator=torch.Generator().manual_seed(5 + epoch)).tolist()
        # a a a b b b ..., dealt out in turn: rank 0 gets a a b ..., rank 1 gets a b b ...; 4 images / 2 ranks = 2 each
        if epoch:
            for sampler in ranks:
                sampler.set_epoch(epoch)
        assert [list(sampler) for sampler in ranks] == [[a, a], [a, b]]
        assert [len(sampler) for sampler in ranks] == [2, 2]


def test_order_follows_seed_and_epoch(monkeypatch):
    first, same, other = (sampler_of(monkeypatch, 0, 1, 50, seed=seed, num_repeats=2) for seed in (3, 3, 4))
    order = list(first)
    assert order == list(same) != list(other)
    assert order[::2] == order[1::2]
    assert len(set(order)) == 25
    first.set_epoch(1)
    assert list(first) == list(other) != order


def test_draws_a_seed_like_mmengine(monkeypatch):
    monkeypatch.setattr("mmbivit.datasets.repeat_aug.sync_random_seed", lambda: 7)
    assert list(sampler_of(monkeypatch, 0, 1, 50)) == list(sampler_of(monkeypatch, 0, 1, 50, seed=7))


def test_the_options_in_the_docs_change_the_sampler_of_the_imagenet_config():
    changes = {f"train_dataloader.sampler.{key}": value for key, value in OPTIONS.items()}
    cfg = load_config(config_path("sibivit_swin_t_imagenet"), cfg_options=changes).train_dataloader.sampler
    sampler = ROOT_DATA_SAMPLERS.build(cfg, default_args=dict(dataset=range(512), seed=0))
    assert isinstance(sampler, RepeatAugSampler)
    order = list(sampler)
    assert len(order) == 512 and order[0:510:3] == order[1:510:3] == order[2:510:3] and len(set(order)) == 171


def test_without_shuffling_the_order_is_that_of_the_data(monkeypatch):
    assert list(sampler_of(monkeypatch, 0, 1, seed=5, num_repeats=2, shuffle=False)) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(size=300, selected_round=256, selected_ratio=1000), "would hold no images: 300 images, 1 ranks"),
        (dict(size=0), "would hold no images"),
        (dict(num_repeats=0), "num_repeats=0; allowed"),
    ],
)
def test_refuses_empty_epochs(monkeypatch, options, message):
    with pytest.raises(ValueError, match=message):
        sampler_of(monkeypatch, 0, 1, **options)
