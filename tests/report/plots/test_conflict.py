import io

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from rich.console import Console

from mmbivit.analysis.gradient_conflict import ConflictRow, GradientConflict
from mmbivit.apis import load_config
from mmbivit.report.plots.conflict import conflict_table, measure_conflict, plot_conflict
from tests.packed_files import trained
from tests.tiny import CLASSES


@pytest.fixture(scope="module", params=["detector", "classifier"])
def network(request, tmp_path_factory):
    """Config, checkpoint of stage 2, and a float teacher's checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    fixture, classes, scope = {
        "detector": ("configs", ("person",), "mmdet"),
        "classifier": ("classifier_configs", CLASSES, "mmengine"),
    }[request.param]
    configs = request.getfixturevalue(fixture)
    trained(configs["binary"], folder / "binary.pth", classes, scope)
    trained(configs["float"], folder / "float.pth", classes, scope)
    return configs["binary"], folder / "binary.pth", dict(teacher_checkpoint=folder / "float.pth", batches=2)


classifier = pytest.mark.parametrize("network", ["classifier"], indirect=True)


def changed(config, folder, old, new):
    """Write the config again with something else in its hook."""
    text = config.read_text().replace('"./', f'"{config.parent.as_posix()}/')
    assert text.count(old) == 1
    path = folder / "changed.py"
    path.write_text(text.replace(old, new))
    return path


def sizes(conflict):
    return torch.tensor([(row.harmonious, row.conflicting) for row in conflict.rows], dtype=torch.float64)


def test_measure(network):
    config, checkpoint, options = network
    conflict = measure_conflict(config, checkpoint, **options)
    assert conflict.batches == 2
    assert [row.block for row in conflict.rows] == ["stages.0.blocks.0"] * 2 + ["stages.1.blocks.0"] * 2
    assert sizes(conflict).min() > 0
    # Equal arguments, equal numbers, whatever was drawn before; another seed, another draw.
    torch.rand(3)
    assert measure_conflict(config, checkpoint, **options, seed=0) == conflict
    assert measure_conflict(config, checkpoint, **options, seed=1) != conflict


@classifier
def test_weight_and_loss_are_the_hooks(network, tmp_path):
    config, checkpoint, options = network
    conflict = measure_conflict(config, checkpoint, **options)
    # Twice the weight is twice the gradient, to the last bit.
    double = changed(config, tmp_path, "switch_epoch=1", "switch_epoch=1, distill_weight=2.0")
    assert torch.equal(sizes(measure_conflict(double, checkpoint, **options)), 2 * sizes(conflict))
    normalized = "switch_epoch=1, distill_loss=dict(type='mmbivit.BlockMSELoss', normalize=True)"
    other = measure_conflict(changed(config, tmp_path, "switch_epoch=1", normalized), checkpoint, **options)
    assert not torch.allclose(sizes(other), sizes(conflict), rtol=0.01)


def test_the_seed_draws_the_images(network, monkeypatch):
    config, checkpoint, options = network

    def files(model, teacher, batches, *_):
        batches = list(batches)
        return [batch.get("img_path") or [sample.img_path for sample in batch["data_samples"]] for batch in batches]

    monkeypatch.setattr("mmbivit.report.plots.conflict.gradient_conflict", files)
    drawn = measure_conflict(config, checkpoint, **options)
    assert [len(batch) for batch in drawn] == [len(drawn[0])] * 2
    assert measure_conflict(config, checkpoint, **options) == drawn
    assert measure_conflict(config, checkpoint, **options, seed=1) != drawn


@classifier
def test_plot(network):
    config, checkpoint, options = network
    (axes,) = plot_conflict(config, checkpoint, **options).axes
    blocks = measure_conflict(config, checkpoint, **options).by_block().values()
    up, down = ([bar.get_height() for bar in bars] for bars in axes.containers)
    for height, (harmonious, conflicting) in zip(zip(up, down, strict=True), blocks, strict=True):
        assert height[0] / height[1] == pytest.approx(-conflicting / harmonious)


@classifier
def test_impossible_settings_are_refused_in_one_line(network, tmp_path):
    config, checkpoint, options = network
    with pytest.raises(ValueError, match="batches=0; allowed: an integer of 1 or more"):
        plot_conflict(config, checkpoint, **options | dict(batches=0))
    with pytest.raises(ValueError, match="seed=-1; allowed"):
        plot_conflict(config, checkpoint, **options, seed=-1)
    with pytest.raises(ValueError, match="99 batches are wanted, but an epoch of the training data has"):
        plot_conflict(config, checkpoint, **options | dict(batches=99))
    with pytest.raises(FileNotFoundError, match="none.pth does not exist.*--teacher-checkpoint"):
        plot_conflict(config, checkpoint, teacher_checkpoint=str(tmp_path / "none.pth"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        plot_conflict(config, checkpoint, **options, data_root=str(tmp_path / "nowhere"))
    # Without a hook that distils.
    alone = tmp_path / "alone.py"
    base = config.read_text().replace('"./', f'"{config.parent.as_posix()}/').partition("custom_hooks")[0]
    alone.write_text(base + "custom_hooks = [dict(type='mmbivit.DecoupledTrainingHook', switch_epoch=1)]\n")
    with pytest.raises(ValueError, match="alone.py has no teacher") as error:
        plot_conflict(alone, checkpoint, **options)
    assert "\n" not in str(error.value)


@classifier
def test_a_fresh_branch_is_refused_in_one_line(network, tmp_path):
    config, _, options = network
    cfg = load_config(config)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / "fresh.pth")
    with pytest.raises(ValueError, match="all balancing factors alpha are 0"):
        plot_conflict(config, tmp_path / "fresh.pth", **options)


def test_table():
    rows = (
        ConflictRow("stages.0.blocks.0", "fc1.weight", 2.45, 1.97),
        ConflictRow("stages.0.blocks.0", "fc2.weight", 1.0, 2.03),
        ConflictRow("stages.0.blocks.1", "fc1.weight", 0.0, 0.0),
    )
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(conflict_table(GradientConflict(rows, 4)))
    lines = [line.replace("│", " ").split() for line in console.export_text().splitlines()]
    assert ["stages.0.blocks.0", "3.45", "4", "53.7%"] in lines
    assert ["stages.0.blocks.1", "0", "0", "-"] in lines
    assert ["all", "3.45", "4", "53.7%"] in lines
