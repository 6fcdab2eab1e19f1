"""Which device, which precision, and that measuring leaves no trace."""

import copy
import platform
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import SmallNetwork, install_small_network, memory_datasets, small_config

from emotion_toolbox import device as device_module
from emotion_toolbox.device import (
    AMP_DTYPES,
    choose_amp,
    choose_device,
    cpu_has_bf16,
    precision,
    seed_everything,
    set_deterministic,
    time_step,
)
from emotion_toolbox.errors import ConfigError
from emotion_transfer.engine import fit
from emotion_transfer.model import build_model, set_training_mode

CPU = torch.device("cpu")


class On:
    """A network that says it lies on another device."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def parameters(self):
        return iter([self])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    install_small_network(monkeypatch)


def test_the_best_device_there_is(monkeypatch):
    for cuda, mps, expected in ((1, 1, "cuda"), (1, 0, "cuda"), (0, 1, "mps"), (0, 0, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=cuda: bool(found))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda found=mps: bool(found))
        assert choose_device().type == expected


def test_a_named_device_is_taken_or_refused():
    assert choose_device("cpu") == CPU
    for name in ("cuda:99", "gpu", "xpu:7", "cpu:x"):
        with pytest.raises(ConfigError, match=f"DEVICE='{name}': .*cpu.*\"auto\"") as caught:
            choose_device(name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_named_precision_is_not_measured(monkeypatch, amp):
    monkeypatch.setattr(device_module, "time_step", None)
    for network in (SmallNetwork(), On("cuda"), On("mps")):
        assert choose_amp(amp, network, 32) == amp


@pytest.mark.parametrize(
    ("full", "half", "expected"),
    [(1.0, 0.5, "bf16"), (1.0, 0.75, "bf16"), (1.0, 0.9, "off"), (1.0, 3.0, "off")],
)
def test_a_cpu_uses_half_precision_only_where_it_is_clearly_faster(
    monkeypatch, capsys, full, half, expected
):
    """Measured once for a network and a size: a baseline of the same network need not wait."""
    times, calls = {"off": full, "bf16": half}, []
    monkeypatch.setattr(device_module, "MEASURED", {})
    monkeypatch.setattr(device_module, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(
        device_module, "time_step", lambda m, i, amp: calls.append(amp) or times[amp]
    )
    for _ in range(2):
        assert choose_amp("auto", SmallNetwork(), 32) == expected
    assert "measuring" in capsys.readouterr().out  # nobody waits without knowing for what
    assert calls.count("bf16") == calls.count("off") == 3  # the first pays for the set-up


def test_a_cpu_without_units_for_it_is_not_measured(monkeypatch, capsys):
    """There a single pass in bfloat16 can take ten times as long as one in float32."""
    monkeypatch.setattr(device_module, "cpu_has_bf16", lambda: False)
    monkeypatch.setattr(device_module, "time_step", None)
    assert choose_amp("auto", SmallNetwork(), 32) == "off"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "aarch64", "bf16": True}, True),
        ({"architecture": "aarch64", "bf16": False}, False),
    ],
)
def test_what_pytorch_says_of_the_processor(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert cpu_has_bf16() is expected


def test_where_pytorch_does_not_tell_a_measurement_decides(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert cpu_has_bf16()


def test_a_deterministic_run_does_not_depend_on_a_measurement(monkeypatch):
    monkeypatch.setattr(device_module, "time_step", None)
    monkeypatch.setattr(device_module, "cpu_has_bf16", lambda: True)
    assert choose_amp("auto", SmallNetwork(), 32, measure=False) == "off"
    assert choose_amp("auto", On("mps"), 32) == "off"


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_uses_bfloat16_only_where_it_has_it(monkeypatch, native, expected):
    def supported(including_emulation=True):
        return native or including_emulation  # an older GPU emulates it, slowly

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert choose_amp("auto", On("cuda"), 32) == expected


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("epoch", [0, 2])
def test_measuring_changes_nothing(tmp_path, amp, epoch):
    cfg = small_config(tmp_path, BACKBONE_BATCHNORM="train")
    model = build_model(cfg, 3)
    set_training_mode(cfg, model, epoch)
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    images, drawn = torch.rand(4, 3, 32, 32), torch.get_rng_state()
    assert time_step(model, images, amp) > 0
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(drawn, torch.get_rng_state())


@pytest.mark.parametrize("amp", list(AMP_DTYPES))
def test_the_context_computes_in_that_precision(amp):
    layer = torch.nn.Linear(4, 4)
    with precision(CPU, amp):
        assert layer(torch.ones(1, 4)).dtype == (AMP_DTYPES[amp] or torch.float32)
    assert layer(torch.ones(1, 4)).dtype == torch.float32


def test_a_run_in_each_precision_learns_the_same(tmp_path):
    """Half precision is noise, not another training; float16 skips steps until its scale fits."""
    losses = {}
    for amp in AMP_DTYPES:
        cfg = small_config(tmp_path, AMP=amp, EPOCHS=3, THAW_EPOCHS=(1, 2))
        result = fit(cfg, build_model(cfg, 3), memory_datasets(), tmp_path / amp / "checkpoints")
        assert result.amp == amp and result.history["skipped_steps"].sum() <= 6
        losses[amp] = result.history["train_loss"][1:].to_numpy()
    assert losses["bf16"] == pytest.approx(losses["off"], abs=0.05)
    assert losses["fp16"] == pytest.approx(losses["off"], abs=0.15)


FAULTS = """
import resource, torch
from emotion_toolbox.device import keep_freed_memory

def faults(rounds=5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        held = [torch.ones(2**23 - 5000) for _ in range(10)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
usual = faults()
keep_freed_memory()
faults()
print(usual, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_used_again():
    """Ten tensors of nearly 32 MB over and over: at first every page of them is mapped anew."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    usual, kept = map(int, done.stdout.split())
    assert kept < usual / 10, done.stdout


def test_seed_everything_repeats_all_three_generators():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_everything(5)
    first = draw()
    seed_everything(5)
    assert draw() == first
    seed_everything(6)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_set_deterministic_switches_both_ways(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.are_deterministic_algorithms_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        set_deterministic(True)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
        set_deterministic(False)
        assert not torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.deterministic and torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
