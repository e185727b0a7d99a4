"""A second device that needs no hardware: tensors that live on this CPU, call themselves "mps" and behave as on a GPU.

Inside `with StandIn() as device:` a tensor moved to "mps" keeps its numbers in `inner`. Mixing it with tensors of the CPU raises, as real
devices do (single numbers excepted), float64 is refused, as MPS does, and the traffic is counted: `device.reads` (the host waits for a
value) and `device.sent` (a tensor goes to the device)."""
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

NAME, aten = torch.device("mps:0"), torch.ops.aten


class OnDevice(torch.Tensor):
    "A tensor on the stand-in. To PyTorch's C++ it is a meta tensor: of all devices without numbers, autograd knows that one."

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        if inner.dtype in (torch.float64, torch.complex128): raise TypeError("the stand-in device has no float64")
        self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
                                                   dtype=inner.dtype, device="meta", requires_grad=requires_grad)
        self.inner = inner
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: NAME)
    is_meta = property(lambda self: False)
    def __repr__(self): return f"OnDevice({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on the stand-in device, outside its `with StandIn():`")


class StandIn(TorchDispatchMode):
    "The device itself: inside `with StandIn():` its tensors exist."
    def __init__(self):
        super().__init__()
        self.reads = self.sent = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        here, outside = ([x for x in given if isinstance(x, OnDevice) == there] for there in (True, False))
        target = kwargs.pop("device", None)
        if target is not None: target = torch.device(target)
        arrives = bool(here) if target is None else target.type in (NAME.type, "meta")
        if target is not None and target.type == "cpu": kwargs["device"] = target

        if func in (aten._to_copy.default, aten.copy_.default): # the only operations that cross over
            if func is aten.copy_.default: arrives = isinstance(args[0], OnDevice)
            self.sent += bool(arrives and outside)
            self.reads += bool(here and not arrives)
        elif here and any(x.ndim for x in outside):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found some on {NAME} and some on cpu")
        elif func in (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.is_nonzero.default):
            self.reads += bool(here)

        out = func(*tree_map_only(OnDevice, lambda x: x.inner, args), **tree_map_only(OnDevice, lambda x: x.inner, kwargs))
        if not arrives: return out
        known = {id(x.inner): x for x in here} # what an operation changed in place keeps its wrapper
        return tree_map_only(torch.Tensor, lambda x: known.get(id(x)) if id(x) in known else OnDevice(x), out)
