"Guards for the schedule, the predictions, DDPM and `sample`: independent oracles, identities, every documented error."
import dataclasses
from itertools import pairwise

import numpy as np
import oracles
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar
from oracles import labs, normal, random_images, random_unet, seeded, smooth_predictor, walk
from torch.testing import assert_close

from diffusion_course.sampling import (PREDICTIONS, Prediction, Schedule, at, clipped, ddpm, ideal_predictor,
                                       initial_noise, per_sample_noise, posterior, prediction_from_eps,
                                       prediction_from_v, prediction_from_x0, predictor, sample, signal_and_noise,
                                       visited)

SCHEDULES = {"linear": Schedule.linear(500), "labs": labs(), "cosine": Schedule.cosine(500)}
S = SCHEDULES["linear"]
STEPS = [1, 2, 3, 4, 5, 7, 9, 10, 13, 20, 25, 30, 33, 40, 60, 100, 250, 499, 500]   # 30, 33, 40, 60 do not divide 500

schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
steps = pytest.mark.parametrize("n", STEPS)

def zeros(schedule): return lambda xt, t: prediction_from_x0(torch.zeros_like(xt), xt, t, schedule)
def images(n=4, shape=(3, 8, 8), seed=0): return torch.randn(n, *shape, generator=seeded(seed))


# --- schedules -------------------------------------------------------------------------------------------------------

def test_linear_is_diffusers():
    for T, beta_1, beta_T in [(1000, 1e-4, 0.02), (500, 1e-4, 0.02), (500, 2e-4, 0.04)]:
        theirs = DDPMScheduler(num_train_timesteps=T, beta_start=beta_1, beta_end=beta_T)
        ours = Schedule.linear(T, beta_1, beta_T)
        assert_close(ours.beta[1:].float(), theirs.betas, rtol=1e-5, atol=1e-9)
        assert_close(ours.alpha_bar[1:].float(), theirs.alphas_cumprod, rtol=1e-4, atol=0)

def test_linear_scales_with_T():
    theirs = DDPMScheduler(num_train_timesteps=1000)                # DDPM's own: T = 1000, 1e-4 … 0.02
    assert_close(Schedule.linear(1000).beta[1:].float(), theirs.betas, rtol=1e-5, atol=1e-9)
    assert_close(Schedule.linear(500).beta[[1, 500]].tolist(), [2e-4, 0.04], rtol=1e-9, atol=0)
    for T in (200, 500, 1000, 4000): oracles.check_terminal_signal(Schedule.linear(T))

def test_cosine_is_diffusers():
    theirs = DDPMScheduler(num_train_timesteps=500, beta_schedule="squaredcos_cap_v2")
    assert_close(Schedule.cosine(500).beta[1:].float(), theirs.betas, rtol=1e-5, atol=1e-7)
    ours = Schedule.cosine(500, beta_max=0.5).beta[1:].float()
    assert_close(ours, betas_for_alpha_bar(500, 0.5), rtol=1e-5, atol=1e-7)
    oracles.check_terminal_signal(Schedule.cosine(500))

@schedules
def test_derived_tables(schedule):
    ab = schedule.alpha_bar.numpy()
    beta = np.concatenate([[0], 1 - ab[1:] / ab[:-1]])
    with np.errstate(divide="ignore"): snr = ab / (1 - ab)
    for got, want in [(schedule.beta, beta), (schedule.alpha, 1 - beta), (schedule.snr, snr),
                      (schedule.sigma, np.sqrt((1 - ab) / ab))]:
        assert got.dtype == torch.float64 and got.shape == (501,)
        assert_close(got, torch.from_numpy(want), rtol=1e-12, atol=1e-15)
    assert schedule.T == 500 and schedule.alpha_bar[0] == 1 and schedule.sigma[0] == 0 and schedule.snr[0] == torch.inf
    assert_close(torch.cumprod(1 - schedule.beta, 0), schedule.alpha_bar, rtol=1e-10, atol=0)
    assert_close(schedule.snr[1:], schedule.sigma[1:] ** -2, rtol=1e-12, atol=0)

@pytest.mark.parametrize("T", [1, 2, 3, 10, 37])
def test_small_T(T):
    for schedule in (Schedule.linear(T), Schedule.cosine(T)):
        assert schedule.T == T
        assert len(walk(ddpm, zeros(schedule), images(), schedule)) == T

def test_schedule_from_anything():
    for alpha_bar in ([1, 0.5, 0.25], np.array([1, 0.5, 0.25], dtype=np.float32), torch.tensor([1, 0.5, 0.25]).half()):
        assert_close(Schedule(alpha_bar).alpha_bar, torch.tensor([1, 0.5, 0.25], dtype=torch.float64))
    assert "T=2" in repr(Schedule([1, 0.5, 0.25]))

