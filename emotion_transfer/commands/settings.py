"""Settings in a shell: ``NAME=VALUE``, and the list of all that there are."""

import argparse
import ast
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from emotion_toolbox.errors import ConfigError
from emotion_toolbox.settings import allowed, kind_of
from emotion_transfer.config import EnhancedConfig

MOST_USED = (
    "DATASET", "DATA_ROOT", "IMAGES_ROOT", "OUTPUT_ROOT", "RUN_NAME", "CACHE_DIR", "MODEL_NAME",
    "WEIGHTS", "IMG_SIZE", "BATCH_SIZE", "EPOCHS", "SEED", "BALANCE", "LR_BACKBONE", "LR_HEAD",
    "WARMUP_EPOCHS", "THAW_EPOCHS", "PATIENCE", "ACCUMULATE", "DROPOUT", "MIXUP_ALPHA",
    "CUTMIX_ALPHA", "DEVICE", "BASELINES", "DEBUG",
)  # fmt: skip
FILES: dict[str, tuple[str, ...] | None] = {"README.md": MOST_USED, "docs/settings.md": None}
JSON_WORDS = {"true": "True", "false": "False", "null": "None"}
PLACE = re.compile(r"(<!-- settings -->\n).*?(<!-- /settings -->)", re.DOTALL)


def parse_setting(cls: Any, text: str) -> tuple[str, Any]:
    """Split ``NAME=VALUE``, or raise ``ConfigError``; a value is Python unless text is due."""
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        raise ConfigError(f"{text!r} is not NAME=VALUE")
    try:
        parsed = ast.literal_eval(JSON_WORDS.get(value, value))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return name, value  # plain text, or refused by ``make_settings`` with what is allowed
    textual = any(f.name == name and kind_of(f.type)[:2] == (str, None) for f in fields(cls))
    return name, parsed if not textual or parsed is None or isinstance(parsed, str) else value


def settings_table(cls: Any, names: Sequence[str] | None = None) -> str:
    """The settings called `names` (or all) as a Markdown table."""
    rows = ["| name | default | meaning | allowed | in a run |", "|---|---|---|---|---|"]
    for f in (f for f in fields(cls) if names is None or f.name in names):
        end = f"{allowed(f)} | {'may change' if f.metadata['neutral'] else 'fixed'}"
        rows.append(f"| `{f.name}` | `{f.default!r}` | {f.metadata['meaning']} | {end} |")
    return "\n".join(rows)


def with_table(text: str, names: Sequence[str] | None) -> str | None:
    """`text` with the table of `names` (or all settings) between its markers; None without any."""
    table = settings_table(EnhancedConfig, names)
    changed, count = PLACE.subn(lambda match: f"{match[1]}{table}\n{match[2]}", text)
    return changed if count == 1 else None


def main(arguments: list[str] | None = None) -> int:
    """Print the table, or write it into the documents that hold it."""
    parser = argparse.ArgumentParser(
        prog="python -m emotion_transfer settings",
        description="List every setting with its default, its meaning and what is allowed.",
        epilog="example: python -m emotion_transfer settings",
    )
    where = " and ".join(FILES)
    parser.add_argument("--write", action="store_true", help=f"put the tables into {where}")
    if not parser.parse_args(arguments).write:
        print(settings_table(EnhancedConfig))
        return 0
    from emotion_toolbox.files import project_root, write_text  # the validator has no packages yet

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
