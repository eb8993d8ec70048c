"""Ask a trained model benchmarks: ``python evaluate.py ckpt=RUN 'evaluation=[NAME,...]'``; ``--help`` says more."""

import sys
from pathlib import Path

from deepstack_pl.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent / "conf", sys.argv[1:]))
