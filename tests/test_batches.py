"""From stored images to batches: the right images, in an order without memory, fetched ahead."""

import gc
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from small_run import file_datasets, listed
from torch.utils.data import DataLoader

from emotion_toolbox.batches import (
    Batch,
    EmotionDataset,
    batch_slices,
    fetch_ahead,
    make_datasets,
    steps_per_epoch,
    training_order,
)
from emotion_toolbox.decoding import decode_image
from emotion_toolbox.errors import DataError
from emotion_transfer.commands.train import open_data
from emotion_transfer.config import EnhancedConfig

Config = Callable[..., EnhancedConfig]
CPU = torch.device("cpu")


@pytest.fixture
def train(tiny_config: Config) -> EmotionDataset:
    return file_datasets(tiny_config())["train"]


class Feed:
    """A data set whose batches come from any iterable."""

    def __init__(self, source: Iterable[Batch]) -> None:
        self.source = iter(source)

    def batch(self, positions: object) -> Batch:
        return next(self.source)


def fetch(source: Iterable[Batch], count: int = 1000, depth: int = 2) -> Generator[Batch]:
    slices = [np.arange(2)] * count
    return fetch_ahead(Feed(source), slices, CPU, depth)  # type: ignore[arg-type]


def fetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("fetch-ahead")]


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ------------------------------------------------------------------- datasets


@pytest.mark.parametrize("cache", [True, False])
def test_a_batch_is_what_the_files_hold(tiny_config: Config, cache: bool) -> None:
    cfg = tiny_config(CACHE=cache)
    decoded, datasets = open_data(cfg, listed(cfg))
    for name, dataset in datasets.items():
        split = decoded.data.splits[name]
        assert len(dataset) == len(split) and dataset.classes == decoded.data.classes
        chosen = [3, 0, len(split) - 1, 3]
        images, labels, positions = dataset.batch(chosen)
        assert images.dtype == torch.uint8 and images.shape == (4, 3, 37, 37)
        assert labels.dtype == positions.dtype == torch.int64
        for row, position in enumerate(chosen):
            direct = decode_image(split.path(position).read_bytes(), 37)
            np.testing.assert_array_equal(images[row].permute(1, 2, 0).numpy(), direct)
        np.testing.assert_array_equal(labels.numpy(), split.labels[chosen])
        assert positions.tolist() == chosen


def test_a_batch_is_channels_last_and_its_own_memory(train: EmotionDataset) -> None:
    images, labels, _ = train.batch([1, 2, 3])
    assert images.is_contiguous(memory_format=torch.channels_last)
    before = train.batch([1, 2, 3])
    images.zero_()
    labels.fill_(9)
    assert same(train.batch([1, 2, 3]), before)


@pytest.mark.parametrize("cache", [True, False])
def test_one_at_a_time_is_the_same_as_together(tiny_config: Config, cache: bool) -> None:
    cfg = tiny_config(CACHE=cache)
    train = file_datasets(cfg)["train"]
    together = train.batch(list(range(len(train))))
    for i in range(len(train)):
        image, label = train[i]
        assert image.shape == (3, 37, 37) and label.ndim == 0
        assert torch.equal(image, together.images[i]) and label == together.labels[i]
    for wrong in (len(train), -len(train) - 1):
        with pytest.raises(IndexError):
            train[wrong]
    assert len(list(train)) == len(train)  # Python's own iteration ends at the IndexError


def test_the_default_loader_of_pytorch_works_too(train: EmotionDataset) -> None:
    loader: DataLoader[Any] = DataLoader(train, batch_size=5)
    found = list(loader)
    assert [len(labels) for _, labels in found] == [5, 5, 5, 5, 4]
    together = train.batch(list(range(24)))
    assert torch.equal(torch.cat([images for images, _ in found]), together.images)


def test_pictures_are_the_images_for_people(train: EmotionDataset) -> None:
    found = train.pictures([4, 2])
    assert found.shape == (2, 37, 37, 3) and found.dtype == np.uint8
    assert torch.equal(torch.from_numpy(found).permute(0, 3, 1, 2), train.batch([4, 2]).images)


