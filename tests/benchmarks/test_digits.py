"""The benchmark of classifiers on cluttered digits, with a tool instead of trainings."""

from pathlib import Path

import pytest

from mmbivit import get_config
from mmbivit_benchmarks.digits import ARMS, FLOAT, draw_curves, markdown_table, run_arms

# Logs the accuracy 10 x (seed + 1) + epoch, and notes the teacher it was given.
TOOL = """
import json, sys
from pathlib import Path
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
work_dir, seed = Path(options["--work-dir"]), int(options["--seed"])
log = work_dir / "20260101_000000" / "vis_data" / "scalars.json"
log.parent.mkdir(parents=True)
rows = [{"accuracy/top1": 10.0 * (seed + 1) + epoch, "step": epoch} for epoch in (2, 4)]
log.write_text("\\n".join(map(json.dumps, rows)))
(work_dir / "last_checkpoint").write_text("epoch_4.pth")
(work_dir / "teacher").write_text(options.get("--float-checkpoint", ""))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    (out / "tool.py").write_text(TOOL)
    return out, run_arms((0, 2), out, out / "tool.py", out / "data", jobs=2)


def test_every_arm_runs_with_every_seed_and_its_own_float_network(finished):
    out, results = finished

    assert tuple(results) == ARMS
    for arm, runs in results.items():
        assert [[row["accuracy/top1"] for row in run] for run in runs] == [[12.0, 14.0], [32.0, 34.0]]
        for seed in (0, 2):
            teacher = (out / f"{Path(arm.config).name}_seed{seed}" / "teacher").read_text()
            assert teacher == (str(out / f"digits_swin_float_seed{seed}" / "epoch_4.pth") if arm.taught else "")


def test_table_has_the_last_accuracy_and_the_size(finished):
    lines = markdown_table(finished[1]).splitlines()

    # Mean of 14 and 34; sqrt(2 * 10**2 / 1)
    assert lines[2].startswith("| float | 24.0 ± 14.1 | 14.0, 34.0 | ")
    assert len(lines) == 2 + len(ARMS)
    assert "(float " in lines[2] and all("(float " not in line for line in lines[3:])


def test_plot_has_a_curve_an_arm_and_marks_the_switch(finished):
    (axes,) = draw_curves(finished[1]).axes

    curves = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_label()[0] != "_"]
    assert [line.get_label() for line in curves] == [f"{arm.label}: 24.0 ± 14.1 %" for arm in ARMS]
    assert all(list(line.get_xdata()) == [2, 4] and list(line.get_ydata()) == [22, 24] for line in curves)
    switches = [line.get_xdata()[0] for line in axes.lines if line not in curves]
    assert switches == [get_config("digits_sibivit").custom_hooks[0].switch_epoch]


def test_arms_differ_in_what_their_names_say_only():
    configs = {arm.label: get_config(arm.config) for arm in ARMS}
    same = ("train_dataloader", "val_dataloader", "train_cfg", "optim_wrapper")
    reference = get_config(FLOAT.config)
    for cfg in configs.values():
        assert all(cfg[key] == reference[key] for key in same)
        assert all(entry.get("end", 0) <= cfg.train_cfg.max_epochs for entry in cfg.param_scheduler)
    for label, cfg in configs.items():
        backbone = cfg.model.backbone
        assert (backbone.recipe == "float") == (label == "float")
        has_si = backbone.get("spatial_interaction") is not None
        assert has_si == (label not in ("float", "binary, no SI"))
        assert backbone.mlp_ratio == (3 if has_si else 4)
        assert (cfg.load_from is not None) == label.endswith("from float weights")
        assert bool(cfg.get("custom_hooks")) == label.startswith("two stages")
    assert configs[ARMS[-1].label].custom_hooks[0].switch_epoch * 2 == reference.train_cfg.max_epochs
