"""How much is measured: on a CPU, on a GPU, and as a quick check that all of it runs."""

from dataclasses import dataclass

PARTS = ("input", "step", "epoch", "size", "memory")
HALVES = {1: ("input", "step"), 2: ("epoch", "size", "memory")}
SOURCES = {"500x375": (500, 375), "1024x768": (1024, 768)}


@dataclass(frozen=True)
class Plan:
    """Sizes and repeats of one run of the benchmark."""

    repeats: int  # interleaved: A B C, B C A, ...
    seconds: float  # of one repeat of an input path
    files: int  # distinct sources of each size
    map_images: int  # in the memory map of the input path
    input_size: int  # pixels of the network's input, for the input path
    train_size: int  # the same, for step, epoch and memory
    model: str
    step_batch: int
    steps: int  # of one repeat of the step alone
    compiled_steps: bool
    epoch_batch: int
    epoch_steps: int  # of one epoch of ours
    usual_images: int  # of one epoch of the usual pipeline
    usual_batch: int
    set_sizes: tuple[int, ...]
    set_reads: int  # images read in one repeat of the part on size
    set_side: int  # pixels of the cached squares of the part on size
    memory_batches: tuple[int, ...]


CPU = Plan(
    repeats=5, seconds=1.2, files=64, map_images=4096, input_size=224, train_size=96,
    model="resnet50", step_batch=16, steps=2, compiled_steps=False, epoch_batch=32, epoch_steps=8,
    usual_images=256, usual_batch=32, set_sizes=(1000, 5000, 25000, 50000), set_reads=50000,
    set_side=110, memory_batches=(8, 16, 32, 64),
)  # fmt: skip
CUDA = Plan(
    repeats=5, seconds=1.0, files=64, map_images=4096, input_size=224, train_size=224,
    model="resnet50", step_batch=128, steps=20, compiled_steps=True,
    epoch_batch=128, epoch_steps=64, usual_images=2048, usual_batch=32,
    set_sizes=(1000, 5000, 25000, 50000), set_reads=50000, set_side=256,
    memory_batches=(32, 64, 128, 256, 512),
)  # fmt: skip
QUICK = Plan(
    repeats=2, seconds=0.05, files=8, map_images=16, input_size=64, train_size=32,
    model="efficientnet_lite0", step_batch=4, steps=2, compiled_steps=False,
    epoch_batch=4, epoch_steps=2, usual_images=8, usual_batch=4,
    set_sizes=(50, 200), set_reads=200, set_side=37, memory_batches=(2, 4),
)  # fmt: skip


def choose_plan(*, cuda: bool, quick: bool) -> Plan:
    """The plan for this machine."""
    return QUICK if quick else CUDA if cuda else CPU
