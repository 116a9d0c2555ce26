"""Logs are read in windows; where a window ends must not matter."""

import numpy as np
import pytest

from metastore import MetadataStore, log


@pytest.mark.parametrize("window_size", [48, 56, 200, 1_000, 4_096, 1 << 20])
@pytest.mark.parametrize("threads", [1, 2])
def test_window_ends_do_not_matter(tmp_path, monkeypatch, window_size, threads):
    """A frame across the end of a window once ended the log.

    The reader compared the size of the next window, not that of the frame, with what
    was left of the file: with less than a window left, whole batches behind looked
    like damage.
    """
    rng = np.random.default_rng(7)
    store, _ = MetadataStore.recover(tmp_path)
    expected = {}
    for n_records in (1, 40, 0, 3, 200, 1, 1, 90):
        keys = rng.integers(0, 300, n_records, dtype=np.uint64)
        values = rng.integers(1, 2**64, n_records, dtype=np.uint64)
        store.insert_arrays(keys, values)
        expected.update(zip(keys.tolist(), values.tolist(), strict=True))
    store.shutdown()
    monkeypatch.setattr(log, "_WINDOW_SIZE", window_size)
    store, recovered = MetadataStore.recover(tmp_path, threads=threads)
    store.shutdown()
    assert {key: value for key, value, _ in recovered} == expected
    assert recovered.report.n_batches == 8
    assert recovered.report.is_clean


@pytest.mark.parametrize("window_frames", [1, 2, 5])
def test_window_frames_do_not_matter(tmp_path, monkeypatch, window_frames):
    """The table of a window fills up before its bytes end, also right at a bound."""
    monkeypatch.setattr(log, "_WINDOW_FRAMES", window_frames)
    for first in (0, 5, 10):
        store, recovered = MetadataStore.recover(tmp_path)
        assert len(recovered) == first
        for key in range(first, first + 5):
            store.insert_batch([(key, (key + 1, b""))])
        store.shutdown()
    store, recovered = MetadataStore.recover(tmp_path)
    store.shutdown()
    assert list(recovered) == [(key, key + 1, b"") for key in range(15)]