@pytest.mark.parametrize("most", [1, 5, 11, 12, 99])
def test_some_of_each_split_are_taken_from_all_over_it(tiny_config: Config, most: int) -> None:
    decoded, whole = open_data(tiny_config(), listed(tiny_config()))
    few = make_datasets(decoded, most)
    for name, dataset in few.items():
        count = len(whole[name])
        chosen = np.linspace(0, count - 1, min(most, count)).round().astype(int)
        assert list(dataset.split.files) == [whole[name].split.files[i] for i in chosen]
        everything = dataset.batch(list(range(len(dataset))))
        assert torch.equal(everything.images, whole[name].batch(chosen).images)
        assert torch.equal(everything.labels, whole[name].batch(chosen).labels)


def test_debug_takes_two_batches(tiny_config: Config) -> None:
    cfg = tiny_config(DEBUG=True, BATCH_SIZE=5)
    assert [len(dataset) for dataset in file_datasets(cfg).values()] == [10, 10, 10]


@pytest.mark.parametrize("cache", [True, False])
def test_unusable_images_are_passed_over(tiny_config: Config, cache: bool) -> None:
    cfg = tiny_config(CACHE=cache, MAX_BAD_FRACTION=0.2)
    data = listed(cfg)
    for i in (0, 5):
        data.splits["train"].path(i).write_bytes(b"broken")
    train = open_data(cfg, data)[1]["train"]
    assert len(train) == 22
    everything = train.batch(list(range(22)))
    good = [i for i in range(24) if i not in (0, 5)]
    assert list(train.split.files) == [data.splits["train"].files[i] for i in good]
    np.testing.assert_array_equal(everything.labels.numpy(), data.splits["train"].labels[good])
    for row, i in enumerate(good):
        direct = decode_image(data.splits["train"].path(i).read_bytes(), 37)
        np.testing.assert_array_equal(everything.images[row].permute(1, 2, 0).numpy(), direct)


def test_an_image_that_becomes_unusable_is_named(tiny_config: Config) -> None:
    cfg = tiny_config(CACHE=False)
    train = file_datasets(cfg)["train"]
    train.split.path(4).write_bytes(b"broken")
    with pytest.raises(DataError, match=r"train\.csv row 6 \(train/joy_004\.jpg\) has become"):
        train.batch([3, 4])
    train.split.path(4).unlink()
    with pytest.raises(DataError, match="has become unusable: missing"):
        train[4]


# ------------------------------------------------------------------- order


def order_of(cfg: EnhancedConfig, labels: npt.NDArray[Any], epoch: int) -> npt.NDArray[np.int64]:
    balanced = cfg.BALANCE == "sampler"
    return training_order(labels, cfg.BATCH_SIZE, seed=cfg.SEED, epoch=epoch, balanced=balanced)


@pytest.mark.parametrize("n", [4, 5, 7, 8, 24, 101])
@pytest.mark.parametrize("batch", [2, 4])
def test_an_epoch_shows_each_image_once_in_whole_batches(
    tiny_config: Config, n: int, batch: int
) -> None:
    cfg = tiny_config(BATCH_SIZE=batch)
    order = order_of(cfg, np.arange(n) % 3, 2)
    steps = n // batch
    assert steps_per_epoch(n, batch) == steps
    assert len(order) == steps * batch and len(set(order.tolist())) == len(order)
    assert set(order.tolist()) <= set(range(n))
    slices = batch_slices(order, batch)
    assert [len(part) for part in slices] == [batch] * steps
    assert [i for part in slices for i in part] == order.tolist()


def test_every_image_has_its_turn(tiny_config: Config) -> None:
    """The images that an epoch leaves out are others in the next."""
    cfg = tiny_config(BATCH_SIZE=4)
    labels = np.zeros(7, np.int64)
    shown = [set(order_of(cfg, labels, epoch).tolist()) for epoch in range(12)]
    assert len({frozenset(s) for s in shown}) > 3 and set.union(*shown) == set(range(7))


@pytest.mark.parametrize("balance", ["weights", "none", "sampler"])
def test_the_order_depends_on_seed_and_epoch_alone(tiny_config: Config, balance: str) -> None:
    labels = np.arange(40) % 3
    cfg = tiny_config(BALANCE=balance)
    first = order_of(cfg, labels, 3)
    np.random.seed(5)
    torch.manual_seed(5)
    np.testing.assert_array_equal(order_of(cfg, labels, 3), first)
    assert (order_of(cfg, labels, 4) != first).any()
    assert (order_of(tiny_config(BALANCE=balance, SEED=7), labels, 3) != first).any()


