"""Times matrix products, and says where the time of packed inference goes."""

import re
import statistics
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from mmbivit.binary import BinaryLinear
from mmbivit.models.observation import observed

from .runtimes import Network, reason
from .timing import Shape, interleave, use_threads

__all__ = ["breakdown", "gemm_layers", "measure_gemm"]

WARM_UPS = 3


def gemm_layers(network: Network, shape: Shape) -> list[tuple[str, int, BinaryLinear]]:
    """Find the binary linear layers of distinct shapes that images of a shape meet.

    Returns:
        For each, in order: what it is (such as ``"stage 1 qkv, mlp.fc1"``), its rows ``M``, and the layer.
    """
    rows: dict[str, int] = {}

    def see(name: str, args: tuple, output: Tensor) -> None:
        rows[name] = args[0].numel() // layers[name].in_features

    layers = {name: m for name, m in network.model.named_modules() if isinstance(m, BinaryLinear)}
    with observed(layers, see), torch.inference_mode():
        network.model(torch.zeros(shape[0], 3, *shape[1:]))
    found: dict[tuple, tuple[list[str], BinaryLinear]] = {}
    for name, count in rows.items():
        stage, role = re.match(r"stages\.(\d+)\.(?:blocks\.\d+\.)?(.+)", name).groups()
        role = {"downsample.reduction": "merging"}.get(role, role.removeprefix("attn.").removeprefix("mlp."))
        key = (int(stage) + 1, count, layers[name].in_features, layers[name].out_features)
        roles, _ = found.setdefault(key, ([], layers[name]))
        if role not in roles:
            roles.append(role)
    return [(f"stage {key[0]} {', '.join(roles)}", key[1], layer) for key, (roles, layer) in found.items()]


def measure_gemm(network: Network, shape: Shape, rounds: int, threads: int) -> list[dict] | str:
    """Time torch's float32 linear layer against the packed one, for every shape of a network.

    The packed time includes the signs and the packing of the input, scale and bias.

    Returns:
        Rows of ``layer``, ``m``, ``k``, ``n``, ``float_ms`` and ``packed_ms``; or why there are none.
    """
    try:
        from mmbivit.deploy.packers import pack_linear
    except ImportError as error:
        return reason(error)
    rows = []
    with torch.inference_mode(), use_threads(threads):
        for name, count, layer in gemm_layers(network, shape):
            x = torch.randn(count, layer.in_features)
            packed = pack_linear(layer)
            runs = {
                "float": lambda x=x, layer=layer: F.linear(x, layer.weight, layer.bias),
                "packed": lambda x=x, packed=packed: packed(x),
            }
            times = interleave(runs, rounds, seconds=0.02, pause=0.005)
            medians = {f"{key}_ms": statistics.median(values) for key, values in times.items()}
            rows.append(dict(layer=name, m=count, k=layer.in_features, n=layer.out_features, **medians))
    return rows


def breakdown(network: Network, shape: Shape, runs: int, threads: int) -> dict[str, float] | str:
    """Say where the time of packed inference goes.

    Returns:
        Milliseconds per inference: of each phase of the kernels (summed over threads, divided by their number), and of
        the rest of the wall time, Python and threads that wait. Or why there is none.
    """
    try:
        from mmbivit.deploy import pack
        from mmbivit.packed import kernels

        packed = pack(network.model)
    except Exception as error:  # whatever is wrong with it: the rest of the benchmark goes on
        return reason(error)
    images = torch.randn(shape[0], 3, *shape[1:])
    with torch.inference_mode(), use_threads(threads):
        for _ in range(WARM_UPS):
            packed(images)
        start = time.perf_counter()
        with kernels.profile() as phases:
            for _ in range(runs):
                packed(images)
        wall = time.perf_counter() - start
    if not any(phases.values()):
        return f"the kernels' path {kernels.active_path()!r} does not measure its phases"
    parts = {name: seconds / threads for name, seconds in phases.items() if seconds}
    parts["rest: Python, waiting threads"] = wall - sum(parts.values())
    return {name: 1000 * seconds / runs for name, seconds in parts.items()}
