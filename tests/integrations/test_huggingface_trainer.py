"""``PrivateTrainer`` on tiny models with random weights."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clipless_dp import (
    BudgetExhaustedError,
    CheckpointError,
    ConfigurationError,
    DPLipModel,
    InputError,
    PrivacyError,
    gradient_gated,
    losses,
    poisson_collate,
    recipes,
    report,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers: Any = pytest.importorskip("transformers", reason="needs the extra 'huggingface'")
    pytest.importorskip("accelerate", reason="needs the extra 'huggingface'")
    from clipless_dp.integrations.huggingface import PrivateTrainer

ROWS, TOKENS, WORDS, DELTA = 64, 6, 31, 1e-3


def net(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=WORDS,
        num_labels=2, **options,
    )  # fmt: skip
    return recipes.last_layers(transformers.BertForSequenceClassification(config), 0)


def rows(count: int = ROWS) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for index in range(count):
        ids = torch.randint(2, WORDS, (TOKENS,), generator=generator)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": index % 2})
    return found


def arguments(path: Path, **options: Any) -> Any:
    usual = {
        "per_device_train_batch_size": 16, "num_train_epochs": 1, "learning_rate": 0.1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "dataloader_pin_memory": False,
    }  # fmt: skip
    return transformers.TrainingArguments(output_dir=str(path), **{**usual, **options})


def last(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(value).unsqueeze(0) for name, value in samples[-1].items()}


def trainer(path: Path, model: nn.Module | None = None, options: dict[str, Any] | None = None, **more: Any) -> Any:
    given = {"epsilon": 3.0, "delta": DELTA, "train_dataset": rows(), "loss": losses.TauCrossEntropy(1.0), **more}
    return PrivateTrainer(net() if model is None else model, arguments(path, **(options or {})), **given)


def test_steps_are_charged_as_poisson_draws_and_stay_within_the_target(tmp_path: Path) -> None:
    private = trainer(tmp_path, micro_batch_size=5)
    before = {name: value.clone() for name, value in private.model.state_dict().items()}
    private.train()
    assert private.private_optimizer.accountant.history == [(private.noise_multiplier, 0.25, 4)]
    assert 2.5 < private.get_epsilon() <= 3.0
    after = private.model.state_dict()
    assert not torch.equal(after["classifier.weight"], before["classifier.weight"])
    assert torch.equal(
        after["bert.embeddings.word_embeddings.weight"], before["bert.embeddings.word_embeddings.weight"]
    )
    report(private.private_optimizer, tmp_path / "statement")
    assert "Poisson" in (tmp_path / "statement.md").read_text("utf-8")


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_activations_may_be_checkpointed(tmp_path: Path) -> None:
    option = "activation_checkpointing"
    if not hasattr(transformers.TrainingArguments, option):
        option = "gradient_checkpointing"
    calls = []
    for options in ({}, {option: True, f"{option}_kwargs": {"use_reentrant": False}}):
        model = recipes.full(net())
        counted: list[int] = []
        model.bert.encoder.layer[0].output.dense.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        private = trainer(tmp_path, model, {"max_steps": 2, **options})
        made = len(counted)
        private.train()
        calls.append(len(counted) - made)
        assert private.private_optimizer.accountant.history == [(private.noise_multiplier, 0.25, 2)]
    # Draws are other ones each time: their number of passes is not.
    assert calls[1] == 2 * calls[0] > 0


def test_it_learns_what_can_be_learned(tmp_path: Path) -> None:
    data = rows(256)
    for row in data:
        row["input_ids"][:] = 5 if row["labels"] else 9
    private = trainer(
        tmp_path,
        recipes.full(net(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
        {"per_device_train_batch_size": 128, "num_train_epochs": 6, "learning_rate": 0.03, "max_grad_norm": 0.0},
        train_dataset=data,
        eval_dataset=data[:20],
        epsilon=30.0,
        compute_metrics=lambda seen: {"accuracy": float((seen.predictions.argmax(1) == seen.label_ids).mean())},
    )
    private.train()
    # Chance is 0.5, and the two sentences differ in every token.
    assert private.evaluate()["eval_accuracy"] == 1.0


def test_logs_and_saved_state_tell_epsilon_and_nothing_of_the_batches(tmp_path: Path) -> None:
    private = trainer(tmp_path, options={"save_strategy": "epoch"})
    done = private.train()
    assert math.isnan(done.training_loss)
    (path,) = tmp_path.glob("checkpoint-*")
    state = json.loads((path / "trainer_state.json").read_text("utf-8"))
    assert state["total_flos"] == 0
    for entry in state["log_history"]:
        assert not {"loss", "train_loss", "grad_norm"} & {*entry}
    assert state["log_history"][0]["epsilon"] < state["log_history"][3]["epsilon"] <= 3.0


def test_the_owner_may_see_training_losses(tmp_path: Path) -> None:
    private = trainer(tmp_path, show_loss=True)
    assert private.train().training_loss > 0.1
    assert private.state.log_history[0]["loss"] > 0.1
    assert all("grad_norm" not in entry for entry in private.state.log_history)


def test_a_resumed_run_goes_on_from_the_ledger(tmp_path: Path) -> None:
    first = trainer(tmp_path, options={"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 1.5})
    first.train()
    second = trainer(tmp_path, options={"num_train_epochs": 1.5})
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert second.private_optimizer.accountant.history == [(second.noise_multiplier, 0.25, 6)]
    assert second.private_optimizer.uncounted_changes == 0
    assert not second.private_optimizer.ledger_is_incomplete()


def test_a_checkpoint_without_its_ledger_is_not_resumed(tmp_path: Path) -> None:
    trainer(tmp_path, options={"save_strategy": "epoch", "save_only_model": True}).train()
    (path,) = tmp_path.glob("checkpoint-*")
    with pytest.raises(CheckpointError, match="ledger"):
        trainer(tmp_path).train(resume_from_checkpoint=str(path))


def test_more_steps_than_the_target_pays_for_are_refused(tmp_path: Path) -> None:
    private = trainer(tmp_path)
    private.train()
    with pytest.raises(BudgetExhaustedError):
        private.train()


def test_the_norm_is_clipped_of_the_noisy_mean_alone(tmp_path: Path) -> None:
    options = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 1, "lr_scheduler_type": "constant"}
    norms = {}
    for most in (0.01, 0.0):
        private = trainer(tmp_path, options={**options, "max_grad_norm": most}, noise_multiplier=50.0, epsilon=50.0)
        before = nn.utils.parameters_to_vector(private.model.parameters()).detach()
        private.train()
        after = nn.utils.parameters_to_vector(private.model.parameters()).detach()
        norms[most] = float((after - before).norm())
    # Clipped before the noise, the step would be as long as without: noise of deviation 50·Δ/16 is most of it.
    assert norms[0.01] == pytest.approx(0.01, rel=1e-3)
    assert norms[0.0] > 1.0


def test_a_wrapped_model_and_peft_are_trained_as_they_are(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra 'text'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")
        adapted = peft.get_peft_model(net(), config)
    data = rows()
    shown = {name: torch.stack([data[0][name]]) for name in ("input_ids", "attention_mask")}
    model = DPLipModel(gradient_gated(adapted, limit=0.1), input_shape=shown, loss=losses.TauCrossEntropy(1.0))
    private = trainer(tmp_path, model, {"save_strategy": "epoch"}, loss=None, train_dataset=data)
    assert private.private_model is model
    assert private.model is adapted
    private.train()
    assert private.private_optimizer.accountant.history == [(private.noise_multiplier, 0.25, 4)]
    (path,) = tmp_path.glob("checkpoint-*")
    assert (path / "adapter_model.safetensors").exists()


def test_the_code_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {"__name__": "page"})
    assert 2.5 < float(capsys.readouterr().out.split()[-1]) <= 3.0


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gradient accumulation": ({"gradient_accumulation_steps": 2}, "micro_batch_size"),
    "half precision": ({"fp16": True}, "scaler"),
    "bfloat16": ({"bf16": True}, "precision"),
    "half evaluation": ({"bf16_full_eval": True}, "evaluate in their own"),
    "label smoothing": ({"label_smoothing_factor": 0.1}, "label_smoothing"),
    "batches by length": ({"train_sampling_strategy": "group_by_length"}, "Poisson"),
    "noise on embeddings": ({"neftune_noise_alpha": 5.0}, "hooks"),
    "a batch size that is found": ({"auto_find_batch_size": True}, "promise"),
    "peaks of memory": ({"skip_memory_metrics": False}, "draws"),
    "counts of tokens": ({"include_num_input_tokens_seen": "all"}, "count"),
    "a schedule that follows losses": ({"lr_scheduler_type": "greedy"}, "schedule"),
    "a schedule that follows accuracy": ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "schedule"),
    "updates within the backward pass": ({"optim": "lomo"}, "noise"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_break_the_guarantee_are_refused_with_their_remedy(name: str, tmp_path: Path) -> None:
    options, remedy = REFUSED[name]
    ((option, value),) = options.items()
    if not hasattr(transformers.TrainingArguments, option):
        pytest.skip(f"transformers {transformers.__version__} has no {option}")
    args = arguments(tmp_path)
    # Some of these transformers refuses itself, without a GPU or an evaluation.
    setattr(args, option, value)
    with pytest.raises(ConfigurationError, match=f"(?s){option}.*{remedy}"):
        PrivateTrainer(net(), args, epsilon=3.0, delta=DELTA, train_dataset=rows(), loss=losses.TauCrossEntropy(1.0))


@pytest.mark.parametrize("name", ["world_size", "n_gpu"])
def test_several_devices_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(tmp_path)
    monkeypatch.setattr(type(args), name, property(lambda self: 2))
    with pytest.raises(ConfigurationError, match=f"{name}=2"):
        PrivateTrainer(net(), args, epsilon=3.0, delta=DELTA, train_dataset=rows(), loss=losses.TauCrossEntropy(1.0))


def test_a_loss_without_a_bound_and_a_new_network_for_each_trial_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="compute_loss_func"):
        trainer(tmp_path, compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits.sum())
    with pytest.raises(ConfigurationError, match="model_init"):
        trainer(tmp_path, model_init=net)
    with pytest.raises(PrivacyError, match="private_search"):
        trainer(tmp_path).hyperparameter_search()


def test_batches_that_are_padded_to_their_longest_sample_are_refused(tmp_path: Path) -> None:
    class Pads:
        padding = True

        def __call__(self, samples: list[Any]) -> Any:
            raise AssertionError

    with pytest.raises(ConfigurationError, match="max_length"):
        trainer(tmp_path, data_collator=Pads())


def _masking(**options: Any) -> Any:
    tokenizers: Any = pytest.importorskip("tokenizers")
    words = {word: index for index, word in enumerate(["[PAD]", "[MASK]", *map(str, range(2, WORDS))])}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[PAD]"))
    known = transformers.PreTrainedTokenizerFast(tokenizer_object=own, pad_token="[PAD]", mask_token="[MASK]")
    return transformers.DataCollatorForLanguageModeling(known, mlm=True, mlm_probability=0.5, **options)


def _of_text() -> list[dict[str, Any]]:
    return [{"input_ids": row["input_ids"], "attention_mask": row["attention_mask"]} for row in rows()]


def test_words_are_masked_for_each_sample_alone_and_by_no_seed_of_a_user() -> None:
    masking, data = _masking(), _of_text()
    own = poisson_collate(data, masking)

    def labels(collate: Any, count: int) -> Any:
        torch.manual_seed(0)
        return collate(data[:count])["labels"]

    assert torch.equal(labels(masking, ROWS), labels(masking, ROWS))
    made = labels(own, ROWS)
    # 64 rows of 6 words each, of which half are masked: alike once in 2³⁸⁴.
    assert not torch.equal(made, labels(own, ROWS))
    # Deviation of a share of 384 fair coins: 0.026; six of them.
    assert abs(float((made >= 0).double().mean()) - 0.5) < 0.16


def test_masks_of_a_seeded_generator_are_refused(tmp_path: Path) -> None:
    masking = _masking(seed=3)
    with pytest.raises(ConfigurationError, match="generator of its own"):
        poisson_collate(_of_text(), masking)
    with pytest.raises(ConfigurationError, match=r"data_collator=.*generator of its own"):
        trainer(tmp_path, data_collator=Drawing())


@pytest.mark.parametrize("found", [True, None, 3], ids=str)
def test_a_collator_that_adds_what_is_no_tensor_is_named(tmp_path: Path, found: Any) -> None:
    def flagged(samples: list[Any]) -> Any:
        return {**transformers.default_data_collator(samples), "return_loss": found}

    with pytest.raises(ConfigurationError, match=f"collate function gives {found} for 'return_loss'"):
        trainer(tmp_path, data_collator=flagged)


@pytest.mark.parametrize("kind", ["WithPadding", "ForTokenClassification", "ForSeq2Seq", "ForLanguageModeling"])
def test_collators_of_transformers_remember_no_sample(kind: str) -> None:
    known = _masking().tokenizer
    padded = {"padding": "max_length", "max_length": 8}
    options: dict[str, Any] = {"pad_to_multiple_of": 8} if kind == "ForLanguageModeling" else padded
    collate = getattr(transformers, f"DataCollator{kind}")(known, **options)
    data: list[dict[str, Any]] = [{"input_ids": [*range(2, 3 + index)]} for index in range(5)]
    if kind in ("ForTokenClassification", "ForSeq2Seq"):
        data = [{**row, "labels": row["input_ids"]} for row in data]
    own = poisson_collate(data, collate)
    for _ in range(2):
        assert own(data)["input_ids"].shape == (5, 8)
    # The first call of a tokenizer notes that it has warned.
    assert poisson_collate(data, lambda rows: known.pad(rows, return_tensors="pt", **padded))


class Drawing:
    def __init__(self) -> None:
        self.generator = torch.Generator()

    def __call__(self, samples: list[Any]) -> Any:
        return transformers.default_data_collator(samples)


def test_centring_by_the_batch_moves_the_sum_by_no_more_than_the_bound(tmp_path: Path) -> None:
    class Silent:
        reproducible = False

        def begin_step(self, *given: Any) -> None: ...

        def standard_normal_(self, values: torch.Tensor) -> torch.Tensor:
            return values.zero_()

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

        def forward(self, x: torch.Tensor, labels: Any = None) -> Any:
            return self.layers(x)

    def centred(samples: list[Any]) -> Any:
        batch = transformers.default_data_collator(samples)
        return {**batch, "x": batch["x"] - batch["x"].mean(0)}

    def moved(data: list[Any]) -> tuple[torch.Tensor, float]:
        options = {
            "per_device_train_batch_size": len(data), "max_steps": 1, "learning_rate": 1.0, "optim": "sgd",
            "max_grad_norm": 0.0, "lr_scheduler_type": "constant",
        }  # fmt: skip
        model = Plain()
        private = trainer(tmp_path, model, options, train_dataset=data, noise=Silent(), data_collator=centred)
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        private.train()
        after = nn.utils.parameters_to_vector(model.parameters()).detach()
        return (after - before) * len(data), private.private_model.sensitivity().total

    generator = torch.Generator().manual_seed(0)
    data = [{"x": torch.randn(4, generator=generator), "labels": index % 2} for index in range(60)]
    (one, bound), (other, _) = moved(data), moved([{"x": torch.full((4,), 3.0), "labels": 1}, *data])
    # Rounding of the mean's product with the number of rows. Of the batch as a whole it was 1.19.
    assert 0.1 < float((one - other).norm()) / bound <= 1.0 + 1e-4


def test_samples_of_another_length_are_refused_before_anything_is_charged(tmp_path: Path) -> None:
    data = rows(2)
    for row in data[1:]:
        row["input_ids"], row["attention_mask"] = row["input_ids"][:-1], row["attention_mask"][:-1]
    # At q = 1 each sample is drawn; the collator keeps the last alone.
    options = {"per_device_train_batch_size": 2, "remove_unused_columns": False}
    private = trainer(tmp_path, options=options, train_dataset=data, data_collator=last, delta=0.1)
    with pytest.raises(InputError, match="one length"):
        private.train()
    assert private.private_optimizer.accountant.history == []


def test_a_sample_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    data = rows()
    with pytest.raises(PrivacyError, match=r"one and the same|lie on one another"):
        trainer(tmp_path, train_dataset=[*data, data[0]]).train()


def test_gradients_past_the_gates_are_refused_when_a_callback_adds_them(tmp_path: Path) -> None:
    class Adds(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **known: Any) -> None:
            known["model"].classifier.weight.grad.add_(1.0)

    private = trainer(tmp_path, callbacks=[Adds()])
    with pytest.raises(PrivacyError):
        private.train()
    assert private.private_optimizer.accountant.history == []


@pytest.mark.parametrize("isolation", ["vmap", "graph"])
def test_a_network_that_is_behind_gates_already_is_refused_in_words(isolation: Any, tmp_path: Path) -> None:
    plain = net() if isolation == "vmap" else nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ConfigurationError, match=r"give the network as it was, and .* gates=\{"):
        trainer(tmp_path, gradient_gated(plain, isolation=isolation))


def test_a_collator_is_called_first_where_its_state_is_compared(tmp_path: Path) -> None:
    class Labels:
        """Numbers labels from the first one on that it was called on."""

        first: Any = None

        def __call__(self, samples: list[dict[str, Any]]) -> Any:
            if self.first is None:
                self.first = {"label": int(samples[0]["labels"])}
            batch = transformers.default_data_collator(samples)
            return {**batch, "labels": (batch["labels"] - self.first["label"]).abs()}

    made = trainer(tmp_path, data_collator=Labels())
    with pytest.raises(PrivacyError, match=r"Labels\.data_collator\.first: absent → dict"):
        made.train()
