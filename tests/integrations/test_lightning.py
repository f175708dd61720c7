"""``PrivateTraining``: its refusals on a stand-in for Lightning's trainer, and the whole of it where Lightning is."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clipless_dp import (
    CheckpointError,
    CliplessDPSGD,
    ConfigurationError,
    DPLipModel,
    PoissonBatchSampler,
    PrivacyError,
    gradient_gated,
    losses,
    poisson_collate,
)
from clipless_dp.integrations.lightning import PrivateTraining

ROWS, RATE, STEPS = 64, 0.25, 4


def model() -> DPLipModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2))
    return DPLipModel(gradient_gated(net), input_shape=(3,), loss=losses.TauCrossEntropy(1.0))


def private(wrapped: DPLipModel) -> CliplessDPSGD:
    return CliplessDPSGD(wrapped, lr=0.1, noise_multiplier=1.0, sample_rate=RATE, dataset_size=ROWS)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(ROWS, 3, generator=generator), torch.arange(ROWS) % 2)


def draws(steps: int = STEPS) -> DataLoader[Any]:
    sampler = PoissonBatchSampler(ROWS, sample_rate=RATE, steps=steps)
    return DataLoader(data(), batch_sampler=sampler, collate_fn=poisson_collate(data()))


def stand_in(**settings: Any) -> Any:
    usual = {
        "accumulate_grad_batches": 1, "gradient_clip_val": None, "precision": "32-true", "world_size": 1,
        "overfit_batches": 0.0, "optimizers": [private(model())], "ckpt_path": None, "train_dataloader": draws(),
        "state": SimpleNamespace(fn="fit"),
    }  # fmt: skip
    return SimpleNamespace(**{**usual, **settings})


def module(**settings: Any) -> PrivateTraining:
    found = PrivateTraining()
    found.trainer = stand_in(**settings)
    return found


REFUSED = {
    "accumulation": ({"accumulate_grad_batches": 2}, "micro_batch_size"),
    "clipping": ({"gradient_clip_val": 1.0}, "noisy mean"),
    "mixed precision": ({"precision": "16-mixed"}, "32-true"),
    "half precision": ({"precision": "bf16-true"}, "32-true"),
    "several processes": ({"world_size": 2}, "torchrun"),
    "the same batches again": ({"overfit_batches": 1}, "PoissonBatchSampler"),
    "another optimizer": ({"optimizers": [torch.optim.SGD([nn.Parameter(torch.ones(1))])]}, "CliplessDPOptimizer"),
    "no optimizer": ({"optimizers": []}, "CliplessDPOptimizer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_break_the_guarantee_are_refused_with_their_remedy(name: str) -> None:
    settings, remedy = REFUSED[name]
    with pytest.raises(ConfigurationError, match=remedy):
        module(**settings).on_fit_start()


def test_options_that_keep_it_pass() -> None:
    known = module()
    known.on_fit_start()
    known.on_train_start()
    assert known.private_optimizer is known.trainer.optimizers[0]


def test_shuffled_batches_are_refused() -> None:
    shuffled = DataLoader(data(), batch_size=16, shuffle=True)
    with pytest.raises(ConfigurationError, match="Poisson"):
        module(train_dataloader=shuffled).on_train_start()


def test_sums_are_not_clipped_by_a_call_of_the_hook() -> None:
    known = module()
    known.configure_gradient_clipping(known.private_optimizer, gradient_clip_val=None)
    with pytest.raises(PrivacyError, match="before the noise"):
        known.configure_gradient_clipping(known.private_optimizer, 1.0)


def test_weights_without_a_ledger_are_not_trained_further() -> None:
    with pytest.raises(CheckpointError, match="save_weights_only"):
        module().on_load_checkpoint({"state_dict": {}})
    module(state=SimpleNamespace(fn="validate")).on_load_checkpoint({"state_dict": {}})


class TestWithLightning:
    @pytest.fixture(autouse=True)
    def _lightning(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.lightning: Any = pytest.importorskip("lightning.pytorch", reason="needs the extra 'lightning'")

    def reader(self) -> Any:
        class Reader(PrivateTraining, self.lightning.LightningModule):  # type: ignore[name-defined,misc]
            def __init__(self) -> None:
                super().__init__()
                self.model = model()

            def training_step(self, batch: list[Tensor], index: int) -> Tensor:
                return self.model.loss(self.model(batch[0]), batch[1])

            def configure_optimizers(self) -> Any:
                return private(self.model)

        return Reader()

    def trainer(self, path: Path, **options: Any) -> Any:
        usual = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
        shown = {"enable_model_summary": False, "enable_checkpointing": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.lightning.Trainer(default_root_dir=path, **{**usual, **shown, **options})

    def fit(self, trainer: Any, reader: Any, loader: Any, **options: Any) -> None:
        with warnings.catch_warnings():
            # It recommends worker processes.
            warnings.filterwarnings("ignore", module="lightning.*")
            trainer.fit(reader, loader, **options)

    def test_each_batch_is_charged_as_the_poisson_draw_that_it_is(self, tmp_path: Path) -> None:
        reader = self.reader()
        before = reader.model.net.get_parameter("0.weight").clone()
        self.fit(self.trainer(tmp_path), reader, draws())
        assert reader.private_optimizer.accountant.history == [(1.0, RATE, 2 * STEPS)]
        assert not torch.equal(reader.model.net.get_parameter("0.weight"), before)

    def test_a_resumed_run_goes_on_from_the_ledger(self, tmp_path: Path) -> None:
        first = self.trainer(tmp_path, max_epochs=1)
        self.fit(first, self.reader(), draws())
        first.save_checkpoint(tmp_path / "run.ckpt")
        reader = self.reader()
        self.fit(self.trainer(tmp_path), reader, draws(), ckpt_path=tmp_path / "run.ckpt")
        assert reader.private_optimizer.accountant.history == [(1.0, RATE, 2 * STEPS)]
        assert reader.private_optimizer.uncounted_changes == 0

    def test_what_is_refused_is_refused_before_a_step(self, tmp_path: Path) -> None:
        reader = self.reader()
        options = {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
        with pytest.raises(ConfigurationError, match=r"(?s)accumulate_grad_batches=2.*gradient_clip_val=1"):
            self.fit(self.trainer(tmp_path, **options), reader, draws())
        with pytest.raises(ConfigurationError, match="Poisson"):
            self.fit(self.trainer(tmp_path), self.reader(), DataLoader(data(), batch_size=16, shuffle=True))
        assert reader.private_optimizer.accountant.history == []

    def test_weights_that_were_saved_alone_are_not_trained_further(self, tmp_path: Path) -> None:
        first = self.trainer(tmp_path, max_epochs=1)
        self.fit(first, self.reader(), draws())
        first.save_checkpoint(tmp_path / "run.ckpt", weights_only=True)
        with pytest.raises((CheckpointError, KeyError)):
            self.fit(self.trainer(tmp_path), self.reader(), draws(), ckpt_path=tmp_path / "run.ckpt")
