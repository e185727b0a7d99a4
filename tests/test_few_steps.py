"Lesson 6: jumps, stored walks, agreeing with oneself, matching a crowd; and the shipped network that does it."
import copy
import json
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from conftest import ROOT
from diffusion_course import check_few
from diffusion_course.checkpoints import CheckpointError, load_model, pretrained, pretrained_file, save_model
from diffusion_course.context import one_hot
from diffusion_course.fast_sampling import ddim, dpmpp_2m, renoised
from diffusion_course.few_steps import (Walks, _stopped, consistency_loss, jump, jumps, match, matching_loss, store_walks, walk_loss)
from diffusion_course.metrics import class_accuracy, coverage, features, kid
from diffusion_course.sampling import Prediction, Schedule, clipped, ddpm, initial_noise, prediction_from_x0, predictor, sample
from diffusion_course.sprites import Sprites
from diffusion_course.training import TrainingDiverged, add_noise, train
from oracles import gaussian_ode, gaussian_predictor, normal, random_unet, seeded, smooth_predictor

COSINE, SHORT = Schedule.cosine(), Schedule.cosine(20)
schedules = pytest.mark.parametrize("schedule", [COSINE, SHORT, Schedule.linear(), Schedule.flow(50)], ids=str)


# --- the sampler -------------------------------------------------------------------------------------------------------

def exact_predictor(schedule, mu=0.3, std=0.5):
    "A network that jumps, for pixels from N(mu, std²): the end of the walk, in closed form."
    return lambda xt, t: prediction_from_x0(gaussian_ode(xt, t, 0, mu, std, schedule), xt, t, schedule)

@schedules
@pytest.mark.parametrize("n", [1, 2, 4, 13])
def test_exact_jumps_draw_the_data(schedule, n):
    "Whatever the middle times: each jump of an exact network gives the data, so mean and variance are theirs."
    xT, noise = torch.randn(40_000, 1, generator=seeded(), dtype=torch.float64), normal(1)
    if schedule.alpha_bar[-1] > 0: xT = add_noise(0.3 + 0.5 * noise(xT), schedule.T, xT, schedule)
    for step in jumps(exact_predictor(schedule), xT, schedule, schedule.timesteps(n), noise=noise):
        ab = schedule.alpha_bar[step.s].item()
        assert_close(step.xs.mean().item(), ab**0.5 * 0.3, rtol=0, atol=0.03)
        assert_close(step.xs.var().item(), ab * 0.25 + 1 - ab, rtol=0.04, atol=0)

@schedules
@pytest.mark.parametrize("ts", [[20, 7, 3, 0], [20, 0], [5, 1, 0]], ids=str)
def test_a_jump_by_hand(schedule, ts):
    predict, xT = smooth_predictor(schedule, 48), torch.randn(3, 3, 4, 4, generator=seeded())
    drawn, g = [], seeded(3)
    def noise(xt): drawn.append(torch.randn(xt.shape, generator=g)); return drawn[-1]
    steps = list(jumps(predict, xT, schedule, ts, noise=noise))
    assert [(step.i, step.t, step.s) for step in steps] == [(i, t, s) for i, (t, s) in enumerate(pairwise(ts))]
    assert len(drawn) == len(ts) - 2 # none after the last jump
    before = xT
    for step in steps:
        assert step.xt is before
        assert_close(step.pred.x0, predict(before, step.t).x0)
        ab = schedule.alpha_bar[step.s].item()
        want = step.pred.x0 if step.s == 0 else ab**0.5 * step.pred.x0 + (1 - ab) ** 0.5 * drawn[step.i]
        assert_close(step.xs, want)
        before = step.xs

def test_one_jump_is_one_step_of_any_sampler():
    predict, xT = smooth_predictor(COSINE, 48), torch.randn(3, 3, 4, 4, generator=seeded())
    ends = [list(sampler(predict, xT, COSINE, [500, 0]))[-1].xs for sampler in (jumps, ddim, ddpm, dpmpp_2m)]
    for end in ends[1:]: assert_close(ends[0], end)

