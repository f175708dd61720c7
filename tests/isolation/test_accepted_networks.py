"""The documentation's list of networks that are accepted, each wrapped and back-propagated as it stands there."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import DPLipModel, gradient_gated, losses, passes, recipes

PAGE = Path(__file__).parents[2] / "docs" / "any-network.md"
LINES = dict(re.findall(r"^\| ([^|]+) \| `(gradient_gated\(.+\))` \|$", PAGE.read_text("utf-8"), re.MULTILINE))
WORDS = {"input_ids": torch.randint(2, 90, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
INPUTS: dict[str, Any] = {
    "norms and any activation": torch.randn(2, 8),
    "a transformer": torch.randn(2, 5, 8),
    "its layers checkpointed": torch.randn(2, 5, 8),
    "attention": tuple(torch.randn(2, 5, 8) for _ in range(3)),
    "a recurrent network": torch.randn(2, 5, 8),
    "convolutions with group norm": torch.randn(2, 1, 5, 5, 5),
    "batch norm, converted": torch.randn(2, 3, 6, 6),
    "BERT": WORDS,
    "its last layers, biases, or low-rank adapters": WORDS,
    "GPT-2, Llama and the like": WORDS,
    "T5": {**WORDS, "decoder_input_ids": torch.randint(2, 90, (2, 4))},
    "a vision transformer": {"pixel_values": torch.randn(2, 3, 8, 8)},
}
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def test_the_list_is_that_of_this_file() -> None:
    assert list(LINES) == list(INPUTS)


@pytest.mark.parametrize("name", INPUTS)
def test_each_line_is_accepted_and_gives_gradients_to_what_trains(name: str) -> None:
    names: dict[str, Any] = {"nn": nn, "gradient_gated": gradient_gated, "recipes": recipes, "sizes": SIZES}
    if wanted := re.findall(r"\b[A-Z]\w+(?:Config|For\w+|HeadModel)\b", LINES[name]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            library: Any = pytest.importorskip("transformers", reason="needs the extra 'text'")
        names |= {kind: getattr(library, kind) for kind in wanted}
    inputs = INPUTS[name]
    net = eval(LINES[name], names)
    shape = tuple(inputs.shape[1:]) if isinstance(inputs, Tensor) else inputs
    model = DPLipModel(net, input_shape=shape, loss=losses.BoundedLoss(lambda z, t: z.flatten(1).sum(1), bound=1.0))
    with passes.unwitnessed():
        model.loss(model(inputs), torch.zeros(2)).backward()
    trained = model.sensitivity().per_parameter
    assert trained
    missing = [key for key, bound in trained.items() if bound > 0.0 and model.net.get_parameter(key).grad is None]
    assert not missing
