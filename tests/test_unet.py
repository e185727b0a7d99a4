"Guards for the network: determinism, conditioning of every block, sizes, errors; and the benchmarks' labs network."
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from diffusion_course.unet import PREDICTIONS, ContextUnet, ResBlock, block_shapes, sinusoidal_embedding

ROOT = Path(__file__).parents[1]


def randomised(net, seed=0):
    "No parameter stays zero: a zero-initialised layer would hide whatever comes before it."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters(): p.normal_(std=0.1, generator=generator)
    return net.eval()


def inputs(n=4, channels=3, h=16, w=16, n_context=5):
    g = torch.Generator().manual_seed(1)
    return (torch.randn(n, channels, h, w, generator=g), torch.randint(0, 501, (n,), generator=g),
            torch.rand(n, n_context, generator=g))


def relative(a, b): return ((a - b).norm() / a.norm()).item()


@pytest.fixture(scope="module")
def net(): return randomised(ContextUnet()).requires_grad_(False)


# --- the same in, the same out ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_same_input_twice(mode):
    net = randomised(ContextUnet()).train(mode)
    assert_close(net(*inputs()), net(*inputs()), rtol=0, atol=0)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_an_image_does_not_depend_on_its_batch(mode):
    net = randomised(ContextUnet()).train(mode)
    x, t, context = inputs(6)
    x[3:] *= 5                                              # neighbours of another size: a batch statistic would notice
    together = net(x, t, context)
    for i in range(6):
        alone = net(x[i:i+1], t[i:i+1], context[i:i+1])[0]
        assert_close(alone, together[i], rtol=1e-4, atol=1e-5 * together.abs().max().item())


def test_construction_is_reproducible():
    def make(): torch.manual_seed(3); return ContextUnet().state_dict()
    for (k, a), b in zip(make().items(), make().values()): assert_close(a, b, rtol=0, atol=0, msg=k)


def test_forward_draws_no_random_numbers(net):
    before = torch.get_rng_state()
    net(*inputs())
    assert torch.equal(before, torch.get_rng_state())


def test_inputs_stay_untouched(net):
    given, kept = inputs(), inputs()
    net(*given)
    for a, b in zip(given, kept): assert_close(a, b, rtol=0, atol=0)


# --- parameters ------------------------------------------------------------------------------------------------------

def test_number_of_parameters():
    assert 1.0e6 < sum(p.numel() for p in ContextUnet().parameters()) < 1.5e6


def test_every_parameter_is_trained_and_saved():
    net = randomised(ContextUnet()).train()
    net(*inputs()).square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, f"{name} receives no gradient"
    # all state is parameters: nothing is left out of a saved model, and an EMA has no buffers to average
    assert set(dict(net.named_parameters())) == set(net.state_dict())


def test_untrained_network_answers_zero_and_can_leave_it():
    torch.manual_seed(0)
    net, (x, t, context) = ContextUnet(), inputs()
    assert_close(net(x, t, context), torch.zeros_like(x), rtol=0, atol=0)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = (net(x, t, context) - x).square().mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_weights_rebuild_the_network(net):
    again = ContextUnet(**net.config).eval()
    again.load_state_dict(net.state_dict())
    assert_close(again(*inputs()), net(*inputs()), rtol=0, atol=0)


@pytest.mark.parametrize("config", [{}, dict(in_channels=1, n_feat=16, n_context=0, predicts="v"), dict(predicts="x0"), dict(depth=3)])
def test_config_round_trip(config):
    net = ContextUnet(**config)
    plain = json.loads(json.dumps(net.config))
    assert plain == net.config == {**dict(in_channels=3, n_feat=32, n_context=5, predicts="eps", depth=2), **config}
    again = ContextUnet(**plain)
    assert again.config == net.config and again.predicts == net.predicts == plain["predicts"]
    shapes = lambda n: {k: v.shape for k, v in n.state_dict().items()}
    assert shapes(again) == shapes(net)


# --- time and context ------------------------------------------------------------------------------------------------

BLOCKS = [name for name, part in ContextUnet().named_children() if isinstance(part, ResBlock)]


def test_all_blocks_are_known():
    assert len(BLOCKS) == 7 == sum(isinstance(m, ResBlock) for m in ContextUnet().modules())


def received(net, name, *args):
    "(features, condition) that reach block `name`, and its output."
    seen = []
    hook = getattr(net, name).register_forward_hook(lambda module, inputs, output: seen.append((*inputs, output)))
    net(*args)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("what", ["time", "context"])
