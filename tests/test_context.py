"Context vectors, dropout and guidance: each check passes for ours and fails for the known wrong versions; every documented error; the shipped model under guidance."
import json
import math

import numpy as np
import pytest
import torch
from oracles import Recorder, check_pair, random_images, random_unet, seeded
from torch.testing import assert_close

from conftest import ROOT
from diffusion_course.checkpoints import pretrained
from diffusion_course.context import drop_context, guided, mix, one_hot, with_dropped_context
from diffusion_course.metrics import class_accuracy
from diffusion_course.sampling import Prediction, Schedule, clipped, initial_noise, predictor, sample
from diffusion_course.sprites import CLASSES
from diffusion_course.training import prediction_loss

S = Schedule.cosine(50)


def fails(check, wrong):
    with pytest.raises(AssertionError): check(wrong)


# --- context vectors -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("asked, indices", [
    ("food", [2]), (2, [2]), (np.int64(2), [2]), (["hero", "spell"], [0, 3]), ([0, "spell", 4.0], [0, 3, 4]), (("hero",), [0]),
    (torch.tensor([4, 1, 1]), [4, 1, 1]), (torch.tensor(3), [3]), (np.array([1, 0]), [1, 0]), (torch.tensor([1.0, 2.0]), [1, 2]), ([], [])], ids=str)
def test_one_hot(asked, indices):
    rows = one_hot(asked)
    assert rows.dtype == torch.float32 and rows.shape == (len(indices), 5)
    assert torch.equal(rows, torch.eye(5)[torch.tensor(indices, dtype=torch.long)])

def test_one_hot_of_other_classes():
    assert one_hot(["b", 0], classes=("a", "b", "c")).tolist() == [[0, 1, 0], [1, 0, 0]]

@pytest.mark.parametrize("bad", ["dragon", "Hero", "", 5, -1, 2.5, float("nan"), True, None, ["hero", 7], torch.tensor([0, 5]), np.array([-1])], ids=str)
def test_one_hot_of_no_class(bad):
    with pytest.raises(ValueError, match="expected a whole number 0 … 4 or one of hero, non-hero, food, spell, side-facing"): one_hot(bad)

def test_one_hot_of_context_vectors():
    with pytest.raises(ValueError, match=r"shape \(5, 5\).*context vectors already"): one_hot(torch.eye(5))

def test_mix():
    context = mix({"hero": 1.0, "food": 0.6, 4: -2})
    assert context.dtype == torch.float32
    assert_close(context, torch.tensor([[1, 0, 0.6, 0, -2]]))
    assert torch.equal(mix({name: 1 for name in CLASSES}), torch.ones(1, 5)) and torch.equal(mix({}), torch.zeros(1, 5))
    assert_close(mix({"hero": 0.25, 0: 0.5}), 0.75 * one_hot("hero"))        # the same class twice
    assert torch.equal(mix({"b": 2}, classes="ab"), torch.tensor([[0.0, 2.0]]))
    for name in CLASSES: assert torch.equal(mix({name: 1}), one_hot(name))

@pytest.mark.parametrize("weights, match", [({"dragon": 1}, "class 'dragon'"), ({5: 1}, "class 5"), ({"hero": float("nan")}, "weight nan of 'hero'"),
                                            ({"hero": math.inf}, "weight inf"), ({"hero": "much"}, "weight 'much'"), ({"hero": None}, "weight None"), ({"hero": 10**400}, "weight 1000"), ({"hero": 1e300}, "weight 1e")], ids=str)
def test_mix_of_nonsense(weights, match):
    with pytest.raises(ValueError, match=match): mix(weights)


# --- dropping it -----------------------------------------------------------------------------------------------------

def check_drop(drop, n=4000):
    "A row is dropped whole or kept as it is, about p of them, each by its own coin, and the input is left alone."
    context = torch.rand(n, 5, generator=seeded()) + 0.1
    before = context.clone()
    for p in (0.1, 0.5):
        out = drop(context, p, seeded(1))
        assert torch.equal(context, before), "the input is left alone"
        assert out.shape == context.shape and out.dtype == context.dtype, "shape and dtype are kept"
        gone = (out == 0).all(1)
        assert torch.equal(out[~gone], context[~gone]), "what is kept is kept as it is"
        error = 4 * math.sqrt(p * (1 - p) / n)
        assert abs(gone.double().mean() - p) < error, f"{gone.double().mean():.3f} of the rows are dropped, expected {p}"
        halves = gone.view(2, -1).double()
        assert (halves.mean(1) - p).abs().max() < 2 * error, "both halves of the batch lose rows"
        assert abs((gone[1:] & gone[:-1]).double().mean() - p * p) < error, "neighbours are independent"
    for p in (0, 1): assert torch.equal(drop(context, p, seeded()), context * (1 - p)), f"p={p}"

