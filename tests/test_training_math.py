"Guards for adding noise, the targets and the loss: Monte Carlo, round trips, the loss by hand, every documented error."
import warnings

import oracles
import pytest
import torch
from oracles import Recorder, labs, random_images, random_unet, seeded
from torch.testing import assert_close

from diffusion_course.sampling import PREDICTIONS, Schedule
from diffusion_course.training import add_noise, noise_prediction_loss, prediction_loss, prediction_target

SCHEDULES = {"linear": Schedule.linear(500), "labs": labs(), "cosine": Schedule.cosine(500)}
S = SCHEDULES["linear"]

schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
kinds = pytest.mark.parametrize("kind", PREDICTIONS)

def pair(n=4, shape=(3, 8, 8), dtype=torch.float32): return torch.randn(2, n, *shape, generator=seeded(), dtype=dtype)


# --- adding noise ----------------------------------------------------------------------------------------------------

@schedules
def test_one_jump_is_many_small_steps(schedule): oracles.check_add_noise(add_noise, schedule)

@schedules
def test_no_noise_at_0(schedule):
    x0, eps = pair()
    for t in (0, torch.tensor(0), torch.zeros(4, dtype=torch.long)):
        assert torch.equal(add_noise(x0, t, eps, schedule), x0)
    some = add_noise(x0, torch.tensor([0, 500, 0, 1]), eps, schedule)
    assert torch.equal(some[[0, 2]], x0[[0, 2]]) and not torch.equal(some[3], x0[3])

@schedules
@pytest.mark.parametrize("t", [1, 20, 100, 250, 500])
def test_variance_is_preserved(schedule, t):
    "Images of mean 0 and variance 1 keep both at every time; without noise the signal shrinks to alpha_bar."
    x0, eps = pair(100_000, (1,), torch.float64)
    xt = add_noise(x0, t, eps, schedule)
    assert_close(xt.mean().item(), 0.0, rtol=0, atol=5 / 100_000**0.5)
    assert_close(xt.var().item(), 1.0, rtol=5 * (2 / 100_000) ** 0.5, atol=0)
    ab = schedule.alpha_bar[t]
    assert_close(add_noise(x0, t, torch.zeros_like(x0), schedule), ab.sqrt() * x0, rtol=1e-12, atol=0)
    assert_close(add_noise(torch.zeros_like(x0), t, eps, schedule), (1 - ab).sqrt() * eps, rtol=1e-12, atol=0)

@schedules
def test_times_per_image(schedule): oracles.check_per_image_times(add_noise, schedule)

def test_add_noise_is_diffusers():
    from diffusers import DDPMScheduler
    x0, eps = pair(500, (2,))
    t = torch.arange(1, 501)
    theirs = oracles.diffusers_scheduler(DDPMScheduler).add_noise(x0, eps, t - 1)       # it counts from 0
    assert_close(add_noise(x0, t, eps, labs()), theirs, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 8, 8), (2,), ()], ids=str)
def test_shapes_and_dtypes(shape, dtype):
    x0, eps = pair(4, shape, dtype)
    for t in (7, torch.tensor([0, 1, 250, 500])):
        xt = add_noise(x0, t, eps, S)
        assert xt.shape == x0.shape and xt.dtype == dtype

def test_inputs_are_left_alone():
    x0, eps = pair()
    before = x0.clone(), eps.clone()
    add_noise(x0, 100, eps, S), prediction_target("v", x0, eps, torch.full((4,), 100), S)
    assert torch.equal(x0, before[0]) and torch.equal(eps, before[1])

@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 3, 8, 8), (4, 1, 8, 8), (4, 1, 1, 1), (5, 3, 8, 8), ()], ids=str)
def test_noise_of_another_shape(shape):
    with pytest.raises(ValueError, match="one noise value per pixel"): add_noise(pair()[0], 5, torch.zeros(shape), S)

@pytest.mark.parametrize("t", [-1, 501, torch.tensor([0, 1, 2, -3]), torch.tensor([0, 1, 2, 501])])
def test_times_outside(t):
    with pytest.raises(ValueError, match="outside 0 … 500"): add_noise(pair()[0], t, pair()[1], S)
    with pytest.raises(ValueError, match="outside 0 … 500"): prediction_target("v", *pair(), t, S)

@pytest.mark.parametrize("t", [5.0, 0.5, True, torch.tensor([0.1, 0.2, 0.3, 0.4]), [1, 2, 3, 4]])
def test_times_that_are_not_whole(t):
    with pytest.raises(TypeError): add_noise(pair()[0], t, pair()[1], S)

@pytest.mark.parametrize("n", [1, 3, 5])
def test_times_of_another_batch_size(n):
    with pytest.raises(ValueError, match="one per image"): add_noise(pair()[0], torch.full((n,), 5), pair()[1], S)

@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_images_that_are_not_float(dtype):
    x0 = torch.full((4, 3, 8, 8), 200, dtype=dtype)
    with pytest.raises(TypeError): add_noise(x0, 5, torch.randn(4, 3, 8, 8), S)
    with pytest.raises(TypeError): prediction_loss(Recorder(), x0, None, S)


# --- what the network should answer ----------------------------------------------------------------------------------

@kinds
@schedules
def test_target_and_prediction_agree(kind, schedule):
    oracles.check_target(prediction_target, PREDICTIONS[kind], kind, schedule)

