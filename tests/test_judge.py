"The judge of any pictures: it learns them, its numbers rise with what is wrong, and what it refuses it names; the drawn stickers."
import json
import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from diffusion_course import judge as judges
from diffusion_course.checkpoints import CheckpointError, load_model, save_model
from diffusion_course.judge import fit_judge, halves, judge_beside, load_judge, save_judge, spoilt
from diffusion_course.metrics import (FeatureNet, class_accuracy, class_probabilities, copies, coverage, features, kid, nearest,
                                      report)
from diffusion_course.sampling import Schedule
from diffusion_course.sprites import Sprites
from diffusion_course.stickers import STICKERS, draw_stickers
from diffusion_course.unet import ContextUnet

STEPS = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return draw_stickers(tmp_path_factory.mktemp("stickers"), 400)


def read(folder, size=16, channels=3): return Sprites.from_folder(folder, size=size, channels=channels)


@pytest.fixture(scope="module")
def data(folder): return read(folder)


@pytest.fixture(scope="module")
def judge(data): return fit_judge(data, steps=STEPS)


@pytest.fixture(scope="module")
def real(data): return [data.batch(rows)[0] for rows in halves(data)]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    "A perfect generator: stickers of another seed"
    more = read(draw_stickers(tmp_path_factory.mktemp("fresh"), 300, seed=1))
    return more.batch(range(300))[0], torch.from_numpy(more.labels)


def noisy(x, strength): return x + strength * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
def blurred(x, strength): return x.lerp(torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False), strength)


# --- which pictures ---

def test_the_halves_share_no_picture_and_depend_on_the_pixels_only(data):
    fitted, unseen = halves(data)
    assert sorted([*fitted, *unseen]) == list(range(len(data))) and 0.4 < len(fitted) / len(data) < 0.6
    order = np.random.default_rng(0).permutation(len(data))
    turned = data.images[order][:, ::-1]                        # other neighbours, upside down: still the same side
    assert set(order[halves(Sprites(turned, data.labels[order], data.class_names)).unseen]) == set(unseen)


def test_copies_are_never_on_both_sides(data):
    twice = Sprites(np.concatenate([data.images, data.images[:, :, ::-1]]), None)
    fitted = set(halves(twice).fitted)
    assert all((i in fitted) == (i + len(data) in fitted) for i in range(len(data)))


def test_it_is_fitted_on_its_half_only_and_measured_on_the_other(data, fresh):
    "Wrong names in the unseen half: it learns the right ones, and is right about none of the wrong ones"
    labels, unseen = data.labels.copy(), halves(data).unseen
    labels[unseen] = (labels[unseen] + 1) % 5
    with pytest.warns(UserWarning, match="its numbers say little"):
        told = fit_judge(Sprites(data.images, labels, data.class_names), steps=STEPS)
    assert class_accuracy(*fresh, judge=told) > 0.9 and told.about["accuracy"] < 0.1