def test_context_is_dropped_row_by_row(): check_drop(drop_context)

@pytest.mark.parametrize("wrong", [
    lambda c, p, g: c * (torch.rand((), generator=g) >= p),                       # one coin for the batch
    lambda c, p, g: c * (torch.rand(c.shape, generator=g) >= p),                  # a coin for each number
    lambda c, p, g: c * (torch.rand(1, c.shape[1], generator=g) >= p),            # a coin for each class
    lambda c, p, g: c * (torch.rand(len(c), 1, generator=g) < p),                 # the others
    lambda c, p, g: c * (torch.rand(len(c), 1, generator=g) >= p) / max(1 - p, 1e-9),     # as nn.Dropout does
    lambda c, p, g: torch.where(torch.rand(len(c), 1, generator=g) >= p, c, -1.0),
    lambda c, p, g: c[torch.rand(len(c), generator=g) >= p],
    lambda c, p, g: c.mul_(torch.rand(len(c), 1, generator=g) >= p),              # overwrites
    lambda c, p, g: c * (torch.arange(len(c))[:, None] >= p * len(c)),            # the first rows
    lambda c, p, g: c,
], ids=["batch", "number", "class", "others", "scaled", "minus one", "removed", "in place", "first rows", "none"])
def test_wrong_ways_to_drop(wrong): fails(check_drop, wrong)

