"Muon: its step by hand, the matrices it makes, and which weights it takes."
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from diffusion_course.muon import COEFFICIENTS, Muon, adamw, muon, orthogonal
from diffusion_course.sampling import Schedule
from diffusion_course.training import middle_times, prediction_loss, train, uniform_times
from diffusion_course.unet import ContextUnet


def random(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the matrix ------------------------------------------------------------------------------------------------------

def by_values(m, rounds):
    "The same through the singular values: each goes through the polynomial, `rounds` times."
    U, s, Vh = torch.linalg.svd(m, full_matrices=False)
    a, b, c = COEFFICIENTS
    s = s / m.norm()
    for _ in range(rounds): s = a * s + b * s**3 + c * s**5
    return U @ torch.diag(s) @ Vh

@pytest.mark.parametrize("rounds", [1, 3, 5])
@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6), (1, 5), (5, 1), (1, 1)], ids=str)
def test_every_singular_value_goes_through_the_polynomial(shape, rounds):
    assert_close(orthogonal(random(*shape), rounds), by_values(random(*shape), rounds))

@pytest.mark.parametrize("shape", [(8, 40), (40, 8)], ids=str)
def test_all_directions_become_about_equally_long(shape):
    U, _, Vh = torch.linalg.svd(random(*shape), full_matrices=False)
    turned = U.T @ orthogonal(U @ torch.diag(torch.linspace(0.2, 1, 8, dtype=torch.float64)) @ Vh) @ Vh.T
    assert_close(turned, torch.diag(turned.diagonal()), atol=1e-10, rtol=0)        # the directions are kept
    assert 0.65 < turned.diagonal().min() and turned.diagonal().max() < 1.3       # and none is turned round

def test_the_length_of_a_gradient_does_not_count():
    assert_close(orthogonal(1000 * random(3, 7)), orthogonal(random(3, 7)))
    assert (orthogonal(torch.zeros(3, 7)) == 0).all()


# --- the step --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (4, 2, 3, 3), (16, 1, 1, 1)], ids=str)
def test_step_by_hand(shape):
    weight, lr, mu = nn.Parameter(random(*shape)), 0.1, 0.9
    optimizer, expected, average = Muon([weight], lr=lr, momentum=mu), random(*shape).flatten(1), 0
    rows, columns = expected.shape
    for seed in (1, 2, 3):
        gradient = random(*shape, seed=seed)
        weight.grad = gradient.clone()
        optimizer.step()
        average = mu * average + (1 - mu) * gradient.flatten(1)
        ahead = mu * average + (1 - mu) * gradient.flatten(1)
        expected = expected - lr * max(1, rows / columns) ** 0.5 * by_values(ahead, 3)
        assert_close(weight.detach().flatten(1), expected)
        assert torch.equal(weight.grad, gradient)

def test_weights_without_a_gradient_stay():
    with_, without = nn.Parameter(random(2, 3)), nn.Parameter(random(2, 3))
    with_.grad = random(2, 3)
    Muon([with_, without]).step()
    assert torch.equal(without, random(2, 3)) and not torch.equal(with_, random(2, 3))

def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\), expected matrices"): Muon([nn.Parameter(torch.zeros(3))])


# --- which weights ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", [adamw, muon])
def test_every_weight_has_one_optimiser(make):
    net = ContextUnet(n_feat=8)
    taken = [id(p) for part in make(net, 1e-3) for group in part.param_groups for p in group["params"]]
    assert len(taken) == len(set(taken)) and set(taken) == {id(p) for p in net.parameters()}

def test_muon_takes_the_hidden_matrices():
    net = ContextUnet(n_feat=8)
    hidden, rest = muon(net, 1e-3)
    assert (hidden.param_groups[0]["lr"], rest.param_groups[0]["lr"]) == (7e-3, 1e-3)
    taken = {id(p) for p in hidden.param_groups[0]["params"]}
    names = {name for name, p in net.named_parameters() if id(p) in taken}
    assert {"middle1.conv1.weight", "up1.scale_shift.weight", "grow2.0.weight", "down2.shortcut.weight"} < names
    assert not [n for n in names if n.startswith(("stem", "out", "time_embedding", "context_embedding")) or "norm" in n or n.endswith("bias")]

def test_the_rate_of_every_optimiser_falls():
    "By the same factor: warm-up, then down to nearly zero."
    seen = []
    def spied(net, lr): parts = muon(net, lr); seen.extend(parts); return parts
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 4, 4), torch.eye(5)[torch.arange(8) % 5])
    rates = [(step.lr, *(part.param_groups[0]["lr"] for part in seen))
             for step in train(ContextUnet(n_feat=8), data, Schedule.cosine(), steps=20, batch_size=4, lr=1e-2, optimizer=spied, device="cpu")]
    assert all(hidden == pytest.approx(7 * lr) and rest == lr for lr, hidden, rest in rates)
    assert max(lr for lr, *_ in rates) > 9e-3 and rates[-1][0] < 1e-3


# --- which times -----------------------------------------------------------------------------------------------------

def test_middle_times_are_logit_normal():
    T, n = 500, 100_000
    t = middle_times(n, T, torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64 and t.shape == (n,) and t.min() >= 1 and t.max() <= T
    for edge in (50, 125, 250, 400):        # P(t <= edge) = P(z <= logit(edge / T))
        expected = torch.special.ndtr(torch.logit(torch.tensor(edge / T)))
        assert_close((t <= edge).double().mean(), expected.double(), atol=0.006, rtol=0)
    assert set(middle_times(100, 1).tolist()) == {1}

def test_uniform_times_are_uniform():
    t = uniform_times(100_000, 4, torch.Generator().manual_seed(0))
    assert_close(t.bincount(minlength=5)[1:] / 1e5, torch.full((4,), 0.25), atol=0.006, rtol=0)

def test_the_loss_asks_for_its_times():
    net, seen = ContextUnet(n_feat=8), []
    def only(n, T, generator): return torch.full((n,), 7)
    def spy(x, t, context=None): seen.append(t); return net(x, t, context)
    prediction_loss(spy, torch.zeros(3, 3, 4, 4), None, Schedule.cosine(), times=only)
    assert seen[0].tolist() == [7, 7, 7]
