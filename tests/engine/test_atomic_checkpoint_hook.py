"""The checkpoint hook does what MMEngine's does, in an order that survives; kills: tests/robustness."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.dataset import default_collate
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from torch import nn

import mmbivit.files
from mmbivit.checkpoints import load_checkpoint_file
from mmbivit.engine import atomic_checkpoint_hook, find_resumable_checkpoint

from .toy import ToyData, make_runner

SCORES = [0.2, 0.5, 0.4, 0.7]


class Line(BaseModel):
    """Fits the mean of an image; takes no time."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 1)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        out = self.head(inputs.mean((1, 2, 3))[:, None])[:, 0]
        return dict(loss=(out - data_samples).square().mean()) if mode == "loss" else [out]


class Scripted(BaseMetric):
    """Scores of the epochs, whatever the model does."""

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        self.calls = getattr(self, "calls", -1) + 1
        return dict(acc=SCORES[self.calls], loss_like=SCORES[self.calls])


class Better(Scripted):
    """Scores of a run that improves from epoch to epoch."""

    def compute_metrics(self, results):
        return {name: 1 + score for name, score in super().compute_metrics(results).items()}


def train(work_dir, checkpoint, *, length=4, hooks=(), **kwargs):
    torch.manual_seed(0)
    sampler = dict(type="DefaultSampler", shuffle=False)
    loader = dict(batch_size=8, sampler=sampler, dataset=ToyData(), collate_fn=default_collate)
    runner = make_runner(
        work_dir,
        None,
        model=Line(),
        length=length,
        hooks=hooks,
        checkpoint=checkpoint,
        val_dataloader=loader,
        val_cfg=dict(type="ValLoop"),
        **dict(val_evaluator=Evaluator(Scripted())) | kwargs,
    )
    runner.train()
    return runner


def saved(folder: Path) -> dict:
    """What the files of a run hold, by name; a published copy's name has a hash, which differs."""
    files = {}
    for path in sorted(folder.rglob("*.pth")):
        content = load_checkpoint_file(str(path))
        info = content.get("message_hub", {}).get("runtime_info", {})
        kept = {key: value for key, value in info.items() if key.startswith(("best_score", "keep_ckpt"))}
        state = {key: value.tolist() for key, value in content["state_dict"].items()}
        meta = {key: content.get("meta", {}).get(key) for key in ("epoch", "iter", "seed")}
        name = path.name.split("-")[0]
        files[str(path.relative_to(folder).with_name(name))] = (state, meta, kept, "optimizer" in content)
    return files


@pytest.mark.parametrize(
    "options",
    [
        dict(interval=1),
        dict(interval=3, by_epoch=False),
        dict(interval=3, save_last=False),
        dict(interval=1, max_keep_ckpts=1),
        dict(interval=1, max_keep_ckpts=2, save_begin=2),
        dict(interval=2, save_best="acc", max_keep_ckpts=2),
        dict(interval=1, save_best=["acc", "loss_like"], rule=["greater", "less"]),
        dict(interval=1, save_best="auto", filename_tmpl="model_{}.pth"),
        dict(interval=2, save_optimizer=False, save_param_scheduler=False),
        dict(interval=4, published_keys=["meta", "state_dict"], save_best="acc", rule="greater"),
        dict(interval=4, published_keys="state_dict"),
        dict(interval=2, file_client_args=dict(backend="disk")),
        dict(interval=2, backend_args=dict(backend="local")),
    ],
    ids=str,
)
def test_it_is_a_drop_in(tmp_path, options):
    """Files, contents and bookkeeping equal those of MMEngine's hook."""
    runs = {name: tmp_path / name / "run" for name in ("CheckpointHook", "mmbivit.AtomicCheckpointHook")}
    for name, folder in runs.items():
        train(folder, dict(type=name, **options))
    theirs, ours = (saved(folder) for folder in runs.values())
    assert ours.keys() == theirs.keys()
    for name in ours:
        (*content, kept, optimizer), (*other, their_kept, their_optimizer) = ours[name], theirs[name]
        assert content == other and optimizer == their_optimizer
        # What is outdated is in the list until it is gone.
        assert kept.pop("keep_ckpt_ids", [])[-options.get("max_keep_ckpts", 1) :] == their_kept.pop("keep_ckpt_ids", [])
        assert kept == their_kept
    assert not list(tmp_path.rglob("*.part"))