def test_schedule_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError): S.alpha_bar = torch.ones(3)
    with pytest.raises(AttributeError): S.T = 3

@pytest.mark.parametrize("make", [lambda x: x, torch.Tensor.numpy], ids=["tensor", "array"])
def test_schedule_keeps_its_own_copy(make):
    given = torch.tensor([1, 0.5, 0.25], dtype=torch.float64)
    schedule = Schedule(make(given))
    given[1] = 7
    assert schedule.alpha_bar[1] == 0.5

@pytest.mark.parametrize("alpha_bar, words", [
    ([[1, 0.5], [0.4, 0.3]], "shape"), ([1.0], "shape"), (1.0, "shape"), ([], "shape"),
    ([0.999, 0.5, 0.1], "clean data"), ([torch.nan, 0.5], "clean data"),
    ([1, 0.5, 0.6], "fall"), ([1, 0.5, 0.5], "fall"), ([1, torch.nan, 0.5], "fall"),
    ([1, 0.5, -0.1], "below 0")])
def test_bad_schedules(alpha_bar, words):
    with pytest.raises(ValueError, match=words): Schedule(alpha_bar)

@pytest.mark.parametrize("T", [0, -1, 2.5, 500.0, True, "500", None])
def test_bad_T(T):
    for make in (Schedule.linear, Schedule.cosine):
        with pytest.raises(ValueError, match="whole number"): make(T)

@pytest.mark.parametrize("betas", [(0, 0.02), (-0.1, 0.02), (1e-4, 1), (1e-4, 1.5), (1, 0.1), (float("nan"), 0.1)])
def test_bad_betas(betas):
    with pytest.raises(ValueError, match="between 0 and 1"): Schedule.linear(500, *betas)


# --- times -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("spacing", ["trailing", "quadratic"])
@pytest.mark.parametrize("T", [1, 2, 3, 7, 50, 100, 500])
def test_times_of_every_n(T, spacing):
    schedule = Schedule.linear(T)
    for n in range(1, T + 1): oracles.check_times(schedule.timesteps(n, spacing), T, n)

@steps
def test_trailing_strides_are_even(n):
    strides = [t - s for t, s in pairwise(S.timesteps(n))]
    assert max(strides) - min(strides) <= 1

@pytest.mark.parametrize("n", [10, 20, 30, 100])
def test_trailing_is_diffusers(n):
    scheduler = DDPMScheduler(num_train_timesteps=500, timestep_spacing="trailing")
    scheduler.set_timesteps(n)
    theirs = [int(t) + 1 for t in scheduler.timesteps]
    # they round halves to even after the floating-point division, we round them up: one time may differ by one
    assert max(abs(a - b) for a, b in zip(S.timesteps(n)[:-1], theirs, strict=True)) <= (500 % n != 0)

def test_quadratic_is_finer_towards_0():
    strides = [t - s for t, s in pairwise(S.timesteps(20, "quadratic"))]
    assert strides == sorted(strides, reverse=True) and strides[0] > 30 * strides[-1]

@pytest.mark.parametrize("n", [0, -1, 501, 10.0, True, "10", None])
def test_bad_numbers_of_steps(n):
    with pytest.raises(ValueError, match="whole number from 1 to T=500"): S.timesteps(n)

@pytest.mark.parametrize("spacing", ["leading", "linspace", "", None])
def test_bad_spacing(spacing):
    with pytest.raises(ValueError, match="trailing"): S.timesteps(10, spacing)

@pytest.mark.parametrize("ts", [[], [0], [500], [500, 250], [500, 250, 1], [500, 500, 0], [250, 500, 0], [501, 250, 0],
                                [500, 250, -1], [500, 0, 0], list(range(501)), [500, 250, 0, -12]])
def test_bad_times_to_visit(ts):
    for visit in (lambda: visited(S, ts), lambda: walk(ddpm, zeros(S), images(), S, ts)):
        with pytest.raises(ValueError, match="fall strictly"): visit()

def test_times_to_visit():
    assert visited(S) == list(range(500, -1, -1)) == S.timesteps(500)
    for ts in ([400, 7, 0], (400, 7, 0), np.array([400, 7, 0]), torch.tensor([400, 7, 0]), iter([400, 7, 0])):
        assert visited(S, ts) == [400, 7, 0] and all(type(t) is int for t in visited(S, [400, 7, 0]))

@pytest.mark.parametrize("ts", [[500.0, 250.0, 0.0], [500, 250.7, 0], np.linspace(500, 0, 31),
                                torch.linspace(500, 0, 31)], ids=["floats", "one float", "linspace", "torch.linspace"])
