"""The command cleave-leakage. One thread for BLAS, set before numpy is imported: on a busy machine two take longer."""

import os
import sys


def main() -> None:
    """Leaves with the command's status."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from evaluation.leakage.command import run

    sys.exit(run())


if __name__ == "__main__":
    main()
