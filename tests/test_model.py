"""The store against a dict, under Hypothesis: reopen, crash, compact and damage.

METASTORE_MODEL_HISTORIES
    How many histories the campaign (``-m slow``) makes (3000).
"""

from __future__ import annotations

import contextlib
import os

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import oracle
from disk import Disk, Image
from metastore.errors import CorruptionError
from verbs import Batch, apply, batches_in, content, newest_log, recover_on

N_HISTORIES_LONG = int(os.environ.get("METASTORE_MODEL_HISTORIES", "3000"))

# Few keys, so that batches meet; the ends of the range among them.
KEYS = st.one_of(st.integers(0, 12), st.sampled_from([2**32, 2**63, 2**64 - 1]))
VALUES = st.one_of(st.integers(1, 3), st.just(2**64 - 1))
USER_DATA = st.one_of(st.binary(max_size=12), st.just(b"\0" * 40), st.just(b"x" * 700))
RECORDS = st.tuples(KEYS, st.one_of(st.none(), st.tuples(VALUES, USER_DATA)))
BATCHES = st.lists(RECORDS, max_size=8)


class StoreMachine(RuleBasedStateMachine):
    """`states[n]` is the content after batch n; `durable` counts what must survive."""

    @initialize(
        log_size_bytes_min=st.sampled_from([1, 300, 2000, 1 << 20]),
        threads=st.sampled_from([1, 2]),
    )
    def begin(self, log_size_bytes_min: int, threads: int) -> None:
        self.options = {"log_size_bytes_min": log_size_bytes_min, "threads": threads}
        self.disk = Disk()
        self.states = [{}]
        self.durable = 0
        self.open()

    def open(self) -> None:
        self.store, recovered = recover_on(self.disk, **self.options)
        found = content(recovered)
        assert recovered.report.sequence == len(self.states) - 1
        assert found == self.states[-1]
        assert recovered.keys.tolist() == sorted(found)
        assert {key: recovered.get(key) for key in found} == found
        self.durable = len(self.states) - 1

    def committed(self, sequence: int, batch: Batch, sync: bool) -> None:
        self.states.append(apply(self.states[-1], batch))
        assert sequence == len(self.states) - 1
        if sync:
            self.durable = sequence

    @rule(batch=BATCHES, sync=st.booleans())
    def insert_batch(self, batch: Batch, sync: bool) -> None:
        self.committed(self.store.insert_batch(batch, sync=sync), batch, sync)

    @rule(batch=BATCHES, sync=st.booleans(), bare=st.booleans())
    def insert_arrays(self, batch: Batch, sync: bool, bare: bool) -> None:
        rows = [(key, *(new or (0, b""))) for key, new in batch]
        if bare:
            rows = [(key, value, b"") for key, value, _ in rows]
        keys = np.array([key for key, _, _ in rows], np.uint64)
        values = np.array([value for _, value, _ in rows], np.uint64)
        offsets = user_data = None
        if not bare:
            sizes = [len(data) for _, _, data in rows]
            offsets = np.cumsum([0, *sizes]).astype(np.uint64)
            joined = b"".join(data for _, _, data in rows)
            user_data = np.frombuffer(joined, np.uint8)
        sequence = self.store.insert_arrays(keys, values, offsets, user_data, sync=sync)
        same = [(key, (value, data) if value else None) for key, value, data in rows]
        self.committed(sequence, same, sync)

    @rule(bad=st.sampled_from([(-1, None), (1, (0, b"")), (1, ("1", b""))]))
    def bad_batch(self, bad: object) -> None:
        with pytest.raises((TypeError, ValueError, OverflowError)):
            self.store.insert_batch([(1, (1, b"never")), bad])

    @rule()
    def sync(self) -> None:
        self.store.sync()
        self.durable = len(self.states) - 1

    @rule()
    def compact(self) -> None:
        self.store.compact()
        self.durable = len(self.states) - 1

    @rule()
    def reopen(self) -> None:
        self.store.shutdown()
        assert self.disk.opened == []
        self.open()

    def leave(self, image: Image) -> None:
        """Go on with what a crash left; the old store ends on its own disk."""
        old, self.disk = self.store, Disk(image)
        with contextlib.suppress(OSError):
            old.shutdown()

    @rule()
    def kill(self) -> None:
        self.leave(self.disk.live_image())
        self.open()

    @rule()
    def lose_power(self) -> None:
        """What was not synced is lost; a prefix is left, with all that was durable."""
        self.leave(self.disk.durable_image())
        store, recovered = recover_on(Disk(self.disk.live_image()), **self.options)
        store.shutdown()
        left = recovered.report.sequence
        assert self.durable <= left < len(self.states)
        del self.states[left + 1 :]
        self.open()

    @rule(garbage=st.binary(min_size=1, max_size=100))
    def garbage_behind_the_last_frame(self, garbage: bytes) -> None:
        """A torn tail in the place of the zeros is dropped, whatever its bytes."""
        image = self.disk.live_image()
        name = newest_log(image)
        found = batches_in(image[name])
        end = found[-1].end if found else oracle.FILE_HEADER.size
        image[name] = image[name][:end] + garbage
        self.leave(image)
        self.open()

    @precondition(lambda self: self.durable == len(self.states) - 1)
    @rule(data=st.data())
    def damage_of_the_last_frame(self, data: st.DataObject) -> None:
        """Looks like a torn write, if nothing behind it says that it was durable."""
        image = self.disk.live_image()
        name = newest_log(image)
        found = batches_in(image[name])
        if not found:
            return
        last = found[-1]
        place = data.draw(st.integers(last.offset, last.payload_end - 1))
        image[name] = oracle.flip_bit(image[name], place, data.draw(st.integers(0, 7)))
        self.leave(image)
        del self.states[-1]
        self.open()

    @rule(data=st.data())
    def damage_before_the_last_frame(self, data: st.DataObject) -> None:
        """Refused, without a change, and whole again once the damage is undone."""
        image = self.disk.live_image()
        name = newest_log(image)
        found = batches_in(image[name])
        durable = max((span.durable for span in found), default=0)
        damaged = [span for span in found if span.sequence <= durable]
        if not damaged:
            return
        span = data.draw(st.sampled_from(damaged))
        place = data.draw(st.integers(span.offset, span.end - 1))
        bad = image | {name: oracle.flip_bit(image[name], place)}
        disk = Disk(bad)
        with pytest.raises(CorruptionError) as caught:
            recover_on(disk, **self.options)
        assert name in caught.value.path
        assert span.offset <= caught.value.offset < span.end
        left = disk.live_image()
        assert {name: left[name] for name in bad} == bad
        assert disk.opened == []

    @invariant()
    def stats_agree(self) -> None:
        stats = self.store.stats()
        assert stats.sequence == len(self.states) - 1
        assert self.durable <= stats.sequence_durable <= stats.sequence
        assert stats.failure is None

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.shutdown()
            self.open()
            self.store.shutdown()


TestStore = StoreMachine.TestCase
TestStore.settings = hypothesis.settings(
    hypothesis.settings.get_profile("metastore"),
    max_examples=60,
    stateful_step_count=30,
)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_long_histories(rng, campaign):
    settings = hypothesis.settings(
        hypothesis.settings.get_profile("metastore"),
        max_examples=N_HISTORIES_LONG,
        stateful_step_count=60,
    )
    with campaign("histories against a dict") as counts:

        @hypothesis.seed(rng.randrange(2**32))
        class CountedMachine(StoreMachine):
            def teardown(self) -> None:
                counts["histories"] += 1
                counts["batches"] += len(getattr(self, "states", [{}])) - 1
                super().teardown()

        run_state_machine_as_test(CountedMachine, settings=settings)
