"""What helps a binary network, on digits: arms that differ in one thing, over paired seeds.

Every seed has its own float network, from whose weights all of its arms start and which is the teacher where there is
one; all arms of a task take as many iterations. An arm that answers several questions is run once.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from mmengine.config import Config

from mmbivit import get_config
from mmbivit.apis import evaluate, evaluation_config
from mmbivit.checkpoints import load_checkpoint_file

from .paired import PairedDifference, compare_pairs
from .repeated_runs import check_runs, train_once

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "ARMS",
    "CLASSIFICATION",
    "DETECTION",
    "QUESTIONS",
    "Arm",
    "Question",
    "Task",
    "all_differences",
    "arm_config",
    "draw_differences",
    "markdown_tables",
    "run_arms",
    "set_value",
    "without_branch",
    "without_si",
]


@dataclass(frozen=True)
class Task:
    """What is learned.

    Args:
        float_key: how results call its float networks.
        float_config: name of their config.
        metric: what is compared, as MMEngine logs it.
        percent: what it is multiplied by to be in percent.
        data: folder of its data below that of the results.
    """

    float_key: str
    float_config: str
    metric: str
    percent: float
    data: str


CLASSIFICATION = Task("float", "classification/digits_swin_float", "accuracy/top1", 1.0, "data")
VIT = Task("float_vit", "classification/digits_vit_float", "accuracy/top1", 1.0, "data")
DETECTION = Task("float_detector", "digits/mask_rcnn_swin_float", "coco/bbox_mAP_50", 100.0, "scenes")
ONE_STAGE = "classification/digits_sibivit_from_float"
TWO_STAGES = "classification/digits_sibivit"
VIT_ONE_STAGE = "classification/digits_sibivit_vit_from_float"
DETECTOR_ONE_STAGE = "digits/ablation/single_stage_si"
DETECTOR_TWO_STAGES = "digits/mask_rcnn_sibivit"


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Args:
        label: how tables and the picture call it.
        base: name of the config that it starts from.
        changes: what it changes, by dotted key: the new value, or a function of the old one.
    """

    label: str
    base: str
    changes: tuple[tuple[str, object], ...] = ()

    @property
    def task(self) -> Task:
        """What it learns."""
        if self.base.startswith("digits/"):
            return DETECTION
        return VIT if self.base == VIT_ONE_STAGE else CLASSIFICATION


def without_si(mlp_ratio: int) -> tuple[tuple[str, object], ...]:
    """Return the changes that take spatial interaction away."""
    return ("model.backbone.spatial_interaction", None), ("model.backbone.mlp_ratio", mlp_ratio)


def _classifier_teacher(teacher: dict[str, Any]) -> dict[str, Any]:
    """Make a teacher that has logits of one that has blocks."""
    backbone = {key: value for key, value in teacher.items() if key != "init_cfg"}
    return dict(type="mmbivit.ImageClassifier", num_classes=10, backbone=backbone, init_cfg=dict(teacher["init_cfg"]))


def _distilling(*losses: dict[str, Any]) -> tuple[tuple[str, object], ...]:
    changes = (("custom_hooks.0.distill_loss", list(losses)), ("custom_hooks.0.distill_weight", 1.0))
    return (*changes, ("custom_hooks.0.teacher", _classifier_teacher))


def _alpha(start: float) -> Arm:
    change = ("model.backbone.spatial_interaction", dict(ratio=1.0, alpha_init=start))
    return Arm(f"SI, alpha from {start:g}", ONE_STAGE, (change,))


_FROZEN_ALPHA = ("optim_wrapper.paramwise_cfg", dict(custom_keys={"si.alpha": dict(lr_mult=0.0)}))
_NOT_FRESH = ("custom_hooks.0.reset_optimizer", False)
_BLOCKS = dict(type="mmbivit.BlockMSELoss", normalize=True, weight=0.1)
_LOGITS = dict(type="mmbivit.SoftCrossEntropyLoss")
_PLAIN = ("model.backbone.recipe", dict(weight_ste="plain"))

