"""What happens to whole batches of images on the device: normalisation, random erasing, Mixup and CutMix."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from mmengine.model import BaseDataPreprocessor
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from mmbivit.checks import UserError, check_choice, check_flag, check_integer, check_keys, check_number
from mmbivit.registry import MODELS

__all__ = ["ClassificationPreprocessor"]

# What the options of timm's Mixup and RandomErasing may be; timm itself takes anything, and fails or not in training.
_share = partial(check_number, low=0, high=1)
_OPTIONS: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("prob", "switch_prob", "probability", "min_area", "max_area"), _share),
    **dict.fromkeys(("mixup_alpha", "cutmix_alpha"), partial(check_number, low=0, high=1000)),
    **dict.fromkeys(("min_aspect", "max_aspect"), partial(check_number, low=0, high=1000, above=True)),
    **dict.fromkeys(("min_count", "max_count"), partial(check_integer, low=1, high=1000)),
    "correct_lam": check_flag,
}
_MODES = {"mixup": ("batch", "pair", "elem"), "random_erasing": ("const", "rand", "pixel")}


@MODELS.register_module()
class ClassificationPreprocessor(BaseDataPreprocessor):
    """Moves a batch to the device and normalises it; in training, erases and mixes as well, with timm, as DeiT does.

    ``inputs`` become ``(x - mean) / std`` of pixels in 0..1: uint8 is divided by 255, floats are in 0..1 already. In
    training then random erasing, then Mixup or CutMix, after which ``labels`` are soft, ``(B, num_classes)``.
    The batch that is passed in stays as it was.

    Args:
        mean: of each colour, for pixels in 0..1.
        std: of each colour, for pixels in 0..1.
        mixup: options of :class:`timm.data.Mixup`, e.g. ``dict(mixup_alpha=0.8, cutmix_alpha=1.0)``.
        random_erasing: options of :class:`timm.data.random_erasing.RandomErasing`, e.g.
            ``dict(probability=0.25, mode='pixel')``.
        num_classes: width of the soft labels; needed by ``mixup``.
        label_smoothing: of the soft labels, only with ``mixup``; hard labels are smoothed by the classifier.
        non_blocking: copy to the GPU asynchronously, for a data loader with ``pin_memory=True``.

    Raises:
        ValueError: for an impossible setting, for a batch that ``default_collate`` has not stacked, and for a batch of
            odd size where ``mixup`` needs pairs.
    """

    def __init__(
        self,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        mixup: dict | None = None,
        random_erasing: dict | None = None,
        num_classes: int | None = None,
        label_smoothing: float = 0.0,
        non_blocking: bool = False,
    ):
        check_flag("non_blocking", non_blocking)
        super().__init__(non_blocking)
        _check_colours(mean, std)
        check_number("label_smoothing", label_smoothing, 0, 1, below=True)
        if mixup is None and label_smoothing:
            raise UserError(
                f"label_smoothing={label_smoothing} without mixup: set label_smoothing of the classifier instead"
            )
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.random_erasing = None if random_erasing is None else _build_random_erasing(random_erasing)
        self.mixup = None if mixup is None else _build_mixup(mixup, num_classes, label_smoothing)

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """Process a batch.

        Args:
            data: ``inputs`` ``(B, 3, H, W)``, uint8 or float, and in training ``labels`` ``(B,)``; other entries are
                kept.
            training: erase and mix.

        Returns:
            The same keys, with float32 ``inputs``.
        """
        data = self.cast_data(data)
        if not isinstance(data["inputs"], Tensor) or data["inputs"].ndim != 4:
            raise UserError(
                "inputs must be one tensor (B, 3, H, W): set collate_fn=dict(type='default_collate') in the dataloader"
            )
        inputs = self._normalise(data["inputs"])
        if training and self.random_erasing is not None:
            self.random_erasing.device = inputs.device
            inputs = self.random_erasing(inputs)
        if training and self.mixup is not None:
            if len(inputs) % 2:
                raise UserError(
                    f"mixup pairs images, but the batch has {len(inputs)}: use an even batch_size, and drop_last=True "
                    "in the train_dataloader for the last batch"
                )
            inputs, data["labels"] = self.mixup(inputs, data["labels"])
        data["inputs"] = inputs
        return data

    def _normalise(self, inputs: Tensor) -> Tensor:
        scale = 1 if inputs.is_floating_point() else 255
        # A copy, because what follows works in place and cast_data may have returned the caller's tensor.
        inputs = inputs.to(torch.float32, copy=True)
        return inputs.sub_(self.mean * scale).div_(self.std * scale)


def _check_colours(mean: Sequence[float], std: Sequence[float]) -> None:
    for name, values in (("mean", mean), ("std", std)):
        if isinstance(values, str) or not isinstance(values, Sequence) or len(values) not in (1, 3):
            raise UserError(f"{name}={values!r}; allowed: one number, or one per colour, in a list")
        for i, value in enumerate(values):
            check_number(f"{name}[{i}] (for pixels in 0..1)", value, 0, 1, above=name == "std")
    if len(mean) != len(std):
        raise UserError(f"mean={tuple(mean)}, std={tuple(std)}; allowed: one of each per colour")


def _build_random_erasing(options: dict) -> RandomErasing:
    _check_options("random_erasing", RandomErasing, options, ("device",))
    return RandomErasing(**options, device="cpu")


def _build_mixup(options: dict, num_classes: int | None, label_smoothing: float) -> Mixup:
    # multi_label needs dense labels, which no data set here has
    _check_options("mixup", Mixup, options, ("num_classes", "label_smoothing", "multi_label"))
    if num_classes is None:
        raise UserError("mixup needs num_classes, the width of its soft labels: set it in the data_preprocessor")
    check_integer("num_classes", num_classes, 2, 10**7)
    built = Mixup(**options, num_classes=num_classes, label_smoothing=label_smoothing)
    if built.mixup_alpha <= 0 and built.cutmix_alpha <= 0:
        raise UserError(f"mixup={options} mixes nothing: raise mixup_alpha or cutmix_alpha, or set mixup=None")
    return built


def _check_options(name: str, cls: type, options: dict, reserved: Sequence[str]) -> None:
    allowed = [option for option in inspect.signature(cls).parameters if option not in reserved]
    check_keys(name, options, (), allowed)
    for option, value in options.items():
        if option in _OPTIONS and value is not None:
            _OPTIONS[option](f"{name}.{option}", value)
    if options.get("cutmix_minmax") is not None:
        limits = options["cutmix_minmax"]
        if not isinstance(limits, (list, tuple)) or len(limits) != 2:
            raise UserError(f"{name}.cutmix_minmax={limits!r}; allowed: (least, greatest) share of the image")
        for limit in limits:
            _share(f"{name}.cutmix_minmax", limit)
    if "mode" in options:
        check_choice(f"{name}.mode", options["mode"], _MODES[name])
