"""Files that become a data set: arrays, folders of every kind of picture, and one line that says what was left out.

Rows of wrong use that once went unnoticed or were answered with advice that did harm: each message is followed here, and ends in success."""
import os
import random
import re
import struct
import subprocess
import sys
import unicodedata
import warnings
import zlib
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
import diffusion_course.pictures
import diffusion_course.sprites
from diffusion_course.folders import MARKER, Reading, read_folder
from diffusion_course.picture_files import IMAGE_SUFFIXES, LIMIT
from diffusion_course.pictures import Sprites
from diffusion_course.sampling import Schedule, predictor, sample
from diffusion_course.sprites import draw_sprites, is_heldout
from diffusion_course.training import train
from diffusion_course.unet import ContextUnet
from test_fuzz import FUZZ, attempt, fuzz, mutated

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:diffusion_course", "ignore:.*(left out|nearly blank|single class|no image).*")

def _as_set(images): return {image.tobytes() for image in images}

def told(path, **how):
    "The line about a folder, and that a warning says the same where something was left out or looks wrong"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        data = Sprites.from_folder(path, **how)
    line, reading = str(data.reading), data.reading
    assert [str(w.message) for w in said] == [line] * bool(reading.left_out or reading.doubts)
    assert all(w.filename == __file__ for w in said), 'the warning points at the line that asked'
    assert line.isprintable() and '\n' not in line
    return data, line

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
    channels_first=(GOOD_IMAGES.transpose(0, 3, 1, 2), GOOD_LABELS, ValueError, r'\(4, 3, 16, 16\).*expected \(n, s, s, 3\)'),
    grey=(np.zeros((4, 16, 16), np.uint8), GOOD_LABELS, ValueError, r'expected \(n, s, s, 3\)'),
    odd=(np.zeros((4, 18, 18, 3), np.uint8), GOOD_LABELS, ValueError, 's a multiple of 4'),
    oblong=(np.zeros((4, 16, 20, 3), np.uint8), GOOD_LABELS, ValueError, r'expected \(n, s, s, 3\)'),
    flat=(np.zeros((4, 768), np.uint8), GOOD_LABELS, ValueError, r'expected \(n, s, s, 3\)'),
    no_images=(GOOD_IMAGES[:0], GOOD_LABELS[:0], ValueError, 'expected'),
    object_images=(np.array([{}, None], dtype=object), GOOD_LABELS, TypeError, 'pickled Python objects'),
    object_labels=(GOOD_IMAGES, np.array([[1, None]], dtype=object), TypeError, 'pickled Python objects'),
    text_labels=(GOOD_IMAGES, np.array(['hero']*4), TypeError, 'expected numbers'),
    class_numbers=(GOOD_IMAGES, np.arange(4) + 2, ValueError, 'from 2 to 5, expected 0 to 4'),
    numbers_below_0=(GOOD_IMAGES, np.arange(4) - 1, ValueError, 'from -1 to 2, expected 0 to 4'),
    real_numbers=(GOOD_IMAGES, np.arange(4.), TypeError, 'float64, expected numbers'),
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
    names = ('a.jpg', 'b.JPEG', 'c.bmp', 'd.gif', 'e.webp', 'f.tif', 'g.TIFF', 'h.jfif', 'i.ppm', 'j.tga', 'k.ico', 'l.pcx', 'm.sgi', 'n.qoi', 'o.avif', 'p.jp2')
    known = [name for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]  # what this Pillow was built with
    assert known[:9] == list(names[:9])
    for name in known: _save(tmp_path/name, (10, 120, 240))
    assert str(Sprites.from_folder(tmp_path).reading).startswith(f'{len(known)} images without classes;')
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

def _draw(path, k=0, size=16):
    "A sprite in a file: unlike one plain colour it is not nearly blank"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw_sprites(k + 1)[0][k]).resize((size, size), Image.Resampling.NEAREST).save(path)

def test_importable_from_both():
    assert diffusion_course.sprites.Sprites is Sprites is diffusion_course.pictures.Sprites and 'Sprites' in diffusion_course.sprites.__all__
    with pytest.raises(AttributeError, match='no attribute'): diffusion_course.sprites.nothing
    code = "import sys, diffusion_course.sprites as s; assert 'torch' not in sys.modules; from diffusion_course.sprites import *; print(len(Sprites.draw(2)))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '2'

# ---------- the line

def test_a_clean_folder_needs_no_warning(tmp_path):
    for k in range(3): Image.fromarray(draw_sprites(3)[0][k]).save(tmp_path/f'{k}.png')
    data, line = told(tmp_path)
    assert line == '3 images without classes' and data.reading == Reading('3 images without classes')
    (tmp_path/'cat').mkdir()
    for k in range(3): (tmp_path/f'{k}.png').rename(tmp_path/'cat'/f'{k}.png')
    assert told(tmp_path)[1] == '3 images in 1 class'
    assert Sprites.draw(2).reading is None

def test_pictures_in_deeper_folders_are_read(tmp_path):
    "Row 7: 1,053 of 3,441 were read, without a word"
    for k in range(3): _save(tmp_path/'cat'/f'{k}.png', size=(k + 8, 16))
    for k in range(4): _save(tmp_path/'cat'/'a'/'b'/f'{k}.png', (0, k, 0)); _save(tmp_path/'dog'/'sub'/f'{k}.png', (0, 0, k))
    data, line = told(tmp_path)
    assert np.bincount(data.labels).tolist() == [7, 4] and data.class_names == ('cat', 'dog')
    assert line.startswith('11 images in 2 classes; 8 of them deeper than one folder')

def test_one_class_of_folders_is_asked_about(tmp_path):
    "An unpacked archive has one more folder around the classes; the advice works"
    for name in ('cat', 'dog'): _save(tmp_path/'pets'/name/'1.png')
    line = told(tmp_path)[1]
    advised = re.search(r'single class: for its 2 folders as classes pass (.*?)(;|$)', line)[1]
    assert told(advised)[0].class_names == ('cat', 'dog')

