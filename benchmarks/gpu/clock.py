"""Seconds of work on a device, from a cold cache."""

from __future__ import annotations

import time
from typing import Any

import torch
from timing import Contender, wall_clock


class DeviceClock:
    """CUDA events around the work.

    Before it a buffer of twice the L2 cache is written, so that weights come from memory, as
    they do in a model, and another is read, so that the work does not wait for what was written
    to leave the cache. Then the device is kept busy for a moment, so that the host has enqueued
    all of the work when the first event passes, and its own speed is not measured.
    """

    HEAD_START = 400_000  # cycles, about 0.2 ms

    def __init__(self) -> None:
        l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._written = torch.zeros(2 * l2 // 4, dtype=torch.int32, device="cuda")
        self._read = torch.zeros_like(self._written)
        self.flushed_bytes = 4 * self._written.numel()

    def seconds(self, contender: Contender, i: int) -> float:
        cuda: Any = torch.cuda  # (partly untyped)
        begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
        self._written.fill_(i)
        self._read.max()
        cuda._sleep(self.HEAD_START)
        begin.record()
        contender(i)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    @staticmethod
    def host_seconds(contender: Contender, calls: int = 20) -> float:
        """What one call costs the host, while the device keeps up or not."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for i in range(calls):
            contender(i)
        spent = time.perf_counter() - begin
        torch.cuda.synchronize()
        return spent / calls


class HostClock:
    """The same for the CPU, where dry runs happen: no flush, the wall clock."""

    flushed_bytes = 0

    @staticmethod
    def seconds(contender: Contender, i: int) -> float:
        return wall_clock(contender, i)

    @staticmethod
    def host_seconds(contender: Contender, calls: int = 1) -> float:
        return sum(wall_clock(contender, i) for i in range(calls)) / calls


Clock = DeviceClock | HostClock