def test_the_order_is_no_order(tiny_config: Config) -> None:
    """Every image is equally likely at every place: a chi-squared test of 600 epochs."""
    cfg = tiny_config(BATCH_SIZE=2)
    orders = np.stack([order_of(cfg, np.zeros(8, np.int64), e) for e in range(600)])
    counts = np.stack([np.bincount(orders[:, place], minlength=8) for place in range(8)])
    statistic = ((counts - 75.0) ** 2 / 75).sum()  # 49 degrees of freedom
    assert 20 < statistic < 95


def test_the_sampler_balances_the_classes(tiny_config: Config) -> None:
    cfg = tiny_config(BALANCE="sampler", BATCH_SIZE=10)
    labels = np.repeat([0, 1, 2], [900, 90, 10])
    order = order_of(cfg, labels, 0)
    assert len(order) == 1000
    shares = np.bincount(labels[order], minlength=3) / 1000
    assert np.abs(shares - 1 / 3).max() < 4 * np.sqrt(2 / 9 / 1000)  # four standard deviations
    rare = np.bincount(order[labels[order] == 2] - 990, minlength=10)
    assert rare.min() > 10  # every image of the rare class, many times
    plain = order_of(tiny_config(BALANCE="none", BATCH_SIZE=10), labels, 0)
    assert np.bincount(labels[plain]).tolist() == [900, 90, 10]


@pytest.mark.parametrize("first", [0, 1, 3, 5, 6])
def test_resuming_gives_the_batches_of_the_tail(
    tiny_config: Config, train: EmotionDataset, first: int
) -> None:
    order = order_of(tiny_config(), train.split.labels, 1)
    whole = list(fetch_ahead(train, batch_slices(order, 4), CPU))
    tail = list(fetch_ahead(train, batch_slices(order, 4, first), CPU))
    assert len(whole) == 6 and len(tail) == 6 - first
    assert all(same(a, b) for a, b in zip(whole[first:], tail, strict=True))


def test_slices_of_an_evaluation_keep_the_ragged_end(train: EmotionDataset) -> None:
    slices = batch_slices(np.arange(24), 7)
    assert [len(part) for part in slices] == [7, 7, 7, 3]
    positions = torch.cat([b.positions for b in fetch_ahead(train, slices, CPU)])
    assert positions.tolist() == list(range(24))
    assert batch_slices(np.arange(0), 7) == [] and batch_slices(np.arange(5), 7, 1) == []


def test_a_batch_larger_than_the_data() -> None:
    message = "24 training images do not fill one batch; set BATCH_SIZE to 24 or less"
    with pytest.raises(DataError, match=message):
        steps_per_epoch(24, 32)
    with pytest.raises(DataError, match=message):
        training_order(np.zeros(24, np.int64), 32, seed=0, epoch=0)
    assert steps_per_epoch(24, 24) == 1


# ------------------------------------------------------------------- fetching ahead


def batches(count: int) -> list[Batch]:
    return [
        Batch(torch.full((2, 3, 4, 4), i, dtype=torch.uint8), torch.tensor([i, i]), torch.arange(2))
        for i in range(count)
    ]


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 50])
def test_all_batches_come_in_order(count: int, depth: int) -> None:
    given = batches(count)
    got = list(fetch(given, count, depth))
    assert len(got) == count and all(same(a, b) for a, b in zip(given, got, strict=True))
    assert not fetch_threads()


def test_over_real_images(train: EmotionDataset) -> None:
    got = list(fetch_ahead(train, batch_slices(np.arange(24), 5), CPU))
    assert torch.cat([b.positions for b in got]).tolist() == list(range(24))
    assert all(b.images.is_contiguous(memory_format=torch.channels_last) for b in got)


def test_it_fetches_ahead_but_not_further_than_asked() -> None:
    made: list[int] = []

    def source() -> Iterator[Batch]:
        for i, batch in enumerate(batches(20)):
            made.append(i)
            yield batch

    fetched = fetch(source(), depth=3)
    next(fetched)
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 4  # one consumed, three ready
    fetched.close()
    assert not fetch_threads()