def test_what_is_left_out_is_told(tmp_path):
    "Row 8: one PNG and nine files that were passed over"
    _draw(tmp_path/'a.png')
    for k in range(3): (tmp_path/f'{k}.heic').write_bytes(b'x')
    for name in ('notes.txt', 'table.csv', 'film.mp4'): (tmp_path/name).write_text('x')
    (tmp_path/'empty.png').touch(); (tmp_path/'page.jpg').write_text('<html>')
    (tmp_path/'gone.png').symlink_to(tmp_path/'nowhere'); (tmp_path/'self.png').symlink_to(tmp_path/'self.png')
    cut = (tmp_path/'a.png').read_bytes(); (tmp_path/'half.png').write_bytes(cut[:-30])
    data, line = told(tmp_path)
    assert len(data) == 1
    assert line == ('1 image without classes; 11 files left out: 3 .heic (0.heic, …), 2 dead links (gone.png, …), 1 damaged file (half.png), '
                    '1 empty file (empty.png), 1 with no picture inside (page.jpg), 3 other files')
    assert data.reading.left_out['dead link'] == ['gone.png', 'self.png']

def test_the_content_decides(tmp_path):
    for k, (true, said) in enumerate([('jpg', 'png'), ('webp', 'gif'), ('png', 'jpg'), ('bmp', 'tif')]): _draw(tmp_path/f'{k}.{true}', size=64); (tmp_path/f'{k}.{true}').rename(tmp_path/f'{k}.{said}')
    data, line = told(tmp_path)
    assert line == '4 images without classes' and abs(data.images.astype(int) - draw_sprites(1)[0]).mean() < 5

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no pipes here')
def test_a_pipe_is_not_waited_for(tmp_path):
    _save(tmp_path/'a.png'); os.mkfifo(tmp_path/'b.png'); (tmp_path/'c.png').symlink_to('/dev/zero')
    assert '2 pipe or device (b.png, …)' in told(tmp_path)[1]

def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    _save(tmp_path/'cat'/'a.png'); _save(tmp_path/'dog'/'a.png'); listdir, real_open = os.listdir, Image.open
    def refuse(path):
        if str(path).endswith('dog'): raise PermissionError(13, 'no')
        return listdir(path)
    monkeypatch.setattr(os, 'listdir', refuse)
    assert '1 locked folder (dog)' in told(tmp_path)[1]
    monkeypatch.setattr(os, 'listdir', listdir)
    def locked(path, *args, **kwargs):
        if 'dog' in str(path): raise PermissionError(13, 'no')
        return real_open(path, *args, **kwargs)
    monkeypatch.setattr(Image, 'open', locked)
    assert '1 locked file (dog/a.png)' in told(tmp_path)[1]

# ---------- folders that are no classes

def test_folders_of_systems_are_no_classes(tmp_path):
    _draw(tmp_path/'cat'/'1.png')
    for name in ('__MACOSX', '@eaDir', '.thumbnails', '.git', '__pycache__', '.ipynb_checkpoints', '$RECYCLE.BIN', 'lost+found', 'System Volume Information'):
        (tmp_path/name/'deep').mkdir(parents=True); (tmp_path/name/'deep'/'index.txt').write_text('x')
    for name in ('Thumbs.db', '.DS_Store', 'desktop.ini', '._1.png'): (tmp_path/'cat'/name).write_bytes(b'\0\5\x16\7')
    (tmp_path/'__MACOSX'/'._2.png').write_bytes(b'\0\5\x16\7')
    assert told(tmp_path)[1] == '1 image in 1 class'              # nothing that anybody misses
    _draw(tmp_path/'@eaDir'/'deep'/'thumb.png'); _draw(tmp_path/'cat'/'.secret.png'); _draw(tmp_path/'cat'/'.git'/'x.png')
    data, line = told(tmp_path)
    assert data.class_names == ('cat',) and len(data) == 1
    assert '3 files left out: 1 hidden file (cat/.secret.png), 1 in .git (cat/.git/x.png), 1 in @eaDir (@eaDir/deep/thumb.png)' in line

def test_folders_without_pictures_are_told(tmp_path):
    _draw(tmp_path/'cat'/'1.png'); (tmp_path/'dog').mkdir(); (tmp_path/'owl').mkdir(); (tmp_path/'owl'/'broken.png').write_bytes(b'x')
    data, line = told(tmp_path)
    assert data.class_names == ('cat',) and line.endswith('no image in 2 folders (dog, owl)')
    (tmp_path/'cat'/'1.png').rename(tmp_path/'1.png')            # loose pictures beside folders without any
    (tmp_path/'owl'/'broken.png').unlink()
    data, line = told(tmp_path)
    assert data.labels is None and line == '1 image without classes; no image in 3 folders (cat, dog, owl)'

def test_our_own_training_is_no_data(tmp_path):
    "Rows 1 and 4: data folder = working folder"
    _draw(tmp_path/'1.png')
    own = tmp_path/'mine.training'; own.mkdir()
    for name in ('step-00000100.safetensors', 'x.tmp'): (own/name).write_bytes(b'x')
    _draw(own/'samples-100.png')
    assert told(tmp_path)[1] == '1 image without classes; 1 file left out: 1 working folder of a training (mine.training)'         # by what it holds
    (own/'step-00000100.safetensors').unlink()
    with pytest.raises(ValueError, match='beside sub-folders'): Sprites.from_folder(tmp_path)
    (own/MARKER).touch()
    assert told(tmp_path)[1] == '1 image without classes; 1 file left out: 1 working folder of a training (mine.training)'         # by its marker
    (own/MARKER).unlink()
    assert told(tmp_path, skip=[own])[1] == told(tmp_path, skip=(str(own),))[1] == told(tmp_path, skip=str(own))[1] == '1 image without classes'
    (tmp_path/'1.png').unlink()
    (tmp_path/'cats.training').mkdir(); _draw(tmp_path/'cats.training'/'a.png'); _draw(own/'a.png')
    assert told(tmp_path)[0].class_names == ('cats.training', 'mine.training')   # the name alone decides nothing