def test_checkpoints_can_be_in_another_folder(tmp_path):
    train(tmp_path / "logs" / "run", dict(type="mmbivit.AtomicCheckpointHook", out_dir=str(tmp_path / "weights")))
    assert not list((tmp_path / "logs").rglob("*.pth"))
    pointer = (tmp_path / "logs" / "run" / "last_checkpoint").read_text()
    assert Path(pointer) == Path("../../weights/run/epoch_4.pth")
    shutil.move(tmp_path, tmp_path.with_name("moved"))
    found = find_resumable_checkpoint(tmp_path.with_name("moved") / "logs" / "run")
    assert load_checkpoint_file(str(found))["meta"]["epoch"] == 4


def test_published_name_is_the_hash_of_the_file(tmp_path):
    train(tmp_path, dict(type="mmbivit.AtomicCheckpointHook", interval=4, published_keys=["state_dict"]))
    (path,) = tmp_path.glob("epoch_4-*.pth")
    assert path.stem.split("-")[1] == hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    assert load_checkpoint_file(str(path)).keys() == {"state_dict"}


def test_the_old_goes_after_the_new_is_on_the_disk(tmp_path, monkeypatch):
    """Order of operations on files, with the best checkpoint among them."""
    order = []
    writer = mmbivit.files.atomic_writer

    def note_write(path):
        order.append(f"write {Path(path).name}")
        return writer(path)

    remove = os.remove

    def note_removal(path, **kwargs):
        order.append(f"remove {Path(path).name}")
        remove(path, **kwargs)

    monkeypatch.setattr(atomic_checkpoint_hook, "atomic_writer", note_write)
    monkeypatch.setattr(os, "remove", note_removal)
    train(tmp_path, dict(type="mmbivit.AtomicCheckpointHook", interval=1, max_keep_ckpts=1, save_best="acc"), length=2)
    assert order == [
        *("write epoch_1.pth", "write last_checkpoint"),
        *("write best_acc_epoch_1.pth", "write epoch_1.pth", "write last_checkpoint"),
        *("write epoch_2.pth", "write last_checkpoint", "remove epoch_1.pth"),
        *("write best_acc_epoch_2.pth", "write epoch_2.pth", "write last_checkpoint", "remove best_acc_epoch_1.pth"),
    ]


