"""Reading, quantizing and writing at the same time, with two weights in memory.

While the processor's cores quantize one weight, one thread reads the next and another writes
the last result. What is copied goes through in pieces.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hqqlora.command.errors import UsageError
from hqqlora.command.safetensors_file import FileLayout, FileWriter, total_bytes
from hqqlora.command.stored_matrix import PIECE, Matrix
from hqqlora.files import naming, replacing_file
from hqqlora.quantize_command.correction import correction_of, layout_of_factors, part_of
from hqqlora.quantize_command.step import Step
from hqqlora.quantizing import quantize_weight

_HELD = 3  # times the largest tensor: what may be in memory


class Stream:
    """Quantizes shard after shard, and keeps its promise about memory over all of them."""

    def __init__(self, steps: Sequence[Step], advance: Callable[[int], object]) -> None:
        """`steps`: all that are going to come. `advance` is told how many weights are done."""
        self._bound = _HELD * max((step.largest_tensor for step in steps), default=0)
        self._advance = advance

    def write_shard(self, path: Path, steps: Sequence[Step]) -> None:
        """Makes the file `path` of `steps`, atomically.

        Raises:
            UsageError: a weight cannot be quantized; names it.
            OSError: a file cannot be read or written; names it.
        """
        layout, factors = layout_of(steps), layout_of_factors(steps)
        # (The factors get their name before the weights do. Threads end before the files are
        # closed, or others get their numbers.)
        with _writing(path, layout) as writer, ExitStack() as files:
            beside = None
            if factors is not None:
                part = part_of(path)
                with naming(part):
                    part.parent.mkdir(exist_ok=True)
                beside = files.enter_context(_writing(part, factors))
            reading = files.enter_context(ThreadPoolExecutor(1, "reading"))
            writing = files.enter_context(ThreadPoolExecutor(1, "writing"))
            self._run(path, steps, writer, beside, reading, writing)

    def _run(
        self,
        path: Path,
        steps: Sequence[Step],
        writer: FileWriter,
        beside: FileWriter | None,
        reading: ThreadPoolExecutor,
        writing: ThreadPoolExecutor,
    ) -> None:
        read = _ReadAhead([w for step in steps for w in _weights_of(step)], reading)
        write = _OneBehind(writing)
        for step in steps:
            if step.metadata is None:
                write.submit(0, _copy, step, writer, path)
                self._advance(step.numel)
            for weight in _weights_of(step):
                tensors = self._quantize(weight, read, write)
                write.submit(
                    weight.bytes_of_result, _write, weight, tensors, writer, beside, path
                )
                del tensors
                self._advance(weight.matrix.numel)
        write.wait()

    def _quantize(
        self, weight: _Weight, read: _ReadAhead, write: _OneBehind
    ) -> dict[str, Tensor]:
        """Reads and quantizes. What would be too much at a time happens one after another."""
        if weight.bytes_to_read + write.pending_bytes > self._bound:
            write.wait()
        held = weight.bytes_at_work + weight.bytes_of_result
        coming = read.bytes_of_next()
        if ahead := held + coming <= self._bound:
            held += coming
        dense = read.take(ahead)
        if held + write.pending_bytes > self._bound:
            write.wait()
        tensors = _quantize(weight, dense)
        del dense
        if weight.step.correction:
            tensors.update(correction_of(weight.step, tensors))
        return tensors


@dataclass(frozen=True)
class _Weight:
    """A matrix to be quantized: the layer's, or that of its expert `index`."""

    step: Step
    index: int
    bytes_of_result: int

    @property
    def matrix(self) -> Matrix:
        return self.step.matrices[self.index]

    @property
    def bytes_dense(self) -> int:
        """Once it has the dtype it is quantized in."""
        return self.matrix.numel * self.step.work_dtype.itemsize

    @property
    def bytes_at_work(self) -> int:
        """The weight, or after it what is to be corrected."""
        of_error = 4 * self.matrix.numel if self.step.correction else 0
        return max(self.bytes_dense, of_error)

    @property
    def bytes_to_read(self) -> int:
        return self.matrix.bytes_to_read(self.step.work_dtype)


def _weights_of(step: Step) -> list[_Weight]:
    count = len(step.matrices)
    results = (*step.results().values(), *step.factors().values())
    each = total_bytes(results) // count if count else 0
    return [_Weight(step, index, each) for index in range(count)]


