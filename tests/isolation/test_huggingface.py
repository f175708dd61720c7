"""Networks of the transformers and peft packages, tiny and with random weights, behind gradient gates."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import CliplessDPSGD, DPLipModel, gradient_gated, losses, passes, recipes
from clipless_dp.isolation import Isolated
from clipless_dp.losses.base import InnerProduct
from clipless_dp.sampling import PoissonBatches

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers: Any = pytest.importorskip("transformers", reason="needs the extra 'transformers'")

ROWS, TOKENS, WORDS, LIMIT = 4, 6, 31, 0.05
SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def ids() -> Tensor:
    return torch.randint(2, WORDS, (ROWS, TOKENS))


def mask() -> Tensor:
    return (torch.arange(TOKENS) < torch.tensor([TOKENS, 3, 1, 5]).unsqueeze(1)).long()


def quiet(net: nn.Module) -> nn.Module:
    for part in net.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return net


def bert(**options: Any) -> nn.Module:
    config = transformers.BertConfig(
        **SIZES, vocab_size=WORDS, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options
    )
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    rates = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=WORDS, use_cache=False, **rates)
    return transformers.GPT2LMHeadModel(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=WORDS, dropout_rate=0.0, use_cache=False
    )
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        **SIZES, image_size=8, patch_size=4, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return transformers.ViTForImageClassification(config)


def lora_of_peft() -> nn.Module:
    peft = pytest.importorskip("peft", reason="needs the extra 'peft'")
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"], lora_dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        net: nn.Module = peft.get_peft_model(bert(), config)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return net


def named(**inputs: Tensor) -> dict[str, Tensor]:
    return inputs


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "BERT": (bert, lambda: named(input_ids=ids(), attention_mask=mask(), token_type_ids=ids() % 2)),
    "BERT, eager attention": (
        lambda: bert(attn_implementation="eager"),
        lambda: named(input_ids=ids(), attention_mask=mask()),
    ),
    "DistilBERT": (
        lambda: transformers.DistilBertForSequenceClassification(
            transformers.DistilBertConfig(
                dim=8, n_layers=2, n_heads=2, hidden_dim=16, vocab_size=WORDS, dropout=0.0, attention_dropout=0.0,
                seq_classif_dropout=0.0,
            )
        ),
        lambda: named(input_ids=ids(), attention_mask=mask()),
    ),
    "GPT-2, tied": (gpt2, lambda: named(input_ids=ids(), attention_mask=mask())),
    "Llama": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=WORDS, use_cache=False)),
        lambda: named(input_ids=ids(), attention_mask=mask()),
    ),
    "T5": (
        t5,
        lambda: named(input_ids=ids(), attention_mask=mask(), decoder_input_ids=ids(), decoder_attention_mask=mask()),
    ),
    "ViT": (vit, lambda: named(pixel_values=torch.randn(ROWS, 3, 8, 8, dtype=torch.float64))),
    "LoRA": (lambda: recipes.lora(bert(), rank=2), lambda: named(input_ids=ids(), attention_mask=mask())),
    "LoRA of peft": (lora_of_peft, lambda: named(input_ids=ids(), attention_mask=mask())),
    "biases": (lambda: recipes.biases_only(bert()), lambda: named(input_ids=ids(), attention_mask=mask())),
}  # fmt: skip


def wrapped(net: nn.Module, inputs: dict[str, Tensor]) -> DPLipModel:
    loss = InnerProduct(1e6)
    return DPLipModel(gradient_gated(net, mode="clip", limit=LIMIT), input_shape=inputs, loss=loss)


def gradients(net: nn.Module, total: Tensor) -> dict[str, Tensor]:
    known = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(total, list(known.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(known.items(), found, strict=True)
    }


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_samples_own_each_capped_and_the_total_is_never_passed(name: str) -> None:
    torch.manual_seed(0)
    make, draw = CASES[name]
    net, inputs = quiet(make()).double().train(), draw()
    with torch.no_grad():
        expected_output = net(**inputs).logits
    targets = torch.randn_like(expected_output)
    model = wrapped(net, inputs)
    bounds = model.sensitivity().per_parameter
    with passes.unwitnessed():
        output = model(**inputs)
        found = gradients(model.net, model.loss(output, targets))
        rest = {key: value[1:] for key, value in inputs.items()}
        without = gradients(model.net, model.loss(model(rest), targets[1:]))
    torch.testing.assert_close(output.detach(), expected_output, rtol=1e-9, atol=1e-9)
    expected = {key: torch.zeros_like(value) for key, value in found.items()}
    for row in range(ROWS):
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        for key, gradient in gradients(net, (net(**alone).logits * targets[row : row + 1]).sum()).items():
            expected[key] += gradient * min(1.0, LIMIT / max(float(gradient.norm()), 1e-300))
    isolated = model.net
    assert isinstance(isolated, Isolated)
    for key, uses in isolated.uses:
        # What is used in several places is capped in each; gradients that are nothing but rounding are not compared.
        if key in found and len(uses) == 1 and float(expected[key].norm()) > 1e-12:
            assert float((found[key] - expected[key]).norm()) <= 1e-9 * float(expected[key].norm()), key
    ratios = [float((found[key] - without[key]).norm()) / bound for key, bound in bounds.items() if bound > 0.0]
    assert 0.7 <= max(ratios) <= 1 + 1e-6


USUAL = {"BERT", "GPT-2, tied"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in USUAL else pytest.mark.slow) for name in CASES], ids=str
)
@pytest.mark.skipif(not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"), reason="needs torch 2.8")
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_gradient_checkpointing_computes_each_layer_twice_and_changes_no_gradient(name: str) -> None:
    torch.manual_seed(0)
    make, draw = CASES[name]
    net, inputs = make().double().train(), draw()
    for part in net.modules():
        # Masks of the second time must be those of the first.
        if isinstance(part, nn.Dropout):
            part.p = 0.3
    model = wrapped(net, inputs)
    layer = [part for part in net.modules() if hasattr(part, "gradient_checkpointing")][-1]
    called = []
    next(part for part in layer.modules() if isinstance(part, (nn.LayerNorm, nn.Linear))).register_forward_hook(
        lambda *_: called.append(1)
    )
    targets: list[Tensor] = []

    def found() -> dict[str, Tensor]:
        with passes.unwitnessed(), model.randomness.seeded(0):
            output = model(**inputs)
            targets.append(torch.randn_like(output) if not targets else targets[0])
            return gradients(model.net, model.loss(output, targets[0]))

    expected, once = found(), len(called)
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    repeated = found()
    assert len(called) == 3 * once
    assert any(value.any() for value in expected.values())
    # The very same operations on the very same numbers.
    assert all(torch.equal(repeated[key], expected[key]) for key in expected)


def test_a_language_model_trains_with_masks_and_labels_that_are_ignored() -> None:
    torch.manual_seed(0)
    net = gpt2()
    tokens = torch.randint(2, WORDS, (40, TOKENS))
    present = (torch.arange(TOKENS) < torch.randint(2, TOKENS + 1, (40, 1))).long()
    model = DPLipModel(
        gradient_gated(net),
        input_shape={"input_ids": tokens, "attention_mask": present},
        loss=losses.CausalCrossEntropy(),
    )
    optimizer = CliplessDPSGD(model, lr=0.1, noise_multiplier=1.0, sample_rate=0.2, dataset_size=40)
    packing = model.packing
    assert packing is not None
    rows = packing.pack({"input_ids": tokens, "attention_mask": present})
    for batch in PoissonBatches((rows, tokens.masked_fill(present == 0, -100)), sample_rate=0.2, steps=2):
        optimizer.zero_grad()
        model.loss(model(batch.inputs), batch.targets, batch.mask).backward()
        optimizer.step()
    assert optimizer.accountant.history == [(1.0, 0.2, 2)]
    assert model.sensitivity().per_parameter["transformer.wte.weight"] == pytest.approx(2.0, rel=1e-3)


def test_rows_of_padding_tokens_take_no_gradient() -> None:
    torch.manual_seed(0)
    net = bert(pad_token_id=0)
    tokens = ids()
    tokens[:, -2:] = 0
    inputs = {"input_ids": tokens, "attention_mask": (tokens != 0).long()}
    model = wrapped(net.double(), inputs)
    with passes.unwitnessed():
        output = model(**inputs)
        found = gradients(model.net, model.loss(output, torch.randn_like(output)))
    assert not found["bert.embeddings.word_embeddings.weight"][0].any()