def test_float_times_are_not_rounded(ts):
    with pytest.raises(TypeError): visited(S, ts)


# --- looking up a time: nothing wraps, nothing broadcasts ------------------------------------------------------------

def users(t, x):
    "Every public function that takes a time, called with t."
    yield lambda: at(S.alpha_bar, t, x)
    yield lambda: signal_and_noise(t, x, S)
    yield lambda: posterior(x, x, t, 0, S)
    for read in PREDICTIONS.values(): yield lambda read=read: read(x, x, t, S)
    yield lambda: predictor(lambda x, t: x, S)(x, t)
    yield lambda: clipped(zeros(S), S)(x, t)
    yield lambda: ideal_predictor(images(6), S)(x, t)

@pytest.mark.parametrize("t", [-1, -500, 501, 10**6, torch.tensor(-1), torch.tensor(501),
                               torch.tensor([5, 6, -7, 8]), torch.tensor([5, 6, 7, 501]), np.int64(501)])
def test_times_outside(t):
    for use in users(t, images(4)):
        with pytest.raises(ValueError): use()
    with pytest.raises(ValueError): posterior(images(), images(), 5, -1, S)

@pytest.mark.parametrize("t", [5.0, 5.5, True, None, "5", torch.tensor(5.0), torch.tensor([5.0, 6.0, 7.0, 8.0]),
                               torch.tensor([True, False, True, True]), [5, 6, 7, 8]])
def test_times_that_are_not_whole(t):
    with pytest.raises(TypeError): at(S.alpha_bar, t, images(4))
    if isinstance(t, float) or isinstance(t, torch.Tensor) and t.is_floating_point():
        for use in users(t, images(4)):
            with pytest.raises(TypeError): use()

@pytest.mark.parametrize("shape", [(3,), (1,), (5,), (4, 1), (1, 4), (2, 2)])
def test_times_of_another_shape(shape):
    x, t = images(4), torch.full(shape, 5)
    for use in (lambda: at(S.alpha_bar, t, x), lambda: signal_and_noise(t, x, S), lambda: posterior(x, x, t, 0, S),
                *(lambda read=read: read(x, x, t, S) for read in PREDICTIONS.values())):
        with pytest.raises(ValueError, match="one per image"): use()

def test_times_that_fit():
    x = images(4)
    for t in (7, np.int64(7), torch.tensor(7), torch.tensor(7, dtype=torch.int32)):
        assert at(S.alpha_bar, t, x).shape == () and at(S.alpha_bar, t, x) == S.alpha_bar[7]
    for t in (torch.tensor([0, 1, 499, 500]), torch.tensor([0, 1, 499, 500], dtype=torch.int32)):
        for like in (x, x[:, 0, 0, 0], x[..., 0]):
            values = at(S.alpha_bar, t, like)
            assert values.shape == (4, *[1] * (like.ndim - 1)) and values.dtype == torch.float64
            assert torch.equal(values.flatten(), S.alpha_bar[t.long()])

def test_images_of_whole_numbers():
    "Bytes would be cut to 0 and 1 by the coefficients, without a word."
    x = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    for use in (lambda: posterior(x, x, 5, 4, S), lambda: signal_and_noise(5, x, S)):
        with pytest.raises(TypeError, match=r"uint8: expected floats in \[-1, 1\]; for bytes use x / 127.5 - 1"): use()

@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
def test_times_of_any_whole_dtype(dtype):
    t = torch.tensor([1, 2, 3, 0], dtype=dtype)
    for T in (3, 100):                                  # T + 1 = 4 times for 4 images: a uint8 index would be a mask
        beta = Schedule.linear(T).beta
        assert torch.equal(at(beta, t, images(4)).flatten(), beta[t.long()])

def test_no_noise_to_predict_at_0():
    x = images()
    for read in PREDICTIONS.values():
        with pytest.raises(ValueError, match="outside 1 … 500"): read(x, x, 0, S)
    for predict in (predictor(lambda x, t: x, S), clipped(zeros(S), S), ideal_predictor(images(6), S)):
        with pytest.raises(ValueError, match="outside 1 … 500"): predict(x, 0)
    signal, noise = signal_and_noise(0, x, S)
    assert signal == 1 and noise == 0

@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_images_that_are_not_float(dtype):
    with pytest.raises(TypeError): signal_and_noise(5, torch.full((4, 3, 8, 8), 200, dtype=dtype), S)


