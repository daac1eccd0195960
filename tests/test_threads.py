"""A team of threads: what it gives, in which order, with whose settings; and who has BLAS's."""

import multiprocessing
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

from tinygrad_llm import threads


def blas():
    (n,) = {b["num_threads"] for b in threadpool_info() if b["user_api"] == "blas"}
    return n


@given(st.lists(st.integers()), st.integers(1, 4))
def test_it_is_map_whoever_computes(items, n):
    with threads.team(n):
        assert threads.share(lambda i: i * i, iter(items)) == [i * i for i in items]


def test_every_thread_of_the_team_takes_part_and_no_other():
    every, names = threading.Barrier(3), set()

    def meet(_):
        every.wait(timeout=60)  # passes only when three threads are here
        names.add(threading.current_thread())

    with threads.team(3):
        for _ in range(5):
            threads.share(meet, range(3))
    assert len(names) == 3
    assert threading.current_thread() in names


def test_what_a_thread_raises_is_raised_when_all_have_stopped():
    every, done = threading.Barrier(3), []

    def fails(i):
        every.wait(timeout=60)
        done.append(i)
        raise ValueError(f"item {i}")

    with threads.team(3):
        with pytest.raises(ValueError, match="item"):
            threads.share(fails, range(3))
        assert sorted(done) == [0, 1, 2]
        assert threads.share(abs, [-1, -2]) == [1, 2]


def test_nothing_is_shared_out_twice_nor_outside():
    def inner(_):
        return threads.size(), threading.current_thread()

    def outer(_):
        return threads.share(inner, range(3))

    with threads.team(2):
        assert threads.size() == 2
        for found in threads.share(outer, range(4)):
            assert {n for n, _ in found} == {1}
            assert len({thread for _, thread in found}) == 1
        with threads.team(3):
            assert threads.size() == 3
        assert threads.size() == 2
    assert threads.size() == 1


@pytest.mark.parametrize("n", [2, 3])
def test_one_at_a_time_is_alone(n):
    every, inside, most = threading.Barrier(n), [], []

    def visit(_):
        every.wait(timeout=60)  # all are here
        for _ in range(100):
            with threads.alone():
                inside.append(None)
                np.exp(np.zeros(10_000))  # lets the others go on
                most.append(len(inside))
                inside.pop()

    with threads.team(n):
        threads.share(visit, range(n))
    assert most == [1] * 100 * n


def test_who_computes_alone_waits_for_nobody():
    with threads.alone(), threads.alone():
        pass


def test_numpys_settings_are_the_callers():
    every, one = threading.Barrier(2), np.float32([1])

    def divide(_):
        every.wait(timeout=60)
        return one / 0

    with threads.team(2), np.errstate(divide="ignore"):
        assert np.isinf(threads.share(divide, range(2))).all()
    with threads.team(2), np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        threads.share(divide, range(2))


def test_a_team_may_have_a_team():
    def outer(i):
        with threads.team(2):
            return sum(threads.share(abs, [-i, -i]))

    with threads.team(2):
        assert threads.share(outer, range(4)) == [0, 2, 4, 6]


def test_nothing_more_is_begun_after_an_error():
    begun = []

    def fails(i):
        begun.append(i)
        raise KeyboardInterrupt

    with threads.team(2), pytest.raises(KeyboardInterrupt):
        threads.share(fails, range(1000))
    assert len(begun) <= 2


@pytest.mark.parametrize("n", [0, -1, 1.5, "two", True, None])
def test_what_is_no_number_of_threads(n):
    expected = f"threads must be a whole number, at least 1, got {n!r}"
    with pytest.raises(ValueError, match=expected), threads.team(n):
        pass
    assert threads.size() == 1


@pytest.mark.parametrize("before", [1, 2])
def test_blas_has_one_thread_beside_a_team_and_then_what_it_had(before):
    with threadpool_limits(before, "blas"):
        with threads.team(2):
            assert blas() == 1
        assert blas() == before


def in_child(queue):
    with threads.team(2):
        queue.put(threads.share(abs, [-1, -2, -3]))


def test_a_forked_process_has_a_team_of_its_own():
    with threads.team(2):
        threads.share(abs, [-1, -2])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=in_child, args=(queue,), daemon=True)
    child.start()
    assert queue.get(timeout=60) == [1, 2, 3]
    child.join(60)
