"""Groups of parameters whose communication is overlapped with compute."""

import pytest
import torch
from oracles import random_guidance, small_dit, small_imf_dit

from mf_dist.training import data_parallel
from mf_dist.training.data_parallel import parameter_groups

NETS = {"dit": small_dit(depth=3), "imf_dit": small_imf_dit(depth=4, head_depth=2)}
PASSES = {
    "dit": [{}],
    "imf_dit": [{"guidance": random_guidance(2), "head": head} for head in ("u", "v", "both")],
}


@pytest.fixture(params=[1, 6_000, 10**9], ids=["a block each", "some blocks", "all blocks"])
def block_size(request, monkeypatch):
    monkeypatch.setattr(data_parallel, "BLOCKS_TOGETHER", request.param)
    return request.param


@pytest.mark.parametrize("name", NETS)
def test_each_parameter_is_in_one_group(name, block_size):
    net = NETS[name]
    groups = parameter_groups(net, 2)
    assert sorted(id(p) for _, group in groups for p in group) == sorted(id(p) for p in net.parameters())
    first_of_branch = {id(net), *(id(branch.blocks[0]) for branch in net.branches())}
    for module, group in groups:
        assert id(module) in first_of_branch or sum(p.numel() for p in group) >= block_size
    blocks = sum(len(branch.blocks) for branch in net.branches())
    assert len(groups) == {1: 1 + blocks, 6_000: len(groups), 10**9: len(net.branches())}[block_size]
    assert len(parameter_groups(net, 1)) == 1


@pytest.mark.parametrize(("name", "inputs"), [(name, inputs) for name in NETS for inputs in PASSES[name]])
@torch.no_grad()
def test_every_pass_waits_for_the_weights_that_it_uses(name, inputs, block_size):
    """Each pass as the first one of a step, when no group has been waited for."""
    net, complete, hooks, used = NETS[name], set(), [], set()

    def check(module, _):
        own = {id(p) for p in module.parameters(recurse=False)}
        assert own <= complete, f"{type(module).__name__} runs before its weights are complete"
        used.update(own)

    for module, group in parameter_groups(net, 2):
        hooks.append(module.register_forward_pre_hook(lambda *_, group=group: complete.update(map(id, group))))
    hooks += [module.register_forward_pre_hook(check) for module in net.modules()]
    time = torch.zeros(2).double()
    net(torch.randn(2, 3, 4, 4).double(), time, time, torch.tensor([0, 1]), **inputs)
    for hook in hooks:
        hook.remove()
    assert len(used) > len([*net.parameters()]) / 2