# --- the posterior ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("T, beta_1, beta_T", [(500, 1e-4, 0.02), (1000, 1e-4, 0.02), (20, 0.01, 0.5)])
def test_posterior_is_ddpm_6_and_7(T, beta_1, beta_T):
    schedule = Schedule.linear(T, beta_1, beta_T)
    beta = np.concatenate([[0], np.linspace(beta_1, beta_T, T)])
    alpha, alpha_bar = 1 - beta, np.cumprod(1 - beta)
    x0, xt = torch.randn(2, 5, 2, generator=seeded(), dtype=torch.float64)
    for t in range(1, T + 1):
        mean, var = posterior(x0, xt, t, t - 1, schedule)
        want = (np.sqrt(alpha_bar[t - 1]) * beta[t] / (1 - alpha_bar[t]) * x0
                + np.sqrt(alpha[t]) * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * xt)
        assert_close(mean, want, rtol=1e-9, atol=1e-11)
        assert_close(var.item(), (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * beta[t], rtol=1e-9, atol=1e-12)

@schedules
def test_posterior_composes(schedule):
    for t, r, s in [(400, 130, 20), (500, 499, 498), (500, 1, 0), (3, 2, 1)]:
        oracles.check_posterior_composes(posterior, schedule, t, r, s)

@schedules
@pytest.mark.parametrize("t, s", [(500, 400), (300, 299), (100, 10), (2, 1)])
def test_posterior_by_simulation(schedule, t, s): oracles.check_posterior_by_simulation(posterior, schedule, t, s)

@schedules
@pytest.mark.parametrize("t, s", [(500, 499), (500, 1), (200, 60), (1, 0), (500, 0)])
def test_posterior_is_a_conditional_gaussian(schedule, t, s):
    a, b, var = oracles.ddpm_kernel(schedule.alpha_bar[t].item(), schedule.alpha_bar[s].item())
    zero, one = torch.zeros(2, 1, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    assert_close(posterior(one, zero, t, s, schedule)[0], one * a, rtol=1e-9, atol=1e-12)
    assert_close(posterior(zero, one, t, s, schedule)[0], one * b, rtol=1e-9, atol=1e-12)
    assert_close(posterior(one, one, t, s, schedule)[1].item(), var, rtol=1e-8, atol=1e-12)

def test_posterior_at_0_is_x0():
    x0, xt = images(seed=1), images(seed=2)
    for t in (1, 250, 500):
        mean, var = posterior(x0, xt, t, 0, S)
        assert torch.equal(mean, x0) and var == 0

def test_posterior_of_a_batch_of_times():
    x0, xt, t, s = images(seed=1), images(seed=2), torch.tensor([500, 300, 20, 1]), torch.tensor([499, 10, 3, 0])
    mean, var = posterior(x0, xt, t, s, S)
    assert mean.shape == x0.shape and var.shape == (4, 1, 1, 1)
    for i in range(4):
        one_mean, one_var = posterior(x0[i:i + 1], xt[i:i + 1], int(t[i]), int(s[i]), S)
        assert_close(mean[i:i + 1], one_mean)
        assert_close(var[i, 0, 0, 0], one_var)
    assert_close(posterior(x0, xt, t, 0, S)[0], x0)

@pytest.mark.parametrize("t, s", [(5, 5), (5, 6), (0, 0), (0, -1), (torch.tensor([5, 6, 7, 8]), 5),
                                  (torch.tensor([5, 6, 7, 8]), torch.tensor([4, 5, 7, 0]))])
def test_posterior_goes_back_in_time(t, s):
    with pytest.raises(ValueError): posterior(images(), images(), t, s, S)

@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (8, 8), (4, 1, 8, 8)])
def test_posterior_does_not_broadcast(shape):
    with pytest.raises(ValueError, match="shape"): posterior(torch.zeros(shape), images(4), 5, 4, S)


# --- predictions -----------------------------------------------------------------------------------------------------

@schedules
@pytest.mark.parametrize("t", [1, 2, 250, 500, torch.tensor([1, 2, 250, 500])], ids=str)
def test_round_trips(schedule, t):
    x0, eps = torch.randn(2, 4, 3, 8, 8, generator=seeded(), dtype=torch.float64)
    ab = schedule.alpha_bar[t].view(-1, 1, 1, 1)
    xt, v = ab.sqrt() * x0 + (1 - ab).sqrt() * eps, ab.sqrt() * eps - (1 - ab).sqrt() * x0
    for answer, read in ((eps, prediction_from_eps), (x0, prediction_from_x0), (v, prediction_from_v)):
        pred = read(answer, xt, t, schedule)
        assert isinstance(pred, Prediction)
        assert_close(pred.x0, x0, rtol=1e-7, atol=1e-7)
        assert_close(pred.eps, eps, rtol=1e-7, atol=1e-7)

