"""Packed files in two processes: what comes out is what one process gives."""

import json
import os
import pickle
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmbivit.apis import predict
from mmbivit.engine.threads import share_threads
from tests.tiny import make_coco, write_configs

from .damaged_images import DAMAGED, USABLE, write_images
from .packed_ranks import call, evaluated

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, configs, classifier_configs, detector_file, classifier_file) -> SimpleNamespace:
    """What two processes saw and wrote, and what they were to do."""
    folder = tmp_path_factory.mktemp("packed_ranks")
    pictures = write_images(folder / "pictures")
    one = pictures / USABLE[0]
    odd = make_coco(folder / "coco", val=3)  # one image more than two processes share evenly
    plan = dict(
        detector=str(detector_file),
        classifier=str(classifier_file),
        detector_config=str(write_configs(folder, odd)["binary"]),
        classifier_config=str(classifier_configs["binary"]),
        predictions=dict(
            pictures=[str(detector_file), str(pictures), "--out-dir", "pictures", "--score-thr", "0.1"],
            batches=[str(classifier_file), str(pictures), "--out-dir", "batches", "--batch-size", "3"],
            table=[str(classifier_file), str(odd / "val2017")],
            single=[str(detector_file), str(one), "--out-dir", "single"],
        ),
    )
    plan["ports"] = free_ports(4 + len(plan["predictions"]))
    (folder / "plan.json").write_text(json.dumps(plan))
    common = os.environ | dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "-m", "tests.apis.packed_ranks", str(folder)]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=common | dict(RANK=str(rank), LOCAL_RANK=str(rank), PYTHONPATH=str(ROOT)),
            stdout=subprocess.DEVNULL,
            stderr=(folder / f"rank{rank}.log").open("w"),
        )
        for rank in range(2)
    ]
    try:
        while any(process.poll() is None for process in processes) and not any(p.returncode for p in processes):
            time.sleep(0.1)  # the other would wait for one that has failed
        for rank, process in enumerate(processes):
            assert process.returncode == 0, (folder / f"rank{rank}.log").read_text()[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    seen = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return SimpleNamespace(folder=folder, plan=plan, seen=seen)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["detector", "classifier"])
def test_evaluation_is_that_of_one_process(ranks, kind, tmp_path):
    metrics = evaluated(ranks.plan[f"{kind}_config"], ranks.plan[kind], tmp_path)
    predictions = pickle.loads((tmp_path / "out.pkl").read_bytes())
    assert len(predictions) == dict(detector=3, classifier=9)[kind]
    for machines in (1, 2):
        assert [seen[f"{kind} on {machines}"] for seen in ranks.seen] == [metrics, metrics]
        together = pickle.loads((ranks.folder / f"{kind}{machines}" / "out.pkl").read_bytes())
        assert len(together) == len(predictions)
        for one, two in zip(predictions, together, strict=True):
            assert plain(one) == plain(two)
    # Two machines have no folder in common in which results could be collected.
    assert not any((ranks.folder / f"machine{rank}" / ".dist_test").exists() for rank in range(2))


def plain(value: object) -> object:
    """A prediction with lists in the place of tensors, which can be compared as a whole."""
    if isinstance(value, dict):
        return {key: plain(child) for key, child in value.items()}
    return value.tolist() if isinstance(value, torch.Tensor) else value


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pictures", "batches", "table", "single"])
def test_predictions_are_those_of_one_process(ranks, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = call("deployment/predict_packed.py", *ranks.plan["predictions"][name])
    first, second = (seen[name] for seen in ranks.seen)
    assert printed(first) == printed(one)
    assert first["code"] == one["code"] == (1 if name in ("pictures", "batches") else 0)
    assert problems(first) == problems(one)
    assert len(problems(one)) == (len(DAMAGED) if one["code"] else 0)
    assert (second["code"], second["out"], second["err"]) == (0, "", "")  # without a bar of progress, too
    written, expected = (files(folder / name) for folder in (ranks.folder / "machine", tmp_path))
    assert written == expected
    assert len(expected) == dict(pictures=2 * len(USABLE), batches=len(USABLE), table=0, single=2)[name]


def printed(result: dict) -> list[str]:
    return [line for line in result["out"].splitlines() if not line.startswith("Detecting ")]  # it shows the time


def problems(result: dict) -> list[str]:
    return [line for line in result["err"].splitlines() if line.startswith("error: ")]


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_launchers_that_cannot_be_are_named(detector_file, configs, detector, images, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="--launcher slurm; allowed: none, pytorch"):
        predict(None, detector_file, images, tmp_path, launcher="slurm")
    with pytest.raises(ValueError, match="--launcher pytorch is for packed files, and .*detector.pth is none"):
        predict(configs["binary"], detector[1], images, tmp_path, launcher="pytorch")
    with pytest.raises(ValueError, match="--launcher pytorch: RANK, .* not set, so no launcher has started"):
        predict(None, detector_file, images, tmp_path, launcher="pytorch")


@pytest.mark.parametrize(
    ("omp", "parent", "expected"),
    [
        (None, "", 4),  # a launcher that says nothing
        ("1", "", 4),  # torchrun has said it, and was not told
        ("1", "A=b\0OMP_NUM_THREADS=1\0C=d", 1),  # the user has
        ("3", "OMP_NUM_THREADS=3", 3),
        ("1", None, 4),  # a system that does not tell
    ],
)
def test_threads_are_shared_by_the_processes_of_a_machine(monkeypatch, omp, parent, expected):
    monkeypatch.setattr("mmbivit.engine.threads.get_world_size", lambda: 6)
    monkeypatch.setattr("mmbivit.engine.threads._cores", lambda: 13)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    read = Path.read_bytes

    def environment(path):
        if str(path) != f"/proc/{os.getppid()}/environ":
            return read(path)
        if parent is None:
            raise FileNotFoundError(path)
        return parent.encode()

    monkeypatch.setattr(Path, "read_bytes", environment)
    before = torch.get_num_threads()
    try:
        assert share_threads() == expected == torch.get_num_threads()
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "20")  # more processes than cores
        if omp is None:
            assert share_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_single_process_keeps_its_threads(monkeypatch):
    monkeypatch.setattr("mmbivit.engine.threads._cores", lambda: 64)
    assert share_threads() == torch.get_num_threads() < 64