def test_jumps_are_ddim_with_all_the_noise_there_is_room_for():
    predict, xT = smooth_predictor(COSINE, 48), torch.randn(3, 3, 4, 4, generator=seeded())
    first = next(jumps(predict, xT, COSINE, [500, 200, 0], noise=normal(4)))
    sigma = (1 - COSINE.alpha_bar[200].item()) ** 0.5
    assert_close(first.xs, renoised(first.pred, 200, COSINE, sigma) + sigma * normal(4)(xT))

@pytest.mark.parametrize("ts, error", [([500, 200], ValueError), ([200, 500, 0], ValueError), ([501, 0], ValueError), ([500, 2.5, 0], TypeError), ([0], ValueError)], ids=str)
def test_jumps_refuse_bad_times(ts, error):
    with pytest.raises(error): list(jumps(smooth_predictor(COSINE, 48), torch.zeros(1, 3, 4, 4), COSINE, ts))

def test_a_sample_does_not_depend_on_its_batch():
    net = random_unet(predicts="v")
    def draw(n, **kw): return sample(clipped(predictor(net, COSINE), COSINE), COSINE, n, sampler=jumps, steps=3, seed=2, **kw)
    assert_close(draw(5, batch_size=2), draw(5), rtol=1e-4, atol=1e-5)
    assert_close(draw([3]), draw(5)[3:4], rtol=1e-4, atol=1e-5)


# --- the jump ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["v", "eps", "x0", "u"])
def test_jump_is_the_clean_image_of_the_predictor(kind):
    net, xt = random_unet(predicts=kind), torch.randn(3, 3, 16, 16, generator=seeded())
    context, t = one_hot([0, 1, 4]), torch.tensor([1, 30, 499])
    assert_close(jump(net, xt, t, context, COSINE), predictor(net, COSINE, context)(xt, t).x0)
    assert_close(jump(net, xt, 30, None, COSINE), predictor(net, COSINE)(xt, 30).x0)

def test_near_time_0_the_jump_is_its_input_whatever_the_network_says():
    "The boundary condition of a consistency model, by construction: its answer enters with sqrt(1 - alpha_bar)."
    schedule, x = Schedule.cosine(100_000), torch.randn(2, 3, 4, 4, generator=seeded(), dtype=torch.float64)
    wild = lambda xt, t: 5 * torch.ones_like(xt)
    wild.predicts = "v"
    far = [(jump(wild, x, t, None, schedule) - x).abs().max() for t in (1000, 100, 10, 1)]
    assert all(a > b for a, b in pairwise(far)) and far[-1] < 0.01


# --- walks -------------------------------------------------------------------------------------------------------------

def small_teacher(net=None):
    net = net or random_unet(predicts="v")
    return lambda context: clipped(predictor(net, COSINE, context), COSINE)

def small_walks(n=12, steps=4, teacher=None, **kw):
    return store_walks(teacher or small_teacher(), one_hot(torch.arange(n) % 5), COSINE, steps=steps, shape=(3, 8, 8), **kw)

def test_walks_are_what_the_sampler_does():
    walks, context = small_walks(seed=5), one_hot(torch.arange(12) % 5)
    assert walks.states.shape == (12, 5, 3, 8, 8) and walks.states.dtype == torch.float16 and walks.ts == (500, 375, 250, 125, 0)
    steps = list(dpmpp_2m(small_teacher()(context), initial_noise(12, (3, 8, 8), seed=5), COSINE, walks.ts))
    for k, step in enumerate(steps): assert_close(walks.states[:, k].float(), step.xt, rtol=2e-3, atol=2e-3)
    assert_close(walks.states[:, -1].float(), steps[-1].xs, rtol=2e-3, atol=2e-3)
    states, row = walks[7]
    assert len(walks) == 12 and torch.equal(states, walks.states[7]) and torch.equal(row, context[7])

def test_a_walk_does_not_depend_on_its_batch_and_draws_no_global_noise():
    teacher = small_teacher()
    before = torch.get_rng_state()
    a, b = small_walks(batch_size=5, teacher=teacher), small_walks(batch_size=12, teacher=teacher)
    assert_close(a.states, b.states, rtol=2e-3, atol=2e-3)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(a.states, small_walks(seed=1).states)