@schedules
def test_any_answer_gives_a_consistent_pair(schedule):
    for read in PREDICTIONS.values():
        for t in (1, 100, 400):
            answer, xt = images(seed=1), images(seed=2)
            oracles.check_pair(read(answer, xt, t, schedule), xt, t, schedule)

@schedules
def test_clipping(schedule):
    oracles.check_clip(clipped, schedule)
    wide = clipped(lambda xt, t: prediction_from_x0(xt * 9, xt, t, schedule), schedule, low=0, high=2)(images(), 100)
    assert wide.x0.min() == 0 and wide.x0.max() == 2

def test_context_reaches_every_sample():
    for schedule in SCHEDULES.values(): oracles.check_context_rows(predictor, schedule)

def test_no_context_is_a_context_of_zeros():
    net, x = random_unet(), images()
    assert_close(predictor(net, S)(x, 100), predictor(net, S, torch.zeros(1, 5))(x, 100))

def test_predictor_calls_the_network():
    net = oracles.Recorder(lambda xt, t: xt * 0.5)
    for t in (7, np.int64(7), torch.tensor(7), torch.full((4,), 7)):
        predictor(net, S)(images(), t)
        xt, times, context = net.calls[-1]
        assert torch.equal(xt, images()) and torch.equal(times, torch.full((4,), 7)) and context is None
        assert times.dtype == torch.int64
    predictor(net, S, torch.ones(1, 5, dtype=torch.float64))(images(), 7)
    assert torch.equal(net.calls[-1][2], torch.ones(4, 5)) and net.calls[-1][2].dtype == torch.float32

@pytest.mark.parametrize("kind", PREDICTIONS)
def test_kind_of_prediction(kind):
    net, x = random_unet(predicts=kind), images()
    with torch.no_grad(): want = PREDICTIONS[kind](net(x, torch.full((4,), 9)), x, 9, S)
    assert_close(predictor(net, S)(x, 9), want)                             # what the network says of itself
    assert_close(predictor(random_unet(), S, kind=kind)(x, 9), want)        # what the caller says
    assert_close(predictor(lambda x, t: x, S)(x, 9), prediction_from_eps(x, x, 9, S))

@pytest.mark.parametrize("kind", ["", "epsilon", "noise", "V", 3])
def test_unknown_kind(kind):
    with pytest.raises(ValueError, match="expected one of"): predictor(random_unet(), S, kind=kind)
    with pytest.raises(ValueError, match="expected one of"): predictor(oracles.Recorder(predicts=kind), S)

@pytest.mark.parametrize("shape", [(3, 5), (5, 5), (2, 5), (0, 5), (5,), (4,), (), (1, 4, 5)])
def test_context_of_another_batch_size(shape):
    predict = predictor(random_unet(), S, torch.zeros(shape))
    with pytest.raises(ValueError, match="context has shape"): predict(images(4), 5)

@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("answer", [lambda x, t: x[:, :1], lambda x, t: x[:1], lambda x, t: x.mean(0),
                                    lambda x, t: x.mean()], ids=["one channel", "one image", "no batch", "scalar"])
def test_answers_do_not_broadcast(answer, kind):
    with pytest.raises(ValueError, match="shape"): predictor(answer, S, kind=kind)(images(4), 5)


# --- the ideal prediction --------------------------------------------------------------------------------------------

@schedules
@pytest.mark.parametrize("t", [1, 20, 100, 250, 500])
def test_ideal_prediction_is_bayes_rule(schedule, t):
    data, ab = random_images(6, (2, 3)).double(), schedule.alpha_bar[t]
    xt = (ab.sqrt() * data[:4] + (1 - ab).sqrt() * torch.randn(4, 2, 3, generator=seeded(), dtype=torch.float64))
    def log_likelihood(x, image):
        return torch.distributions.Normal(ab.sqrt() * image, (1 - ab).sqrt()).log_prob(x).sum()
    logs = torch.stack([torch.stack([log_likelihood(x, image) for image in data]) for x in xt])
    want = torch.einsum("nm,mij->nij", (logs - logs.logsumexp(1, keepdim=True)).exp(), data)
    pred = ideal_predictor(data, schedule)(xt, t)
    assert_close(pred.x0, want, rtol=1e-6, atol=1e-6)
    oracles.check_pair(pred, xt, t, schedule)

def test_ideal_prediction_of_one_image():
    image, x = random_images(1, (3, 8, 8)), images(5)
    for t in (1, 250, 500): assert_close(ideal_predictor(image, S)(x, t).x0, image.expand(5, -1, -1, -1))

