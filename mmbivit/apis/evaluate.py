"""Evaluation of detectors and classifiers."""

from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import get_world_size
from mmengine.evaluator import BaseMetric, DumpResults
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel
from mmengine.registry import MODELS
from mmengine.runner import FlexibleRunner, Runner
from torch import nn

from mmbivit.analysis.figures.style import without_formulas
from mmbivit.checkpoints import checkpoint_path, use_safe_loading
from mmbivit.checks import UserError
from mmbivit.datasets import check_coco_data, check_image_data, set_data_root
from mmbivit.datasets.wrappers import inner_dataset
from mmbivit.deploy import load
from mmbivit.deploy.around import pack_around, packed_layers
from mmbivit.deploy.header import read_header
from mmbivit.engine import WorkerEndHook
from mmbivit.engine.allocator import keep_freed_memory
from mmbivit.engine.device import distributed, set_launcher
from mmbivit.engine.quiet import quiet
from mmbivit.engine.run_settings import check_run_settings
from mmbivit.engine.runner import build_runner
from mmbivit.engine.threads import processes_of_this_machine, share_threads
from mmbivit.engine.unwrapping import unwrapped_model
from mmbivit.files import check_writable

from .checkpoints import load_classifier, load_detector
from .config import load_config, set_work_dir
from .route import Route, find_route

__all__ = ["evaluate", "evaluation_config"]

MASK_HEAD = "roi_head.mask_head."  # which --tta leaves out, see :func:`_detect_boxes_only`


def evaluation_config(
    config: str | Path,
    checkpoint: str | Path,
    *,
    work_dir: str | None = None,
    show: bool = False,
    show_dir: str | None = None,
    wait_time: float = 2.0,
    tta: bool = False,
    cfg_options: dict[str, Any] | None = None,
    launcher: str = "none",
    data_root: str | None = None,
) -> Config:
    """Make the config of an evaluation from a config file and the options of ``tools/test.py``.

    Args:
        config: the config file.
        checkpoint: file or URL of the weights, or a packed file (``*.safetensors``) of a whole model, whose backbone
            replaces the config's.
        work_dir: where logs go; ``work_dirs/<config's name>`` by default.
        show: show each image with its detections in a window; for detectors.
        show_dir: write each image with its detections into this folder, below ``work_dir/<timestamp>`` if relative;
            for detectors.
        wait_time: seconds that each window of ``show`` stays.
        tta: average over the image and its mirror image; for detectors, boxes only.
        cfg_options: changes by dotted key.
        launcher: ``none``, ``pytorch``, ``slurm`` or ``mpi``; for a packed file ``none`` or ``pytorch``.
        data_root: folder of the data set, in COCO's layout for a detector, with class folders for a classifier.

    Raises:
        FileNotFoundError: if the config does not exist.
        OSError: if nothing can be written into ``work_dir`` or ``show_dir``.
        ValueError: if an option does not fit the config; the message names the option.
    """
    cfg = load_config(config, cfg_options)
    route = find_route(cfg, checkpoint)
    route.refuse_options(tta=tta, show=show, show_dir=show_dir)
    if route.packed:
        _refuse_for_packed(checkpoint, tta, launcher, cfg_options)
    set_work_dir(cfg, work_dir)
    set_launcher(cfg, launcher, route.device)
    cfg.load_from = str(checkpoint)
    cfg.resume = False
    if data_root is not None:
        set_data_root(cfg, data_root)
    if show_dir:
        check_writable("--show-dir", Path(cfg.work_dir) / show_dir, folder=True)
    if show or show_dir:
        _draw_detections(cfg, show, show_dir, wait_time)
    if tta:
        _augment(cfg)
    return cfg


@quiet()
def evaluate(cfg: Config, out: str | Path | None = None) -> dict[str, float]:
    """Evaluate the checkpoint ``cfg.load_from`` on the test data and return the metrics.

    Args:
        cfg: as :func:`evaluation_config` makes it.
        out: pickle file that all predictions are written to.

    Raises:
        FileNotFoundError: if data or checkpoint are missing.
        OSError: if ``out`` cannot be written, before anything is evaluated.
        ValueError: if ``out`` is no pickle file, or if a weight of the checkpoint is missing, left over or of another
            shape; the message names the first.
    """
    if out is not None:
        if Path(out).suffix not in (".pkl", ".pickle"):
            raise UserError(f"--out {out}: the predictions go into a pickle file; expected a name that ends in .pkl")
        check_writable("--out", out)
    use_safe_loading()
    check_run_settings(cfg, ["test"])
    notes = check_coco_data(cfg, modes=["test"])
    check_image_data(cfg, modes=["test"])
    with distributed(cfg, find_route(cfg, cfg.load_from).device), without_formulas():
        route = find_route(cfg, str(checkpoint_path(cfg.load_from)))
        return _evaluate(cfg, route, out, notes)


