"""Packages that only some commands need: an extra of this project each."""

import importlib
from typing import Any

from emotion_toolbox.errors import ConfigError


def need(package: str, extra: str) -> Any:
    """A module of an `extra`; raises ``ConfigError`` where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0] if error.name is None else error.name
        raise ConfigError(f'{name} is not installed; pip install -e ".[{extra}]"') from error