class _ReadAhead:
    """The weights in turn, each read while the one before is worked on."""

    def __init__(self, weights: Sequence[_Weight], pool: ThreadPoolExecutor) -> None:
        self._coming: Iterator[_Weight] = iter(weights)
        self._pool = pool
        self._weight = next(self._coming, None)
        self._future: Future[Tensor] | None = None
        self._after = next(self._coming, None)

    def bytes_of_next(self) -> int:
        """What reading the weight after the one that `take` returns needs."""
        return self._after.bytes_to_read if self._after else 0

    def take(self, ahead: bool) -> Tensor:
        """The weight. `ahead`: the next may be read meanwhile."""
        assert self._weight is not None
        if self._future is None:
            self._future = self._pool.submit(_read, self._weight)
        tensor = self._future.result()
        self._future = None
        if ahead and self._after is not None:
            self._future = self._pool.submit(_read, self._after)
        self._weight, self._after = self._after, next(self._coming, None)
        return tensor


class _OneBehind:
    """Work for another thread, one thing at a time."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._future: Future[None] | None = None
        self.pending_bytes = 0

    def submit(self, size: int, work: Callable[..., None], *arguments: object) -> None:
        """Waits for what has been submitted before. `size`: bytes that `arguments` hold."""
        self.wait()
        self.pending_bytes = size
        self._future = self._pool.submit(work, *arguments)

    def wait(self) -> None:
        """Raises what has been raised there."""
        future, self._future = self._future, None
        if future is not None:
            future.result()
        self.pending_bytes = 0


def layout_of(steps: Sequence[Step]) -> FileLayout:
    """How the file of `steps` is laid out."""
    shapes = {}
    for step in steps:
        shapes.update(step.results())
    return FileLayout(shapes)


def _read(weight: _Weight) -> Tensor:
    return weight.matrix.read(weight.step.work_dtype)


@torch.no_grad()
def _quantize(weight: _Weight, dense: Tensor) -> dict[str, Tensor]:
    metadata = weight.step.metadata
    assert metadata is not None
    try:
        W_q, scale, zero = quantize_weight(
            dense, metadata.settings, metadata.compute_dtype, weight.step.importance
        )
    except (TypeError, ValueError) as error:
        name = weight.step.source.name
        if weight.step.is_stack:
            name = f"{weight.step.layer}, expert {weight.index},"
        file = weight.matrix.parts[0].source.file
        raise UsageError(f"{name} of {file}: {error}") from error
    if metadata.settings.view_as_float:
        W_q = W_q.view(metadata.compute_dtype)
    return {"W_q": W_q, "scale": scale, "zero": zero}


def _write(
    weight: _Weight,
    tensors: dict[str, Tensor],
    writer: FileWriter,
    beside: FileWriter | None,
    path: Path,
) -> None:
    layer, metadata = weight.step.layer, weight.step.metadata
    assert metadata is not None
    if beside is not None:
        with naming(part_of(path)):
            for name, factor in zip(weight.step.factors(), ("lora_A", "lora_B"), strict=False):
                beside.write(name, tensors.pop(factor))
    with naming(path):
        while tensors:
            key, tensor = tensors.popitem()
            writer.write(f"{layer}.{key}", tensor, weight.index * tensor.nbytes)
        if weight.index == 0:
            for key, tensor in metadata.encoded().items():
                writer.write(f"{layer}.{key}", tensor)


def _copy(step: Step, writer: FileWriter, path: Path) -> None:
    source = step.source
    written = 0
    for first in range(0, source.nbytes, PIECE):
        piece = source.read_part(first, min(PIECE, source.nbytes - first)).to(step.dtype)
        with naming(path):
            writer.write(source.name, piece, written)
        written += piece.nbytes


@contextmanager
def _writing(path: Path, layout: FileLayout) -> Iterator[FileWriter]:
    """A writer of the file `path`, which appears whole or not at all."""
    with replacing_file(path) as temporary, ExitStack() as files:
        descriptor = os.open(temporary, os.O_WRONLY)
        files.callback(os.close, descriptor)
        with naming(path):
            _reserve(descriptor, layout.size)
            writer = FileWriter(descriptor, layout)
        yield writer


def _reserve(descriptor: int, size: int) -> None:
    """Takes the space on the disk now, where the file system can: a full disk then shows
    before the work, not after it."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in (28, 122, 27):  # no space, quota, file too large
            raise
