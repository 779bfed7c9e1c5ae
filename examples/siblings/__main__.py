"""The command line: python -m examples.siblings --method NAME --out DIR."""
import argparse
import importlib
import sys
from pathlib import Path

import data
from examples.arithmetic import seeds_of
from model import CheckpointError

METHODS = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.siblings",
        description="One sibling method's claim on the embedded task, beside its baselines and the control "
                    "that would refute it. After any interruption, run the same command again.")
    parser.add_argument("--method", required=True, choices=METHODS, help="a file of variants/")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR",
                        help="keeps every file of every arm; the table goes to DIR/METHOD/results.json")
    parser.add_argument("--seeds", type=seeds_of, default=[0], metavar="S,S,...",
                        help="repeat everything under each (default 0)")
    parser.add_argument("--start", type=Path, metavar="DIR",
                        help="an --out of examples.arithmetic, whose SFT models and attempts are used "
                             "(default: made in --out)")
    parser.add_argument("--quick", action="store_true",
                        help="everything small: shows the way, not the effect")
    parser.add_argument("--dev", action="store_true",
                        help="score on development problems, on which all settings were chosen")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    experiment = importlib.import_module(f"examples.siblings.{args.method}")
    try:
        return experiment.run(args)
    except (data.DataError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
