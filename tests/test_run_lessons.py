"tools/run_lessons.py on tiny notebooks: what it stores, and that it stores nothing when something is wrong."
import base64, importlib.util, io, json, os, subprocess, sys
from pathlib import Path
import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT/'tools/run_lessons.py'
spec = importlib.util.spec_from_file_location('run_lessons', SCRIPT)
run_lessons = importlib.util.module_from_spec(spec); spec.loader.exec_module(run_lessons)

def write(path, *sources, metadata=None):
    cells = [new_markdown_cell('# Tiny')] + [new_code_cell(s) for s in sources]
    nbformat.write(new_notebook(cells=cells, metadata=metadata or {}), path)
    return path

def execute(*args, cwd=ROOT):
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True)

def outputs(path): return [c['outputs'] for c in nbformat.read(path, 4).cells if c.cell_type == 'code']
def text(outs): return ''.join(o['text'] for o in outs if o.output_type == 'stream')
def figures(outs): return sum('image/png' in o.get('data', {}) for o in outs)

IMAGES = 'import torch\nfrom diffusion_course.plots import *\nimages = torch.zeros(2, 3, 16, 16)'

@pytest.fixture(scope='module')
def executed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('nb')
    (folder/'neighbour.txt').write_text('found beside the notebook')
    path = write(folder/'tiny.ipynb',
        IMAGES,
        'show_images(images)',
        'show_images(images);',
        'kept = show_images(images)',
        'from tqdm import tqdm\nimport sys\nfor _ in tqdm(range(50), file=sys.stdout, mininterval=0): pass',
        'for _ in tqdm(range(50), file=sys.stdout, leave=False, mininterval=0): pass',
        'import ipywidgets\nipywidgets.IntSlider()',
        'print(open("neighbour.txt").read())',
        '#| notest\nraise RuntimeError("must be skipped")',
        '1',
        '1',
        'animate([images, images - 1], alt="nothing")',
        'pass',
        metadata=dict(widgets={'application/vnd.jupyter.widget-state+json': {}}))
    nb = nbformat.read(path, 4)
    nb.cells[-1].outputs = [nbformat.v4.new_output('stream', text='stale')]   # what an earlier run left
    nbformat.write(nb, path)
    before = path.read_bytes()
    result = execute(path, '--out', folder/'out', '--progress')
    assert result.returncode == 0, result.stderr
    assert path.read_bytes() == before, '--out must not touch the notebook itself'
    return result, folder/'out/tiny.ipynb'

def test_a_figure_is_stored_once_and_only_where_it_is_the_last_expression(executed):
    outs = outputs(executed[1])
    assert [len(o) for o in outs[1:4]] == [1, 0, 0]
    assert figures(outs[1]) == 1

def test_a_progress_bar_leaves_its_last_state_only(executed):
    outs = outputs(executed[1])
    assert '\r' not in text(outs[4]) and text(outs[4]).count('it/s') == 1 and '50/50' in text(outs[4])
    assert outs[5] == [], 'a bar that cleans up after itself leaves nothing'

def test_no_live_widgets(executed):
    assert outputs(executed[1])[6] == []
    assert 'widget' not in json.dumps(nbformat.read(executed[1], 4).metadata)

def test_runs_in_the_notebooks_folder_and_skips_flagged_cells(executed):
    outs = outputs(executed[1])
    assert text(outs[7]) == 'found beside the notebook\n'
    assert outs[8] == []

def test_animation_and_stale_outputs(executed):
    outs = outputs(executed[1])
    assert outs[11][0].data['text/html'].count('<img ') == 1
    assert outs[12] == [], 'outputs of an earlier run must not survive'

def test_progress_goes_to_stderr(executed):
    result, _ = executed
    assert 'notebook 1/1 tiny.ipynb: cell 2/12' in result.stderr and not result.stdout

