"""Settings as fields of a frozen dataclass, each declared once; none is known by name here."""

import ast
import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import Field, asdict, field, fields
from functools import partial
from typing import Any, TypeVar, get_args

from emotion_toolbox.errors import ConfigError

S = TypeVar("S")
WORDS = {str: "a text, not blank", int: "a whole number", float: "a number", bool: "True or False"}
JSON_WORDS = {"true": "True", "false": "False", "null": "None"}


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


def merged(*given: Any) -> dict[str, Any]:
    """The values of all dictionaries `given`; later ones win. ``ConfigError`` if one is none."""
    for values in given:
        if not isinstance(values, Mapping):
            raise ConfigError(f'OVERRIDES must be {{"NAME": value, ...}}, not {values!r:.200}')
    return {name: value for values in given for name, value in values.items()}


def make_settings(cls: type[S], overrides: Any = None, profile: Any = None) -> S:
    """The defaults of `cls`, then `profile`, then `overrides`; raises ``ConfigError``."""
    values = merged(*(given for given in (profile, overrides) if given is not None))
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
    """`overrides` and, above them, variables called like settings (papermill's ``-p``), printed."""
    found = {f.name: namespace[f.name] for f in fields(cls) if f.name in namespace}
    if found:
        print("taken from variables:", ", ".join(f"{n} = {v!r:.200}" for n, v in found.items()))
    return merged({} if overrides is None else overrides, found)


def forget(namespace: dict[str, Any], *names: str) -> None:
    """Remove variables, so that nothing made with earlier settings outlives a wrong one."""
    for name in names:
        namespace.pop(name, None)


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


def settings_to_json(settings: Any) -> str:
    """`settings` as indented JSON with one field a line."""
    return json.dumps(asdict(settings), indent=2)


def settings_from_json(cls: type[S], text: str) -> S:
    """The inverse of ``settings_to_json``; raises ``ConfigError``, or ``ValueError`` if no JSON."""
    return make_settings(cls, merged(json.loads(text)))


def shaping_values(settings: Any) -> dict[str, Any]:
    """The values that shape what is learnt: all but the neutral ones."""
    shaping = [f.name for f in fields(settings) if not f.metadata["neutral"]]
    return {name: getattr(settings, name) for name in shaping}


def settings_hash(settings: Any) -> str:
    """Eight hex digits that change whenever a setting that shapes the result does."""
    return hashlib.sha256(repr(sorted(shaping_values(settings).items())).encode()).hexdigest()[:8]


def changed_settings(settings: Any, saved: Mapping[str, Any]) -> list[str]:
    """A line for each shaping setting whose `saved` value was another."""
    before = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()}
    now = shaping_values(settings).items()
    return [f"  {n}: {before.get(n)!r} before, {v!r} now" for n, v in now if before.get(n) != v]


def settings_table(cls: Any, names: Sequence[str] | None = None) -> str:
    """The settings called `names` (or all) as a Markdown table."""
    rows = ["| name | default | meaning | allowed | in a run |", "|---|---|---|---|---|"]
    for f in (f for f in fields(cls) if names is None or f.name in names):
        end = f"{allowed(f)} | {'may change' if f.metadata['neutral'] else 'fixed'}"
        rows.append(f"| `{f.name}` | `{f.default!r}` | {f.metadata['meaning']} | {end} |")
    return "\n".join(rows)
