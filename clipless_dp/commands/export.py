"""``export``: write FILE.pt2, FILE.onnx and what their scores mean.

Writes the model for torch.export.load and, where onnx and onnxscript are installed, for ONNX, for any number of rows;
and FILE.json, which says what goes in and what scores mean. Each is compared with the model before it is kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accounting import Ledger
from accounting.errors import AccountingError
from clipless_dp.checkpoint import replacing, write_text
from clipless_dp.commands import options as shared
from clipless_dp.commands.held_out import file_beside
from clipless_dp.commands.results import Opened, opened
from clipless_dp.errors import ConfigurationError

_TOLERANCE = 1e-3
"""Of the largest score: kernels of other runtimes round otherwise."""

FORMATS = ("pt2", "onnx")


def add(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    shared.add_result(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", required=True, help="without an ending")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, help="(default: those that can be written here)")


def _is_statement(file: Path) -> bool:
    try:
        Ledger.load(file)
    except (AccountingError, OSError, ValueError):
        return False
    return True


def run(options: argparse.Namespace, only: argparse.Namespace) -> None:
    """Writes the files.

    Raises:
        CheckpointError: the file of the model, or one to write, does not do.
        ConfigurationError: a package is missing, or the model computes something else in another form.
    """
    asked = options.formats or [name for name in FORMATS if name == "pt2" or _has_onnx()]
    if "onnx" in asked and not _has_onnx():
        raise ConfigurationError("ONNX files are written by onnx and onnxscript: pip install 'clipless-dp[export]'")
    base = options.out.with_suffix("") if options.out.suffix[1:] in (*FORMATS, "json") else options.out
    files = {name: base.with_name(f"{base.name}.{name}") for name in (*asked, "json")}
    shared.require_writable(files.values(), [options.result, file_beside(options.result)])
    if _is_statement(files["json"]):
        raise ConfigurationError(f"{files['json']} holds a privacy statement or a ledger: choose another --out")
    found = opened(options.result)
    net, example = exported(found)
    if "onnx" in asked:
        try:
            _write_onnx(net, example, files["onnx"])
        except ConfigurationError as error:
            if options.formats is not None:
                raise
            print(f"no .onnx: {error}")
            del files["onnx"]
    elif options.formats is None:
        print("no .onnx: onnx and onnxscript are not installed (pip install 'clipless-dp[export]')")
    if "pt2" in asked:
        _write_pt2(net, example, files["pt2"])
    write_text(files["json"], json.dumps(described(found, example), indent=1, ensure_ascii=False) + "\n")
    print(f"exported  {', '.join(map(str, files.values()))}")
    print(f"model     {found.privacy}")


@torch.no_grad()
def exported(found: Opened) -> tuple[nn.Module, Tensor]:
    """The plain form of a model, and made-up samples on which it says what the model does.

    Raises:
        ConfigurationError: it does not.
    """
    example = found.content.values["probe"]["inputs"]
    net = found.predictor.export_net()
    _require_same(net(example), found.content.values["probe"]["scores"], found.path)
    return net, example


def described(found: Opened, example: Tensor) -> dict[str, Any]:
    """What goes into the model, what its scores mean, and what was promised: plain values."""
    predictor, known = found.predictor, found.known
    encoding = known.encoding
    columns = None if encoding is None else list(encoding.names)
    return {
        "input": {"shape": ["rows", *example.shape[1:]], "dtype": str(example.dtype).removeprefix("torch.")},
        "columns": columns,
        "pixels": "in [0, 1]" if example.dim() == 4 else None,
        "scores": list(predictor.link),
        "classes": None if known.classes is None else list(known.classes),
        "threshold": predictor.threshold,
        "target_range": None if predictor.target_range is None else list(predictor.target_range),
        "privacy": {"epsilon": predictor.epsilon, "delta": predictor.delta},
    }


def _has_onnx() -> bool:
    return all(find_spec(name) is not None for name in ("onnx", "onnxscript"))


def _write_pt2(net: nn.Module, example: Tensor, file: Path) -> None:
    try:
        program = torch.export.export(net, (example[:2],), dynamic_shapes=({0: torch.export.Dim("rows")},))
    except Exception as error:  # Errors of the exporter are of many kinds.
        raise ConfigurationError(f"torch.export does not take this model: {_reason(error)}") from error
    with replacing(file) as beside:
        torch.export.save(program, beside)
        _require_same(torch.export.load(beside).module()(example), net(example), file)


def _reason(error: BaseException) -> str:
    """The last line of the first cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings and what exporters log."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _write_onnx(net: nn.Module, example: Tensor, file: Path) -> None:
    with replacing(file) as beside, _quiet():
        try:
            torch.onnx.export(
                net,
                (example[:2],),
                beside,
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("rows")},),
                external_data=False,
                verbose=False,
                input_names=["inputs"],
                output_names=["scores"],
            )
        except Exception as error:  # Errors of the exporter are of many kinds.
            raise ConfigurationError(
                f"ONNX has no form of an operation of this model ({_reason(error)}): --formats pt2 leaves it out"
            ) from error
        if find_spec("onnxruntime") is not None:
            import onnxruntime

            session = onnxruntime.InferenceSession(str(beside), providers=["CPUExecutionProvider"])
            (scores,) = session.run(None, {"inputs": example.numpy()})
            _require_same(torch.from_numpy(scores), net(example), file)


def _require_same(found: Tensor, expected: Tensor, name: Path) -> None:
    """Refuses scores that are other than those of the model."""
    found = found.detach().reshape(expected.shape)
    largest = float(expected.nan_to_num(0.0).abs().max())
    if not torch.allclose(found, expected, rtol=0.0, atol=_TOLERANCE * max(largest, 1e-6), equal_nan=True):
        raise ConfigurationError(f"{name} computes other scores than the model: nothing was kept of it")