@pytest.mark.parametrize("states, ts, n, word", [((4, 3), [9, 5, 2, 0], 4, "4, 3|3 states"), ((4, 3), [9, 5, 2], 4, "last of them 0"), ((4, 3), [9, 5, 0], 3, "3 contexts for 4")], ids=str)
def test_walks_that_do_not_fit_are_refused(states, ts, n, word):
    with pytest.raises(ValueError, match=word): Walks(torch.zeros(*states, 1, 4, 4), ts, torch.zeros(n, 5))

class Told(nn.Module):
    "A network that predicts x0, answers what it is told, and remembers what it was asked."
    predicts = "x0"
    def __init__(self, answer): super().__init__(); self.answer, self.asked, self.w = answer, [], nn.Parameter(torch.zeros(()))
    def forward(self, xt, t, context=None):
        self.asked.append((xt.detach(), t, torch.is_grad_enabled()))
        return self.answer(xt, t) + self.w

def test_walk_loss_by_hand():
    states = torch.randn(6, 4, 3, 4, 4, generator=seeded())
    net, ts = Told(lambda xt, t: 0.5 * xt), (500, 300, 90, 0)
    loss = walk_loss(net, states, None, COSINE, ts=ts, error=F.mse_loss, generator=seeded(1))
    (xt, t, _), = net.asked
    k = [ts.index(int(time)) for time in t]
    assert max(k) < 3 # the end is never shown
    assert_close(xt, states[torch.arange(6), k])
    assert_close(loss, (0.5 * xt - states[:, -1]).square().mean())
    assert_close(walk_loss(net, states, None, COSINE, ts=ts, error=F.mse_loss, generator=seeded(1)), loss)
    perfect = Told(lambda xt, t: states[:, -1])
    assert walk_loss(perfect, states, None, COSINE, ts=ts).item() == 0

@pytest.mark.parametrize("first", [1.0, 4.0])
def test_the_first_state_is_shown_more_often(first):
    states, net, ts = torch.zeros(6000, 5, 1, 1, 1), Told(lambda xt, t: xt), (500, 300, 90, 20, 0)
    walk_loss(net, states, None, COSINE, ts=ts, first=first, generator=seeded())
    share = (net.asked[0][1] == 500).double().mean().item()
    assert abs(share - first / (first + 3)) < 0.03

def test_the_error_is_absolute_beyond_two_steps_of_colour():
    states = torch.zeros(1, 2, 1, 1, 1)
    def cost(d): return walk_loss(Told(lambda xt, t: torch.full_like(xt, d)), states, None, COSINE, ts=(500, 0)).item()
    assert_close(cost(0.6) - cost(0.3), 0.3, rtol=1e-3, atol=0) # a line
    assert cost(0.004) < 0.15 * 0.004 # a parabola at its foot

def test_walk_loss_refuses_other_times():
    with pytest.raises(ValueError, match="states has shape"): walk_loss(random_unet(), torch.zeros(2, 4, 3, 8, 8), None, COSINE, ts=(500, 0))

def test_train_takes_walks_and_the_student_learns_the_ends():
    torch.manual_seed(0)
    walks, net = small_walks(64), random_unet(predicts="v").requires_grad_(True)
    walks.states[:, -1] = 0.5 # easy to learn
    losses = [step.loss for step in train(net, walks, COSINE, steps=60, batch_size=32, lr=3e-3, loss=partial(walk_loss, ts=walks.ts))]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


# --- agree with yourself -----------------------------------------------------------------------------------------------

