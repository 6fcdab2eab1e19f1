"""The device, its precision, and what a training step keeps there without waiting for it."""

import contextlib
import ctypes
import os
import random
import sys
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from emotion_toolbox.errors import ConfigError, DeviceMemoryError

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
AMP_NAMES = {"off": "float32", "bf16": "bfloat16", "fp16": "float16"}
BF16_UNITS = ("avx512_bf16", "amx_bf16", "bf16")  # as PyTorch names them on x86 and ARM
MEASURED: dict[tuple[int, int], str] = {}  # by parameters and size, so that baselines need not
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # the numbers of mallopt's options, from malloc.h
READ_EVERY = 20  # steps between two readings of the device, for each makes it wait


def choose_device(wanted: str = "auto") -> torch.device:
    """The device called `wanted`, or with "auto" the best; ``ConfigError`` if it is not here."""
    mps = torch.backends.mps.is_available()
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(wanted)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        found = ", ".join(["cpu", *cuda, *(["mps"] if mps else [])])
        raise ConfigError(
            f'DEVICE={wanted!r}: PyTorch finds {found} here; use "auto" or one of these'
        ) from error
    return device


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type


def memory_in_use(device: torch.device) -> float:
    """Peak device memory in MB on CUDA, else the memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return float(psutil.Process(os.getpid()).memory_info().rss) / 2**20


def keep_freed_memory() -> None:
    """Let glibc's allocator keep what this process frees; elsewhere, do nothing.

    A step on a CPU frees some hundred megabytes and the next asks for as many; the system would
    clear and map them anew, page by page.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(MMAP_THRESHOLD, 2**25)  # the most that it accepts
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def set_deterministic(flag: bool) -> None:
    """Allow only deterministic algorithms, or the fastest (`flag` False), from now on.

    Call it before the first work on the GPU: cuBLAS reads its setting only once.
    """
    if flag:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(flag)
    torch.backends.cudnn.deterministic = flag
    torch.backends.cudnn.benchmark = not flag


def precision(device: torch.device, amp: str) -> torch.autocast:
    """The autocast context for "bf16" or "fp16"; it does nothing for "off"."""
    return torch.autocast(device.type, AMP_DTYPES[amp], enabled=AMP_DTYPES[amp] is not None)


def choose_amp(wanted: str, model: nn.Module, size: int, *, measure: bool = True) -> str:
    """The precision to train `model` in at `size` pixels: "off", "bf16" or "fp16".

    With "auto", a GPU computes in bfloat16 where it has units for that, else in float16. A CPU that
    has them is measured, if `measure`, for they do not help every network; one without stays with
    float32.
    """
    device = next(model.parameters()).device
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if native else "fp16"
    if device.type != "cpu" or not measure or not cpu_has_bf16():
        return "off"
    key = sum(p.numel() for p in model.parameters()), size
    if key not in MEASURED:
        print("measuring which precision is faster here ...", flush=True)
        images = torch.rand(8, 3, size, size).contiguous(memory_format=torch.channels_last)
        full = min(time_step(model, images, "off") for _ in range(3))
        half = min(time_step(model, images, "bf16") for _ in range(3))
        MEASURED[key] = "bf16" if full > 1.3 * half else "off"
    return MEASURED[key]


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself; True where PyTorch cannot tell."""
    if not hasattr(torch.cpu, "get_capabilities"):  # the oldest torch supported may lack it
        return True
    found = torch.cpu.get_capabilities()
    return any(found.get(unit, False) for unit in BF16_UNITS)


def time_step(model: nn.Module, images: Tensor, amp: str) -> float:
    """Seconds of one forward and backward pass of `model`; changes none of its state."""
    with eval_mode(model):
        start = time.perf_counter()
        with precision(images.device, amp):
            loss = model(images).float().square().mean()
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        return time.perf_counter() - start


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; then every module is again in the mode it was in."""
    was_training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in was_training:
            module.training = mode


