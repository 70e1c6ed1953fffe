"""The command line: what each option becomes, error lines and exit codes, several processes."""

import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def call(monkeypatch, tool: str, *args: object) -> int:
    """Run a tool in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", [f"tools/{tool}", *map(str, args)])
    monkeypatch.delenv("MMBIVIT_DEBUG", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    try:
        runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def calls(monkeypatch) -> dict[str, tuple]:
    """What the tools pass on, instead of what they would do with it."""
    seen = {}
    for name in ("train_config", "train", "evaluation_config", "evaluate", "predict"):

        def record(*args, _name=name, **kwargs):
            seen[_name] = (args, kwargs)
            return [_name]

        monkeypatch.setattr(f"mmbivit.apis.{name}", record)
    return seen


def test_train_passes_every_option_on(monkeypatch, calls):
    options = "--work-dir w --amp --auto-scale-lr --resume r.pth --cfg-options a.b=1 c=[2,3] --launcher pytorch"
    options += " --data-root d --float-checkpoint f.pth --backbone-checkpoint b.pth --tensorboard --seed 7"
    assert call(monkeypatch, "train.py", "c.py", *options.split()) == 0
    assert calls["train_config"] == (
        ("c.py",),
        dict(
            work_dir="w",
            amp=True,
            auto_scale_lr=True,
            resume="r.pth",
            cfg_options={"a.b": 1, "c": [2, 3]},
            launcher="pytorch",
            data_root="d",
            float_checkpoint="f.pth",
            backbone_checkpoint="b.pth",
            tensorboard=True,
            seed=7,
        ),
    )
    assert calls["train"] == ((["train_config"],), {})

    call(monkeypatch, "train.py", "c.py", "--resume")
    assert calls["train_config"][1]["resume"] == "auto"
    call(monkeypatch, "train.py", "c.py")
    defaults = calls["train_config"][1]
    assert {key for key, value in defaults.items() if value not in (None, False)} == {"launcher"}
    assert defaults["launcher"] == "none"


def test_test_passes_every_option_on(monkeypatch, calls):
    options = "--work-dir w --out o.pkl --show --show-dir s --wait-time 0.5 --tta --cfg-options a=b --launcher slurm"
    assert call(monkeypatch, "test.py", "c.py", "x.pth", *options.split(), "--data-root", "d") == 0
    assert calls["evaluation_config"] == (
        ("c.py", "x.pth"),
        dict(
            work_dir="w",
            show=True,
            show_dir="s",
            wait_time=0.5,
            tta=True,
            cfg_options={"a": "b"},
            launcher="slurm",
            data_root="d",
        ),
    )
    assert calls["evaluate"] == ((["evaluation_config"],), {"out": "o.pkl"})


def test_predict_passes_every_option_on(monkeypatch, calls):
    options = "--out-dir o --score-thr 0.5 --device cpu --batch-size 4"
    assert call(monkeypatch, "predict.py", "c.py", "x.pth", "a.jpg", "b", *options.split()) == 0
    assert calls["predict"] == (
        ("c.py", "x.pth", ["a.jpg", "b"], "o"),
        dict(score_thr=0.5, device="cpu", batch_size=4),
    )


@pytest.mark.parametrize(
    ("tool", "args", "code", "message"),
    [
        ("train.py", ["no.py"], 1, "error: config no.py does not exist"),
        ("test.py", ["no.py", "x.pth"], 1, "error: config no.py does not exist"),
        ("predict.py", ["no.py", "x.pth", "a.jpg", "--out-dir", "o"], 1, "error: config no.py does not exist"),
        ("train.py", ["{config}", "--resume", "no.pth"], 1, "error: --resume: checkpoint no.pth does not exist"),
        ("test.py", ["{config}", "no.pth"], 1, "error: checkpoint no.pth does not exist"),
        ("predict.py", ["{config}", "no.pth", "{image}", "--out-dir", "o"], 1, "error: checkpoint no.pth does not"),
        ("predict.py", ["{config}", "no.pth", "{config}", "--out-dir", "o"], 1, "error: .*tiny_float.py is no image"),
        ("predict.py", ["{config}", "no.pth", "no.jpg", "--out-dir", "o"], 1, "error: image no.jpg does not exist"),
        ("train.py", ["{config}", "--no-such-option"], 2, "train.py: error: unrecognized arguments: --no-such-option"),
        (
            "train.py",
            ["{config}", "--cfg-options", "a"],
            2,
            "error: argument --cfg-options: expected KEY=VALUE, got 'a'",
        ),
        (
            "train.py",
            ["{config}", "--float-checkpoint", "f.pth"],
            1,
            "error: --float-checkpoint: config .* does not use",
        ),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(monkeypatch, capsys, configs, coco, tool, args, code, message):
    image = coco / "val2017" / "000000000001.png"
    args = [arg.format(config=configs["float"], image=image) for arg in args]
    assert call(monkeypatch, tool, *args) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, lines[-1])
    assert not any("Traceback" in line for line in lines)
    if code == 1:
        assert len([line for line in lines if line.startswith("error")]) == 1


def test_impossible_switch_is_one_line(monkeypatch, capsys, configs, float_checkpoint, tmp_path):
    options = ["--float-checkpoint", float_checkpoint, "--work-dir", tmp_path]
    options += ["--cfg-options", "custom_hooks.0.switch_epoch=2", "experiment_name=impossible_switch"]
    assert call(monkeypatch, "train.py", configs["binary"], *options) == 1
    assert "error: switch_epoch=2 leaves one of the two stages empty" in capsys.readouterr().err


def test_predict_says_where_everything_lies(monkeypatch, capsys, configs, float_checkpoint, coco, tmp_path):
    out = tmp_path / "out"
    assert call(monkeypatch, "predict.py", configs["float"], float_checkpoint, coco / "val2017", "--out-dir", out) == 0
    assert f"Wrote 2 pictures to {out}/vis and their detections to {out}/preds." in capsys.readouterr().out
    assert len(list((out / "vis").iterdir())) == len(list((out / "preds").iterdir())) == 2


@pytest.mark.parametrize("script", ["dist_train.sh", "dist_test.sh", "slurm_train.sh", "slurm_test.sh"])
def test_scripts_without_arguments_say_how(script):
    result = run_script(script)
    assert result.returncode == 2
    assert re.match(r"usage: .*CONFIG", result.stderr)


def test_slurm_scripts_start_the_tools_with_all_options(tmp_path):
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    environment = dict(PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}", GPUS="16", SRUN_ARGS="--time 10 --mem=1G")
    result = run_script("slurm_train.sh", "gpu", "job", "a b.py", "w", "--amp", "--cfg-options", "x=y z", **environment)
    words = result.stdout.splitlines()
    assert {"--partition=gpu", "--job-name=job", "--ntasks=16", "--gres=gpu:8", "--time", "10", "--mem=1G"} <= set(
        words
    )
    tail = ["a b.py", "--work-dir", "w", "--launcher", "slurm", "--amp", "--cfg-options", "x=y z"]
    assert words[-len(tail) :] == tail
    assert words[-len(tail) - 1].endswith("/tools/train.py")
    words = run_script("slurm_test.sh", "gpu", "job", "c.py", "x.pth", "--tta", **environment).stdout.splitlines()
    assert words[-5:] == ["c.py", "x.pth", "--launcher", "slurm", "--tta"]


@pytest.mark.slow
def test_two_processes_train_through_both_stages_and_evaluate(configs, float_checkpoint, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment = dict(PORT=str(free.getsockname()[1]), PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    options = ["--float-checkpoint", float_checkpoint, "--work-dir", tmp_path, "--seed", "0"]
    result = run_script("dist_train.sh", configs["binary"], "2", *options, **environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("Stage 2 from iteration 1 ") == 1
    assert "Epoch(train) [2][1/1]" in result.stdout  # four images, two processes of two

    result = run_script(
        "dist_test.sh", configs["binary"], tmp_path / "epoch_2.pth", "2", "--work-dir", tmp_path, **environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "coco/segm_mAP: " in result.stdout


def run_script(name: str, *args: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "tools" / name), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