def test_sheets_beside_the_classes_are_told(tmp_path):
    "What a command of ours drew into the folder of the data. In a class it is a picture like others."
    from diffusion_course.plots import save_images
    sheet = np.zeros((1, 16, 16, 3), np.uint8)
    _draw_into = [tmp_path/'cat'/'1.png', tmp_path/'sprites.png', tmp_path/'m.samples.png']
    for path in _draw_into: save_images(path, sheet + 90, scale=1)
    _save(tmp_path/'dog'/'1.png')
    data, line = told(tmp_path)
    assert len(data) == 2 and data.class_names == ('cat', 'dog') and '2 sheets of samples' in line
    _save(tmp_path/'mine.png')
    with pytest.raises(ValueError, match='beside sub-folders'): Sprites.from_folder(tmp_path)

def test_a_lone_folder_called_test_may_be_a_class(tmp_path):
    _save(tmp_path/'test'/'1.png')
    assert told(tmp_path)[0].class_names == ('test',)
    _save(tmp_path/'test'/'cat'/'1.png')
    with pytest.raises(ValueError, match='splits'): Sprites.from_folder(tmp_path)

def test_links_do_not_lead_in_circles(tmp_path):
    _save(tmp_path/'cat'/'1.png'); _save(tmp_path/'dog'/'2.png', (0, 0, 9)); outside = tmp_path.with_name('outside'); _save(outside/'3.png')
    (tmp_path/'cat'/'up').symlink_to(tmp_path); (tmp_path/'cat'/'a dog').symlink_to(tmp_path/'dog'); (tmp_path/'ape').symlink_to(tmp_path/'dog')
    (tmp_path/'cat'/'self').symlink_to(tmp_path/'cat'/'self'); (tmp_path/'elk').symlink_to(outside)
    data, line = told(tmp_path)
    assert data.class_names == ('cat', 'dog', 'elk') and len(data) == 3
    assert '3 links to a folder that is read already (ape, …)' in line and '1 dead link (cat/self)' in line

def test_very_deep_folders(tmp_path, monkeypatch):
    here = os.open(tmp_path, os.O_RDONLY)
    monkeypatch.chdir(tmp_path); os.makedirs('cat'); os.chdir('cat')
    for _ in range(1100): os.mkdir('a'); os.chdir('a')            # deeper than Python's recursion limit
    Image.new('RGB', (8, 8)).save('1.png'); os.fchdir(here); os.close(here)
    assert len(read_folder(tmp_path)[0]) == 1
    subprocess.run(['rm', '-rf', tmp_path/'cat'], check=True)     # shutil would recurse

# ---------- names

def test_both_unicode_forms_are_one_class(tmp_path):
    for k, name in enumerate((unicodedata.normalize('NFC', 'Café'), unicodedata.normalize('NFD', 'Café'))): _save(tmp_path/name/f'{k}.png', (k, 0, 0))
    for name in ('猫', 'Ёж', 'ქათამი', 'a,b=c'): _save(tmp_path/name/'1.png')
    data = told(tmp_path)[0]
    assert data.class_names == tuple(sorted(['Café', '猫', 'Ёж', 'ქათამი', 'a,b=c'])) and all(unicodedata.is_normalized('NFC', n) for n in data.class_names)
    assert np.bincount(data.labels)[data.class_names.index('Café')] == 2

@pytest.mark.skipif(sys.platform != 'linux', reason='other systems refuse such names')
def test_names_that_are_no_text(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path/'x') + b'\xff'); os.mkdir(folder)
    Image.new('RGB', (9, 9)).save(os.path.join(folder, 'a\nb.png')); Path(folder, 'c\n\udcfe.png').write_bytes(b'x')
    data, line = told(tmp_path)
    assert data.class_names == ('x\\udcff',) and 'c\\n\\udcfe.png' in line
    line.encode('utf-8'); assert len(data.fingerprint) == 64

# ---------- layouts that only the owner can judge: each advice is followed

@pytest.mark.parametrize('names', [('train', 'val'), ('Train', 'TEST', 'valid'), ('testing', 'training', 'dev'), ('validation', 'test'), ('train',)])
@pytest.mark.parametrize('loose', [False, True])
def test_splits_are_no_classes(tmp_path, names, loose):
    "Row 31: it blamed an empty class"
    for name in names:
        for k, c in enumerate(('cat', 'dog')): _save(tmp_path/'my data'/name/c/'1.png', (k, 0, 0))
    if loose: _save(tmp_path/'my data'/'overview.png'); (tmp_path/'my data'/'docs').mkdir()
    with pytest.raises(ValueError, match='are splits') as e: Sprites.from_folder(tmp_path/'my data')
    advised = re.search(r'pass (.*)$', str(e.value))[1]
    assert Path(advised).name == {5: names[0]}.get(0, next((n for n in names if n.lower().startswith('train')), 'validation'))
    assert Sprites.from_folder(advised).class_names == ('cat', 'dog')

def test_pictures_beside_classes(tmp_path):
    _draw(tmp_path/'cat'/'1.png'); _draw(tmp_path/'2.png')
    with pytest.raises(ValueError, match=r'\(2\.png, \.\.\.\) beside sub-folders \(cat, \.\.\.\).*move the images into sub-folders'): Sprites.from_folder(tmp_path)
    (tmp_path/'dog').mkdir(); (tmp_path/'2.png').rename(tmp_path/'dog'/'2.png')
    assert told(tmp_path)[1] == '2 images in 2 classes'

