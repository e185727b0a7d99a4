"The data set: fixed bytes, no leakage, enough variety, and every kind of bad input."
import hashlib
import numpy as np
import pytest
import torch
from PIL import Image
from diffusion_course.sampling import Schedule, predictor, sample
from diffusion_course.training import train
from diffusion_course.unet import ContextUnet
from diffusion_course.sprites import (CLASSES, PALETTE, RECIPES, NONE, Sprites, compose, draw_recipe, draw_sprites, flipped,
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

# ---------- the data set

def test_items():
    images = np.zeros((2, 16, 16, 3), np.uint8)
    images[0, 0, 1] = (255, 0, 51)
    data = Sprites(images, [4, 0])
    x0, context = data[0]
    assert x0.dtype == context.dtype == torch.float32 and x0.is_contiguous()
    torch.testing.assert_close(x0[:, 0, 1], torch.tensor([1., -1., -.6]))
    torch.testing.assert_close(context, torch.tensor([0., 0, 0, 0, 1]))
    torch.testing.assert_close(data[-1][1], torch.tensor([1., 0, 0, 0, 0]))
    assert len(data) == 2 and len(list(data)) == 2     # iteration ends with an IndexError
    with pytest.raises(IndexError): data[2]
    for bad in (1.5, [True, False], 'a'):
        with pytest.raises(TypeError, match='expected integers'): data.batch(bad)
    for labels in ([0], [0, 5], [-1, 0]):
        with pytest.raises(ValueError, match='expected one position'): Sprites(images, labels)

def test_batches_equal_items():
    data = Sprites.draw(30, seed=4, split='heldout')
    np.testing.assert_array_equal(data.images, draw_sprites(30, seed=4, split='heldout')[0])
    order = [5, 0, 29, 5]
    items = [data[i] for i in order]
    expected = torch.stack([x for x, _ in items]), torch.stack([c for _, c in items])
    torch.testing.assert_close(data.batch(order), expected)
    torch.testing.assert_close(data.batch(torch.tensor(order)), expected)
    (loaded,) = torch.utils.data.DataLoader(data, batch_sampler=[order])
    torch.testing.assert_close(tuple(loaded), expected)
    x0, context = data.batch([])
    assert x0.shape == (0, 3, 16, 16) and context.shape == (0, 5)

# ---------- arrays

@pytest.fixture
def pair(tmp_path):
    "The course's arrays in small: period 894 in the labels, 1788 different images"
    images, labels = draw_sprites(1788, seed=8)
    labels = np.tile(labels[:894], 4)
    np.save(tmp_path/'images.npy', np.tile(images, (2, 1, 1, 1))); np.save(tmp_path/'labels.npy', np.eye(5)[labels])
    return tmp_path/'images.npy', tmp_path/'labels.npy'

def test_from_npy(pair):
    images, labels = np.load(pair[0]), np.load(pair[1])
    train, held, every = (Sprites.from_npy(*pair, split=s) for s in ('train', 'heldout', 'all'))
    index = np.arange(len(images))
    rows = np.flatnonzero(index % 894 % 10 == 9)
    assert (len(train), len(held), len(every)) == (4*805, 4*89, 4*894) and len(rows) == len(held)
    np.testing.assert_array_equal(held.images, images[rows])
    np.testing.assert_array_equal(held.labels, labels[rows].argmax(1))
    x0, context = held.batch(range(len(held)))
    torch.testing.assert_close(x0, torch.from_numpy(images[rows]).permute(0, 3, 1, 2)/127.5 - 1)
    torch.testing.assert_close(context, torch.from_numpy(labels[rows]).float())
    np.testing.assert_array_equal(every.images, images)
    assert len(Sprites.from_npy(*map(str, pair))) == len(train)

def test_from_npy_does_not_leak(pair):
    train, held = Sprites.from_npy(*pair), Sprites.from_npy(*pair, split='heldout')
    for period in (894, 1788):                          # the same place in another repetition is on the same side
        assert not set(train._rows % period) & set(held._rows % period)
    assert isinstance(train._images, np.memmap) and not train._images.flags.writeable
    assert 'images' not in vars(train)                  # nothing was copied into memory so far
    x0, _ = train.batch([0, 1]); x0.zero_()
    assert train.batch([0, 1])[0].abs().sum() > 0

@pytest.mark.parametrize('n', [300, 894, 2000, 1788])
def test_other_arrays_are_split_by_their_pixels(tmp_path, n):
    images, labels = draw_sprites(n - n//3)
    images, labels = np.concatenate([images, images[:n//3]]), np.concatenate([labels, labels[:n//3]])   # with copies
    images[::9] = draw_sprites(len(images[::9]), split='heldout')[0]
    np.save(tmp_path/'x.npy', images); np.save(tmp_path/'y.npy', np.eye(5, dtype=np.float32)[labels])
    train, held = (Sprites.from_npy(tmp_path/'x.npy', tmp_path/'y.npy', split=s) for s in ('train', 'heldout'))
    assert len(train) + len(held) == n and not _as_set(train.images) & _as_set(held.images)

def test_from_npy_with_other_classes(tmp_path):
    np.save(tmp_path/'x.npy', draw_sprites(4)[0]); np.save(tmp_path/'y.npy', np.eye(2, dtype=bool)[[0, 1, 1, 0]])
    data = Sprites.from_npy(tmp_path/'x.npy', tmp_path/'y.npy', split='all', class_names=('a', 'b'))
    assert data.class_names == ('a', 'b') and data[1][1].tolist() == [0, 1]
    with pytest.raises(ValueError, match='none of the 4 images'):
        Sprites.from_npy(tmp_path/'x.npy', tmp_path/'y.npy', split='heldout', class_names=('a', 'b'))

GOOD_IMAGES, GOOD_LABELS = np.zeros((4, 16, 16, 3), np.uint8), np.eye(5)[:4]
BROKEN = dict(
    text_images=(GOOD_IMAGES.astype(str), GOOD_LABELS, TypeError, 'expected uint8'),
    float_images=(GOOD_IMAGES.astype(np.float32), GOOD_LABELS, TypeError, 'float32.*expected uint8'),
    channels_first=(GOOD_IMAGES.transpose(0, 3, 1, 2), GOOD_LABELS, ValueError, r'\(4, 3, 16, 16\).*expected \(n, 16, 16, 3\)'),
    grey=(np.zeros((4, 16, 16), np.uint8), GOOD_LABELS, ValueError, r'expected \(n, 16, 16, 3\)'),
    big=(np.zeros((4, 32, 32, 3), np.uint8), GOOD_LABELS, ValueError, r'expected \(n, 16, 16, 3\)'),
    no_images=(GOOD_IMAGES[:0], GOOD_LABELS[:0], ValueError, 'expected'),
    object_images=(np.array([{}, None], dtype=object), GOOD_LABELS, TypeError, 'pickled Python objects'),
    object_labels=(GOOD_IMAGES, np.array([[1, None]], dtype=object), TypeError, 'pickled Python objects'),
    text_labels=(GOOD_IMAGES, np.array(['hero']*4), TypeError, 'expected numbers'),
    class_numbers=(GOOD_IMAGES, np.arange(4), ValueError, r'\(4,\).*numpy.eye'),
    six_classes=(GOOD_IMAGES, np.eye(6)[:4], ValueError, r'\(4, 6\).*expected one-hot rows \(n, 5\)'),
    too_few_labels=(GOOD_IMAGES, GOOD_LABELS[:3], ValueError, 'holds 3 labels, expected 4'),
    two_ones=(GOOD_IMAGES, np.maximum(GOOD_LABELS, np.eye(5)[0]), ValueError, 'not one-hot: row 1'),
    all_zero=(GOOD_IMAGES, GOOD_LABELS*0, ValueError, 'not one-hot: row 0'),
    soft=(GOOD_IMAGES, np.full((4, 5), .2), ValueError, 'not one-hot'),
    minus=(GOOD_IMAGES, np.array([[1, 1, -1, 0, 0]]*4), ValueError, 'not one-hot'),
    nan=(GOOD_IMAGES, np.full((4, 5), np.nan), ValueError, 'not one-hot'))

@pytest.mark.parametrize('name', BROKEN)
def test_wrong_arrays(tmp_path, name):
    images, labels, error, message = BROKEN[name]
    np.save(tmp_path/'x.npy', images); np.save(tmp_path/'y.npy', labels)
    with pytest.raises(error, match=message): Sprites.from_npy(tmp_path/'x.npy', tmp_path/'y.npy')

def _html(path): path.write_bytes(b'\n<!DOCTYPE html>\n<html lang="en">' + b' '*11_000)
def _pickle(path): path.write_bytes(b'\x80\x04K\x01.')
def _npz(path):
    with path.open('wb') as f: np.savez(f, x=GOOD_IMAGES)
def _cut(path):
    np.save(path, GOOD_IMAGES); path.write_bytes(path.read_bytes()[:-100])
def _cut_header(path):
    np.save(path, GOOD_IMAGES); path.write_bytes(path.read_bytes()[:20])
def _empty(path): path.write_bytes(b'')

@pytest.mark.parametrize('make, error, message', [
    (None, FileNotFoundError, 'no file'), (_html, ValueError, 'HTML page.*11 KB'), (_pickle, ValueError, 'expected a .npy file'),
    (_npz, ValueError, 'expected a .npy file'), (_empty, ValueError, 'expected a .npy file'),
    (_cut, ValueError, 'incomplete or damaged'), (_cut_header, ValueError, 'incomplete or damaged')])
@pytest.mark.parametrize('which', [0, 1])
def test_files_that_are_no_arrays(tmp_path, make, error, message, which):
    files = [tmp_path/'x.npy', tmp_path/'y.npy']
    np.save(files[0], GOOD_IMAGES); np.save(files[1], GOOD_LABELS)
    files[which].unlink()
    if make: make(files[which])
    with pytest.raises(error, match=message) as e: Sprites.from_npy(*files)
    assert files[which].name in str(e.value)

def test_no_pickle_is_ever_run(tmp_path):
    class Trap:
        def __reduce__(self): return (pytest.fail, ('a pickle was executed',))
    np.save(tmp_path/'x.npy', np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(TypeError): Sprites.from_npy(tmp_path/'x.npy', tmp_path/'x.npy')

def test_npy_split_names(pair):
    with pytest.raises(ValueError, match="'test', expected"): Sprites.from_npy(*pair, split='test')

# ---------- folders

def _save(path, colour=(200, 10, 10), size=(16, 16), mode='RGB'):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)

def test_from_folder(tmp_path):
    root = tmp_path/'my sprites'
    _save(root/'żółw & co'/'b ü.PNG', (0, 0, 250)); _save(root/'żółw & co'/'a.png', (0, 250, 0))
    _save(root/'Äpfel'/'x y.png', (250, 0, 0))
    _save(root/'.hidden'/'x.png'); (root/'Äpfel'/'notes.txt').write_text('no image')
    (root/'Äpfel'/'._x y.png').write_text('no image')
    data = Sprites.from_folder(root)
    assert data.class_names == tuple(sorted(['żółw & co', 'Äpfel']))
    by_name = {name: data.images[data.labels == k, 0, 0].tolist() for k, name in enumerate(data.class_names)}
    assert by_name == {'Äpfel': [[250, 0, 0]], 'żółw & co': [[0, 250, 0], [0, 0, 250]]}
    assert data.images.shape == (3, 16, 16, 3) and data.images.dtype == np.uint8
    assert data.batch([0, 1, 2])[1].shape == (3, 2)
    np.testing.assert_array_equal(Sprites.from_folder(str(root)).images, data.images)

def test_a_folder_without_sub_folders_has_no_labels(tmp_path, monkeypatch):
    for k, image in enumerate(np.concatenate([draw_sprites(8)[0], draw_sprites(2, split='heldout')[0]])):
        Image.fromarray(image).save(tmp_path/f'{k}.png')
    monkeypatch.chdir(tmp_path)
    for path, split in (('.', 'all'), (tmp_path, 'train'), (tmp_path, 'heldout')):
        data = Sprites.from_folder(path, split=split)
        assert data.class_names == () and data.labels is None
        x0, context = data.batch(range(len(data)))
        assert context.shape == (len(data), 0) and context.dtype == torch.float32
        torch.testing.assert_close(data[1], (x0[1], context[1]))
        net = ContextUnet(n_feat=8, n_context=len(data.class_names))    # what such a set is for
        assert net(x0, torch.ones(len(x0), dtype=torch.int64), context).shape == x0.shape

@pytest.mark.parametrize('size', [8, 20])
def test_one_channel_and_other_sizes_train_and_sample(tmp_path, size):
    for k in range(6): _save(tmp_path/f'{k % 2}'/f'{k}.png', 40*k, (8, 10), mode='L')
    data, schedule = Sprites.from_folder(tmp_path, size=size, channels=1), Schedule.cosine(20)
    net = ContextUnet(in_channels=1, n_feat=8, n_context=len(data.class_names))
    (step,) = train(net, data, schedule, steps=1, batch_size=4, device='cpu')
    samples = sample(predictor(step.ema, schedule, torch.eye(2)), schedule, 2, steps=2, shape=(1, size, size))
    assert samples.shape == (2, 1, size, size) == data.batch([0, 1])[0].shape

def test_conversion(tmp_path):
    "White behind transparency, a white frame to the square, crisp enlargement, averaged reduction, every mode"
    sprite = draw_sprites(1)[0][0]
    Image.fromarray(sprite.repeat(5, 0).repeat(5, 1)).save(tmp_path/'a.png')          # comes back exactly
    Image.new('RGBA', (16, 16), (0, 0, 0, 0)).save(tmp_path/'b.png')                  # all transparent: white
    _save(tmp_path/'c.png', (0, 0, 0), (8, 16))                                     # white to the left and to the right
    _save(tmp_path/'d.png', 7, mode='L'); _save(tmp_path/'e.png', 0, mode='P'); _save(tmp_path/'f.png', 1, mode='1')
    Image.fromarray(np.array([[0, 200], [100, 255]], np.uint8)).save(tmp_path/'g.png')   # enlarged in blocks
    Image.fromarray(np.tile(np.array([[0, 100], [100, 200]], np.uint8), (16, 16))).save(tmp_path/'h.png')   # averaged
    a, b, c, d, e, f, g, h = Sprites.from_folder(tmp_path).images
    np.testing.assert_array_equal(a, sprite)
    assert (b == 255).all() and (c[:, :4] == 255).all() and (c[:, 4:12] == 0).all() and (c[:, 12:] == 255).all()
    assert (d == 7).all() and (e == 0).all() and (f == 255).all() and (h == 100).all()
    assert (g[:8, :8] == 0).all() and (g[:8, 8:] == 200).all() and (g[8:, :8] == 100).all()
    assert Sprites.from_folder(tmp_path, size=8).images.shape == (8, 8, 8, 3)

def test_one_channel(tmp_path):
    "Grey as Pillow weighs the colours; what is grey already stays as it is, and on the same side of the split"
    _save(tmp_path/'a.png', (200, 10, 10)); _save(tmp_path/'b.png', 77, mode='L'); _save(tmp_path/'c.png', (0, 0, 0, 0), mode='RGBA')
    grey, colour = (Sprites.from_folder(tmp_path, channels=k) for k in (1, 3))
    assert grey.images.shape == (3, 16, 16, 1) and grey.images.dtype == np.uint8 and grey[0][0].shape == (1, 16, 16)
    assert grey.images[:, 0, 0, 0].tolist() == [67, 77, 255]
    np.testing.assert_array_equal(grey.images[1].repeat(3, -1), colour.images[1])
    noise = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1), np.uint8)
    np.testing.assert_array_equal(is_heldout(noise), is_heldout(noise.repeat(3, -1)))
    for channels in (0, 2, 4, '1', None):
        with pytest.raises(ValueError, match='channels is .*expected 3 .* or 1'): Sprites.from_folder(tmp_path, channels=channels)

def test_16_bits_are_not_clipped(tmp_path):
    Image.fromarray(np.repeat(np.array([0, 255, 256, 32768, 65535], np.uint16), 5).reshape(5, 5)).save(tmp_path/'a.png')
    assert Sprites.from_folder(tmp_path, size=5).images[0, :, 0, 0].tolist() == [0, 0, 1, 128, 255]

def test_other_kinds_of_images(tmp_path):
    for name in ('a.jpg', 'b.JPEG', 'c.bmp', 'd.gif', 'e.webp'): _save(tmp_path/name, (10, 120, 240))
    assert abs(Sprites.from_folder(tmp_path).images.astype(int) - (10, 120, 240)).max() < 4

def test_a_camera_held_upright(tmp_path):
    "The file stores a picture lying on its side, and a note that says so"
    exif = Image.Exif(); exif[0x0112] = 6               # turn it clockwise by 90 degrees to see it upright
    Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 8, 0).repeat(4, 1)).save(tmp_path/'a.jpg', exif=exif, quality=95)
    image = Sprites.from_folder(tmp_path, size=8).images[0, :, :, 0]
    assert image[:4].mean() < 20 and image[4:].mean() > 235

def test_folder_splits(tmp_path):
    for k, image in enumerate(np.concatenate([draw_sprites(8)[0], draw_sprites(2, split='heldout')[0]])):
        Image.fromarray(image).save(tmp_path/f'{k}.png')
    assert [len(Sprites.from_folder(tmp_path, split=s)) for s in ('all', 'train', 'heldout')] == [10, 8, 2]
    (tmp_path/'8.png').unlink(); (tmp_path/'9.png').unlink()
    with pytest.raises(ValueError, match='none of the 8 images'): Sprites.from_folder(tmp_path, split='heldout')

def test_wrong_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match='no folder'): Sprites.from_folder(tmp_path/'nowhere')
    (tmp_path/'empty').mkdir()
    with pytest.raises(FileNotFoundError, match=r'no images in .*empty, expected .*\.jpeg'): Sprites.from_folder(tmp_path/'empty')
    _save(tmp_path/'half'/'cats'/'1.png'); (tmp_path/'half'/'dogs').mkdir()
    with pytest.raises(FileNotFoundError, match='no images in .*dogs'): Sprites.from_folder(tmp_path/'half')
    _save(tmp_path/'mixed'/'cats'/'1.png'); _save(tmp_path/'mixed'/'2.png')
    with pytest.raises(ValueError, match='beside sub-folders'): Sprites.from_folder(tmp_path/'mixed')
    with pytest.raises(NotADirectoryError, match='is a file'): Sprites.from_folder(tmp_path/'mixed'/'2.png')
    for size in (0, -16, 2.5, True):
        with pytest.raises(ValueError, match='size is'): Sprites.from_folder(tmp_path/'half', size=size)
    with pytest.raises(ValueError, match='split is'): Sprites.from_folder(tmp_path/'half', split='test')

@pytest.mark.parametrize('damage', ['text', 'empty', 'cut', 'bits'])
def test_unreadable_images(tmp_path, damage):
    _save(tmp_path/'a.png')
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path/'b.png')
    raw = (tmp_path/'b.png').read_bytes()
    bad = dict(text=b'not a picture', empty=b'', cut=raw[:len(raw)//2],
               bits=raw[:60] + bytes(255 - b for b in raw[60:200]) + raw[200:])
    (tmp_path/'b.png').write_bytes(bad[damage])
    with pytest.raises(OSError, match='cannot read .*b.png'): Sprites.from_folder(tmp_path)
