from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clipless_dp import ConfigurationError, DPLipModel, gradient_gated, losses, recipes
from clipless_dp.recipes import LoRALinear
from tests.support import with_each_of

ROUNDING = 1e-12
"""Of sums of at most a hundred products of numbers near one, in float64."""


@pytest.fixture(autouse=True)
def _double_precision():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class ResidualBlock(nn.Module):
    def __init__(self, before: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.downsample = nn.Sequential(nn.Conv2d(before, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, values: Tensor) -> Tensor:
        return (self.bn1(self.conv1(values)) + self.downsample(values)).relu()


class ResNet(nn.Module):
    """Modules under the names that torchvision and timm give them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(ResidualBlock(4, 4), ResidualBlock(4, 4))
        self.layer2 = nn.Sequential(ResidualBlock(4, 6), ResidualBlock(6, 6))
        self.fc = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.bn1(self.conv1(images)).relu())).mean((2, 3)))


class VisionTransformer(nn.Module):
    """As torchvision's: blocks in a list, a head that is a list of plain layers."""

    def __init__(self) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.encoder = encoder()
        self.ln = nn.LayerNorm(8)
        self.heads = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.heads(
            self.ln(self.encoder(torch.cat((self.class_token.expand(len(tokens), 1, 8), tokens), 1)))[:, 0]
        )


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 20, bias=False)
        self.lm_head.weight = self.embedding.weight


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def trained(net: nn.Module) -> list[str]:
    return [name for name, parameter in net.named_parameters() if parameter.requires_grad]


def below(net: nn.Module, *prefixes: str) -> list[str]:
    return [name for name, _ in net.named_parameters() if name.startswith(prefixes)]


def moved(net: nn.Module) -> nn.Module:
    """Adapters that are no longer zero, statistics that are no longer those of a new network."""
    for module in net.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_B.weight)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.1, 2.0)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return net


# Who trains.


def test_freeze_and_full_set_all_parameters_and_return_the_network() -> None:
    net = perceptron()
    assert recipes.freeze(net) is net
    assert not trained(net)
    assert recipes.full(net) is net
    assert trained(net) == below(net, "")


def test_a_gradient_left_on_a_frozen_parameter_is_dropped() -> None:
    net = perceptron()
    net(torch.randn(4, 6)).sum().backward()
    recipes.only(net, "5")
    assert [name for name, parameter in net.named_parameters() if parameter.grad is not None] == ["5.weight", "5.bias"]


def test_full_leaves_integers_frozen() -> None:
    net = nn.Linear(2, 2)
    net.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    assert trained(recipes.full(net)) == ["weight", "bias"]


def test_a_name_means_a_module_a_parameter_or_the_end_of_a_path() -> None:
    net = VisionTransformer()
    assert trained(recipes.only(net, ["class_token", "linear2", "heads.?"])) == [
        "class_token",
        "encoder.layers.0.linear2.weight",
        "encoder.layers.0.linear2.bias",
        "encoder.layers.1.linear2.weight",
        "encoder.layers.1.linear2.bias",
        *below(net, "heads"),
    ]


@pytest.mark.parametrize(
    ("count", "names"),
    [
        (0, ["fc"]),
        (1, ["layer2.1", "fc"]),
        (2, ["layer2", "fc"]),
        (3, ["layer1.1", "layer2", "fc"]),
        (4, ["layer1", "layer2", "fc"]),
    ],
)
def test_last_layers_of_a_resnet_are_residual_blocks_and_the_head(count: int, names: list[str]) -> None:
    net = ResNet()
    assert trained(recipes.last_layers(net, count)) == below(net, *names)


@pytest.mark.parametrize(
    ("count", "names"),
    [(0, ["ln", "heads"]), (1, ["encoder.layers.1", "ln", "heads"]), (2, ["encoder", "ln", "heads"])],
)
def test_a_list_of_plain_layers_is_a_head_where_others_hold_blocks(count: int, names: list[str]) -> None:
    net = VisionTransformer()
    assert trained(recipes.last_layers(net, count)) == below(net, *names)


