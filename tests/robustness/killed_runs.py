"""Run by a test: trains a toy model in processes that are killed or ended at random, until it is done.

Children are forked after everything is imported, so that a run begins within a second.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from mmengine.hooks import Hook

import mmbivit  # noqa: F401

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.engine.toy import ToyData, ToyModel, make_runner, save_teacher, teacher_cfg

KILLS = 6  # of each scenario, unless it is done before
EPOCHS, ITERATIONS = 6, 24

EMA = dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=0.1)
# Four iterations an epoch, the switch after three epochs. Accumulation over 3 does not divide an epoch.
SCENARIOS = {
    "epochs, accumulation": dict(by_epoch=True, accumulate=3),
    "epochs, saved within them, EMA, workers": dict(by_epoch=True, interval=2, ema=True, workers=2),
    "iterations, EMA without buffers, accumulation": dict(by_epoch=False, interval=2, ema=False, accumulate=5),
    "iterations, finite sampler, EMA, workers that stay": dict(
        by_epoch=False, interval=3, ema=True, accumulate=3, workers=1, sampler="DefaultSampler"
    ),
}


class AugmentedData(ToyData):
    """Images that every random number generator has changed."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        noise = torch.rand(1) + float(np.random.rand()) + random.random()
        return sample | dict(inputs=sample["inputs"] + noise)


class Progress(Hook):
    """Tells the parent about each iteration."""

    priority = "VERY_HIGH"

    def __init__(self, pipe):
        self.pipe = pipe

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        os.write(self.pipe, b".")


def train(work_dir, teacher, pipe, *, by_epoch, interval=None, accumulate=1, ema=None, workers=0, sampler=None):
    by_iter = not by_epoch or interval is not None
    ema_hooks = [] if ema is None else [EMA | dict(update_buffers=ema)]
    switch = dict(switch_epoch=EPOCHS // 2) if by_epoch else dict(switch_iter=ITERATIONS // 2)
    model = ToyModel(drop_path_rate=0.3)
    model.head = torch.nn.Sequential(torch.nn.Dropout(0.2), model.head)
    runner = make_runner(
        work_dir,
        dict(teacher=teacher_cfg(teacher), reset_lr=True, reset_optimizer=True, **switch),
        model=model,
        by_epoch=by_epoch,
        length=EPOCHS if by_epoch else ITERATIONS,
        hooks=[
            dict(type="mmbivit.ResumableTrainingHook"),
            dict(type="mmbivit.TerminationHook"),
            *ema_hooks,
            Progress(pipe),
        ],
        optim=dict(accumulative_counts=accumulate),
        param_scheduler=[dict(type="CosineAnnealingLR", by_epoch=False, begin=0, end=ITERATIONS, eta_min_ratio=0.1)],
        checkpoint=dict(
            type="mmbivit.AtomicCheckpointHook", interval=interval or 1, by_epoch=not by_iter, max_keep_ckpts=2
        ),
        data=dict(dataset=AugmentedData(), num_workers=workers, persistent_workers=workers == 1),
        sampler=sampler,
        resume=True,
    )
    runner.train()


def run_child(kill_after, number=signal.SIGKILL, **options):
    """Train in a forked process, and send it a signal so many iterations later; return the iterations it has made."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        status = 1
        try:
            sys.stdout = sys.stderr
            train(pipe=write, **options)
            status = 0
        except SystemExit as stop:
            status = stop.code
        finally:
            os._exit(status)
    os.close(write)
    made = 0
    while os.read(read, 1):
        made += 1
        if made == kill_after:
            time.sleep(random.random() * 0.03)  # somewhere in the next iterations or while saving
            os.kill(pid, number)
            if number == signal.SIGKILL:
                break
    os.close(read)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in (0, -signal.SIGKILL, 128 + signal.SIGTERM):
        raise RuntimeError("the training process failed")
    return made, code != 0


def main(folder: Path) -> None:
    torch.set_num_threads(1)  # other threads of this process would be missing in the children
    make_runner(folder / "never trained", None)  # imports what MMEngine builds a runner from, once for all children
    teacher = folder / "teacher.pth"
    save_teacher(teacher)
    random.seed(0)
    report = {}
    for number, (name, options) in enumerate(SCENARIOS.items()):
        run_child(None, work_dir=folder / f"{number}_whole", teacher=teacher, **options)
        kills, finished = [], False
        while not finished:
            kill_after = random.randint(1, 4 + len(kills) % 3) if len(kills) < KILLS else None
            by = (signal.SIGKILL, signal.SIGTERM)[len(kills) % 2]
            made, killed = run_child(kill_after, by, work_dir=folder / f"{number}_killed", teacher=teacher, **options)
            finished = not killed
            kills += [made] if killed else []
        report[name] = kills
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
