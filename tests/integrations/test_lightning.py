"""Sparse training with Lightning."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import sao_prune

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("ignore")


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))

    def training_step(self, batch, index):
        return self.net(batch[0]).square().mean()

    def test_step(self, batch, index):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)


def trainer(tmp_path, *callbacks):
    return lightning.Trainer(
        default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", devices=1, logger=False, callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip


@pytest.mark.parametrize("permanent", [False, True])
def test_the_callback_prunes_before_training_and_keeps_the_zeros(permanent, tmp_path):
    from sao_prune.integrations.lightning import SparseTraining

    module, callback = Module(), SparseTraining(sparsity=0.75, seed=0, permanent=permanent)
    before = [p.detach().clone() for p in module.parameters()]
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 16)), 4)
    trainer(tmp_path, callback).fit(module, data)
    assert callback.report is not None
    assert callback.report.sparsity == sao_prune.report(module).sparsity == 0.75
    assert torch_prune.is_pruned(module) is not permanent
    assert not any(torch.equal(a, b) for a, b in zip(before, module.parameters()))
    assert len(sao_prune.report(module).pruned) == 2


@pytest.mark.parametrize("form", ["masked", "compact"])
@pytest.mark.parametrize("permanent", [False, True])
def test_what_was_trained_is_what_is_tested(form, permanent, tmp_path):
    from sao_prune.integrations.lightning import SparseTraining

    module, callback = Module(), SparseTraining(sparsity=0.75, seed=0, form=form, permanent=permanent)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 16)), 4)
    trainer(tmp_path, callback).fit(module, data)
    trained = {name: value.clone() for name, value in module.state_dict().items()}
    trainer(tmp_path, callback).test(module, data, verbose=False)
    found = module.state_dict()
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], trained[name]) for name in found)
    copy.deepcopy(callback)


def test_a_checkpoint_of_the_training_is_tested_after_it_was_made_permanent(tmp_path):
    from sao_prune.integrations.lightning import SparseTraining

    module, callback = Module(), SparseTraining(sparsity=0.75, seed=0, permanent=True)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 16)), 4)
    saving = lightning.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    one = lightning.Trainer(
        default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", devices=1, logger=False,
        callbacks=[callback, saving], enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    one.fit(module, data)
    trained = module.net[1].weight.detach().clone()
    # Without a model Lightning takes its own, and loads the best checkpoint by itself.
    for given in ({"model": module, "ckpt_path": saving.last_model_path}, {}):
        one.test(dataloaders=data, verbose=False, **given)
        assert torch.equal(module.net[1].weight, trained)


def test_what_is_fitted_once_more_keeps_its_zeros(tmp_path):
    from sao_prune.integrations.lightning import SparseTraining

    module, callback = Module(), SparseTraining(sparsity=0.75, seed=0, permanent=True)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 16)), 4)
    trainer(tmp_path, callback).fit(module, data)
    first = module.net[1].weight.detach().clone()
    trainer(tmp_path, callback).fit(module, data)
    assert torch.equal(module.net[1].weight != 0, first != 0)
    assert not torch.equal(module.net[1].weight, first)
    assert (module.net[1].weight - first).abs().max() < 0.1


def test_lightnings_own_callback_names_ours():
    from lightning.pytorch.callbacks import ModelPruning

    with pytest.raises(Exception, match=r"use sao_prune\.integrations\.lightning\.SparseTraining"):
        ModelPruning(sao_prune.prune.SAOPruning, use_global_unstructured=True)
