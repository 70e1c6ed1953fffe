"""What tools show besides the user's run: nothing of libraries, and all that is new."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from mmengine.logging import MMLogger, print_log

from mmbivit.engine.quiet import quiet, quiet_logger

ROOT = Path(__file__).parents[2]
NOISE = (
    "OneDL",
    "faster_coco_eval",
    "Failed to",
    "out of bounds",
    "be deprecated",
    "is deprecated",
    "is the alias of",
    "`self.param_sched",
)

# A user's module, whose messages are of every kind.
NOISY = """
import warnings
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS

warnings.warn("a warning while it is imported")

@HOOKS.register_module()
class NoisyHook(Hook):
    def before_train(self, runner):
        warnings.warn("a warning of training")
        runner.logger.warning("a record of training")
        print_log("a printed line of training")
"""

NOISY_CONFIG = """
_base_ = "{base}"
custom_imports = dict(imports=["noisy"])
custom_hooks = [dict(type="NoisyHook")]
param_scheduler = None
train_cfg = dict(max_epochs=1, val_interval=1)
"""


def output_of(tool: str, *args: object, modules: Path = ROOT) -> str:
    """Run a tool in a process of its own and return all that it shows."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(modules)))},
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
def test_training_shows_what_is_about_the_run_and_nothing_of_libraries(configs, tmp_path):
    (tmp_path / "noisy.py").write_text(NOISY)
    config = tmp_path / "config.py"
    config.write_text(NOISY_CONFIG.format(base=configs["float"].as_posix()))

    output = output_of("train.py", config, "--work-dir", tmp_path / "run", modules=tmp_path)

    assert "coco/segm_mAP" in output
    assert [text for text in NOISE if text in output] == []
    for text in ("while it is imported", "a warning of training", "a record of training", "a printed line of training"):
        assert text in output


@pytest.mark.slow
def test_predictions_show_nothing_of_libraries(configs, float_checkpoint, images, tmp_path):
    options = ("--out-dir", tmp_path, "--score-thr", 0)
    output = output_of("predict.py", configs["float"], float_checkpoint, *images, *options)

    assert f"Wrote {len(images)} pictures" in output
    assert [text for text in NOISE if text in output] == []


def test_warnings_are_told_by_text_and_module():
    known = {
        "faster_coco_eval is not installed, metrics will not be computed. Please": "mmdet.evaluation.metrics.f",
        "Warning: The bbox is out of bounds, the drawn bbox": "mmengine.visualization.visualizer",
        "pkg_resources is deprecated as an API. See": "importlib",
        "Detected call of `scheduler.step()` before `optimizer.step()`. In": "mmengine.optim.scheduler.param_scheduler",
        "`broadcast_buffers` is deprecated. Use": "mmengine.model.wrappers.distributed",
    }
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")  # whatever pytest leaves out
        with quiet():
            for text, module in known.items():
                warnings.warn_explicit(text, UserWarning, "f.py", 1, module)
            warnings.warn_explicit("The bbox is out of it", UserWarning, "f.py", 2, "mmengine.visualization.visualizer")
            warnings.warn_explicit(next(iter(known)), UserWarning, "f.py", 3, "user")
    assert [warning.lineno for warning in seen] == [2, 3]


def test_printed_lines_are_told_by_their_whole_text(capsys):
    line = "Could not import OneDL. Skipping OneDL datasets."
    with quiet():
        with quiet():  # one tool's function calls another
            print_log(line)
        print_log(line)
        print_log("Could not import OneDL")
    assert capsys.readouterr().out == "Could not import OneDL\n"

    print_log(line)
    assert "Skipping" in capsys.readouterr().out  # as it was, once the function is done


def test_records_are_told_by_their_whole_text(capsys):
    logger = MMLogger("quiet")
    quiet_logger(logger)
    logger.warning('"FileClient" will be deprecated in future. Please use io functions in https://example.org/x')
    logger.warning('"HardDiskBackend" is the alias of "LocalBackend" and the former will be deprecated in future.')
    logger.warning("The prefix is not set in metric class DumpDetResults.")
    logger.warning("The prefix is not set in metric class MyMetric.")
    logger.warning("The disk will be deprecated in future.")
    assert [line.rpartition(" - ")[2] for line in capsys.readouterr().out.splitlines()] == [
        "The prefix is not set in metric class MyMetric.",
        "The disk will be deprecated in future.",
    ]
