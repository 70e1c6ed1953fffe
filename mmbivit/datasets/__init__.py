"""Data: the digit scenes that can be made anywhere, and the check that COCO is where a config expects it."""

from .coco_check import check_coco_data, set_data_root
from .digit_scenes import DIGIT_CLASSES, DigitScenes, make_digit_scenes
from .scene_drawing import draw_scenes

__all__ = [
    "DIGIT_CLASSES",
    "DigitScenes",
    "check_coco_data",
    "draw_scenes",
    "make_digit_scenes",
    "set_data_root",
]
