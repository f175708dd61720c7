"""Features of any frozen module, computed once and kept on disk."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from accounting.errors import warn_caller
from clipless_dp.arguments import whole
from clipless_dp.checkpoint import check_writable
from clipless_dp.errors import ConfigurationError, InputError, PrivacyError
from clipless_dp.features.told import HELD, Told, update

_TOLERANCE = 1e-5
"""Of a sample's norm: in batches of one size, most kernels return the same bits at every place, and others round."""

_LOUD = 1e4
"""Times the largest entry seen: rows that would shift any statistic, scale or capacity that samples share."""

_KINDS = ("silent", "loud", "louder samples")
"""Rows unlike the data: zeros, one large number everywhere, and samples times as much."""

_BLOCK = 1 << 24
"""Bytes hashed at once."""


class Composed(nn.Module):
    """Features that are made in little time, each row by itself, of features of other modules, which take long.

    :meth:`FrozenFeatures.compute` keeps what takes long, each such module's by itself: whoever changes what is made of
    them computes none of them again.
    """

    @abstractmethod
    def composed(self, compute: Callable[[nn.Module], Tensor]) -> Tensor:
        """The features of a data set ``(N, ...)``.

        Args:
            compute: features of the data set by another module, ``(N, ...)`` on the CPU.
        """


def in_batches(finish: Callable[[Tensor], Tensor], rows: Tensor, size: int, device: torch.device) -> Tensor:
    """What a function makes of rows, each by itself: always ``size`` at once, with zeros where there are fewer.

    Args:
        finish: maps ``(size, ...)`` to ``(size, ...)``.
        rows: ``(N, ...)`` on the CPU, ``N ≥ 1``.
        size: the number of rows chooses how sums are rounded; this way no feature depends on how many there are.
        device: where ``finish`` is computed.

    Returns:
        ``(N, ...)`` on the CPU.
    """
    made: Tensor | None = None
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        if len(some) < size:
            some = torch.cat([some, some.new_zeros(size - len(some), *some.shape[1:])])
        finished = finish(some.to(device)).cpu()
        if made is None:
            made = finished.new_empty(len(rows), *finished.shape[1:])
        made[start : start + size] = finished[: len(rows) - start]
    assert made is not None
    return made