def test_consistency_loss_by_hand():
    x0, net = torch.rand(64, 3, 4, 4, generator=seeded()) * 2 - 1, Told(lambda xt, t: 0.2 * xt)
    loss = consistency_loss(net, x0, None, COSINE, gap=60, error=F.mse_loss, generator=seeded(1))
    (low, s, graded), (high, t, graded_too) = net.asked
    assert not graded and graded_too # the target is held still
    assert torch.equal(s, (t - 60).clamp(min=1))
    def noise_in(x, at): ab = COSINE.alpha_bar[at].float().view(-1, 1, 1, 1); return (x - ab.sqrt() * x0) / (1 - ab).sqrt()
    inside = t > 60 # at s = 0 the state is x0 itself
    assert_close(noise_in(high, t)[inside], noise_in(low, t - 60)[inside], rtol=1e-3, atol=1e-3)
    assert 5 < (~inside).sum() < 25 and torch.equal(low[~inside], x0[~inside])
    target = torch.where(inside.view(-1, 1, 1, 1), (0.2 * low).clamp(-1, 1), x0)
    assert_close(loss, (0.2 * high - target).square().mean())

def test_the_gradient_of_the_consistency_loss_leaves_the_target_alone():
    x0, net = torch.rand(32, 3, 4, 4, generator=seeded()) * 2 - 1, random_unet(predicts="v").requires_grad_(True)
    consistency_loss(net, x0, None, COSINE, gap=100, error=F.mse_loss, generator=seeded(1)).backward()
    found = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    fixed, calls = copy.deepcopy(net).requires_grad_(False), []
    class Both(nn.Module): # the same answers; the first, about the lower state, by a frozen copy
        predicts = "v"
        def forward(self, xt, t): calls.append(t); return (fixed if len(calls) == 1 else net)(xt, t)
    net.zero_grad()
    consistency_loss(Both(), x0, None, COSINE, gap=100, error=F.mse_loss, generator=seeded(1)).backward()
    for a, b in zip(found, [p.grad for p in net.parameters() if p.grad is not None]): assert_close(a, b)

@pytest.mark.parametrize("gap", [0, 501, 2.5, True])
def test_a_gap_that_makes_no_sense_is_refused(gap):
    with pytest.raises((ValueError, TypeError), match="gap"): consistency_loss(random_unet(), torch.zeros(2, 3, 8, 8), None, COSINE, gap=gap)

@pytest.mark.parametrize("gap", [1, 100, 500])
def test_the_exact_jump_agrees_with_itself(gap):
    "A single image: all walks end there, so the exact network has no loss at any gap."
    image = torch.rand(1, 3, 4, 4, generator=seeded()) * 2 - 1
    assert consistency_loss(Told(lambda xt, t: image.expand_as(xt)), image.expand(20, -1, -1, -1), None, COSINE, gap=gap).item() < 1e-6


# --- match the crowd ---------------------------------------------------------------------------------------------------

def constant(value): return lambda xt, t: Prediction(torch.full_like(xt, value), xt)

def test_the_gradient_leads_from_fake_to_real():
    x = torch.zeros(2, 3, 4, 4, requires_grad=True)
    matching_loss(x, constant(0.5), constant(-0.25), COSINE, generator=seeded()).backward()
    # (x0_fake - x0_real) / mean |x - x0_real|, and the mean over all numbers
    assert_close(x.grad, torch.full_like(x, -0.75 / 0.5 / x.numel()))

def test_equal_answers_leave_everything_in_place():
    x = torch.randn(2, 3, 4, 4, generator=seeded(), requires_grad=True)
    loss = matching_loss(x, constant(0.5), constant(0.5), COSINE)
    loss.backward()
    assert loss.item() == 0 and x.grad.abs().max() == 0

def test_every_image_counts_alike():
    "An image for which the teacher is far away does not drown the others; one for which it is near does not explode."
    x = torch.tensor([0.0, 0.4999]).view(2, 1, 1, 1).expand(2, 3, 4, 4).clone().requires_grad_(True)
    matching_loss(x, constant(0.5), constant(0.4), COSINE).backward()
    a, b = x.grad.flatten(1).mean(1) * x.numel()
    assert_close(a.item(), -0.1 / 0.5)
    assert_close(b.item(), -0.1 / 0.02)

