"""Trainers that others wrote, with a whitened model in the plain one's place and nothing else changed."""

import copy
from types import SimpleNamespace

import diffusers
import lightning
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from whiten_layers import FeatureWhitening, WhitenedLinear, plain_state_dict, report, unwhiten, whiten
from whiten_layers.trainers import hugging_face as hugging_face_callbacks
from whiten_layers.trainers import lightning as lightning_callbacks

# They warn of many things, none of which is ours.
pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 12


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4)
        self.model = whiten(
            nn.Sequential(*layers), FeatureWhitening(output_power=0.5, update_interval=4, statistics_interval=4)
        )

    def training_step(self, batch, number):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}],
    ids=["plain", "bf16", "accumulating"],
)
def test_lightning(tmp_path, options):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(96, 1, 8, 8, generator=generator), torch.randint(4, (96,), generator=generator))

    def trainer(epochs):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", devices=1, default_root_dir=tmp_path, **quiet, **options
        )

    whole, first, second = Digits(), Digits(), Digits()
    trainer(2).fit(whole, DataLoader(data, 16))
    assert whole.model[0].transform.num_batches_tracked == STEPS
    assert {row.skipped for row in report(whole).rows} == {0}
    half = trainer(1)
    half.fit(first, DataLoader(data, 16))
    half.save_checkpoint(tmp_path / "half.ckpt")
    trainer(2).fit(second, DataLoader(data, 16), ckpt_path=tmp_path / "half.ckpt")
    torch.testing.assert_close(second.state_dict(), whole.state_dict(), rtol=0, atol=0)


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=30, max_position_embeddings=12, num_labels=3, **sizes)
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True}, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}],
    ids=["plain", "bf16", "accumulating, checkpointing"],
)
def test_hugging_face(tmp_path, options):
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(30, (96, 12), generator=generator)
    data = [{"input_ids": row, "labels": row[0] % 3} for row in words]

    def trainer(model, steps):
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-3, save_steps=STEPS // 2,
            lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True, **options,
        )  # fmt: skip
        return transformers.Trainer(model, arguments, train_dataset=data)

    # Statistics at each refresh alone: nothing is observed that a checkpoint does not have
    transform = FeatureWhitening(statistics_interval=10)
    whole = whiten(bert(), transform)
    trainer(whole, STEPS).train()
    layers = [module for module in whole.modules() if hasattr(module, "transform") and hasattr(module, "weight")]
    assert len(layers) == 14  # six in each block, the pooler, the classifier
    batches = STEPS * options.get("gradient_accumulation_steps", 1)
    assert {int(layer.transform.num_batches_tracked) for layer in layers} == {batches}
    assert {row.skipped for row in report(whole).rows} == {0}

    resumed = whiten(bert(), transform)
    trainer(resumed, STEPS).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)

    unwhiten(whole).save_pretrained(tmp_path / "plain")
    plain = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(plain.state_dict(), whole.state_dict(), rtol=0, atol=0)


