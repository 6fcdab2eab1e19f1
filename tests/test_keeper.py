"""Checkpoints under every kind of damage: kills, full disks, flipped bits, planted code."""

import errno
import hashlib
import io
import os
import pickle
import re
from pathlib import Path

import pytest
import torch

from emotion_toolbox.errors import CheckpointError
from emotion_toolbox.files import write_atomically
from emotion_toolbox.keeper import (
    list_checkpoints,
    load_newest,
    load_verified,
    save_checkpoint,
    save_with_digest,
)

NO_BEST = f"best{'0' * 8}"  # in the name of a checkpoint that has no best model


def payload(epoch: int, step: int = 0, best: str | None = None, **more) -> dict:
    """What a checkpoint of a run might hold; `model` tells the positions apart."""
    return {
        "epoch": epoch, "step": step, "best_file": best, "best_score": 0.5, "best_epoch": 0,
        "finished": "", "model": {"w": torch.full((50,), epoch + step / 10)}, "optimizer": {},
        **more,
    }  # fmt: skip


def save_best(folder: Path, epoch: int) -> str:
    return save_with_digest(folder, f"best-epoch{epoch:03d}", payload(epoch)).name


def save_raw(folder: Path, stem: str, content) -> None:
    """Write whatever `content` is under a name whose checksum is right."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()[:16]
    (folder / f"{stem}-{digest}.pt").write_bytes(buffer.getvalue())


def names(folder: Path) -> list[str]:
    """Everything in `folder`, hidden files too, with the digests taken out."""
    return sorted(
        re.sub(r"(-best[0-9a-f]{8})?-[0-9a-f]{16}\.", ".", p.name) for p in folder.iterdir()
    )


def position(saved: dict) -> tuple[int, int]:
    assert torch.equal(saved["model"]["w"], payload(saved["epoch"], saved["step"])["model"]["w"])
    return saved["epoch"], saved["step"]


# --- writing -------------------------------------------------------------------------------------


def test_a_file_appears_whole(tmp_path):
    target = tmp_path / "new/folder/file.bin"
    write_atomically(target, lambda file: file.write(b"abc"))
    assert target.read_bytes() == b"abc" and names(target.parent) == ["file.bin"]
    write_atomically(target, lambda file: file.write(b"defg"))
    assert target.read_bytes() == b"defg" and names(target.parent) == ["file.bin"]


@pytest.mark.parametrize("function", ["replace", "fsync", "write"])
def test_a_failure_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, function):
    target = tmp_path / "file.bin"
    write_atomically(target, lambda file: file.write(b"old"))

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    def write_some(file):
        file.write(b"n" * 10000)
        if function == "write":
            fail()

    if function != "write":
        monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(target, write_some)
    assert target.read_bytes() == b"old" and names(tmp_path) == ["file.bin"]


def test_an_interrupt_leaves_the_old_file_and_no_other(tmp_path):
    target = tmp_path / "file.bin"
    write_atomically(target, lambda file: file.write(b"old"))

    def write_some(file):
        file.write(b"new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, write_some)
    assert target.read_bytes() == b"old" and names(tmp_path) == ["file.bin"]


def test_the_order_survives_a_power_cut(tmp_path, monkeypatch):
    """The bytes are on disk before the name is, and the folder's entry is forced after it."""
    events = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        kind = "folder" if Path(f"/proc/self/fd/{descriptor}").resolve() == tmp_path else "file"
        events.append(f"fsync {kind}")
        fsync(descriptor)

    def note_replace(source, target):
        events.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_atomically(tmp_path / "file.bin", lambda file: file.write(b"abc"))
    assert events == ["fsync file", "replace", "fsync folder"]


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_checkpoint_that_cannot_be_written_removes_nothing(tmp_path, monkeypatch, function):
    best = save_best(tmp_path, 0)
    save_checkpoint(tmp_path, payload(1, best=best), keep=1)
    before = names(tmp_path)

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError):
        save_checkpoint(tmp_path, payload(2, best=best), keep=1)
    monkeypatch.undo()
    assert names(tmp_path) == before
    assert position(load_newest(tmp_path)) == (1, 0)


