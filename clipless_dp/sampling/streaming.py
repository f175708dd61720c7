"""Poisson batches of data that stays where it is, read ahead of the step by a thread."""

from __future__ import annotations

import queue
import sqlite3
import threading
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipless_dp.errors import ConfigurationError
from clipless_dp.sampling import draws
from clipless_dp.sampling.batches import Batch, Batches, padded_batch
from clipless_dp.sampling.people import Classes, People
from clipless_dp.sampling.samples import Samples

AHEAD = 3
"""Draws that a stream holds on the device at once: one in use, one waiting, one arriving."""


class StreamedBatches(Batches):
    """:class:`clipless_dp.PoissonBatches` of a data set that fits neither the device nor, perhaps, memory.

    A thread draws, reads the samples of one draw, pads them, and copies them to the device while the step before is
    computed: through pinned memory on a stream of its own, where the device is a CUDA one. It never has more than two
    draws beyond the one in use, and ends with the iteration, whether that is exhausted, closed or fails.

    A draw is announced to the optimizers when its batch is handed over, in the thread that asks for it. So one that was
    read ahead and is never used amplifies no step and is not charged; it is dropped and never handed out again.
    (Seeded, a sampler that starts at a step draws that step's batch, which no step has used.)

    Args:
        dataset: any data set, pairs of arrays included, which may be memory-mapped files; see
            :class:`clipless_dp.sampling.Samples`. It is asked from the thread. Of several processes each reads the
            samples of its own part, and the few that all compare.
        sample_rate: ``q`` in (0, 1].
        steps: number of batches.
        device: where batches go; by default they stay where they are read.
        physical_batch_size: rows of a batch, as in :class:`clipless_dp.PoissonBatches`.
        seed: as in :class:`clipless_dp.PoissonBatchSampler`; random transforms of the data set itself are not covered.
        start: as in :class:`clipless_dp.PoissonBatchSampler`.
        groups, rows_per_group, group_weights: as in :class:`clipless_dp.PoissonBatches`.

    Raises:
        ConfigurationError: an argument is out of range, or the data set is empty, not one of pairs, or on a device
            already. What the data set raises while it is read is raised while iterating, as it is, once the batches
            read before it are used up.
        PrivacyError: as :class:`clipless_dp.PoissonBatches`.
        RankError: as :class:`clipless_dp.PoissonBatches`.

    Guarantee:
        As :class:`clipless_dp.PoissonBatches`.
    """

    def _taken(self, dataset: Any, people: People | None) -> Samples:
        self._samples = Samples.of(dataset)
        if self._samples.tensors is not None and self._samples.tensors[0].device.type != "cpu":
            raise ConfigurationError(
                "the data is on a device already, so there is nothing to stream: use PoissonBatches"
            )
        Samples.to_train_on(self._samples, people=people)
        return self._samples

    def _part(self, samples: Samples) -> int:
        rank, ranks = self.sampler.world
        return len(range(rank, len(samples), ranks))

    def __iter__(self) -> Generator[Batch, None, None]:
        ready: queue.Queue[_Read] = queue.Queue(maxsize=AHEAD - 2)
        ended = threading.Event()
        reader = threading.Thread(target=self._read_ahead, args=(ready, ended), name="clipless_dp data", daemon=True)
        reader.start()
        made = self.sampler.numbered()
        try:
            while (read := ready.get()).batch is not None:
                if read.arrival is not None:
                    stream = torch.cuda.current_stream(read.batch.mask.device)
                    stream.wait_event(read.arrival)
                    for part in read.batch:
                        # Its memory goes back to the thread's stream, which must not overwrite it under the step.
                        part.record_stream(stream)
                draws.deliver(self.sampler.next_of(made, read.classes), read.batch.inputs, read.rows)
                yield read.batch
            if read.error is not None:
                raise read.error
        finally:
            ended.set()
            # At most one item is put after this, by a thread that waits for room; then it sees the end.
            while not ready.empty():
                ready.get()
            reader.join()

    def _read_ahead(self, ready: queue.Queue[_Read], ended: threading.Event) -> None:
        try:
            arrivals = None
            if self._device is not None and self._device.type == "cuda":
                arrivals = torch.cuda.Stream(self._device)
            for rows, classes in self.sampler.chosen():
                if ended.is_set():
                    return
                ready.put(self._moved(self._read(rows.tolist(), classes), len(rows), arrivals, classes))
            last = _Read()
        except sqlite3.ProgrammingError as error:
            last = _Read(error=_of_another_thread(error) if "thread" in str(error) else error)
        except BaseException as error:
            last = _Read(error=error)
        if not ended.is_set():
            ready.put(last)

    def _read(self, indices: list[int], classes: Classes) -> Batch:
        inputs, targets = self._samples.read_apart(indices, classes)
        return padded_batch(inputs, targets, torch.arange(len(indices)), self.physical_batch_size)

    def _moved(self, batch: Batch, rows: int, arrivals: torch.cuda.Stream | None, classes: Classes) -> _Read:
        if arrivals is None:
            return _Read(Batch(*(part.to(self._device) for part in batch)), rows, classes=classes)
        with torch.cuda.stream(arrivals):
            moved: list[Tensor] = [part.pin_memory().to(self._device, non_blocking=True) for part in batch]
            return _Read(Batch(*moved), rows, arrivals.record_event(), classes=classes)


def _of_another_thread(error: Exception) -> ConfigurationError:
    found = ConfigurationError(
        f"the data set holds a handle that only the thread that opened it may use ({error}); its first sample is read "
        "where the stream is made, all others in a thread of its own: open one in each thread, as in an attribute of "
        "threading.local(), or use PoissonBatches"
    )
    found.__cause__ = error
    return found


@dataclass(frozen=True)
class _Read:
    """What the thread hands over: a batch and the event of its arrival, or the end, with the error that made it."""

    batch: Batch | None = None
    rows: int = 0
    arrival: torch.cuda.Event | None = None
    error: BaseException | None = None
    classes: Classes = ()