def test_the_networks_get_no_gradient_and_both_see_one_state():
    x, asked = torch.randn(4, 3, 4, 4, generator=seeded(), requires_grad=True), []
    w = torch.ones((), requires_grad=True)
    def seen(scale): return lambda xt, t: asked.append((xt, t)) or Prediction(w * scale * xt, xt)
    matching_loss(x, seen(0.5), seen(0.4), COSINE, generator=seeded()).backward()
    assert w.grad is None
    (a, t), (b, s) = asked
    assert torch.equal(a, b) and torch.equal(t, s) and len(t) == 4

def gaussian(mean, var):
    def predict(xt, t):
        ab = COSINE.alpha_bar[t].view(-1, 1)
        gain = ab.sqrt() * var / (ab * var + 1 - ab)
        return Prediction(mean + gain * (xt - ab.sqrt() * mean), xt)
    return predict

@pytest.mark.parametrize("right", [True, False])
def test_a_crowd_arrives(right):
    g = seeded()
    x = (0.5 * torch.randn(2000, 1, generator=g, dtype=torch.float64) - 1).requires_grad_(True)
    for _ in range(400):
        pair = gaussian(0.5, 1.0), gaussian(x.detach().mean(), x.detach().var())
        (gradient,) = torch.autograd.grad(matching_loss(x, *(pair if right else pair[::-1]), COSINE, generator=g), x)
        x = (x - 40 * gradient).detach().requires_grad_(True)
    arrived = abs(x.mean().item() - 0.5) < 0.05 and abs(x.std().item() - 1) < 0.1
    assert arrived == right

class Spy(nn.Module):
    predicts = "x0"
    def __init__(self): super().__init__(); self.times = []; self.w = nn.Parameter(torch.full((), 0.3))
    def forward(self, xt, t, context=None): self.times.append((int(t[0]), torch.is_grad_enabled())); return (self.w * xt).tanh()

@pytest.mark.parametrize("calls", [1, 2, 4])
def test_the_student_is_stopped_at_every_jump_that_it_will_make(calls):
    g, seen = seeded(), set()
    for _ in range(120):
        spy = Spy()
        x = _stopped(spy, one_hot([0, 1]), COSINE, calls, (3, 4, 4), g)
        assert x.requires_grad and x.shape == (2, 3, 4, 4)
        *way, last = spy.times
        assert last[1] and not any(graded for _, graded in way) # only the last jump is trained
        seen.add(tuple(time for time, _ in spy.times))
    assert seen == {tuple(COSINE.timesteps(n)[:k + 1]) for n in range(1, calls + 1) for k in range(n)}

def matched(steps=3, net=None, **kw):
    net = net or random_unet(predicts="v")
    fake = random_unet(predicts="v").requires_grad_(True)
    settings = dict(fake=fake, steps=steps, batch_size=4, turns=1, device="cpu") | kw
    return list(match(net.requires_grad_(True), small_teacher(), small_walks(), COSINE, **settings)), net, fake

def test_match_repeats_itself_and_changes_both_networks_and_not_the_teacher():
    before, teacher = random_unet(predicts="v"), random_unet(predicts="v")
    (first, net, fake), (again, *_) = matched(), matched()
    assert [step.step for step in first] == [1, 2, 3]
    assert [(a.loss, a.fake_loss) for a in first] == [(b.loss, b.fake_loss) for b in again]
    def moved(a): return max((p - q).abs().max().item() for p, q in zip(a.parameters(), before.parameters()))
    assert moved(net) > 1e-5 and moved(fake) > 1e-5 and moved(teacher) == 0
    assert [a.loss for a in matched(seed=1)[0]] != [a.loss for a in first]

def test_match_yields_an_average_that_is_ready_to_sample():
    *_, last = matched()[0]
    assert not last.ema.training and not any(p.requires_grad and p.grad is not None for p in last.ema.parameters())
    sample(clipped(predictor(last.ema, COSINE), COSINE), COSINE, 2, sampler=jumps, steps=2, shape=(3, 8, 8))

def test_without_a_hold_the_walks_have_no_say():
    "The same contexts, other ends: with hold = 0 nothing changes."
    def losses(hold, shift):
        walks = small_walks()
        walks.states[:, -1] += shift
        net, fake = (random_unet(predicts="v").requires_grad_(True) for _ in "ab")
        return [s.loss for s in match(net, small_teacher(), walks, COSINE, fake=fake, steps=1, batch_size=4, turns=1, hold=hold, device="cpu")]
    assert losses(0.0, 0.5) == losses(0.0, 0.0) and losses(0.2, 0.5) != losses(0.2, 0.0)

