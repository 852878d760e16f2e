"""A stand-in for a GPU: it says `cuda`, computes on the CPU, and tells what a real one would have punished.

A tensor of it is a subclass whose values lie in a CPU tensor, so a text that is written with it is the right text.
What runs on it obeys a GPU's rules (PyTorch, "CUDA semantics"):

    an operation of a tensor here and one on the host      raises, but for numbers (tensors without dimensions)
    the host asks for a value, or for a shape that         raises `HiddenWait`: `.item()`, `.tolist()`, `bool()`,
      depends on values, or copies and waits               `nonzero`, a copy that is not `non_blocking`
    a copy to page-locked memory                           has arrived when an event after it was waited for; before
                                                           that the memory holds nonsense
    a copy from page-locked memory                         reads it at any time until then: a write to it raises

Inside `with gpu.may_wait():` waits are counted in `gpu.allowed` instead. Recorded graphs are not part of it:
`static_shapes.Capture` has stand-ins of its own.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = torch.device("cuda:0")
NONSENSE = -(1 << 40)
ASKS = {"_local_scalar_dense", "is_nonzero", "equal", "allclose", "item", "multinomial"}  # for a value
SHAPES = {"nonzero", "masked_select", "unique_consecutive", "_unique2", "unique_dim", "bincount"}  # depend on values


class HiddenWait(AssertionError):
    """The host would wait for the device here."""


class WrongDevice(AssertionError):
    """A tensor of the host meets one of the device."""


class PinnedReuse(AssertionError):
    """Page-locked memory was written while a copy from it may be under way."""


class DeviceTensor(Tensor):
    """Its values lie in `values`, a CPU tensor of the same shape and strides."""

    values: Tensor
    device = property(lambda self: NAME)
    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> DeviceTensor:
        like = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device="meta")
        made = Tensor._make_subclass(cls, like, False, dispatch_device=True, device_for_backend_keys=NAME)
        made.values = values
        return made

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def tolist(self) -> Any:  # asks no mode
        mode = _gpu[-1]
        mode._wait("tolist")
        return self.values.tolist()

    def to(self, *args: Any, **kwargs: Any) -> Tensor:  # outside of inference mode torch takes it for one of the host
        asked = {name: value for name, value in kwargs.items() if name != "copy"}
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **asked)
        if device is None or device.type != "cpu":
            return super().to(*args, **kwargs)
        return torch.ops.aten._to_copy(self, dtype=dtype, device=device, non_blocking=non_blocking)

    def cpu(self, *_: Any) -> Tensor:
        return self.to("cpu")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("a tensor of the stand-in is used where the stand-in is not in force")


_gpu: list[Gpu] = []  # in force


@dataclass(eq=False)
class _Copy:
    """A copy under way between page-locked memory and the device."""

    pinned: Tensor
    holds: Tensor  # what it held when the copy was asked for; or what it will hold
    arrives: bool  # from the device

    def finish(self) -> None:
        if self.arrives:
            self.pinned.copy_(self.holds)
        elif not torch.equal(self.pinned, self.holds):
            raise PinnedReuse("page-locked memory was written while a copy from it was under way")


class Gpu(TorchDispatchMode):
    """In force inside `with Gpu() as gpu:`. Only one thread may use it."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed = 0  # waits where they are
        self.waits = 0  # for an event
        self._may_wait = False
        self._pinned: dict[int, weakref.ref[Any]] = {}  # storages, by address
        self._copies: list[_Copy] = []  # under way, in their order
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> Gpu:
        gpu = self

        class Event:
            def __init__(self, *_: Any, **__: Any):
                self._before: list[_Copy] = []
                self._asked = 0

            def record(self, stream: Any = None) -> None:
                self._before = list(gpu._copies)

            def synchronize(self) -> None:
                if any(copy in gpu._copies for copy in self._before):
                    gpu.waits += 1
                    gpu.finish(self._before)

            def query(self) -> bool:  # the device has come there when it is asked again
                self._asked += 1
                if self._asked > 1:
                    self.synchronize()
                return not any(copy in gpu._copies for copy in self._before)

        def synchronize(device: Any = None) -> None:
            gpu._wait("torch.cuda.synchronize")
            gpu.finish(list(gpu._copies))

        stand_ins = {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "Event": Event,
            "current_stream": lambda device=None: None,
            "synchronize": synchronize,
            "device": lambda device=None: contextlib.nullcontext(),
        }
        tensor = torch.tensor

        def made(data: Any, *, device: Any = None, **options: Any) -> Tensor:  # does not ask the mode
            there = device is not None and torch.device(device).type == NAME.type
            values = tensor(data, **options, **({} if there else {"device": device}))
            return values.to(NAME) if there else values

        for module, name, value in [(torch, "tensor", made), *((torch.cuda, *entry) for entry in stand_ins.items())]:
            self._patches.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        super().__enter__()
        _gpu.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _gpu.remove(self)
        self._patches.close()

    @contextlib.contextmanager
    def may_wait(self) -> Iterator[None]:
        before, self._may_wait = self._may_wait, True
        try:
            yield
        finally:
            self._may_wait = before

    def moved(self, model: nn.Module) -> nn.Module:
        """The model with its weights and buffers here."""
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None and not isinstance(weight, DeviceTensor):
                    module._parameters[name] = nn.Parameter(DeviceTensor(weight.detach()), requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None and not isinstance(buffer, DeviceTensor):
                    module._buffers[name] = DeviceTensor(buffer)
        return model

    def finish(self, copies: list[_Copy]) -> None:
        for copy in copies:
            if copy in self._copies:
                self._copies.remove(copy)
                copy.finish()

    def _wait(self, what: str) -> None:
        if not self._may_wait:
            raise HiddenWait(f"{what} waits for the device")
        self.allowed += 1
        self.finish(list(self._copies))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, to = dict(kwargs or {}), None
        for found in (one for one in (*args, kwargs.get("device")) if isinstance(one, torch.device)):
            to = found
        args = tuple(torch.device("cpu") if isinstance(one, torch.device) else one for one in args)
        if kwargs.get("device"):
            kwargs["device"] = torch.device("cpu")
        name = func.overloadpacket.__name__
        ours = any(isinstance(one, DeviceTensor) for one in tree_leaves((args, kwargs)))
        if name == "is_pinned":
            return not ours and self._is_pinned(args[0])
        if name in ("pin_memory", "_pin_memory"):
            return self._pin(args[0].clone())
        if kwargs.get("pin_memory"):
            return self._pin(func(*args, **{**kwargs, "pin_memory": False}))
        if name == "copy_":
            return self._copy(*args, **kwargs)
        if name in ("to", "_to_copy") and (ours or to):
            return self._to(func, to, args, kwargs)
        on = to.type == NAME.type if to else ours
        if ours:
            self._check(name, args, kwargs)
        for one in _written(func, args, kwargs):
            self._check_write(one)
        given, named = tree_map(_plain, args), tree_map(_plain, kwargs)
        made = func(*given, **named)
        if not on:
            return made
        same = {id(plain): one for one, plain in zip(tree_leaves(args), tree_leaves(given), strict=True)}
        # a view is an inference tensor if its base is one, anything else if it is made in that mode
        inference = args[0].is_inference() if func.is_view else torch.is_inference_mode_enabled()
        with torch.inference_mode(inference):
            return tree_map(lambda one: same[id(one)] if id(one) in same else _here(one), made)

    def _check(self, name: str, args: Any, kwargs: Any) -> None:
        if name in ASKS:
            self._wait(name)
        by_counts = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in SHAPES or by_counts or (name in ("index", "index_put_") and _by_mask(args)):
            self._wait(f"the shape of {name}")
        for one in tree_leaves((args, kwargs)):
            if isinstance(one, Tensor) and not isinstance(one, DeviceTensor) and one.dim():
                if name in ("index", "index_put_", "_unsafe_index"):  # takes an index of the host, and copies it
                    self._wait(f"an index of the host for {name}")
                    continue
                raise WrongDevice(f"{name} of a tensor {tuple(one.shape)} of the host and one of the device")

    def _to(self, func: Any, to: torch.device | None, args: Any, kwargs: Any) -> Any:
        source = args[0]
        there = to.type == NAME.type if to else isinstance(source, DeviceTensor)
        crosses = there != isinstance(source, DeviceTensor) and bool(source.numel())
        if crosses and there and kwargs.get("non_blocking") and self._is_pinned(source):
            self._copies.append(_Copy(source, source.clone(), arrives=False))
        elif crosses:  # ordinary memory is waited for, whatever was asked
            self._wait("a copy to the device" if there else "a copy to the host")
        made = func(_plain(source), *args[1:], **kwargs)
        if made is _plain(source):
            if there == isinstance(source, DeviceTensor):
                return source
            made = made.clone()
        return DeviceTensor(made) if there else made

    def _copy(self, to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        there, from_there = isinstance(to, DeviceTensor), isinstance(source, DeviceTensor)
        if not there:
            self._check_write(to)
        if there == from_there:
            _plain(to).copy_(_plain(source))
            return to
        host = source if there else to
        if not (non_blocking and self._is_pinned(host)):
            if host.dim() or not there:
                self._wait("a copy to the device" if there else "a copy to the host")
            _plain(to).copy_(_plain(source))
        elif there:
            to.values.copy_(source)
            self._copies.append(_Copy(source, source.clone(), arrives=False))
        else:
            self._copies.append(_Copy(to, source.values.clone().to(to.dtype), arrives=True))
            to.fill_(NONSENSE)
        return to

    def _pin(self, made: Tensor) -> Tensor:
        storage = made.untyped_storage()
        self._pinned[storage.data_ptr()] = weakref.ref(made)
        return made

    def _is_pinned(self, host: Tensor) -> bool:
        made = self._pinned.get(host.untyped_storage().data_ptr())
        return made is not None and made() is not None  # else the address is another's by now

    def _check_write(self, to: Tensor) -> None:
        """No copy from what is written to may be under way."""
        if isinstance(to, DeviceTensor):
            return
        at = to.untyped_storage().data_ptr()
        for copy in self._copies:
            if not copy.arrives and copy.pinned.untyped_storage().data_ptr() == at:
                raise PinnedReuse("page-locked memory is written while a copy from it may be under way")


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors to which an operation writes, those of `out=` among them."""
    if not func._schema.is_mutable:
        return []
    given = dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | kwargs
    written = [one.name for one in func._schema.arguments if one.alias_info and one.alias_info.is_write]
    return [one for one in tree_leaves([given.get(name) for name in written]) if isinstance(one, Tensor)]


def may_wait() -> contextlib.AbstractContextManager[None]:
    """The same of the one in force, if there is one."""
    return _gpu[-1].may_wait() if _gpu else contextlib.nullcontext()


def _plain(one: Any) -> Any:
    return one.values if isinstance(one, DeviceTensor) else one


def _here(one: Any) -> Any:
    return DeviceTensor(one) if isinstance(one, Tensor) else one


def _by_mask(args: Any) -> bool:
    wanted = args[1] if len(args) > 1 else ()
    return any(isinstance(one, Tensor) and one.dtype == torch.bool for one in tree_leaves(wanted))