def test_a_seed_decides_everything_and_the_random_state_stays(data, judge):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = fit_judge(data, steps=STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = fit_judge(data, steps=10, seed=1)
    assert_close(torch.get_rng_state(), state)
    assert_close(dict(again.state_dict()), dict(judge.state_dict()), rtol=0, atol=0)
    assert not torch.equal(other.head.weight, judge.head.weight)
    assert again.about == judge.about


# --- what it sees ---

def test_it_names_what_it_has_not_seen(data, judge, fresh):
    images, labels = fresh
    unseen = halves(data).unseen
    x, truth = data.batch(unseen)[0], torch.from_numpy(data.labels[unseen])
    assert judge.about["accuracy"] == pytest.approx(class_accuracy(x, truth, judge=judge)) and judge.about["accuracy"] > 0.9
    assert class_accuracy(images, labels, judge=judge) > 0.9
    assert class_accuracy(images, (labels + 1) % 5, judge=judge) < 0.1
    assert judge.about["classes"] == list(data.class_names) and judge.about["fitted_on"] == len(data) - len(unseen)


def test_features_are_standardised_and_separate_the_classes(data, judge, fresh):
    x, labels = data.batch(range(len(data)))[0], torch.from_numpy(data.labels)
    f = features(x, judge=judge)
    assert_close(f.mean(0), torch.zeros(64), atol=0.01, rtol=0)
    assert_close(f.std(0), torch.ones(64), atol=0.01, rtol=0)
    centres = torch.stack([f[labels == k].mean(0) for k in range(5)])
    found = torch.cdist(features(fresh[0], judge=judge), centres).argmin(1)     # the nearest centre is that of its class
    assert (found == fresh[1]).float().mean() > 0.9


def test_real_against_real_is_nothing_and_worse_is_worse(judge, real, fresh):
    for half in real:                                           # also against the pictures that it was fitted on
        score = kid(fresh[0], half, judge=judge)
        assert abs(score.mean) < 3 * score.standard_error
    for spoil, strengths, errors in ((noisy, (0, 0.1, 0.2, 0.4), 5), (blurred, (0, 0.5, 1), 1)):    # 120 steps hardly see blur
        scores = [kid(spoil(fresh[0], s), real[1], judge=judge) for s in strengths]
        assert all(b.mean > a.mean for a, b in zip(scores, scores[1:]))
        assert scores[-1].mean > errors * scores[-1].standard_error
    one_class = fresh[0][fresh[1] == 0]
    assert coverage(one_class, real[1], judge=judge) < 0.5 < coverage(fresh[0], real[1], judge=judge)


@pytest.mark.parametrize("size, channels", [(8, 1), (16, 1), (32, 3), (48, 3)])
def test_other_sizes_and_grey(size, channels, folder):
    part = read(folder, size, channels)
    small = fit_judge(part, steps=60)
    assert small.shape == (channels, size, size)
    known, unseen = (part.batch(rows)[0] for rows in halves(part))
    assert small.about["accuracy"] > small.about["chance"] + 0.3
    worse = kid(noisy(unseen, 0.8), known, judge=small)
    assert worse.mean > 3 * worse.standard_error
    with pytest.raises(ValueError, match=rf"\(n, {channels}, {size}, {size}\)"): features(torch.zeros(2, channels, size, size + 4) - 1, judge=small)


def test_without_labels_it_learns_how_far_a_picture_is_turned(data, real):
    turns = fit_judge(Sprites(data.images, None), steps=STEPS)
    assert turns.about["task"] == "turns" and turns.about["classes"] == [] and turns.about["accuracy"] > 0.6
    x = real[1]
    worse = kid(x.rot90(2, (2, 3)), real[0], judge=turns)
    assert worse.mean > 5 * worse.standard_error                # upside down is another distribution
    for ask in (class_probabilities, lambda x, judge: class_accuracy(x, [0] * len(x), judge=judge)):
        with pytest.raises(ValueError, match="without labels"): ask(x, judge=turns)
    assert "class_accuracy" not in report(x, real[0], judge=turns)


def test_one_class_is_as_good_as_none(data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                         # after ten steps it knows nothing yet
        assert fit_judge(Sprites(data.images, np.zeros(len(data), int), ("thing",)), steps=10).about["task"] == "turns"


def test_every_flaw_changes_the_picture_and_is_told(real):
    x, generator = real[0][:100], torch.Generator().manual_seed(0)
    images, strengths = spoilt(x, generator)
    assert images.shape == x.shape and strengths.shape == (100, 6) and images.abs().max() <= 1
    assert ((strengths == 0).float().mean(0) - 0.5).abs().max() < 0.2
    assert spoilt(x[:, :1], generator)[1].shape == (100, 4)


# --- the metrics with a judge ---

def test_report(judge, real, fresh):
    row = report(fresh[0], real[1], labels=fresh[1], training=real[0], judge=judge)
    assert list(row) == ["n", "kid", "kid_se", "frechet", "coverage", "class_accuracy", "nearest"]
    assert (row["kid"], row["kid_se"]) == kid(fresh[0], real[1], judge=judge)
    with pytest.warns(UserWarning, match="64 and .* images, and 64 features need more"):
        few = report(fresh[0][:64], real[1], judge=judge)
    assert list(few) == ["n", "kid", "kid_se", "coverage"]


def test_a_judge_and_only_a_judge():
    x = -torch.ones(2, 3, 16, 16)
    for wrong in (torch.nn.Linear(1, 1), "judge", 3):
        with pytest.raises(TypeError, match="fit_judge"): features(x, judge=wrong)
    with pytest.raises(ValueError, match="fit_judge"): features(-torch.ones(2, 3, 32, 32))


def test_the_shipped_judge_is_the_default():
    x = Sprites.draw(20, seed=3).batch(range(20))[0]
    net = FeatureNet()
    from diffusion_course import metrics
    import safetensors.torch
    net.load_state_dict(safetensors.torch.load(metrics.FEATURE_FILE.read_bytes()))      # the names are as they were
    assert_close(features(x, judge=net.eval()), features(x), rtol=0, atol=0)


# --- copies ---

def test_copies_are_caught_and_real_ones_are_not(real, fresh):
    training, heldout = real
    def share(x): return copies(x, training, heldout).share
    assert share(training) == 1 and share(noisy(training, 0.03)) == 1
    assert share(fresh[0]) < 0.06
    assert share(torch.cat([fresh[0][:90], training[:10]])) == pytest.approx(0.1 + 0.9 * share(fresh[0][:90]))
    found = copies(heldout, training, heldout)
    assert 0 < found.threshold and found.floor < 0.06 and found.share < 0.04


def test_copies_needs_pictures_to_compare_with(real):
    with pytest.raises(ValueError, match="19 images, expected 20"): copies(real[0], real[0], real[1][:19])
    with pytest.raises(ValueError, match="one size"): copies(real[0], real[0][..., :8], real[1])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 24), (3, 48, 48), (4, 5, 6)])