def _evaluate(cfg: Config, route: Route, out: str | Path | None, notes: Iterable[str]) -> dict[str, float]:
    if route.packed:
        notes = [*notes, f"Packed: {get_world_size()} processes with {share_threads()} threads here."]
    packed = _load_packed(route) if route.packed else None
    if packed is not None:
        cfg.model.backbone = dict(packed.backbone.options, type=f"mmbivit.{type(packed.backbone).__name__}")
    cfg.load_from = None  # MMEngine only warns of missing weights, and would evaluate a network with random ones
    runner = build_runner(cfg, notes)
    runner.register_hook(WorkerEndHook())
    model = _built_model(runner)
    if packed is not None:
        runner.model = _packed_like(model, packed, route.checkpoint)
    elif route.kind == "classifier":
        load_classifier(model, route.checkpoint)
    elif isinstance(model, BaseTTAModel):
        load_detector(model.module, route.checkpoint, left_over=MASK_HEAD)
    else:
        load_detector(model, route.checkpoint)
    print_log(f"Load checkpoint from {route.checkpoint}", "current")
    if out is not None:
        runner.test_evaluator.metrics.append(_dump_metric(route.kind, str(out)))
    if packed is not None and processes_of_this_machine() < get_world_size():
        for metric in runner.test_evaluator.metrics:
            metric.collect_device = "gpu"  # by messages, also between CPUs: machines may have no folder in common
    return runner.test()


def _built_model(runner: Runner | FlexibleRunner) -> nn.Module:
    """Return a runner's model; ``FlexibleRunner`` would build and initialise it when the test begins."""
    if isinstance(runner, FlexibleRunner):
        runner.model = MODELS.build(runner.model)
        runner.cfg.init_weights_for_test_or_val = False
    return unwrapped_model(runner)


def _refuse_for_packed(checkpoint: str | Path, tta: bool, launcher: str, cfg_options: dict[str, Any] | None) -> None:
    """Raise a ValueError for options that a packed file cannot follow."""
    if tta:
        raise UserError(f"--tta is for checkpoints of training, and {checkpoint} is packed: test it as it will run")
    if launcher not in ("none", "pytorch"):
        raise UserError(f"--launcher {launcher}: {checkpoint} is packed; use tools/dist_test.sh, or --launcher pytorch")
    for key in cfg_options or {}:
        if key.startswith("model.backbone"):
            raise UserError(f"--cfg-options {key}: the backbone is that of {checkpoint}, which is packed")


def _load_packed(route: Route) -> nn.Module:
    """Load a packed model; raises a ValueError if the file is of another kind than the config."""
    found = read_header(route.checkpoint).kind
    if found != route.kind:
        raise UserError(f"{route.checkpoint} is a packed {found}; expected a packed {route.kind}")
    keep_freed_memory()
    return load(route.checkpoint)


def _packed_like(model: nn.Module, packed: nn.Module, file: str | Path) -> nn.Module:
    """Pack a model that a config describes like one from a file, with its tensors, on the CPU, as the kernels are.

    Raises:
        ValueError: if the config's model is another one; the message names the first tensor that does not fit.
    """
    try:
        model = pack_around(model, model.backbone, packed_layers(packed))
        model.load_state_dict(packed.state_dict())
    except (RuntimeError, ValueError) as error:  # torch's list of all that does not fit, or of our own checks
        lines = [line.strip() for line in str(error).splitlines()]
        reason = lines[1] if len(lines) > 1 else lines[0]
        raise UserError(f"{file} does not fit the config's model: {reason[:300]}") from error
    model.dataset_meta = packed.dataset_meta
    return model.to("cpu")


def _dump_metric(kind: str, out: str) -> BaseMetric:
    if kind == "classifier":
        return DumpResults(out_file_path=out)
    # mmdet may only be imported once mmbivit has put the stand-in for mmcv's operators in place.
    from mmdet.evaluation import DumpDetResults

    return DumpDetResults(out_file_path=out)


def _draw_detections(cfg: Config, show: bool, show_dir: str | None, wait_time: float) -> None:
    hook = cfg.get("default_hooks", {}).get("visualization")
    if hook is None:
        raise UserError("--show and --show-dir need default_hooks.visualization=dict(type='DetVisualizationHook')")
    hook.draw = True
    if show:
        hook.update(show=True, wait_time=wait_time)
    if show_dir:
        hook.test_out_dir = show_dir


def _augment(cfg: Config) -> None:
    """Wrap the model for test-time augmentation; a config's own ``tta_model`` and ``tta_pipeline`` come first."""
    dataset: Any = inner_dataset(cfg.test_dataloader.dataset)
    if "tta_pipeline" not in cfg:
        keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction")
        flips = [dict(type="RandomFlip", prob=1.0), dict(type="RandomFlip", prob=0.0)]
        augmentation = dict(type="TestTimeAug", transforms=[flips, [dict(type="PackDetInputs", meta_keys=keys)]])
        cfg.tta_pipeline = [*deepcopy(dataset.pipeline[:-1]), augmentation]
    if "tta_model" not in cfg:
        nms = dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=100)
        cfg.tta_model = dict(type="DetTTAModel", tta_cfg=nms)
        _detect_boxes_only(cfg)
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = dict(**cfg.tta_model, module=cfg.model)


def _detect_boxes_only(cfg: Config) -> None:
    """Leave the mask head out, because mmdet's ``DetTTAModel`` cannot merge masks and stops at them."""
    if cfg.model.get("roi_head", {}).pop("mask_head", None) is None:
        return
    cfg.model.roi_head.pop("mask_roi_extractor", None)
    evaluator = cfg.test_evaluator
    for metric in evaluator if isinstance(evaluator, list) else [evaluator]:
        if "segm" in metric.get("metric", []):
            metric.metric = "bbox"
    print_log("--tta merges boxes only: the mask head is left out, mask AP is not evaluated.", "current")
