"""Put the figures of a run side by side: ``python docs/make_picture.py outputs/<RUN_NAME>``."""

import sys
from pathlib import Path

from PIL import Image

ROWS = (("pictures", "training"), ("confusion", "comparison"))
WIDTH, GAP = 900, 24


def main(run: Path, target: Path) -> None:
    """Arrange the figures of `run` in rows of equal width and save them as `target`."""
    rows = []
    for names in ROWS:
        images = [Image.open(run / "figures" / f"{name}.png").convert("RGB") for name in names]
        images = [i.resize((WIDTH, round(i.height * WIDTH / i.width))) for i in images]
        rows.append(images)
    heights = [max(image.height for image in row) for row in rows]
    size = (2 * WIDTH + 3 * GAP, sum(heights) + GAP * (len(rows) + 1))
    sheet, top = Image.new("RGB", size, "white"), GAP
    for row, height in zip(rows, heights, strict=True):
        for column, image in enumerate(row):
            sheet.paste(image, (GAP + column * (WIDTH + GAP), top + (height - image.height) // 2))
        top += height + GAP
    sheet.quantize(128).save(target, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent / "results.png")