# --- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_ones_are_kept(tmp_path, keep):
    positions = [(0, 5), (0, 9), (1, 0), (1, 10), (2, 0), (10, 0), (10, 1000), (1000, 0)]
    for done, (epoch, step) in enumerate(positions, start=1):
        save_checkpoint(tmp_path, payload(epoch, step), keep)
        found = [position(load_verified(path)) for path in list_checkpoints(tmp_path)]
        assert found == positions[:done][-keep:][::-1]  # newest first, by number and not by name
        assert len(names(tmp_path)) == len(found)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_every_kept_checkpoint_has_its_best_model(tmp_path, keep):
    best = None
    for epoch in range(12):
        save_checkpoint(tmp_path, payload(epoch, 1, best), keep)
        if epoch in (0, 1, 2, 6, 7, 11):
            best = save_best(tmp_path, epoch)
        save_checkpoint(tmp_path, payload(epoch + 1, 0, best), keep)
        wanted = {load_verified(p)["best_file"] for p in list_checkpoints(tmp_path)} - {None}
        assert {p.name for p in tmp_path.glob("best-*")} == wanted
        assert position(load_newest(tmp_path)) == (epoch + 1, 0)


def test_best_models_stay_while_checkpoints_fail(tmp_path):
    """With ON_SAVE_ERROR="continue" several best models may come between two checkpoints."""
    old = save_best(tmp_path, 0)
    save_checkpoint(tmp_path, payload(1, best=old), keep=2)
    newer = [save_best(tmp_path, epoch) for epoch in (1, 2, 3)]
    save_checkpoint(tmp_path, payload(5, best=newer[-1]), keep=2)
    assert {p.name for p in tmp_path.glob("best-*")} == {old, newer[-1]}
    flip(list_checkpoints(tmp_path)[0], 0.5)
    assert position(load_newest(tmp_path)) == (1, 0)


def test_other_files_are_left_alone(tmp_path):
    others = ["notes.txt", "epoch1.pt", "best.pt", "epoch001-step000000-00.pt", "my-best-epoch1.pt"]
    for name in others:
        (tmp_path / name).write_text("mine")
    for epoch in range(5):
        save_checkpoint(tmp_path, payload(epoch), keep=1)
    assert set(others) <= set(names(tmp_path))
    assert position(load_newest(tmp_path)) == (4, 0)


def test_an_empty_folder_holds_no_run(tmp_path):
    assert load_newest(tmp_path) is None
    assert load_newest(tmp_path / "absent") is None


# --- damage --------------------------------------------------------------------------------------


def flip(path: Path, place: float) -> None:
    """Flip one bit at a share of the file."""
    content = bytearray(path.read_bytes())
    content[min(int(place * len(content)), len(content) - 1)] ^= 4
    path.write_bytes(content)


