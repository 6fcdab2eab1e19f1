"""List every setting with its default, its meaning and what is allowed."""

import argparse
import re
from collections.abc import Sequence

from emotion_toolbox.errors import ConfigError
from emotion_toolbox.files import project_root, write_text
from emotion_toolbox.settings import settings_table
from emotion_transfer.config import EnhancedConfig

MOST_USED = (
    "DATASET", "DATA_ROOT", "IMAGES_ROOT", "OUTPUT_ROOT", "RUN_NAME", "CACHE_DIR", "MODEL_NAME",
    "WEIGHTS", "IMG_SIZE", "BATCH_SIZE", "EPOCHS", "SEED", "BALANCE", "LR_BACKBONE", "LR_HEAD",
    "WARMUP_EPOCHS", "THAW_EPOCHS", "PATIENCE", "ACCUMULATE", "DROPOUT", "MIXUP_ALPHA",
    "CUTMIX_ALPHA", "DEVICE", "BASELINES", "DEBUG",
)  # fmt: skip
FILES: dict[str, tuple[str, ...] | None] = {"README.md": MOST_USED, "docs/settings.md": None}
PLACE = re.compile(r"(<!-- settings -->\n).*?(<!-- /settings -->)", re.DOTALL)


def with_table(text: str, names: Sequence[str] | None) -> str | None:
    """`text` with the table of `names` (or all settings) between its markers; None without any."""
    table = settings_table(EnhancedConfig, names)
    changed, count = PLACE.subn(lambda match: f"{match[1]}{table}\n{match[2]}", text)
    return changed if count == 1 else None


def main(arguments: list[str] | None = None) -> int:
    """Print the table, or write it into the documents that hold it."""
    parser = argparse.ArgumentParser(
        prog="python -m emotion_transfer settings",
        description=__doc__,
        epilog="example: python -m emotion_transfer settings",
    )
    where = " and ".join(FILES)
    parser.add_argument("--write", action="store_true", help=f"put the tables into {where}")
    if not parser.parse_args(arguments).write:
        print(settings_table(EnhancedConfig))
        return 0
    for name, names in FILES.items():
        file = project_root() / name
        text = with_table(file.read_text(encoding="utf-8"), names)
        if text is None:
            raise ConfigError(
                f"{file} needs one place for the table: a line <!-- settings -->, and one "
                "<!-- /settings --> below it"
            )
        write_text(file, text)
        print(file)
    return 0