def test_nearest_takes_images_of_any_shape(shape):
    y = 2 * torch.rand(9, *shape, generator=torch.Generator().manual_seed(0)) - 1
    index, distance = nearest(y.flip(0), y)
    assert index.tolist() == list(range(8, -1, -1)) and distance.eq(0).all()


# --- refusals, and that the advice helps ---

def test_too_few_pictures_and_the_advice(data):
    few = Sprites(data.images[:99], data.labels[:99], data.class_names)
    with pytest.raises(ValueError, match='got 99 pictures.*100 or more.*split="all"'): fit_judge(few)
    with pytest.raises(ValueError, match="no pictures"): halves(Sprites(data.images[:0], None))
    rows = np.random.default_rng(0).permutation(len(data))[:100]            # hold out more
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fit_judge(Sprites(data.images[rows], data.labels[rows], data.class_names), steps=10).about["pictures"] == 100


def test_too_few_of_a_class_and_the_advice(data):
    labels = data.labels.copy()
    labels[:3] = 5
    with pytest.raises(ValueError, match="'rare' has [0-3] pictures"): fit_judge(Sprites(data.images, labels, (*data.class_names, "rare")))
    without = labels != 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit_judge(Sprites(data.images[without], labels[without], data.class_names), steps=10)


def test_pictures_that_cannot_be_judged(data):
    with pytest.raises(ValueError, match="16 x 8 pixels"): fit_judge(Sprites(data.images[:, :, :8], data.labels, data.class_names))
    with pytest.raises(ValueError, match="different pictures"): fit_judge(Sprites(data.images[:1].repeat(200, 0), None))
    for steps in (9, 2.5, "many"):
        with pytest.raises(ValueError, match="steps is"): fit_judge(data, steps=steps)


def test_a_judge_that_knows_nothing_says_so(data):
    shuffled = np.random.default_rng(0).permutation(data.labels)            # names that have nothing to do with the pictures
    with pytest.warns(UserWarning, match="its numbers say little"):
        lost = fit_judge(Sprites(data.images, shuffled, data.class_names), steps=30)
    assert lost.about["accuracy"] < 0.45


# --- files ---