class FrozenFeatures(nn.Module):
    """A fixed module in front of a private model: evaluation mode, no gradients, features cached on disk.

    Features of each sample by itself cost no privacy if the module was not made from the private data: a backbone
    trained on public data, or a scattering transform. Wrap a module that returns something else than one tensor, as
    models of ``transformers`` do, in a module of your own that picks it.

    A module that lets samples enter each other's features (statistics or one quantisation scale of the batch, experts
    of limited capacity, a state that runs on) has no bound for what one sample changes. So :meth:`compute` computes
    each sample twice, in other company, and refuses a module whose features differ.

    Args:
        module: any module that takes a batch and returns a tensor ``(B, ...)``. It is put into evaluation mode, and its
            parameters are frozen.
        cache_dir: folder for the features; ``None`` computes them anew each time.
        batch_size: samples at once: every batch of :meth:`compute` has this size, padding included.
        progress: whether :meth:`compute` shows a bar at a terminal.

    Raises:
        ConfigurationError: the module is none, the batch size is below 1, or the folder cannot be written.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        batch_size: int = 256,
        progress: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise ConfigurationError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        self.module = module.requires_grad_(False)
        self.batch_size = whole("batch_size", batch_size)
        self.progress = bool(progress)
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        if self.cache_dir is not None:
            check_writable(self.cache_dir / "features.npy")
        self.eval()

    def train(self, mode: bool = True) -> FrozenFeatures:
        """Stays in evaluation mode: batch statistics and dropout would mix samples or differ from call to call."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        """Features ``(B, ...)`` of a batch.

        Raises:
            PrivacyError: a part of the module was put into training mode.
            InputError: what comes out is not one tensor with a row for each sample, or the inputs are of a dtype that
                the module does not take.
        """
        training = [name or type(part).__name__ for name, part in self.module.named_modules() if part.training]
        if training:
            raise PrivacyError(f"{training} are in training mode, where samples may mix: call eval()")
        try:
            features = self.module(inputs)
        except (RuntimeError, TypeError) as error:
            wanted = {value.dtype for value in self.module.parameters() if value.is_floating_point()}
            if isinstance(inputs, Tensor) and len(wanted) == 1 and inputs.dtype not in wanted:
                (dtype,) = wanted
                raise InputError(
                    f"the module, of {dtype}, fails on inputs of {inputs.dtype} ({error}): convert them first, by "
                    f"inputs.to({dtype}), or the module"
                ) from error
            raise
        if not isinstance(features, Tensor) or features.dim() == 0 or len(features) != len(inputs):
            shown = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise InputError(f"the module must return one tensor with {len(inputs)} rows, got {shown}")
        return features

    def compute(self, inputs: Tensor) -> Tensor:
        """Features of a data set, from the cache if they are there.

        They are computed twice, which the cache spares later. The second time each sample is at another place of a
        batch of the same size, with samples of other batches; the first batch also with rows unlike the data: zeros,
        and entries of ten thousand times the largest. Features must be the same up to rounding, a relative 1e-5, and
        buffers must not change. What this proves: of these data, no sample's features depended on its company, its
        place or its turn by more than rounding, in the companies tried. What it does not: that the module's never do;
        one that mixes samples only where something rare happens, which did not happen, passes. Modules that consist of
        this library's features and layers are computed once: they are known to take each sample by itself.

        The cache's key is a hash of the module (its weights and buffers, its structure and settings, the source files
        of its classes and functions) and of the inputs. A module that holds something else, a function made on the spot
        say, is computed anew each time, with a warning. Not all that decides can be told (globals that code reads,
        objects set on a class, packages that change under their version): so one batch of samples, evenly spread, is
        computed again and compared, and where it differs by more than rounding, or a file is damaged, all are computed
        again, with a warning. Of features that are made of others in little time
        (:class:`JoinedFeatures`, :class:`SyntheticWhitening`) those others are kept.

        Args:
            inputs: ``(N, ...)``, ``N ≥ 1``, on any device; batches are moved to the module's.

        Returns:
            ``(N, ...)`` on the CPU; with a cache, mapped from the file: changes of it stay in memory.

        Raises:
            PrivacyError: the features of a sample depend on its company, on chance, or on what was computed before.
            InputError: there is no sample, the inputs are not dense, the module does not take their dtype, its output
                is not as in :meth:`forward`, or it fails on rows unlike the data.
        """
        if isinstance(inputs, Tensor) and (inputs.is_nested or inputs.layout != torch.strided or inputs.is_quantized):
            raise InputError(
                f"inputs must be a dense tensor (N, ...), got a {'nested' if inputs.is_nested else inputs.layout} "
                "one: make it dense first, by to_dense(), to_padded_tensor() or dequantize()"
            )
        if not isinstance(inputs, Tensor) or inputs.dim() == 0 or len(inputs) == 0:
            raise InputError("inputs must be a tensor (N, ...) with at least one sample")
        if isinstance(self.module, Composed) and _is_own(self.module):
            with torch.no_grad():
                return self.module.composed(lambda part: self._like_this(part).compute(inputs))
        if self.cache_dir is None:
            return self._computed(inputs)
        key = fingerprint(self.module, inputs)
        if key is None:
            warn_caller(
                f"{type(self.module).__name__} holds what no hash tells (a function made on the spot, an object, a "
                "class without a source file), so that its features are not kept: another module could be given them. "
                "Let its settings be numbers, text, tensors, modules or functions of a file",
                UserWarning,
            )
            return self._computed(inputs)
        path = self.cache_dir / f"{key}.npy"
        if path.exists():
            kept = _read(path)
            if kept is None or len(kept) != len(inputs):
                warn_caller(f"{path} is damaged; the features are computed again", UserWarning)
            elif self._makes(inputs, kept):
                return kept
            else:
                warn_caller(
                    f"{path} holds other features than {type(self.module).__name__} makes of some of the samples: "
                    "something that its hash does not tell has changed since, or the device rounds otherwise. They are "
                    "computed again",
                    UserWarning,
                )
        self._write(path, inputs)
        written = _read(path)
        if written is None:
            raise ConfigurationError(f"{path} does not hold what was written there: check the disk")
        return written

    def _makes(self, inputs: Tensor, kept: Tensor) -> bool:
        """Whether the module makes these of a batch of samples, evenly spread: no hash tells all of a module."""
        rows = torch.arange(self.batch_size) * (len(inputs) - 1) // max(self.batch_size - 1, 1)
        made = self._batch(inputs[rows.to(inputs.device)])
        same_kind = made.shape[1:] == kept.shape[1:] and made.dtype == kept.dtype
        return same_kind and not bool(_differing(kept[rows], made, self._tolerance()).any())

    def _computed(self, inputs: Tensor) -> Tensor:
        features = torch.cat(list(self._parts(inputs)))
        self._require_independence_of_all(inputs, features)
        return features

    def _like_this(self, module: nn.Module) -> FrozenFeatures:
        return FrozenFeatures(module, cache_dir=self.cache_dir, batch_size=self.batch_size, progress=self.progress)

    def _batch(self, inputs: Tensor) -> Tensor:
        place = next((value.device for value in (*self.module.parameters(), *self.module.buffers())), inputs.device)
        features: Tensor = self(inputs.to(place))
        # NumPy, which maps the files, has no bfloat16.
        return features.cpu().float() if features.dtype == torch.bfloat16 else features.cpu()

    def _parts(self, inputs: Tensor) -> Iterator[Tensor]:
        """The features, batch by batch; those of the first one are checked at once, as all of them may take hours."""
        untouched = self._copied()
        shown = tqdm(
            inputs.split(self.batch_size), disable=None if self.progress else True, unit="batch",
            desc=type(self.module).__name__,
        )  # fmt: skip
        for number, some in enumerate(shown):
            batch = some
            if len(some) < self.batch_size:
                batch = torch.cat([some, self._strangers(inputs, "silent")[len(some) :]])
            features = self._batch(batch)[: len(some)]
            if number == 0:
                for kind in _KINDS:
                    self._require_independence(some, features, [kind])
                self._require_no_beginning(untouched, batch, features)
            yield features

    def _copied(self) -> nn.Module | None:
        """The module before it has seen anything, if it can be copied."""
        if _is_known(self.module):
            return None
        try:
            return copy.deepcopy(self.module)
        except Exception:
            return None

    def _require_no_beginning(self, untouched: nn.Module | None, batch: Tensor, features: Tensor) -> None:
        """Refuses a module that takes something from the first batch that comes: another one came to its copy."""
        if untouched is None:
            return
        kept, self.module = self.module, untouched
        try:
            self._batch(batch[:1].expand_as(batch).clone())
            again = self._batch(batch)[: len(features)]
        finally:
            self.module = kept
        if bool(_differing(features, again, self._tolerance()).any()):
            raise PrivacyError(
                "features depend on the batch that came first: the module takes its scale, a codebook or another state "
                "from it, so that one sample changes the features of all. Initialise it on public data and freeze it"
            )

    def _strangers(self, inputs: Tensor, kind: str) -> Tensor:
        """A batch of rows of a kind. Of integers, which may be tokens, only some that are in the data."""
        some = inputs[: self.batch_size]
        rows = some[torch.arange(self.batch_size, device=some.device) % len(some)].clone()
        if some.is_floating_point():
            largest = float(some.abs().nan_to_num(0.0, 0.0, 0.0).max()) or 1.0
            factor = min(_LOUD, torch.finfo(some.dtype).max / (4.0 * largest))
            return rows.mul_(factor) if kind == "louder samples" else rows.fill_(-factor * largest * (kind == "loud"))
        if some.dtype != torch.bool and not some.is_complex() and kind != "louder samples":
            return rows.fill_(int(some.max() if kind == "loud" else some.min()))
        return rows

    def _require_independence_of_all(self, inputs: Tensor, features: Tensor) -> None:
        """The same of all batches, once the first one has passed, which may have filled caches of the module."""
        before = _versions(self.module)
        if len(inputs) > self.batch_size:
            self._require_independence(inputs, features)
        changed = [name for name, version in _versions(self.module).items() if before.get(name, version) != version]
        if changed:
            raise PrivacyError(
                f"{changed} changed while features were computed in evaluation mode: a sample's features depend on "
                "those before it. Freeze this state"
            )

    def _require_independence(self, inputs: Tensor, features: Tensor, kinds: Sequence[str] = _KINDS) -> None:
        """Computes samples again, at other places, among others, and among strangers of these kinds in turn.

        Batch ``d`` of ``M``, one more than there were, has at place ``j`` the sample that was at place
        ``i = j - shift mod size`` of batch ``(d - 1 - i) mod M``, and a stranger where that is the batch too many or
        beyond the end: what was in one batch is spread evenly.

        Raises:
            PrivacyError: features differ.
            InputError: the module fails on the strangers.
        """
        if _is_known(self.module):
            return
        size, count = self.batch_size, len(inputs)
        batches = math.ceil(count / size) + 1
        places = (torch.arange(size) - ((size // 2 + 1) % size or 1)) % size
        strangers = [self._strangers(inputs, kind) for kind in kinds]
        for number in range(batches):
            rows = (number - 1 - places) % batches * size + places
            known = rows < count
            rows = rows[known]
            if len(rows) == 0:
                continue
            batch = strangers[number % len(kinds)].clone()
            batch[known.to(batch.device)] = inputs[rows.to(inputs.device)]
            try:
                again = self._batch(batch)[known]
            except (ValueError, RuntimeError, IndexError) as error:
                raise InputError(
                    f"the module fails on rows unlike the data, of zeros or of large numbers: {error}. Let it take "
                    "them (clamp its inputs, say), so that samples can be computed in other company"
                ) from error
            differing = _differing(features[rows], again, self._tolerance())
            if bool(differing.any()):
                raise PrivacyError(
                    f"the features of {int(differing.sum())} of {len(rows)} samples, number {int(rows[differing][0])} "
                    "first, are other ones in other company: the module mixes samples, is random, or has a state. Use "
                    "running statistics, static quantisation, experts without a capacity, no randomness"
                )

    def _tolerance(self) -> float:
        kinds = {part.dtype for part in (*self.module.parameters(), *self.module.buffers()) if part.is_floating_point()}
        # The one rounding that other kernels do otherwise, carried on through some layers.
        return max([_TOLERANCE, *(4.0 * torch.finfo(kind).eps for kind in kinds)])

    def _write(self, path: Path, inputs: Tensor) -> None:
        descriptor, name = tempfile.mkstemp(suffix=".partial", dir=path.parent)
        os.close(descriptor)
        temporary = Path(name)
        try:
            target: np.ndarray[Any, Any] | None = None
            start = 0
            for part in self._parts(inputs):
                features = part.contiguous().numpy()
                if target is None:
                    shape = (len(inputs), *features.shape[1:])
                    target = np.lib.format.open_memmap(temporary, "w+", features.dtype, shape)
                target[start : start + len(features)] = features
                start += len(features)
            assert isinstance(target, np.memmap)
            self._require_independence_of_all(inputs, torch.from_numpy(target))
            target.flush()
            del target
            # The digest first: features without their own digest count as damaged.
            _seal(path).write_text(json.dumps({"sha256": _digest(temporary)}) + "\n")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _is_known(module: nn.Module) -> bool:
    """Whether a module consists of this library's features and layers alone, which take each sample by itself."""

    containers = (nn.Sequential, nn.ModuleList, nn.Flatten, nn.Identity)
    return all(_is_own(part) or (type(part) in containers and not _is_changed(part)) for part in module.modules())


