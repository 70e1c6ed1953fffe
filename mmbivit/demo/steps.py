"""The demo: makes data, trains a float and a binary detector, packs that, evaluates all and draws what they see."""

import json
import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from mmbivit import config_path
from mmbivit.checks import UserError
from mmbivit.datasets import make_digit_scenes

__all__ = ["DemoPlan", "FULL", "QUICK", "demo_steps", "run_steps"]

_PROGRESS = re.compile(r"(?:Iter|Epoch)\((train|val|test)\)\s*\[\s*(\d+)/\s*(\d+)\]")
_ETA = re.compile(r"eta: ([\d:]+)")
_LOSS = re.compile(r" loss: ([\d.]+)")


@dataclass(frozen=True)
class DemoPlan:
    """How much the demo does.

    Args:
        name: shown to the user; results of different plans do not mix.
        train: training scenes.
        val: validation scenes.
        float_config: name of the float detector's config.
        binary_config: name of the binary detector's config.
    """

    name: str
    train: int
    val: int
    float_config: str
    binary_config: str


FULL = DemoPlan("full", 1000, 200, "digits/mask_rcnn_swin_float", "digits/mask_rcnn_sibivit")
QUICK = DemoPlan("quick", 64, 16, "digits/mask_rcnn_swin_float_quick", "digits/mask_rcnn_sibivit_quick")


@dataclass(frozen=True)
class Step:
    """One step: what the user reads, and what does it; ``run`` gets a function that reports progress in words."""

    key: str
    title: str
    run: Callable[[Callable[[float, str], None]], None]


def demo_steps(plan: DemoPlan, out: Path, tools: Path) -> list[Step]:
    """Make the steps that train and evaluate both detectors, and pack the binary one.

    Args:
        plan: how much to do.
        out: folder of everything the demo writes.
        tools: folder with ``train.py``, ``test.py`` and ``deployment/``; the demo runs what a user would type.
    """
    data = out / "data"

    def make_data(report: Callable[[float, str], None]) -> None:
        make_digit_scenes(data, train=plan.train, val=plan.val)

    def command(name: str, *arguments: object) -> Callable[[Callable[[float, str], None]], None]:
        line = [sys.executable, tools / name, *arguments]
        log = out / "logs" / f"{Path(name).stem}_{Path(str(arguments[0])).stem}.log"
        return lambda report: _run_logged([str(word) for word in line], log, report)

    float_config, binary_config = config_path(plan.float_config), config_path(plan.binary_config)
    on_data = ("--data-root", data)
    teacher = ("--float-checkpoint", out / "float" / "last.pth")
    binary, packed = out / "sibivit" / "last.pth", out / "sibivit.safetensors"
    return [
        Step("data", "Make the digit scenes", make_data),
        Step(
            "train_float",
            "Train the float Mask R-CNN",
            _then_link(
                command("train.py", float_config, "--work-dir", out / "float", "--resume", *on_data), out / "float"
            ),
        ),
        Step(
            "train_binary",
            "Train SI-BiViT in two stages",
            _then_link(
                command("train.py", binary_config, "--work-dir", out / "sibivit", "--resume", *teacher, *on_data),
                out / "sibivit",
            ),
        ),
        Step(
            "test_float",
            "Evaluate the float Mask R-CNN",
            command("test.py", float_config, out / "float" / "last.pth", "--work-dir", out / "float_eval", *on_data),
        ),
        Step(
            "test_binary",
            "Evaluate SI-BiViT",
            command("test.py", binary_config, binary, "--work-dir", out / "sibivit_eval", *on_data),
        ),
        Step("pack", "Pack SI-BiViT", command("deployment/export_packed.py", binary_config, binary, packed)),
        Step(
            "test_packed",
            "Evaluate the packed detector",
            command("test.py", binary_config, packed, "--work-dir", out / "packed_eval", *on_data),
        ),
    ]


def run_steps(steps: Sequence[Step], out: Path, plan: DemoPlan, console: Console) -> dict[str, float]:
    """Run the steps that are not done yet, with progress, and remember how long each took.

    An interrupted step goes on where its checkpoint left it; its time adds up over the attempts.

    Args:
        steps: what to do.
        out: folder that remembers what is done, in ``demo.json``.
        plan: the plan that the results belong to.
        console: where progress is shown.

    Returns:
        Seconds of each step by key.

    Raises:
        ValueError: if ``out`` holds the results of another plan.
        RuntimeError: if a step fails; it names the log.
    """
    file = out / "demo.json"
    state = json.loads(file.read_text()) if file.exists() else dict(plan=plan.name, done=[], seconds={})
    if state["plan"] != plan.name:
        raise UserError(f"{out} holds the results of a {state['plan']} demo; give another folder with --out")

    def save() -> None:
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(state, indent=2) + "\n")
        temporary.replace(file)

    out.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps, 1):
        title = f"{number}/{len(steps)}  {step.title}"
        if step.key in state["done"]:
            console.print(f"[green]✓[/] {title} (done before, {state['seconds'][step.key]:.0f} s)")
            continue
        before, start = state["seconds"].get(step.key, 0.0), time.monotonic()
        try:
            with _progress(console, title) as report:
                step.run(report)
            state["done"].append(step.key)
        finally:
            state["seconds"][step.key] = before + time.monotonic() - start
            save()
        console.print(f"[green]✓[/] {title} ({state['seconds'][step.key]:.0f} s)")
    return state["seconds"]


@contextmanager
def _progress(console: Console, title: str) -> Iterator[Callable[[float, str], None]]:
    """Show the progress of a step: a bar in a terminal, else a line every 20 seconds."""
    if not console.is_terminal:
        console.print(f"  {title}")
        last = time.monotonic()

        def print_line(share: float, note: str) -> None:
            nonlocal last
            if time.monotonic() - last > 20:
                last = time.monotonic()
                console.print(f"    {note}", highlight=False)

        yield print_line
        return
    columns = ("[progress.description]{task.description}", BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console, transient=True) as progress:
        task = progress.add_task(title, total=1.0, note="")
        yield lambda share, note: progress.update(task, completed=share, note=note)


def _then_link(train: Callable, work_dir: Path) -> Callable:
    """After training, give the last checkpoint a name that does not depend on the number of iterations."""

    def run(report: Callable[[float, str], None]) -> None:
        train(report)
        link = work_dir / "last.pth"
        link.unlink(missing_ok=True)
        link.symlink_to((work_dir / "last_checkpoint").read_text().strip())

    return run


def _run_logged(line: list[str], log: Path, report: Callable[[float, str], None]) -> None:
    """Run a command with its output in a log file, reporting MMEngine's own progress lines.

    Raises:
        RuntimeError: if it fails; the message has the end of its output.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    tail: deque[str] = deque(maxlen=15)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}  # else what it prints comes after what it logs
    with (
        open(log, "a") as file,
        subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True, errors="replace"
        ) as process,
    ):
        try:
            for text in process.stdout:
                file.write(text)
                tail.append(text.rstrip())
                if found := _PROGRESS.search(text):
                    mode, now, end = found.groups()
                    extra = [f"{now}/{end}", *(f"eta {m[1]}" for m in [_ETA.search(text)] if m)]
                    extra += [f"loss {float(m[1]):.2f}" for m in [_LOSS.search(text)] if m]
                    if "loss_distill" in text:
                        extra.append("stage 1: distilling")
                    report(int(now) / int(end), "  ".join(extra))
                elif "Stage 2 from iteration" in text:
                    report(0.0, text.split(" - ")[-1].strip())
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise RuntimeError(f"{' '.join(line)} failed; its log is {log} and ends with\n" + "\n".join(tail))
