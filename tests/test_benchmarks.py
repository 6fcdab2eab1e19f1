"""The benchmark's own arithmetic, and that each kind of measurement runs."""

import json
import mmap
import statistics
import time

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import accuracy, epoch, input_path, memory, size, step, torture
from benchmarks.figure import save_figure
from benchmarks.measure import interleave, make_row, peak_anonymous_memory, rate_for
from benchmarks.pictures import make_files, make_split, repeat_files
from benchmarks.plan import HALVES, PARTS, QUICK, choose_plan
from benchmarks.results import as_table, machine_slug, merge_results, summarise
from benchmarks.settings import bench_config
from benchmarks.step import random_batch, ready_trainer
from emotion_toolbox.batches import Batch
from emotion_transfer.engine import augment_batch

PROMISED = {
    "input_vs_usual_per_core", "input_vs_usual_per_core_large", "gather_vs_usual_per_core",
    "epoch_vs_resident_tensors", "epoch_vs_usual_notebook", "step_vs_timm", "device_wait_percent",
}  # fmt: skip
MACHINE = {"device": "cpu", "cpu": "Some (R) CPU @ 2 GHz", "cores": 2}


def part(*rows, **extra):
    return {"seconds": 1.0, "load_average": [0.1, 0.2], "rows": list(rows), **extra}


def results(machine=MACHINE, **parts):
    plan = {"model": "resnet50", "train_size": 224}
    return {"machine": machine, "versions": {"torch": "2"}, "plan": plan, "parts": parts}


def input_rows(source, usual, ours, gather):
    named = {"usual notebook": usual, "ours": ours, "ours, gather alone": gather}
    return [make_row({"path": k, "source": source}, "images/s", v) for k, v in named.items()]


def epoch_rows(**rates):
    return [make_row({"epoch": k.replace("_", " ")}, "images/s", [v]) for k, v in rates.items()]


def test_summary_holds_every_promised_key_and_null_where_nothing_was_measured():
    summary = summarise(results())
    assert summary.keys() >= PROMISED
    assert set(summary.values()) == {None}


def test_summary_divides_medians():
    rows = input_rows("500x375", [100, 90, 900], [300, 250, 1], [5000])
    rows += input_rows("1024x768", [50], [400], [5000])
    summary = summarise(results(input=part(*rows)))
    assert summary["input_vs_usual_per_core"] == 2.5
    assert summary["input_vs_usual_per_core_large"] == 8
    assert summary["gather_vs_usual_per_core"] == 50
    assert summary["step_vs_timm"] is None


def test_epoch_is_compared_with_the_notebook_as_it_ships_where_that_was_measured():
    ours = make_row({"epoch": "ours, from the cache"}, "images/s", [90])
    resident = make_row({"epoch": "ours, on resident tensors"}, "images/s", [100])
    every = make_row({"epoch": "usual notebook, a worker a core"}, "images/s", [30])
    ships = make_row({"epoch": "usual notebook, 4 workers"}, "images/s", [10])
    wait = make_row({"epoch": "ours, device waits for data"}, "%", [0.5])
    alone = summarise(results(epoch=part(ours, resident, every, wait)))
    both = summarise(results(epoch=part(ours, resident, every, ships, wait)))
    assert alone["epoch_vs_resident_tensors"] == 0.9
    assert alone["epoch_vs_usual_notebook"] == 3
    assert both["epoch_vs_usual_notebook"] == 9
    assert both["epoch_vs_usual_notebook_all_cores"] == 3
    assert both["device_wait_percent"] == 0.5


def step_part(precision, ours, timm, ships):
    labels = {"precision": precision, "compiled": False}
    return [
        make_row({"step": "ours, as timm's", **labels}, "images/s", [ours]),
        make_row({"step": "timm", **labels}, "images/s", [timm]),
        make_row({"step": "ours, as it ships", **labels}, "images/s", [ships]),
    ]


def test_step_is_compared_in_the_fast_precision_and_with_the_floor_where_it_is_known():
    rows = step_part("off", 10, 10, 1000) + step_part("bf16", 60, 50, 3700)
    h100 = {**MACHINE, "gpu": "NVIDIA H100 80GB HBM3"}
    summary = summarise(results(h100, step=part(*rows)))
    assert summary["step_vs_timm"] == 1.2
    assert summary["step_vs_timm_float32"] == 1
    assert summary["step_share_of_floor"] == 0.5
    assert summary["step_amp_vs_float32"] == 3.7
    assert summarise(results(step=part(*rows)))["step_share_of_floor"] is None
    slow_half = step_part("off", 30, 20, 9) + step_part("bf16", 60, 50, 4)
    assert summarise(results(step=part(*slow_half)))["step_vs_timm"] == 1.5


