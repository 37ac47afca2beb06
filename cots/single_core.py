"""Threads that compute on one core each.

A small piece of work that one core does alone stays in its caches and waits for nobody. Spread over all cores, every
operator ends with a wait for the slowest of them, which is whichever a decoder or another program has just taken: on a
busy machine that multiplies the time of a short sentence by ten.
"""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch


def single_core_threads(count: int, name: str) -> ThreadPoolExecutor:
    """A pool of `count` threads, in each of which torch uses one core; other threads go on as before."""
    cores = torch.get_num_threads()
    started = Barrier(count + 1)

    def start() -> None:
        torch.get_num_threads()  # a thread's first call takes over the number that was set last, wherever it was set
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix=name)
    try:
        for _ in range(count):
            pool.submit(start)
        started.wait()
    except BaseException:
        started.abort()  # else those that have begun wait for the others for ever, and the end of the program for them
        raise
    finally:
        torch.set_num_threads(cores)
    return pool