@pytest.mark.parametrize(("count", "names"), [(1, ["5"]), (2, ["3", "5"]), (3, ["0", "1", "3", "5"])])
def test_last_layers_of_a_perceptron_are_its_linear_layers(count: int, names: list[str]) -> None:
    net = perceptron()
    assert trained(recipes.last_layers(net, count)) == below(net, *names)


def test_last_layers_of_a_body_and_a_head_in_a_sequence_are_its_elements() -> None:
    net = nn.Sequential(encoder(), nn.Linear(8, 3))
    assert trained(recipes.last_layers(net)) == ["1.weight", "1.bias"]
    assert trained(recipes.last_layers(net, 2)) == below(net, "")


def test_last_layers_without_lists_are_layers() -> None:
    block = ResidualBlock(2, 3)
    block.downsample = nn.Conv2d(2, 3, 1)
    assert trained(recipes.last_layers(block)) == ["downsample.weight", "downsample.bias"]
    assert trained(recipes.last_layers(nn.Linear(2, 3))) == ["weight", "bias"]


def test_a_name_that_begins_as_a_blocks_does_is_not_in_the_block() -> None:
    net = nn.Module()
    net.conv, net.conv_norm = nn.Conv2d(2, 3, 1), nn.GroupNorm(1, 3)
    assert trained(recipes.last_layers(net, 0)) == ["conv_norm.weight", "conv_norm.bias"]


def test_a_tied_head_stays_with_its_embedding() -> None:
    net = Tied()
    assert trained(recipes.last_layers(net)) == ["layers.1.weight", "layers.1.bias", "norm.weight", "norm.bias"]


def test_biases_only_trains_biases_and_the_head() -> None:
    net = VisionTransformer()
    biases = [name for name in below(net, "") if name.rpartition(".")[2] in ("bias", "in_proj_bias")]
    assert "encoder.layers.0.self_attn.in_proj_bias" in biases
    assert trained(recipes.biases_only(net, also=())) == biases
    assert set(trained(recipes.biases_only(net))) == {*biases, "heads.0.weight", "heads.2.weight"}
    assert set(trained(recipes.biases_only(net, also=["class_*"]))) == {*biases, "class_token"}


def test_a_recurrent_layer_has_biases_of_longer_names() -> None:
    assert trained(recipes.biases_only(nn.LSTM(2, 3))) == ["bias_ih_l0", "bias_hh_l0"]


def test_a_table_of_relative_positions_is_no_bias() -> None:
    net = nn.Linear(2, 3)
    net.relative_position_bias_table = nn.Parameter(torch.zeros(3, 2))
    assert trained(recipes.biases_only(net)) == ["bias"]


def test_a_part_of_a_block_is_no_head() -> None:
    net = ResNet()
    net.layer1[0].fc = nn.Linear(4, 4)
    assert "layer1.0.fc.weight" not in trained(recipes.biases_only(net))
    assert "fc.weight" in trained(net)


# Low-rank adapters.


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_adapters_start_as_nothing_and_fold_into_the_layer(data: st.DataObject) -> None:
    inside, outside = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    rank = data.draw(st.integers(1, min(inside, outside)))
    alpha = data.draw(st.none() | st.floats(0.1, 30.0))
    layer = nn.Linear(inside, outside, bias=data.draw(st.booleans()))
    shape = data.draw(st.lists(st.integers(0, 3), max_size=2))
    values = torch.randn(*shape, inside)
    before, weight = layer(values), layer.weight.detach().clone()

    adapted = recipes.lora(layer, rank, alpha=alpha)
    assert torch.equal(adapted(values), before)
    assert trained(adapted) == ["lora_A.weight", "lora_B.weight"]
    assert adapted.lora_A.weight.shape == (rank, inside)
    assert adapted.lora_B.weight.shape == (outside, rank)

    moved(adapted)
    scale = 1.0 if alpha is None else alpha / rank
    expected = before + scale * values @ (adapted.lora_B.weight @ adapted.lora_A.weight).mT
    after = adapted(values)
    assert torch.allclose(after, expected, rtol=ROUNDING, atol=100 * ROUNDING)
    assert torch.equal(layer.weight, weight)

    assert recipes.merge_lora(adapted) is layer
    assert torch.allclose(layer(values), after, rtol=ROUNDING, atol=100 * ROUNDING)
    assert not trained(layer)


