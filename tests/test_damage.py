"""Every truncation and every flipped bit of small stores.

Whatever happens to the bytes, a recovery gives back a prefix of the batches or refuses
with an error that names file and offset. Which of both, and which prefix, the oracle
says, that was written from docs/format.md alone.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

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
    read_image,
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
    store, _ = recover_on(disk, threads=1)
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


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Recovery logs what it dropped, here thousands of times."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


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
            recover_on(disk, threads=1)
        check_refusal(caught.value, image, disk)
        check_prefix(image)
        return
    store, recovered = recover_on(disk, threads=1)
    assert content(recovered) == wanted == STATES[recovered.report.sequence]
    assert store.insert_batch(NEXT) == recovered.report.sequence + 1
    store.shutdown()
    assert disk.opened == []
    check_bytes_are_kept(image, disk.live_image())
    assert read_image(disk.live_image(), threads=1) == apply(wanted, NEXT)


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
    """A prefix is recovered, the rest kept, and nothing is refused any more."""
    disk = Disk(image)
    store, recovered = recover_on(disk, threads=1, on_damage="prefix")
    store.shutdown()
    found = content(recovered)
    report = recovered.report
    assert found == STATES[report.sequence]
    assert report.damage
    assert report.quarantined
    check_bytes_are_kept(image, disk.live_image())
    store, recovered = recover_on(disk, threads=1)
    assert content(recovered) == found
    assert store.insert_batch(NEXT) == report.sequence + 1
    killed = disk.live_image()
    store.shutdown()
    check_bytes_are_kept(image, killed)
    assert read_image(killed, threads=1) == apply(found, NEXT)


def check_each(
    images: Iterable[tuple[str, Image]], counts: Counter[str] | None = None
) -> None:
    for damage, image in images:
        if counts is not None:
            counts["stores"] += 1
        try:
            check(image)
        except BaseException as error:
            error.add_note(f"after this damage: {damage}")
            raise


def truncations(image: Image) -> Iterator[tuple[str, Image]]:
    for name, data in image.items():
        for size in range(len(data)):
            damaged = image | {name: oracle.truncate(data, size)}
            yield f"{name} cut to {size} of {len(data)} bytes", damaged


def flips(
    image: Image, bits: Callable[[], Iterable[int]]
) -> Iterator[tuple[str, Image]]:
    """Flip the bits that `bits` says at each place."""
    for name, data in image.items():
        for place in range(len(data)):
            for bit in bits():
                damaged = image | {name: oracle.flip_bit(data, place, bit)}
                yield f"{name}, offset {place}, bit {bit} flipped", damaged


def zeroed(image: Image) -> Iterator[tuple[str, Image]]:
    """Sixteen bytes, or everything from some place on, are zeros."""
    for name, data in image.items():
        for place in range(0, len(data), 8):
            for size in (16, len(data)):
                size = min(size, len(data) - place)
                damaged = image | {name: oracle.put(data, place, bytes(size))}
                yield f"{name}, offset {place}, {size} zeros", damaged


def rearranged(image: Image) -> Iterator[tuple[str, Image]]:
    for name, data in image.items():
        rest = {other: image[other] for other in image if other != name}
        yield f"{name} is missing", rest
        yield f"{name} has another number", rest | {f"{name[:-2]}77": data}
        yield f"{name} is empty", rest | {name: b""}
    for one, two in itertools.combinations(image, 2):
        yield f"{one}, {two} swapped", image | {one: image[two], two: image[one]}


def randomly_damaged(
    image: Image, rng: random.Random, count: int
) -> Iterator[tuple[str, Image]]:
    """Bytes in up to three places are random, zero, gone, or those of a file header."""
    for _ in range(count):
        damaged = dict(image)
        damage = []
        for _ in range(rng.randrange(1, 4)):
            name = rng.choice(sorted(damaged))
            data = damaged[name]
            start = rng.randrange(len(data) + 1)
            size = min(len(data) - start, rng.choice([1, 4, 8, 48, 512]))
            new = rng.choice([rng.randbytes(size), bytes(size), b"", data[:64]])
            damaged[name] = data[:start] + new + data[start + size :]
            damage.append(f"{name}, offset {start}, {size} bytes: {new!r}")
        yield "; ".join(damage), damaged


def test_the_undamaged_store_is_read_whole(store_image):
    check(store_image)


def test_every_truncation(store_image):
    check_each(truncations(store_image))


def test_every_byte_with_one_flipped_bit(store_image, rng):
    """One bit of each byte; which one depends on the seed."""
    check_each(flips(store_image, lambda: [rng.randrange(8)]))


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_every_flipped_bit(store_image, campaign, request):
    with campaign(f"flipped bits, {request.node.callspec.id}") as counts:
        check_each(flips(store_image, lambda: range(8)), counts)


def test_zeros_anywhere(store_image):
    check_each(zeroed(store_image))


def test_files_that_are_missing_or_in_another_place(store_image):
    check_each(rearranged(store_image))


def test_a_few_random_damages(store_image, rng):
    check_each(randomly_damaged(store_image, rng, 40))


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_many_random_damages(store_image, rng, campaign, request):
    with campaign(f"random damages, {request.node.callspec.id}") as counts:
        check_each(randomly_damaged(store_image, rng, 3000), counts)
