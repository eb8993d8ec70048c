"""The LightningModule: what it builds, trains and schedules."""

import csv
from dataclasses import dataclass, replace

import lightning
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.loggers import CSVLogger
from small_run import PRETRAIN, Pages, newest, small_model, small_module, small_processor, small_trainer

from deepstack_pl.batch import MultimodalBatch, Reason, Refused
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
    for logged in recorder.logged[1:]:
        norms = [logged[f"train/gradient_norm/{part}"] for part in ("vision", "projector", "llm")]
        assert all(norms)
        assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(logged["train/gradient_norm"], rel=1e-5)


def test_a_finished_run_that_is_extended_goes_on_at_the_new_schedule_from_its_first_step(tmp_path):
    straight = fit(small_module(steps=8), tmp_path, 8).rates
    fit(small_module(steps=4), tmp_path, 4, [RunCheckpoint(tmp_path)], enable_checkpointing=True)
    extended = fit(small_module(steps=8), tmp_path, 8, resume=newest(tmp_path)).rates
    assert extended == straight[4:]
    assert extended[0]["llm"] > 0


def test_an_ordinary_resume_keeps_every_rate_to_the_bit(tmp_path):
    straight = fit(small_module(steps=6), tmp_path, 6).rates
    fit(small_module(steps=6), tmp_path, 3, [RunCheckpoint(tmp_path)], enable_checkpointing=True)
    assert fit(small_module(steps=6), tmp_path, 6, resume=newest(tmp_path)).rates == straight[3:]


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


def gradients(folder, micro, refused=()):
    """Of one step on five pages, in a batch of eight."""
    config = DataConfig(name="x", batch_size=8, micro_batch_size=micro, workers=0, max_refused=1.0)
    data = DeepStackDataModule(Refusing(5, refused=refused), Pages(4), small_processor(), config, 0, 1)
    found = {}

    class After(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step:  # after the step, which leaves the gradients where they are
                grads = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
                found.update({name: grad.clone() for name, grad in grads.items() if bool(grad.any())})

    more = {"accumulate_grad_batches": config.accumulation(), "gradient_clip_val": None}
    trainer = small_trainer(folder, 1, callbacks=[After()], **more)
    trainer.fit(small_module(steps=1), datamodule=data)
    found["loss"] = trainer.callback_metrics["train/loss"]
    return found


@dataclass
class Refusing(Pages):
    refused: tuple[int, ...] = ()

    def __getitem__(self, index):
        if index in self.refused:
            raise Refused(Reason.image, f"page {index}: cannot be read.")
        return super().__getitem__(index)


@pytest.mark.parametrize("micro", [4, 2, 1])
@pytest.mark.parametrize("refused", [(), (0, 3)])
def test_rows_that_count_nothing_and_the_size_of_a_forward_change_no_gradient(tmp_path, micro, refused):
    whole, parts = gradients(tmp_path / "a", 8, refused), gradients(tmp_path / "b", micro, refused)
    assert set(whole) == set(parts)
    assert len(whole) > 50
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-6, rtol=1e-4)


def test_the_loss_by_source_is_that_of_its_samples_in_the_whole_step(tmp_path):
    @dataclass
    class Sourced(Pages):
        def __getitem__(self, index):
            return replace(super().__getitem__(index), source="left" if index < 3 else "right")

    config = DataConfig(name="x", batch_size=4, micro_batch_size=1, workers=0)
    processor, module = small_processor(), small_module(steps=2)
    data = DeepStackDataModule(Sourced(4), Pages(4), processor, config, 0, 2)
    module.configure_model()
    expected = {}
    with torch.no_grad():
        for source, rows in {"left": (0, 1, 2), "right": (3,)}.items():
            samples = [processor.prepare(Sourced(4)[index]) for index in rows]
            expected[f"train/loss/{source}"] = float(module.network(**processor.collate(samples).model_inputs()).loss)
    logger = CSVLogger(tmp_path)
    trainer = small_trainer(tmp_path, 2, logger=logger, accumulate_grad_batches=4)
    trainer.fit(module, datamodule=data)
    with open(logger.experiment.metrics_file_path) as file:
        lines = [line for line in csv.DictReader(file) if line["train/loss/left"]]
    assert [line["step"] for line in lines] == ["0", "1"]
    for name, value in expected.items():
        assert float(lines[0][name]) == pytest.approx(value, rel=1e-4)