def test_a_failing_cell_is_named_and_the_others_still_run(tmp_path):
    bad = write(tmp_path/'bad.ipynb', 'x = 1', *['x += 1; 1/(3 - x)']*2)       # the same cell twice: the second fails
    good = write(tmp_path/'good.ipynb', 'print("x" in globals())')
    before = bad.read_bytes()
    result = execute(bad, good, '--workers', 2)                                  # side by side
    assert result.returncode == 1
    assert 'bad.ipynb, cell 4 (code cell 3/3): ZeroDivisionError: division by zero' in result.stderr and '1/(3 - x)' in result.stderr
    assert bad.read_bytes() == before
    assert text(outputs(good)[0]) == 'False\n', 'every notebook starts in a fresh process'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['bad.ipynb', 'good.ipynb'], 'no temporary files stay'

@pytest.mark.parametrize('source', [f'print({str(ROOT)!r})', f'{str(ROOT/"nbs")!r}'])
def test_paths_of_this_machine_are_refused(tmp_path, source):
    path = write(tmp_path/'path.ipynb', source)
    before = path.read_bytes()
    result = execute(path)
    assert result.returncode == 1 and 'path.ipynb, cell 2' in result.stderr and 'path of the repository' in result.stderr
    assert path.read_bytes() == before

def test_encoded_images_may_spell_anything():
    html = dict(output_type='execute_result', data={'text/html': [f'<img src="data:image/gif;base64,abc{ROOT}/xyz">'], 'image/png': str(ROOT)})
    assert not run_lessons.shows_root([html])

@pytest.mark.parametrize('written,shown', [
    ('plain\ntext\n', 'plain\ntext\n'),
    ('1%\r50%\r100%\ndone\n', '100%\ndone\n'),
    ('a longer line\rshort\n', 'shortger line\n'),          # a terminal overwrites, it does not clear
    ('gone\r\x1b[Knew\n', 'new\n'),
    ('one\ntwo\x1b[A\rONE\n', 'ONE\ntwo'),                   # nested bars move the cursor up
    ('windows\r\nline\r\n', 'windows\nline\n')])
def test_as_terminal(written, shown): assert run_lessons.as_terminal(written) == shown

def test_a_widget_keeps_its_still_picture():
    def out(**data): return dict(output_type='display_data', data={run_lessons.WIDGET: {}, 'text/plain': 'slider', **data})
    kept = run_lessons.tidy([out(), out(**{'text/html': '<img>'})])
    assert [list(o['data']) for o in kept] == [['text/plain', 'text/html']]

def test_neighbouring_streams_are_merged():
    def stream(s, name='stdout'): return dict(output_type='stream', name=name, text=[s])
    kept = run_lessons.tidy([stream('1%'), stream('\r2%\n'), stream('oh\n', 'stderr'), stream('  \n')])
    assert [(o['name'], ''.join(o['text'])) for o in kept] == [('stdout', '2%\n'), ('stderr', 'oh\n')]

def test_pictures_are_slimmed_where_nothing_is_lost():
    def png(pixels):
        data = io.BytesIO(); Image.fromarray(pixels).save(data, 'PNG', compress_level=0)
        return base64.b64encode(data.getvalue()).decode()
    def back(png): return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB'))
    chart = np.full((200, 200, 4), 255, np.uint8)
    chart[50:60, :, :3] = np.linspace(0, 255, 200).astype(np.uint8)[:, None] # a line in 200 greys
    sprites = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    kept = run_lessons.tidy([dict(output_type='display_data', data={'image/png': png(p)}) for p in (chart, sprites)])
    slim_chart, slim_sprites = (o['data']['image/png'] for o in kept)
    assert Image.open(io.BytesIO(base64.b64decode(slim_chart))).mode == 'P' and len(slim_chart) < len(png(chart)) / 10
    assert np.abs(back(slim_chart).astype(int) - chart[..., :3]).max() <= 2
    np.testing.assert_array_equal(back(slim_sprites), sprites) # 40,000 colours: not one is changed
