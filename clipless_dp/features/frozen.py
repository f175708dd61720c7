"""Features of any frozen module, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipless_dp.checkpoint import check_writable
from clipless_dp.errors import ConfigurationError, InputError, PrivacyError

_CHECKED = 4
"""Samples that are computed alone too, to see whether their neighbours enter."""

_TOLERANCE = 1e-3
"""Of a sample's norm: what other batch sizes change by rounding stays below it, also with TF32."""

_BLOCK = 1 << 24
"""Bytes hashed at once."""


class FrozenFeatures(nn.Module):
    """A fixed module in front of a private model: evaluation mode, no gradients, features cached on disk.

    Features of each sample by itself cost no privacy if the module was not made from the private data: a backbone
    trained on public data, or a scattering transform. Wrap a module that returns something else than one tensor, as
    models of ``transformers`` do, in a module of your own that picks it.

    Args:
        module: any module that takes a batch and returns a tensor ``(B, ...)``. It is put into evaluation mode, and its
            parameters are frozen.
        cache_dir: folder for the features; ``None`` computes them anew each time.
        batch_size: samples at once.

    Raises:
        ConfigurationError: the module is none, the batch size is below 1, or the folder cannot be written.
    """

    def __init__(
        self, module: nn.Module, *, cache_dir: str | os.PathLike[str] | None = None, batch_size: int = 256
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise ConfigurationError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        if not (isinstance(batch_size, int) and batch_size >= 1):
            raise ConfigurationError(f"batch_size must be a positive integer, got {batch_size!r}")
        self.module = module.requires_grad_(False)
        self.batch_size = batch_size
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
            InputError: what comes out is not one tensor with a row for each sample.
        """
        training = [name or type(part).__name__ for name, part in self.module.named_modules() if part.training]
        if training:
            raise PrivacyError(f"{training} are in training mode, where samples may mix: call eval()")
        features = self.module(inputs)
        if not isinstance(features, Tensor) or features.dim() == 0 or len(features) != len(inputs):
            shown = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise InputError(f"the module must return one tensor with {len(inputs)} rows, got {shown}")
        return features

    def compute(self, inputs: Tensor) -> Tensor:
        """Features of a data set, from the cache if they are there.

        The cache's key is a hash of the module (its weights and buffers, its structure and settings, the source files
        of its classes) and of the inputs. A damaged file is computed again, with a warning.

        Args:
            inputs: ``(N, ...)``, ``N ≥ 1``, on any device; batches are moved to the module's.

        Returns:
            ``(N, ...)`` on the CPU; with a cache, mapped from the file: changes of it stay in memory.

        Raises:
            PrivacyError: the features of a sample depend on its neighbours in the batch, or on chance; a few samples
                are tried.
            InputError: there is no sample, or the module's output is not as in :meth:`forward`.
        """
        if not isinstance(inputs, Tensor) or inputs.dim() == 0 or len(inputs) == 0:
            raise InputError("inputs must be a tensor (N, ...) with at least one sample")
        if self.cache_dir is None:
            return torch.cat([self._batch(some) for some in self._checked(inputs)])
        path = self.cache_dir / f"{fingerprint(self.module, inputs)}.npy"
        if path.exists():
            kept = _read(path)
            if kept is not None and len(kept) == len(inputs):
                return kept
            warnings.warn(f"{path} is damaged; the features are computed again", UserWarning, stacklevel=2)
        self._write(path, inputs)
        written = _read(path)
        if written is None:
            raise ConfigurationError(f"{path} does not hold what was written there: check the disk")
        return written

    def _batch(self, inputs: Tensor) -> Tensor:
        place = next((value.device for value in (*self.module.parameters(), *self.module.buffers())), inputs.device)
        features: Tensor = self(inputs.to(place))
        # NumPy, which maps the files, has no bfloat16.
        return features.cpu().float() if features.dtype == torch.bfloat16 else features.cpu()

    def _checked(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """The batches, once it is seen that the first samples have the same features alone and among others."""
        some = inputs[: min(self.batch_size, 32)]
        if len(some) == 1:
            some = torch.cat([some, torch.zeros_like(some)])
        together = self._batch(some)[:_CHECKED]
        for index, among in enumerate(together):
            try:
                alone = self._batch(some[index : index + 1])[0]
            except (ValueError, RuntimeError) as error:
                raise PrivacyError(f"the module does not take one sample alone, so it mixes them: {error}") from error
            difference = float((alone.double() - among.double()).norm())
            if not difference <= _TOLERANCE * max(float(alone.double().norm()), float(among.double().norm())):
                raise PrivacyError(
                    f"the features of sample {index} alone and in a batch differ by {difference:.3g}: the module mixes "
                    "samples, is random, or returns no finite numbers; batch norm needs running statistics"
                )
        batches: tuple[Tensor, ...] = inputs.split(self.batch_size)
        return batches

    def _write(self, path: Path, inputs: Tensor) -> None:
        descriptor, name = tempfile.mkstemp(suffix=".partial", dir=path.parent)
        os.close(descriptor)
        temporary = Path(name)
        try:
            target: np.ndarray[Any, Any] | None = None
            start = 0
            for some in self._checked(inputs):
                features = self._batch(some).contiguous().numpy()
                if target is None:
                    shape = (len(inputs), *features.shape[1:])
                    target = np.lib.format.open_memmap(temporary, "w+", features.dtype, shape)
                target[start : start + len(features)] = features
                start += len(features)
            assert isinstance(target, np.memmap)
            target.flush()
            del target
            # The digest first: features without their own digest count as damaged.
            _seal(path).write_text(json.dumps({"sha256": _digest(temporary)}) + "\n")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def fingerprint(module: nn.Module, inputs: Tensor) -> str:
    """Hash of what decides the features: weights, buffers, structure, settings, source files, and the inputs."""
    digest = hashlib.sha256(f"clipless_dp features 1, torch {torch.__version__}".encode())
    for name, part in module.named_modules():
        kind = type(part)
        settings = {key: repr(value) for key, value in vars(part).items() if _is_plain(value)}
        config = getattr(part, "config", None)
        digest.update(repr((name, kind.__module__, kind.__qualname__, sorted(settings.items()), str(config))).encode())
        digest.update(repr(part).encode())
    for source in sorted({_source(type(part)) for part in module.modules()}):
        digest.update(source.encode())
    for name, value in (*module.named_parameters(), *module.named_buffers(), ("inputs", inputs)):
        _update(digest, name, value)
    return digest.hexdigest()


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _source(kind: type) -> str:
    """The text of the file that defines a class; torch's own are named by its version."""
    if kind.__module__.partition(".")[0] == "torch":
        return ""
    try:
        return Path(inspect.getfile(kind)).read_text(encoding="utf-8")
    except (OSError, TypeError, UnicodeDecodeError):
        return ""


def _update(digest: Any, name: str, value: Tensor) -> None:
    digest.update(repr((name, value.dtype, tuple(value.shape))).encode())
    if value.numel() == 0:
        return
    rows = value.detach().reshape(len(value) if value.dim() else 1, -1)
    size = max(1, _BLOCK // max(1, rows.shape[1] * value.element_size()))
    for some in rows.split(size):
        digest.update(some.contiguous().cpu().view(torch.uint8).numpy().tobytes())


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
