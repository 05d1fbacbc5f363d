"""A device that is not there: tensors that say they are on one, and are computed on the CPU.

What a CPU cannot show of code for a GPU is a tensor left behind: CUDA refuses to compute with
tensors of two devices, and everything passes where there is one. Here a tensor of `cuda` wraps one
of the CPU, and every operation on it is looked at: with a tensor of the CPU beside it, it is
refused but for what CUDA takes (tensors without dimension, indices, copies). What waits for a
result of the device (a number is read, a mask becomes indices, values come back) is counted.

CUDA refuses some more (a tensor without dimension in a stack). Real kernels, their precision, their
memory and their order in time are not simulated.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")

# CUDA takes these with tensors of the CPU: indices, and what copies from one to the other.
_INDEXING = {
    "aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_",
    "aten._unsafe_index", "aten._unsafe_index_put",
}  # fmt: skip
_MIXED = {*_INDEXING, "aten.copy_", "aten._to_copy"}
# The host waits for these: their results' values, or shapes, are wanted.
_WAITS = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal"}
_WAITS |= {"aten.repeat_interleave.Tensor", "aten._unique2", "aten.is_nonzero", "torchvision.nms"}


class OnDevice(Tensor):
    """A tensor of `cuda`; `held` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        # As torch's own FakeTensor: to autograd it is of meta, which needs no device to be there.
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, layout=inner.layout, device=torch.device("meta"),
        )  # fmt: skip
        assert isinstance(made, OnDevice)
        made.held = inner
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnDevice({self.held!r})"

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def new_tensor(  # type: ignore[override]
        self, data: Any, *, dtype: torch.dtype | None = None, **_: Any
    ) -> Tensor:
        # torch's own does not come by here, and would make one of meta.
        return torch.tensor(data, dtype=dtype or self.dtype, device=CUDA)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        return self.to(CPU)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {}, Counter())


class SimulatedDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered tensors can be of `cuda`; `waits` counts what the host waits for."""

    # As torch's own FakeTensorMode, so that torch does not look for the device's driver.
    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if not torch.cuda.is_available():
            torch._C._ensureCUDADeviceGuardSet()  # as FakeTensorMode: none to guard
        self._lifts: list[bool] = []
        self.waits: Counter[str] = Counter()

    def __enter__(self) -> SimulatedDevice:
        # So that torch.tensor(..., device="cuda") copies where we see it.
        self._lifts.append(torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        torch._C._set_only_lift_cpu_tensors(self._lifts.pop())
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        with self:  # in inference mode functions of other functions come here, too
            parts = func.decompose(*args, **(kwargs or {}))
        if parts is not NotImplemented:
            return parts
        return _run(func, args, kwargs or {}, self.waits)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], waits: Counter[str]) -> Any:
    name = str(func.overloadpacket)
    given = [one for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)]
    here = [one for one in given if isinstance(one, OnDevice)]
    wanted = kwargs.get("device")
    wanted = None if wanted is None else torch.device(wanted)
    if wanted is not None and wanted.type == "meta":  # what autograd takes ours for
        wanted = CUDA
    if here:
        _refuse(func, args, given)
    if here and _waits(func, args, wanted):
        waits[name] += 1
    if wanted is not None and wanted.type == "cuda":
        kwargs = {**kwargs, "device": CPU}  # where it is computed
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    plain_args, plain_kwargs = tree_map(_inner, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    on_device = bool(here) if wanted is None else wanted.type == "cuda"
    if name == "aten._local_scalar_dense":
        return result
    if written := _written(func, args, kwargs):
        # In place: what was given comes back.
        return written[0] if len(written) == 1 and isinstance(result, Tensor) else tuple(written)
    return tree_map(lambda one: _outer(one, on_device), result)


def _refuse(func: Any, args: tuple[Any, ...], given: list[Tensor]) -> None:
    """Raise RuntimeError for a tensor of the CPU beside one of the device, where CUDA does."""
    name = str(func.overloadpacket)
    left = [one for one in given if not isinstance(one, OnDevice) and one.dim()]
    if name in _INDEXING and not isinstance(args[0], OnDevice):
        raise RuntimeError(f"indices should be on the same device as the indexed tensor ({func})")
    if "index_put" in name and any(one is args[2] for one in left):
        raise RuntimeError(f"Expected values on the device of the tensor that they go to ({func})")
    if left and name not in _MIXED:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu! ({func}, the one of the CPU {tuple(left[0].shape)})"
        )


def _waits(func: Any, args: tuple[Any, ...], wanted: torch.device | None) -> bool:
    """Tell whether the host wants values, or a shape that values decide."""
    name = str(func.overloadpacket)
    if name == "aten._to_copy":
        return wanted is not None and wanted.type != "cuda"
    if name == "aten.copy_":
        return not isinstance(args[0], OnDevice)
    if name in _INDEXING:
        return any(one is not None and one.dtype == torch.bool for one in args[1])
    return name in _WAITS or str(func) in _WAITS


def _inner(one: Any) -> Any:
    return one.held if isinstance(one, OnDevice) else one


def _outer(one: Any, on_device: bool) -> Any:
    return OnDevice(one) if on_device and isinstance(one, Tensor) else one


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the arguments that a function changes and returns, in order."""
    schema = func._schema
    if not schema.returns or not all(
        one.alias_info is not None and one.alias_info.is_write for one in schema.returns
    ):
        return []
    found = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs[argument.name]
        found.append(value)
    return found
