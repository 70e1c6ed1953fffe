"""The command line: what each option becomes, error lines and exit codes, several processes."""

import json
import os
import pickle
import re
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmbivit.apis.images import MAX_PIXELS

ROOT = Path(__file__).parents[2]


def call(monkeypatch, tool: str, *args: object) -> int:
    """Run a tool in this process and return its exit code."""
    monkeypatch.syspath_prepend(str((ROOT / "tools" / tool).parent))  # as Python does for a script
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
    for name in ("train_config", "train", "evaluation_config", "evaluate", "predict", "print_predictions"):

        def record(*args, _name=name, **kwargs):
            seen[_name] = (args, kwargs)
            return [_name]

        monkeypatch.setattr(f"mmbivit.apis.{name}", record)
    return seen


def test_train_passes_every_option_on(monkeypatch, calls):
    options = "--work-dir w --amp bf16 --accumulate 8 --auto-scale-lr --ema 0.1 --resume r.pth --launcher pytorch"
    options += " --cfg-options a.b=1 c=[2,3] --data-root d --float-checkpoint f.pth --backbone-checkpoint b.pth"
    options += " --tensorboard --wandb p --seed 7 --skip-non-finite 3 --binary-parts neck rpn"
    assert call(monkeypatch, "train.py", "c.py", *options.split()) == 0
    assert calls["train_config"] == (
        ("c.py",),
        dict(
            work_dir="w",
            amp="bf16",
            accumulate=8,
            auto_scale_lr=True,
            ema=0.1,
            resume="r.pth",
            cfg_options={"a.b": 1, "c": [2, 3]},
            launcher="pytorch",
            data_root="d",
            float_checkpoint="f.pth",
            backbone_checkpoint="b.pth",
            tensorboard=True,
            wandb="p",
            seed=7,
            skip_non_finite=3,
            binary_parts=["neck", "rpn"],
        ),
    )
    assert calls["train"] == ((["train_config"],), {})

    call(monkeypatch, "train.py", "c.py", "--resume", "--amp", "--ema", "--wandb")
    defaults = dict(resume="auto", amp=True, ema=0.0002, wandb="mmbivit")
    assert {key: calls["train_config"][1][key] for key in defaults} == defaults
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


def test_predictions_get_every_option(monkeypatch, calls):
    for tool, weights, own, default in (
        ("predict.py", ("c.py", "x.pth"), dict(device="cpu"), dict(device=None)),
        ("deployment/predict_packed.py", (None, "x.safetensors"), dict(launcher="none"), dict(launcher="none")),
    ):
        line = [*filter(None, weights), "a.jpg", "b"]
        options = "--out-dir o --score-thr 0.5 --topk 2 --batch-size 4 --max-pixels 7".split()
        options += [f"--{name}={value}" for name, value in own.items()]
        assert call(monkeypatch, tool, *line, *options) == 0
        given = dict(score_thr=0.5, topk=2, batch_size=4, max_pixels=7)
        assert calls["predict"] == ((*weights, ["a.jpg", "b"], "o"), given | own)
        assert calls["print_predictions"] == ((["predict"], "o"), {})
        call(monkeypatch, tool, *line)
        given = dict(score_thr=None, topk=None, batch_size=1, max_pixels=MAX_PIXELS)
        assert calls["predict"] == ((*weights, ["a.jpg", "b"], None), given | default)


