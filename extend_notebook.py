"""Stage 2 of 3: augmentation, mixing, model, loss, learning rates and the training engine.

Replaces these cells in the notebook and drops those of stage 3; run complete_notebook.py after it.
"""

import sys
from collections.abc import Sequence

from notebook_builder import Project, Stage, run_stages, stage_parser

EXTEND = Stage(
    name="extend",
    script="extend_notebook.py",
    sections=(
        "04_augmentation",
        "05_mixing",
        "06_model",
        "07_loss",
        "08_rates",
        "09_engine",
    ),
)


def main(
    argv: Sequence[str] | None = None,
    stages: Sequence[Stage] | None = None,
    project: Project | None = None,
) -> int:
    """Write the second stage; return the exit status."""
    from complete_notebook import STAGES

    args = stage_parser(__doc__).parse_args(argv)
    return run_stages(stages or STAGES, 2, args.output, project)


if __name__ == "__main__":
    sys.exit(main())
