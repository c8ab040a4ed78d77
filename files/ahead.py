"""Items drawn by another thread while the caller is at work: sections to predict, batches to train with."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor


def ahead(items, count=1):
    """The items of an iterable, of which another thread makes up to `count` while the caller is at work with one.

    `items` is never advanced further ahead than that. An error in it arrives after the items before it.

    >>> list(ahead(range(3)))
    [0, 1, 2]
    """
    reader, end = iter(items), object()
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead")
    try:
        coming = deque(pool.submit(next, reader, end) for _ in range(count))
        while (ready := [coming.popleft().result()])[0] is not end:
            coming.append(pool.submit(next, reader, end))
            yield ready.pop()  # so that it is not held here
    finally:
        pool.shutdown(cancel_futures=True)