def test_condition_reaches_block(net, name, what):
    "The features are held fixed, so that a change in an earlier block cannot pass for conditioning of this one."
    x, t, context = inputs()
    features, _, output = received(net, name, x, t, context)
    other = (x, t + 40, context) if what == "time" else (x, t, context.roll(1, dims=1))
    _, cond, changed = received(net, name, *other)
    moved = getattr(net, name)(features, cond) - output
    assert (moved.flatten(1).norm(dim=1) > 1e-3 * output.flatten(1).norm(dim=1)).all(), "each image must move"
    assert relative(output, changed) > 1e-3


def test_each_image_has_its_own_time_and_context(net):
    x, t, context = inputs()
    base = net(x, t, context)
    later, other = t.clone(), context.clone()
    later[2] += 40; other[2] = other[2].roll(1)
    for changed in (net(x, later, context), net(x, t, other)):
        moved = (changed - base).flatten(1).norm(dim=1) > 1e-3
        assert moved.tolist() == [False, False, True, False]


def test_neighbouring_times_differ(net):
    x, _, context = inputs(1)
    outputs = torch.stack([net(x, torch.tensor([t]), context) for t in (0, 1, 2, 250, 251, 499, 500)])
    distance = torch.cdist(outputs.flatten(1), outputs.flatten(1)) + torch.eye(len(outputs)) * 1e9
    assert distance.min() > 1e-2


def test_no_context_is_a_context_of_zeros(net):
    x, t, context = inputs()
    assert_close(net(x, t), net(x, t, torch.zeros(4, 5)), rtol=0, atol=0)
    assert relative(net(x, t), net(x, t, context)) > 1e-3


def test_condition_against_the_formula(net):
    _, t, context = inputs()
    mlp, w = net.time_embedding, net.context_embedding.weight
    want = nn.functional.silu(mlp(sinusoidal_embedding(t, 128)) + context @ w.T)
    assert_close(net.condition(t, context), want)
    assert_close(net.condition(t, None), nn.functional.silu(mlp(sinusoidal_embedding(t, 128))))


@pytest.mark.parametrize("up,down,grow", [("up1", "down1", "grow1"), ("up2", "down2", "grow2")])
def test_skip_connections(net, up, down, grow):
    "An up block receives what has grown from below, and beside it what the down block of its resolution saw."
    from_below, skipped = received(net, up, *inputs())[0].chunk(2, dim=1)
    assert_close(skipped, received(net, down, *inputs())[-1], rtol=0, atol=0)
    assert_close(from_below, received(net, grow, *inputs())[-1], rtol=0, atol=0)


def test_unconditional_network():
    net = randomised(ContextUnet(n_context=0))
    x, t, _ = inputs()
    assert_close(net(x, t), net(x, t, torch.zeros(4, 0)), rtol=0, atol=0)
    assert not any("context" in name for name in net.state_dict())
    with pytest.raises(ValueError, match=r"expected \(4, 0\)"): net(x, t, torch.zeros(4, 5))


def test_sinusoidal_embedding_against_the_formula():
    import math
    e = sinusoidal_embedding(torch.tensor([0, 7, 500]), 8)
    want = [[f(t * 10_000 ** (-k / 4)) for f in (math.sin, math.cos) for k in range(4)] for t in (0, 7, 500)]
    assert_close(e, torch.tensor(want), rtol=0, atol=1e-4)
    for dim in (0, 1, 7):
        with pytest.raises(ValueError, match="even"): sinusoidal_embedding(torch.tensor([1]), dim)


def test_res_block_against_the_formula():
    block = randomised(ResBlock(8, 16, 4))
    x, cond = torch.randn(2, 8, 4, 4), torch.randn(2, 4)
    h = block.conv1(nn.functional.silu(block.norm1(x)))
    scale, shift = block.scale_shift(cond).reshape(2, 2, 16, 1, 1).unbind(1)
    h = block.conv2(nn.functional.silu(block.norm2(h) * (1 + scale) + shift))
    assert_close(block(x, cond), block.shortcut(x) + h)


# --- sizes and types -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("h,w", [(s, s) for s in (4, 8, 12, 16, 20, 32, 64)] + [(8, 16), (20, 12), (4, 64)])
def test_sizes(net, h, w):
    out = net(*inputs(2, h=h, w=w))
    assert out.shape == (2, 3, h, w) and out.isfinite().all()


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_channels(channels):
    assert randomised(ContextUnet(in_channels=channels))(*inputs(channels=channels)).shape == (4, channels, 16, 16)


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_predicts(predicts): assert ContextUnet(predicts=predicts).predicts == predicts


