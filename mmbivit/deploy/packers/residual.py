"""Packing of layers with a shortcut around every binary layer."""

import torch
from torch import Tensor, nn

from mmbivit.binary import ResidualBinaryLinear
from mmbivit.deploy.folding import fold_linear, norm_affine
from mmbivit.deploy.registry import packs
from mmbivit.packed import (
    PackedLinear,
    PackedResidualAttention,
    PackedResidualLinear,
    PackedResidualMLP,
    PackedResidualPatchMerging,
)
from mmbivit.packed.packing import pack_signs, pack_weight, pad_channels

from .checks import expect, named
from .convolution import pack_started_linear
from .heads import head_tensors

__all__ = ["pack_residual_attention", "pack_residual_linear", "pack_residual_merging", "pack_residual_mlp"]


@packs(ResidualBinaryLinear)
@torch.no_grad()
def pack_residual_linear(
    layer: ResidualBinaryLinear, norm: nn.Module | None = None
) -> PackedResidualLinear | PackedLinear:
    """Pack a binary linear layer with a shortcut, and the norm of its input.

    Args:
        layer: with binary weights and inputs.
        norm: BatchNorm of the input, in evaluation.

    Raises:
        ValueError: for a layer of an earlier training stage, or a norm that cannot be folded.
    """
    if layer.like_float and norm is None:
        return pack_started_linear(layer)
    packed = PackedResidualLinear(layer.in_features, layer.out_features)
    packed.fill(in_affine=_affine(norm, layer.in_features), **_layer("layer", layer))
    return packed


def _affine(norm: nn.Module | None, channels: int, layer_norm: float | None = None) -> Tensor:
    return pad_channels(torch.stack(norm_affine(norm, channels, layer_norm)))


def _fold(layer: ResidualBinaryLinear) -> tuple[Tensor, Tensor, Tensor]:
    """Return thresholds ``(K,)``, signs of weights ``(N, K)``, and what becomes of a product, ``(5, N)``."""
    signs, scale, bias = fold_linear(layer)
    gain, shift = norm_affine(layer.norm, layer.out_features)
    out = torch.stack([gain * scale, gain * bias + shift, *_rprelu(layer)])
    return layer.input_quantizer.fold(), signs, out


def _rprelu(module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    act = module.act
    return act.gamma.double(), act.slope.double(), act.zeta.double()


def _layer(name: str, layer: nn.Module, path: str | None = None) -> dict[str, Tensor]:
    """Fold a layer ``path`` into the tensors of a packed one."""
    expect(layer, path or name, ResidualBinaryLinear)
    with named(path or name):
        threshold, signs, out = _fold(layer)
    return {
        f"{name}_threshold": pad_channels(threshold),
        f"{name}_weight": pack_weight(signs),
        f"{name}_out": pad_channels(out),
    }


def pack_residual_attention(block: nn.Module, packed: PackedResidualAttention, name: str) -> None:
    """Pack the attention of a block ``name`` whose layers have shortcuts, and the norm before it."""
    attn, channels = block.attn, block.attn.qkv.in_features
    tensors, value = head_tensors(attn, packed)
    value = value.repeat_interleave(packed.head_dim)
    identity = torch.zeros(channels), torch.ones(channels), torch.zeros(channels)
    shortcut = attn.head_shortcut
    with named(f"{name}.attn.head_shortcut"):
        gain, shift = norm_affine(None if shortcut is None else shortcut.norm, channels)
    head_out = torch.stack([gain * value, shift, *(identity if shortcut is None else _rprelu(shortcut))])
    with named(f"{name}.norm1"):
        tensors["in_affine"] = _affine(block.norm1, channels, packed.layer_norm)
    packed.fill(
        **tensors,
        **_layer("qkv", attn.qkv, f"{name}.attn.qkv"),
        head_threshold=pad_channels(attn.qkv_quantizer.fold()),
        head_out=pad_channels(head_out),
        **_layer("proj", attn.proj, f"{name}.attn.proj"),
    )


def pack_residual_mlp(mlp: nn.Module, packed: PackedResidualMLP, name: str) -> None:
    """Pack an MLP ``name`` whose layers have shortcuts, its norm and its spatial interaction."""
    expect(mlp.act, f"{name}.act", nn.Identity)
    with named(f"{name}.norm"):
        tensors = dict(in_affine=_affine(mlp.norm, mlp.fc1.in_features, packed.layer_norm))
    tensors |= _layer("fc1", mlp.fc1, f"{name}.fc1") | _layer("fc2", mlp.fc2, f"{name}.fc2")
    if mlp.si is not None:
        tensors |= _si_tensors(mlp.si, f"{name}.si", packed.layer_norm)
    packed.fill(**tensors)


def _si_tensors(si: nn.Module, name: str, layer_norm: float | None) -> dict[str, Tensor]:
    expect(si.act, f"{name}.act", nn.Identity)
    with named(f"{name}.norm"):
        tensors = dict(si_affine=_affine(si.norm, len(si.alpha), layer_norm), si_alpha=pad_channels(si.alpha))
    for part, layer in (("1", si.fc1), ("2", si.fc2)):
        expect(layer, f"{name}.fc{part}", ResidualBinaryLinear)
        with named(f"{name}.fc{part}"):
            threshold, signs, out = _fold(layer)
        tensors |= {f"si{part}_threshold": threshold, f"si{part}_weight": pack_signs(signs), f"si{part}_out": out}
    return tensors


def pack_residual_merging(merging: nn.Module, packed: PackedResidualPatchMerging, name: str) -> None:
    """Pack a patch merging ``name`` whose projection has a shortcut."""
    with named(f"{name}.norm"):
        affine = _affine(merging.norm, merging.reduction.in_features, packed.layer_norm)
    packed.fill(in_affine=affine, **_layer("layer", merging.reduction, f"{name}.reduction"))
