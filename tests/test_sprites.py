"The drawn sprites: fixed bytes, no leakage, enough variety. What becomes a data set: test_pictures.py."
import hashlib
import numpy as np
import pytest
from diffusion_course.sprites import (CLASSES, PALETTE, RECIPES, NONE, compose, draw_recipe, draw_sprites, flipped,
                                      folded, is_heldout, layer, recipe, sheet, stamp, _stream)

def _digest(images, labels): return hashlib.sha256(images.tobytes() + labels.astype('<i8').tobytes()).hexdigest()
def _as_set(images): return {image.tobytes() for image in images}

@pytest.fixture(scope='module')
def drawn(): return draw_sprites(20_000)

# ---------- the drawing

def test_bytes_never_change():
    "The shipped model was trained on these pixels. A change of the art needs a new model, and new numbers here."
    assert _digest(*draw_sprites(200)) == '968674053061140d20e2f2187bb4a372244ddcde4a91642b786beafa00ac1e25'
    assert _digest(*draw_sprites(50, split='heldout')) == \
        'da08c6bce92f00522dce17cf58810370715735410cd7529264a264aebd3e7ac7'

def test_shapes_and_types():
    for split in ('train', 'heldout'):
        images, labels = draw_sprites(3, split=split)
        assert images.shape == (3, 16, 16, 3) and images.dtype == np.uint8
        assert labels.shape == (3,) and labels.dtype == np.int64
    images, labels = draw_sprites(0)
    assert images.shape == (0, 16, 16, 3) and labels.shape == (0,)
    assert len(draw_sprites(np.int64(2), seed=np.int32(5))[0]) == 2

@pytest.mark.parametrize('split', ['train', 'heldout'])
@pytest.mark.parametrize('seed', [0, 12345, 2**63 - 1])
def test_a_short_draw_begins_a_long_one(split, seed):
    images, labels = draw_sprites(60, seed=seed, split=split)
    for n in (1, 7, 59):
        short, short_labels = draw_sprites(n, seed=seed, split=split)
        np.testing.assert_array_equal(short, images[:n])
        np.testing.assert_array_equal(short_labels, labels[:n])

def test_seeds_and_splits_differ():
    a, b = draw_sprites(500)[0], draw_sprites(500, seed=1)[0]
    assert len(_as_set(a) & _as_set(b)) < 50
    assert (draw_sprites(500)[1] != draw_sprites(500, seed=1)[1]).mean() > .6   # 4 of 5 labels change

def test_global_random_state_plays_no_part():
    np.random.seed(0); a = draw_sprites(20)[0]
    np.random.seed(1); state = np.random.get_state()[1].copy()
    np.testing.assert_array_equal(a, draw_sprites(20)[0])
    np.testing.assert_array_equal(state, np.random.get_state()[1])

def test_train_and_heldout_are_disjoint(drawn):
    held = draw_sprites(2000, seed=3, split='heldout')[0]
    train = drawn[0]
    assert not is_heldout(train).any() and is_heldout(held).all()
    assert not _as_set(train) & _as_set(held)
    for copy in (np.roll(held, 1, axis=1), np.roll(held, -1, axis=2), held[:, :, ::-1]):   # not even moved or mirrored
        assert not _as_set(train) & _as_set(copy)

def test_one_in_ten_is_held_out():
    "Every class has sprites on both sides: the split is by picture, not by family"
    for name in CLASSES:
        share = np.mean([is_heldout(draw_recipe(r, 200)).mean() for r in RECIPES[name]])
        assert .05 < share < .17, (name, share)

def test_classes_are_balanced(drawn):
    for labels in (drawn[1], draw_sprites(2000, split='heldout')[1]):
        n, counts = len(labels), np.bincount(labels, minlength=5)
        assert abs(counts - n/5).max() < 5*np.sqrt(n*.2*.8), counts

def test_neighbouring_labels_are_independent(drawn):
    "No pattern in pairs of labels"
    labels = drawn[1]
    pairs = np.bincount(labels[:-1]*5 + labels[1:], minlength=25)
    assert abs(pairs - len(labels)/25).max() < 5*np.sqrt(len(labels)/25)

