"Guards for diffusion_course.plots: the display mapping, the sizes and colours of animations, whole files, figures shown once."
import os
import ast, inspect, io, math, sys, warnings
from pathlib import Path
from types import SimpleNamespace
import nbformat
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from nbclient import NotebookClient
from PIL import Image
from diffusion_course import plots
from diffusion_course.plots import (PALETTE, animate, denoising_strip, image_grid, loss_curve, quality_curve, save_images,
                                    schedule_plot, show_images, to_uint8)

ROOT = Path(__file__).parents[1]

def images(n=4, size=16, seed=0): return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))*2 - 1

def walk(n=32, frames=30):
    "From noise to smooth pictures on a white ground, with fresh noise in every frame"
    g = torch.Generator().manual_seed(1)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing='ij')
    colour = torch.rand(n, 3, 1, 1, generator=g)
    clean = torch.where(x**2 + y**2 < .6, colour*(1 - .3*(x + y)), torch.ones(())).clamp(0, 1)*2 - 1
    for u in torch.linspace(math.pi/2, 0, frames): yield u.cos()*clean + u.sin()*torch.randn(clean.shape, generator=g)

def decode(gif):
    image = Image.open(io.BytesIO(gif))
    frames, durations = [], []
    for i in range(image.n_frames):
        image.seek(i)
        frames.append(np.asarray(image.convert('RGB')).astype(int)); durations.append(image.info['duration'])
    return frames, durations, image.info

# the display mapping

def test_mapping_is_one_straight_line():
    x = torch.linspace(-1, 1, 511, dtype=torch.float64)                     # steps of half a byte
    shown = to_uint8(x.expand(3, 1, 511)).astype(float)
    assert shown.shape == (1, 1, 511, 3)
    assert np.abs(shown[0, 0, :, 0] - np.arange(511)/2).max() <= .5
    assert to_uint8(torch.tensor([-9., -1, -.5, 0, .5, 1, 9]).view(1, 1, 7)).ravel().tolist() == [0, 0, 64, 128, 191, 255, 255]

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16])
def test_bytes_survive_the_round_trip(dtype):
    b = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    x = (torch.tensor(b).permute(0, 3, 1, 2).double()/127.5 - 1).to(dtype)
    assert (to_uint8(x) == b).all()
    assert (to_uint8(b) == b).all() and to_uint8(b).dtype == np.uint8

def test_no_stretch_per_image_or_channel():
    x = images(2)
    dull = torch.stack([x[0], x[1]*.1])
    assert (to_uint8(dull)[0] == to_uint8(x[:1])[0]).all(), 'an image must not depend on its neighbours'
    values = to_uint8(dull)[1].astype(int)
    assert values.min() >= 114 and values.max() <= 141
    flat = torch.full((1, 3, 4, 4), -.2)
    assert (to_uint8(flat) == 102).all()

def test_mapping_leaves_its_input_alone():
    x = images().requires_grad_()
    before = x.detach().clone()
    to_uint8(x)
    torch.testing.assert_close(x.detach(), before, rtol=0, atol=0)

@pytest.mark.parametrize('bad', [torch.zeros(16, 16), torch.zeros(2, 16, 16, 3), torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 3, 4, 4),
                                 np.zeros((2, 3, 16, 16), np.uint8), np.zeros((16, 16, 3), np.uint8)])
def test_wrong_shapes(bad):
    with pytest.raises(ValueError, match='have shape .* expected'): to_uint8(bad)

def test_wrong_values():
    x = images(); x[1, 0, 3, 3] = math.nan
    for show in (to_uint8, show_images, image_grid, lambda x: animate([x], alt='broken')):
        with pytest.raises(ValueError, match='hold NaN'): show(x)
    with pytest.raises(TypeError, match='int64'): to_uint8(torch.zeros(1, 3, 4, 4, dtype=torch.int64))
    assert to_uint8(torch.tensor([-math.inf, math.inf]).view(1, 1, 2)).ravel().tolist() == [0, 255]

# grids and files

def test_grid_places_every_image():
    x = images(7)
    sheet = np.asarray(image_grid(x, ncols=3, gap=2))
    assert sheet.shape == (3*18 + 2, 3*18 + 2, 3)
    for i, b in enumerate(to_uint8(x)):
        y, left = 2 + i//3*18, 2 + i % 3*18
        assert (sheet[y:y+16, left:left+16] == b).all()
    assert (sheet[-18:, -36:] == 255).all() and (sheet[:2] == 255).all(), 'empty places and gaps are white'

def test_grey_and_oblong_images():
    assert image_grid(torch.zeros(3, 1, 8, 4)).size == (3*5 + 1, 8 + 2)
    assert np.asarray(image_grid(torch.zeros(1, 1, 4, 4)))[2, 2].tolist() == [128]*3
    assert show_images(torch.zeros(3, 1, 8, 4), titles=list('abc')).axes

def test_saved_sheet_is_enlarged_without_blur(tmp_path):
    path = save_images(tmp_path/'new folder'/'a.png', images(5), ncols=5, scale=3)
    small = np.asarray(image_grid(images(5), ncols=5))
    assert (np.asarray(Image.open(path)) == small.repeat(3, 0).repeat(3, 1)).all()
    with pytest.raises(ValueError, match='scale is 1.5'): save_images(path, images(), scale=1.5)

