"""The LightningModule: what it builds, trains and schedules."""

import lightning
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from small_run import PRETRAIN, Pages, small_model, small_module, small_processor, small_trainer

from deepstack_pl.batch import MultimodalBatch
from deepstack_pl.data.config import DataConfig
from deepstack_pl.training.checkpoint import RunCheckpoint
from deepstack_pl.training.config import OptimConfig, PartConfig, StageConfig
from deepstack_pl.training.datamodule import DeepStackDataModule
from deepstack_pl.training.module import DeepStackModule


class Recorder(lightning.Callback):
    """Remembers losses and rates."""

    def __init__(self):
        self.losses, self.rates, self.logged = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append({g["part"]: g["lr"] for g in optimizer.param_groups})


def fit(module, folder, steps=4, callbacks=(), resume=None, **more):
    data = DeepStackDataModule(
        Pages(), Pages(4), small_processor(), DataConfig(name="x", batch_size=4, workers=0), 0, steps
    )
    recorder = Recorder()
    trainer = small_trainer(folder, steps, callbacks=[recorder, *callbacks], **more)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return recorder


def test_the_model_is_built_once_and_stands_in_training_mode():
    built = []

    def build():
        built.append(small_model().eval())
        return built[-1]

    module = DeepStackModule(build, PRETRAIN, OptimConfig(name="adamw"), 4)
    module.configure_model()
    module.configure_model()
    assert len(built) == 1
    assert all(m.training for m in module.network.modules())
    assert module.parts is not None
    assert module.parts.trained == sum(p.numel() for p in built[0].parameters() if p.requires_grad)


def test_training_lowers_the_loss(tmp_path):
    fast = StageConfig(name="fast", **{part: PartConfig(lr=1e-2) for part in ("vision", "projector", "llm")})
    losses = fit(small_module(stage=fast, steps=30), tmp_path, 30).losses
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_each_part_warms_up_to_its_own_peak_and_decays(tmp_path):
    stage = StageConfig(
        name="rates", vision=PartConfig(lr=1e-4), projector=PartConfig(lr=1e-3), llm=PartConfig(lr=2e-3)
    )
    recorder = fit(small_module(stage=stage, steps=10, warmup_ratio=0.2), tmp_path, 10)
    llm = [rates["llm"] for rates in recorder.rates]
    assert llm[0] == 0
    assert llm[1] == pytest.approx(1e-3)
    assert llm[2] == max(llm) == 2e-3
    assert llm[-1] < 0.1 * llm[2]
    for rates in recorder.rates:
        assert rates["vision"] == pytest.approx(rates["llm"] / 20)
        assert rates["projector"] == pytest.approx(rates["llm"] / 2)
    assert [logged["lr/llm"] for logged in recorder.logged] == pytest.approx(llm)


def test_a_finished_run_that_is_extended_goes_on_at_the_new_schedule_from_its_first_step(tmp_path):
    straight = fit(small_module(steps=8), tmp_path, 8).rates
    fit(small_module(steps=4), tmp_path, 4, [RunCheckpoint(tmp_path)], enable_checkpointing=True)
    extended = fit(small_module(steps=8), tmp_path, 8, resume=tmp_path / "last.ckpt").rates
    assert extended == straight[4:]
    assert extended[0]["llm"] > 0


def test_an_ordinary_resume_keeps_every_rate_to_the_bit(tmp_path):
    straight = fit(small_module(steps=6), tmp_path, 6).rates
    fit(small_module(steps=6), tmp_path, 3, [RunCheckpoint(tmp_path)], enable_checkpointing=True)
    assert fit(small_module(steps=6), tmp_path, 6, resume=tmp_path / "last.ckpt").rates == straight[3:]


def test_frozen_parts_keep_every_bit(tmp_path):
    module = small_module(stage=PRETRAIN, warmup_ratio=0.0)
    fit(module, tmp_path)
    fresh = small_model()
    assert all(
        torch.equal(a, b)
        for a, b in zip(module.network.language_model.parameters(), fresh.language_model.parameters(), strict=True)
    )
    assert not torch.equal(next(module.network.projector.parameters()), next(fresh.projector.parameters()))


def test_supervised_tokens_are_those_that_the_loss_counts(tmp_path):
    recorder = fit(small_module(steps=1), tmp_path, 1)
    processor, pages = small_processor(), Pages()
    lengths = {len(s.labels[s.labels != -100]) for s in (processor.prepare(pages[i]) for i in range(len(pages)))}
    assert 4 * min(lengths) <= recorder.logged[0]["train/supervised_tokens"] <= 4 * max(lengths)


def test_lightning_moves_a_batch_whole():
    processor = small_processor()
    batch = processor.collate([processor.prepare(Pages()[0])])
    moved = move_data_to_device(batch, torch.device("meta"))
    assert isinstance(moved, MultimodalBatch)
    assert {t.device.type for t in moved.model_inputs().values()} == {"meta"}
    assert moved.keys == batch.keys


def test_a_run_without_steps_is_refused():
    with pytest.raises(ValueError, match=r"trainer\.max_steps=-1.*Give 1 or more"):
        DeepStackModule(small_model, PRETRAIN, OptimConfig(name="adamw"), -1)


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match=r"optim\.warmup_ratio=1\.5"):
        DeepStackModule(small_model, PRETRAIN, OptimConfig(name="adamw", warmup_ratio=1.5), 4)
