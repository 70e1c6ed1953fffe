"""Run by torchrun on two gloo ranks: trains the toy model through the switch and saves what each rank has."""

import gc
import sys
from pathlib import Path

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook

import mmbivit  # noqa: F401

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.engine.toy import ToyModel, make_runner, teacher_cfg


class Snapshot(Hook):
    """Copies the parameters just before the switch."""

    priority = "VERY_HIGH"

    def __init__(self):
        self.stages, self.before = [], None

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 4:
            self.before = parameters(runner)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.stages.append(runner.model.module.backbone.stage)


def parameters(runner):
    return {name: p.detach().clone() for name, p in runner.model.module.named_parameters()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = get_rank()
    snapshot = Snapshot()
    # Two epochs of 2 iterations on each rank for stage 1, two for stage 2.
    hook = dict(switch_iter=4, teacher=teacher_cfg(folder / "teacher.pth"))
    kwargs = dict(length=4, launcher="pytorch", env_cfg=dict(dist_cfg=dict(backend="gloo")))
    wrapper = dict(type="MMDistributedDataParallel", device_ids=None)
    runner = make_runner(
        folder / "run",
        hook,
        model=ToyModel(),
        hooks=[snapshot],
        cfg=dict(model_wrapper_cfg=wrapper | dict(find_unused_parameters=True)),
        **kwargs,
    )
    runner.train()
    torch.save(
        dict(before=snapshot.before, after=parameters(runner), stages=snapshot.stages), folder / f"rank{rank}.pth"
    )
    try:
        cfg = dict(model_wrapper_cfg=wrapper)
        make_runner(folder / "refused_run", hook, model=ToyModel(), cfg=cfg, **kwargs).train()
    except ValueError as error:
        (folder / "refused").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # Gloo's threads may abort a process that ends while they run: free the runners, then end the group.
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
