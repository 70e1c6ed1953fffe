"""timm's image augmentation as a transform of an MMEngine pipeline."""

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.transforms_factory import transforms_imagenet_eval, transforms_imagenet_train

from mmbivit.checks import UserError, check_choice, check_flag, check_number
from mmbivit.registry import TRANSFORMS

__all__ = ["TimmTransform", "tolerate_zero_bits"]

_NORMALISED = "images are normalised per batch: set mean and std of the model's data_preprocessor"
_ERASED = "images are erased per batch: set random_erasing=dict(probability=..., mode='pixel') of the data_preprocessor"
_FIXED = "the result is always one uint8 image of a fixed size"
LARGEST_SIZE = 2**14
ELSEWHERE = {
    **dict.fromkeys(("mean", "std", "normalize"), _NORMALISED),
    **dict.fromkeys(("re_prob", "re_mode", "re_count", "re_num_splits"), _ERASED),
    **dict.fromkeys(("use_prefetcher", "separate", "tf_preprocessing", "naflex", "patch_size", "max_seq_len"), _FIXED),
    **dict.fromkeys(("patchify", "patchify_channels_last", "patchify_flatten"), _FIXED),
}


@TRANSFORMS.register_module()
class TimmTransform:
    """Puts ``results['inputs']``, a uint8 tensor ``(3, H, W)``, made from the PIL image ``results['img']``.

    What is random and per image happens here, in worker processes; normalisation, random erasing, Mixup and CutMix
    happen per batch and on the device, in :class:`mmbivit.models.ClassificationPreprocessor`.

    Args:
        input_size: height and width of the result, or one number for both.
        is_training: random crop, flip and augmentation; otherwise resize and centre crop.
        options: other options of :func:`timm.data.create_transform`, for example ``auto_augment``, ``interpolation``,
            ``scale``, ``hflip``, ``color_jitter`` in training, ``crop_pct``, ``crop_mode`` in evaluation. Only those
            that have an effect are accepted. RandAugment fills with ImageNet's mean colour.

    Raises:
        ValueError: for an impossible size or an option that would have no effect.
    """

    def __init__(self, input_size: int | Sequence[int] = 224, is_training: bool = False, **options: Any):
        self.input_size = _check_size(input_size)
        check_flag("is_training", is_training)
        _check_options(is_training, options)
        _check_values(options)
        try:
            self.transform = create_transform(self.input_size, is_training, use_prefetcher=True, **options)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"timm.data.create_transform does not take {options}: {error!r}") from error
        tolerate_zero_bits(self.transform)

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        # a numpy array in early versions of timm 1
        results["inputs"] = torch.as_tensor(self.transform(results["img"]))
        return results

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.transform})"


def tolerate_zero_bits(transform: Any) -> None:
    """Let "posterize" of timm's automatic augmentation make an image black, as it does with Pillow < 13.

    With DeiT's settings RandAugment keeps 0 bits of one image in 660: 2 operations of 15, each applied to half of the
    images, at the full magnitude in 2.3 % (9 + 0.5 x normal >= 10). Pillow 13 refuses that, and training ends.

    Args:
        transform: what :func:`timm.data.create_transform` returns; it is changed in place.
    """
    for step in transform.transforms:
        policies = getattr(step, "policy", None) or [getattr(step, "ops", ())]
        for operation in itertools.chain.from_iterable(policies):
            if getattr(operation, "aug_fn", None) is auto_augment.posterize:
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    if bits_to_keep == 0:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **options)


def _check_size(input_size: int | Sequence[int]) -> int | tuple[int, int]:
    pair = input_size if isinstance(input_size, (list, tuple)) else (input_size, input_size)
    are_integers = all(isinstance(size, int) and not isinstance(size, bool) for size in pair)
    if len(pair) != 2 or not are_integers or not all(1 <= size <= LARGEST_SIZE for size in pair):
        raise UserError(
            f"input_size={input_size!r}; allowed: a positive integer, or (height, width), up to {LARGEST_SIZE}"
        )
    return input_size if isinstance(input_size, int) else tuple(input_size)


def _check_options(is_training: bool, options: dict[str, Any]) -> None:
    everything = set(inspect.signature(create_transform).parameters) - {"input_size", "is_training"} - set(ELSEWHERE)
    used_by = transforms_imagenet_train if is_training else transforms_imagenet_eval
    allowed = everything & {*inspect.signature(used_by).parameters, *(["no_aug"] if is_training else [])}
    for name in options:
        if name in ELSEWHERE:
            raise UserError(f"TimmTransform has no option {name}: {ELSEWHERE[name]}")
        if name not in allowed:
            why = f"has no effect with is_training={is_training}" if name in everything else "is unknown to timm"
            raise UserError(f"option {name} of TimmTransform {why}; allowed: {', '.join(sorted(allowed))}")


def _check_values(options: dict[str, Any]) -> None:
    """Check what timm would only meet when it transforms an image."""
    for name in {"hflip", "vflip", "color_jitter_prob", "grayscale_prob", "gaussian_blur_prob"} & options.keys():
        if options[name] is not None:
            check_number(name, options[name], 0, 1)
    if options.get("crop_pct") is not None:
        check_number("crop_pct", options["crop_pct"], 0, 1, above=True)
    if options.get("crop_mode") is not None:
        check_choice("crop_mode", options["crop_mode"], ("center", "squash", "border"))
    for name in {"scale", "ratio"} & options.keys():
        pair = options[name]
        if pair is None:
            continue
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise UserError(f"{name}={pair!r}; allowed: (least, greatest)")
        check_number(f"{name}[0]", pair[0], 0, 100, above=True)
        check_number(f"{name}[1]", pair[1], pair[0], 100)
