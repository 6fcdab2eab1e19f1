"""Stage 1 of 3: overview, environment, configuration and data.

Starts the notebook anew; run extend_notebook.py and complete_notebook.py after it.
"""

import sys
from collections.abc import Sequence

from notebook_builder import Project, Stage, run_stage, stage_parser

CREATE = Stage(
    name="create",
    script="create_enhanced_notebook.py",
    sections=("00_overview", "01_environment", "02_configuration", "03_data"),
    imports_note="""
**Imports.** Everything that this part uses from elsewhere, in one place: the standard library
first, then the packages installed above. Each later part begins with what it needs in addition.
""",
)


def main(argv: Sequence[str] | None = None, project: Project | None = None) -> int:
    """Write the first stage; return the exit status."""
    args = stage_parser(__doc__).parse_args(argv)
    return run_stage((CREATE,), args.output, project)


if __name__ == "__main__":
    sys.exit(main())
