"""Checkpoint files: found or fetched, and read without running code from them."""

import difflib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import timm
import torch
from mmengine.dist import barrier, master_only

from mmbivit.checks import UserError
from mmbivit.files import atomic_writer

from .content import find_state_dict
from .safe_loading import read_checkpoint, trusting

__all__ = ["FETCHED_SCHEMES", "checkpoint_path", "load_checkpoint_file", "save_atomically", "trust_checkpoints"]

TIMM_SCHEME = "timm://"
FETCHED_SCHEMES = ("http://", "https://", TIMM_SCHEME)


def checkpoint_path(file: str) -> Path:
    """Return the local path of a checkpoint.

    A URL and the weights of a timm model (``timm://swin_tiny_patch4_window7_224.ms_in1k``) are fetched once into
    torch's hub cache, by one rank; all ranks must call this.

    Raises:
        FileNotFoundError: if a local file does not exist, or another one cannot be fetched.
        ValueError: if timm has no weights of this name.
    """
    file = str(file)
    path = _local_path(file)
    if not file.startswith(FETCHED_SCHEMES):
        if not path.is_file():
            hint = f"; timm's weights are {TIMM_SCHEME}{file}" if timm.is_model_pretrained(file) else ""
            raise FileNotFoundError(f"checkpoint {file} does not exist{hint}")
        return path
    fetch: Callable[[str, str], None]
    if file.startswith(TIMM_SCHEME):
        name, fetch = file.removeprefix(TIMM_SCHEME), _fetch_from_timm
        _check_timm_name(name)
    else:
        name, fetch = file, torch.hub.download_url_to_file
    reason = _fetch(fetch, name, path) or "another rank could not fetch it"
    barrier()  # also where the file is there: it may just have been written by a rank that waits
    if not path.is_file():
        raise FileNotFoundError(
            f"checkpoint {file} could not be downloaded to {path}: {reason}; give a local file instead"
        )
    return path


def _local_path(file: str) -> Path:
    """Return where a checkpoint lies, or will lie when it is fetched."""
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    if file.startswith(TIMM_SCHEME):
        return cache / f"timm_{file.removeprefix(TIMM_SCHEME)}.pth"
    return cache / Path(urlparse(file).path).name if file.startswith(FETCHED_SCHEMES) else Path(file)


def trust_checkpoints(*files: str | Path | None) -> AbstractContextManager[None]:
    """Make a context in which these files may hold anything: loading them can run any code.

    Args:
        files: paths, URLs or names of timm models; ``None`` is passed over.
    """
    return trusting(_local_path(str(file)) for file in files if file)


@master_only
def _fetch(fetch: Callable[[str, str], None], name: str, path: Path) -> str | None:
    """Fetch a file, if it is not there, and return why that failed, if it did."""
    if path.is_file():
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fetch(name, str(path))
    except Exception as error:  # torch, timm and its hub's client each raise their own kinds
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


def _check_timm_name(name: str) -> None:
    if timm.is_model_pretrained(name):
        return
    known = timm.list_models(pretrained=True)
    names = difflib.get_close_matches(name, known, n=3)
    hint = f"do you mean {' or '.join(names)}?" if names else "timm.list_models(pretrained=True) names those it has"
    raise UserError(f"checkpoint {TIMM_SCHEME}{name}: timm has no pretrained weights of this name; {hint}")


def _fetch_from_timm(name: str, path: str) -> None:
    """Let timm download the weights of a model, and save its state dict."""
    save_atomically(timm.create_model(name, pretrained=True).state_dict(), path)


def save_atomically(content: Any, path: str | Path) -> None:
    """Write a checkpoint so that a file of this name is always whole; folders are made."""
    with atomic_writer(path) as file:
        torch.save(content, file)


def load_checkpoint_file(file: str, map_location: str = "cpu") -> dict[str, Any]:
    """Load a checkpoint without running code from it.

    Args:
        file: path, URL or name of a timm model, see :func:`checkpoint_path`.
        map_location: where tensors go.

    Returns:
        What the file holds: a state dict, or a dict with one under ``state_dict`` or ``model``.

    Raises:
        FileNotFoundError: if the file does not exist or cannot be downloaded.
        ValueError: if it is no checkpoint, holds more than tensors, plain containers, timm's options and MMEngine's
            log history (unless it is trusted, see :func:`trust_checkpoints`), or timm has no such weights.
    """
    checkpoint = read_checkpoint(checkpoint_path(file), str(file), map_location)
    if not isinstance(checkpoint, dict):
        raise UserError(f"{file} is no checkpoint: it holds a {type(checkpoint).__name__}, expected a dict of tensors")
    state_dict = find_state_dict(checkpoint)
    if not isinstance(state_dict, dict) or not all(isinstance(key, str) for key in state_dict):
        raise UserError(f"{file} is no checkpoint: it holds no state dict, which has tensors by name")
    return checkpoint