@pytest.mark.parametrize('broken', ['fsync', 'replace'])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path/'a.png'
    path.write_bytes(b'old')
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, broken, full)
    animation = animate([images()], alt='one frame')
    for save in (lambda: save_images(path, images()), lambda: animation.save(path)):
        with pytest.raises(OSError, match='No space'): save()
        assert path.read_bytes() == b'old'
        assert [p.name for p in tmp_path.iterdir()] == ['a.png'], 'no temporary files stay'

# animations

def test_animation_frames_and_colours():
    frames = list(walk())
    shown, durations, info = decode(animate(frames, alt='a walk').gif)
    sheets = [np.asarray(image_grid(f)).astype(int) for f in frames]
    assert len(shown) == 30 and info['loop'] == 0
    assert shown[0].shape == (4*17 + 1, 8*17 + 1, 3), 'one pixel per image pixel'
    errors = [np.abs(a - b) for a, b in zip(shown, sheets)]
    assert max(e.max() for e in errors) <= 90 and max(e.mean() for e in errors) <= 16
    assert max(e.max() for e in errors[-3:]) <= 32, 'the frames before the last show no wrong colours either'
    assert errors[-1].max() <= 16 and errors[-1].mean() <= 2, 'the last frame is the one to judge'
    assert all((s[0] == 255).all() for s in shown), 'white stays white'
    assert set(durations[:-1]) == {80} and durations[-1] == 2000          # GIF counts hundredths of a second

def test_few_colours_stay_exact():
    x = torch.tensor([-1., 1, .2, -.4]).view(4, 1, 1, 1).expand(4, 3, 16, 16)
    shown, _, _ = decode(animate([x, x.flip(0)], alt='four greys').gif)
    assert (shown[0] == np.asarray(image_grid(x))).all() and (shown[1] == np.asarray(image_grid(x.flip(0)))).all()

@pytest.mark.parametrize('frames', [walk, lambda: torch.randn(30, 32, 3, 16, 16, generator=torch.Generator().manual_seed(0))])
def test_animation_is_small(frames): assert len(animate(frames(), alt='32 sprites, 30 frames').gif) < 300_000

def test_animation_needs_words():
    assert inspect.signature(animate).parameters['alt'].default is inspect.Parameter.empty
    for alt in ('', '  ', None):
        with pytest.raises(ValueError, match='alt is empty'): animate([images()], alt=alt)
    shown = animate([images()], alt='"quoted" & <b>bold</b>', width_px=99)._repr_html_()
    assert 'alt="&quot;quoted&quot; &amp; &lt;b&gt;bold&lt;/b&gt;"' in shown
    assert shown.count('<img src="data:image/gif;base64,') == 1 and 'image-rendering: pixelated' in shown and 'width: 99px' in shown
    assert 'prefers-reduced-motion' in shown

def test_animation_errors():
    with pytest.raises(ValueError, match='no frames'): animate(iter([]), alt='x')
    with pytest.raises(ValueError, match='differ in size'): animate([images(4), images(3)], alt='x')
    for fps in (0, 51, -3):
        with pytest.raises(ValueError, match='fps is'): animate([images()], alt='x', fps=fps)

# figures

def figures():
    step = lambda t, s: SimpleNamespace(t=t, s=s, xt=images(), xs=images(), pred=SimpleNamespace(x0=images()))
    yield show_images(images())
    yield denoising_strip([step(3, 2), step(2, 1), step(1, 0)])
    yield loss_curve([1., .5, .3], floor=.1)
    yield loss_curve({'a': [1., .5], 'b': [2., 1.]})
    yield quality_curve([1, 2], {'a': ([1, 2], [.1, .2]), 'b': (torch.tensor([3., 1.]), None)}, floor=.5)
    yield schedule_plot({'s': SimpleNamespace(alpha_bar=torch.linspace(1, .01, 11))})