def test_a_runner_told_to_resume_takes_what_loads(tmp_path):
    hook = dict(type="mmbivit.AtomicCheckpointHook", interval=1)
    train(tmp_path, hook, length=2)
    (tmp_path / "epoch_2.pth").write_bytes(b"broken")
    (tmp_path / "epoch_3.pth.77.part").touch()

    class First(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            iterations.append(runner.iter)

    iterations = []
    train(tmp_path, hook, length=2, hooks=[First()], resume=True)
    assert iterations == [4, 5, 6, 7]
    assert not list(tmp_path.glob("*.part"))
    assert load_checkpoint_file(str(tmp_path / "epoch_2.pth"))["meta"]["iter"] == 8


def test_nothing_to_resume_is_a_start(tmp_path):
    runner = train(tmp_path, dict(type="mmbivit.AtomicCheckpointHook"), length=1, resume=True)
    assert runner.iter == 4


def test_gradients_of_an_accumulation_are_in_the_checkpoint(tmp_path):
    """By hand: of 3 iterations that accumulate 2, the third one's gradient waits, halved."""
    hook = dict(type="mmbivit.AtomicCheckpointHook", by_epoch=False, interval=1)
    grads = {}

    class Watch(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if runner.iter == 2:
                loss = runner.model(**data_batch, mode="loss")["loss"] / 2
                names, parameters = zip(*runner.model.named_parameters(), strict=True)
                grads.update(zip(names, torch.autograd.grad(loss, parameters), strict=True))

    kwargs = dict(optim=dict(accumulative_counts=2), hooks=[Watch()], length=1)
    train(tmp_path, hook, **kwargs)
    assert "accumulated_gradients" not in load_checkpoint_file(str(tmp_path / "iter_2.pth"))
    found = load_checkpoint_file(str(tmp_path / "iter_3.pth"))["accumulated_gradients"]
    torch.testing.assert_close(found, {name: grads[name] for name in found})
    assert len(found) == 2 and all(value.abs() > 0 for value in found.values())

    # A run that only loads the weights begins without them.
    first = {}

    class First(Hook):
        priority = "VERY_LOW"

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            first.setdefault(runner.iter, [p.grad is not None for p in runner.model.parameters()])

    kwargs["hooks"] = [First(), dict(type="mmbivit.ResumableTrainingHook")]
    train(tmp_path / "load", hook, load_from=str(tmp_path / "iter_3.pth"), **kwargs)
    assert first[0] == [False, False]
    first.clear()
    train(tmp_path / "resume", hook, load_from=str(tmp_path / "iter_3.pth"), resume=True, **kwargs)
    assert first == {3: [True, True]}


BEST = dict(type="mmbivit.AtomicCheckpointHook", interval=1, save_best="acc", max_keep_ckpts=2)


def test_a_run_that_goes_on_elsewhere_removes_nothing_of_the_first(tmp_path):
    """The second run improves on the best checkpoint of the first, and has files of the same names."""
    first, second = tmp_path / "first", tmp_path / "second"
    train(first, BEST, length=2)
    before = sorted(first.iterdir())
    second.mkdir()
    for name in ("epoch_1.pth", "epoch_2.pth"):
        shutil.copy(first / name, second / name)
    train(second, BEST, load_from=str(first / "epoch_2.pth"), resume=True, val_evaluator=Evaluator(Better()))
    assert sorted(first.iterdir()) == before
    names = {path.name for path in second.glob("*.pth")}
    assert names == {"epoch_1.pth", "epoch_2.pth", "epoch_3.pth", "epoch_4.pth", "best_acc_epoch_4.pth"}


def test_a_run_that_goes_on_replaces_its_own_best_also_where_it_was_moved(tmp_path):
    train(tmp_path / "run", BEST, length=2)
    assert (tmp_path / "run" / "best_acc_epoch_2.pth").is_file()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    train(tmp_path / "moved", BEST, resume=True, val_evaluator=Evaluator(Better()))
    names = {path.name for path in (tmp_path / "moved").glob("*.pth")}
    assert names == {"epoch_3.pth", "epoch_4.pth", "best_acc_epoch_4.pth"}


@pytest.mark.parametrize("claim", ["{}/thesis.pth", "{}", "{}/sub", "thesis.pth", "../work/thesis.pth", "", None, 5])
@pytest.mark.parametrize("save_best", ["acc", ["acc", "loss_like"]])
def test_what_a_checkpoint_calls_its_own_is_not_believed(tmp_path, claim, save_best):
    work_dir = tmp_path / "work"
    train(work_dir, BEST | dict(save_best=save_best, rule="greater"), length=1)
    (work_dir / "sub").mkdir()
    (work_dir / "thesis.pth").touch()
    content = load_checkpoint_file(str(work_dir / "epoch_1.pth"))
    claim = claim.format(work_dir) if isinstance(claim, str) else claim
    keep = ["../work/thesis", "../work/sub", "x", -1]
    info = dict.fromkeys(("best_ckpt", "best_ckpt_acc", "last_ckpt"), claim) | dict(keep_ckpt_ids=keep)
    content["message_hub"]["runtime_info"] |= info
    torch.save(content, work_dir / "epoch_1.pth")
    checkpoint = BEST | dict(save_best=save_best, rule="greater", filename_tmpl="{}.pth")
    first = str(work_dir / "epoch_1.pth")
    train(work_dir, checkpoint, length=2, load_from=first, resume=True, val_evaluator=Evaluator(Better()))
    assert (work_dir / "thesis.pth").is_file() and (work_dir / "sub").is_dir()


def test_what_was_saved_for_an_interruption_goes_with_the_next_checkpoint(tmp_path):
    class Interrupt(Hook):
        priority = "LOWEST"

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if runner.iter == 1:
                (hook,) = [
                    hook for hook in runner.hooks if isinstance(hook, atomic_checkpoint_hook.AtomicCheckpointHook)
                ]
                hook.save_interrupted(runner, dict(epoch=runner.epoch, iter=runner.iter + 1))
                found.append(find_resumable_checkpoint(tmp_path).name)

    found = []
    train(tmp_path, dict(type="mmbivit.AtomicCheckpointHook", interval=2), length=2, hooks=[Interrupt()])
    assert found == ["interrupted.pth"]
    assert [path.name for path in tmp_path.glob("*.pth")] == ["epoch_2.pth"]
