"""Every binarization method with and without spatial interaction: a small Table 9 on digits, over paired seeds."""

from statistics import mean

from mmbivit.binary import RECIPES

from .evidence import ONE_STAGE, Arm, without_si
from .paired import PairedDifference, compare_pairs

__all__ = ["METHODS", "PAPER", "arm_names", "differences", "markdown_table", "method_arms"]

METHODS = tuple(name for name in RECIPES if name != "float")

# Gain of top-1 accuracy by spatial interaction, points: SI-BiViT, Table 9 (Tiny-ImageNet, ViT-S; its caption says
# ImageNet).
PAPER = {"bit": 9.25, "bibert": 6.50, "bivit": 8.13, "sibivit": 5.14}


def arm_names(method: str) -> tuple[str, str]:
    """Return the names of the arms without and with spatial interaction; evidence.py has those of SI-BiViT, too."""
    return ("no_si_mlp4", "si_mlp3") if method == "sibivit" else (f"{method}_no_si", f"{method}_si")


def method_arms(methods: tuple[str, ...] = METHODS) -> dict[str, Arm]:
    """Return two ways of training for each method: MLP 4, and MLP 3 with spatial interaction, as in the paper."""
    arms = {}
    for method in methods:
        recipe = (("model.backbone.recipe", method),)
        without, with_si = arm_names(method)
        arms[without] = Arm(method, ONE_STAGE, (*recipe, *without_si(4)))
        arms[with_si] = Arm(f"{method} + SI", ONE_STAGE, recipe)
    return arms


def differences(results: dict[str, list[float]]) -> dict[str, PairedDifference]:
    """Return what spatial interaction adds to each method, in points, seed by seed."""
    arms = {method: arm_names(method) for method in METHODS}
    return {
        method: compare_pairs(results[with_si], results[without])
        for method, (without, with_si) in arms.items()
        if with_si in results
    }


def markdown_table(results: dict[str, list[float]]) -> str:
    """Format accuracies and paired differences as Markdown, with the paper's differences in their own column."""
    lines = [
        "| method | MLP 4, top-1 % | SI, MLP 3, top-1 % | gain, points | 95 % interval | sign-flip p | paper's gain |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, d in differences(results).items():
        without, with_si = (mean(results[arm]) for arm in arm_names(method))
        paper = f"{PAPER[method]:+.2f}" if method in PAPER else ""
        gain = f"{d.mean:+.2f} | {d.low:+.2f} to {d.high:+.2f} | {d.p:.3f}"
        lines.append(f"| `{method}` | {without:.2f} | {with_si:.2f} | {gain} | {paper} |")
    return "\n".join(lines)
