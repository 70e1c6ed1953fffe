"""Workers of data loaders end with their process."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from mmbivit.engine.worker_end_hook import WorkerEndHook, end_workers_with_process


class Masks(Dataset):
    """Arrays, which go through a pipe; more than it holds."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return np.zeros(2**20, dtype=np.uint8)


def main(start_method):
    """Load with two workers until their pipes are full, and wait to be killed."""
    loader = DataLoader(Masks(), batch_size=1, num_workers=2, collate_fn=list, multiprocessing_context=start_method)
    end_workers_with_process(loader)
    batches = iter(loader)
    next(batches)
    print(*(worker.pid for worker in batches._workers), flush=True)
    time.sleep(600)


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_workers_of_a_killed_process_end():
    processes = [
        subprocess.Popen([sys.executable, __file__, start_method], stdout=subprocess.PIPE, text=True)
        for start_method in ("fork", "forkserver")
    ]
    pids = [int(word) for process in processes for word in process.stdout.readline().split()]
    assert len(pids) == 4 and all(map(runs, pids))
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 20
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [pid for pid in pids if runs(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def set_seed(worker):
    np.random.seed(worker + 5)


class Draw(Masks):
    def __getitem__(self, index):
        return np.random.rand()


def test_an_init_function_of_ones_own_is_kept():
    loader = DataLoader(Draw(), batch_size=64, num_workers=1, worker_init_fn=set_seed, collate_fn=list)
    end_workers_with_process(loader)
    assert next(iter(loader)) == np.random.RandomState(5).rand(64).tolist()


def test_every_loader_is_set_up():
    train, val, test = (DataLoader(Masks()) for _ in range(3))
    runner = SimpleNamespace(train_dataloader=train, val_loop=None, val_dataloader=val, test_dataloader=test)
    hook = WorkerEndHook()
    hook.before_train(runner)
    assert [loader.worker_init_fn is not None for loader in (train, val, test)] == [True, False, False]
    runner.val_loop = object()
    hook.before_train(runner)
    hook.before_test(runner)
    assert all(loader.worker_init_fn is not None for loader in (train, val, test))


if __name__ == "__main__":
    main(sys.argv[1])