def test_wrong_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match='no folder.*check the name'): Sprites.from_folder(tmp_path/'nowhere')
    (tmp_path/'empty').mkdir(); (tmp_path/'empty'/'sub').mkdir()
    with pytest.raises(FileNotFoundError, match=r'no images in .*empty, expected .*\.jpeg.*add some'): Sprites.from_folder(tmp_path/'empty')
    (tmp_path/'empty'/'broken.png').write_bytes(b'x'); (tmp_path/'empty'/'a.heic').write_bytes(b'x')
    with pytest.raises(FileNotFoundError, match=r'2 files left out: 1 \.heic \(a\.heic\), 1 with no picture inside \(broken\.png\)'): Sprites.from_folder(tmp_path/'empty')
    _save(tmp_path/'empty'/'1.png'); assert len(Sprites.from_folder(tmp_path/'empty')) == 1
    with pytest.raises(NotADirectoryError, match='is a file.*pass the folder'): Sprites.from_folder(tmp_path/'empty'/'1.png')
    for size in (0, -16, 2.5, True):
        with pytest.raises(ValueError, match='size is'): Sprites.from_folder(tmp_path/'empty', size=size)
    with pytest.raises(ValueError, match='split is'): Sprites.from_folder(tmp_path/'empty', split='test')
    with pytest.raises(ValueError, match="strips is.*expected 'keep' or 'cut'"): Sprites.from_folder(tmp_path/'empty', strips='yes')

def test_a_class_on_one_side_of_the_split(tmp_path):
    images, held = draw_sprites(6)[0], draw_sprites(2, split='heldout')[0]
    for k, image in enumerate([*images, *held]):
        folder = tmp_path/('owl' if k == 0 else 'elk' if k > 6 else 'cat'); folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder/f'{k}.png')
    for split, n in (('train', 6), ('heldout', 2)):
        data, line = told(tmp_path, split=split)
        assert len(data) == n and data.class_names == ('cat', 'elk', 'owl')
        assert line == f"8 images in 3 classes, {n} of them in the split '{split}'; no image in the training split of 1 class (elk); no image held out of 1 class (owl)"

# ---------- strips, animations, blank ones

@pytest.mark.parametrize('lay', [lambda frames: np.concatenate(frames, 0), lambda frames: np.concatenate(frames, 1)])
@pytest.mark.parametrize('n', [3, 5, 16])
def test_animation_strips(tmp_path, lay, n):
    "They became a thin line on white. The advice is followed"
    frames = draw_sprites(n, seed=1)[0]
    Image.fromarray(frames[0]).save(tmp_path/'a.png'); Image.fromarray(lay(list(frames))).save(tmp_path/'b.png')
    data, line = told(tmp_path)
    assert len(data) == 2 and (data.images[1] == 255).all(-1).mean() > .6
    assert '1 picture may be strips of frames (b.png): strips="cut", or --strips cut' in line
    data, line = told(tmp_path, strips='cut')
    np.testing.assert_array_equal(data.images[1:], frames)
    assert line == f'{n + 1} images without classes; 1 strip cut into {n} frames'

def test_long_pictures(tmp_path):
    _save(tmp_path/'a.png', size=(90, 16)); _save(tmp_path/'b.png', size=(300, 60)); _save(tmp_path/'c.png', size=(64, 16)); _save(tmp_path/'d.png', size=(200, 100))
    _save(tmp_path/'e.png', size=(400, 100))
    line = told(tmp_path)[1]
    assert '1 picture longer than 4:1, thin lines on white (a.png): crop them' in line      # 300 x 60 is a strip of 60 x 60, 400 x 100 is 4:1
    assert '2 pictures may be strips of frames (b.png, …)' in line
    Image.open(tmp_path/'a.png').crop((0, 0, 16, 16)).save(tmp_path/'a.png')
    assert '4:1' not in told(tmp_path, strips='cut')[1]

@pytest.mark.parametrize('kind', ['gif', 'webp', 'png'])
def test_animations_give_their_first_frame(tmp_path, kind):
    frames = [Image.fromarray(x) for x in draw_sprites(3)[0]]
    frames[0].save(tmp_path/f'a.{kind}', save_all=True, append_images=frames[1:], **({'lossless': True} if kind == 'webp' else {}))
    data, line = told(tmp_path)
    assert line == '1 image without classes; 1 animation: first frame only'
    np.testing.assert_array_equal(data.images[0], np.asarray(frames[0]))

def test_nearly_blank_pictures(tmp_path):
    noise = np.random.default_rng(0)
    for k, image in enumerate([np.full((16, 16, 3), 255), np.full((16, 16, 3), (9, 200, 40)), 128 + (noise.random((16, 16, 3)) < .5), noise.integers(0, 9, (16, 16, 3))]):
        Image.fromarray(image.astype(np.uint8)).save(tmp_path/f'{k}.png')
    assert told(tmp_path)[1] == '4 images without classes; 3 nearly blank'
    np.save(tmp_path/'x.npy', np.zeros((7, 16, 16, 1), np.uint8)); np.save(tmp_path/'y.npy', np.arange(7) % 5)
    with pytest.warns(UserWarning, match='^7 images in 5 classes; 7 nearly blank$'): Sprites.from_npy(tmp_path/'x.npy', tmp_path/'y.npy', split='all')

# ---------- more than eight bits, transparency, colour modes

def chunk(kind, body): return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))