def test_a_matching_that_diverges_stops():
    net = random_unet(predicts="v")
    next(net.parameters()).data.fill_(float("nan"))
    with pytest.raises((TrainingDiverged, FloatingPointError)): matched(net=net)


# --- the shipped network -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def real(): return features(Sprites.draw(1000, seed=1, split="heldout").batch(range(1000))[0])

@pytest.mark.parametrize("calls, largest", [(1, 0.35), (2, 0.15), (4, 0.08)])
def test_the_shipped_network_jumps(real, calls, largest):
    "The targets; the two larger numbers of samples and the second judge are in benchmarks/results/few_steps.md."
    net, schedule = pretrained("sprites-fast")
    labels = torch.arange(500) % 5
    x = sample(clipped(predictor(net, schedule, one_hot(labels)), schedule), schedule, 500, sampler=jumps, steps=calls, seed=3)
    mean, error = kid(features(x), real)
    assert mean < largest, f"KID {mean:.3f} ± {error:.3f}"
    assert class_accuracy(x, labels) > 0.96

def test_its_file_says_how_to_draw_and_where_it_comes_from():
    _, about = load_model(pretrained_file("sprites-fast"))
    assert about["sampler"] == "jumps" and about["calls"] == 4 and "tools/pretrain.py" in about["command"]
    import hashlib
    assert about["teacher_sha256"] == hashlib.sha256(pretrained_file("sprites").read_bytes()).hexdigest()

def test_the_table_bears_out_the_targets():
    "2,000 sprites, both judges: benchmarks/few_steps.py."
    found = json.loads((ROOT / "benchmarks" / "results" / "few_steps.json").read_text())
    for judge in ("shipped judge", "second judge"):
        kids = {int(n): row["kid"][0] for n, row in found[judge]["jumps"].items()}
        assert kids[1] > kids[2] > kids[4]
    kids = {int(n): row["kid"][0] for n, row in found["shipped judge"]["jumps"].items()}
    assert kids[1] <= 0.35 and kids[2] <= 0.15 and kids[4] <= 0.08
    assert found["speed"]["ratio"] >= 200


# --- the exercises and the challenge -----------------------------------------------------------------------------------

def ends(x, a, b, p, ab):
    def below(m): return (1 + torch.erf((x - ab**0.5 * m) / (2 * (1 - ab)) ** 0.5)) / 2
    return torch.where(p * below(a) + (1 - p) * below(b) < p, a, b)

def walk(predict, x, ts, ab, noise):
    for t, s in pairwise(ts):
        x = predict(x, t)[0]
        if s: x = ab[s].sqrt() * x + (1 - ab[s]).sqrt() * noise(x)
    return x

def agree(f, x0, eps, other, t, s, ab):
    def at(u): return ab[u].sqrt() * x0 + (1 - ab[u]).sqrt() * eps
    return F.mse_loss(f(at(t), t), x0 if s == 0 else f(at(s), s).detach())

def crowd(x, real, fake): return ((fake - real).detach() * x).sum() / x.shape[0]

def missed(f, states, ts, k): return F.l1_loss(f(states[torch.arange(len(k)), k], ts[k]), states[:, -1])

RIGHT = {"end_of_walk": ends, "walk_error": missed, "jumping": walk, "agreement": agree, "matching": crowd}

@pytest.mark.parametrize("name", RIGHT)
def test_right_answers(name):
    found = getattr(check_few, name)(RIGHT[name])
    assert found, found

def test_the_end_of_the_walk_is_where_the_ode_goes():
    "Against DDIM in 500 steps with the ideal prediction for two points."
    from diffusion_course.sampling import ideal_predictor
    a, b, p = -0.8, 0.6, 0.25
    x = torch.linspace(-2, 2, 41, dtype=torch.float64)
    points = torch.tensor([a, b, b, b], dtype=torch.float64)[:, None]
    *_, last = ddim(ideal_predictor(points, COSINE), x[:, None], COSINE)
    assert_close(last.xs[:, 0], ends(x, a, b, p, COSINE.alpha_bar[500].item()).double(), rtol=0, atol=0.02)