def test_adapters_of_a_network_keep_names_and_go_with_them() -> None:
    net = VisionTransformer()
    names, values = list(net.state_dict()), torch.randn(2, 5, 8)
    # Torch multiplies by what is frozen in another order.
    before = recipes.freeze(net)(values)
    assert recipes.lora(net, 2) is net
    assert torch.equal(net(values), before)
    assert trained(net) == [
        *(f"encoder.layers.{i}.linear{j}.lora_{k}.weight" for i in (0, 1) for j in (1, 2) for k in "AB"),
        *below(net, "heads"),
    ]
    assert [name.replace(".base.", ".") for name in net.state_dict() if "lora_" not in name] == names
    after = moved(net)(values)
    assert not torch.allclose(after, before)
    recipes.merge_lora(net)
    assert list(net.state_dict()) == names
    assert torch.allclose(net(values), after, rtol=ROUNDING, atol=100 * ROUNDING)


def test_torchs_fused_encoder_layer_that_reads_weights_sees_the_adapters() -> None:
    net = moved(recipes.lora(encoder(), 2))
    values = torch.randn(2, 5, 8)
    trained_with = net.train()(values)
    with torch.no_grad():
        assert torch.allclose(net.eval()(values), trained_with, rtol=ROUNDING, atol=100 * ROUNDING)


def test_named_layers_alone_are_adapted_and_modes_and_dtypes_are_kept() -> None:
    net = recipes.lora(encoder().float().eval(), 3, layers=["layers.1.linear1"], also="norm2")
    assert [name for name, module in net.named_modules() if isinstance(module, LoRALinear)] == ["layers.1.linear1"]
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    assert not any(module.training for module in net.modules())
    assert len(trained(net)) == 2 + 4


def test_a_layer_at_two_places_is_adapted_once() -> None:
    layer = nn.Linear(4, 4)
    net = recipes.lora(nn.Sequential(layer, nn.Tanh(), layer), 2)
    assert net[0] is net[2]
    assert recipes.merge_lora(net)[2] is layer
    assert net[0] is layer


def test_a_tied_head_is_not_adapted() -> None:
    net = recipes.lora(Tied(), 2)
    assert net.lm_head.weight is net.embedding.weight
    assert len(trained(net)) == 4


def test_a_weight_that_a_hook_computes_is_not_adapted() -> None:
    with pytest.warns(FutureWarning):
        normalised = nn.utils.weight_norm(nn.Linear(4, 4))
    net = recipes.lora(nn.Sequential(normalised, nn.Linear(4, 4)), 2)
    assert trained(net) == ["1.lora_A.weight", "1.lora_B.weight"]


def test_adapters_can_be_copied_and_pickled() -> None:
    net, values = moved(recipes.lora(perceptron(), 2)), torch.randn(4, 6)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(values), net(values))


def test_gradient_gates_bound_the_adapters_and_nothing_else() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    net = moved(recipes.lora(net, 2, also=()))
    values = torch.randn(5, 6)
    expected = net(values)
    model = DPLipModel(gradient_gated(net), input_shape=(6,), input_norm=10.0, loss=losses.TauCrossEntropy(2.0))
    assert set(model.sensitivity().per_parameter) == set(trained(net))
    assert torch.allclose(model(values), expected, rtol=ROUNDING, atol=ROUNDING)


