"""The eight emotions of Mikels' model, in EmoSet's order, which numbers the classes."""

from collections.abc import Iterable
from decimal import Decimal

MIKELS_CLASSES: tuple[str, ...] = (
    *("amusement", "awe", "contentment", "excitement"),
    *("anger", "disgust", "fear", "sadness"),
)
POSITIVE_EMOTIONS = frozenset(MIKELS_CLASSES[:4])


def order_of(labels: Iterable[str]) -> tuple[str, ...]:
    """Class names in order: EmoSet's for Mikels' eight, by value for numbers, else A to Z."""
    names = set(labels)
    if names == set(MIKELS_CLASSES):
        return MIKELS_CLASSES
    try:
        return tuple(sorted(names, key=lambda name: (Decimal(name), name)))
    except ArithmeticError:  # not all of them are numbers
        return tuple(sorted(names))