def _is_own(part: nn.Module) -> bool:
    """Whether a module, whatever is in it, is this library's, as it was written."""
    return type(part).__module__.startswith(("clipless_dp.features.", "clipless_dp.layers.")) and not _is_changed(part)


def _is_changed(part: nn.Module) -> bool:
    """Whether hooks, or functions set on the instance in place of the class's, decide what it computes."""
    replaced = any(callable(value) and hasattr(type(part), name) for name, value in vars(part).items())
    return bool(part._forward_hooks or part._forward_pre_hooks or replaced)


def _versions(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Which tensor each buffer is, and how often it was written to."""
    return {name: (id(buffer), buffer._version) for name, buffer in module.named_buffers()}


def _differing(first: Tensor, second: Tensor, tolerance: float) -> Tensor:
    """``(B,)``: rows that differ by more than rounding; numbers that are not finite must be the same ones."""
    if torch.equal(first, second):
        return torch.zeros(len(first), dtype=torch.bool)
    first, second = (part.double().flatten(1) for part in (first, second))
    same = (first == second) | (first.isnan() & second.isnan())
    differences = torch.where(same, 0.0, first - second).norm(dim=1)
    lengths = torch.maximum(*(part.nan_to_num(0.0, 0.0, 0.0).norm(dim=1) for part in (first, second)))
    same_rows: Tensor = differences <= tolerance * lengths
    return ~same_rows


def fingerprint(module: nn.Module, inputs: Tensor) -> str | None:
    """Hash of what decides the features: weights, buffers, structure, settings, source files, and the inputs.

    Returns:
        ``None`` where something is set on the module, or a class is made of something, that no hash tells.
    """
    digest = hashlib.sha256(f"clipless_dp features 3, torch {torch.__version__}".encode())
    told = Told(digest, module)
    for name, part in module.named_modules():
        kind = type(part)
        digest.update(repr((name, kind.__module__, kind.__qualname__)).encode())
        digest.update(repr(part).encode())
        for key, value in sorted(vars(part).items()):
            if key not in HELD:
                digest.update(repr(key).encode())
                told.add(value)
        told.add(kind)
    if not told.is_all:
        return None
    for name, value in (*module.named_parameters(), *module.named_buffers(), ("inputs", inputs)):
        update(digest, name, value)
    return digest.hexdigest()


def _seal(path: Path) -> Path:
    return path.with_suffix(".json")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _read(path: Path) -> Tensor | None:
    """The features in a file, mapped; ``None`` if they are not what was written."""
    try:
        if json.loads(_seal(path).read_text())["sha256"] != _digest(path):
            return None
        # Copied where it is written to: torch has no tensors that are only read.
        return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