# Batch norms.


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(6), (3, 6)),
        (nn.BatchNorm1d(6, affine=False), (3, 6, 4)),
        (nn.BatchNorm2d(6, eps=0.1), (3, 6, 4, 5)),
        (nn.BatchNorm3d(6, momentum=None), (3, 6, 2, 3, 2)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frozen_statistics_are_the_batch_norm_in_evaluation_to_the_bit(norm, shape, dtype) -> None:
    norm = moved(norm).to(dtype).eval()
    values = torch.randn(shape, dtype=dtype)
    expected = norm(values)
    frozen = recipes.convert_batchnorm(norm, "frozen").train()
    assert torch.equal(frozen(values), expected)
    assert frozen.state_dict().keys() == norm.state_dict().keys()
    # The same under vmap, each sample with a batch axis of its own; sums there may run in another order.
    apart = torch.func.vmap(lambda value: frozen(value.unsqueeze(0)).squeeze(0))(values)
    assert torch.allclose(
        apart, expected, rtol=0.0, atol=20 * torch.finfo(dtype).eps * float(expected.detach().abs().max() + 10)
    )


@pytest.mark.parametrize("to", ["frozen", "group"])
def test_no_sample_of_a_converted_network_changes_another(to: str) -> None:
    net, images = moved(ResNet()).eval(), torch.randn(4, 3, 6, 6)
    expected = net(images)
    converted = recipes.convert_batchnorm(copy.deepcopy(net).train(), to)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())
    state = copy.deepcopy(converted.state_dict())
    whole, alone = converted(images), torch.cat([converted(image[None]) for image in images])
    assert torch.allclose(whole, alone, rtol=ROUNDING, atol=100 * ROUNDING)
    assert torch.equal(whole, expected) == (to == "frozen")
    assert all(torch.equal(value, state[name]) for name, value in converted.state_dict().items())


def test_conversion_keeps_weights_what_trains_and_modes() -> None:
    for to in ("group", "frozen"):
        norm = moved(nn.BatchNorm2d(12, eps=0.01)).eval()
        norm.weight.requires_grad_(False)
        converted = recipes.convert_batchnorm(norm, to)
        assert converted.weight is norm.weight
        assert converted.bias is norm.bias
        assert converted.eps == norm.eps
        assert trained(converted) == ["bias"]
        assert not converted.training


@given(st.integers(1, 300))
def test_groups_are_the_largest_divisor_up_to_32(channels: int) -> None:
    norm = recipes.convert_batchnorm(nn.BatchNorm2d(channels))
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_channels == channels
    assert norm.num_groups == max(groups for groups in range(1, 33) if channels % groups == 0)


@given(st.integers(2, 300))
def test_vectors_are_not_normalised_to_nothing(channels: int) -> None:
    norm = recipes.convert_batchnorm(nn.BatchNorm1d(channels, affine=False))
    assert channels // norm.num_groups >= min(16, channels)
    assert norm(torch.arange(1.0, channels + 1)[None]).abs().max() > 0.5


def test_a_shared_batch_norm_is_replaced_at_all_its_places() -> None:
    norm = nn.BatchNorm1d(4)
    net = recipes.convert_batchnorm(nn.Sequential(norm, nn.Linear(4, 4), norm), groups=2)
    assert net[0] is net[2]
    assert net[0].num_groups == 2


def test_a_network_without_batch_norms_stays_as_it_is() -> None:
    net = encoder()
    modules = list(net.modules())
    assert recipes.convert_batchnorm(net) is net
    assert list(net.modules()) == modules


# What is refused.


class Activated(nn.BatchNorm2d):
    """As timm's: a batch norm that activates, too."""

    def forward(self, values: Tensor) -> Tensor:
        return super().forward(values).relu()


def hooked() -> nn.Module:
    norm = nn.BatchNorm1d(4)
    norm.register_forward_hook(lambda module, values, output: None)
    return nn.Sequential(norm)


