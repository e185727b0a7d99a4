"""Execute notebooks top to bottom with nbdev's own runner, each in a fresh process and in its own folder, and store tidy outputs.
Several at a time share the processor's cores: two single-threaded notebooks use two cores better than two threads of one do.
A notebook that fails, or that shows where this repository lies on this machine, is named and left as it was; the exit code is then 1."""
import argparse, base64, io, json, multiprocessing, os, re, sys, time
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE') # before torch is imported: waiting threads give their core to other programs
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
import numpy as np
from execnb.shell import CaptureShell, read_nb, write_nb
from nbdev.config import get_config
from PIL import Image
ROOT, WIDGET = Path(__file__).resolve().parents[1], 'application/vnd.jupyter.widget-view+json'
sys.path.insert(0, str(ROOT))
def cores(): return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
def skip(source, flags): return 'nbdev_export(' in source or re.search(rf'^#\| *(eval: *false|{flags})\b', source, re.M)
def as_terminal(text):
    "What a terminal shows in the end: a progress bar that rewrote its line leaves the last state only"
    rows, row, col = [''], 0, 0
    for token in re.findall('\x1b\\[\\d*[AK]|[\r\n]|[^\r\n\x1b]+|\x1b', text):
        if token=='\n': row, col = row+1, 0; rows += ['']*(row==len(rows))
        elif token=='\r': col = 0
        elif token[:2]=='\x1b[' and token[-1]=='A': row = max(0, row - int(token[2:-1] or 1))
        elif token[:2]=='\x1b[' and token[-1]=='K': rows[row] = rows[row][:col] if token[2:-1] in ('','0') else ''
        else: rows[row], col = rows[row][:col].ljust(col) + token + rows[row][col+len(token):], col+len(token)
    return '\n'.join(r.rstrip() for r in rows)
def slim(png):
    "The same picture in fewer bytes: in 256 colours where that is hardly a change, as in charts, which are lines and text"
    image, data = Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB'), io.BytesIO()
    few = image.quantize(256, dither=Image.Dither.NONE)
    changed = np.abs(np.asarray(few.convert('RGB'), dtype=int) - np.asarray(image)).max(-1) > 24
    (few if changed.mean() < 1e-3 else image).save(data, 'PNG', optimize=True)
    return base64.b64encode(data.getvalue()).decode()
def tidy(outputs):
    "Merge neighbouring streams, collapse progress bars, replace live widgets by their still pictures, slim pictures"
    res = []
    for o in outputs:
        widget = o.get('data', {}).pop(WIDGET, None)
        if o['output_type']=='stream' and res and res[-1].get('name')==o['name']: res[-1]['text'] += o['text']
        elif widget is None or {'image/png','text/html'} & o['data'].keys(): res.append(o)
    for o in res:
        if o['output_type']=='stream': o['text'] = as_terminal(''.join(o['text'])).splitlines(True)
        if 'image/png' in o.get('data', {}): o['data']['image/png'] = slim(o['data']['image/png'])
    return [o for o in res if o['output_type']!='stream' or ''.join(o['text']).strip()]
def shows_root(outputs):
    text = json.dumps([{**o, 'data': {k:v for k,v in o.get('data',{}).items() if not k.startswith('image/')}} for o in outputs])
    return re.search(re.escape(str(ROOT)) + r'(?!\w)', re.sub(r'base64,[\w+/=]+', '', text)) # encoded bytes may spell anything
def run(path, out, place, progress):
    "Execute one notebook; None, or a text that says what went wrong where"
    path, out, start, end = Path(path).resolve(), out and Path(out).resolve(), time.time(), '\x1b[K\r' if sys.stderr.isatty() else '\n'
    nb, flags = read_nb(path), '|'.join(get_config(path=ROOT).tst_flags.split())
    cells = [c for c in nb.cells if c.cell_type=='code' and not skip(c.source, flags)]
    os.chdir(path.parent); shell = CaptureShell(path)
    for j, c in enumerate(cells, 1):
        if progress: print(f'notebook {place} {path.name}: cell {j}/{len(cells)}, {time.time()-start:.0f} s', end=end, file=sys.stderr, flush=True)
        c.outputs = []; shell.cell(c); where = f'{path.name}, cell {c.idx_+1} (code cell {j}/{len(cells)})'
        if shell.exc:
            return '\n'.join([f'{where}: {type(shell.exc).__name__}: {shell.exc}', c.source, *(t for o in c.outputs for t in o.get('traceback', []))])
        c.outputs = tidy(c.outputs)
        if shows_root(c.outputs): return f'{where}: an output contains the path of the repository, {ROOT}\n{c.source}'
    nb.metadata.pop('widgets', None)
    dest = path if out is None else out/(path.relative_to(ROOT/'nbs') if path.is_relative_to(ROOT/'nbs') else path.name)
    dest.parent.mkdir(parents=True, exist_ok=True); temporary = dest.with_name(f'.{dest.name}.{os.getpid()}.tmp')
    try: write_nb(nb, temporary); os.replace(temporary, dest)
    finally: temporary.unlink(missing_ok=True)
if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__); p.add_argument('notebooks', nargs='+')
    p.add_argument('--out', help='folder for the executed copies; without it the notebooks themselves are updated')
    p.add_argument('--progress', action='store_true', help='say on stderr which cell is running')
    p.add_argument('--workers', type=int, default=1, help='how many notebooks at a time'); a = p.parse_args()
    if a.workers > 1: os.environ.setdefault('OMP_NUM_THREADS', str(max(1, cores() // a.workers))) # torch reads it when a notebook imports it
    n, fresh = len(a.notebooks), dict(max_workers=a.workers, max_tasks_per_child=1, mp_context=multiprocessing.get_context('spawn'))
    with ProcessPoolExecutor(**fresh) as pool: # one notebook per process: no seed, import or setting leaks into the next
        errors = list(filter(None, pool.map(run, a.notebooks, [a.out]*n, [f'{i+1}/{n}' for i in range(n)], [a.progress]*n)))
    if errors: sys.exit('\n'.join(errors))
