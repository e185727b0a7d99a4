"The metrics beside torchmetrics, beside wrong versions of themselves, and against wrong input; the shipped feature network."
import hashlib
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.testing import assert_close

import diffusion_course.metrics as metrics
from diffusion_course.metrics import (FeatureNet, class_accuracy, class_probabilities, coverage, feature_header, features,
                                      frechet_distance, kid, nearest, report)
from diffusion_course.sprites import Sprites


def real(n, seed, split="heldout"):
    sprites = Sprites.draw(n, seed=seed, split=split)
    return sprites.batch(range(n))[0], torch.from_numpy(sprites.labels)


@pytest.fixture(scope="module")
def sprites(): return real(1000, 1)


@pytest.fixture(scope="module")
def others(): return real(1000, 2)


@pytest.fixture(scope="module")
def noisy(others): return others[0] + 0.2 * torch.randn(others[0].shape, generator=torch.Generator().manual_seed(0))


# --- torchmetrics as the oracle ---

class Features64(nn.Module):
    "torchmetrics takes any module; float64 so that only the formulas are compared"
    num_features = 64
    def forward(self, x): return features(x).double()


def theirs(metric, a, b):
    metric.update(a, real=False)
    metric.update(b, real=True)
    return metric.compute()


@pytest.mark.parametrize("fake", ["others", "noisy"])
def test_kid_agrees_with_torchmetrics(fake, sprites, request):
    from torchmetrics.image.kid import KernelInceptionDistance
    a = request.getfixturevalue(fake)
    a, b = a[0] if isinstance(a, tuple) else a, sprites[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)        # theirs warns that it keeps all features
        oracle = KernelInceptionDistance(feature=Features64(), subsets=1, subset_size=len(b))
    mean, _ = theirs(oracle, a, b)
    assert_close(kid(a, b).mean, mean.item(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("fake", ["others", "noisy"])
def test_frechet_agrees_with_torchmetrics(fake, sprites, request):
    from torchmetrics.image.fid import FrechetInceptionDistance
    a = request.getfixturevalue(fake)
    a, b = a[0] if isinstance(a, tuple) else a, sprites[0]
    oracle = FrechetInceptionDistance(feature=Features64()).set_dtype(torch.float64)
    assert_close(frechet_distance(a, b), theirs(oracle, a, b).item(), atol=1e-4, rtol=1e-4)


def test_class_accuracy_agrees_with_torchmetrics(sprites):
    from torchmetrics.classification import MulticlassAccuracy
    images, labels = sprites[0], torch.where(torch.arange(1000) % 3 == 0, sprites[1].roll(1), sprites[1])       # a third are wrong, some by chance right
    oracle = MulticlassAccuracy(num_classes=5, average="micro")(class_probabilities(images), labels)
    assert_close(class_accuracy(images, labels), oracle.item(), atol=1e-4, rtol=0)
    assert 0.6 < oracle < 0.9


def test_nearest_agrees_with_torchmetrics(sprites, noisy):
    from torchmetrics.functional import pairwise_euclidean_distance
    a, b = noisy[:200].clamp(-1, 1), sprites[0]
    oracle = (pairwise_euclidean_distance(a.flatten(1).double(), b.flatten(1).double()) / 768 ** 0.5).min(1)
    index, distance = nearest(noisy[:200], b)
    assert index.tolist() == oracle.indices.tolist()
    assert_close(distance.double(), oracle.values, atol=1e-4, rtol=1e-4)


# --- the formulas, against plain NumPy and against wrong versions ---

def gram(x, y, d): return (x @ y.T / d + 1) ** 3


def plain_kid(x, y, d=None, diagonal=False):
    "Equation 4, with the two classic mistakes as options"
    d, m, n = d or x.shape[1], len(x), len(y)
    kxx, kyy, kxy = gram(x, x, d), gram(y, y, d), gram(x, y, d)
    if diagonal: return kxx.mean() + kyy.mean() - 2 * kxy.mean()
    return (kxx.sum() - kxx.trace()) / (m * (m - 1)) + (kyy.sum() - kyy.trace()) / (n * (n - 1)) - 2 * kxy.mean()


@pytest.fixture(scope="module")
def matrices():
    rng = np.random.default_rng(0)
    return rng.normal(size=(700, 8)), rng.normal(size=(450, 8)) * 1.3 + 0.2      # more rows than a chunk, and unequal


def test_kid_is_equation_4_and_no_wrong_version(matrices):
    x, y = matrices
    ours = kid(torch.from_numpy(x), torch.from_numpy(y)).mean
    assert ours == pytest.approx(plain_kid(x, y), rel=1e-9)
    assert ours != pytest.approx(plain_kid(x, y, diagonal=True), rel=1e-3)
    assert ours != pytest.approx(plain_kid(x, y, d=1), rel=1e-3)


def test_kid_is_unbiased():
    "Over many small draws its mean is zero; with the diagonal it is far from zero."
    g = torch.Generator().manual_seed(0)
    draws = [(torch.randn(20, 4, generator=g), torch.randn(30, 4, generator=g)) for _ in range(400)]
    ours = np.array([kid(a, b).mean for a, b in draws])
    wrong = np.array([plain_kid(a.numpy(), b.numpy(), diagonal=True) for a, b in draws])
    z = lambda v: v.mean() / (v.std() / len(v) ** 0.5)
    assert abs(z(ours)) < 4 and z(wrong) > 20


@pytest.mark.parametrize("shift", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("m, n", [(100, 100), (60, 200)])
def test_the_standard_error_is_the_spread_over_new_draws(shift, m, n):
    g = torch.Generator().manual_seed(1)
    estimates = np.array([kid(torch.randn(m, 8, generator=g) + shift, torch.randn(n, 8, generator=g)) for _ in range(300)])
    kids, errors = estimates.T
    assert errors.mean() == pytest.approx(kids.std(), rel=0.2)
    assert (abs(kids - kids.mean()) > 3 * errors).mean() <= 0.03


@pytest.mark.parametrize("m, n", [(80, 80), (60, 240), (240, 60)])
def test_error_of_a_difference(m, n):
    "Two samplers from the same noise: the error is the spread of the difference over new draws, and far below that of strangers."
    g = torch.Generator().manual_seed(0)
    found, strangers = [], []
    for _ in range(300):
        noise, real = torch.randn(m, 8, generator=g).double(), torch.randn(n, 8, generator=g).double()
        a, b = noise + 0.8, 1.1 * noise + 0.7
        found.append(metrics.kid_difference(a, b, real))
        strangers.append((metrics.kid(a, real).standard_error ** 2 + metrics.kid(b, real).standard_error ** 2) ** 0.5)
    assert found[-1].mean == pytest.approx(metrics.kid(a, real).mean - metrics.kid(b, real).mean)
    spread, error = np.std([f.mean for f in found]), np.mean([f.standard_error for f in found])
    assert 0.85 < error / spread < 1.15 and error < 0.7 * np.mean(strangers)

def test_a_difference_needs_pairs():
    x = torch.randn(10, 8)
    assert metrics.kid_difference(x, x, torch.randn(9, 8)) == pytest.approx((0, 0), abs=1e-12)
    with pytest.raises(ValueError, match="a has 10 images and b has 7; expected pairs"): metrics.kid_difference(x, x[:7], x)
    with pytest.raises(ValueError, match="at least 2"): metrics.kid_difference(x[:1], x[:1], x)

def test_frechet_has_all_its_terms():
    "Scaling each axis moves only the covariance, shifting moves only the mean; both have a closed form."
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(500, 6)))
    _, axes = torch.linalg.eigh(x.T.cov())
    x = x @ axes                                            # the sample covariance is diagonal
    scale, shift = torch.linspace(0.5, 2, 6, dtype=torch.float64), torch.linspace(-1, 1, 6, dtype=torch.float64)
    x = x - x.mean(0)
    assert frechet_distance(x, x + shift) == pytest.approx(shift.square().sum().item(), rel=1e-9)
    assert frechet_distance(x, x * scale) == pytest.approx(((1 - scale) * x.std(0)).square().sum().item(), rel=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x[:, :1], x[:, :1] + 2) == pytest.approx(4, rel=1e-9) # one feature has a variance, not a matrix
    full = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    assert frechet_distance(x @ full, (x * scale + shift) @ full) == pytest.approx(frechet_distance(x, x * scale + shift), rel=1e-9)


def test_frechet_of_gaussians_without_common_axes():
    "Two dimensions, where the trace of a matrix root is sqrt(trace + 2 sqrt(det))."
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(200, 2)) @ [[1, 0.9], [0, 0.3]], rng.normal(size=(300, 2)) @ [[0.2, -0.7], [0.5, 1]] + [1, -2]
    product = np.cov(x.T) @ np.cov(y.T)
    cross = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T)) + np.trace(np.cov(y.T)) - 2 * cross
    assert frechet_distance(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(torch.from_numpy(y), torch.from_numpy(x)) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_a_set_without_variety():
    "One image repeated has no covariance; eigenvalues that rounding makes negative must not become NaN."
    x, point = torch.randn(100, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.ones(50, 5)
    expected = (x.mean(0) - 1).square().sum() + x.T.cov().trace()
    assert frechet_distance(x, point) == pytest.approx(expected.item(), rel=1e-9)


def test_coverage_counts():
    line = torch.arange(10.)[:, None]                       # real: 0, 1 ... 9; with k = 1 each radius is 1
    assert coverage(line, line, k=1) == 1
    assert coverage(torch.tensor([[4.0]]), line, k=1) == 0.3            # 3, 4 and 5: the edge counts
    assert coverage(torch.tensor([[4.5]]), line, k=1) == 0.2
    assert coverage(torch.tensor([[99.0]]), line, k=1) == 0
    assert coverage(torch.zeros(3, 1), torch.zeros(20, 1)) == 1         # repeated images: radius 0 and distance 0
    assert coverage(torch.full((3, 1), 1e-9), torch.zeros(20, 1)) == 0


def test_coverage_of_a_perfect_generator_is_known_beforehand():
    g, m, n, k = torch.Generator().manual_seed(0), 300, 400, 5
    expected = 1 - np.prod([(n - i) / (n + m - i) for i in range(1, k + 1)])
    measured = np.mean([coverage(torch.randn(m, 6, generator=g), torch.randn(n, 6, generator=g), k) for _ in range(30)])
    assert measured == pytest.approx(expected, abs=0.01)


# --- nearest ---

def test_nearest_is_the_brute_force_answer_whatever_the_batch(sprites, others):
    a, b = sprites[0][:60], others[0][:333]
    distances = (a[:, None] - b[None]).square().mean((2, 3, 4)).sqrt()
    for batch in (1, 7, 60, 1000):
        index, distance = nearest(a, b, batch=batch)
        assert_close(distance, distances.min(1).values)
        assert_close(distances.gather(1, index[:, None])[:, 0], distances.min(1).values)


def test_a_copy_has_distance_zero_and_almost_a_copy_has_not(sprites):
    x = sprites[0][:300]
    first = [(x == image).flatten(1).all(1).nonzero()[0].item() for image in x]
    index, distance = nearest(x, x, batch=64)
    assert index.tolist() == first and distance.eq(0).all()
    almost = x.clone()
    almost[:, 0, 8, 8] = torch.where(almost[:, 0, 8, 8] > 0, almost[:, 0, 8, 8] - 2 / 255, almost[:, 0, 8, 8] + 2 / 255)
    index, distance = nearest(almost, x)
    assert index.tolist() == first                          # one step of one colour of one pixel
    assert_close(distance, torch.full_like(distance, 2 / 255 / 768 ** 0.5), rtol=1e-3, atol=0)


# --- the shipped network ---

def test_the_header_names_the_images_that_the_network_was_trained_on():
    about = feature_header()
    assert about["images"] == "draw_sprites(20000, seed=0, split='train')"
    assert about["images_sha256"] == hashlib.sha256(Sprites.draw(20_000, seed=0).images.tobytes()).hexdigest()
    assert about["command"] == "python tools/train_features.py --images 20000 --epochs 12 --seed 0"
    assert metrics.FEATURE_FILE.stat().st_size < 300_000


def test_the_file_fits_the_network_exactly():
    saved = safetensors.torch.load(metrics.FEATURE_FILE.read_bytes())
    net = FeatureNet()
    assert {k: (v.shape, v.dtype) for k, v in saved.items()} == {k: (v.shape, v.dtype) for k, v in net.state_dict().items()}
    assert all(v.isfinite().all() for v in saved.values())


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_a_file_that_does_not_fit_is_refused(damage, tmp_path, monkeypatch):
    saved = safetensors.torch.load(metrics.FEATURE_FILE.read_bytes())
    if damage == "missing": del saved["std"]
    if damage == "extra": saved["more"] = torch.zeros(1)
    if damage == "shape": saved["head.bias"] = torch.zeros(6)
    path = tmp_path / "features.safetensors"
    path.write_bytes(safetensors.torch.save(saved))
    monkeypatch.setattr(metrics, "FEATURE_FILE", path)
    named = {"missing": "std", "extra": "more", "shape": "head.bias"}[damage]
    with pytest.raises(RuntimeError, match=named): metrics._feature_net.__wrapped__()


def test_without_the_file_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "FEATURE_FILE", tmp_path / "features.safetensors")
    with pytest.raises(FileNotFoundError, match="tools/train_features.py"): metrics._feature_net.__wrapped__()


def test_it_knows_the_classes_of_sprites_it_has_not_seen():
    images, labels = real(5000, 1)
    assert class_accuracy(images, labels) == feature_header()["heldout_accuracy"] >= 0.99
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert class_accuracy(images + 0.1 * noise, labels) >= 0.98
    assert class_accuracy(images, (labels + 1) % 5) <= 0.01


def test_features_of_real_sprites_are_standardised():
    f = features(real(20_000, 0, "train")[0])
    assert f.shape == (20_000, 64) and f.dtype == torch.float32
    assert_close(f.mean(0), torch.zeros(64), atol=0.01, rtol=0)
    assert_close(f.std(0), torch.ones(64), atol=0.01, rtol=0)


def test_probabilities_are_probabilities(sprites):
    p = class_probabilities(sprites[0][:50])
    assert p.shape == (50, 5) and (p >= 0).all()
    assert_close(p.sum(1), torch.ones(50))


def test_nothing_depends_on_or_touches_the_random_state(sprites, others):
    a, b = sprites[0][:200], others[0][:200]
    metrics._feature_net.cache_clear()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = features(a), kid(a, b), frechet_distance(a, b), coverage(a, b), class_probabilities(a)
    assert_close(torch.get_rng_state(), state)
    torch.manual_seed(6)
    second = features(a), kid(a, b), frechet_distance(a, b), coverage(a, b), class_probabilities(a)
    assert_close(first, second, rtol=0, atol=0)


def test_no_gradient_is_kept(sprites):
    x = sprites[0][:5].clone().requires_grad_()
    for result in (features(x), class_probabilities(x), nearest(x, x).distance): assert not result.requires_grad
    assert not metrics._feature_net().training


def test_an_image_has_the_same_features_in_every_batch(sprites):
    x = torch.cat([sprites[0], sprites[0][:500]])           # more than one internal batch
    f = features(x)
    assert_close(f[:500], f[1000:], atol=1e-4, rtol=1e-4)
    assert_close(features(x[:1])[0], f[0], atol=1e-4, rtol=1e-4)


def test_images_and_their_features_give_the_same_numbers(sprites, noisy):
    a, b = noisy, sprites[0]
    fa, fb = features(a), features(b)
    for metric in (kid, frechet_distance, coverage): assert metric(a, b) == metric(fa, fb)


# --- a whole report ---

def test_report(sprites, others):
    (a, labels), b = others, sprites[0]
    row = report(a, b, labels=labels, training=b)
    assert list(row) == ["n", "kid", "kid_se", "frechet", "coverage", "class_accuracy", "nearest"]
    assert (row["kid"], row["kid_se"]) == kid(a, b) and row["class_accuracy"] == class_accuracy(a, labels)
    assert all(type(v) in (int, float) for v in row.values())
    assert list(report(a, b)) == ["n", "kid", "kid_se", "frechet", "coverage"]


@pytest.mark.parametrize("spoil", ["blur", "noise", "tint", "one class", "mirror colours"])
def test_spoilt_sprites_are_told_from_real_ones(spoil, sprites, others):
    x, labels = others
    half = len(x) // 2
    spoilt = {"blur": 0.7 * x + 0.3 * torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
              "noise": x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)),
              "tint": x + torch.tensor([0.1, 0, -0.1])[:, None, None],
              "one class": x[labels == 2],
              "mirror colours": x.flip(1)}[spoil][:half]
    floor, score = kid(x[half:], sprites[0]), kid(spoilt, sprites[0])
    assert abs(floor.mean) < 3 * floor.standard_error
    assert score.mean > 5 * score.standard_error


