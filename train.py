"""Train a DeepStack model: ``python train.py [model=NAME] [key=value ...]``; ``--help`` lists the choices."""

import sys
from pathlib import Path

from deepstack_pl.cli.train import main

if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent / "conf", sys.argv[1:]))