class Written(lightning.pytorch.loggers.logger.DummyLogger):
    """A logger that keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.written = []

    def log_metrics(self, metrics, step=None):
        self.written.append((step, metrics))


def test_lightnings_callback_logs_and_saves_plain_weights(tmp_path):
    data = DataLoader(TensorDataset(torch.randn(48, 1, 8, 8), torch.randint(4, (48,))), 16)
    logger, model = Written(), Digits()
    trainer = lightning.Trainer(
        max_epochs=4, accelerator="cpu", devices=1, default_root_dir=tmp_path, logger=logger,
        callbacks=[lightning_callbacks.WhiteningCallback(every_n_epochs=2)], enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(model, data)
    numbers = [(step, metrics) for step, metrics in logger.written if "whitening/bytes" in metrics]
    assert [step for step, _ in numbers] == [6, 12]
    assert numbers[-1][1] == report(model).numbers()
    plain = torch.load(tmp_path / "plain.pt")
    torch.testing.assert_close(plain, dict(plain_state_dict(model)), rtol=0, atol=0)
    with pytest.raises(ValueError, match="every_n_epochs=0 is not possible: give an integer of at least 1"):
        lightning_callbacks.WhiteningCallback(every_n_epochs=0)


def test_hugging_faces_callback_logs_and_saves_plain_weights(tmp_path, caplog):
    data = [{"input_ids": row, "labels": row[0] % 3} for row in torch.randint(30, (48, 12))]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=8, save_steps=3, logging_steps=3, report_to=[],
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    model, written = whiten(bert()), {}
    writer = SimpleNamespace(add_scalar=lambda name, value, step: written.update({(name, step): value}))
    callback = hugging_face_callbacks.WhiteningCallback(writer)
    with caplog.at_level("INFO", logger="whiten_layers"):
        transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    assert sum("whitened layers: 14" in record.getMessage() for record in caplog.records) >= 2
    assert ("whitening/bytes", 3) in written
    kept = written["whitening/classifier/inputs/condition", 6]
    assert kept == report(model).numbers()["whitening/classifier/inputs/condition"]
    loaded, info = type(model).from_pretrained(tmp_path / "checkpoint-6" / "plain", output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(dict(loaded.state_dict()), dict(plain_state_dict(model)), rtol=0, atol=0)
    assert not (tmp_path / "checkpoint-3" / "plain" / "optimizer.pt").exists()


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_hugging_faces_weights_are_plain_and_load_anywhere(tmp_path, safe, caplog):
    model = whiten(bert())
    model(torch.randint(20, (4, 8)), labels=torch.randint(3, (4,))).loss.backward()
    model.save_pretrained(tmp_path, state_dict=plain_state_dict(model), safe_serialization=safe)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(dict(loaded.state_dict()), dict(plain_state_dict(model)), rtol=0, atol=0)
    whiten(loaded).load_state_dict(model.state_dict(), strict=True)  # the state that was kept beside them


def test_timms_checkpoints_are_plain_and_load_anywhere(tmp_path):
    import timm

    def made(**options):
        return timm.create_model("resnet10t", num_classes=3, **options)

    model = whiten(made())
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    torch.save({"state_dict": plain_state_dict(model)}, tmp_path / "plain.pth")
    loaded = made(checkpoint_path=tmp_path / "plain.pth")
    timm.models.load_checkpoint(whiten(made()), tmp_path / "plain.pth", strict=True)
    timm.models.load_checkpoint(made(), tmp_path / "plain.pth", strict=True)
    torch.testing.assert_close(dict(loaded.state_dict()), dict(plain_state_dict(model)), rtol=0, atol=0)


def test_timms_own_checkpoint_resumes_bit_for_bit(tmp_path):
    import timm
    from timm.utils import CheckpointSaver, ModelEmaV3

    def made():
        torch.manual_seed(0)
        model = whiten(timm.create_model("resnet10t", num_classes=3), update_interval=4, statistics_interval=4)
        return model, torch.optim.AdamW(model.parameters(), 1e-3), ModelEmaV3(model, decay=0.9)

    def train(model, optimizer, average, batches):
        for batch in batches:
            generator = torch.Generator().manual_seed(batch)
            optimizer.zero_grad()
            images = torch.randn(4, 3, 32, 32, generator=generator)
            F.cross_entropy(model(images), torch.tensor([0, 1, 2, 0])).backward()
            optimizer.step()
            average.update(model)

    whole = made()
    train(*whole, range(10))
    first = made()
    train(*first, range(5))
    saver = CheckpointSaver(first[0], first[1], model_ema=first[2], checkpoint_dir=tmp_path, recovery_dir=tmp_path)
    saver.save_checkpoint(epoch=0, metric=0.0)
    resumed = made()
    assert timm.models.resume_checkpoint(resumed[0], tmp_path / "last.pth.tar", resumed[1]) == 1
    timm.models.load_checkpoint(resumed[2].module, tmp_path / "last.pth.tar", use_ema=True)
    train(*resumed, range(5, 10))
    for one, other in ((resumed[0], whole[0]), (resumed[2].module, whole[2].module)):
        torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()), rtol=0, atol=0)


def test_pefts_adapters_are_plain_and_load_anywhere(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, **sizes))
    options = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    plain = peft.get_peft_model(copy.deepcopy(base), options)
    model = whiten(peft.get_peft_model(copy.deepcopy(base), options))
    tokens = torch.randint(0, 50, (2, 8))
    for _ in range(2):
        model(tokens, labels=tokens).loss.backward()
    adapter = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.lora_B.default")
    assert type(adapter) is WhitenedLinear and adapter.transform.num_batches_tracked == 2
    with torch.no_grad():
        adapter.weight.normal_()
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "whitened", state_dict=plain_state_dict(model))
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("plain", "whitened")]
    assert files[0].stat().st_size == files[1].stat().st_size
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "whitened")
    torch.testing.assert_close(loaded(tokens).logits, model.eval()(tokens).logits)


def test_diffusers_weights_are_plain_if_a_copy_is_unwhitened(tmp_path):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 4}
    plain = diffusers.UNet2DModel(layers_per_block=1, **sizes, **blocks)
    model = whiten(copy.deepcopy(plain))
    assert not report(model).left
    optimizer = torch.optim.AdamW(model.parameters())
    averages = diffusers.training_utils.EMAModel(
        model.parameters(), decay=0.5, model_cls=diffusers.UNet2DModel, model_config=model.config
    )
    noisy, times = torch.randn(2, 3, 8, 8), torch.tensor([3, 4])
    for _ in range(2):
        (model(noisy, times).sample - noisy).square().mean().backward()
        optimizer.step()
        averages.step(model.parameters())
    plain.save_pretrained(tmp_path / "plain")
    unwhiten(copy.deepcopy(model)).save_pretrained(tmp_path / "whitened")
    averages.save_pretrained(tmp_path / "averages")
    file = "diffusion_pytorch_model.safetensors"
    assert len({(tmp_path / name / file).stat().st_size for name in ("plain", "whitened", "averages")}) == 1
    loaded = diffusers.UNet2DModel.from_pretrained(tmp_path / "whitened")
    assert torch.equal(loaded(noisy, times).sample, model.eval()(noisy, times).sample)


def test_callbacks_of_other_processes_than_the_first_and_without_a_folder_write_nothing(tmp_path, caplog):
    class Untouched:
        """Any use of the model would fail."""

    here, small = SimpleNamespace(output_dir=tmp_path), whiten(nn.Linear(3, 2))
    with caplog.at_level("INFO", logger="whiten_layers"):
        for state, folder in ((False, "plain"), (True, None)):
            state = SimpleNamespace(is_world_process_zero=state, global_step=3)
            callback = hugging_face_callbacks.WhiteningCallback(plain_weights=folder)
            callback.on_save(here, state, None, model=Untouched())
        state = SimpleNamespace(is_world_process_zero=False, global_step=3)
        callback.on_log(here, state, None, model=Untouched())
        assert not caplog.records
        state = SimpleNamespace(is_world_process_zero=True, global_step=3)
        callback.on_log(here, state, None, model=small)  # into the log alone
        assert len(caplog.records) == 1
    trainer = SimpleNamespace(is_global_zero=False, default_root_dir=tmp_path, current_epoch=0)
    lightning_callbacks.WhiteningCallback().on_fit_end(trainer, Untouched())
    lightning_callbacks.WhiteningCallback().on_train_epoch_end(trainer, Untouched())
    trainer = SimpleNamespace(is_global_zero=True, default_root_dir=tmp_path)
    lightning_callbacks.WhiteningCallback(plain_weights=None).on_fit_end(trainer, Untouched())
    assert not list(tmp_path.iterdir())
