"""What each ingredient was worth, over the committed runs: ``python -m benchmarks.ablations``.

Prints a Markdown table of the files ``benchmarks/results/ablation-NAME.json``. Each is the
``ablation.json`` that ``python -m emotion_transfer ablate`` wrote for the data set NAME.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emotion_toolbox.measures import Estimate

RESULTS = Path(__file__).parent / "results"
Ablation = Mapping[str, Any]


def load_ablations(folder: Path = RESULTS) -> dict[str, Ablation]:
    """The ablations in `folder` by data set."""
    files = sorted(folder.glob("ablation-*.json"))
    found = {file.stem.partition("-")[2]: file.read_text(encoding="utf-8") for file in files}
    return {name: json.loads(text) for name, text in found.items()}


def in_points(ablation: Ablation, ingredient: str) -> str:
    """What an ingredient is worth, in points, bold where its interval leaves out zero."""
    worth = ablation["worth"].get(ingredient)
    if worth is None:
        return ""
    low, high = 100 * worth["low"], 100 * worth["high"]
    text = format(Estimate(100 * worth["value"], low, high), "+.1f")
    return f"**{text}**" if low * high > 0 else text


def as_markdown(ablations: Mapping[str, Ablation]) -> str:
    """A row an ingredient, a column a data set; the first row is the accuracy of the recipe."""
    rows = [
        ["ingredient", "in the recipe", *(name.replace("_", " ") for name in ablations)],
        ["---"] * (2 + len(ablations)),
        ["*accuracy of the whole recipe*", "",
         *(format(Estimate(**a["accuracy"]), ".3f") for a in ablations.values())],
    ]  # fmt: skip
    names = dict.fromkeys(name for a in ablations.values() for name in a["worth"])
    for name in names:
        inside = {a["worth"][name]["included"] for a in ablations.values() if name in a["worth"]}
        said = "yes" if inside == {True} else "no" if inside == {False} else "on some"
        rows.append([name, said, *(in_points(a, name) for a in ablations.values())])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    print(as_markdown(load_ablations()), end="")