@pytest.mark.parametrize("t", [0, 1, 250, 500])
def test_v_is_the_velocity(t):
    "With alpha = cos(phi) and sigma = sin(phi), v is the derivative of x_t by the angle phi (2202.00512, section 4)."
    (x0, eps), phi = pair(dtype=torch.float64), torch.acos(S.alpha_bar[t].sqrt())
    def xt(angle): return torch.cos(angle) * x0 + torch.sin(angle) * eps
    slope = (xt(phi + 1e-5) - xt(phi - 1e-5)) / 2e-5
    assert_close(prediction_target("v", x0, eps, torch.full((4,), t), S), slope, rtol=1e-7, atol=1e-7)

@pytest.mark.parametrize("kind", ["", "epsilon", "V", None, 1])
def test_unknown_kind(kind):
    with pytest.raises(ValueError, match="expected one of"): prediction_target(kind, *pair(), torch.full((4,), 5), S)
    with pytest.raises(ValueError, match="expected one of"):
        prediction_loss(Recorder(predicts=kind), pair()[0], None, S)


# --- the loss --------------------------------------------------------------------------------------------------------

@kinds
@schedules
def test_loss_by_hand(kind, schedule): oracles.check_loss(prediction_loss, schedule, kind)

def test_every_time_is_learnt():
    for T in (1, 2, 4): oracles.check_loss_times(prediction_loss, T=T)

@schedules
@kinds
def test_perfect_network_has_no_loss(kind, schedule):
    x0 = random_images(64, (3, 8, 8)).double()
    def answer(xt, t):
        ab = schedule.alpha_bar[t].view(-1, 1, 1, 1)
        eps = (xt - ab.sqrt() * x0) / (1 - ab).sqrt()
        return {"eps": eps, "x0": x0, "v": ab.sqrt() * eps - (1 - ab).sqrt() * x0, "u": eps - x0}[kind]
    assert_close(prediction_loss(Recorder(answer, kind), x0, None, schedule).item(), 0.0, rtol=0, atol=1e-8)

def test_network_that_says_nothing():
    "Zero for the noise misses a variance of 1, for the image or for v as well (these data have variance 1), for u that of data and noise."
    x0 = torch.randn(512, 3, 8, 8, generator=seeded(9))
    for kind in PREDICTIONS:
        value = prediction_loss(Recorder(predicts=kind), x0, None, S, generator=seeded()).item()
        want = 2.0 if kind == "u" else 1.0 # u = eps - x0 holds the variance of both
        assert_close(value, want, rtol=0, atol=5 * want * (2 / x0.numel()) ** 0.5)
    assert prediction_loss(random_unet(predicts="eps"), x0[:8], None, S, generator=seeded()) > 0

def test_loss_is_a_function_of_the_generator():
    net, x0 = random_unet(), random_images(8, (3, 8, 8))
    first, again, other = (prediction_loss(net, x0, None, S, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and first != other
    torch.manual_seed(0)
    state = torch.get_rng_state()
    prediction_loss(net, x0, None, S, generator=seeded())
    assert torch.equal(torch.get_rng_state(), state)
    assert prediction_loss(net, x0, None, S) != prediction_loss(net, x0, None, S)      # fresh noise without a generator

def test_context_reaches_the_network():
    net, x0, context = Recorder(), random_images(4, (3, 8, 8)), torch.eye(5)[:4]
    prediction_loss(net, x0, context, S)
    prediction_loss(net, x0, None, S)
    assert net.calls[0][2] is context and net.calls[1][2] is None
    with_context, without = (prediction_loss(random_unet(), x0, c, S, generator=seeded()) for c in (context, None))
    assert with_context != without

def test_context_of_another_batch_size():
    with pytest.raises(ValueError, match="context"): prediction_loss(random_unet(), pair()[0], torch.zeros(3, 5), S)

def test_loss_has_gradients():
    net = random_unet().requires_grad_(True)
    prediction_loss(net, random_images(8, (3, 8, 8)), torch.ones(8, 5), S, generator=seeded()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in net.parameters())

def test_kind_of_loss():
    x0 = random_images(4, (3, 8, 8))
    def loss(predicts, **kwargs):
        return prediction_loss(random_unet(predicts=predicts), x0, None, S, generator=seeded(), **kwargs)
    assert loss("v") == loss("eps", kind="v") and loss("v") != loss("eps")
    noise = noise_prediction_loss(random_unet(predicts="v"), x0, None, S, generator=seeded())
    assert noise == loss("eps")
    assert prediction_loss(lambda xt, t: xt, x0, None, S, generator=seeded()).ndim == 0      # no `predicts`: the noise

def test_noise_prediction_loss_by_hand(): oracles.check_loss(noise_prediction_loss, S, "eps")

@pytest.mark.parametrize("answer", [lambda x, t: x[:, :1], lambda x, t: x[:1], lambda x, t: x.mean()],
                         ids=["one channel", "one image", "scalar"])
def test_answers_do_not_broadcast(answer):
    with warnings.catch_warnings(), pytest.raises(ValueError, match="shape"):
        warnings.simplefilter("ignore")
        prediction_loss(Recorder(answer), pair()[0], None, S)

def test_low_precision_answers():
    "Under autocast a network answers in bfloat16; the mean is taken in float32."
    x0 = random_images(64, (3, 8, 8))
    loss = prediction_loss(Recorder(lambda xt, t: (0.1 * xt).bfloat16()), x0, None, S, generator=seeded())
    exact = prediction_loss(Recorder(lambda xt, t: 0.1 * xt), x0, None, S, generator=seeded())
    assert loss.dtype == torch.float32
    assert_close(loss, exact, rtol=1e-3, atol=0)
