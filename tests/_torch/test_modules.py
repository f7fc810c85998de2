"""The inside of `nn.Module`, as far as the library relies on what PyTorch does not document."""

import inspect
import io

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.parametrizations import weight_norm

from whiten_layers import plain_state_dict, whiten
from whiten_layers._torch import modules
from whiten_layers._torch.modules import StatefulModule, WideBuffers, name_in_keys


class Told(StatefulModule):
    def __init__(self):
        super().__init__()
        self.register_buffer("state", torch.zeros(2))
        self.heard = []

    def before_moving(self):
        return self.state.dtype

    def after_moving(self, before):
        self.heard.append(("moved", before))

    def before_replicating(self):
        self.heard.append("replicated")

    def before_loading(self, state_dict, prefix):
        self.heard.append(("loading", prefix, f"{prefix}state" in state_dict))

    def after_loading(self, assigned):
        self.heard.append(("loaded", assigned))


@pytest.mark.parametrize("move", [lambda m: m.to(torch.float64), nn.Module.half, lambda m: m.to_empty(device="cpu")])
def test_a_module_is_told_when_its_tensors_move(move):
    model = nn.Sequential(Told())
    move(model)
    hint = "nn.Module's to, half and to_empty are to call _apply(fn, recurse) of every module: see StatefulModule"
    assert model[0].heard == [("moved", torch.float32)], hint


@pytest.mark.parametrize("assign", [False, True])
def test_a_module_is_told_when_a_checkpoint_is_loaded(assign):
    model = nn.Sequential(Told())
    model.load_state_dict(nn.Sequential(Told()).state_dict(), assign=assign)
    hint = "load_state_dict is to call _load_from_state_dict(state_dict, prefix, local_metadata, …) of every module"
    assert model[0].heard == [("loading", "0.", True), ("loaded", assign)], hint


def test_a_module_is_told_when_it_is_replicated():
    module = Told()
    hint = "nn.DataParallel's replicate is to call _replicate_for_data_parallel() of every module"
    assert "_replicate_for_data_parallel()" in inspect.getsource(torch.nn.parallel.replicate), hint
    assert module._replicate_for_data_parallel() is not module and module.heard == ["replicated"], hint


def test_a_module_that_keeps_its_tensors_copies_what_is_assigned():
    class Kept(Told):
        keeps_its_tensors = True

    model = nn.Sequential(Kept())
    before = model[0].state
    state = nn.Sequential(Told()).state_dict()
    state["0.state"] += 1
    model.load_state_dict(state, assign=True)
    hint = "local_metadata['assign_to_params_buffers'] is to say whether a load assigns"
    assert model[0].state is before and before.eq(1).all(), hint
    assert model[0].heard[-1] == ("loaded", False)


def test_wide_buffers_keep_their_digits():
    module = WideBuffers()
    module.register_buffer("state", torch.tensor([1 + 2**-20]))
    module.register_buffer("count", torch.tensor(3))
    module.register_buffer("none", None)
    assert module.half().state.dtype == torch.float32 and module.state == 1 + 2**-20
    assert module.double().state.dtype == torch.float64 and module.count.dtype == torch.int64
    assert module.bfloat16().state.dtype == torch.float32


def test_names_of_buffers_also_of_none():
    module = nn.BatchNorm1d(2)
    module.register_buffer("none", None)
    names = ["running_mean", "running_var", "num_batches_tracked", "none"]
    assert modules.buffer_names(module) == names, "nn.Module._buffers is to hold the buffers by name, None too"


def test_parameters_that_a_module_holds_itself():
    plain, computed = nn.Linear(2, 2, bias=False), weight_norm(nn.Linear(2, 2))
    hint = "nn.Module._parameters is to hold the parameters by name, None too, and none that a parametrization computes"
    assert modules.own_parameter(plain, "weight") is plain.weight, hint
    assert modules.own_parameter(plain, "bias") is None and modules.holds_parameter(plain, "bias"), hint
    assert modules.own_parameter(computed, "weight") is None and not modules.holds_parameter(computed, "weight"), hint


@pytest.mark.parametrize("register", [nn.Module.register_forward_hook, nn.Module.register_forward_pre_hook])
def test_whether_there_are_forward_hooks(register):
    module = nn.Linear(2, 2)
    assert not modules.has_forward_hooks(module)
    handle = register(module, lambda *_: None)
    hint = "nn.Module._forward_hooks and _forward_pre_hooks are to hold what is called around a forward pass"
    assert modules.has_forward_hooks(module), hint
    handle.remove()
    assert not modules.has_forward_hooks(module)


def test_a_module_becomes_another_and_keeps_its_hooks():
    calls = []
    old, new = nn.Linear(2, 3), nn.Conv1d(2, 3, 1)
    old.register_forward_hook(lambda *_: calls.append("forward"))
    old.register_full_backward_hook(lambda *_: calls.append("backward"))
    modules.become(old, new)
    output = old(torch.ones(1, 2, 1, requires_grad=True))
    output.sum().backward()
    hint = "a module is to keep everything in vars(module), its hooks under names with 'hook' in them: see become"
    assert type(old) is nn.Conv1d and output.shape == (1, 3, 1) and calls == ["forward", "backward"], hint
    assert set(vars(old)) == set(vars(nn.Conv1d(2, 3, 1))), hint
    torch.save(old.state_dict(), io.BytesIO())


def test_every_batch_normalization_is_one():
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    hint = "torch.nn.modules.batchnorm._BatchNorm is to be the base class of every batch normalization"
    assert all(issubclass(kind, modules.AnyBatchNorm) for kind in kinds), hint
    assert not issubclass(nn.LayerNorm, modules.AnyBatchNorm)


def test_a_module_adopts_anothers_class_and_buffers_and_keeps_its_own():
    module, other = nn.BatchNorm1d(2), nn.Linear(3, 4)
    other.register_buffer("state", torch.ones(3))
    module.register_buffer("foreign", torch.ones(2))
    module.register_forward_pre_hook(lambda *_: None)
    weight = module.weight
    modules.adopt(module, other, ["running_mean", "running_var", "num_batches_tracked"])
    hint = "nn.Module.__dict__ is to hold buffers under '_buffers' and everything else under its name: see adopt"
    assert type(module) is nn.Linear and modules.buffer_names(module) == ["state", "foreign"], hint
    assert module.weight is weight and module.in_features == 3 and modules.has_forward_hooks(module), hint


def test_names_are_those_of_the_keys():
    model = nn.Sequential(checkpoint_wrapper(nn.Sequential(nn.Linear(4, 3))))
    keys = list(model.state_dict())
    names = [f"{name_in_keys(name)}." for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert all(key.startswith(names[0]) for key in keys), "a wrapper's name in a module's name is no part of its key"
    assert list(plain_state_dict(whiten(model))) == keys and len(model.state_dict()) > len(keys)