def test_saved_and_loaded(tmp_path, judge, fresh):
    path = save_judge(judge_beside(tmp_path / "mine.safetensors"), judge, data="stickers")
    assert path.name == "mine.judge.safetensors" and [p.name for p in tmp_path.iterdir()] == [path.name]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = load_judge(path)
    assert_close(torch.get_rng_state(), state)
    assert_close(features(fresh[0], judge=again), features(fresh[0], judge=judge), rtol=0, atol=0)
    assert again.about == judge.about | {"data": "stickers"} and again.shape == judge.shape
    assert save_judge(tmp_path / "again.safetensors", again).read_bytes() == path.read_bytes()


def test_what_is_not_a_judge_is_named(tmp_path, judge):
    good = save_judge(tmp_path / "good.safetensors", judge).read_bytes()
    model = save_model(tmp_path / "model.safetensors", ContextUnet(n_feat=8), schedule=Schedule.cosine(10))
    cases = {"web page": b"<html>", "is empty": b"", "cut short": good[:-9], "checksum": good[:-1] + bytes([good[-1] ^ 1]),
             "model checkpoint.*load_model": model.read_bytes(), "upgrade": re.sub(rb"judge \d", b"judge 9", good)}
    for match, blob in cases.items():
        (tmp_path / "bad.safetensors").write_bytes(blob)
        with pytest.raises(CheckpointError, match=match): load_judge(tmp_path / "bad.safetensors")
    with pytest.raises(FileNotFoundError, match="There is no file"): load_judge(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError): load_model(tmp_path / "good.safetensors")


def test_settings_that_do_not_fit_and_weights_that_are_not_finite(tmp_path, judge):
    path = tmp_path / "bad.safetensors"
    tensors = dict(judge.state_dict())
    path.write_bytes(judges._pack("judge", tensors, config=json.dumps(judge.config | {"n_classes": 7}), about="{}"))
    with pytest.raises(CheckpointError, match="head"): load_judge(path)
    path.write_bytes(judges._pack("judge", tensors, config="{}[", about="{}"))
    with pytest.raises(CheckpointError, match="of no use"): load_judge(path)
    path.write_bytes(judges._pack("judge", tensors | {"mean": torch.full((64,), torch.nan)}, config=json.dumps(judge.config), about="{}"))
    with pytest.raises(CheckpointError, match="mean NaN"): load_judge(path)


def test_nothing_half_is_saved(tmp_path, judge, monkeypatch):
    path = save_judge(tmp_path / "mine.safetensors", judge)
    before = path.read_bytes()
    with pytest.raises(TypeError, match="JSON"): save_judge(path, judge, data=object())
    with pytest.raises(TypeError, match="fit_judge"): save_judge(path, torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=".safetensors"): save_judge(tmp_path / "mine.pt", judge)
    broken = FeatureNet()
    broken.mean[:] = torch.nan
    with pytest.raises(ValueError, match="Nothing saved: mean"): save_judge(path, broken)
    with pytest.raises(OSError, match="folder exists"): save_judge(tmp_path / "none" / "mine.safetensors", judge)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# --- the stickers ---

def test_stickers_are_the_same_whatever_else_is_drawn(tmp_path):
    few, many, other = (draw_stickers(tmp_path / name, n, seed=seed) for name, n, seed in (("a", 7, 0), ("b", 20, 0), ("c", 7, 1)))
    assert sorted(p.name for p in few.iterdir()) == sorted(STICKERS)
    for file in few.rglob("*.png"):
        assert file.read_bytes() == (many / file.relative_to(few)).read_bytes() != (other / file.relative_to(few)).read_bytes()
    assert len(list(many.rglob("*.png"))) == 20


@pytest.mark.parametrize("size", [8, 32, 64])
def test_stickers_have_the_size_that_was_asked_for(size, tmp_path):
    for file in draw_stickers(tmp_path, 5, size=size).rglob("*.png"):
        with Image.open(file) as image: assert image.size == (size, size) and image.mode == "RGB"


@pytest.mark.parametrize("wrong", [dict(n=0), dict(n=2.5), dict(n=5, size=7), dict(n=5, seed=-1)])
def test_stickers_refuse(wrong, tmp_path):
    with pytest.raises(ValueError, match="expected an integer"): draw_stickers(tmp_path / "x", **wrong)
    assert not (tmp_path / "x").exists()