def test_drop_is_a_function_of_the_generator():
    context = torch.ones(200, 5)
    first, again, other = (drop_context(context, 0.5, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    drop_context(context, 0.5, seeded())
    assert torch.equal(torch.get_rng_state(), state)

@pytest.mark.parametrize("p", [-0.1, 1.1, 10, float("nan"), None, "0.1"])
def test_drop_with_no_probability(p):
    with pytest.raises(ValueError, match="expected a probability"): drop_context(torch.eye(5), p)

@pytest.mark.parametrize("shape", [(5,), (2, 5, 1), ()], ids=str)
def test_drop_of_no_table(shape):
    with pytest.raises(ValueError, match=r"expected \(n, n_context\)"): drop_context(torch.ones(shape), 0.1)

def test_loss_with_dropped_context():
    "Every image stays, some lose their context; with p=0 and p=1 it is the loss with all contexts and with none."
    x0, context = random_images(64, (3, 8, 8)), one_hot(torch.arange(64) % 5)
    net = Recorder()
    with_dropped_context(prediction_loss, 0.5)(net, x0, context, S, generator=seeded())
    (xt, t, seen), = net.calls
    assert len(xt) == 64 and 10 < (seen.sum(1) == 0).sum() < 54
    assert torch.equal(seen[seen.sum(1) > 0], context[seen.sum(1) > 0])
    for p, plain in ((0, context), (1, torch.zeros(64, 5))):
        with_dropped_context(prediction_loss, p)(net, x0, context, S, generator=seeded())
        assert torch.equal(net.calls[-1][2], plain)
    assert len({len(call[1].unique()) > 5 for call in net.calls}) == 1        # the times are drawn as ever


# --- guidance --------------------------------------------------------------------------------------------------------

def pair_of_predictions():
    "With a context and without, far enough apart that a wrong combination shows."
    net, xt = random_unet(), initial_noise(4, (3, 8, 8))
    cond, uncond = predictor(net, S, 300 * torch.eye(5)[:4]), predictor(net, S)
    with torch.no_grad(): difference = (cond(xt, 30).eps - uncond(xt, 30).eps).abs().max()
    if difference < 0.1: raise RuntimeError(f"the two predictions are too much alike to test with: {difference:.3f}")
    return cond, uncond, xt

def check_guided(guide):
    "0 is unconditional, 1 conditional, the rest lies on the straight line through both, and the pair stays a pair."
    cond, uncond, xt = pair_of_predictions()
    with torch.no_grad():
        c, u = cond(xt, 30), uncond(xt, 30)
        for scale in (0, 1, 0.5, 2, 7.5, -1):
            pred = guide(cond, uncond, scale)(xt, 30)
            assert isinstance(pred, Prediction)
            for name in Prediction._fields:
                with_, without = getattr(c, name), getattr(u, name)
                assert_close(getattr(pred, name), with_ * scale + without * (1 - scale), rtol=1e-4, atol=1e-4, msg=f"{name} at scale {scale}")
            check_pair(pred, xt, 30, S)

def test_guidance(): check_guided(guided)

def combine(f):
    def guide(cond, uncond, scale):
        return lambda xt, t: Prediction(*(f(c, u, scale) for c, u in zip(cond(xt, t), uncond(xt, t))))
    return guide

def x0_alone(cond, uncond, scale):
    def predict(xt, t):
        c, u = cond(xt, t), uncond(xt, t)
        return Prediction(u.x0 + scale * (c.x0 - u.x0), c.eps)
    return predict

@pytest.mark.parametrize("wrong", [
    combine(lambda c, u, s: (1 + s) * c - s * u),                                 # Ho and Salimans' w
    combine(lambda c, u, s: c + s * (u - c)),                                     # away from what was asked for
    combine(lambda c, u, s: s * (c - u)),
    combine(lambda c, u, s: u + min(max(s, 0), 1) * (c - u)),
    combine(lambda c, u, s: (u + s * (c - u)).clamp(-1, 1)),
    combine(lambda c, u, s: c),
    x0_alone,
], ids=["w", "reversed", "difference", "no further", "clamped", "ignored", "x0 alone"])
def test_wrong_guidance(wrong): fails(check_guided, wrong)

def test_guidance_by_1_and_0_is_the_prediction_itself():
    "Not only nearly, and the other network call is saved."
    cond, uncond, xt = pair_of_predictions()
    for scale, one in ((1, cond), (1.0, cond), (0, uncond), (0.0, uncond)): assert guided(cond, uncond, scale) is one
    samples = {name: sample(clipped(p, S), S, 3, steps=5, shape=(3, 8, 8)) for name, p in
               {"1": guided(predictor(random_unet(), S, torch.eye(5)[:3]), uncond, 1), "cond": predictor(random_unet(), S, torch.eye(5)[:3]),
                "0": guided(cond, uncond, 0), "zeros": predictor(random_unet(), S, torch.zeros(1, 5))}.items()}
    assert torch.equal(samples["1"], samples["cond"])
    assert_close(samples["0"], samples["zeros"])                # a context of zeros is no context

def test_guidance_of_guidance():
    cond, uncond, xt = pair_of_predictions()
    with torch.no_grad(): assert_close(guided(guided(cond, uncond, 2), uncond, 3)(xt, 30), guided(cond, uncond, 6)(xt, 30), rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize("scale", ["2", None, float("nan"), math.inf, [2], 10**400], ids=str)
def test_scale_that_is_no_number(scale):
    with pytest.raises(ValueError, match="expected a finite number"): guided(None, None, scale)

def test_clip_after_guiding():
    "Two clipped predictions, guided, leave the range of images again."
    cond, uncond, xt = pair_of_predictions()
    with torch.no_grad():
        last = clipped(guided(cond, uncond, 20), S)(xt, 30)
        first = guided(clipped(cond, S), clipped(uncond, S), 20)(xt, 30)
    assert last.x0.abs().max() <= 1 < first.x0.abs().max()
    check_pair(last, xt, 30, S)


# --- the shipped model -----------------------------------------------------------------------------------------------

def test_shipped_model_obeys_at_the_recommended_scale():
    net, schedule = pretrained("sprites")
    labels = torch.arange(60) % len(CLASSES)
    predict = guided(predictor(net, schedule, one_hot(labels)), predictor(net, schedule), 2)
    assert class_accuracy(sample(clipped(predict, schedule), schedule, 60, steps=25), labels) >= 0.95

def test_measurement_at_full_size_keeps_what_was_promised():
    "1,000 sprites, 200 of each class: the file that lesson 3 prints (tools/measure_pretrained.py)."
    found = json.loads((ROOT / "benchmarks" / "results" / "pretrained.json").read_text())
    assert found["class_accuracy_of"] == 1000 and found["class_accuracy"] >= 0.97 and found["scale"] == 2
    assert found["n"] >= 5000 and abs(found["kid_floor"][0]) < 3 * found["kid_floor"][1] and found["kid"][0] < 0.06
    assert found["nearest"]["copies"] <= found["nearest_unseen"]["copies"] + 0.01
