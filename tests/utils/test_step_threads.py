"""Threads of steps: a share is taken on the thread that steps, and nowhere else."""

from __future__ import annotations

import threading

import torch

from quire.utils.threads import StepThreads


def test_a_share_is_given_back_on_the_thread_that_took_it():
    before = torch.get_num_threads()
    seen = []

    def steps():
        outer, inner = StepThreads(3), StepThreads(1)
        seen.append(torch.get_num_threads())
        for _ in range(2):
            outer.use()
            inner.use()
            seen.append(torch.get_num_threads())
        inner.give_back()
        seen.append(torch.get_num_threads())
        outer.give_back()
        outer.give_back()
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=steps)
    thread.start()
    thread.join()
    assert seen == [before, 1, 1, 3, before]
    assert torch.get_num_threads() == before
    late = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    late.start()
    late.join()
    assert seen[-1] == before


def test_engines_that_end_in_any_order_leave_later_threads_alone():
    """What one of them has taken is not what the next one gives back."""
    before = torch.get_num_threads()
    seen = []

    def note():
        seen.append(torch.get_num_threads())

    def run(step):
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()

    turns = [threading.Event() for _ in range(4)]

    def engine(count, begins, ends):
        turns[begins].wait()
        threads = StepThreads(count)
        threads.use()
        note()
        turns[begins + 1].set()
        turns[ends].wait()
        threads.give_back()
        note()

    first = threading.Thread(target=engine, args=(before + 1, 0, 2))
    second = threading.Thread(target=engine, args=(before + 2, 1, 3))
    first.start()
    second.start()
    turns[0].set()
    turns[2].wait()
    first.join()
    run(note)
    turns[3].set()
    second.join()
    run(note)
    assert seen == [before + 1, before + 2, before, before, before, before]