def test_halves_merge_into_one_and_a_new_part_replaces_the_old():
    first = merge_results(None, results(input=part(*input_rows("500x375", [10], [20], [30]))))
    rate = make_row({"epoch": "ours, from the cache"}, "images/s", [90])
    other = make_row({"epoch": "ours, on resident tensors"}, "images/s", [90])
    both = merge_results(first, results(epoch=part(rate, other)))
    assert set(both["parts"]) == {"input", "epoch"}
    assert both["summary"]["input_vs_usual_per_core"] == 2
    assert both["summary"]["epoch_vs_resident_tensors"] == 1
    again = merge_results(both, results(input=part(*input_rows("500x375", [10], [50], [30]))))
    assert again["summary"]["input_vs_usual_per_core"] == 5
    assert set(again["parts"]) == {"input", "epoch"}


@pytest.mark.parametrize("key", ["machine", "versions", "plan"])
def test_parts_of_another_machine_or_version_are_not_mixed_in(key):
    old = merge_results(None, results(input=part(*input_rows("500x375", [10], [20], [30]))))
    new = results(epoch=part())
    new[key] = {**new[key], "cores": 64}
    assert set(merge_results(old, new)["parts"]) == {"epoch"}


def test_results_survive_json():
    merged = merge_results(None, results(input=part(*input_rows("500x375", [10], [20], [30]))))
    assert json.loads(json.dumps(merged)) == merged


def test_file_is_named_after_the_device():
    assert machine_slug(MACHINE) == "cpu-some-r-cpu-2-ghz-2-cores"
    assert machine_slug({**MACHINE, "gpu": "NVIDIA H100 80GB HBM3"}) == "nvidia-h100-80gb-hbm3"


def test_halves_cover_all_parts_once():
    assert sorted([*HALVES[1], *HALVES[2]]) == sorted(PARTS) == sorted(command.RUNNERS)


def test_repeats_are_interleaved_and_the_first_round_does_not_count():
    calls = []
    paths = {name: lambda name=name: calls.append(name) or len(calls) for name in "abc"}
    found = interleave(paths, 3, "test")
    assert "".join(calls) == "abcbcacababc"
    assert found["a"] == [6, 8, 10]


def test_row_holds_median_and_raw_repeats():
    row = make_row({"path": "x"}, "images/s", [3.0, 1.0, 2.0])
    assert row["median"] == 2.0 and row["repeats"] == [3.0, 1.0, 2.0]


def test_rate_counts_at_least_one_batch():
    assert rate_for(0.0, lambda: 7) > 0


def test_peak_of_anonymous_memory_is_seen_after_it_is_freed():
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # freed memory that was kept may serve malloc
    with (
        peak_anonymous_memory(every=0.001) as seen,
        mmap.mmap(-1, 200_000_000, flags=private) as block,
    ):
        for place in range(0, len(block), mmap.PAGESIZE):
            block[place] = 1
        time.sleep(0.05)
    assert seen["peak"] - seen["before"] > 150_000_000


def test_pictures_are_reproducible_and_as_large_as_photographs(tmp_path):
    one = make_files(tmp_path / "one", (500, 375), 4)
    two = make_files(tmp_path / "two", (500, 375), 4)
    sizes = []
    for file in sorted(one.rglob("*.jpg")):
        assert file.read_bytes() == (two / file.relative_to(one)).read_bytes()
        sizes.append(file.stat().st_size)
    assert 50_000 < statistics.mean(sizes) < 130_000


def test_a_large_set_is_names_for_few_files(tmp_path):
    source = make_files(tmp_path / "source", (40, 30), 3)
    split = make_split(repeat_files(tmp_path / "set", source, 10))
    assert len(split) == 10 and len(set(split.files)) == 10
    assert len({split.path(i).stat().st_ino for i in range(10)}) == 3
    assert set(split.labels.tolist()) == {0, 1, 2}


