"""Settings as fields of a frozen dataclass, each declared once; none is known by name here."""

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import Field, asdict, field, fields
from functools import partial
from typing import Any, TypeVar, get_args

from emotion_toolbox.errors import ConfigError

S = TypeVar("S")
WORDS = {str: "a text, not blank", int: "a whole number", float: "a number", bool: "True or False"}


def setting(
    default: Any, meaning: str, *, low: float | None = None, high: float | None = None,
    choices: tuple[str, ...] = (), plain_name: bool = False, neutral: bool = False,
) -> Any:  # fmt: skip
    """A field and its facts; a tuple's are those of each element, and a pair must not fall."""
    return field(default=default, metadata=dict(locals()))


neutral = partial(setting, neutral=True)  # cannot change what is learnt: may change in a run


def kind_of(annotation: Any) -> tuple[Any, int | None, bool]:
    """The type of a value or element, how many (None: no tuple, 0: any), and if None will do."""
    optional = type(None) in get_args(annotation)
    inner = get_args(annotation)[0] if optional else annotation
    parts = get_args(inner) or (inner, None)  # only a tuple has some
    return parts[0], {None: None, ...: 0}.get(parts[-1], len(parts)), optional


def allowed(f: Field[Any]) -> str:
    """What a field accepts, in words."""
    (kind, count, optional), facts = kind_of(f.type), f.metadata
    text = "a plain folder name" if facts["plain_name"] else WORDS[kind]
    if facts["choices"]:
        text = "one of " + ", ".join(map(json.dumps, facts["choices"]))
    if facts["low"] is not None:
        text += f" from {facts['low']} to {facts['high']}"
    if count is not None:
        text = f"a list{f' of {count}, never falling' * bool(count)}, each {text}"
    return text + ", or None" * optional


def fits(value: Any, kind: Any, facts: Mapping[str, Any]) -> bool:
    """Whether one value is of its kind, one of the choices and in its range (NaN never is)."""
    right = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not right or isinstance(value, bool):
        return right and kind is bool
    if kind is str:
        path = facts["plain_name"] and (value in (".", "..") or set(value) & set("/\\:"))
        known = not facts["choices"] or value in facts["choices"]
        return known and not path and bool(value.strip()) and "\0" not in value
    return facts["low"] is None or bool(facts["low"] <= value <= facts["high"])


def check_values(settings: Any) -> None:
    """Raise ``ConfigError`` naming every impossible field of `settings` and what is allowed."""
    problems = []
    for f in fields(settings):
        value, (kind, count, optional) = getattr(settings, f.name), kind_of(f.type)
        parts = value if count is not None else (value,)
        good = isinstance(parts, tuple) and all(fits(part, kind, f.metadata) for part in parts)
        good = good and (not count or len(parts) == count and list(parts) == sorted(parts))
        if not good and not (optional and value is None):
            problems.append(f"{f.name}={value!r:.200} must be {allowed(f)}")
    if problems:
        raise ConfigError("impossible settings:\n  " + "\n  ".join(problems))


def check_fit(batch: int, parts: int, seen: int, train: int | None, kept: int | None) -> None:
    """Raise ``ConfigError`` where a batch does not split, or sides in pixels do not fit.

    What the network is to see, sees in training and the cache keeps; None: what follows from that.
    """
    if batch % parts or batch // parts < 2:
        said = f"ACCUMULATE={parts} must split BATCH_SIZE={batch} into equal parts of at least 2"
        raise ConfigError(f"{said} images (the head's BatchNorm needs two)")
    if train and train > seen:
        raise ConfigError(f"TRAIN_SIZE={train} must not exceed IMG_SIZE={seen}; None is the same")
    if kept and not seen <= kept <= 1.3 * seen:
        said = f"CACHE_SIZE={kept} must lie between IMG_SIZE={seen} and 1.3 times that"
        raise ConfigError(f"{said}; None gives {round(seen * 8 / 7)}")


def checked_overrides(given: Any) -> Mapping[str, Any]:
    """`given`, or nothing where it is None; raises ``ConfigError`` if it is no dictionary."""
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f'OVERRIDES must be {{"NAME": value, ...}}, not {given!r:.200}')
    return given or {}


def make_settings(
    cls: type[S], overrides: Any = None, profile: Mapping[str, Any] | None = None
) -> S:
    """The defaults of `cls`, then `profile`, then `overrides`; raises ``ConfigError``."""
    values = {**(profile or {}), **checked_overrides(overrides)}
    types: dict[str, Any] = {f.name: f.type for f in fields(cls)}  # type: ignore[arg-type]
    for name in [name for name in values if name not in types]:
        close = difflib.get_close_matches(str(name).upper(), types, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ConfigError(f"no setting is called {name!r}; {hint}Settings: {', '.join(types)}")
    return cls(**{name: normalised(v, kind_of(types[name])[0]) for name, v in values.items()})


def normalised(value: Any, kind: Any) -> Any:
    """Lists as tuples, and 10 as 10.0 where a float is due, so that equal settings hash equally."""
    if isinstance(value, list | tuple):
        return tuple(normalised(part, kind) for part in value)
    return float(value) if kind is float and type(value) is int and abs(value) < 2**53 else value


def settings_among(cls: Any, namespace: Mapping[str, Any], overrides: Any = None) -> dict[str, Any]:
    """`overrides` and, above them, variables called like settings (papermill's ``-p``), printed.

    Raises ``ConfigError`` for a variable that is called so but for its case: ``epochs = 3``.
    """
    names = [f.name for f in fields(cls)]
    for name, value in namespace.items():
        if name.upper() in names and name not in names and isinstance(value, int | float | str):
            line = f'OVERRIDES = {{"{name.upper()}": {value!r:.80}}}'
            raise ConfigError(f"{name} = {value!r:.80} changes no setting; write {line}")
    found = {name: namespace[name] for name in names if name in namespace}
    if found:
        print("taken from variables:", ", ".join(f"{n} = {v!r:.200}" for n, v in found.items()))
    return {**checked_overrides(overrides), **found}


def forget(namespace: dict[str, Any], names: str) -> None:
    """Remove variables, so that nothing made with earlier settings outlives a wrong one."""
    for name in names.split():
        namespace.pop(name, None)


def settings_to_json(settings: Any) -> str:
    """`settings` as indented JSON with one field a line."""
    return json.dumps(asdict(settings), indent=2)


def shaping_values(settings: Any) -> dict[str, Any]:
    """The values that shape what is learnt: all but the neutral ones."""
    shaping = [f.name for f in fields(settings) if not f.metadata["neutral"]]
    return {name: getattr(settings, name) for name in shaping}


def settings_hash(settings: Any) -> str:
    """Eight hex digits that change whenever a setting that shapes the result does."""
    return hashlib.sha256(repr(sorted(shaping_values(settings).items())).encode()).hexdigest()[:8]


def changed_settings(settings: Any, saved: Mapping[str, Any]) -> list[str]:
    """A line for each shaping setting whose `saved` value was another, or that is gone."""
    before = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()}
    now = {**dict.fromkeys(before.keys() - vars(settings)), **shaping_values(settings)}.items()
    return [f"  {n}: {before.get(n)!r} before, {v!r} now" for n, v in now if before.get(n) != v]
