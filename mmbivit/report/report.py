"""Writes the page of a run: what its log, its checkpoint and its test data have to say."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import mmbivit
from mmbivit.apis.errors import error_message, is_user_error
from mmbivit.checkpoints import use_safe_loading
from mmbivit.checks import UserError, check_integer
from mmbivit.engine.quiet import quiet
from mmbivit.files import atomic_writer, check_writable
from mmbivit.report.page import Page, Section, render

from . import sections
from .run import open_run

__all__ = ["write_report"]


@quiet()
def write_report(
    work_dir: str | Path,
    out: str | Path | None = None,
    *,
    checkpoint: str | Path | None = None,
    data_root: str | None = None,
    float_checkpoint: str | None = None,
    num_images: int = 4,
    evaluate: bool = True,
) -> Path:
    """Write one self-contained HTML page of a training run.

    A part that cannot be made, for example because the teacher's file has gone, says why in its place.

    Args:
        work_dir: work dir of ``tools/train.py``.
        out: the page; ``report.html`` in the work dir by default.
        checkpoint: weights to look at; by default the newest in the work dir.
        data_root: folder of the data set, if it is not where the config says.
        float_checkpoint: the float network that training started from; by default what the config names.
        num_images: example images of the test data.
        evaluate: evaluate the checkpoint on all test data, for the accuracy of each class.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: if the folder does not exist, or has no config or no checkpoint.
        OSError: if ``out`` cannot be written, before anything is loaded.
        ValueError: if the checkpoint is of another model, or an option has no sense.
    """
    check_integer("num_images", num_images, 1, 8)
    out = Path(work_dir) / "report.html" if out is None else Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{out}: the report is a page; expected a name that ends in .html")
    check_writable("--out", out)
    use_safe_loading()
    run = open_run(work_dir, checkpoint, data_root)
    with TemporaryDirectory() as folder:
        config = run.write_config(Path(folder))
        source = sections.Source(run, config, num_images, evaluate, float_checkpoint)
        page = _make_page(source)
    with atomic_writer(out) as file:
        file.write(render(page).encode())
    return out


def _make_page(source: sections.Source) -> Page:
    run = source.run
    makers = [("Training", sections.training)]
    makers += [("Accuracy", sections.accuracy)]
    makers += [("Size and operations", sections.cost)]
    if run.is_binary:
        makers += [
            ("Spatial interaction", sections.interaction),
            ("Balancing factors", sections.balancing),
            ("Sign flips", sections.flips),
            ("Attention", sections.attention),
            ("Activations", sections.activations),
        ]
    makers += [("Examples", sections.examples)]
    made = [_guarded(title, make, source) for title, make in makers]
    made += [sections.environment(source)]
    subtitle = f"{type(run.model).__name__}, {run.checkpoint.name}"
    if run.stage is not None:
        subtitle += f", training stage {run.stage}"
    now = datetime.now().astimezone()
    footer = (
        f"mmbivit {mmbivit.__version__}: python tools/analysis_tools/report.py {run.work_dir}, {now:%Y-%m-%d %H:%M %Z}"
    )
    return Page(run.name, subtitle, made, footer)


def _guarded(title: str, make: Callable[[sections.Source], Section], source: sections.Source) -> Section:
    """Make a section; what the user can mend is said in its place."""
    try:
        return make(source)
    except Exception as error:
        if not is_user_error(error):
            raise
        return Section(title, problem=f"Not shown: {error_message(error)}")