def test_other_layouts_and_types(net):
    x, t, context = inputs()
    want = net(x, t, context)
    close = dict(rtol=1e-3, atol=1e-4 * want.abs().max().item())
    assert_close(net(x.to(memory_format=torch.channels_last), t, context), want, **close)
    assert_close(net(x, t.int(), context.double()), want, **close)
    double = randomised(ContextUnet()).double()
    double.load_state_dict(net.state_dict())
    assert_close(double(x.double(), t, context).float(), want, **close)
    with torch.autocast("cpu", torch.bfloat16): half = net(x, t, context)
    assert relative(want, half.float()) < 0.05


def test_block_shapes_lists_every_part_in_order_and_leaves_no_hook(net):
    shapes = block_shapes(net, *inputs(2, h=16, w=32))
    assert [name for name, _ in shapes] == [name for name, _ in net.named_children()]
    assert dict(shapes)["down1"] == (2, 32, 16, 32) and dict(shapes)["middle3"] == (2, 128, 4, 8)
    assert shapes[-1] == ("out", (2, 3, 16, 32))
    with pytest.raises(ValueError): block_shapes(net, torch.randn(2, 3, 10, 10), torch.tensor([1, 2]))
    assert not any(m._forward_hooks for m in net.modules())


# --- errors: what was given, what was expected, what to do -----------------------------------------------------------

@pytest.mark.parametrize("h,w", [(10, 16), (16, 10), (1, 1), (2, 2), (6, 6), (15, 15), (0, 16), (28, 30)])
def test_other_sizes_are_refused(net, h, w):
    with pytest.raises(ValueError, match=rf"{h} x {w}.*multiples of 4.*[Pp]ad or crop"):
        net(torch.zeros(2, 3, h, w), torch.tensor([1, 2]))


