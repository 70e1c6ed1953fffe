"""Runs by a tool that is written here, so that its log is known."""

import pytest

from mmbivit_benchmarks.repeated_runs import train_once

TOOL = """
import json, os, sys
from pathlib import Path
assert os.environ["OMP_NUM_THREADS"] == "1"
config, option, work_dir, *rest = sys.argv[1:]
assert option == "--work-dir" and rest == ["--seed", "7"], sys.argv
log = Path(work_dir) / "20260101_000000" / "vis_data" / "scalars.json"
log.parent.mkdir(parents=True)
rows = [dict(loss=2.0, step=1), {"accuracy/top1": 10.0, "step": 1}]
rows += [dict(loss=1.0, step=2), {"accuracy/top1": 30.0, "step": 2}]
log.write_text("\\n".join(map(json.dumps, rows)))
"""


def test_a_run_is_done_once_and_returns_its_evaluations(tmp_path):
    tool = tmp_path / "tool.py"
    tool.write_text(TOOL)
    arguments = ("mask_rcnn_sibivit_swin_t", tmp_path / "run", ["--seed", 7], "accuracy/top1")

    first = train_once(tool, *arguments)
    assert [row["accuracy/top1"] for row in first] == [10.0, 30.0]
    tool.write_text("raise SystemExit(1)")
    assert train_once(tool, *arguments) == first


@pytest.mark.parametrize("tool", ["raise SystemExit(1)", "pass"])
def test_a_run_that_fails_or_logs_nothing_is_an_error_that_names_its_log(tmp_path, tool):
    (tmp_path / "tool.py").write_text(tool)
    for _ in range(2):  # the first must not count as done
        with pytest.raises(RuntimeError, match=r"run.log\.txt"):
            train_once(tmp_path / "tool.py", "mask_rcnn_sibivit_swin_t", tmp_path / "run", [], "accuracy/top1")