@pytest.mark.parametrize("m", [4, 7])
def test_ideal_prediction_of_a_batch_of_times(m):
    predict = ideal_predictor(random_images(m, (1, 2, 2)), S)
    x, t = images(4, (1, 2, 2)), torch.tensor([20, 100, 200, 400])
    alone = torch.cat([predict(x[i:i + 1], int(t[i])).x0 for i in range(4)])
    assert_close(predict(x, t).x0, alone, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize("shape", [(8, 8, 3), (3, 64), (192,), (1, 8, 8)])
def test_ideal_prediction_wants_images_of_the_same_shape(shape):
    with pytest.raises(ValueError, match="shape"): ideal_predictor(random_images(6, shape), S)(images(4), 5)


# --- DDPM against the analytic oracle --------------------------------------------------------------------------------

@schedules
@steps
def test_ddpm_gaussian_exact(schedule, n): oracles.check_gaussian_exact(ddpm, schedule, schedule.timesteps(n))

@pytest.mark.parametrize("ts", [[500, 3, 1, 0], [40, 39, 7, 0], [1, 0], S.timesteps(20, "quadratic")], ids=str)
def test_ddpm_gaussian_exact_on_odd_grids(ts):
    for mu, std in ((0.3, 0.5), (-1.0, 0.05), (0.0, 2.0)): oracles.check_gaussian_exact(ddpm, S, ts, mu=mu, std=std)

@schedules
@pytest.mark.parametrize("n", [2, 13, 100, 500])
def test_ddpm_gaussian_samples(schedule, n): oracles.check_gaussian_samples(ddpm, schedule, schedule.timesteps(n))

def test_ddpm_gaussian_samples_with_its_own_noise():
    torch.manual_seed(0)
    oracles.check_gaussian_samples(ddpm, S, S.timesteps(50), noise=torch.randn_like)
    oracles.check_gaussian_samples(ddpm, S, S.timesteps(50), noise=per_sample_noise(0, 5000), n=5000)

def test_ddpm_reaches_the_data():
    "The full grid ends at the data, few steps near them."
    for n, tolerance in ((500, 0.01), (50, 0.1)):
        mean, var = oracles.gaussian_walk(0.3, 0.5, S, S.timesteps(n))[-1]
        assert_close(mean, 0.3, rtol=0, atol=tolerance)
        assert_close(var, 0.25, rtol=0, atol=tolerance)

def test_oracle_kernels_agree():
    for t, s in ((500, 490), (30, 1), (7, 0)):
        ab_t, ab_s = S.alpha_bar[t].item(), S.alpha_bar[s].item()
        assert_close(oracles.ddim_kernel(1.0)(ab_t, ab_s), oracles.ddpm_kernel(ab_t, ab_s), rtol=1e-9, atol=1e-12)


# --- DDPM with the ideal denoiser ------------------------------------------------------------------------------------

@schedules
@steps
def test_ddpm_lands(schedule, n): oracles.check_lands(ddpm, schedule, schedule.timesteps(n))

def test_where_landing_is_required():
    for schedule, n in ((S, 9), (labs(), 6), (Schedule.cosine(500), 5)):
        assert oracles.must_land(random_images(), schedule, schedule.timesteps(n))
        assert not oracles.must_land(random_images(), schedule, schedule.timesteps(n - 1))

def test_one_step_gives_the_mean_of_the_images():
    data = random_images()
    one = sample(ideal_predictor(data, S), S, 8, steps=1)
    rms = (one - data.mean(0)).square().mean(dim=(1, 2, 3)).sqrt()
    assert rms.max() < 0.1                              # the images themselves are 0.57 away from their mean

def test_many_images_are_reached():
    data = random_images()
    found = torch.cdist(sample(ideal_predictor(data, S), S, 64, steps=20).flatten(1), data.flatten(1)).argmin(dim=1)
    assert len(found.unique()) > 30                     # 64 fair draws out of 64 give about 41 different ones


# --- DDPM against diffusers ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prediction_type, tolerance", [("sample", 1e-4), ("epsilon", 1e-3)])
@pytest.mark.parametrize("spacing, n", [("leading", 500), ("leading", 100), ("leading", 30), ("leading", 7),
                                        ("trailing", 500), ("trailing", 20), ("trailing", 1)])
@pytest.mark.parametrize("name", ["smooth", "ideal"])
def test_ddpm_is_diffusers(name, spacing, n, prediction_type, tolerance):
    scheduler = oracles.diffusers_scheduler(DDPMScheduler, prediction_type=prediction_type, variance_type="fixed_small",
                                            timestep_spacing=spacing)
    predict = {"smooth": smooth_predictor(labs(), 48),
               "ideal": ideal_predictor(random_images(16, (3, 4, 4)), labs())}[name]
    oracles.check_against_diffusers(ddpm, scheduler, n, predict, images(4, (3, 4, 4)), labs(), tolerance=tolerance)

def test_ddpm_with_a_network_is_diffusers():
    scheduler = oracles.diffusers_scheduler(DDPMScheduler, prediction_type="sample")
    predict = clipped(predictor(random_unet(), labs(), torch.ones(1, 5)), labs())
    oracles.check_against_diffusers(ddpm, scheduler, 50, predict, images(2), labs())


# --- DDPM: the record, the noise, the shapes -------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(4, 3, 16, 16), (4, 1, 8, 8), (5, 2), (1, 3, 8, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ddpm_keeps_its_record(shape, dtype):
    xT = torch.randn(shape, generator=seeded(), dtype=dtype)
    predict = smooth_predictor(S, xT[0].numel())
    for ts in (S.timesteps(1), S.timesteps(20), [400, 3, 0]): oracles.check_steps(ddpm, predict, xT, S, ts)

@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_is_kept_with_noise_per_sample(dtype):
    for step in ddpm(zeros(S), images().to(dtype), S, [500, 200, 10, 0], noise=per_sample_noise(0, 4)):
        assert step.xs.dtype == dtype

def test_ddpm_records_no_gradient():
    net = random_unet().requires_grad_(True)
    for step in ddpm(predictor(net, S), images(2), S, [500, 200, 0]):
        assert not step.xs.requires_grad and not step.pred.x0.requires_grad
        assert torch.is_grad_enabled()                  # the consumer of the steps may still want gradients

def test_ddpm_draws_noise_once_per_step_but_not_at_the_end():
    calls = []
    walk(ddpm, zeros(S), images(), S, S.timesteps(7), noise=lambda xt: calls.append(xt) or torch.zeros_like(xt))
    assert len(calls) == 6

def test_ddpm_is_lazy():
    "Nothing runs before it is asked for, and a consumer may stop early."
    times = []
    def predict(xt, t):
        times.append(t)
        return zeros(S)(xt, t)
    steps = ddpm(predict, images(), S)
    assert times == []
    next(steps), next(steps)
    assert times == [500, 499]


# --- noise -----------------------------------------------------------------------------------------------------------

def test_noise_streams(): oracles.check_noise_streams(initial_noise, per_sample_noise)

def test_noise_per_sample():
    oracles.check_noise_per_sample(per_sample_noise)
    every = initial_noise(6, (3, 4, 4), seed=3)
    assert every.dtype == torch.float32 and every.shape == (6, 3, 4, 4)
    for indices in ([0], [5, 2], range(3), torch.tensor([1, 4]), np.array([1, 4])):
        assert torch.equal(initial_noise(indices, (3, 4, 4), seed=3), every[list(map(int, indices))])
    assert not torch.equal(initial_noise(6, (3, 4, 4), seed=4), every)
    assert initial_noise(2).shape == (2, 3, 16, 16)

def test_noise_is_this_noise():
    "The same numbers on every machine and in every version: what a seed shows in the lessons must not change."
    want = np.random.default_rng([5, 0, 2]).standard_normal(3, dtype=np.float32)
    assert torch.equal(initial_noise([2], (3,), seed=5)[0], torch.from_numpy(want))
    want = np.random.default_rng([5, 1, 2]).standard_normal(3, dtype=np.float32)
    assert torch.equal(per_sample_noise(5, [2])(torch.empty(1, 3))[0], torch.from_numpy(want))

def test_noise_leaves_global_generators_alone():
    torch.manual_seed(0), np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    sample(zeros(S), S, 2, steps=5, shape=(2,))
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()

@pytest.mark.parametrize("seed", [-1, 1.5, 0.0, True, None, "0"])
def test_bad_seeds(seed):
    for draw in (lambda: initial_noise(2, seed=seed), lambda: per_sample_noise(seed, 2),
                 lambda: sample(zeros(S), S, 2, seed=seed, steps=1)):
        with pytest.raises(ValueError, match="seed"): draw()

@pytest.mark.parametrize("n", [0, -1, [], range(0), [-1], [3, -2]], ids=str)
def test_bad_numbers_of_samples(n):
    for draw in (lambda: initial_noise(n), lambda: per_sample_noise(0, n), lambda: sample(zeros(S), S, n, steps=1)):
        with pytest.raises(ValueError): draw()

@pytest.mark.parametrize("n", [2.5, [1.7], [0, 1.0], None], ids=str)
def test_fractions_of_samples(n):
    with pytest.raises(TypeError): initial_noise(n)

def test_number_of_samples_from_numpy(): assert torch.equal(initial_noise(np.int64(3), (2,)), initial_noise(3, (2,)))

@pytest.mark.parametrize("asked", [1, 3, 5])
def test_noise_made_for_another_n(asked):
    with pytest.raises(ValueError, match=f"asked for {asked} samples and made for 4"):
        per_sample_noise(0, 4)(torch.zeros(asked, 3, 4, 4))
    with pytest.raises(ValueError, match="made for 4"):
        walk(ddpm, zeros(S), images(asked), S, [500, 3, 0], noise=per_sample_noise(0, 4))


# --- sample ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, n_steps", [(3, 12), ([4, 1], 12), (2, None)], ids=str)
def test_sample_is_the_loop(n, n_steps):
    predict = smooth_predictor(S, 12)
    xt = initial_noise(n, (3, 2, 2), seed=5)
    noise = per_sample_noise(5, n)
    for t, s in pairwise(S.timesteps(n_steps or 500)):
        mean, var = posterior(predict(xt, t).x0, xt, t, s, S)
        xt = mean if s == 0 else mean + var.sqrt() * noise(xt)
    assert_close(sample(predict, S, n, steps=n_steps, shape=(3, 2, 2), seed=5), xt, rtol=0, atol=0)

def test_sample_twice():
    predict = smooth_predictor(S, 12)
    first, again, other = (sample(predict, S, 3, steps=20, shape=(3, 2, 2), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other, atol=0.1)

@pytest.mark.parametrize("name", ["ideal", "unet", "unet with context"])
def test_samples_do_not_depend_on_their_batch(name):
    context = torch.ones(1, 5) if "context" in name else None
    predict = (ideal_predictor(random_images(16, (3, 8, 8)), S) if name == "ideal"
               else clipped(predictor(random_unet(), S, context), S))
    oracles.check_batch_split(ddpm, predict, S, steps=12, shape=(3, 8, 8))

def test_samples_with_contexts_of_their_own():
    net, context = random_unet(), torch.eye(5)
    def draw(indices):
        return sample(clipped(predictor(net, S, context[indices]), S), S, indices, steps=12, shape=(3, 8, 8))
    assert_close(draw([3, 1]), draw([0, 1, 2, 3, 4])[[3, 1]], rtol=1e-4, atol=1e-4)

def test_context_changes_the_sample():
    def draw(context): return sample(clipped(predictor(random_unet(), S, context), S), S, 2, steps=5, shape=(3, 8, 8))
    assert not torch.allclose(draw(torch.eye(5)[:1]), draw(torch.eye(5)[1:2]), atol=1e-3)

@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 16), (2,), (5, 3)], ids=str)
def test_sample_shapes(shape):
    data = random_images(8, shape)
    got = sample(ideal_predictor(data, S), S, 3, steps=10, shape=shape)
    assert got.shape == (3, *shape) and got.dtype == torch.float32