# --- wrong input ---

GOOD = torch.linspace(-1, 1, 2 * 768).reshape(2, 3, 16, 16)


@pytest.mark.parametrize("bad, error, match", [
    (GOOD.to(torch.uint8), TypeError, "uint8"),
    (GOOD.numpy(), TypeError, "float32"),
    ([[1.0]], TypeError, "list"),
    (GOOD[0], ValueError, r"\(3, 16, 16\)"),
    (GOOD.permute(0, 2, 3, 1), ValueError, r"\(2, 16, 16, 3\)"),
    (GOOD[:, :1], ValueError, r"\(2, 1, 16, 16\)"),
    (GOOD[:0], ValueError, r"\(0, 3, 16, 16\)"),
    (GOOD / 0, ValueError, "2 of 2 images hold NaN or infinity"),
    ((GOOD + 1) * 127.5, ValueError, r"\[0, 255\]"),
])
@pytest.mark.parametrize("f", [features, class_probabilities, lambda x: class_accuracy(x, [0, 1]),
                               lambda x: nearest(x, GOOD), lambda x: nearest(GOOD, x)],
                         ids=["features", "class_probabilities", "class_accuracy", "nearest", "reference"])
def test_wrong_images(f, bad, error, match):
    with pytest.raises(error, match=match): f(bad)


