"""Coverage-guided fuzzing of what reads files and words: anything but a typed error is a crash. Needs ``atheris``.

python tests/fuzz/readers.py ledger -runs=200000
python tests/fuzz/readers.py checkpoint -runs=20000
python tests/fuzz/readers.py command -runs=20000
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import atheris
import torch
from torch._weights_only_unpickler import Unpickler

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

with atheris.instrument_imports(include=["accounting", "clipless_dp.checkpoint", "json"]):
    from accounting import AccountingError, GaussianStep, GaussianVectorStep, Ledger, PoissonSampling, cli
    from clipless_dp import CheckpointError
    from clipless_dp import checkpoint as checkpoint_module

# Imported with torch already: the reader behind weights_only=True.
Unpickler.load = atheris.instrument_func(Unpickler.load)
FOLDER = Path(tempfile.mkdtemp())


def ledger(content: bytes) -> None:
    path = FOLDER / "ledger.json"
    path.write_bytes(content)
    try:
        read = Ledger.load(path)
    except AccountingError:
        return
    assert Ledger.from_json(read.to_json()) == read


def checkpoint(content: bytes) -> None:
    """The pickle inside a valid archive, with a digest that fits: nothing behind them would be reached otherwise."""
    path = FOLDER / "run.pt"
    archive = repacked(content)
    path.write_bytes(archive + checkpoint_module._seal(archive))
    with contextlib.suppress(CheckpointError):
        assert isinstance(checkpoint_module.load_checkpoint(path), dict)


def command(content: bytes) -> None:
    """A line is a word of ``python -m accounting``."""
    # No shell can pass a NUL.
    words = content.decode("utf-8", "replace").replace("\0", "").split("\n")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            status = cli.main(words)
        except SystemExit as refusal:
            status = refusal.code
    assert status in (0, 2), words


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


TEMPLATE = saved({"format": 2, "model": {"w": torch.ones(2)}, "history": [1.0, None, "x"]})


def repacked(pickled: bytes) -> bytes:
    """The template's archive with another pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(TEMPLATE)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("/data.pkl") else old.read(name))
    return buffer.getvalue()


def seeds(kind: str) -> list[bytes]:
    if kind == "ledger":
        full = Ledger()
        full.append(GaussianStep(1.5, PoissonSampling(0.1)), 7)
        full.append(GaussianVectorStep((2.0, 3.0)), 2)
        return [full.to_json().encode(), json.dumps(Ledger().state_dict()).encode()]
    if kind == "command":
        run = ["--noise-multiplier", "2", "--sample-rate", "1e-2", "--steps", "9", "--delta", "1e-5"]
        target = ["--epsilon", "2", "--sample-rate", "1e-2", "--delta", "1e-5"]
        lines = [["epsilon", *run], ["noise", *target, "--steps", "9"], ["steps", *target, "--noise-multiplier", "2"]]
        return ["\n".join(line).encode() for line in [*lines, ["curve", *run[:-2]], ["explain", "ledger.json"]]]
    pickles = []
    for content in ({"format": 2}, {"format": 2, "model": {"w": torch.ones(2)}, "history": [1.0, None, "x"]}):
        with zipfile.ZipFile(io.BytesIO(saved(content))) as archive:
            pickles.append(archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl"))))
    return pickles


def main() -> None:
    kind, *options = sys.argv[1:]
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for index, seed in enumerate(seeds(kind)):
        (corpus / str(index)).write_bytes(seed)
    os.chdir(FOLDER)
    warnings.simplefilter("ignore")
    targets = {"ledger": ledger, "checkpoint": checkpoint, "command": command}
    atheris.Setup([sys.argv[0], str(corpus), *options], targets[kind])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