@pytest.mark.parametrize(
    ("tool", "args", "code", "message"),
    [
        ("train.py", ["no.py"], 1, "error: config no.py does not exist"),
        ("test.py", ["no.py", "x.pth"], 1, "error: config no.py does not exist"),
        ("predict.py", ["no.py", "x.pth", "a.jpg", "--out-dir", "o"], 1, "error: config no.py does not exist"),
        ("train.py", ["{config}", "--resume", "no.pth"], 1, "error: --resume: checkpoint no.pth does not exist"),
        ("test.py", ["{config}", "no.pth"], 1, "error: checkpoint no.pth does not exist"),
        ("predict.py", ["{config}", "no.pth", "{image}", "--out-dir", "o"], 1, "error: checkpoint no.pth does not"),
        ("predict.py", ["{config}", "no.pth", "no.jpg", "--out-dir", "o"], 1, "error: image no.jpg does not exist"),
        ("train.py", ["{config}", "--no-such-option"], 2, "train.py: error: unrecognized arguments: --no-such-option"),
        (
            "train.py",
            ["{config}", "--cfg-options", "a"],
            2,
            "error: argument --cfg-options: expected KEY=VALUE, got 'a'",
        ),
        ("train.py", ["{config}", "--amp", "fp8"], 2, "error: argument --amp: invalid choice: 'fp8'"),
        ("train.py", ["{classifier}", "--data-root", "no"], 1, "extract the official archives|<class>|<wnid>"),
        ("test.py", ["{classifier}", "x.pth", "--tta"], 1, "error: --tta is for detectors, and .* of a classifier"),
        ("predict.py", ["{classifier}", "no.pth", "{image}"], 1, "error: checkpoint no.pth does not exist"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(
    monkeypatch, capsys, configs, classifier_configs, coco, tool, args, code, message
):
    image = coco / "val2017" / "000000000001.png"
    places = dict(config=configs["float"], classifier=classifier_configs["float"], image=image)
    args = [arg.format(**places) for arg in args]
    assert call(monkeypatch, tool, *args) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, lines[-1])
    assert not any("Traceback" in line for line in lines)
    if code == 1:
        assert len([line for line in lines if line.startswith("error")]) == 1


@pytest.mark.parametrize(
    ("tool", "option", "line"),
    [
        ("train.py", "--work-dir", "{config} --work-dir {config}"),
        ("test.py", "--work-dir", "{config} no.pth --work-dir {config}/w"),
        ("test.py", "--out", "{config} no.pth --out {config}/o.pkl"),
        ("test.py", "--show-dir", "{config} no.pth --show-dir {config}/s"),
        ("predict.py", "--out-dir", "{config} no.pth no.jpg --out-dir {config}"),
        ("predict.py", "--out-dir", "{classifier} no.pth no.jpg --out-dir {config}"),
        ("deployment/export_onnx.py", "OUT", "{config} no.pth {config}/o.onnx --size 8 8 --no-check"),
        ("deployment/export_packed.py", "OUT", "{config} no.pth {config}/o.safetensors"),
        ("model_converters/swin_to_mmbivit.py", "DST", "no.pth {config}/o.pth"),
        ("analysis_tools/complexity.py", "--out", "{config} --out {config}/o.md"),
        ("analysis_tools/plot.py", "--out", "curves no_work_dir --out {config}/o.png"),
        ("analysis_tools/report.py", "--out", "no_work_dir --out {config}/o.html"),
        ("make_digit_scenes.py", "--picture", "--out {config}/o --picture {config}/o.png"),
        ("benchmarks/packed_inference.py", "--json", "--json {config}/o.json"),
    ],
)
def test_an_output_that_cannot_be_written_is_found_first(
    monkeypatch, capsys, configs, classifier_configs, tool, option, line
):
    pytest.importorskip("onnxscript" if "onnx" in tool else "pytest")
    line = line.format(config=configs["float"], classifier=classifier_configs["float"])
    assert call(monkeypatch, tool, *line.split()) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {option} {configs['float']}") and error.count("\n") == 1


def test_impossible_switch_is_one_line(monkeypatch, capsys, configs, float_checkpoint, tmp_path):
    options = ["--float-checkpoint", float_checkpoint, "--work-dir", tmp_path]
    options += ["--cfg-options", "custom_hooks.0.switch_epoch=2", "experiment_name=impossible_switch"]
    assert call(monkeypatch, "train.py", configs["binary"], *options) == 1
    assert "error: switch_epoch=2 leaves a stage empty" in capsys.readouterr().err


def test_predict_says_where_everything_lies(monkeypatch, capsys, configs, float_checkpoint, coco, tmp_path):
    out = tmp_path / "out"
    assert call(monkeypatch, "predict.py", configs["float"], float_checkpoint, coco / "val2017", "--out-dir", out) == 0
    assert f"Wrote 2 pictures to {out}/vis and their detections to {out}/preds." in capsys.readouterr().out
    assert len(list((out / "vis").iterdir())) == len(list((out / "preds").iterdir())) == 2


def test_predict_names_bad_images_after_the_results(
    monkeypatch, capsys, configs, classifier_configs, float_checkpoint, float_classifier, coco, tmp_path
):
    images, out = [coco / "val2017", configs["float"], tmp_path / "empty.png"], tmp_path / "out"
    images[-1].touch()
    lines = [f"error: {images[1]} is no image that can be read", f"error: {images[2]} is empty"]
    assert call(monkeypatch, "predict.py", configs["float"], float_checkpoint, *images, "--out-dir", out) == 1
    printed = capsys.readouterr()
    assert f"Wrote 2 pictures to {out}/vis" in printed.out
    assert printed.err.splitlines()[-2:] == lines
    options = ["--topk", "1", "--batch-size", "4"]
    assert call(monkeypatch, "predict.py", classifier_configs["float"], float_classifier, *images, *options) == 1
    printed = capsys.readouterr()
    assert printed.out.count("000000000") == 2
    assert printed.err.splitlines()[-2:] == lines


def test_classes_are_a_table_that_a_pipe_does_not_cut(
    monkeypatch, capsys, classifier_configs, float_classifier, image_folders, tmp_path
):
    monkeypatch.setenv("COLUMNS", "20")
    folder = image_folders / "val" / "red"
    options = ["--out-dir", tmp_path, "--topk", "2"]
    assert call(monkeypatch, "predict.py", classifier_configs["float"], float_classifier, folder, *options) == 0

    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert [row[:2] for row in rows] == [[str(folder / f"red_{i}.png"), rank] for i in range(3) for rank in "12"]
    for i in range(3):
        (result,) = [json.loads((tmp_path / "preds" / f"red_{i}.json").read_text())]
        assert [row[2] for row in rows[2 * i : 2 * i + 2]] == result["names"]
        assert [row[3] for row in rows[2 * i : 2 * i + 2]] == [f"{100 * score:.2f}" for score in result["scores"]]
    assert f"Wrote the classes of 3 images to {tmp_path}/preds." in out


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


@pytest.fixture
def two_processes() -> Callable[..., str]:
    """Run a tool in two processes on CPUs and return what it prints."""

    def run(script: str, *args: object) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        result = run_script(script, *args, PORT=port, PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    return run


@pytest.mark.slow
def test_two_processes_evaluate_a_classifier(classifier_configs, float_classifier, tmp_path, two_processes):
    config, out = classifier_configs["float"], tmp_path / "out.pkl"
    log = two_processes("dist_test.sh", config, float_classifier, "2", "--work-dir", tmp_path, "--out", out)
    tested = re.findall(r"Epoch\(test\).*accuracy/top1: ([\d.]+)", log)
    assert len(tested) == 1
    predictions = pickle.loads(out.read_bytes())
    assert len({prediction["img_path"] for prediction in predictions}) == len(predictions) == 9
    right = [int(prediction["pred_labels"][0]) == prediction["label"] for prediction in predictions]
    assert float(tested[0]) == pytest.approx(100 * sum(right) / 9, abs=1e-3)


INTERRUPTED = """
import runpy, sys
class Interrupt:
    def find_spec(self, name, *_):
        if name in ("torch", "mmengine", "mmdet", "cv2"):
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def test_an_interrupt_while_tools_import_their_modules_is_no_traceback():
    tools = sorted(set(ROOT.glob("tools/**/*.py")) - set(ROOT.glob("tools/benchmarks/mmbivit_benchmarks/**/*.py")))
    runs = [subprocess.Popen([sys.executable, "-c", INTERRUPTED, tool], stderr=subprocess.PIPE) for tool in tools]
    errors = {tool.name: run.communicate()[1].decode() for tool, run in zip(tools, runs, strict=True)}
    assert len(tools) > 15 and errors == dict.fromkeys(errors, "interrupted\n")
    if os.name == "posix":
        assert {run.returncode for run in runs} == {-signal.SIGINT}


def test_an_unknown_code_path_of_the_kernels_is_one_line_of_tools_and_an_error_of_scripts():
    environment = {**os.environ, "MMBIVIT_KERNELS": "bogus", "MMBIVIT_DEBUG": "0"}

    def run(*line: str) -> str:
        done = subprocess.run([sys.executable, *line], capture_output=True, text=True, env=environment)
        assert done.returncode == 1
        return done.stderr

    tool = str(ROOT / "tools" / "train.py")
    assert re.fullmatch(r"error: code path 'bogus' does not run here; .*MMBIVIT_KERNELS.*\n", run(tool, "c.py"))
    assert re.search("Traceback(.|\n)*UserError: code path 'bogus'", run("-c", "import mmbivit.deploy"))


def run_script(name: str, *args: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "tools" / name), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