ARMS = {
    "si_mlp3": Arm("SI, MLP 3", ONE_STAGE),
    "no_si_mlp3": Arm("no SI, MLP 3", ONE_STAGE, without_si(3)),
    "no_si_mlp4": Arm("no SI, MLP 4", ONE_STAGE, without_si(4)),
    "frozen_alpha": Arm("SI with alpha frozen at 0, MLP 3", ONE_STAGE, (_FROZEN_ALPHA,)),
    "two_cycles": Arm(
        "single stage, two cycles",
        TWO_STAGES,
        (("model.backbone.stage1", "all"), ("custom_hooks.0.teacher", None), _NOT_FRESH),
    ),
    "two_stages": Arm("two stages", TWO_STAGES, (_NOT_FRESH,)),
    "two_stages_fresh": Arm("two stages, fresh optimizer", TWO_STAGES),
    "two_stages_plain": Arm("two stages, plain", TWO_STAGES, (_PLAIN, _NOT_FRESH)),
    "plain": Arm("single stage, plain", ONE_STAGE, (_PLAIN,)),
    "distil_nothing": Arm("distilling nothing", TWO_STAGES, (("custom_hooks.0.teacher", None),)),
    "distil_logits": Arm("distilling logits", TWO_STAGES, _distilling(_LOGITS)),
    "distil_both": Arm("distilling blocks and logits", TWO_STAGES, _distilling(_BLOCKS, _LOGITS)),
    "alpha_0.01": _alpha(0.01),
    "alpha_0.1": _alpha(0.1),
    "alpha_0.5": _alpha(0.5),
    "vit_si": Arm("ViT, SI, MLP 3", VIT_ONE_STAGE),
    "vit_no_si_mlp3": Arm("ViT, no SI, MLP 3", VIT_ONE_STAGE, without_si(3)),
    "vit_no_si_mlp4": Arm("ViT, no SI, MLP 4", VIT_ONE_STAGE, without_si(4)),
    "detector_two_stages": Arm("detector, two stages, SI", DETECTOR_TWO_STAGES),
    "detector_one_stage": Arm("detector, single stage, SI", DETECTOR_ONE_STAGE),
    "detector_two_stages_no_si": Arm("detector, two stages, no SI", DETECTOR_TWO_STAGES, without_si(3)),
    "detector_one_stage_no_si": Arm("detector, single stage, no SI", DETECTOR_ONE_STAGE, without_si(3)),
    "detector_two_stages_plain": Arm(
        "detector, two stages, plain, optimizer not fresh",
        DETECTOR_TWO_STAGES,
        (_PLAIN, _NOT_FRESH),
    ),
}