REFUSED: dict[str, tuple[Any, str]] = {
    "no module": (lambda: recipes.freeze([1]), "nn.Module, got list"),
    "a lazy module": (lambda: recipes.full(nn.Sequential(nn.LazyLinear(3))), "run the network once"),
    "a name that there is not": (lambda: recipes.only(perceptron(), ["5", "classifier"]), "'classifier'; there are 0"),
    "no names": (lambda: recipes.only(perceptron(), []), "at least one"),
    "a number for names": (lambda: recipes.only(perceptron(), 5), "names must be names"),
    "a name that is none": (lambda: recipes.only(perceptron(), [5]), "names must be names"),
    "no biases": (lambda: recipes.biases_only(nn.Linear(2, 2, bias=False)), "no biases; name what"),
    "an unknown companion": (lambda: recipes.biases_only(perceptron(), also="head"), "also: no module .* 'head'"),
    "too many layers": (lambda: recipes.last_layers(ResNet(), 5), "has 4 blocks, not 5: layer1.0, layer1.1"),
    "half a layer": (lambda: recipes.last_layers(ResNet(), 0.5), "count must be a whole number"),
    "fewer than no layers": (lambda: recipes.last_layers(ResNet(), -1), "count must be a whole number"),
    "no matrix": (lambda: recipes.last_layers(nn.LayerNorm(3), 0), "no layer with a matrix"),
    "no head": (lambda: recipes.last_layers(perceptron(), 0), "nothing is registered .* count=1"),
    "an unknown layer": (lambda: recipes.lora(encoder(), layers="query"), "'query'; there are layers.0.linear1"),
    "a layer that trains whole": (lambda: recipes.lora(ResNet(), layers="fc"), "fc is left out: also= trains"),
    "a tied layer": (lambda: recipes.lora(Tied(), layers="lm_head"), "another module shares its weight"),
    "no linear layer": (lambda: recipes.lora(nn.Conv2d(1, 1, 1)), "there are none"),
    "no layer named": (lambda: recipes.lora(encoder(), layers=()), "layers names nothing"),
    "no rank": (lambda: recipes.lora(encoder(), 0), "rank must be a whole number"),
    "too high a rank": (lambda: recipes.lora(encoder(), 9), "rank 9 is larger than a side .*layers.1.linear2; lower"),
    "a negative alpha": (lambda: recipes.lora(encoder(), alpha=-1.0), "alpha must be"),
    "adapters twice": (lambda: recipes.lora(recipes.lora(encoder())), "merge_lora"),
    "nothing to merge": (lambda: recipes.merge_lora(encoder()), "no adapters"),
    "an unknown conversion": (lambda: recipes.convert_batchnorm(ResNet(), "layer"), "to must be 'group' or 'frozen'"),
    "groups that do not divide": (lambda: recipes.convert_batchnorm(ResNet(), groups=4), r"layer2.0.bn1 .* 6 channels"),
    "no groups": (lambda: recipes.convert_batchnorm(ResNet(), groups=0), "groups must be a whole number"),
    "frozen groups": (lambda: recipes.convert_batchnorm(ResNet(), "frozen", groups=2), "leave them out"),
    "no statistics": (
        lambda: recipes.convert_batchnorm(nn.BatchNorm1d(3, track_running_stats=False), "frozen"),
        "no running statistics to freeze; use to='group'",
    ),
    "synchronised": (lambda: recipes.convert_batchnorm(nn.Sequential(nn.SyncBatchNorm(3))), "0 .*over processes"),
    "a lazy batch norm": (lambda: recipes.convert_batchnorm(nn.LazyBatchNorm2d()), "run the network once"),
    "a batch norm that does more": (lambda: recipes.convert_batchnorm(Activated(3)), "Activated.* may do more"),
    "a hooked batch norm": (lambda: recipes.convert_batchnorm(hooked()), "has hooks"),
}


@with_each_of("ask, message", REFUSED)
def test_is_refused_with_what_to_do(ask: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ask()


def test_who_is_refused_finds_the_network_as_it_was() -> None:
    net = nn.Sequential(ResNet(), nn.SyncBatchNorm(5), encoder())
    modules, names = list(net.modules()), trained(net)
    for refused in (
        lambda: recipes.convert_batchnorm(net),
        lambda: recipes.convert_batchnorm(net, groups=4),
        lambda: recipes.lora(net, 9),
        lambda: recipes.lora(net, layers=["linear1", "query"]),
        lambda: recipes.biases_only(net, also="query"),
        lambda: recipes.last_layers(net, 9),
    ):
        with pytest.raises(ConfigurationError):
            refused()
    assert list(net.modules()) == modules
    assert trained(net) == names


# Networks of others.


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="the package transformers is not installed")


SMALL = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
TOKENS = torch.arange(12).reshape(2, 6)


