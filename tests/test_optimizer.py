"""The optimizer: Muon against slow decompositions, RAdam for the rest, and its state."""

import copy
import io

import common

import pytest
import torch
from torch import nn

from train_expert import AtariNet

FLOAT32 = torch.autocast("cpu", torch.bfloat16, enabled=False)


def small_net():
    torch.manual_seed(0)
    return AtariNet((8, 8, 8), (16,)).to(memory_format=torch.channels_last)


def learn(net, optimizer, seed):
    """One update from random observations; returns the gradients that it had."""
    obs = torch.randint(
        256, (8, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    optimizer.zero_grad()
    net(obs)[0].square().mean().backward()
    gradients = {name: weight.grad.clone() for name, weight in net.named_parameters()}
    optimizer.step()
    return gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 288), (288, 32), (64, 64), (512, 3136)])
def test_orthogonal_keeps_singular_vectors_and_levels_the_values(shape, dtype):
    rng, small = torch.Generator().manual_seed(0), min(shape)
    u, _ = torch.linalg.qr(torch.randn(shape[0], small, generator=rng))
    v, _ = torch.linalg.qr(torch.randn(shape[1], small, generator=rng))
    values = torch.logspace(0, -1.5, small)
    seen = u.T @ common.orthogonal(7e-3 * (u * values) @ v.T, dtype) @ v
    assert (seen.diagonal() > 0.6).all() and (seen.diagonal() < 1.3).all()
    off = (seen - torch.diag(seen.diagonal())).abs().max()
    assert off < (0.1 if dtype == torch.bfloat16 else 1e-4)


def test_muon_turns_each_matrix_by_the_rate():
    net = small_net()
    before = copy.deepcopy(net)
    gradients = learn(net, common.Muon(net, lr=1e-3, times=40, autocast=FLOAT32), seed=1)
    layers = [
        name
        for name, module in net.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and name != "head"
    ]
    assert len(layers) == 4
    for name in layers:
        new, old = net.get_submodule(name).weight, before.get_submodule(name).weight
        change = (old - new).detach().flatten(1).double()
        u, s, vh = torch.linalg.svd(
            gradients[f"{name}.weight"].flatten(1).double(), full_matrices=False
        )
        strong = s > 0.01 * s.norm()  # five iterations do not level what is weaker
        rows, columns = change.shape
        lr = 40 * 1e-3 * max(1, rows / columns) ** 0.5
        seen = (u.T @ change @ vh.T)[strong][:, strong] / lr
        assert (seen.diagonal() > 0.6).all() and (seen.diagonal() < 1.3).all(), name
        assert (seen - torch.diag(seen.diagonal())).abs().max() < 0.02, name


def test_channels_last_changes_no_update():
    nets = small_net(), small_net().to(memory_format=torch.contiguous_format)
    for net in nets:
        optimizer = common.Muon(net, lr=1e-3, times=40, autocast=FLOAT32)
        for seed in range(3):
            learn(net, optimizer, seed)
    for one, other in zip(*(net.parameters() for net in nets)):
        assert torch.allclose(one, other, atol=1e-5)


def test_biases_norms_and_output_are_radams():
    net, maps = small_net(), nn.Linear(3, 2)
    twin = copy.deepcopy(net)
    optimizer = common.Muon(net, maps, lr=1e-2, times=40, autocast=FLOAT32)
    others = {name: w for name, w in twin.named_parameters() if w.ndim == 1 or "head" in name}
    radam = torch.optim.RAdam(others.values(), lr=1e-2)
    for seed in range(8):  # RAdam's first five steps are plain momentum
        maps(torch.ones(1, 3)).sum().backward()
        gradients = learn(net, optimizer, seed)
        for name, weight in others.items():
            weight.grad = gradients[name]
        radam.step()
    learned = dict(net.named_parameters())
    for name, weight in others.items():
        assert torch.allclose(learned[name], weight, atol=1e-6), name
    sizes = [sum(w.numel() for w in group["params"]) for group in optimizer.param_groups]
    assert sum(sizes) == sum(w.numel() for w in [*net.parameters(), *maps.parameters()])


def test_momentum_is_the_published_one():
    net = small_net()
    weight = net.body[0].weight
    optimizer, momentum = common.Muon(net, lr=1e-3, times=40, autocast=FLOAT32), 0
    for seed in range(3):
        before = weight.detach().clone()
        gradient = learn(net, optimizer, seed)["body.0.weight"].flatten(1)
        momentum = 0.95 * momentum + 0.05 * gradient
        wanted = common.orthogonal(0.05 * gradient + 0.95 * momentum, torch.float32)
        change = (before - weight.detach()).flatten(1) / (40 * 1e-3)
        assert torch.allclose(change, wanted, atol=1e-4)


def test_state_is_saved_and_resumed_exactly():
    net = small_net()
    optimizer = common.Muon(net, lr=1e-3, times=40, autocast=FLOAT32)
    for seed in range(3):
        learn(net, optimizer, seed)
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again = small_net()
    again.load_state_dict(weights)
    resumed = common.Muon(again, lr=9, times=40, autocast=FLOAT32)
    resumed.load_state_dict(state)
    for seed in range(3, 5):
        learn(net, optimizer, seed)
        learn(again, resumed, seed)
    for one, other in zip(net.parameters(), again.parameters()):
        assert torch.equal(one, other)


def test_no_gradient_no_change():
    assert torch.equal(common.orthogonal(torch.zeros(4, 8), torch.float32), torch.zeros(4, 8))