def test_figures_are_figures_white_small_and_unknown_to_pyplot():
    import matplotlib.pyplot as plt
    usual = [f._repr_png_()[0] for f in figures()]
    with plt.style.context('dark_background'), warnings.catch_warnings():
        warnings.simplefilter('error')
        shown = [f for _ in range(5) for f in figures()]
        assert all(isinstance(f, Figure) for f in shown)
        assert plots.Plot(1, 1).get_facecolor() == (1, 1, 1, 1)
        for f, same in zip(shown, usual):
            png, size = f._repr_png_()
            assert png == same, 'a figure must not depend on the style that the reader has set'
            picture = np.asarray(Image.open(io.BytesIO(png)).convert('RGB'))
            assert (picture[0] == 255).all() and (picture[-1] == 255).all()
            assert tuple(side//2 for side in picture.shape[:2]) == (size['height'], size['width'])
            assert len(png) < 60_000
    assert plt.get_fignums() == []

def test_figures_do_not_change_the_readers_style():
    import matplotlib
    before = dict(matplotlib.rcParams)
    list(figures())
    assert dict(matplotlib.rcParams) == before

def test_image_figures_have_no_axes_and_sharp_pixels():
    fig = show_images(images(6), ncols=4)
    (ax,) = fig.axes
    assert not ax.axison
    assert ax.images[0].get_array().shape == (2*17 + 1, 4*17 + 1, 3) and ax.images[0].get_interpolation() == 'nearest'
    colours = np.unique(np.asarray(Image.open(io.BytesIO(fig._repr_png_()[0])).convert('RGB')).reshape(-1, 3), axis=0)
    allowed = {tuple(c) for c in np.asarray(image_grid(images(6), ncols=4)).reshape(-1, 3)}
    assert {tuple(c) for c in colours} <= allowed, 'no mixed colours between neighbouring pixels'

def test_titles_and_labels():
    per_image = show_images(images(6), ncols=3, titles=range(6), row_labels=['a', 'b']).axes[0]
    assert [t.get_text() for t in per_image.texts] == list('012345ab')
    per_column = show_images(images(6), ncols=3, titles=list('abc')).axes[0]
    assert per_column.images[0].get_array().shape[0] < per_image.images[0].get_array().shape[0], 'room above the first row only'
    for wrong in (dict(titles=['a']), dict(titles='abcdef'), dict(row_labels=list('abc'))):
        with pytest.raises(ValueError, match='holds . texts; expected'): show_images(images(6), ncols=3, **wrong)

def test_strip_follows_one_sample():
    x = images(40).view(8, 5, 3, 16, 16)
    steps = [SimpleNamespace(t=t, s=t-1, xt=x[8-t], xs=x[9-t] if t > 1 else x[0]*0, pred=SimpleNamespace(x0=-x[8-t]))
             for t in range(8, 0, -1)]
    ax = denoising_strip(iter(steps), which=(8, 3), sample=4).axes[0]
    assert [t.get_text() for t in ax.texts][:3] == ['t = 8', 't = 3', 't = 0']
    sheet = np.asarray(ax.images[0].get_array())
    places = [sheet[y:y+16, left:left+16] for y in (-34, -17) for left in (-51, -34, -17)]
    want = to_uint8(torch.stack([x[0, 4], x[5, 4], x[0, 4]*0, -x[0, 4], -x[5, 4], torch.ones(3, 16, 16)]))
    assert all((a == b).all() for a, b in zip(places, want))
    assert len(denoising_strip(steps).axes[0].texts) == 8 + 2
    assert len(denoising_strip(steps[:2], n_columns=20).axes[0].texts) == 3 + 2, 'no step is shown twice'

def test_lines_differ_in_more_than_colour():
    many = {str(i): ([i, i], [0, 0]) for i in range(len(PALETTE))}
    lines = quality_curve([1, 2], many).axes[0].lines[:3*len(many):3]
    assert len({line.get_marker() for line in lines}) == len({line.get_color() for line in lines}) == len(PALETTE)
    assert len({str(line) for line in plots._LINES}) == len(PALETTE) and '--' not in plots._LINES, 'dashed lines are floors'
    for plot in (lambda d: quality_curve([1, 2], d), loss_curve, schedule_plot):
        with pytest.raises(ValueError, match='lines; expected at most'): plot({**many, 'one more': ([1, 1], None)})

def test_loss_curve_smooths_by_hand():
    y = np.random.default_rng(0).random(120)
    want = [y[max(0, i - 49):i + 1].mean() for i in range(120)]
    np.testing.assert_allclose(loss_curve(y).axes[0].lines[1].get_ydata(), want)
    assert loss_curve(y).axes[0].get_yscale() == 'log'

def test_plots_stands_alone():
    tree = ast.parse(Path(plots.__file__).read_text())
    names = {a.name.split('.')[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {'.' if n.level else n.module.split('.')[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert names - set(sys.stdlib_module_names) == {'numpy', 'torch', 'matplotlib', 'PIL', '.'}
    ours = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level}
    assert ours == {'disk'}, 'how files are written, and nothing of networks and samplers'

@pytest.mark.parametrize('first', ['pass', 'import matplotlib.pyplot as plt', '%matplotlib inline'])
def test_a_jupyter_kernel_shows_a_figure_once(tmp_path, monkeypatch, first):
    "execnb, the other runner, is tested in test_run_lessons.py"
    cells = [first, 'import torch\nfrom diffusion_course.plots import *\nx = torch.zeros(2, 3, 16, 16)',
             'show_images(x)', 'loss_curve([1., 2.])', 'show_images(x);', 'fig = show_images(x)', 'fig', 'animate([x, x - 1], alt="grey")',
             'for _ in range(25): show_images(x)']
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    monkeypatch.setenv('PYTHONPATH', str(ROOT)); monkeypatch.setenv('OMP_NUM_THREADS', '1')
    outs = [c.outputs for c in NotebookClient(nb, resources={'metadata': {'path': tmp_path}}).execute().cells]
    assert [len(o) for o in outs[2:]] == [1, 1, 0, 0, 1, 1, 0]
    assert all('image/png' in outs[i][0].data for i in (2, 3, 6)) and 'text/html' in outs[7][0].data
