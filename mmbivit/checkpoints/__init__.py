"""Checkpoints: fetched, read without running code from them, and fitted to the network that takes them."""

from .content import drop_configs
from .fetch import FETCHED_SCHEMES, checkpoint_path, load_checkpoint_file, save_atomically, trust_checkpoints
from .fitting import load_pretrained, register_classifier_key_mapping, register_key_mapping
from .loaders import use_safe_loading

__all__ = [
    "FETCHED_SCHEMES",
    "checkpoint_path",
    "drop_configs",
    "load_checkpoint_file",
    "load_pretrained",
    "register_classifier_key_mapping",
    "register_key_mapping",
    "save_atomically",
    "trust_checkpoints",
    "use_safe_loading",
]
