"""What the command line tools do: train, evaluate and use a detector, as functions.

A tool reads options, makes a config of them (:func:`train_config`, :func:`evaluation_config`) and runs it
(:func:`train`, :func:`evaluate`, :func:`predict`); scripts can do the same.
"""

from .checkpoints import use_safe_loading
from .config import load_config
from .errors import user_errors
from .evaluate import evaluate, evaluation_config
from .predict import find_images, predict
from .train import train, train_config

__all__ = [
    "evaluate",
    "evaluation_config",
    "find_images",
    "load_config",
    "predict",
    "train",
    "train_config",
    "use_safe_loading",
    "user_errors",
]
