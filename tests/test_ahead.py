"""Items drawn by another thread: how many at most, by whom, and what becomes of errors and of the thread."""

import gc
import threading
import time
import weakref

import numpy as np
import pytest

from files.ahead import ahead


class Watched(np.ndarray):
    """An array that can be held in a set."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


class Stack:
    """A lazy stack that knows how many of its sections are alive, with the predictions made of them."""

    def __init__(self, count):
        self.count, self.read, self.alive, self.most, self.threads = count, 0, weakref.WeakSet(), 0, set()

    def __iter__(self):
        for index in range(self.count):
            section = np.full((4, 4), index, np.float32).view(Watched)
            self.alive.add(section)
            self.most = max(self.most, len(self.alive))
            self.read += 1
            self.threads.add(threading.current_thread())
            yield section
            del section


@pytest.mark.parametrize("count", [3, 40])
def test_sections_alive_do_not_grow_with_the_stack(count):
    """And the next one is read, by another thread, while one is predicted."""
    stack = Stack(count)

    def predict_one(section):
        end = time.monotonic() + 10
        while stack.read < min(section[0, 0] + 2, count):
            assert time.monotonic() < end, "the next section was not read"
        return np.asarray(section) + 1

    for index, prediction in enumerate(map(predict_one, ahead(stack))):
        assert prediction[0, 0] == index + 1
        assert len(stack.alive) <= 1, "while the caller writes, only the next section may be held"
    gc.collect()
    assert (stack.read, len(stack.alive)) == (count, 0)
    assert stack.most <= 2
    assert threading.current_thread() not in stack.threads


def test_what_is_handed_over_is_not_kept_no_more_is_made_when_the_caller_stops_and_errors_arrive_in_their_turn():
    stack = Stack(10)
    items = ahead(stack)
    for _ in range(2):
        kept = weakref.ref(next(items))
        gc.collect()
        assert kept() is None
    items.close()
    assert stack.read <= 3

    def sections():
        yield np.zeros((2, 2))
        raise OSError("page 1 is truncated")

    items = ahead(sections())
    assert next(items).shape == (2, 2)
    with pytest.raises(OSError, match="page 1 is truncated"):
        next(items)


def test_several_items_are_drawn_ahead_by_a_thread_that_ends_with_them():
    drawn, threads = [], threading.active_count()

    def batches(count):
        for number in range(count):
            if number == 9:
                raise MemoryError("too large")
            drawn.append(number)
            yield number

    assert list(ahead(batches(5), 3)) == [0, 1, 2, 3, 4]
    with pytest.raises(MemoryError, match="too large"):
        list(ahead(batches(20), 3))
    drawn.clear()
    some = ahead(batches(9), 3)
    assert (next(some), next(some)) == (0, 1)
    some.close()
    assert len(drawn) <= 5, "no more than asked for"
    assert threading.active_count() == threads