@pytest.mark.parametrize("name, wrong, word", [
    ("end_of_walk", lambda x, a, b, p, ab: torch.where(x < ab**0.5 * (a + b) / 2, a, b), "nearer"),
    ("end_of_walk", lambda x, a, b, p, ab: ends(x, a, b, 0.5, ab), "not yet"),
    ("end_of_walk", lambda x, a, b, p, ab: ends(x, b, a, 1 - p, ab), "not yet"),
    ("walk_error", lambda f, states, ts, k: F.mse_loss(f(states[torch.arange(len(k)), k], ts[k]), states[:, -1]), "squared"),
    ("walk_error", lambda f, states, ts, k: F.l1_loss(f(states[torch.arange(len(k)), k], ts[k]), states[torch.arange(len(k)), k + 1]), "next state"),
    ("jumping", lambda predict, x, ts, ab, noise: walk(predict, x, ts, ab, lambda x: 0 * x), "not yet"),
    ("jumping", lambda predict, x, ts, ab, noise: predict(x, ts[0])[0], "not yet"),
    ("agreement", lambda f, x0, eps, other, *r: agree(f, x0, other, eps, *r), "not yet"),
    ("agreement", lambda f, x0, eps, other, t, s, ab: agree(f, x0, eps, other, t, s, ab).detach(), "no gradient"),
    ("matching", lambda x, r, f: -crowd(x, r, f), "sign"),
    ("matching", lambda x, r, f: ((f - r) * x).sum() / len(x), "into the two answers"),
    ("matching", lambda x, r, f: 0.5 * (x - r.detach()).square().sum() / len(x), "regression"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_answers_are_told_why(name, wrong, word):
    found = getattr(check_few, name)(wrong)
    assert not found and word in found.message

@pytest.mark.parametrize("name", RIGHT)
def test_stubs_and_nonsense(name):
    check = getattr(check_few, name)
    assert "nothing came back" in check(lambda *args: None).message
    assert not check(lambda *args: 3.0) and not check("text") and not check(lambda: 1)

def test_every_known_mistake_is_told_apart():
    "Each planted wrong answer of the checkers gets its own message, and none is equal to the right one."
    import inspect
    import re
    for name in RIGHT:
        messages = re.findall(r'^ +"([^"]{20,})', inspect.getsource(inspect.unwrap(getattr(check_few, name))), re.M)
        assert len(messages) > 5 and len(messages) == len(set(messages))

@pytest.fixture
def quick(monkeypatch): monkeypatch.setattr(check_few, "N", 65)

def test_the_challenge_scores_a_file_like_a_network(tmp_path, quick):
    net, schedule = pretrained("sprites-fast")
    record = check_few.challenge(net)
    assert list(record) == [1, 2, 4] and set(record[1]) == {"kid", "kid_se", "class_accuracy", "coverage"}
    assert str(record).count("KID") == 3
    path = save_model(tmp_path / "mine.safetensors", net, schedule=schedule)
    assert check_few.challenge(path) == record == check_few.challenge(str(path))

def test_the_challenge_refuses_what_is_no_entry(tmp_path, quick):
    from diffusion_course.unet import ContextUnet
    with pytest.raises(ValueError, match="n_feat"): check_few.challenge(ContextUnet(n_feat=8))
    with pytest.raises(ValueError, match="Linear"): check_few.challenge(nn.Linear(2, 2))
    with pytest.raises(FileNotFoundError): check_few.challenge(tmp_path / "gone.safetensors")
    torch.save({"a": torch.zeros(2)}, tmp_path / "pickle.safetensors")
    with pytest.raises(CheckpointError, match="pickle"): check_few.challenge(tmp_path / "pickle.safetensors")
    with pytest.raises(ValueError, match="schedule"): check_few.challenge(save_model(tmp_path / "bare.safetensors", pretrained()[0]))
