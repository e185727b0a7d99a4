"Mistakes put into the running modules: the code of a function is exchanged in place, so that whoever imported it calls the wrong one."
import inspect
from functools import cache
from types import CodeType


def functions(module):
    "{qualified name: function} of all that a module defines, also inside properties, class methods and caches."
    found = {}
    def take(x):
        for f in (x, *(getattr(x, part, None) for part in ("fget", "func", "__func__", "__wrapped__"))):
            if inspect.isfunction(f) and f.__code__.co_filename == module.__file__: found[f.__code__.co_qualname] = f
    for x in vars(module).values():
        take(x)
        for y in vars(x).values() if inspect.isclass(x) and x.__module__ == module.__name__ else (): take(y)
    return found


def codes(code):
    "{qualified name: code} of what is defined at the top of a module and in its classes."
    found = {}
    for part in (c for c in code.co_consts if isinstance(c, CodeType)):
        found[part.co_qualname] = part
        found |= {name: c for name, c in codes(part).items() if "<locals>" not in name}
    return found


@cache
def source(module): return inspect.getsource(module)


def plant(module, right, wrong):
    "Exchange `right`, which stands once in the source of a module, for `wrong`. ValueError where that reaches no function."
    text = source(module)
    if text.count(right) != 1 or right.count("\n") != wrong.count("\n"):
        raise ValueError(f"{module.__name__}: {right!r} stands there {text.count(right)} times")
    before, after = (codes(compile(t, module.__file__, "exec")) for t in (text, text.replace(right, wrong)))
    changed = {name: after.get(name) for name in before if before[name] != after.get(name)}
    reached = functions(module).keys() & changed.keys()
    if not reached: raise ValueError(f"{module.__name__}: {right!r} stands in no function")
    for name in reached: functions(module)[name].__code__ = changed[name]
