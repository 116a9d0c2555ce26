"""The background thread: which task runs when, who waits for it, how it ends."""

from __future__ import annotations

import functools
import threading

import pytest

from metastore.compaction import Compactor
from verbs import together

#: Only a test that fails waits so long.
_SECONDS_MAX = 30


@pytest.fixture
def failures():
    return []


@pytest.fixture
def compactor(failures):
    compactor = Compactor(failures.append)
    compactor.start()
    yield compactor
    together(compactor.stop)


class Task:
    """One that lasts until it is let go."""

    def __init__(self):
        self.begun = threading.Event()
        self.may_end = threading.Event()

    def __call__(self):
        self.begun.set()
        assert self.may_end.wait(_SECONDS_MAX)


def begun(compactor, **options):
    task = Task()
    compactor.submit(task, **options)
    assert task.begun.wait(_SECONDS_MAX)
    return task


@pytest.mark.parametrize("inline", [False, True])
def test_tasks_run_in_order_and_so_do_theirs(failures, inline):
    compactor = Compactor(failures.append)
    if not inline:
        compactor.start()
    done = []

    def ask(n):
        done.append(n)
        if n:
            compactor.submit(functools.partial(ask, n - 1))

    compactor.submit(functools.partial(ask, 20))
    compactor.wait_idle()
    assert done == [*range(20, -1, -1)]
    together(*[compactor.wait_idle] * 8)
    compactor.stop()
    compactor.stop()
    together(compactor.wait_idle)
    assert failures == []


def test_who_waits_for_idle_waits_for_what_runs(compactor):
    task = begun(compactor)
    returned = []
    waiting = [
        threading.Thread(target=lambda: returned.append(compactor.wait_idle()))
        for _ in range(3)
    ]
    for thread in waiting:
        thread.start()
    assert returned == []
    task.may_end.set()
    for thread in waiting:
        thread.join(_SECONDS_MAX)
    assert len(returned) == 3


def test_a_stop_drops_what_waits_and_frees_who_waits_for_it(compactor):
    task, done = begun(compactor), []
    compactor.submit(lambda: done.append("dropped"))
    waiting = threading.Thread(target=compactor.wait_idle, daemon=True)
    waiting.start()
    stopping = threading.Thread(target=compactor.stop, daemon=True)
    stopping.start()
    while not compactor._is_stopping:
        pass
    task.may_end.set()
    for thread in (waiting, stopping):
        thread.join(_SECONDS_MAX)
        assert not thread.is_alive()
    assert done == []


def test_no_task_follows_one_that_failed(compactor, failures):
    error, done = KeyError("planted"), []
    task = Task()

    def fail():
        task()
        raise error

    compactor.submit(fail)
    compactor.submit(lambda: done.append("dropped"))
    task.may_end.set()
    together(compactor.wait_idle)
    assert (failures, done) == ([error], [])


def test_nobody_waits_for_a_thread_that_could_not_tell_its_failure(monkeypatch):
    def refuse(error):
        raise RuntimeError("not told") from error

    raised = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    compactor, done = Compactor(refuse), []
    compactor.start()
    compactor.submit(lambda: 1 // 0)
    together(compactor.wait_idle)
    together(functools.partial(compactor.stop_then, lambda: done.append("last")))
    together(compactor.stop)
    assert done == ["last"]
    assert [str(args.exc_value) for args in raised] == ["not told"]


def test_the_last_is_done_at_once_if_nothing_runs(compactor):
    done = []
    for n in range(3):  # the thread has ended from the second on
        compactor.stop_then(functools.partial(done.append, n))
        assert done == [*range(n + 1)]


def test_the_last_of_an_inline_one(failures):
    compactor, done = Compactor(failures.append), []
    compactor.submit(
        lambda: (compactor.stop_then(lambda: done.append("last")), done.append("task"))
    )
    assert done == ["task", "last"]
    compactor.submit(lambda: done.append("dropped"))
    assert done == ["task", "last"]


def test_a_long_task_is_not_waited_for_and_the_last_follows_it(compactor):
    task, done = begun(compactor), []
    compactor.stop_then(lambda: done.append(threading.current_thread()))
    assert done == []
    task.may_end.set()
    together(compactor.stop)
    assert done == [compactor._thread]


def test_a_brief_task_is_waited_for(compactor):
    task, done = begun(compactor, is_brief=True), []
    asking = threading.Thread(
        target=compactor.stop_then, args=(lambda: done.append("last"),)
    )
    asking.start()
    while not compactor._is_stopping:
        pass
    assert done == []
    task.may_end.set()
    asking.join(_SECONDS_MAX)
    assert done == ["last"]


def test_a_task_may_stop_its_own_thread(compactor, failures):
    done = []
    has_begun = threading.Event()

    def task():
        has_begun.set()  # else it might be dropped
        compactor.stop()
        compactor.stop_then(lambda: done.append("last"))
        done.append("task")

    compactor.submit(task)
    assert has_begun.wait(_SECONDS_MAX)
    together(compactor.stop)
    assert (done, failures) == (["task", "last"], [])


def test_the_last_of_many_is_done_once_whoever_ends(failures):
    for _ in range(200):
        compactor, done = Compactor(failures.append), []
        compactor.start()
        compactor.submit(lambda: None)
        together(
            *(
                functools.partial(
                    compactor.stop_then, functools.partial(done.append, n)
                )
                for n in range(3)
            ),
            compactor.wait_idle,
        )
        compactor.stop()
        assert sorted(done) == [0, 1, 2]
    assert failures == []
