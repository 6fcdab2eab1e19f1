"""Stage 1 of 3: overview, environment, toolbox, settings and data.

Starts the notebook anew; run extend_notebook.py and complete_notebook.py after it.
"""

import sys
from collections.abc import Sequence

from notebook_builder import Project, Stage, run_stages, stage_parser

CREATE = Stage(
    name="create",
    script="create_enhanced_notebook.py",
    sections=("00_overview", "01_environment", "02_settings", "03_data"),
)


def main(
    argv: Sequence[str] | None = None,
    stages: Sequence[Stage] | None = None,
    project: Project | None = None,
) -> int:
    """Write the first stage; return the exit status."""
    from complete_notebook import STAGES  # the toolbox here holds what the later stages need too

    args = stage_parser(__doc__).parse_args(argv)
    return run_stages(stages or STAGES, 1, args.output, project)


if __name__ == "__main__":
    sys.exit(main())
