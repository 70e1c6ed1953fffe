"""Architectures by name, and checks of what users write in a config."""

from collections.abc import Sequence

__all__ = ["ARCHITECTURES", "check_arch", "check_indices", "check_spatial_interaction", "hidden_dims"]

ARCHITECTURES = {
    "tiny": dict(embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "small": dict(embed_dims=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "base": dict(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
}


def check_arch(arch: str | dict) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Return channels, depths and heads of an architecture that fits together."""
    if isinstance(arch, str):
        if arch not in ARCHITECTURES:
            names = ", ".join(map(repr, ARCHITECTURES))
            raise ValueError(f"arch={arch!r} is unknown; allowed: {names}, or dict(embed_dims=, depths=, num_heads=)")
        arch = ARCHITECTURES[arch]
    if set(arch) != {"embed_dims", "depths", "num_heads"}:
        raise ValueError(f"arch has the keys {sorted(arch)}; expected: embed_dims, depths, num_heads")
    embed_dims, depths, num_heads = arch["embed_dims"], tuple(arch["depths"]), tuple(arch["num_heads"])
    if len(depths) != len(num_heads) or not depths or min(depths) < 1:
        raise ValueError(f"arch.depths={depths} and arch.num_heads={num_heads} need one positive entry per stage each")
    for i, heads in enumerate(num_heads):
        if heads < 1 or embed_dims * 2**i % heads:
            channels = embed_dims * 2**i
            raise ValueError(f"arch.num_heads[{i}]={heads} does not divide the {channels} channels of stage {i}")
    return embed_dims, depths, num_heads


def check_spatial_interaction(spatial_interaction: dict | None) -> float | None:
    """Return the ratio of hidden to input tokens, or ``None`` where the branch is off."""
    if spatial_interaction is None:
        return None
    if set(spatial_interaction) != {"ratio"} or spatial_interaction["ratio"] <= 0:
        raise ValueError(f"spatial_interaction={spatial_interaction!r}; allowed: None or dict(ratio=1.0), ratio > 0")
    return spatial_interaction["ratio"]


def check_indices(out_indices: Sequence[int], frozen_stages: int, num_stages: int) -> None:
    """Check that stages to return and to freeze exist."""
    if not out_indices or any(i not in range(num_stages) for i in out_indices):
        raise ValueError(f"out_indices={tuple(out_indices)}; allowed: stages 0 to {num_stages - 1}, at least one")
    if frozen_stages not in range(-1, num_stages + 1):
        raise ValueError(f"frozen_stages={frozen_stages}; allowed: -1 to {num_stages}")


def hidden_dims(channels: int, mlp_ratio: float) -> int:
    """Return the hidden width of an MLP over channels."""
    hidden = channels * mlp_ratio
    if hidden < 1 or hidden != int(hidden):
        raise ValueError(f"mlp_ratio={mlp_ratio} times {channels} channels is {hidden}, not a whole positive width")
    return int(hidden)