class Trouble(Exception):
    pass


@pytest.mark.parametrize("error", [Trouble("here"), DataError("file and row"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_an_exception_comes_where_its_batch_was_due(error: BaseException, after: int) -> None:
    def source() -> Iterator[Batch]:
        yield from batches(after)
        raise error

    got: list[Batch] = []
    with pytest.raises(type(error)) as caught:
        got.extend(fetch(source()))
        pytest.fail("no exception")
    assert caught.value is error
    assert not fetch_threads()


def test_the_batches_before_an_exception_are_delivered() -> None:
    def source() -> Iterator[Batch]:
        yield from batches(3)
        raise Trouble

    fetched = fetch(source())
    assert [int(next(fetched).labels[0]) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(Trouble):
        next(fetched)
    with pytest.raises(StopIteration):
        next(fetched)


def test_no_thread_is_left_when_the_consumer_stops() -> None:
    for stop_after in (0, 1, 2):
        fetched = fetch(batches(30), 30)
        for _ in range(stop_after):
            next(fetched)
        fetched.close()
        assert not fetch_threads()
    for _ in fetch(batches(30), 30):
        break
    gc.collect()
    assert not fetch_threads()


def test_no_thread_is_left_when_the_consumer_fails() -> None:
    with pytest.raises(ZeroDivisionError):
        for _ in fetch(batches(30), 30):
            1 / 0  # noqa: B018
    gc.collect()
    assert not fetch_threads()


def test_no_thread_starts_before_the_first_batch_is_asked_for() -> None:
    fetched = fetch(batches(3), 3)
    assert not fetch_threads()
    fetched.close()


def test_stopping_waits_for_no_more_than_the_batch_in_work() -> None:
    made: list[int] = []

    def source() -> Iterator[Batch]:
        for i, batch in enumerate(batches(100)):
            time.sleep(0.01)
            made.append(i)
            yield batch

    fetched = fetch(source())
    next(fetched)
    fetched.close()
    assert len(made) < 10 and not fetch_threads()


def test_many_in_a_row_leave_no_thread(train: EmotionDataset) -> None:
    before = threading.active_count()
    for epoch in range(20):
        order = np.random.default_rng(epoch).permutation(24)
        for i, _ in enumerate(fetch_ahead(train, batch_slices(order, 4), CPU)):
            if i == epoch % 6:
                break
    gc.collect()
    assert threading.active_count() <= before


def test_a_failure_of_the_copy_is_raised_too() -> None:
    class Unmovable(torch.Tensor):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            raise Trouble("the device is lost")

    batch = batches(1)[0]
    broken = Batch(batch.images.as_subclass(Unmovable), batch.labels, batch.positions)
    with pytest.raises(Trouble, match="the device is lost"):
        list(fetch([broken], 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_bytes_arrive(train: EmotionDataset) -> None:
    cuda = torch.device("cuda")
    slices = batch_slices(np.arange(24), 5)
    there = list(fetch_ahead(train, slices, cuda))
    here = list(fetch_ahead(train, slices, CPU))
    assert all(batch.images.device.type == "cuda" for batch in there)
    assert all(torch.equal(a.images.cpu(), b.images) for a, b in zip(there, here, strict=True))


def test_loading_draws_no_random_number(train: EmotionDataset) -> None:
    before = torch.get_rng_state()
    for _ in range(2):
        list(fetch_ahead(train, batch_slices(np.arange(24), 5), CPU))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_loader_asks_for_whole_batches_at_once(tiny_config: Config) -> None:
    asked: list[npt.NDArray[np.int64]] = []

    class Source:
        def __getitem__(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
            asked.append(index)
            return np.zeros((len(index), 8, 8, 3), np.uint8)

    split = listed(tiny_config()).splits["train"]
    classes: Sequence[str] = ("calm", "joy", "rage")
    slices = [np.array([4, 2]), np.array([7])]
    list(fetch_ahead(EmotionDataset(split, classes, Source()), slices, CPU))
    assert [index.tolist() for index in asked] == [[4, 2], [7]]
