"""``python -m emotion_transfer COMMAND``: the notebook's work from a shell."""

import importlib
import sys

from emotion_toolbox.errors import NAMED_ERRORS

COMMANDS = {
    "train": "train, evaluate, compare and export, without the notebook",
    "prepare": "write the lists of images that the notebook reads, from folders, EmoSet or tables",
    "predict": "say which emotion pictures evoke",
    "ensemble": "compare several models, and views of a picture, with their mean",
    "threshold": "choose the probability below which a model is not sure",
    "app": "show on a page in the browser what a model says of pictures, and why",
    "onnx": "write a model as one ONNX file that does all but the decoding",
    "lr": "try learning rates of head and backbone on training images, and suggest some",
    "ablate": "train without each ingredient of the recipe in turn: what is each worth?",
    "attributes": "where does a model fail? accuracy by the attributes of the pictures",
    "crossval": "train and judge on several folds, so that every picture is judged once",
    "transfer": "judge models on other data sets, and adapt them with few labels or none",
    "search": "search for better settings with Optuna, judged by validation images",
    "settings": "list all settings with their defaults and meanings",
}
USAGE = "usage: python -m emotion_transfer COMMAND [OPTIONS]\n\n" + "".join(
    f"  {name:<10} {what}\n" for name, what in COMMANDS.items()
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the first argument names; returns the exit status."""
    name, *rest = arguments if arguments is not None else sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(f"{USAGE}\npython -m emotion_transfer COMMAND --help says more of one")
        return 0
    if name not in COMMANDS:
        print(f"there is no command {name!r}\n\n{USAGE}", file=sys.stderr, end="")
        return 2
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name the terminal cannot show
    try:
        command = importlib.import_module(f"emotion_transfer.commands.{name}")
        return int(command.main(rest))
    except (*NAMED_ERRORS, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        print(stopped or "stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