def cut(path: Path, place: float) -> None:
    """Keep a share of the file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(place * len(content))])


DAMAGE = [(cut, place) for place in (0.0, 0.01, 0.5, 0.999)]
DAMAGE += [(flip, place) for place in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)]


@pytest.fixture
def run_folder(tmp_path):
    """Three checkpoints, the newest with a best model of its own."""
    first = save_best(tmp_path, 0)
    save_checkpoint(tmp_path, payload(1, 0, first), keep=3)
    save_checkpoint(tmp_path, payload(1, 7, first), keep=3)
    save_checkpoint(tmp_path, payload(2, 0, save_best(tmp_path, 1)), keep=3)
    return tmp_path


@pytest.mark.parametrize(("damage", "place"), DAMAGE)
def test_the_one_before_a_damaged_checkpoint_is_used(run_folder, capsys, damage, place):
    newest, second, oldest = list_checkpoints(run_folder)
    for path, expected in ((newest, (1, 7)), (second, (1, 0))):
        damage(path, place)
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            load_verified(path)
        assert position(load_newest(run_folder)) == expected
        assert f"{path} is damaged" in capsys.readouterr().out
        assert position(load_newest(run_folder)) == expected  # and again, in silence
        assert capsys.readouterr().out == ""
        assert path.with_suffix(".damaged").exists() and not path.exists()
    damage(oldest, place)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"all 1 checkpoints in .* damaged"):
            load_newest(run_folder)


@pytest.mark.parametrize(("damage", "place"), DAMAGE[::3])
def test_all_damaged_is_an_error_every_time(run_folder, damage, place):
    """Never a silent new start over a run that somebody may yet repair."""
    for path in list_checkpoints(run_folder):
        damage(path, place)
    before = names(run_folder)
    for _ in range(3):
        with pytest.raises(CheckpointError, match=r"all 3 checkpoints .*delete it to start anew"):
            load_newest(run_folder)
        assert names(run_folder) == before


def test_damaged_ones_do_not_count_among_the_last(run_folder):
    """Else the next save would remove the only sound one."""
    flip(list_checkpoints(run_folder)[0], 0.5)
    saved = load_newest(run_folder)
    save_checkpoint(run_folder, payload(1, 8, saved["best_file"]), keep=2)
    found = [position(load_verified(path)) for path in list_checkpoints(run_folder)]
    assert found == [(1, 8), (1, 7)]


@pytest.mark.parametrize("damage", [lambda p: flip(p, 0.5), lambda p: cut(p, 0.5), Path.unlink])
def test_a_run_outlives_its_best_model(run_folder, capsys, damage):
    """The state is sound, so training goes on; what is lost is said."""
    damage(next(run_folder.glob("best-epoch001-*")))
    saved = load_newest(run_folder)
    assert position(saved) == (2, 0)
    assert saved["best_file"] is None and saved["best_score"] == float("-inf")
    said = capsys.readouterr().out
    assert "best-epoch001" in said and "the best of the epochs to come" in said
    assert not list(run_folder.glob("*.damaged"))


def test_damage_to_both_is_told_apart(run_folder):
    """The newest is set aside, the one before it lacks only its best model and is used."""
    newest, second, _ = list_checkpoints(run_folder)
    for path in (newest, *run_folder.glob("best-*")):
        flip(path, 0.5)
    saved = load_newest(run_folder)
    assert position(saved) == (1, 7) and saved["best_file"] is None
    assert not newest.exists() and second.exists()
    save_checkpoint(run_folder, payload(1, 8), keep=1)
    assert position(load_newest(run_folder)) == (1, 8)


def test_a_complete_run_without_its_best_model_is_an_error(tmp_path):
    save_checkpoint(tmp_path, payload(4, best=save_best(tmp_path, 2), finished="done"), keep=1)
    flip(next(tmp_path.glob("best-*")), 0.5)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="best-epoch002"):
            load_newest(tmp_path)


# --- planted code --------------------------------------------------------------------------------


class Planted:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, form):
    """Its checksum is right: whoever can plant a file can compute one."""
    mark = tmp_path / "mark"
    content = payload(3, model={"w": Planted(mark)})
    buffer = io.BytesIO()
    (torch.save if form == "torch" else pickle.dump)(content, buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()[:16]
    folder = tmp_path / "run"
    save_checkpoint(folder, payload(1), keep=2)
    planted = folder / f"epoch003-step000000-{NO_BEST}-{digest}.pt"
    planted.write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match="more than tensors and plain values"):
        load_verified(planted)
    assert position(load_newest(folder)) == (1, 0)
    assert not mark.exists()


def test_a_foreign_file_of_the_right_name_is_refused(tmp_path):
    save_checkpoint(tmp_path, payload(1), keep=9)
    for number, content in enumerate(([1, 2], "text", None)):
        save_raw(tmp_path, f"epoch{5 + number:03d}-step000000-{NO_BEST}", content)
    assert position(load_newest(tmp_path)) == (1, 0)


def test_a_file_without_permission_is_not_called_damaged(run_folder, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    before = names(run_folder)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(PermissionError, match="epoch002"):
        load_newest(run_folder)
    assert names(run_folder) == before


def test_a_folder_of_that_name_is_no_checkpoint(tmp_path):
    save_checkpoint(tmp_path, payload(1), keep=2)
    (tmp_path / f"epoch002-step000000-{NO_BEST}-{'0' * 16}.pt").mkdir()
    assert position(load_newest(tmp_path)) == (1, 0)


def test_everything_comes_back_bit_for_bit(tmp_path):
    tensors = {
        "weights": torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last),
        "half": torch.randn(7).bfloat16(),
        "count": torch.tensor(2**40),
        "empty": torch.empty(0),
        "odd": torch.tensor([float("nan"), float("-inf"), -0.0]),
    }
    path = save_checkpoint(tmp_path, payload(1, tensors=tensors, text="é", none=None), keep=1)
    saved = load_verified(path)
    for name, tensor in tensors.items():
        assert saved["tensors"][name].dtype == tensor.dtype
        same = saved["tensors"][name].view(-1 if tensor.ndim != 4 else tensor.shape)
        assert torch.equal(torch.nan_to_num(same, 7.0), torch.nan_to_num(tensor.view_as(same), 7.0))
    assert saved["tensors"]["weights"].is_contiguous(memory_format=torch.channels_last)
    assert saved["text"] == "é" and saved["none"] is None


def test_the_name_of_a_checkpoint_says_which_best_model_it_needs(tmp_path, monkeypatch):
    """So that no checkpoint need be opened to learn which best models may go."""
    first, second = save_best(tmp_path, 0), save_best(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", None)  # would raise
        path = save_checkpoint(tmp_path, payload(2, best=second), keep=1)
    assert second.rpartition("-")[2][:8] in path.name
    assert not (tmp_path / first).exists() and (tmp_path / second).exists()