def bert(transformers: Any) -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL)).eval()


def gpt2(transformers: Any) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=30, n_embd=8, n_layer=2, n_head=2, n_positions=10, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def test_a_bert_trains_as_its_users_expect(transformers: Any) -> None:
    net = bert(transformers)
    head = below(net, "bert.pooler", "classifier")
    assert trained(recipes.last_layers(net, 2)) == below(net, "bert.encoder.layer.1", "bert.encoder.layer.2") + head
    assert trained(recipes.last_layers(net, 0)) == head
    biases = [name for name in below(net, "") if name.endswith("bias")]
    assert set(trained(recipes.biases_only(net))) == {*biases, "classifier.weight"}
    recipes.lora(net, 4, layers=["query", "value"])
    adapters = [
        f"bert.encoder.layer.{layer}.attention.self.{name}.lora_{letter}.weight"
        for layer in range(3)
        for name in ("query", "value")
        for letter in "AB"
    ]
    assert trained(net) == [*adapters, "classifier.weight", "classifier.bias"]


def test_the_documentation_counts_what_trains(transformers: Any) -> None:
    page = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)\(net(.*?)\)` \| .* \| ([\d ]+) \|$", page, re.MULTILINE)
    assert len(rows) == 8
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    for recipe, arguments, count in rows:
        with torch.device("meta"):
            net = transformers.BertForSequenceClassification(config)
        eval(f"recipes.{recipe}(net{arguments})", {"recipes": recipes, "net": net})
        trained = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
        assert f"{trained:,}".replace(",", " ") == count


@pytest.mark.parametrize("make", [bert, gpt2])
def test_adapters_in_a_transformer_start_as_nothing_and_fold_into_it(make: Any, transformers: Any) -> None:
    net = make(transformers)
    names, before = list(net.state_dict()), recipes.freeze(net)(TOKENS).logits
    recipes.lora(net, 4, alpha=8.0)
    assert torch.equal(net(TOKENS).logits, before)
    after = moved(net)(TOKENS).logits
    assert not torch.allclose(after, before)
    recipes.merge_lora(net)
    assert torch.allclose(net(TOKENS).logits, after, rtol=ROUNDING, atol=100 * ROUNDING)
    assert list(net.state_dict()) == names


def test_a_tied_gpt2_trains_its_last_block_and_keeps_its_embedding(transformers: Any) -> None:
    net = gpt2(transformers)
    assert trained(recipes.last_layers(net)) == below(net, "transformer.h.1", "transformer.ln_f")
    recipes.lora(net, 2)
    assert net.lm_head.weight is net.transformer.wte.weight
    # Two layers of c_attn, c_fc and two c_proj, each with two adapters.
    assert len(trained(net)) == 2 * 4 * 2


def test_a_t5_that_reads_the_dtype_of_a_weight_runs_with_adapters(transformers: Any) -> None:
    config = transformers.T5Config(
        vocab_size=30, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    net = transformers.T5ForConditionalGeneration(config).eval()
    before = recipes.freeze(net)(input_ids=TOKENS, labels=TOKENS).logits
    assert torch.equal(recipes.lora(net, 2)(input_ids=TOKENS, labels=TOKENS).logits, before)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_are_those_of_peft(transformers: Any) -> None:
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    net = bert(transformers)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value"], lora_dropout=0.0
    )
    theirs = peft.get_peft_model(copy.deepcopy(net), config).eval()
    ours = moved(recipes.lora(net, 4, alpha=8.0, layers=["query", "value"]))

    def named(model: nn.Module) -> dict[str, Tensor]:
        noise = ("base_model.model.", ".default", ".modules_to_save")
        parameters = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
        for part in noise:
            parameters = [(name.replace(part, ""), value) for name, value in parameters]
        return dict(parameters)

    assert named(ours).keys() == named(theirs).keys()
    with torch.no_grad():
        for name, value in named(theirs).items():
            value.copy_(named(ours)[name])
    assert torch.allclose(theirs(TOKENS).logits, ours(TOKENS).logits, rtol=ROUNDING, atol=100 * ROUNDING)
