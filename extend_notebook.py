"""Stage 2 of 3: augmentation, model, optimisation and the training engine.

Replaces these cells in the notebook and drops those of stage 3; run complete_notebook.py after it.
"""

import sys
from collections.abc import Sequence

from create_enhanced_notebook import CREATE
from notebook_builder import Project, Stage, run_stage, stage_parser

EXTEND = Stage(
    name="extend",
    script="extend_notebook.py",
    sections=("04_augmentation", "05_model", "06_optimisation", "07_engine"),
    imports_note="""
**More imports**, for augmenting, modelling and training; what the first part imported is there
already.
""",
)


def main(argv: Sequence[str] | None = None, project: Project | None = None) -> int:
    """Write the second stage; return the exit status."""
    args = stage_parser(__doc__).parse_args(argv)
    return run_stage((CREATE, EXTEND), args.output, project)


if __name__ == "__main__":
    sys.exit(main())
