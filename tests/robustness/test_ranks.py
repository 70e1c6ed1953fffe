"""Training in several processes on CPUs, through the script that users start: all equal, and none outlives another."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config

from mmbivit.apis import train, train_config
from mmbivit.engine.device import distributed, set_launcher
from tests.tiny import CLASSIFIER_CONFIGS, DETECTOR_CONFIGS, make_coco, make_image_folders, write_configs

from .rank_checks import CHECKS

ROOT = Path(__file__).parents[2]
SWITCH = 3  # of 2 epochs of 3 iterations

CLASSIFIER = """
_base_ = "./tiny_classifier_binary.py"
custom_imports = dict(imports=["tests.robustness.rank_probe"])
sync_bn = "torch"
model = dict(type="DoubleClassifier", data_preprocessor=dict(_delete_=True, type="DoublePreprocessor"))
optim_wrapper = dict(optimizer=dict(_delete_=True, type="SGD", lr=0.1, momentum=0.9))
default_hooks = dict(probe=dict(type="RankProbe", switch=3))
"""
DETECTOR = """
_base_ = "./tiny_binary.py"
custom_imports = dict(imports=["tests.robustness.rank_probe"])
default_hooks = dict(probe=dict(type="RankProbe", switch=3))
train_dataloader = dict(batch_size=1)
train_cfg = dict(val_interval=1)
"""


def environment(**variables: str) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = dict(PYTHON=sys.executable, PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    return {**os.environ, **common, "PORT": port, "MASTER_PORT": port, **variables}


def dist_train(config: Path, processes: int, work_dir: Path, *options: object, failure: str = "::"):
    """Run ``tools/dist_train.sh``; it has to end in time, whatever happens to a process."""
    command = ["bash", ROOT / "tools" / "dist_train.sh", config, processes, "--work-dir", work_dir, *options]
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=200, env=environment(RANK_FAILURE=failure)
    )


def notes(work_dir: Path, processes: int = 1) -> list[dict]:
    return [torch.load(work_dir / f"rank{rank}.pth", weights_only=True) for rank in range(processes)]


def differing(left: dict, right: dict) -> list[str]:
    assert left.keys() == right.keys()
    return [name for name, value in left.items() if not torch.equal(value, right[name])]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, float_classifier) -> SimpleNamespace:
    """A config of 18 images with its options, and what one process does with batches of 6."""
    folder = tmp_path_factory.mktemp("ranks_of_a_classifier")
    data = make_image_folders(folder / "data")
    write_configs(folder, data, CLASSIFIER_CONFIGS)
    config = folder / "classifier.py"
    config.write_text(CLASSIFIER)
    options = ["--float-checkpoint", float_classifier, "--seed", "0", "--accumulate", "2", "--ema", "0.3"]
    changes = {"custom_hooks.0.teacher.type": "DoubleSwin"}
    kwargs = dict(float_checkpoint=str(float_classifier), seed=0, accumulate=2, ema=0.3)
    name = {"experiment_name": "ranks_single"}
    train(train_config(config, work_dir=str(folder / "single"), cfg_options=changes | name, **kwargs))
    return SimpleNamespace(
        config=config,
        options=[*options, "--cfg-options", "custom_hooks.0.teacher.type=DoubleSwin"],
        single=notes(folder / "single")[0],
    )


@pytest.mark.slow
def test_three_processes_do_what_one_does_with_the_whole_batch(classifier, tmp_path):
    # SyncBN, distillation, gradients accumulated over 2 of 3 iterations, EMA, in both stages.
    result = dist_train(classifier.config, 3, tmp_path, *classifier.options, "train_dataloader.batch_size=2")
    assert result.returncode == 0, result.stderr[-3000:]

    log = result.stdout  # of one process
    assert log.count("Stage 2 from iteration ") == len(re.findall(r"Epoch\(val\) \[2\].*accuracy/top1: ", log)) == 1
    assert log.count("images_per_s: ") == log.count("loss_cls: ") == 6

    single, ranks = classifier.single, notes(tmp_path, 3)
    assert ["loss_distill" in losses for losses in single["losses"]] == [True] * SWITCH + [False] * 3
    for i, losses in enumerate(single["losses"]):
        for name, value in losses.items():  # computed in float32, from equal logits and features
            mean = sum(rank["losses"][i][name] for rank in ranks) / 3
            assert mean == pytest.approx(value, abs=1e-6), (i, name)
    for rank in ranks:
        for state in ("before", "after"):
            assert not differing(rank[state], ranks[0][state])
            for name, value in single[state].items():  # whose gradients come through losses in float32
                torch.testing.assert_close(rank[state][name], value, rtol=0, atol=1e-8, msg=f"{name} {state} switch")
        assert not differing(rank["ema"][0], ranks[0]["ema"][0])
        for name, value in single["ema"][0].items():
            torch.testing.assert_close(rank["ema"][0][name], value, rtol=0, atol=1e-8)
    assert any(".si." in name for name in differing(single["before"], single["after"]))


@pytest.fixture(scope="module")
def detector(tmp_path_factory, float_checkpoint) -> SimpleNamespace:
    """A config of 6 images, two processes of one: 3 iterations an epoch; BatchNorm is not SyncBN."""
    folder = tmp_path_factory.mktemp("ranks_of_a_detector")
    write_configs(folder, make_coco(folder / "coco", train=6), DETECTOR_CONFIGS)
    (folder / "detector.py").write_text(DETECTOR)
    options = ["--float-checkpoint", float_checkpoint, "--seed", "0", "--ema", "0.3"]
    return SimpleNamespace(config=folder / "detector.py", options=options)


@pytest.mark.slow
def test_killed_at_the_switch_and_resumed_the_processes_stay_equal(detector, tmp_path):
    failed = dist_train(detector.config, 2, tmp_path, *detector.options, failure=f"1:iter{SWITCH}:kill")
    assert failed.returncode != 0
    assert "Signal 9 (SIGKILL) received" in failed.stderr and "rank      : 1" in failed.stderr
    assert (tmp_path / "epoch_1.pth").is_file() and not (tmp_path / "rank0.pth").exists()

    resumed = dist_train(detector.config, 2, tmp_path, *detector.options, "--resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    log = resumed.stdout  # of one process
    assert log.count(f"Stage 2 from iteration {SWITCH} ") == log.count("Epoch(train) [2][3/3]") == 1
    assert len(re.findall(r"Epoch\(val\) \[2\].*coco/segm_mAP: ", log)) == 1
    ranks = notes(tmp_path, 2)
    assert len(ranks[0]["losses"]) == 3 and ranks[0]["losses"] != ranks[1]["losses"]
    for state in ("before", "after"):  # BatchNorm's statistics too
        assert not differing(ranks[0][state], ranks[1][state])
    assert not differing(ranks[0]["ema"][0], ranks[1]["ema"][0])
    assert int(ranks[1]["after"]["backbone.training_stage"]) == 2
    # With EMA the average is saved as the model, and the model beside it.
    saved = torch.load(tmp_path / "epoch_2.pth", weights_only=False)["state_dict"]
    assert all(torch.equal(value, ranks[1]["ema"][0][f"module.{name}"]) for name, value in saved.items())


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_job(classifier, tmp_path):
    options = [*classifier.options, "train_dataloader.batch_size=3"]
    result = dist_train(classifier.config, 2, tmp_path, *options, failure="0:save:raise")
    assert result.returncode != 0
    assert "RuntimeError: made to fail in save" in result.stderr and "rank      : 0" in result.stderr
    assert not (tmp_path / "rank0.pth").exists()


@pytest.mark.slow
def test_without_an_agent_the_timeout_ends_the_others(classifier, tmp_path):
    """As with Slurm or MPI: nobody watches, and a process is stuck rather than dead."""
    command = [sys.executable, ROOT / "tools" / "train.py", classifier.config, "--launcher", "pytorch", "--work-dir"]
    options = [*classifier.options, "train_dataloader.batch_size=3", "env_cfg.dist_cfg.timeout=3"]
    variables = environment(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", RANK_FAILURE=f"1:iter{SWITCH}:hang")
    processes = [
        subprocess.Popen(
            [*map(str, [*command, tmp_path, *options])],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=variables | dict(RANK=str(rank), LOCAL_RANK=str(rank)),
        )
        for rank in range(2)
    ]
    try:
        output, _ = processes[0].communicate(timeout=100)
        assert processes[0].returncode == 1
        assert "Rank 0 lost contact with another process" in output
        assert processes[1].poll() is None
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> list[dict[str, str]]:
    """The errors of each check, on both ranks."""
    folder = tmp_path_factory.mktemp("rank_checks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.robustness.rank_checks", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT, env=environment())
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_in_two_processes(checked, check):
    assert [errors[check] for errors in checked] == ["", ""]


def cpu_config(monkeypatch, **values) -> Config:
    monkeypatch.setattr("mmbivit.engine.device.get_device", lambda: "cpu")
    cfg = Config(dict(model={}, env_cfg=dict(dist_cfg=dict(backend="nccl"))) | values)
    set_launcher(cfg, "pytorch")
    return cfg


def test_config_on_cpus(monkeypatch):
    layer = dict(type="SyncBN", requires_grad=True)
    model = dict(heads=[dict(norm_cfg=dict(type="MMSyncBN", requires_grad=True, stats_mode="N")), dict(norm_cfg=layer)])
    wrapper = dict(type="MMDistributedDataParallel", find_unused_parameters=True)
    cfg = cpu_config(monkeypatch, model=model, sync_bn="mmcv", model_wrapper_cfg=wrapper)
    assert [head.norm_cfg for head in cfg.model.heads] == [layer, layer]
    assert cfg.sync_bn == "torch" and cfg.env_cfg.dist_cfg.backend == "gloo"
    expected = dict(type="mmbivit.CpuDistributedDataParallel", find_unused_parameters=True)
    assert cfg.model_wrapper_cfg == dict(**expected, broadcast_buffers=False, device_ids=None)
    set_launcher(cfg, "pytorch")  # the config that a run has written
    assert cfg.custom_hooks == [dict(type="mmbivit.RanksHook")]
    for name in ("MMFullyShardedDataParallel", "MMSeparateDistributedDataParallel"):
        with pytest.raises(ValueError, match=f"model_wrapper_cfg.type='{name}' does not work on CPUs: remove"):
            cpu_config(monkeypatch, model_wrapper_cfg=dict(type=name))


def test_strategies(monkeypatch):
    two_stages = [dict(type="mmbivit.DecoupledTrainingHook", switch_epoch=1)]
    for name in ("FSDPStrategy", "DeepSpeedStrategy", "ColossalAIStrategy"):
        for launcher in ("none", "pytorch"):
            cfg = Config(dict(strategy=dict(type=name), custom_hooks=two_stages))
            with pytest.raises(ValueError, match=f"strategy.type='{name}' cannot train in two stages: remove"):
                set_launcher(cfg, launcher)
    set_launcher(Config(dict(strategy=dict(type="SingleDeviceStrategy"), custom_hooks=two_stages)), "none")
    with pytest.raises(ValueError, match="strategy does not work on CPUs: remove"):
        cpu_config(monkeypatch, strategy=dict(type="DDPStrategy"))


def test_a_process_that_no_launcher_started_is_refused(monkeypatch):
    cfg = cpu_config(monkeypatch)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set, .*use tools/dist_train"):
        distributed(cfg).__enter__()
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    cfg.env_cfg.dist_cfg.timeout = "5 min"
    with pytest.raises(ValueError, match="env_cfg.dist_cfg.timeout='5 min'; allowed: a number of seconds"):
        distributed(cfg).__enter__()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 3 of this machine has no GPU of its own, there are 2; start 2"):
        distributed(cfg).__enter__()
