"""Plans: what operators hand to the kernels, recorded for one shape of its input, so that one native call does it all.

Between two operators lie Python, checks and the calls of torch, which take as long as the kernels where images are few
and small. A part of a network is run once operator by operator, with every size checked, and its calls are kept; from
then on, as long as the network is as it was, they are made in one go, on new memory.
"""

import bisect
import ctypes
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from .kernels import ARGS, KERNELS

__all__ = ["Plans"]

MOST_VALUES = 2**21  # of the input: above, a plan saves nothing, and operators free memory in between
MOST_PLANS = 16

Part = Callable[..., tuple[Tensor, ...]]


class Plans:
    """The plans of a network, made where they are first needed.

    Args:
        network: whose buffers are what the operators read beside tokens.
    """

    def __init__(self, network: nn.Module):
        modules = list(network.modules())
        self.hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self.children = [(module._modules, *item) for module in modules for item in module._modules.items()]
        self.buffers = [
            (module._buffers, name)
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self.addresses = self._addresses()
        self.plans: dict[tuple, Plan | None] = {}

    def _addresses(self) -> list[int]:
        return [buffers[name].data_ptr() for buffers, name in self.buffers]

    def are_valid(self) -> bool:
        """Whether modules and buffers are those of the plans."""
        return (
            all(children[name] is child for children, name, child in self.children)
            and self._addresses() == self.addresses
        )

    def run(self, part: Part, x: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Return ``part(x, *sizes)``; see :meth:`mmbivit.packed.network.PackedNetwork.planned`."""
        if any(self.hooks):
            return part(x, *sizes)
        key = part.__name__, *x.shape, *sizes, KERNELS.path, torch.get_num_threads()
        if key not in self.plans:
            if len(self.plans) >= MOST_PLANS:
                self.plans.pop(next(iter(self.plans)))
            with KERNELS.record(_Recorder(x, [buffers[name] for buffers, name in self.buffers])) as recorder:
                outputs = part(x, *sizes)
            self.plans[key] = Plan(recorder, outputs) if recorder.complete else None
            return outputs
        plan = self.plans[key]
        return part(x, *sizes) if plan is None else plan.run(x)


class _Recorder:
    """Take down calls; ``complete`` is false once one reads what is neither a buffer nor made by a call before.

    Memory that calls make, and the input, are slots. A place is the position of an address among all arguments.
    """

    def __init__(self, x: Tensor, buffers: list[Tensor]):
        ranges = sorted((buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes) for buffer in buffers)
        self.starts, self.ends = [start for start, _ in ranges], [end for _, end in ranges]
        self.slots = [x]
        self.functions: list[int] = []
        self.begins: list[int] = []
        self.words: list[int] = []
        self.places: list[tuple[int, int, int]] = []  # position, slot, offset
        self.complete = True

    def __call__(self, args: ctypes.Structure, made: tuple[Tensor, ...]) -> None:
        self.slots += made
        self.functions.append(ARGS.index(type(args)))
        self.begins.append(len(self.words))
        for name, kind in args._fields_:  # type: ignore[misc]  # none is a bit field
            value = getattr(args, name) or 0
            if kind is ctypes.c_void_p and value:
                self._place(value)
            self.words.append(value)

    def _place(self, address: int) -> None:
        for i, slot in enumerate(self.slots):
            if 0 <= address - slot.data_ptr() < slot.nbytes:
                self.places.append((len(self.words), i, address - slot.data_ptr()))
                return
        nearest = bisect.bisect_right(self.starts, address) - 1
        self.complete &= nearest >= 0 and address < self.ends[nearest]


class Plan:
    """Recorded calls of one part of a network for one shape of its input."""

    def __init__(self, recorder: _Recorder, outputs: tuple[Tensor, ...]):
        self.made = [(slot.shape, slot.stride(), slot.dtype) for slot in recorder.slots[1:]]
        self.functions = np.array(recorder.functions, dtype=np.int64)
        self.begins = np.array(recorder.begins, dtype=np.int64)
        self.words = np.array(recorder.words, dtype=np.uint64)
        places = np.array(recorder.places, dtype=np.int64)
        self.positions, self.slots, self.offsets = places[:, 0], places[:, 1], places[:, 2].astype(np.uint64)
        addresses = [slot.data_ptr() for slot in recorder.slots]
        self.outputs = [addresses.index(output.data_ptr()) for output in outputs]

    def run(self, x: Tensor) -> tuple[Tensor, ...]:
        """Make the calls with another input of the same shape."""
        slots = [x, *(torch.empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in self.made)]
        addresses = np.array([slot.data_ptr() for slot in slots], dtype=np.uint64)
        words = self.words.copy()
        words[self.positions] = addresses[self.slots] + self.offsets
        KERNELS.run(self.functions, self.begins, words)
        return tuple(slots[i] for i in self.outputs)