@contextlib.contextmanager
def memory_advice(batch_size: int, parts: int, size: int) -> Iterator[None]:
    """Turn a device's lack of memory into a ``DeviceMemoryError`` with the settings to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"the device ran out of memory at BATCH_SIZE={batch_size}, ACCUMULATE={parts}, "
            f"IMG_SIZE={size}. Set ACCUMULATE={2 * parts} (the same training in smaller parts) or "
            f"BATCH_SIZE={max(2, batch_size // 2)}"
        ) from error


def check_gradients(model: nn.Module) -> None:
    """Raise ``RuntimeError`` if a tensor that should train got no gradient in this step."""
    wanted = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if lacking := [name for name, p in wanted if p.grad is None]:
        raise RuntimeError(
            f"{len(lacking)} of {len(wanted)} tensors that should train got no gradient, first "
            f"{lacking[0]}; set COMPILE=False, or upgrade torch to 2.12 or newer"
        )


class SteadyScaler(GradScaler):
    """A scaler for bfloat16 and float32: its scale stays 1, and it still skips what is not finite.

    So one path through a training step serves all precisions.
    """

    def update(self, new_scale: float | Tensor | None = 1.0) -> None:
        """Keep the scale at 1; a skipped step must not wear it down."""
        super().update(1.0)


def make_scaler(device: torch.device, amp: str) -> GradScaler:
    """The scaler that training in this precision needs."""
    steady = amp != "fp16"
    return SteadyScaler(device.type, init_scale=1.0) if steady else GradScaler(device.type)


@torch.no_grad()
def void_unless(finite: Tensor, gradients: list[Tensor]) -> None:
    """Put a NaN into the gradients unless `finite`, for the scaler to skip the step."""
    # it looks at each number by itself, and would miss a norm that overflows
    gradients[0].mul_(torch.where(finite, 1.0, torch.nan))


class Totals(NamedTuple):
    """What a ``Meter`` has summed up, on the CPU: means over the images that counted."""

    loss: float
    accuracy: float
    images: int
    skipped: int  # steps


class Meter:
    """Sums over an epoch, kept on the device until they are read; skipped steps count apart."""

    def __init__(self, device: torch.device) -> None:
        exact = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(4, dtype=exact, device=device)  # loss, right, images, skipped
        self.skip = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=exact, device=device)
        self.finite = torch.ones(READ_EVERY, dtype=torch.bool, device=device)  # of the last steps

    def add(self, step: int, loss: Tensor, right: Tensor, images: int, finite: Tensor) -> None:
        """Count a step: the sums of its loss and right answers, unless it was not `finite`."""
        counted = torch.stack((loss, right, torch.full_like(loss, images), torch.zeros_like(loss)))
        self.sums += torch.where(finite, counted, self.skip)
        self.finite[step % len(self.finite)] = finite

    def read(self) -> Totals:
        """Wait for the device and return the means so far; NaN where no image counted."""
        loss, right, images, skipped = self.sums.tolist()
        count = images or float("nan")
        return Totals(loss / count, right / count, int(images), int(skipped))


class StatisticsGuard:
    """Puts back the running statistics of training BatchNorm layers after a step that is skipped.

    Hundreds of small tensors in a few operations, because each costs a GPU a launch.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        moving = [t for layer in layers if layer.training for t in layer.buffers()]
        kinds = ([t for t in moving if t.is_floating_point() == kind] for kind in (True, False))
        self.groups = [group for group in kinds if group]
        self.good = [torch.cat([t.flatten() for t in group]) for group in self.groups]

    def restore_unless(self, finite: Tensor) -> None:
        """Put back those before the last step unless it was `finite`; call it after every step."""
        for i, group in enumerate(self.groups):
            now = torch.cat([t.flatten() for t in group])
            self.good[i] = torch.where(finite, now, self.good[i])
            parts = torch.split(self.good[i], [t.numel() for t in group])
            torch._foreach_copy_(group, [p.view_as(t) for p, t in zip(parts, group, strict=True)])


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, share: Tensor) -> None:
    """Move `average`, a copy of `model`, towards it by `share`, one number on the device.

    ``swa_utils.AveragedModel`` does the same, but waits for the device in every step.
    """
    pairs = list(zip(average.state_dict().values(), model.state_dict().values(), strict=True))
    old, new = map(list, zip(*[p for p in pairs if p[0].is_floating_point()], strict=True))
    if share.device.type == "cpu":  # nothing to wait for: one pass instead of three
        torch._foreach_lerp_(old, new, float(share))
    else:
        step = torch._foreach_sub(new, old)
        torch._foreach_mul_(step, share)
        torch._foreach_add_(old, step)
    counts = [pair for pair in pairs if not pair[0].is_floating_point()]
    if counts:
        torch._foreach_copy_([pair[0] for pair in counts], [pair[1] for pair in counts])
