"""Pack a trained network into a small file: ``python tools/deployment/export_packed.py CONFIG CHECKPOINT OUT``."""

import argparse

from rich.console import Console

import mmbivit.uncaught  # noqa: F401  first: for errors of the imports below
from mmbivit.apis import export_packed, export_table, user_errors
from mmbivit.apis.options import ConfigOptions, add_debug_option, add_trust_option, trusted


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Pack a trained detector or classifier into a file with a 1-bit backbone, and compare what that "
        "file computes with the trained network."
    )
    parser.add_argument("config", help="config file that the network was trained with")
    parser.add_argument("checkpoint", help="file or URL of the weights, at the end of training (stage 2)")
    parser.add_argument("out", metavar="OUT", help="the packed file, OUT.safetensors; an older one is replaced")
    parser.add_argument("--backbone-only", action="store_true", help="leave the head, or neck and heads, out")
    parser.add_argument("--half", action="store_true", help="store what stays float in neck and heads in 16 bits")
    parser.add_argument(
        "--cfg-options", nargs="+", action=ConfigOptions, metavar="KEY=VALUE", help="change the config, as in training"
    )
    add_trust_option(parser)
    add_debug_option(parser)
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    args = parse_args()
    with user_errors(args.debug), trusted(args):
        export = export_packed(args.config, args.checkpoint, args.out, args.backbone_only, args.cfg_options, args.half)
        Console().print(export_table(export))
        print(f"Wrote the packed {export.kind} to {args.out}.")


if __name__ == "__main__":
    main()
