"""Stage 3 of 3: training, evaluation, comparison, use and summary.

python complete_notebook.py              replace these cells in the notebook
python complete_notebook.py --all        build all three stages
python complete_notebook.py --check      say whether the notebook is what the sources give
python complete_notebook.py --execute    run every cell of what the sources give; keep the result
                                         and a page of it, and leave the notebook as it is
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from create_enhanced_notebook import CREATE
from extend_notebook import EXTEND
from notebook_builder import (
    NOTEBOOK,
    Project,
    Stage,
    budgets,
    build,
    check,
    run_stages,
    stage_parser,
)
from notebook_sources import BuildError

COMPLETE = Stage(
    name="complete",
    script="complete_notebook.py",
    sections=("10_training", "11_evaluation", "12_comparison", "13_use", "14_summary"),
)
STAGES = (CREATE, EXTEND, COMPLETE)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; options that only mean something with ``--execute`` need it."""
    parser = stage_parser(__doc__)
    parser.add_argument("--all", action="store_true", help="build all three stages, not only this")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="compare only; exit 1 if they differ")
    mode.add_argument(
        "--execute", action="store_true", help="run every cell of what the sources give"
    )
    run = parser.add_argument_group("with --execute")
    run.add_argument(
        "--set", nargs="+", action="extend", metavar="NAME=VALUE", help="settings for this run"
    )
    run.add_argument(
        "--timeout", type=int, metavar="SECONDS", help="longest a cell may take (-1: any time)"
    )
    run.add_argument("--kernel", help="Jupyter kernel (default: python3, the running interpreter)")
    run.add_argument("--results", type=Path, metavar="DIR", help="where to put notebook and page")
    run.add_argument(
        "--cwd", type=Path, metavar="DIR", help="run here, not in the notebook's folder"
    )
    args = parser.parse_args(argv)
    if not args.execute and any(
        value is not None for value in (args.set, args.timeout, args.kernel, args.results, args.cwd)
    ):
        parser.error("--set, --timeout, --kernel, --results and --cwd go with --execute")
    return args


def main(
    argv: Sequence[str] | None = None,
    stages: Sequence[Stage] = STAGES,
    project: Project | None = None,
) -> int:
    """Build, check or run; return the exit status."""
    args = parse_arguments(argv)
    if args.check:
        return report_check(stages, args.output, project)
    if args.execute:
        return execute(args, stages, project)
    return run_stages(stages, len(stages), args.output, project, fresh=args.all)


def report_check(stages: Sequence[Stage], output: Path, project: Project | None) -> int:
    """Say whether the committed notebook is current and, if not, what differs and the fix."""
    try:
        problem = check(stages, output, project)
        for name, (value, most) in budgets(build(stages, project)).items():
            print(f"{name:<44}{value:>6} of {most}{'  over' if value > most else ''}")
    except (BuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if problem is None:
        print(f"{output}: is what the sources give")
        return 0
    option = "" if output == NOTEBOOK else f" --output {output}"
    print(f"{problem}\n\nTo fix it: python {stages[-1].script} --all{option}", file=sys.stderr)
    return 1


def parse_overrides(settings: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` settings as a dictionary that makes a valid configuration.

    Raises:
        ConfigError: naming what is wrong, before a kernel is started for it.
    """
    from emotion_transfer.commands.settings import parse_setting
    from emotion_transfer.config import EnhancedConfig, make_config

    overrides = dict(parse_setting(EnhancedConfig, text) for text in settings)
    make_config(overrides)
    return overrides


def execute(args: argparse.Namespace, stages: Sequence[Stage], project: Project | None) -> int:
    """Run what the sources give where ``args.output`` lies, and keep notebook and page."""
    from emotion_toolbox.errors import ConfigError
    from emotion_toolbox.files import project_root
    from notebook_runner import inject_overrides, run_notebook

    cwd = (args.cwd or args.output.parent).resolve()
    try:
        if not cwd.is_dir():
            raise BuildError(f"--cwd: {cwd} is not a folder")
        if args.results:
            make_writable(args.results)
        overrides = parse_overrides(args.set or ())
        notebook = build(stages, project)
        inject_overrides(notebook, overrides)
    except (BuildError, OSError, ConfigError) as error:
        print(f"error: {'--set: ' * isinstance(error, ConfigError)}{error}", file=sys.stderr)
        return 1
    return run_notebook(
        notebook,
        stem=args.output.stem,
        cwd=cwd,
        fallback=project_root(cwd) / "outputs",
        results=args.results,
        timeout=args.timeout,
        kernel=args.kernel or "python3",
    )


def make_writable(folder: Path) -> None:
    """Make `folder`, or say now, not after hours of training, that it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"--results: {error}") from None
    if not os.access(folder, os.W_OK):
        raise BuildError(f"--results: {folder} cannot be written to")


if __name__ == "__main__":
    sys.exit(main())
