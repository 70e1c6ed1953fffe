"""What the command line tools do: train, evaluate and use a detector or a classifier, as functions.

A tool reads options, makes a config of them (:func:`train_config`, :func:`evaluation_config`) and runs it
(:func:`train`, :func:`evaluate`, :func:`predict` and :func:`classify`); scripts can do the same. Packed networks are
made by :func:`export_packed` and used by :func:`detect_packed` and :func:`classify_packed`.
"""

from mmbivit.checkpoints import use_safe_loading

from .classify import classify, predictions_table
from .config import is_classifier, load_config, refuse_options
from .errors import UnusableImagesError, user_errors
from .evaluate import evaluate, evaluation_config
from .export import export_onnx
from .packed import classify_packed, detect_packed, export_packed, export_table, packed_kind
from .predict import find_images, predict
from .train import train, train_config

__all__ = [
    "UnusableImagesError",
    "classify",
    "classify_packed",
    "detect_packed",
    "evaluate",
    "evaluation_config",
    "export_onnx",
    "export_packed",
    "export_table",
    "find_images",
    "is_classifier",
    "load_config",
    "packed_kind",
    "predict",
    "predictions_table",
    "refuse_options",
    "train",
    "train_config",
    "use_safe_loading",
    "user_errors",
]