X, T, C = inputs()
REFUSED = {
    "x without batch": ((X[0], T, C), ValueError, r"\(3, 16, 16\).*\(n, 3, height, width\)"),
    "x with other channels": ((X[:, :1], T, C), ValueError, r"\(4, 1, 16, 16\).*\(n, 3, height, width\)"),
    "x channels last": ((X.permute(0, 2, 3, 1), T, C), ValueError, r"\(4, 16, 16, 3\)"),
    "x bytes": ((X.byte(), T, C), TypeError, r"uint8.*127\.5"),
    "x in doubles": ((X.double(), T, C), TypeError, r"float64.*weights are torch.float32.*x\.to\(torch.float32\)"),
    "x in halves": ((X.half(), T, C), TypeError, r"float16.*weights are torch.float32"),
    "x on another device": ((X.to("meta"), T, C), ValueError, r"x is on meta, the network on cpu.*x\.to\('cpu'\)"),
    "t on another device": ((X, T.to("meta"), C), ValueError, "t is on meta"),
    "context on another device": ((X, T, C.to("meta")), ValueError, "context is on meta"),
    "x numpy": ((X.numpy(), T, C), TypeError, "ndarray"),
    "x None": ((None, T, C), TypeError, "NoneType"),
    "t int": ((X, 20, C), TypeError, r"int 20.*torch\.full.*predictor"),
    "t float tensor": ((X, T / 500, C), TypeError, r"float32.*not fractions"),
    "t bool": ((X, T > 3, C), TypeError, "bool"),
    "t None": ((X, None, C), TypeError, "NoneType"),
    "t scalar tensor": ((X, T[0], C), ValueError, r"\(\).*\(4,\)"),
    "t one for all": ((X, T[:1], C), ValueError, r"\(1,\).*\(4,\)"),
    "t too many": ((X, torch.cat([T, T]), C), ValueError, r"\(8,\).*\(4,\)"),
    "t column": ((X, T[:, None], C), ValueError, r"\(4, 1\).*\(4,\)"),
    "context labels": ((X, T, torch.tensor([0, 1, 2, 3])), TypeError, r"int64.*one_hot"),
    "context integer rows": ((X, T, C.long()), TypeError, r"int64.*one_hot"),
    "context name": ((X, T, "hero"), TypeError, r"str 'hero'.*one_hot"),
    "context float labels": ((X, T, torch.tensor([0., 1., 2., 3.])), ValueError, r"\(4,\).*\(4, 5\).*one_hot"),
    "context other batch": ((X, T, C[:1]), ValueError, r"\(1, 5\).*\(4, 5\)"),
    "context other width": ((X, T, C[:, :4]), ValueError, r"\(4, 4\).*\(4, 5\)"),
    "context one vector": ((X, T, C[0]), ValueError, r"\(5,\).*\(4, 5\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_inputs_that_do_not_fit(net, case):
    args, error, message = REFUSED[case]
    with pytest.raises(error, match=message): net(*args)


def test_doubles_under_autocast(net):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="float64"): net(X.double(), T, C)


@pytest.mark.parametrize("config,error,message", [
    (dict(in_channels=0), ValueError, "in_channels is 0.*at least 1"),
    (dict(n_feat=20), ValueError, "n_feat is 20.*multiple of 8"),
    (dict(n_feat=0), ValueError, "n_feat is 0"), (dict(n_context=-1), ValueError, "n_context is -1"),
    (dict(n_feat=32.0), TypeError, "n_feat must be an int"),
    (dict(n_context=True), TypeError, "n_context must be an int"),
    (dict(predicts="noise"), ValueError, "'noise'.*eps, x0, v"), (dict(predicts=None), ValueError, "None.*eps, x0, v"),
])
def test_constructor_arguments_that_do_not_fit(config, error, message):
    with pytest.raises(error, match=message): ContextUnet(**config)


# --- the labs' network, rewritten for benchmarks and failure demos ---------------------------------------------------

@pytest.fixture(scope="module")
def LabsUnet():
    spec = importlib.util.spec_from_file_location("labs_unet", ROOT / "benchmarks" / "labs_unet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LabsUnet


def test_labs_network_has_the_size_of_the_original(LabsUnet):
    count = lambda net: sum(p.numel() for p in net.parameters())
    assert count(LabsUnet()) == 1_480_771
    assert count(LabsUnet(shortcut="learned")) == 1_480_771 + 3 * 64 + 64
    with pytest.raises(ValueError, match="'random'.*'learned'"): LabsUnet(shortcut="fixed")


def test_labs_shortcut_is_random_and_the_repaired_one_is_not(LabsUnet):
    def twice(shortcut):
        torch.manual_seed(0)
        net = LabsUnet(shortcut=shortcut).eval()
        with torch.no_grad(): return relative(net(*inputs(32)), net(*inputs(32)))
    assert 0.9 < twice("random") < 1.5                                  # about 1.2: hardly related
    assert twice("learned") == 0


# ---- depth: how often an image is halved

@pytest.mark.parametrize("depth,size", [(1, 16), (2, 16), (3, 32), (4, 64)])
def test_each_halving_is_one_more_resolution_down_to_four_pixels(depth, size):
    net = randomised(ContextUnet(n_feat=8, depth=depth))
    x = torch.randn(1, 3, size, size)
    shapes = dict(block_shapes(net, x, torch.tensor([7])))
    for k in range(1, depth + 1):
        assert shapes[f"down{k}"] == shapes[f"up{k}"], "a skip connection joins maps of one shape"
        assert shapes[f"down{k}"][2] == size // 2 ** (k - 1)
    assert shapes["middle3"] == (1, 16 if depth == 1 else 32, size // 2**depth, size // 2**depth)
    assert net(x, torch.tensor([7])).shape == x.shape


def test_every_resolution_matters_for_the_answer():
    net, x, t = randomised(ContextUnet(n_feat=8, depth=3)), torch.randn(1, 3, 32, 32), torch.tensor([7])
    before = net(x, t)
    for k in (1, 2, 3):
        for name in (f"down{k}", f"up{k}"):
            with torch.no_grad(): getattr(net, name).conv2.weight.mul_(2)
            after = net(x, t)
            assert (after - before).abs().max() > 1e-4, f"{name} is not used"
            before = after


def test_a_model_saved_before_depth_existed_is_a_network_of_depth_two():
    config = {k: v for k, v in ContextUnet().config.items() if k != "depth"}
    assert ContextUnet(**config).config["depth"] == 2


@pytest.mark.parametrize("depth,error", [(0, ValueError), (7, ValueError), (2.0, TypeError), (True, TypeError)])
def test_a_depth_that_cannot_be_is_refused_by_name(depth, error):
    with pytest.raises(error, match="depth"): ContextUnet(depth=depth)
