"""Which checkpoint a run of two stages keeps as its best."""

import pytest
from mmengine.dataset import default_collate
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook

from mmbivit.checkpoints import load_checkpoint_file

from .toy import ToyData, ToyModel, make_runner


class Scores(BaseMetric):
    """Scores of a run's evaluations, whatever the model does."""

    def __init__(self, scores):
        super().__init__()
        self.scores = iter(scores)

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        score = next(self.scores)
        return dict(acc=score, loss=1 - score)


class Interrupt(Hook):
    """Ends a run before an iteration, as Ctrl+C does, and before the stages are switched."""

    priority = "VERY_HIGH"

    def __init__(self, iteration):
        self.iteration = iteration

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.iteration:
            raise KeyboardInterrupt


def run(work_dir, scores, hooks=(), checkpoint="CheckpointHook", save_best="acc", switch=2, **kwargs):
    loader = dict(batch_size=8, sampler=dict(type="DefaultSampler", shuffle=False), dataset=ToyData())
    make_runner(
        work_dir,
        dict(switch_epoch=switch),
        length=5,
        hooks=hooks,
        checkpoint=dict(type=checkpoint, interval=1, save_best=save_best),
        data=loader,
        val_dataloader=loader | dict(collate_fn=default_collate),
        val_cfg=dict(type="ValLoop"),
        val_evaluator=Evaluator(Scores(scores)),
        **kwargs,
    ).train()


@pytest.mark.parametrize(
    ("checkpoint", "save_best"), [("CheckpointHook", "acc"), ("mmbivit.AtomicCheckpointHook", ["acc", "loss"])]
)
@pytest.mark.parametrize("interrupted", [None, 1, 2, 3, 4])
def test_the_best_checkpoint_is_of_stage_2(tmp_path, checkpoint, save_best, interrupted):
    """Stage 1, two of five epochs, scores higher; its best checkpoint stays until stage 2 has been evaluated."""
    scores = [0.9, 0.8, 0.3, 0.5, 0.4]
    metrics = [save_best] if isinstance(save_best, str) else save_best
    found = []

    class Best(Hook):
        priority = "LOWEST"

        def after_val_epoch(self, runner, metrics=None):
            found.append(sorted(path.name for path in tmp_path.glob("best_*")))

    options = dict(checkpoint=checkpoint, save_best=save_best)
    if interrupted is None:
        run(tmp_path, scores, [Best()], **options)
    else:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, scores, [Best(), Interrupt(interrupted)], **options)
        run(tmp_path, scores[interrupted:], [Best()], resume=True, **options)

    assert found == [[f"best_{metric}_epoch_{best}.pth" for metric in metrics] for best in (1, 1, 3, 4, 4)]
    for name in found[-1]:
        assert int(load_checkpoint_file(str(tmp_path / name))["state_dict"]["backbone.training_stage"]) == 2


def test_every_switch_forgets_the_best_score(tmp_path):
    found = []

    class Best(Hook):
        priority = "LOWEST"

        def after_val_epoch(self, runner, metrics=None):
            found.extend(path.name for path in tmp_path.glob("best_*"))

    model = ToyModel(training_stages=[dict(activations=True), dict(activations=True, weights=["attn"])])
    run(tmp_path, [0.9, 0.8, 0.5, 0.3, 0.4], [Best()], switch=[2, 3], model=model)
    assert found == [f"best_acc_epoch_{best}.pth" for best in (1, 1, 3, 4, 5)]


def test_a_checkpoint_before_the_first_evaluation_of_stage_2_promises_no_score(tmp_path):
    """A resumed run warned that the key of the best score is not defined."""
    with pytest.raises(StopIteration):
        run(tmp_path, [0.9, 0.8])  # no score for epoch 3
    hub = load_checkpoint_file(str(tmp_path / "epoch_3.pth"))["message_hub"]
    assert "best_score" not in hub["runtime_info"]
    assert hub["resumed_keys"].keys() <= {*hub["runtime_info"], *hub["log_scalars"]}
