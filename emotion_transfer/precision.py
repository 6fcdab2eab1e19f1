"""The device to train on and the precision to train in."""

import ctypes
import sys
import time

import numpy as np
import torch
from torch import Tensor, nn

from emotion_transfer.config import ConfigError, EnhancedConfig

# %% [markdown]
# #### The device and its precision
#
# Modern GPUs multiply 16-bit numbers several times faster than 32-bit ones. Automatic mixed
# precision uses them where that is safe: bfloat16 where the device has it, else float16, whose
# small range needs its gradients scaled up. On a CPU we do not believe but measure: one training
# step in each precision, and bfloat16 only where it is clearly faster. The choice is made once per
# run and kept in its checkpoints.

# %%
AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(cfg: EnhancedConfig) -> torch.device:
    """The device named by ``DEVICE``, or the best there is.

    Raises:
        ConfigError: for a device that this machine does not have.
    """
    if cfg.DEVICE != "auto":
        try:
            device = torch.device(cfg.DEVICE)
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError) as error:
            cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
            found = ["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]
            raise ConfigError(
                f'DEVICE={cfg.DEVICE!r}: PyTorch finds {", ".join(found)} here; use "auto" or '
                "one of these"
            ) from error
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


# %% [markdown]
# On a CPU, a step frees some hundred megabytes and the next one asks for as many. By default glibc
# hands them back to the system in between, which then clears and maps them anew, page by page; in
# ResNet50 that costs several per cent of a step. So it is asked to keep them.

# %%
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # the numbers of mallopt's options, from malloc.h


def keep_freed_memory() -> None:
    """Let glibc's allocator keep what this process frees; elsewhere, do nothing."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(MMAP_THRESHOLD, 2**25)  # the most that it accepts
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)


# %% [markdown]
# How long a step takes in each precision is measured on this machine, with this model and this
# image size.


# %%
def choose_amp(cfg: EnhancedConfig, model: nn.Module, device: torch.device) -> str:
    """One of "off", "bf16", "fp16" for this model on this device."""
    if cfg.AMP != "auto":
        return cfg.AMP
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if native else "fp16"
    if device.type == "cpu" and not cfg.DETERMINISTIC:
        images = torch.rand(min(cfg.BATCH_SIZE, 16), 3, cfg.IMG_SIZE, cfg.IMG_SIZE)
        images = images.contiguous(memory_format=torch.channels_last)
        full, half = (time_forward_backward(model, images, amp) for amp in ("off", "bf16"))
        return "bf16" if full > 1.3 * half else "off"
    return "off"


def time_forward_backward(model: nn.Module, images: Tensor, amp: str, repeats: int = 3) -> float:
    """Median seconds of a forward and backward pass in the given precision; changes no state."""
    was_training = [(module, module.training) for module in model.modules()]
    model.eval()
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        with precision(images.device, amp):
            loss = model(images).float().square().mean()
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        seconds.append(time.perf_counter() - start)
    for module, mode in was_training:
        module.training = mode
    return float(np.median(seconds[1:]))  # the first one pays for set-up


# %% [markdown]
# One context manager serves all precisions; for float32 it does nothing.


# %%
def precision(device: torch.device, amp: str) -> torch.autocast:
    """The autocast context for a precision; does nothing for "off"."""
    return torch.autocast(device.type, AMP_DTYPES[amp], enabled=AMP_DTYPES[amp] is not None)