def test_paths_of_the_input_deliver_whole_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)  # its speed is not the point
    plan = choose_plan(cuda=False, quick=True)
    found = input_path.run(plan, torch.device("cpu"), tmp_path)
    assert all(len(row["repeats"]) == plan.repeats for row in found["rows"])
    assert all(rate > 0 for row in found["rows"] for rate in row["repeats"])
    summary = summarise(results(input=part(*found["rows"])))
    assert summary["gather_vs_usual_per_core"] > 1
    merged = merge_results(None, results(input=part(*found["rows"])))
    assert "input_vs_usual_per_core" in as_table(merged)
    save_figure(tmp_path / "figure.png", merged)
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_size_is_measured_and_the_index_stated(tmp_path):
    sets = []
    for count in (20, 60):
        root = repeat_files(
            tmp_path / f"{count}", make_files(tmp_path / "small", (64, 48), 4), count
        )
        sets.append(size.measure_set(root, tmp_path / f"cache-{count}", 37, 100))
        assert sets[-1]["images"] == count
        assert len(sets[-1]["read_seconds_per_image"]) == size.REPEATS
    assert size.growth(sets)["index_file_bytes_per_image"] > 50


def test_memory_variants_cover_precisions_and_accumulation(monkeypatch):
    monkeypatch.setattr(step, "cpu_has_bf16", lambda: False)
    assert {amp for _, _, amp in memory.variants(QUICK, torch.device("cpu"))} == {"off"}
    monkeypatch.setattr(step, "cpu_has_bf16", lambda: True)
    found = memory.variants(QUICK, torch.device("cpu"))
    assert {amp for _, _, amp in found} == {"off", "bf16"}
    larger = memory.variants(choose_plan(cuda=False, quick=False), torch.device("cpu"))
    assert (64, 4, "bf16") in larger


def test_waiting_is_what_passes_between_batches_and_not_in_the_step(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(epoch.time, "perf_counter", lambda: now[0])

    def slow():
        for wait in (5.0, 1.0, 2.0):  # the first does not count: every epoch has to wait for it
            now[0] += wait
            yield Batch(*[torch.zeros(1)] * 3)

    meter = epoch.WaitMeter(torch.device("cpu"))
    for _ in meter.watch(slow()):
        now[0] += 10.0
    assert meter.seconds() == pytest.approx(3.0)


def test_interval_of_paired_differences_is_student_s():
    found = accuracy.paired_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    margin = 2.7764451 * (2.5**0.5) / 5**0.5  # t(0.975, 4) from a table
    assert found["mean"] == 3
    assert found["low"] == pytest.approx(3 - margin) and found["high"] == pytest.approx(3 + margin)
    assert accuracy.paired_interval([1.0])["low"] is None


def test_twin_trains_on_what_torchvision_made_of_the_files(tmp_path):
    split = make_split(make_files(tmp_path, (40, 30), 4))
    images = accuracy.open_images(split, [2, 0], lambda image: torch.full((3, 2, 2), image.width))
    assert images.shape == (2, 3, 2, 2) and (images == 40).all()


@pytest.mark.parametrize("fit", ["pad", "squash"])
def test_a_fit_that_torchvision_does_not_share_is_refused(tmp_path, capsys, fit):
    with pytest.raises(SystemExit) as stopped:
        accuracy.main(["--data", str(tmp_path), "--set", f"FIT={fit}"])
    assert stopped.value.code == 2 and f"FIT={fit}" in capsys.readouterr().err


def test_twin_mixes_as_ours_does(tmp_path):
    cpu = torch.device("cpu")
    cfg = bench_config(QUICK, cpu, BATCH_SIZE=16, MIX_PROB=1.0, EPOCHS=4, MIX_OFF_EPOCHS=1)
    trainer, batch = ready_trainer(cfg, "off"), random_batch(cfg, cpu, cfg.BATCH_SIZE)
    trainer.train.split = make_split(make_files(tmp_path, (40, 30), cfg.BATCH_SIZE))
    twin = accuracy.torchvision_augmentation(cfg)
    for place in ((0, 0), (2, 5), (3, 0)):
        images, targets = augment_batch(trainer, batch, *place)
        theirs, wanted = twin(trainer, batch, *place)
        assert theirs.shape == images.shape and theirs.dtype == images.dtype
        assert torch.equal(targets, wanted)
        assert bool((targets.amax(1) == 1).all()) == (place[0] == 3)


def test_states_that_differ_in_a_bit_are_not_identical_and_nan_is_itself():
    state = {"history": [{"rate": float("nan"), "loss": 1.0}], "model": torch.tensor([0.0, 1.0])}
    other = {"history": [{"rate": float("nan"), "loss": 1.0}], "model": torch.tensor([0.0, 1.0])}
    assert torture.identical(state, other)
    assert not torture.identical(state, {**other, "model": torch.tensor([-0.0, 1.0])})
    assert not torture.identical(state, {**other, "history": [{"rate": 0.0, "loss": 1.0}]})