def test_images_in_0_1_are_suspicious_and_values_beyond_1_are_clamped():
    with pytest.warns(UserWarning, match=r"\[0, 1\]"): features((GOOD + 1) / 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(features(GOOD * 4000), features(GOOD.sign()), rtol=0, atol=0)
        features(GOOD.double())


@pytest.mark.parametrize("labels, error, match", [
    (torch.eye(5)[:2], TypeError, "argmax"), ([True, False], TypeError, "bool"),
    ([0], ValueError, r"\(1,\)"), ([[0, 1]], ValueError, r"\(1, 2\)"), ([0, 5], ValueError, "0 ... 5"), ([-1, 0], ValueError, "-1 ... 0")])
def test_wrong_labels(labels, error, match):
    with pytest.raises(error, match=match): class_accuracy(GOOD, labels)


def test_wrong_sets():
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="1 and 100 images"): kid(x[:1], x)
    with pytest.raises(ValueError, match="8 features and b has 7"): kid(x, x[:, :7])
    with pytest.raises(ValueError, match="0 and 100 images"): coverage(x[:0], x)
    with pytest.raises(ValueError, match="8 and 100 images for 8 features"): frechet_distance(x[:8], x)
    with pytest.raises(ValueError, match="a: the features hold NaN"): frechet_distance(x / 0, x)
    for k in (0, 100):
        with pytest.raises(ValueError, match=f"k is {k} for 100"): coverage(x, x, k)
    assert frechet_distance(x[:9], x) > 0
