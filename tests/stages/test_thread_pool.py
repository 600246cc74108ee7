"""Who of a pool's threads makes a call."""

import gc
import threading

import pytest

from layerstream.stages.process.thread_pool import ThreadPool


def test_calls_one_after_another_are_made_by_one_thread() -> None:
    """Otherwise each thread would get helpers of OpenMP, and all of these would fall asleep between two operations."""
    pool = ThreadPool(8, "one")
    try:
        used = {pool.submit(threading.get_ident).result(10) for _ in range(20)}
        # Just after its result, a thread has not begun to wait yet, and another one is the last that has.
        assert len(used) <= 4
    finally:
        pool.close()


def test_calls_at_the_same_time_are_made_by_as_many_threads_and_further_ones_wait() -> None:
    pool, go_on = ThreadPool(3, "some"), threading.Event()
    began = [threading.Event() for _ in range(4)]

    def call(number: int) -> int:
        began[number].set()
        go_on.wait(10)
        return number

    try:
        futures = [pool.submit(lambda number=number: call(number)) for number in range(4)]
        assert all(event.wait(10) for event in began[:3])
        assert not began[3].is_set()
        go_on.set()
        assert [future.result(10) for future in futures] == [0, 1, 2, 3]
    finally:
        pool.close()


def test_a_closed_pool_cancels_what_waits_and_takes_nothing_more() -> None:
    pool, go_on, began = ThreadPool(1, "closed"), threading.Event(), threading.Event()

    def call() -> None:
        began.set()
        go_on.wait(10)

    first, second = pool.submit(call), pool.submit(lambda: None)
    assert began.wait(10)
    threading.Timer(0.01, go_on.set).start()
    pool.close()
    assert first.done()
    assert second.cancelled()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(lambda: None)


def test_a_pool_that_is_dropped_makes_the_calls_that_wait_and_ends_its_threads() -> None:
    pool, go_on = ThreadPool(2, "dropped"), threading.Event()
    futures = [pool.submit(lambda: go_on.wait(10)) for _ in range(5)]
    threads = [each for each in threading.enumerate() if each.name.startswith("dropped_")]
    assert len(threads) == 2
    del pool
    gc.collect()
    go_on.set()
    assert all(future.result(10) for future in futures)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