def test_there_are_more_than_a_hundred_thousand_sprites(drawn):
    """n draws from N equally likely sprites contain about n²/2N pairs of twins, so N is about n²/2·pairs. Where some are
    more likely than others this estimate is too low."""
    images, labels = drawn
    estimate = {}
    for k, name in enumerate(CLASSES):
        _, counts = np.unique(np.frombuffer(images[labels == k].tobytes(), dtype='V768'), return_counts=True)
        estimate[name] = (labels == k).sum()**2/2/max(1, (counts*(counts - 1)/2).sum())
    assert min(estimate.values()) > 10_000, estimate
    assert sum(estimate.values()) > 100_000, estimate
    assert len(_as_set(images)) > 18_000

def test_white_paper(drawn):
    "The corners are white, a fifth of every sprite is, nothing fills a whole side, and something is drawn"
    images = drawn[0]
    assert (images[:, [0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    white = (images == 255).all(-1)
    share = white.mean((1, 2))
    assert share.min() > .2 and share.max() < .8
    for side in (white[:, 0], white[:, -1], white[:, :, 0], white[:, :, -1]): assert (~side).sum(1).max() <= 14

def test_only_the_palette(drawn):
    as_numbers = lambda colours: np.unique(colours.reshape(-1, 3).astype(np.int64) @ [65536, 256, 1])
    assert len(as_numbers(PALETTE)) == 33
    assert set(as_numbers(drawn[0])) <= set(as_numbers(PALETTE))

def test_every_option_of_every_recipe_is_drawn():
    "No dead art: each option of each layer leaves ink, NONE aside, and is chosen by some throw"
    stream = _stream(0, np.arange(300, dtype=np.uint64), 1)
    for name in CLASSES:
        for r in RECIPES[name]:
            assert len(r.layers) <= 30                 # throws 30 and up have another use
            assert len(_as_set(compose(r, stream))) > 30
            for options in r.layers: assert (options.reshape(len(options), -1).any(1)).sum() >= 1

@pytest.mark.parametrize('args, kwargs', [((-1,), {}), ((2.0,), {}), (('3',), {}), ((True,), {}), ((None,), {}),
    ((3,), dict(seed=-1)), ((3,), dict(seed=2**63)), ((3,), dict(seed=.5)), ((3,), dict(split='test')), ((3,), dict(split=None))])
def test_bad_arguments(args, kwargs):
    with pytest.raises(ValueError, match=r'expected .*; (try|pass)'): draw_sprites(*args, **kwargs)

# ---------- templates

def test_templates():
    assert flipped('#1.\n..2') == '.1#\n2..'
    assert folded('#3') == '#32#'                       # the right half is in the shade
    s = sheet('a b\n# 1\n2 3\n\nc\n&')
    assert (s.a, s.b, s.c) == ('#\n2', '1\n3', '&')
    with pytest.raises(ValueError, match='columns'): sheet('a b\n# 1\n2')
    with pytest.raises(ValueError, match='unknown letters'): stamp('?')
    for at in ((0, 15), (15, 0)):
        with pytest.raises(ValueError, match='leaves the 16x16 canvas'): stamp('##\n##', *at)
    assert not stamp('.' * 20 + '\n' + NONE, 15, 10).any()
    with pytest.raises(ValueError, match='no ramp'): recipe(layer(0, 0, '#'), A='reddish')

def test_a_shift_never_clips():
    "Ink at both edges of an axis stays; ink away from them moves by at most one pixel and none of it is lost"
    stream = _stream(0, np.arange(200, dtype=np.uint64), 1)
    wide = compose(recipe(layer(5, 0, '#' * 16)), stream)
    wide = (wide != 255).any(-1)
    assert set(np.argwhere(wide)[:, 1]) == {4, 5, 6} and (wide.sum((1, 2)) == 16).all()
    dot = (compose(recipe(layer(0, 0, '#')), stream) != 255).any(-1)
    assert (dot.sum((1, 2)) == 1).all() and len(_as_set(dot)) == 4
