"""Run by a test: trains a toy model in processes of which each is killed at the next step of saving a checkpoint.

With ``--full-disk`` it trains until the disk that the folder is on is full.
"""

import json
import os
import resource
import signal
import sys
from itertools import count
from pathlib import Path

import torch

import mmbivit  # noqa: F401
from mmbivit.checkpoints import load_checkpoint_file
from mmbivit.engine import AtomicCheckpointHook, find_resumable_checkpoint

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.engine.toy import make_runner

SIZES = (0, 1, 50_000)  # bytes of the file that a kill leaves
SAVED_BEFORE = 3  # iterations that have a checkpoint when the deadly save begins


class Deadly(AtomicCheckpointHook):
    """Kills the process at one step of its fourth save: before a file operation, or while the file is written."""

    deadly_step: int | None = None
    deadly_size: int | None = None
    steps: list[str] = []

    def _save_checkpoint_with_step(self, runner, step, meta):
        if step > SAVED_BEFORE + 1:
            os._exit(0)  # the deadly save went through
        if step == SAVED_BEFORE + 1:
            self.arm(Path(runner.work_dir))
        super()._save_checkpoint_with_step(runner, step, meta)

    def arm(self, folder):
        if self.deadly_size is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # by default Python turns it into an error
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.deadly_size, self.deadly_size))
            return

        def watch(event, args):
            if event not in ("open", "os.rename", "os.remove", "os.mkdir") or str(folder) not in str(args[0]):
                return
            self.steps.append(event)
            if len(self.steps) == self.deadly_step:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)


def run_child(work_dir, **deadly):
    """Train in a forked process; return whether it was killed."""
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr
        hook = Deadly(by_epoch=False, interval=1, max_keep_ckpts=1)
        for name, value in deadly.items():
            setattr(hook, name, value)
        make_runner(work_dir, None, by_epoch=False, length=SAVED_BEFORE + 2, checkpoint=hook, resume=True).train()
        os._exit(1)  # never reached: the save after the deadly one ends the process
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("the training process failed")
    return os.WIFSIGNALED(status)


def kill_everywhere(folder: Path) -> list:
    """Kill saves at one step after the other; what is there then, and after a run that goes on from it."""

    def kill(name, **deadly):
        killed, left = run_child(folder / name, **deadly), describe(folder / name)
        run_child(folder / name)
        return killed, dict(name=name, left=left, after_resume=describe(folder / name))

    torch.set_num_threads(1)
    make_runner(folder / "never trained", None)  # imports what MMEngine builds a runner from, once for all children
    report = []
    for step in count(1):
        killed, row = kill(f"step {step}", deadly_step=step)
        if not killed:
            break
        report.append(row)
    return report + [kill(f"{size} bytes", deadly_size=size)[1] for size in SIZES]


def fill_disk(folder: Path) -> list:
    """Save until the disk is full; the error, and what is there then."""
    torch.set_num_threads(1)
    checkpoint = dict(type="mmbivit.AtomicCheckpointHook", by_epoch=False, interval=1)
    try:
        make_runner(folder / "run", None, by_epoch=False, length=100, checkpoint=checkpoint).train()
    except OSError as error:
        return [error.strerror, describe(folder / "run")]
    return ["not full", {}]


def describe(work_dir):
    """The iteration that a run would go on from, and the files that there are."""
    found = find_resumable_checkpoint(work_dir)
    iteration = None if found is None else load_checkpoint_file(str(found))["meta"]["iter"]
    return dict(iteration=iteration, files=sorted(path.name for path in work_dir.glob("iter_*")))


if __name__ == "__main__":
    run = fill_disk if "--full-disk" in sys.argv else kill_everywhere
    print(json.dumps(run(Path(sys.argv[1]))))
