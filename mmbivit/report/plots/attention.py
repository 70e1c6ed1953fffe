"""Picture of what one token attends to, beside the teacher's attention."""

from pathlib import Path
from typing import TYPE_CHECKING

from mmbivit.analysis.attention import attention_map
from mmbivit.analysis.figures.attention import attention_figure
from mmbivit.checks import UserError
from mmbivit.engine.decoupled_training_hook import find_staged_backbone
from mmbivit.report.inputs import load_images, load_stage2_model, load_teacher, pixels_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_attention"]


def plot_attention(
    config: str | Path,
    checkpoint: str | Path,
    image: str | Path,
    block: str | None = None,
    query: tuple[int, int] | None = None,
    teacher_checkpoint: str | Path | None = None,
) -> "Figure":
    """Draw which tokens one token of an image attends to, in the binary network and in the float teacher.

    Args:
        config: the config file of a detector or classifier, whose ``DecoupledTrainingHook`` has the teacher.
        checkpoint: file or URL of its weights, of training stage 2.
        image: image file.
        block: such as ``stages.0.blocks.1``, by default the last block of the first stage.
        query: pixel ``(x, y)``, of the image as the network gets it, whose token asks; by default the middle.
        teacher_checkpoint: file or URL of the teacher's weights, by default what the config names.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if they do not fit, or there is no such block, pixel or teacher.
    """
    if not Path(image).is_file():
        raise FileNotFoundError(f"image {image} does not exist, or is no file")
    cfg, model = load_stage2_model(config, checkpoint)
    _, inputs = next(load_images(cfg, model, [image]))
    student = attention_map(find_staged_backbone(model), inputs, block, query)
    teacher = attention_map(load_teacher(cfg, teacher_checkpoint), inputs, block, query)
    shapes = [attention.weights.shape[1:] for attention in (student, teacher)]
    if shapes[0] != shapes[1]:
        sizes = [f"{height} x {width}" for height, width in shapes]
        raise UserError(
            f"in {student.block} the student has {sizes[0]} tokens, the teacher {sizes[1]}: take one like it"
        )
    return attention_figure(pixels_of(model, inputs), [("student", student), ("teacher", teacher)])
