"""The parts of the page on a run."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.dataset import default_collate

from mmbivit.analysis.figures.classes import classes_figure
from mmbivit.analysis.figures.classifications import classifications_figure
from mmbivit.analysis.training_log import read_training_log
from mmbivit.apis.checkpoints import load_trained_model
from mmbivit.apis.config import load_config
from mmbivit.apis.errors import error_message, is_user_error
from mmbivit.report.complexity import config_complexity, quantity, readable, total_records
from mmbivit.report.inputs import pixels_of
from mmbivit.report.page import Fact, Picture, Section, Table
from mmbivit.report.plots.activations import plot_activations
from mmbivit.report.plots.attention import plot_attention
from mmbivit.report.plots.balancing import plot_balancing
from mmbivit.report.plots.curves import plot_curves
from mmbivit.report.plots.detections import plot_detections
from mmbivit.report.plots.flips import plot_flips
from mmbivit.report.plots.interaction import plot_interaction

from .accuracy import Accuracy, evaluate_run
from .run import Run, spread

__all__ = [
    "Source",
    "accuracy",
    "activations",
    "attention",
    "balancing",
    "cost",
    "environment",
    "examples",
    "flips",
    "interaction",
    "training",
]


@dataclass(frozen=True)
class Source:
    """What the parts are made from.

    Args:
        run: the run.
        config: a file with its config, for functions that take one.
        num_images: example images.
        evaluate: whether to evaluate the checkpoint.
        float_checkpoint: weights of the float network that training started from; ``None`` for what the config names.
    """

    run: Run
    config: Path
    num_images: int
    evaluate: bool
    float_checkpoint: str | None


def training(source: Source) -> Section:
    """Make the curves of the log."""
    log = read_training_log(source.run.work_dir)
    text = f"{log.last_step:,} iterations are in the log."
    if log.switches:
        before = f"stages 1 to {len(log.switches)}" if len(log.switches) > 1 else "stage 1"
        text += f" The first {log.switches[-1]:,} are {before}; then all is binary and spatial interaction is on."
    picture = Picture.of(plot_curves(source.run.work_dir), "Losses, learning rate and metrics over the iterations")
    return Section("Training", text, [picture])


def accuracy(source: Source) -> Section:
    """Evaluate, and make the table and the bars of the classes."""
    if not source.evaluate:
        return Section("Accuracy", problem="Not evaluated, since the page was made with --no-eval.")
    found = evaluate_run(source.run)
    return _classifier_accuracy(found) if source.run.is_classifier else _detector_accuracy(found)


def _detector_accuracy(found: Accuracy) -> Section:
    if not found.detection:
        return Section("Accuracy", problem="Nothing was detected in the test data.")
    kinds = {kind: name for kind, name in (("bbox", "boxes"), ("segm", "masks")) if kind in found.detection}
    columns = {"AP": "mAP", "AP50": "mAP_50", "AP75": "mAP_75", "small": "mAP_s", "medium": "mAP_m", "large": "mAP_l"}
    rows = [
        [name, *(_share(found.metrics.get(f"coco/{kind}_{key}")) for key in columns.values())]
        for kind, name in kinds.items()
    ]
    tables = [Table(["", *columns], rows, "All classes, over IoU 0.50 to 0.95; a dash where there are no such objects")]
    facts = [Fact(f"AP of {name}", _share(found.metrics.get(f"coco/{kind}_mAP"))) for kind, name in kinds.items()]
    first = next(iter(found.detection.values()))
    values = {f"AP of {name}": [item.ap for item in found.detection[kind]] for kind, name in kinds.items()}
    rows = [
        [item.name, str(item.objects)]
        + [_share(value) for kind in kinds for value in (found.detection[kind][i].ap, found.detection[kind][i].ap50)]
        for i, item in enumerate(first)
    ]
    header = ["class", "objects", *(f"{what}, {name}" for name in kinds.values() for what in ("AP", "AP50"))]
    picture = Picture.of(classes_figure([item.name for item in first], values, "average precision (0 to 1)"), "AP")
    text = "COCO's average precision on the test data, from 0 to 1, of all classes and of each."
    return Section("Accuracy", text, [picture], [*tables, Table(header, rows)], facts=facts)


def _share(value: float | None) -> str:
    return "–" if value is None or value < 0 else f"{value:.3f}"


def _classifier_accuracy(found: Accuracy) -> Section:
    metrics = {key.split("/")[-1]: value for key, value in found.metrics.items() if key.startswith("accuracy/")}
    facts = [Fact(f"{key.replace('top', 'top-')} accuracy", f"{value:.1f} %") for key, value in metrics.items()]
    names = [item.name for item in found.classification]
    figure = classes_figure(names, {"top-1": [item.top1 for item in found.classification]}, "top-1 accuracy (%)")
    rows = [[item.name, str(item.images), f"{item.top1:.1f}"] for item in found.classification]
    text = "Share of the test images whose class is among the first predictions."
    picture = Picture.of(figure, "Top-1 accuracy of each class")
    return Section("Accuracy", text, [picture], [Table(["class", "images", "top-1, %"], rows)], facts=facts)


def cost(source: Source) -> Section:
    """Count operations and bytes, beside the same network in float."""
    counted = config_complexity(source.config)
    header, *rows = readable(total_records(counted))
    facts = []
    if counted.as_float is not None:
        backbone, as_float = (network.part("backbone") for network in (counted.network, counted.as_float))
        facts = [
            _less("Packed", counted.network.size_bytes, counted.as_float.size_bytes, "B"),
            _less("Backbone, packed", backbone.size_bytes, as_float.size_bytes, "B"),
            _less("Backbone, operations", backbone.ops, as_float.ops),
        ]
    return Section("Size and operations", counted.caption, tables=[Table(header, rows)], facts=facts)


def _less(name: str, value: float, as_float: float, unit: str = "") -> Fact:
    note = f"float: {quantity(as_float, unit)}, {as_float / value:.1f} times as much"
    return Fact(name, quantity(value, unit), note)


def interaction(source: Source) -> Section:
    """Draw the spatial interaction of each block."""
    text = "How many tokens each token meets in attention and in token mixing, added up (SI-BiViT, Eq. 6)."
    return Section("Spatial interaction", text, [Picture.of(plot_interaction(source.config), text)])


def balancing(source: Source) -> Section:
    """Draw the balancing factors."""
    text = (
        "The factor alpha of each channel says how strongly token mixing enters, and with which sign; it starts at 0 "
        "(SI-BiViT, 3.3.2 and Figure 5)."
    )
    figure = plot_balancing(source.config, source.run.checkpoint)
    return Section("Balancing factors", text, [Picture.of(figure, "Balancing factors by block")])


def flips(source: Source) -> Section:
    """Draw the signs that flipped."""
    text = "Which share of the weights has another sign than the last time that mmbivit.SignFlipsHook looked."
    return Section("Sign flips", text, [Picture.of(plot_flips(source.run.work_dir), "Sign flips by layer")])


def attention(source: Source) -> Section:
    """Draw the attention of the student and its teacher in an example image."""
    text = "What the token in the middle attends to: the binary network selects keys, the float teacher weighs them."
    image = source.run.images(1)[0]
    figure = plot_attention(source.config, source.run.checkpoint, image, teacher_checkpoint=source.float_checkpoint)
    return Section("Attention", text, [Picture.of(figure, "Binary and float attention over an image", photo=True)])


def activations(source: Source) -> Section:
    """Draw what is binarized."""
    text = (
        "Values before their sign is taken, with the thresholds gamma of the channels (SI-BiViT, Eq. 3). Gradients "
        "pass where a value is within 1 of its threshold."
    )
    figure = plot_activations(source.config, source.run.checkpoint, source.run.images(source.num_images))
    return Section("Activations", text, [Picture.of(figure, "Distributions of activations before their sign")])


def examples(source: Source) -> Section:
    """Draw what is recognised in some images."""
    if source.run.is_classifier:
        return _classified(source)
    images = source.run.images(source.num_images)
    models = [(source.run.name, source.config, source.run.checkpoint)]
    problem = ""
    if (float_cfg := float_detector(source.run.cfg)) is not None:
        try:
            float_config = source.run.write_config(source.config.parent / "float", float_cfg)
            checkpoint = source.float_checkpoint or float_cfg.load_from
            load_trained_model(load_config(float_config), checkpoint)  # all of it, which mmdet would not insist on
            models.insert(0, ("float", float_config, checkpoint))
        except Exception as error:
            if not is_user_error(error):
                raise
            problem = f"Without the float detector: {error_message(error)}"
    figure = plot_detections(images, models, annotations=_annotations(source.run.cfg))
    text = "Detections with a score of 0.5 or more in images of the test data."
    picture = Picture.of(figure, "Detections beside the annotation", photo=True)
    return Section("Examples", text, [picture], problem=problem)


def float_detector(cfg: Config) -> Config | None:
    """Return the config of the float detector that training started from, with the teacher as its backbone, if any."""
    teachers = [hook.get("teacher") for hook in cfg.get("custom_hooks") or []]
    teacher = next((teacher for teacher in teachers if teacher), None)
    if teacher is None or not cfg.get("load_from"):
        return None
    cfg = copy.deepcopy(cfg)
    cfg.model.backbone = {key: value for key, value in teacher.items() if key != "init_cfg"}
    cfg.custom_hooks = []
    return cfg


def _annotations(cfg: Config) -> str | None:
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, (list, tuple)) else [cfg.test_evaluator]
    return next((metric["ann_file"] for metric in evaluators if metric.get("ann_file")), None)


def _classified(source: Source) -> Section:
    model, dataset = source.run.model, source.run.test_dataset()
    names = (model.dataset_meta or {}).get("classes")
    images, captions = [], []
    for i in spread(source.num_images, len(dataset)):
        item = dataset[i]
        data = default_collate([item])
        images.append(pixels_of(model, model.data_preprocessor(dict(data))["inputs"]))
        with torch.no_grad():
            prediction = model.test_step(data)[0]
        found, right = (names[n] if names else str(n) for n in (int(prediction["pred_labels"][0]), item["labels"]))
        score = float(prediction["pred_scores"][0])
        captions.append(f"{100 * score:.0f} % {found}\n" + ("right" if found == right else f"is {right}"))
    text = "Images of the test data with the first prediction and its probability."
    picture = Picture.of(classifications_figure(images, captions), "; ".join(captions), photo=True)
    return Section("Examples", text, [picture])


def environment(source: Source) -> Section:
    """Show where the run was trained, and its config."""
    run = source.run
    details = {"Machine and software of the last attempt": run.environment or "The work dir has no log of it."}
    details["Config"] = run.cfg.pretty_text
    rows = [["work dir", str(run.work_dir)], ["checkpoint", str(run.checkpoint)], ["config", str(run.cfg.filename)]]
    return Section("Environment and config", tables=[Table(["", ""], rows)], details=details)
