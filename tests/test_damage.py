"""Every truncation and every flipped bit of small stores.

Whatever happens to the bytes, a recovery gives back a prefix of the batches or refuses
with an error that names file and offset. Which of both, and which prefix, the oracle
says, that was written from docs/format.md alone.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

import oracle
from disk import Disk, Image
from metastore.errors import CorruptionError
from verbs import (
    Batch,
    State,
    apply,
    content,
    open_image,
    recover_on,
    states,
    without_tail,
    write_on,
)

BATCHES: list[Batch] = [
    [(1, (11, b"one")), (2, (22, b""))],
    [(1, None), (3, (33, b"three"))],
    [(2, (2**40, b"two"))],
    [(4, (44, b"four")), (3, (34, b""))],
]
STATES = states(BATCHES)
NEXT: Batch = [(9, (99, b"next"))]


def sealed(image: Image, batches: list[Batch]) -> Image:
    disk = Disk(image)
    write_on(disk, batches)
    return disk.live_image()


def compacted(image: Image, batches: list[Batch]) -> Image:
    disk = Disk(image)
    store, _ = recover_on(disk)
    for batch in batches:
        store.insert_batch(batch)
    store.compact()
    store.shutdown()
    image = disk.live_image()
    return {name: data for name, data in image.items() if not name.startswith("log")}


def small(image: Image) -> Image:
    """The same store without preallocated zeros, but for a few."""
    return {
        name: without_tail(data) + bytes(16) if name.startswith("log") else data
        for name, data in image.items()
        if oracle.parse_name(name)
    }


STORES = {
    "open-log": lambda: open_image({}, BATCHES),
    "sealed-log": lambda: sealed({}, BATCHES),
    "two-logs": lambda: sealed(sealed({}, BATCHES[:2]), BATCHES[2:]),
    "bounded-log": lambda: open_image(open_image({}, BATCHES[:2]), BATCHES[2:]),
    "snapshot": lambda: compacted({}, BATCHES),
    "snapshot-and-log": lambda: open_image(compacted({}, BATCHES[:2]), BATCHES[2:]),
}


@pytest.fixture(scope="module", params=STORES)
def store_image(request: pytest.FixtureRequest) -> Image:
    image = small(STORES[request.param]())
    assert all(len(data) < 800 for data in image.values())
    assert oracle.read_store(image) == (STATES[-1], len(BATCHES))
    return image


def expected(image: Image) -> State | None:
    """What the oracle reads; None where it says corruption."""
    try:
        return oracle.read_store(image)[0]
    except oracle.OracleError:
        return None


def check(image: Image) -> None:
    """Recover as a user would; if that is refused, go on with a prefix."""
    wanted = expected(image)
    disk = Disk(image)
    if wanted is None:
        with pytest.raises(CorruptionError) as caught:
            recover_on(disk)
        check_refusal(caught.value, image, disk)
        check_prefix(image)
        return
    store, recovered = recover_on(disk)
    store.shutdown()
    assert content(recovered) == wanted == STATES[recovered.report.sequence]
    assert disk.opened == []
    check_bytes_are_kept(image, disk.live_image())


def check_refusal(error: CorruptionError, image: Image, disk: Disk) -> None:
    name = error.path.rpartition("/")[2]
    assert name in image or error.path == "simulated"
    assert 0 <= error.offset <= len(image.get(name, b""))
    assert f"({error.path}, offset {error.offset})" in str(error)
    left = disk.live_image()
    assert {name: left.get(name) for name in image} == image
    assert disk.opened == []


def check_bytes_are_kept(image: Image, left: Image) -> None:
    """What is in no file any more lies under quarantine/."""
    kept = [*left.values(), *left.get("quarantine", {}).values()]
    kept = [data for data in kept if isinstance(data, bytes)]
    for name, data in image.items():
        if left.get(name) == data or not data.strip(b"\0"):
            continue
        frames = data[oracle.FILE_HEADER.size :].rstrip(b"\0")
        assert any(frames in other for other in kept), f"bytes of {name} are gone"


def check_prefix(image: Image) -> None:
    disk = Disk(image)
    store, recovered = recover_on(disk, on_damage="prefix")
    found = content(recovered)
    report = recovered.report
    assert found == STATES[report.sequence]
    assert report.damage
    assert report.quarantined
    check_bytes_are_kept(image, disk.live_image())
    assert store.insert_batch(NEXT) == report.sequence + 1
    store.shutdown()
    store, recovered = recover_on(disk)
    store.shutdown()
    assert content(recovered) == apply(found, NEXT)
    check_bytes_are_kept(image, disk.live_image())


def flips(image: Image) -> Iterator[Image]:
    for name, data in image.items():
        for place, bit in itertools.product(range(len(data)), range(8)):
            yield image | {name: oracle.flip_bit(data, place, bit)}


def truncations(image: Image) -> Iterator[Image]:
    for name, data in image.items():
        for size in range(len(data)):
            yield image | {name: oracle.truncate(data, size)}


def zeroed(image: Image) -> Iterator[Image]:
    """Sixteen bytes, or everything from some place on, are zeros."""
    for name, data in image.items():
        for place in range(0, len(data), 8):
            size = min(16, len(data) - place)
            yield image | {name: oracle.put(data, place, bytes(size))}
            yield image | {name: data[:place] + bytes(len(data) - place)}


def without_a_file(image: Image) -> Iterator[Image]:
    for name in image:
        yield {other: data for other, data in image.items() if other != name}


def test_the_undamaged_store_is_read_whole(store_image):
    check(store_image)


def test_every_truncation(store_image):
    for image in truncations(store_image):
        check(image)


def test_every_byte_with_one_flipped_bit(store_image, rng: random.Random):
    """One bit of each byte; which one depends on the seed."""
    for name, data in store_image.items():
        for place in range(len(data)):
            check(store_image | {name: oracle.flip_bit(data, place, rng.randrange(8))})


@pytest.mark.slow
def test_every_flipped_bit(store_image):
    for image in flips(store_image):
        check(image)


def test_zeros_anywhere(store_image):
    for image in zeroed(store_image):
        check(image)


def test_every_missing_file(store_image):
    for image in without_a_file(store_image):
        check(image)


def test_every_pair_of_files_swapped(store_image):
    for one, two in itertools.combinations(store_image, 2):
        swapped = {one: store_image[two], two: store_image[one]}
        check(store_image | swapped)


def test_every_file_under_another_number(store_image):
    for name, data in store_image.items():
        rest = {other: store_image[other] for other in store_image if other != name}
        check(rest | {f"{name[:-2]}77": data})


@pytest.mark.slow
def test_random_damage_in_several_places(store_image, rng: random.Random):
    for _ in range(5000):
        image = dict(store_image)
        for _ in range(rng.randrange(1, 4)):
            name = rng.choice(sorted(image))
            data = bytearray(image[name])
            start = rng.randrange(len(data))
            stop = min(len(data), start + rng.choice([1, 4, 8, 48, 512]))
            data[start:stop] = rng.choice(
                [rng.randbytes(stop - start), bytes(stop - start), b"", data[:64]]
            )
            image[name] = bytes(data) or b"\0"
        check(image)
