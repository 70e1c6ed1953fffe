"""The native kernels: the extension ``csrc/``, its code paths, and where their time goes.

The extension is built with the package by any C++ compiler. It has a code path for each instruction set and takes the
fastest one that the CPU has, with ``torch.get_num_threads()`` threads. Without it, :mod:`.reference` serves.

In a forked process the kernels run on one thread: OpenMP would wait there for threads that only its parent has.
"""

import ctypes
import importlib.machinery
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from mmbivit.checks import UserError

__all__ = ["active_path", "available_paths", "profile", "use_path"]

PATH_VARIABLE = "MMBIVIT_KERNELS"
REFERENCE = "reference"

# The order of `struct Layout` and `enum Phase` in csrc/kernels.h.
LAYOUT = ("batch", "height", "width", "window_height", "window_width", "shift", "mask_padding")
PHASES = (
    *("patch embedding", "pack", "qkv", "attention", "proj", "fc1", "fc2", "spatial interaction"),
    *("patch merging", "output norms", "linear", "convolution", "predictors", "RoIAlign", "upsampling", "NMS"),
)


def _struct(name: str, pointers: str, integers: str = "", layout: bool = False) -> type:
    """Make the twin of a struct in csrc/kernels.h."""
    fields: list[tuple[str, type]] = [(field, ctypes.c_void_p) for field in pointers.split()]
    fields += [("selection_kind", ctypes.c_int64)] * ("selection_limit" in pointers)
    fields += [(f"layout_{field}", ctypes.c_int64) for field in LAYOUT * layout]
    fields += [(field, ctypes.c_int64) for field in integers.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


PackArgs = _struct("PackArgs", "x gain shift out", "rows k")
MatmulArgs = _struct("MatmulArgs", "a weight out", "rows k n")
LinearArgs = _struct("LinearArgs", "x gain shift weight scale bias rprelu residual out", "rows k n")
MergeArgs = _struct("MergeArgs", "x gain shift weight scale bias out", "batch height width channels n")
AttentionArgs = _struct(
    "AttentionArgs",
    "x normed gain shift padding qkv_weight qkv_low qkv_width bias value_ratio value_offset proj_weight proj_scale "
    "proj_bias selection_step selection_limit",
    "channels heads head_dim",
    layout=True,
)
MlpArgs = _struct(
    "MlpArgs",
    "x normed gain shift fc1_weight fc1_low fc1_width fc2_weight fc2_scale fc2_bias "
    "si_gain si_shift si_gamma si1_weight si1_low si1_width si2_weight si2_scale si2_bias si_alpha si_bits",
    "channels hidden si_hidden",
    layout=True,
)

EmbedArgs = _struct("EmbedArgs", "images weight bias out", "batch in_channels height width patch channels")
MapArgs = _struct("MapArgs", "x gain shift out", "rows channels")


def _layers(*names: str) -> str:
    """Name the pointers of `struct ResidualLayer` of each layer."""
    return " ".join(f"{name}_{field}" for name in names for field in ("threshold", "weight", "out"))


ResidualLinearArgs = _struct("ResidualLinearArgs", f"x gain shift {_layers('layer')} out", "rows k n")
ResidualAttentionArgs = _struct(
    "ResidualAttentionArgs",
    f"x normed gain shift {_layers('qkv')} head_threshold bias head_out {_layers('proj')} selection_step "
    "selection_limit",
    "channels heads head_dim head_shortcut divide",
    layout=True,
)
ResidualMlpArgs = _struct(
    "ResidualMlpArgs",
    f"x normed gain shift {_layers('fc1', 'fc2')} si_gain si_shift {_layers('si1', 'si2')} si_alpha si_values",
    "channels hidden si_hidden",
    layout=True,
)
ConvArgs = _struct(
    "ConvArgs",
    "x threshold weight scale bias rprelu add factor predictor predictor_bias out",
    "batch height width channels n outputs kernel_height kernel_width stride_height stride_width padding_height "
    "padding_width dilation_height dilation_width out_height out_width",
)
RoiAlignArgs = _struct(
    "RoiAlignArgs",
    "maps sides scales rois levels out",
    "regions channels out_height out_width longest_side samples aligned",
)
UpsampleArgs = _struct("UpsampleArgs", "x y", "batch height width y_height y_width channels")
NmsArgs = _struct("NmsArgs", "boxes limit areas suppressed", "number padded")
SignBitsArgs = _struct("SignBitsArgs", "x gamma bits inside signs", "rows k")
UnpackArgs = _struct("UnpackArgs", "bits scale out", "rows k")
PassInsideArgs = _struct("PassInsideArgs", "inside grad sums", "rows k step")
BitsLinearArgs = _struct("BitsLinearArgs", "bits weight scale bias rprelu out", "rows k n")
RPReLUArgs = _struct("RPReLUArgs", "y rprelu", "rows n")
RPReLUGradientsArgs = _struct("RPReLUGradientsArgs", "y bits weight scale bias rprelu grad out sums", "rows k n step")
WeightBitsArgs = _struct("WeightBitsArgs", "weight mean scale bits", "rows k centered")
WeightGradientsArgs = _struct("WeightGradientsArgs", "weight mean factor grad", "rows k centered")
AttentionBitsArgs = _struct(
    "AttentionBitsArgs",
    "qkv gamma bias mask out bits inside selection_step selection_limit",
    "groups tokens heads head_dim masks divide share",
)
AttentionGradientsArgs = _struct(
    "AttentionGradientsArgs",
    "grad bits inside bias mask grad_qkv grad_bias grad_signed selection_step selection_limit",
    "groups tokens heads head_dim masks divide share",
)
# The order of `mmbivit_args_size` in csrc/api.cpp.
ARGS = (
    *(PackArgs, MatmulArgs, LinearArgs, MergeArgs, AttentionArgs, MlpArgs, EmbedArgs, MapArgs),
    *(ResidualLinearArgs, ResidualAttentionArgs, ResidualMlpArgs),
    *(ConvArgs, RoiAlignArgs, UpsampleArgs, NmsArgs),
    *(SignBitsArgs, UnpackArgs, PassInsideArgs, BitsLinearArgs),
    *(RPReLUArgs, RPReLUGradientsArgs, WeightBitsArgs, WeightGradientsArgs),
    *(AttentionBitsArgs, AttentionGradientsArgs),
)

Recorder = TypeVar("Recorder", bound=Callable[[ctypes.Structure, tuple[Tensor, ...]], None])


def _is_of_this_version(library: ctypes.CDLL) -> bool:
    """Whether a library takes the structs of this module, as it does where both were installed together."""
    if not hasattr(library, "mmbivit_args_size"):
        return False
    library.mmbivit_args_size.restype = ctypes.c_int64
    return [library.mmbivit_args_size(i) for i in range(len(ARGS))] == list(map(ctypes.sizeof, ARGS))


class Kernels:
    """The extension, the code path in use, and where time is counted."""

    def __init__(self):
        self.process = os.getpid()
        self.library = self._load()
        self.paths: dict[str, int] = {}
        if self.library is not None:
            for i in range(self.library.mmbivit_path_count()):
                if self.library.mmbivit_path_runs(i):
                    self.paths[self.library.mmbivit_path_name(i).decode()] = i
        self.seconds: ctypes.Array | None = None
        self.recording = threading.local()
        self.warned = False
        self.path = next(iter(self.paths), REFERENCE)
        if wanted := os.environ.get(PATH_VARIABLE):
            self.path = self.checked(wanted)
            self.warned = True  # asked for by name

    @staticmethod
    def _load() -> ctypes.CDLL | None:
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            file = Path(__file__).with_name("_kernels" + suffix)
            if not file.is_file():
                continue
            try:
                library = ctypes.CDLL(str(file))
            except OSError as error:
                warnings.warn(f"mmbivit's native kernels cannot be loaded: {error}", stacklevel=2)
                return None
            if not _is_of_this_version(library):
                warnings.warn(f"{file.name} is of another version of mmbivit: install mmbivit again", stacklevel=2)
                return None
            library.mmbivit_path_name.restype = ctypes.c_char_p
            library.mmbivit_run.restype = ctypes.c_int64
            return library
        return None

    def checked(self, name: str) -> str:
        if name not in (*self.paths, REFERENCE):
            allowed = ", ".join([*self.paths, REFERENCE])
            raise UserError(f"code path {name!r} does not run here; available: {allowed} ({PATH_VARIABLE}, use_path)")
        return name

    def path_for(self, x: Tensor) -> int | None:
        """Return the code path for a tensor, ``None`` for the reference; warns once where the kernels are missing."""
        if x.device.type != "cpu":
            return None
        if not self.paths and not self.warned:
            self.warned = True
            warnings.warn(
                "mmbivit's native kernels are not built: packed networks run on a slow torch reference. With a C++ "
                "compiler (gcc or clang), install mmbivit again, in its checkout: "
                f"pip install --force-reinstall --no-deps . {PATH_VARIABLE}={REFERENCE} silences this.",
                stacklevel=2,
            )
        return self.paths.get(self.path)

    @property
    def threads(self) -> ctypes.c_int:
        return ctypes.c_int(torch.get_num_threads() if os.getpid() == self.process else 1)

    def call(self, name: str, path: int, args: ctypes.Structure, *made: Tensor) -> None:
        """Call a kernel; ``made`` is the memory among its arguments that was made for this call."""
        function = getattr(self.library, f"mmbivit_{name}")
        if function(ctypes.byref(args), path, self.threads, self.seconds):
            raise MemoryError(f"mmbivit.{name}: no memory for the threads' work space")
        if (recorder := getattr(self.recording, "recorder", None)) is not None:
            recorder(args, made)

    @contextmanager
    def record(self, recorder: Recorder) -> Iterator[Recorder]:
        """Hand all calls of this thread to a recorder as well."""
        self.recording.recorder = recorder
        try:
            yield recorder
        finally:
            self.recording.recorder = None

    def run(self, functions: np.ndarray, begins: np.ndarray, words: np.ndarray) -> None:
        """Make several calls: their numbers among ``ARGS``, and where in ``words`` the arguments of each begin."""
        arrays = (ctypes.c_void_p(array.ctypes.data) for array in (functions, begins, words))
        path, calls = self.paths[self.path], len(functions)
        done = self.library.mmbivit_run(*arrays, ctypes.c_int64(calls), path, self.threads, self.seconds)  # type: ignore[union-attr]  # only called where there is one
        if done < calls:
            raise MemoryError(f"mmbivit: no memory for the threads' work space in call {done + 1} of {calls}")


KERNELS = Kernels()


def available_paths() -> tuple[str, ...]:
    """Return the code paths that run on this machine, fastest first; the last one is the torch reference."""
    return (*KERNELS.paths, REFERENCE)


def active_path() -> str:
    """Return the code path that runs now."""
    return KERNELS.path


@contextmanager
def use_path(name: str) -> Iterator[None]:
    """Force a code path, for tests and measurements, in all threads; ``MMBIVIT_KERNELS`` does so for a whole process.

    Args:
        name: one of :func:`available_paths`.

    Raises:
        ValueError: if this machine cannot run it.
    """
    before = KERNELS.path
    KERNELS.path = KERNELS.checked(name)
    try:
        yield
    finally:
        KERNELS.path = before


@contextmanager
def profile() -> Iterator[dict[str, float]]:
    """Measure the phases of the native kernels; fills the yielded dict when the block ends.

    Returns:
        Seconds by phase, summed over threads.
    """
    times: dict[str, float] = {}
    before = KERNELS.seconds
    KERNELS.seconds = (ctypes.c_double * len(PHASES))()
    try:
        yield times
    finally:
        times.update(zip(PHASES, KERNELS.seconds, strict=True))
        KERNELS.seconds = before