@dataclass(frozen=True)
class Question:
    """A question, and the pairs of arms whose difference answers it."""

    key: str
    title: str
    pairs: tuple[tuple[str, str], ...]

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that it needs, each once."""
        return tuple(dict.fromkeys(arm for pair in self.pairs for arm in pair))


QUESTIONS = (
    Question(
        "E1",
        "Does spatial interaction help?",
        (
            ("si_mlp3", "no_si_mlp3"),
            ("si_mlp3", "no_si_mlp4"),
            ("si_mlp3", "frozen_alpha"),
            ("frozen_alpha", "no_si_mlp3"),
        ),
    ),
    Question(
        "E2",
        "Do the two stages help?",
        (
            ("two_stages", "si_mlp3"),
            ("two_stages", "two_cycles"),
            ("two_stages_fresh", "si_mlp3"),
            ("two_stages_fresh", "two_cycles"),
            ("two_stages_plain", "plain"),
            ("two_stages_fresh", "two_stages"),
            ("two_stages_plain", "two_stages"),
            ("two_stages_plain", "two_stages_fresh"),
            ("plain", "si_mlp3"),
            ("two_cycles", "si_mlp3"),
        ),
    ),
    Question(
        "E3",
        "What is worth distilling?",
        (
            ("two_stages_fresh", "distil_nothing"),
            ("distil_logits", "distil_nothing"),
            ("distil_both", "distil_nothing"),
            ("distil_both", "two_stages_fresh"),
        ),
    ),
    Question(
        "E4",
        "Where should alpha start?",
        (("alpha_0.01", "si_mlp3"), ("alpha_0.1", "si_mlp3"), ("alpha_0.5", "si_mlp3")),
    ),
    Question("V", "And in a ViT?", (("vit_si", "vit_no_si_mlp3"), ("vit_si", "vit_no_si_mlp4"))),
    Question(
        "D",
        "And in detection? (box AP50)",
        (
            ("detector_two_stages", "detector_one_stage"),
            ("detector_two_stages_no_si", "detector_one_stage_no_si"),
            ("detector_two_stages", "detector_two_stages_no_si"),
            ("detector_one_stage", "detector_one_stage_no_si"),
            ("detector_two_stages_plain", "detector_two_stages"),
        ),
    ),
)


def arm_config(arm: Arm, float_checkpoint: Path) -> Config:
    """Make the config of an arm that starts from a float network, which is the teacher where there is one."""
    cfg = get_config(arm.base)
    for key, value in arm.changes:
        set_value(cfg, key, value)
    cfg.load_from = str(float_checkpoint)
    for hook in cfg.get("custom_hooks", []):
        if hook.get("teacher"):
            hook.teacher.init_cfg.checkpoint = str(float_checkpoint)
    return _evaluated_at_its_end(cfg)


def _evaluated_at_its_end(cfg: Config) -> Config:
    cfg.train_cfg.val_interval = cfg.train_cfg.get("max_epochs") or cfg.train_cfg.max_iters
    return cfg


def set_value(cfg: Config, key: str, value: object) -> None:
    """Set one value, whole: merging would keep what it replaces, and split keys with dots."""
    *path, last = key.split(".")
    node = cfg
    for name in path:
        node = node[int(name)] if name.isdecimal() else node[name]
    node[last] = value(node[last]) if callable(value) else value


def run_arms(
    arms: Mapping[str, Arm],
    seeds: Sequence[int],
    out: Path,
    train_tool: Path,
    jobs: int,
    progress: Callable[[str], None] = print,
) -> dict[str, list[float]]:
    """Train every arm with every seed, unless that is done already; seed by seed, so that pairs are whole soon.

    Args:
        arms: what to train, by the names that results call it.
        seeds: of initialisation, order and augmentation, and of the float network.
        out: has the data of each task, and gets a folder per run, named ``<arm>_seed<n>``.
        train_tool: path of ``tools/train.py``.
        jobs: runs at a time, one thread each.
        progress: told of each run that is done.

    Returns:
        The metric at the end in percent, by arm and in the order of the seeds; those of the float networks are under
        their own keys.

    Raises:
        RuntimeError: if a run fails; it names the log.
        ValueError: for an impossible seed, or less than one job.
    """
    check_runs(seeds, jobs)
    tasks = {arm.task.float_key: arm.task for arm in arms.values()}
    start, done, total = time.monotonic(), 0, len(seeds) * (len(tasks) + len(arms))

    def write_config(arm: str, seed: int) -> None:
        work_dir = out / f"{arm}_seed{seed}"
        work_dir.mkdir(parents=True, exist_ok=True)
        if arm in tasks:
            cfg = _evaluated_at_its_end(get_config(tasks[arm].float_config))
        else:
            teacher = out / f"{arms[arm].task.float_key}_seed{seed}"
            cfg = arm_config(arms[arm], teacher / (teacher / "last_checkpoint").read_text().strip())
        cfg.dump(work_dir / "arm.py")

    def train(arm: str, seed: int) -> float:
        nonlocal done
        task, work_dir = tasks[arm] if arm in tasks else arms[arm].task, out / f"{arm}_seed{seed}"
        new = not (work_dir / "evaluations.json").is_file()
        options = ["--data-root", out / task.data, "--seed", seed]
        evaluations = train_once(train_tool, work_dir / "arm.py", work_dir, options, task.metric)
        accuracy = task.percent * evaluations[-1][task.metric]
        done += 1
        minutes = (time.monotonic() - start) / 60
        note = f"{minutes:.0f} minutes" if new else "done before"
        progress(f"{done}/{total}  {arm}, seed {seed}: {accuracy:.2f} %  ({note})")
        return accuracy

    with ThreadPoolExecutor(jobs) as pool:
        results: dict[str, list[float]] = {}
        # All float networks first, so that nobody waits for one that has not begun.
        for names in (tasks, arms):
            work = [(name, seed) for seed in seeds for name in names]
            # Here and not in the threads: Python 3.11 at times fails when two of them parse at once.
            for job in work:
                write_config(*job)
            for (name, _), accuracy in zip(work, pool.map(lambda job: train(*job), work), strict=True):
                results.setdefault(name, []).append(accuracy)
    (out / "results.json").write_text(json.dumps(dict(seeds=list(seeds), accuracies=results), indent=1) + "\n")
    return results


def without_branch(work_dir: Path, data: Path) -> float:
    """Return the accuracy in percent of a finished classifier with alpha set to 0, which takes the branch away."""
    done = work_dir / "without_branch.json"
    if not done.is_file():
        checkpoint = load_checkpoint_file(work_dir / (work_dir / "last_checkpoint").read_text().strip())
        for name, tensor in checkpoint["state_dict"].items():
            if name.endswith(".si.alpha"):
                tensor.zero_()
        torch.save(dict(state_dict=checkpoint["state_dict"], meta={}), work_dir / "without_branch.pth")
        cfg = evaluation_config(
            work_dir / "arm.py", work_dir / "without_branch.pth", work_dir=str(work_dir / "eval"), data_root=str(data)
        )
        done.write_text(json.dumps(evaluate(cfg)[CLASSIFICATION.metric]))
    return json.loads(done.read_text())


def differences(question: Question, results: dict[str, list[float]]) -> dict[str, PairedDifference]:
    """Return the paired differences of a question, of the arms that were run."""
    return {
        f"{ARMS[first].label} - {ARMS[second].label}": compare_pairs(results[first], results[second])
        for first, second in question.pairs
        if first in results and second in results
    }


def markdown_tables(results: dict[str, list[float]], branchless: dict[str, list[float]] | None = None) -> str:
    """Format the accuracies, and the paired differences of each question, as Markdown.

    Args:
        results: accuracies by arm.
        branchless: the same without the spatial interaction branch, of the arms for which that is known.
    """
    lines = ["| arm | top-1 or box AP50, % | each seed | without the branch |", "|---|---|---|---|"]
    for key, values in results.items():
        label = ARMS[key].label if key in ARMS else f"{key.replace('_', ' ')}, the start of all"
        without = f"{mean(branchless[key]):.2f}" if branchless and key in branchless else ""
        lines.append(f"| {label} | {mean(values):.2f} | {', '.join(f'{value:.2f}' for value in values)} | {without} |")
    for title, found in all_differences(results).items():
        lines += ["", title, ""]
        lines += ["| difference, points | mean | 95 % interval | sign-flip p | each seed |", "|---|---|---|---|---|"]
        for label, d in found.items():
            each = ", ".join(f"{value:+.2f}" for value in d.each)
            lines.append(f"| {label} | {d.mean:+.2f} | {d.low:+.2f} to {d.high:+.2f} | {d.p:.3f} | {each} |")
    return "\n".join(lines)


def all_differences(results: dict[str, list[float]]) -> dict[str, dict[str, PairedDifference]]:
    """Return the paired differences of each question that has any, by its title."""
    found = {f"{question.key}: {question.title}": differences(question, results) for question in QUESTIONS}
    return {title: group for title, group in found.items() if group}


def draw_differences(groups: Mapping[str, Mapping[str, PairedDifference]]) -> "Figure":
    """Draw the mean, the 95 % interval and each seed of paired differences, in groups with a title each."""
    from matplotlib.figure import Figure

    rows = [len(found) for found in groups.values()]
    figure = Figure(figsize=(8, 1.2 + 0.36 * sum(rows)), layout="constrained")
    all_axes = figure.subplots(len(groups), sharex=True, squeeze=False, height_ratios=rows)[:, 0]
    for axes, (title, found) in zip(all_axes, groups.items(), strict=True):
        for row, d in enumerate(found.values()):
            color = "tab:blue" if d.low > 0 else "tab:red" if d.high < 0 else "0.35"
            axes.errorbar(d.mean, row, xerr=d.half_width, fmt="o", color=color, capsize=3, zorder=3)
            axes.plot(d.each, [row] * len(d.each), "|", color="0.6", ms=9)
        axes.set_yticks(range(len(found)), labels=found)
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.axvline(0, color="0.5", lw=1)
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(axis="x", alpha=0.3)
    seeds = {len(d.each) for found in groups.values() for d in found.values()}
    figure.supxlabel(f"difference in points: mean, 95 % interval and each of {max(seeds)} seeds", fontsize=10)
    return figure