def test_sample_takes_another_sampler():
    seen = {}
    def sampler(predict, xT, schedule, ts=None, *, noise=None):
        seen.update(ts=ts, draw=noise(xT))
        yield from ddpm(predict, xT, schedule, ts, noise=noise)
    sample(zeros(S), S, 3, sampler=sampler, steps=7, shape=(2,), seed=4)
    assert seen["ts"] == S.timesteps(7)
    assert torch.equal(seen["draw"], per_sample_noise(4, 3)(torch.empty(3, 2)))

def test_progress_bar(capsys):
    sample(zeros(S), S, 1, steps=7, shape=(2,))
    assert capsys.readouterr() == ("", "")
    sample(zeros(S), S, 1, steps=7, shape=(2,), progress=True)
    out, err = capsys.readouterr()
    assert "7/7" in out and err == ""

@pytest.mark.parametrize("n_steps", [0, -1, 501, 2.0, True])
def test_bad_steps(n_steps):
    with pytest.raises(ValueError, match="whole number"): sample(zeros(S), S, 1, steps=n_steps)

@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at_time", [500, 250, 50])
def test_broken_predictions(bad, at_time):
    def predict(xt, t):
        x0 = torch.zeros_like(xt)
        if t == at_time: x0[1, 0] = bad
        return prediction_from_x0(x0, xt, t, S)
    with pytest.raises(FloatingPointError, match="NaN or infinity"): sample(predict, S, 3, steps=10, shape=(2,))

def test_broken_network():
    net = random_unet()
    net.stem.weight[0, 0, 0, 0] = torch.nan
    for predict in (predictor(net, S), clipped(predictor(net, S), S)):
        with pytest.raises(FloatingPointError): sample(predict, S, 2, steps=3, shape=(3, 8, 8))
