"""Shows that an installed wheel is whole: its kernels run, and give what the slow reference gives.

    python .github/check_wheel.py

Exits with an error where the kernels are missing, but on Windows, where nobody has compiled them yet.
"""

import sys
import time
from pathlib import Path

import torch

import mmbivit
from mmbivit.deploy import pack
from mmbivit.models import BinarySwinTransformer
from mmbivit.packed import kernels

CHECKOUT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Pack a random network and compare its code paths."""
    if Path(mmbivit.__file__).is_relative_to(CHECKOUT / "mmbivit"):
        sys.exit("this is the checkout, not an installed wheel: run it from another folder")
    paths = kernels.available_paths()
    print(
        f"mmbivit {mmbivit.__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}: {', '.join(paths)}"
    )
    if len(paths) == 1 and sys.platform != "win32":
        sys.exit("the native kernels are missing")
    torch.manual_seed(0)
    arch = dict(embed_dims=32, depths=(2, 2), num_heads=(1, 2))
    network = BinarySwinTransformer(arch, mlp_ratio=3, spatial_interaction=dict(ratio=1.0), out_indices=(0, 1))
    packed, images = pack(network.eval()), torch.randn(1, 3, 96, 96)
    with kernels.use_path("reference"):
        expected = packed(images)
    for path in paths:
        with kernels.use_path(path):
            start = time.perf_counter()
            found = packed(images)
            milliseconds = 1e3 * (time.perf_counter() - start)
        difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))
        print(f"{path}: {milliseconds:.1f} ms, differs by {difference:.0e}")
        if difference > 1e-5:  # float sums in another order; a bit that differs would make far more
            sys.exit(f"{path} does not compute what the reference does")


if __name__ == "__main__":
    main()
