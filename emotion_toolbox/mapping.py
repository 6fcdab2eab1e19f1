"""Which classes of two data sets are alike: by name, by polarity, or as somebody says."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emotion_toolbox.errors import ConfigError
from emotion_toolbox.tables import MIKELS_CLASSES, POSITIVE_EMOTIONS, spelling_key

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Pair = tuple[str, str]  # a class of a model, a class of a data set
POLES: dict[str, frozenset[str]] = {  # surprise has none: it may be pleasant or not
    "negative": frozenset({*MIKELS_CLASSES, "negative", "angry", "sad"} - POSITIVE_EMOTIONS),
    "neutral": frozenset({"neutral"}),
    "positive": POSITIVE_EMOTIONS | {"positive", "happiness", "happy", "joy", "love"},
}


@dataclass(frozen=True)
class ClassMap:
    """The classes by which a model with S classes can be judged on a set with T classes.

    `source` int64 [S] and `target` int64 [T] number the classes of each among `names`; -1 is a
    class that the other side lacks. `how` is "name", "polarity", "hand", or "own" for T = names.
    """

    how: str
    names: tuple[str, ...]
    source: Labels
    target: Labels


def map_classes(
    source: Sequence[str], target: Sequence[str], pairs: Sequence[Pair] = ()
) -> ClassMap | None:
    """The classes that `source` and `target` share: by hand, else by name, else by polarity.

    None where they do not share two, for a single one can only be right.
    """
    poles = [[pole_of(name) for name in names] for names in (source, target)]
    return (
        _match("hand", source, target, *_hand_keys(source, target, pairs))
        or _match("name", source, target, *([*map(spelling_key, n)] for n in (source, target)))
        or _match("polarity", source, target, *poles)
    )


def own_classes(target: Sequence[str]) -> ClassMap:
    """The classes of `target` as they are, for what was fitted to them."""
    return ClassMap("own", tuple(target), np.empty(0, np.int64), np.arange(len(target)))


def pole_of(name: str) -> str | None:
    """The polarity of a class called `name`, None where it has none that is known."""
    key = spelling_key(name)
    return next((pole for pole, names in POLES.items() if key in names), None)


def _hand_keys(
    source: Sequence[str], target: Sequence[str], pairs: Sequence[Pair]
) -> tuple[list[Hashable], list[Hashable]]:
    """What `pairs` call alike has the same number; a pair may stand either way round."""
    sides = [{spelling_key(name) for name in names} for names in (source, target)]
    group: dict[tuple[int, str], int] = {}
    for number, pair in enumerate(pairs):
        one, other = map(spelling_key, pair)
        for ends in (((0, one), (1, other)), ((0, other), (1, one))):
            if all(key in sides[side] for side, key in ends):
                old = {group[end] for end in ends if end in group}
                joined = [end for end, of in group.items() if of in old]
                group.update(dict.fromkeys((*joined, *ends), number))
                break
    found = [[group.get((i, spelling_key(n))) for n in (source, target)[i]] for i in (0, 1)]
    return [*found[0]], [*found[1]]


def _match(
    how: str, source: Sequence[str], target: Sequence[str],
    source_keys: Sequence[Hashable], target_keys: Sequence[Hashable],
) -> ClassMap | None:  # fmt: skip
    """The map in which classes with equal keys are alike; a key of None is like no other."""
    shared = [k for k in dict.fromkeys(target_keys) if k is not None and k in source_keys]
    if len(shared) < 2:
        return None
    sides = [(source, source_keys), (target, target_keys)]
    number = {key: i for i, key in enumerate(shared)}
    numbers = [np.array([number.get(k, -1) for k in keys], np.int64) for _, keys in sides]
    names = []
    for key in shared:
        alike = [[n for n, k in zip(all_, keys, strict=True) if k == key] for all_, keys in sides]
        shorter = alike[0] if len(alike[0]) < len(alike[1]) else alike[1]
        names.append(str(key) if how == "polarity" else " + ".join(shorter))
    return ClassMap(how, tuple(names), *numbers)


def merge_probabilities(probabilities: Floats, numbers: Labels, count: int) -> Floats:
    """Probabilities [N, count] of merged classes, from those [N, C] of classes with `numbers` [C].

    What is left out (-1) is out of the question: the others sum to 1 again.
    """
    kept = numbers >= 0
    merged = probabilities[:, kept] @ np.eye(count)[numbers[kept]]
    merged = np.maximum(merged, np.finfo(np.float64).tiny)
    return np.asarray(merged / merged.sum(axis=1, keepdims=True))


def parse_pairs(texts: Sequence[str], known: Mapping[str, Sequence[str]]) -> list[Pair]:
    """The pairs in ``a=b,c=d``, each name a class of one of the `known` sets.

    Raises ``ConfigError`` for what is no pair, or a class that no set has.
    """
    pairs = []
    keys = {spelling_key(name) for names in known.values() for name in names}
    for part in filter(None, (part.strip() for text in texts for part in text.split(","))):
        one, equals, other = (end.strip() for end in part.partition("="))
        if not (one and equals and other):
            raise ConfigError(f"--map {part}: write CLASS=CLASS, one of a model, one of the data")
        for name in (one, other):
            if spelling_key(name) not in keys:
                raise ConfigError(f"--map {part}: no class {name!r}; {in_words(known)}")
        pairs.append((one, other))
    return pairs


def in_words(known: Mapping[str, Sequence[str]]) -> str:
    """The classes of each set in words."""
    return "; ".join(f"{name} has {', '.join(classes)}" for name, classes in known.items())
