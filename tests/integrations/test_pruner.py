"""The pruner in the training loops of other packages, with the packages themselves."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sao_prune
from sao_prune import Schedule

from ..algorithms.test_untouched import same

X = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
Y = torch.arange(64) % 4
OVER = Schedule(2, 6, 3)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4))


def pruned(model):
    return sao_prune.schedule(model, "lmp", sparsity=0.8, over=OVER, seed=0)


def vanished(model, optimizer):
    """Whether the optimizer's state is zero wherever the mask is."""
    weight, mask = model[2].weight_orig, model[2].weight_mask
    states = [v for v in optimizer.state[weight].values() if v.shape == mask.shape]
    return bool(states) and not any(bool(v[mask == 0].any()) for v in states)


@pytest.mark.filterwarnings("ignore")
def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from sao_prune.integrations.transformers import PrunerCallback

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x, labels=None):
            logits = self.net(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    data = [{"x": x, "labels": y} for x, y in zip(X, Y)]

    def run(resume=None, stop=8):
        model = Model()
        pruner = pruned(model)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            max_steps=stop,
            save_steps=4,
            lr_scheduler_type="constant",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[PrunerCallback(pruner)])
        trainer.train(resume_from_checkpoint=resume)
        return model, pruner, trainer

    model, pruner, trainer = run()
    assert (pruner.count, pruner.finished) == (8, True)
    assert pruner.sparsity == pytest.approx(0.8, abs=0.01)
    assert vanished(model.net, trainer.optimizer)
    again, resumed, _ = run(str(tmp_path / "checkpoint-4"))
    assert resumed.count == 8
    assert same(dict(model.state_dict()), dict(again.state_dict()))


@pytest.mark.parametrize("method", ["gmp", "lrp", sao_prune.RG(values="keep")])
def test_a_second_training_with_transformers_leaves_what_is_pruned_pruned(method):
    transformers = pytest.importorskip("transformers")
    from sao_prune.integrations.transformers import PrunerCallback

    model = network()
    over = sao_prune.Schedule(start=1, end=3, steps=3, shape="linear")
    pruner = sao_prune.schedule(model, method, groups=4, over=over, seed=0)
    callback, found = PrunerCallback(pruner), []
    for _ in range(2):
        state = transformers.TrainerState()
        callback.on_train_begin(None, state, None)
        for state.global_step in range(1, 4):
            callback.on_optimizer_step(None, state, None)
            found.append(pruner.sparsity)
    assert found == sorted(found)
    assert found[-1] == found[2] > 0


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from sao_prune.integrations.lightning import PrunerCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, _):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-2)

    def run(epochs, resume=None):
        module = Module()
        pruner = pruned(module)
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            accumulate_grad_batches=2,
            callbacks=[PrunerCallback(pruner)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=16), ckpt_path=resume)
        return module, pruner, trainer

    module, pruner, trainer = run(4)
    assert (pruner.count, pruner.finished) == (8, True)
    assert vanished(module.net, trainer.optimizers[0])
    half = run(2)[2]
    half.save_checkpoint(tmp_path / "half.ckpt")
    again, resumed, _ = run(4, tmp_path / "half.ckpt")
    assert resumed.count == 8
    assert same(dict(module.state_dict()), dict(again.state_dict()))


@pytest.mark.filterwarnings("ignore")
def test_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    # A process has one, and a trainer that ran before has left its data loader in it.
    accelerate.state.GradientState._reset_state()
    from sao_prune.integrations.accelerate import PreparedPruner

    def start():
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = network()
        pruner = PreparedPruner(accelerator, pruned(model))
        model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), 1e-2))
        return accelerator, model, optimizer, pruner

    def train(accelerator, model, optimizer, pruner, batches):
        for number in range(batches):
            with accelerator.accumulate(model):
                chunk = slice(16 * (number % 4), 16 * (number % 4) + 16)
                accelerator.backward(F.cross_entropy(model(X[chunk]), Y[chunk]))
                optimizer.step()
                pruner.step(optimizer)
                optimizer.zero_grad()

    accelerator, model, optimizer, pruner = start()
    train(accelerator, model, optimizer, pruner, 8)
    assert pruner.pruner.count == 4
    accelerator.save_state(str(tmp_path))
    train(accelerator, model, optimizer, pruner, 8)
    assert pruner.pruner.finished
    assert vanished(model, optimizer)
    other = start()
    other[0].load_state(str(tmp_path))
    train(*other, 8)
    assert same(dict(model.state_dict()), dict(other[1].state_dict()))
