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
