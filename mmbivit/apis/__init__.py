"""What the command line tools do: train, evaluate, use and export a detector or a classifier, as functions.

A tool reads options, makes a config of them (:func:`train_config`, :func:`evaluation_config`) and runs it
(:func:`train`, :func:`evaluate`), or takes a config file and a checkpoint (:func:`predict`, :func:`export_packed`,
:func:`export_onnx`); scripts can do the same. :func:`evaluate` and :func:`predict` take packed files, too.
"""

from mmbivit.checkpoints import use_safe_loading

from .config import load_config
from .errors import UnusableImagesError, user_errors
from .evaluate import evaluate, evaluation_config
from .export import export_onnx, export_packed, export_table
from .predict import predict, print_predictions
from .train import train, train_config

__all__ = [
    "UnusableImagesError",
    "evaluate",
    "evaluation_config",
    "export_onnx",
    "export_packed",
    "export_table",
    "load_config",
    "predict",
    "print_predictions",
    "train",
    "train_config",
    "use_safe_loading",
    "user_errors",
]