def png(numbers, depth, colour, *chunks):
    "A PNG of rows of big-endian numbers, of any depth and kind: 0 grey, 2 colour, 3 palette, 4 grey and alpha, 6 colour and alpha"
    h, w = numbers.shape[:2]
    if depth == 16: rows = [row.astype('>u2').tobytes() for row in numbers]
    elif depth == 8: rows = [row.astype(np.uint8).tobytes() for row in numbers]
    else: rows = [np.packbits(np.unpackbits(row.reshape(-1, 1).astype(np.uint8), axis=1)[:, 8 - depth:].reshape(-1)).tobytes() for row in numbers]
    head = struct.pack('>IIBBBBB', w, h, depth, colour, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + b''.join(chunks) + chunk(b'IDAT', zlib.compress(b''.join(b'\0' + row for row in rows))) + chunk(b'IEND', b'')

@pytest.mark.parametrize('bits', [8, 10, 12, 14, 16])
@pytest.mark.parametrize('colour, channels', [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_ranges_of_16_bits(tmp_path, bits, colour, channels):
    "Row 11: a 16-bit PNG that holds 0…255, and 12-bit data, were black. All files share one range, so brightness stays comparable"
    eight = np.random.default_rng(bits).integers(0, 256, (16, 16, channels)); eight[0, 0] = 255
    dark = eight // 4
    for name, image in (('a.png', eight), ('b.png', dark)):
        wide = (image << (bits - 8)) + (1 << (bits - 8)) // 2
        if channels in (2, 4): wide[..., -1] = 65535
        (tmp_path/name).write_bytes(png(wide, 16, colour))
    data, line = told(tmp_path)
    for found, image in zip(data.images, (eight, dark)):
        np.testing.assert_array_equal(found, np.broadcast_to(image[..., :1] if channels < 3 else image[..., :3], (16, 16, 3)))
    assert line == '2 images without classes' + f'; 16-bit pictures read as 0…{2**bits - 1:,}, one range for all of them' * (bits < 16)

def test_16_bit_colours_in_tiff(tmp_path):
    "Both orders of bytes, with and without the compression of libtiff"
    from PIL import TiffImagePlugin
    wide = np.random.default_rng(0).integers(0, 4096, (16, 16, 3)); wide[0, 0] = 4095
    for name, order in (('a', '<'), ('b', '>')):
        tags = {256: 16, 257: 16, 258: (16, 16, 16), 259: 1, 262: 2, 277: 3, 278: 16, 279: 1536}
        n, body = len(tags) + 1, wide.astype(order + 'u2').tobytes()
        start = 8 + 2 + 12*n + 4
        entries = sorted({**tags, 273: start + 6}.items())
        out = (b'II*\0' if order == '<' else b'MM\0*') + struct.pack(order + 'IH', 8, n)
        for tag, value in entries:
            out += struct.pack(order + 'HHII', tag, 3, 3, start) if tag == 258 else struct.pack(order + 'HHII', tag, 4, 1, value)
        (tmp_path/f'{name}.tif').write_bytes(out + struct.pack(order + 'I', 0) + struct.pack(order + 'HHH', 16, 16, 16) + body)
    data, line = told(tmp_path)
    np.testing.assert_array_equal(data.images, np.stack([wide >> 4] * 2))
    assert '16-bit pictures read as 0…4,095' in line

@pytest.mark.parametrize('top', [1., 255., 65535.])
def test_floats_in_files(tmp_path, top):
    values = np.linspace(0, top, 256, dtype=np.float32).reshape(16, 16)
    Image.fromarray(values).save(tmp_path/'a.tif')
    data, line = told(tmp_path)
    assert abs(data.images[0, :, :, 0].astype(int) - np.arange(256).reshape(16, 16)).max() <= 1 and data.images.max() == 255
    assert f'float pictures read as 0…{int(top):,}' in line
    for bad in (-values - 1, np.full_like(values, np.nan), np.full_like(values, np.inf), values * np.float32(1e30)):
        Image.fromarray(bad).save(tmp_path/'b.tif')
        assert '1 with numbers that are no brightness (b.tif)' in told(tmp_path)[1]

def test_32_bits(tmp_path):
    for k, top in enumerate((255, 65535)):
        Image.fromarray((np.arange(256).reshape(16, 16) * (top // 255)).astype(np.int32)).save(tmp_path/'a.tif')
        data, line = told(tmp_path)
        assert abs(data.images[0, :, :, 0].astype(int) - np.arange(256).reshape(16, 16)).max() <= 1 and f'32-bit pictures read as 0…{top:,}' in line

@pytest.mark.parametrize('depth, colour, value, clear', [(1, 0, 0, (0,)), (1, 0, 1, (1,)), (2, 0, 2, (2,)), (4, 0, 8, (8,)), (8, 0, 77, (77,)), (16, 0, 999, (999,)),
    (8, 2, (1, 2, 3), (1, 2, 3)), (16, 2, (0, 300, 65535), (0, 300, 65535)), (16, 2, (0, 30, 200), (0, 30, 200)), (16, 0, 200, (200,))])
def test_one_colour_is_transparent(tmp_path, depth, colour, value, clear):
    "The tRNS chunk of each kind of PNG: what has this colour is white, its neighbour is not"
    numbers = np.zeros((16, 16, 3 if colour == 2 else 1), int); numbers[:8] = value
    other = {1: 1 - numbers[0, 0, 0]}.get(depth, 3 if depth == 2 else 5); numbers[8:] = other
    (tmp_path/'a.png').write_bytes(png(numbers, depth, colour, chunk(b'tRNS', struct.pack(f'>{len(clear)}H', *clear))))
    image = told(tmp_path)[0].images[0]
    assert (image[:8] == 255).all()
    if other != 2**depth - 1: assert (image[8:] < 255).all()
    (tmp_path/'a.png').write_bytes(png(numbers, depth, colour))
    if value != 1: assert (told(tmp_path)[0].images[0, :8] < 255).any()

def test_every_mode(tmp_path):
    "Half black, half transparent or white, in every mode that a file can have"
    ink = np.zeros((16, 16), np.uint8); ink[8:] = 255
    grey = Image.fromarray(ink)
    clear = Image.merge('LA', [Image.new('L', (16, 16)), Image.fromarray(255 - ink)])     # black, transparent below
    palette = Image.new('P', (16, 16), 1); palette.putpalette([0, 0, 0, 9, 9, 9]); palette.paste(0, (0, 0, 16, 8))
    for name, image, how in [('1.png', grey.convert('1'), {}), ('L.png', grey, {}), ('LA.png', clear, {}), ('RGBA.png', clear.convert('RGBA'), {}), ('P.png', palette, dict(transparency=1)),
            ('P2.png', palette, dict(transparency=bytes([255, 0]))), ('P.gif', palette, dict(transparency=1)), ('CMYK.jpg', grey.convert('RGB').convert('CMYK'), dict(quality=100)),
            ('CMYK.tif', grey.convert('RGB').convert('CMYK'), {}), ('YCbCr.tif', grey.convert('RGB').convert('YCbCr'), {}), ('LA.tif', clear, {}), ('RGBA.webp', clear.convert('RGBA'), dict(lossless=True)),
            ('1.tif', grey.convert('1'), {}), ('P.bmp', grey.convert('P'), {}), ('L.jpg', grey, dict(quality=100)), ('I16.png', Image.fromarray(ink.astype(np.uint16) * 257), {})]:
        image.save(tmp_path/name, **how)
    for channels in (1, 3):
        data, line = told(tmp_path, channels=channels)
        assert line == '16 images without classes'
        assert abs(data.images.astype(int) - ink[None, :, :, None]).max() <= 3
    Image.new('LAB', (16, 16)).save(tmp_path/'lab.tif')
    assert len(told(tmp_path)[0]) in (16, 17)            # read or told, as Pillow can

def test_a_damaged_note_of_the_camera_costs_nothing(tmp_path):
    Image.new('RGB', (16, 16), (9, 9, 200)).save(tmp_path/'a.jpg', exif=b'Exif\0\0II*\0\xff\xff\xff\xff')
    assert len(told(tmp_path)[0]) == 1

# ---------- the size: fit first, then the square

@pytest.mark.parametrize('w, h', [(16, 16), (80, 80), (7, 7), (100, 60), (3, 5), (1, 1), (1, 400), (400, 1), (97, 31), (16, 9)])
@pytest.mark.filterwarnings('ignore')
def test_fits_in_the_middle(tmp_path, w, h):
    Image.new('RGB', (w, h), (0, 0, 0)).save(tmp_path/'a.png')
    ink = (Sprites.from_folder(tmp_path).images[0] == 0).all(-1)
    rows, cols = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    side = max(w, h)
    assert len(rows) == max(1, round(16*h/side + 1e-9)) and len(cols) == max(1, round(16*w/side + 1e-9))
    assert abs((15 - rows[-1]) - rows[0]) <= 1 and abs((15 - cols[-1]) - cols[0]) <= 1 and ink.sum() == len(rows)*len(cols)

MEMORY = '''
import re, sys, resource, warnings
warnings.simplefilter('ignore')
from diffusion_course.folders import read_folder
from PIL import Image
Image.new('RGB', (40, 40)).resize((16, 16), Image.Resampling.BOX)
def peak():
    if sys.platform != 'linux': return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024   # ru_maxrss would begin at the peak of the parent
before = peak()
try: print(read_folder(sys.argv[1])[3])
except OSError as e: print(e)
print(peak() - before)
'''

def _gradient(w, h): return np.broadcast_to((np.arange(w) * 255 // w).astype(np.uint8)[None, :, None], (h, w, 3))

def _jpeg(path, w, h, **how): Image.fromarray(np.ascontiguousarray(_gradient(w, h))).save(path, quality=60, **how)
def _bomb(path, w, h): path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(b'\0' * 1000)) + chunk(b'IEND', b''))
def _many(path, w, h):
    for k in range(2000): Image.new('RGB', (w, h), (k % 256, k // 256, 9)).save(path.parent/f'{k}.png')

CASES = {
    'strip': (lambda p: Image.new('L', (12_000, 16)).save(p), 'a.png', '1 image without classes'),
    'longer strip': (lambda p: Image.new('L', (60_000, 16)).save(p), 'a.png', '1 image without classes'),
    'photo': (lambda p: _jpeg(p, 6000, 8000), 'a.jpg', '1 image without classes'),
    'phone of 108 megapixels': (lambda p: Image.new('L', (12_000, 9_000), 99).save(p), 'a.jpg', '1 image without classes'),
    'progressive photo': (lambda p: _jpeg(p, 6000, 8000, progressive=True), 'a.jpg', '1 larger than 20 megapixels'),
    'bomb': (lambda p: _bomb(p, 60_000, 60_000), 'a.png', '1 larger than 20 megapixels'),
    'bomb in the warning range': (lambda p: _bomb(p, 10_000, 12_000), 'a.png', '1 larger than 20 megapixels'),
    'smaller bomb': (lambda p: _bomb(p, 9_000, 9_000), 'a.png', '1 larger than 20 megapixels'),
    'just allowed': (lambda p: Image.new('RGBA', (5_000, 4_000)).save(p), 'a.png', '1 image without classes'),
    'palette': (lambda p: Image.new('P', (5_000, 4_000)).save(p, transparency=0), 'a.png', '1 image without classes'),
    'webp': (lambda p: Image.new('RGBA', (3_100, 3_200)).save(p), 'a.webp', '1 image without classes'),
    'jpeg2000': (lambda p: Image.new('RGB', (3_100, 3_200)).save(p), 'a.jp2', '1 image without classes'),
    'avif': (lambda p: Image.new('RGB', (3_100, 3_200)).save(p, speed=10), 'a.avif', '1 image without classes'),
    'float': (lambda p: Image.new('F', (3_100, 3_200), 1.).save(p), 'a.tif', '1 image without classes'),
    '16 bits': (lambda p: p.write_bytes(png(np.zeros((3_200, 3_100, 3), np.uint8), 16, 2)), 'a.png', '1 image without classes'),
    'many': (lambda p: _many(p, 64, 64), 'a.png', '2,000 images without classes')}

@pytest.mark.skipif(sys.platform == 'win32', reason='no resource module')
@pytest.mark.parametrize('name', CASES)
def test_memory(tmp_path, name):
    "Row 10: a strip of 682 bytes took 1.1 GB. The peak above what the imports take stays below 300 MB"
    make, file, expected = CASES[name]
    if os.path.splitext(file)[1] not in IMAGE_SUFFIXES: pytest.skip('not in this Pillow')
    make(tmp_path/file)
    done = subprocess.run([sys.executable, '-c', MEMORY, tmp_path], capture_output=True, text=True, check=True)
    *line, growth = done.stdout.strip().splitlines()
    assert expected in ' '.join(line), line
    assert float(growth) < 300, growth
    if name == 'just allowed': assert float(growth) > 50, 'nothing was measured'

def test_a_large_photo_is_read_rightly(tmp_path):
    "At an eighth, and still the gradient that it is"
    _jpeg(tmp_path/'a.jpg', 6400, 4800)
    assert 6400*4800 > LIMIT
    image = told(tmp_path)[0].images[0, 8, :, 0].astype(int)
    assert abs(image - (np.arange(16) + .5)*16).max() < 4

# ---------- arrays: the line to write

def follow(folder, monkeypatch, **how):
    "Do what each message says until there is none: the data set, and how many lines were written"
    monkeypatch.chdir(folder)
    files, originals = {'x': 'x.npy', 'y': 'y.npy'}, {name: Path(name).read_bytes() for name in ('x.npy', 'y.npy')}
    for attempt in range(6):
        try: data = Sprites.from_npy(*files.values(), split='all', **how)
        except (TypeError, ValueError) as e:
            if (line := re.search(r'write  (np\.save\(.*\))  and read (([xy])\S+)$', str(e))): exec(line[1], dict(np=np)); files[line[3]] = line[2]
            elif (line := re.search(r'pass (class_names=\[.*\])$', str(e))): how |= eval(f'dict({line[1]})')
            else: raise
        else:
            assert originals == {name: Path(name).read_bytes() for name in originals}, 'the advice costs the original'
            return data, attempt
    pytest.fail('the advice leads nowhere')

SPRITES = draw_sprites(20, seed=5)
IMAGES = dict(
    transpose=lambda x: x.transpose(0, 3, 1, 2), floats=lambda x: x / 255, floats_16=lambda x: (x / 255).astype(np.float16), large_floats=lambda x: x.astype(np.float32), signed=lambda x: x / 127.5 - 1,
    signed_first=lambda x: np.float32(x / 127.5 - 1).transpose(0, 3, 1, 2), ints=lambda x: x.astype(np.int64), wide=lambda x: x.astype(np.uint16) << 8 | 128, twelve=lambda x: x.astype(np.int32) << 4,
    alpha=lambda x: np.concatenate([np.where((x == 255).all(-1, keepdims=True), 7, x), 255 * ~(x == 255).all(-1, keepdims=True)], -1).astype(np.uint8))

@pytest.mark.parametrize('name', IMAGES)
def test_images_that_a_line_mends(tmp_path, monkeypatch, name):
    "Row 22: it said reshape; obeyed, the colours were scrambled and accepted. And images as floats, which were trained silently"
    np.save(tmp_path/'x.npy', IMAGES[name](SPRITES[0])); np.save(tmp_path/'y.npy', SPRITES[1])
    data, lines = follow(tmp_path, monkeypatch)
    assert lines == 1 + (name == 'signed_first') and abs(data.images.astype(int) - SPRITES[0]).max() <= (name == 'floats_16')

@pytest.mark.parametrize('make, expected', [
    (lambda x: x[..., 0], lambda x: x[..., :1]), (lambda x: x[..., :1].transpose(0, 3, 1, 2), lambda x: x[..., :1]), (lambda x: x[:, 1:, 1:], lambda x: x[:, 1:, 1:]), (lambda x: x[:, :, 2:], lambda x: x[:, :, 2:]),
    (lambda x: x[..., 0] > 128, lambda x: 255 * (x[..., :1] > 128))])
def test_other_shapes_that_a_line_mends(tmp_path, monkeypatch, make, expected):
    np.save(tmp_path/'x.npy', make(SPRITES[0])); np.save(tmp_path/'y.npy', SPRITES[1])
    data, lines = follow(tmp_path, monkeypatch)
    want = expected(SPRITES[0])
    np.testing.assert_array_equal(data.images[:, :want.shape[1], :want.shape[2]], want)
    assert data.images.shape[1:3] == (16, 16) and data.images.shape[3] in (1, 3)

@pytest.mark.parametrize('shape', [(3, 4, 4, 3), (3, 32, 32, 1), (2, 64, 64, 3)])
def test_any_square_size(tmp_path, shape):
    x = np.random.default_rng(0).integers(0, 256, shape, np.uint8); np.save(tmp_path/'x.npy', x); np.save(tmp_path/'y.npy', np.arange(len(x)))
    data = Sprites.from_npy(tmp_path/'x.npy', tmp_path/'y.npy', split='all')
    np.testing.assert_array_equal(data.images, x); assert data.labels.tolist() == list(range(len(x)))
    assert str(data.reading) == f'{len(x)} images in 5 classes'

@pytest.mark.parametrize('make, names', [(lambda k: k, 5), (lambda k: k.astype(np.uint8), 5), (lambda k: k + 1, 5), (lambda k: k.astype(float), 5), (lambda k: k[:, None], 5), (lambda k: np.eye(6)[k], 6),
    (lambda k: k + 1 - (k == 0), 6), (lambda k: k * 2, 9), (lambda k: np.array(['pq', 'qr', 'rs', 'st', 'tu'])[k], 5), (lambda k: k * 10_000 - 7, 5)])
def test_labels_that_a_line_mends(tmp_path, monkeypatch, make, names):
    labels = np.arange(20) % 5
    np.save(tmp_path/'x.npy', SPRITES[0]); np.save(tmp_path/'y.npy', make(labels))
    data, _ = follow(tmp_path, monkeypatch)
    assert len(data.class_names) == names
    np.testing.assert_array_equal(np.unique(data.labels, return_inverse=True)[1], np.unique(make(labels).argmax(1) if make(labels).ndim == 2 and names == 6 else make(labels), return_inverse=True)[1].reshape(-1))

def test_arrays_in_hand_are_bytes_too():
    for images in (np.zeros((2, 16, 16, 3)), torch.zeros(2, 16, 16, 3), [[0.5]]):
        with pytest.raises(TypeError, match='expected uint8 in 0..255'): Sprites(images, None)
    images = draw_sprites(3)[0] / 255
    with pytest.raises(TypeError) as e: Sprites(images, None)
    again = eval(str(e.value).split('pass  ')[1], dict(np=np, images=images))
    np.testing.assert_array_equal(Sprites(again, None).images, draw_sprites(3)[0])

# ---------- fingerprint and mirror

def test_fingerprint(tmp_path, pair):
    drawn = Sprites.draw(40)
    np.save(tmp_path/'x.npy', drawn.images); np.save(tmp_path/'y.npy', drawn.labels)
    same = Sprites.from_npy(tmp_path/'x.npy', tmp_path/'y.npy', split='all')
    part = Sprites(np.concatenate([drawn.images, drawn.images]), np.tile(drawn.labels, 2), rows=np.arange(40, 80))
    assert re.fullmatch('[0-9a-f]{64}', drawn.fingerprint)
    assert drawn.fingerprint == same.fingerprint == part.fingerprint == Sprites.draw(40).fingerprint
    train, held = Sprites.from_npy(*pair), Sprites.from_npy(*pair, split='heldout')
    touched, relabelled = drawn.images.copy(), drawn.labels.copy(); touched[7, 3, 3, 1] ^= 1; relabelled[3] = (relabelled[3] + 1) % 5
    others = [Sprites.draw(39), Sprites.draw(40, seed=1), Sprites(touched, drawn.labels), Sprites(drawn.images, relabelled), Sprites(drawn.images, drawn.labels, ('hero', 'non-hero', 'food', 'spell', 'side')),
              Sprites(drawn.images, None), Sprites(drawn.images, drawn.labels, rows=np.arange(40)[::-1]), Sprites(drawn.images.reshape(40, 32, 8, 3), drawn.labels), train, held, drawn.mirrored()]
    assert len({data.fingerprint for data in [drawn, *others]}) == 1 + len(others)
    big = Sprites.draw(2500); half = Sprites(big.images, big.labels, rows=np.arange(0, 2500, 2))          # more than one block
    assert half.fingerprint == Sprites(big.images[::2].copy(), big.labels[::2]).fingerprint
    assert half.fingerprint == Sprites(np.asfortranarray(big.images[::2]), big.labels[::2].astype(np.int32)).fingerprint

def test_mirrored(pair, tmp_path):
    data = Sprites.from_npy(*pair, split='heldout')
    both = data.mirrored()
    assert len(both) == 2*len(data) and both.class_names == data.class_names and both.reading is data.reading
    x0, context = data.batch(range(len(data))); twice, contexts = both.batch(range(len(both)))
    torch.testing.assert_close(twice, torch.cat([x0, x0.flip(-1)])); torch.testing.assert_close(contexts, torch.cat([context, context]))
    bare = Sprites(data.images, None).mirrored()
    assert bare.labels is None and bare[0][1].shape == (0,) and len(bare) == 2*len(data)

# ---------- any bytes under any name

SEEDS = {}

def seeds():
    "One small file of every kind that this Pillow can write"
    if not SEEDS:
        import io
        image = Image.fromarray(draw_sprites(1, seed=2)[0][0])
        for suffix in IMAGE_SUFFIXES:
            for mode in ('RGB', 'RGBA', 'L', 'P', '1', 'I;16', 'F', 'CMYK'):
                out = io.BytesIO()
                try: image.convert('L' if mode in ('I;16', 'F') else mode).convert(mode).save(out, Image.registered_extensions()[suffix])
                except Exception: continue
                SEEDS[suffix, mode] = out.getvalue()
        frames = [Image.fromarray(x) for x in draw_sprites(3)[0]]
        for kind in ('GIF', 'WEBP', 'PNG', 'TIFF'):
            out = io.BytesIO(); frames[0].save(out, kind, save_all=True, append_images=frames[1:]); SEEDS[f'.{kind.lower()}', 'moving'] = out.getvalue()
    return SEEDS

def read_or_reason(folder):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        found = attempt(Sprites.from_folder, folder)
    if found is None: return
    x0, _ = found.batch(range(len(found)))
    assert x0.shape[1:] == (3, 16, 16) and x0.isfinite().all() and str(found.reading).isprintable()
    assert len(found) + sum(map(len, found.reading.left_out.values())) >= 1

@pytest.fixture(scope='module')
def bench(tmp_path_factory): return tmp_path_factory.mktemp('any bytes')

@pytest.mark.filterwarnings('ignore')
@fuzz(400)
@given(st.data())
def test_mutated_pictures(bench, data):
    kinds = sorted(seeds())
    suffix, mode = data.draw(st.sampled_from(kinds))
    other = data.draw(st.sampled_from(kinds))
    folder = bench/'mutated'; folder.mkdir(exist_ok=True)
    for old in folder.iterdir(): old.unlink()
    name = data.draw(st.sampled_from([suffix, suffix, other[0]]))
    (folder/f'a{name}').write_bytes(mutated(seeds()[suffix, mode], data.draw))
    read_or_reason(folder)

@fuzz(100)
@given(st.binary(max_size=300), st.sampled_from(IMAGE_SUFFIXES), st.data())
def test_composed_bytes(bench, noise, suffix, data):
    "The first bytes of one kind, then anything"
    head = seeds()[data.draw(st.sampled_from(sorted(seeds())))]
    folder = bench/'composed'; folder.mkdir(exist_ok=True)
    for old in folder.iterdir(): old.unlink()
    (folder/f'a{suffix}').write_bytes(head[:data.draw(st.integers(0, 60))] + noise)
    read_or_reason(folder)

@pytest.mark.parametrize('seed', range(20 * FUZZ))
def test_any_folder(tmp_path, seed):
    "Random trees of pictures, junk, links and folders of systems: one line or one error that says what to do"
    rng, files = random.Random(seed), seeds()
    names = ['cat', 'dog', 'train', '.git', '__MACOSX', 'x.training', 'é', 'e\u0301', 'a b', '@eaDir']
    folders = [tmp_path]
    for _ in range(rng.randrange(8)):
        new = rng.choice(folders)/rng.choice(names); new.mkdir(exist_ok=True); folders.append(new)
    for k in range(rng.randrange(12)):
        where, (suffix, mode) = rng.choice(folders[1:] or folders), rng.choice(sorted(files))
        kind = rng.randrange(6)
        path = where/f'{rng.choice(["", ".", "._"])}{k}{rng.choice([suffix, suffix, ".txt", ".heic", ""])}'
        if kind == 0 and hasattr(os, 'symlink'): path.symlink_to(rng.choice([*folders, tmp_path/'nowhere', path]))
        elif kind == 1: path.write_bytes(rng.randbytes(rng.randrange(50)))
        elif kind == 2: path.mkdir()
        else: path.write_bytes(files[suffix, mode])
    read_or_reason(tmp_path)
