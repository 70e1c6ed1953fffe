"""From a trained network to a packed one."""

from torch import nn

from mmbivit.checks import UserError

from .registry import PACKERS

__all__ = ["pack"]


def pack(model: nn.Module) -> nn.Module:
    """Turn a trained network into one that computes with bits.

    Args:
        model: of a class that has a packer, such as a ``mmbivit.BinarySwinTransformer`` in its last training stage;
            or a classifier or detector whose ``backbone`` is one. It is not changed.

    Returns:
        The packed network, such as a :class:`PackedSwinTransformer`; or a copy of the classifier or detector with it,
        in evaluation. The binary layers of its neck and heads are packed, too; what is float stays float.

    Raises:
        ValueError: if the backbone is in an earlier training stage, or has a part that is not binary or unknown; the
            message names the module.
    """
    # They fill PACKERS, and need MMEngine, which a packed file of a backbone does not.
    from . import packers  # noqa: F401
    from .around import pack_around

    if type(model) in PACKERS:
        return PACKERS[type(model)](model)
    backbone = getattr(model, "backbone", None)
    if type(backbone) not in PACKERS:
        what = type(model).__name__ if backbone is None else f"backbone is {type(backbone).__name__}"
        known = ", ".join(cls.__name__ for cls in PACKERS)
        raise UserError(f"{what}, which has no packer: pack() takes {known}, or a model whose backbone is one of them")
    return pack_around(model, PACKERS[type(backbone)](backbone))
