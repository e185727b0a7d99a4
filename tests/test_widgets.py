"The panels draw what `sample` draws, say what went wrong, and are a picture where no kernel runs."
from functools import partial

import ipywidgets
import pytest
import torch
from oracles import random_unet

from diffusion_course.context import guided, mix, one_hot
from diffusion_course.editing import from_sketch, inpaint
from diffusion_course.fast_sampling import ddim, dpmpp_2m
from diffusion_course.sampling import Schedule, clipped, initial_noise, predictor, sample
from diffusion_course.widgets import Panel, _asked, _png, context_mixer, denoising_slider, paint_and_fill, sampler_explorer, sketch_slider

NET, S = random_unet(n_feat=8), Schedule.cosine(60)


def html(panel): return panel._repr_mimebundle_()[0]["text/html"]

def expected(context, scale, n, **options):
    cond, uncond = predictor(NET, S, context), predictor(NET, S)
    return sample(clipped(guided(cond, uncond, scale), S), S, n, **options)


@pytest.mark.parametrize("make", [lambda: denoising_slider(ddim(predictor(NET, S), initial_noise(2), S, [60, 30, 0])), lambda: context_mixer(NET, S, n=2, steps=2), lambda: sampler_explorer(NET, S, n=2), lambda: paint_and_fill(NET, S, n=2, steps=2), lambda: sketch_slider(NET, S, torch.zeros(1, 3, 16, 16), n=2, steps=2)])
def test_a_panel_is_also_a_picture(make):
    panel = make()
    assert 'alt="' in html(panel) and "base64" in html(panel)
    assert all(control.description and (control.tooltip or isinstance(control, ipywidgets.SelectionSlider)) for control in panel.controls.values()), "every control is labelled"

def test_mixer_draws_what_was_asked():
    panel = context_mixer(NET, S, {"spell": 1.0}, n=2, steps=3)
    assert panel.picture.value == _png(expected(one_hot("spell"), 2.0, 2, sampler=dpmpp_2m, steps=3), 2)
    panel.controls["food"].value = 0.5
    panel.controls["seed"].value = 7
    assert panel.picture.value == _png(expected(mix({"spell": 1.0, "food": 0.5}), 2.0, 2, sampler=dpmpp_2m, steps=3, seed=7), 2)
    assert "1.0 spell" in panel.message.value and "0.5 food" in panel.message.value

def test_no_weight_at_all_is_no_context():
    panel = context_mixer(NET, S, {}, n=2, steps=3)
    assert panel.picture.value == _png(expected(torch.zeros(1, 5), 2.0, 2, sampler=dpmpp_2m, steps=3), 2) and "nothing" in panel.message.value

def test_explorer_sides():
    panel = sampler_explorer(NET, S, n=2, name="food")
    a, b = expected(one_hot("food"), 1.0, 2, sampler=ddim, steps=5), expected(one_hot("food"), 1.0, 2, sampler=dpmpp_2m, steps=10)
    assert panel.picture.value == _png(torch.cat([a, torch.ones_like(a[:1]), b]), 5)
    panel.controls["eta B"].value = 1.0
    b = expected(one_hot("food"), 1.0, 2, sampler=partial(dpmpp_2m, eta=1.0), steps=10)
    assert panel.picture.value == _png(torch.cat([a, torch.ones_like(a[:1]), b]), 5) and "eta 1.0" in panel.message.value
    panel.controls["sampler B"].value = "Heun"
    assert panel.controls["eta B"].disabled and not panel.controls["eta A"].disabled
    assert "A: DDIM, 5 steps, eta 0.0, guidance 1.0, 5 network calls" in panel.message.value
    assert "B: Heun, 10 steps, guidance 1.0, 19 network calls" in panel.message.value # a second look in each step but the last

def test_slider_shows_every_step():
    steps = list(ddim(predictor(NET, S), initial_noise(3), S, [60, 20, 0]))
    panel = denoising_slider(steps, n=2)
    for i, step in enumerate(steps):
        panel.controls["time"].value = i
        assert panel.picture.value == _png(torch.cat([step.xt[:2], step.pred.x0[:2]]), 2) and f"t = {step.t}" in panel.message.value
    panel.controls["time"].value = 2
    assert panel.picture.value == _png(torch.cat([steps[-1].xs[:2]] * 2), 2)

def painted(x, marked, results): return _png(torch.cat([torch.where(marked, torch.zeros(1), x), results]), len(results) + 1, 6)

