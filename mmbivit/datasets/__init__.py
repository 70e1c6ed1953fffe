"""Data: the digit scenes that can be made anywhere, and the check that COCO is where a config expects it."""

from .coco_check import check_coco_data, set_data_root
from .digit_folders import DigitFolders, draw_digit_folders, make_digit_folders
from .digit_scenes import DIGIT_CLASSES, DigitScenes, make_digit_scenes
from .image_check import check_image_data
from .repeat_aug import RepeatAugSampler
from .scene_drawing import draw_scenes
from .timm_dataset import TimmDataset
from .timm_transform import TimmTransform
from .tiny_imagenet import convert_tiny_imagenet

__all__ = [
    "DIGIT_CLASSES",
    "DigitFolders",
    "DigitScenes",
    "RepeatAugSampler",
    "TimmDataset",
    "TimmTransform",
    "check_coco_data",
    "check_image_data",
    "convert_tiny_imagenet",
    "draw_digit_folders",
    "draw_scenes",
    "make_digit_folders",
    "make_digit_scenes",
    "set_data_root",
]