def test_painting_marks_and_fills():
    x, marked = torch.zeros(1, 3, 16, 16), torch.zeros(16, 16, dtype=torch.bool)
    marked[3, 5] = True
    panel = paint_and_fill(NET, S, x, marked, n=2, steps=3)
    predict = clipped(guided(predictor(NET, S, one_hot("food")), predictor(NET, S), 2.0), S)
    def filled(x, marked, seed=0): return painted(x, marked, sample(predict, S, 2, sampler=partial(inpaint, known=x, mask=~marked, resample=5), steps=3, seed=seed))
    assert panel.picture.value == filled(x, marked) and "1 pixels" in panel.message.value
    assert len(panel.grid.children) == 256 and panel.grid.children[53].description == "×" and panel.grid.children[53].tooltip == "row 4, column 6"
    panel.controls["brush"].value, panel.controls["colour"].value = "paint", "#ff0000"
    panel.grid.children[20].click() # row 2, column 5
    assert panel.grid.children[20].style.button_color == "#ff0000" and panel.picture.value == filled(x, marked)
    panel.button.click()
    red = x.clone()
    red[0, :, 1, 4] = torch.tensor([1.0, -1, -1])
    assert panel.picture.value == filled(red, marked) and x.abs().max() == 0 # a copy is painted on
    panel.controls["seed"].value = 5
    assert panel.picture.value == filled(red, marked, 5)

def test_a_picture_without_marks_is_a_sketch_and_one_of_marks_is_new():
    x = torch.zeros(1, 3, 16, 16)
    panel = paint_and_fill(NET, S, x, torch.zeros(16, 16), name="hero", n=2, steps=3)
    predict = clipped(guided(predictor(NET, S, one_hot("hero")), predictor(NET, S), 2.0), S)
    none = torch.zeros(16, 16, dtype=torch.bool)
    def sketch(t, steps): return painted(x, none, from_sketch(predict, x.repeat(2, 1, 1, 1), S, t, sampler=partial(dpmpp_2m, eta=1.0), steps=steps))
    assert panel.picture.value == sketch(30, 3) and "a sketch" in panel.message.value
    panel.controls["start"].value = 2
    assert panel.picture.value == sketch(2, 2)
    for pixel in panel.grid.children: pixel.click() # the brush marks at first
    panel.button.click()
    assert panel.picture.value == painted(x, ~none, sample(predict, S, 2, sampler=dpmpp_2m, steps=3)) and "all is drawn anew" in panel.message.value

def test_an_error_is_shown_and_the_picture_stays():
    def draw(n):
        if n: raise ValueError("n & more")
        return _png(torch.zeros(1, 3, 4, 4), 1), "fine"
    panel = Panel({"n": ipywidgets.IntSlider(0)}, draw, "a picture")
    before = panel.picture.value
    panel.controls["n"].value = 1
    assert "not drawn" in panel.message.value and "n &amp; more" in panel.message.value and panel.picture.value == before
    panel.controls["n"].value = 0
    assert panel.message.value == "fine"

@pytest.mark.parametrize("make", [lambda: denoising_slider([]), lambda: context_mixer(NET, S, {"dragon": 1.0}), lambda: sampler_explorer(NET, S, name="dragon"), lambda: paint_and_fill(NET, S, name="dragon"),
                                  lambda: paint_and_fill(NET, S, torch.zeros(2, 3, 16, 16)), lambda: paint_and_fill(NET, S, marked=torch.ones(4, 4))])
def test_bad_arguments(make):
    with pytest.raises(ValueError): make()


def test_the_slider_starts_from_the_sketch():
    sketch, context = torch.full((1, 3, 16, 16), 0.5), one_hot("hero")
    panel = sketch_slider(NET, S, sketch, context, start=40, n=2, steps=3)
    def made(t, seed=0):
        x = from_sketch(_asked(NET, S, context, 2.0, 2), sketch.repeat(2, 1, 1, 1), S, t, sampler=partial(dpmpp_2m, eta=1.0), steps=min(3, t), seed=seed)
        return _png(torch.cat([sketch, x]), 3)
    assert panel.picture.value == made(40)
    panel.controls["time"].value = 2
    assert panel.picture.value == made(2) and "t = 2" in panel.message.value
    panel.controls["seed"].value = 5
    assert panel.picture.value == made(2, 5)
    for wrong in (sketch[0], sketch.repeat(2, 1, 1, 1), 3 * sketch):
        with pytest.raises(ValueError): sketch_slider(NET, S, wrong, n=2, steps=2)
