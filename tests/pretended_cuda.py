"""CUDA, pretended on a CPU: tensors that say they are on a GPU, and a record of all that would slow one or fail on it.

Every tensor is an ordinary CPU tensor and is computed with, so whole runs go through. A storage is marked when
something asks for `device="cuda"`, or when an operation makes it out of marked ones; Python then reads `cuda:0` as the
device of its tensors. Below autograd every operation is seen, backward passes included. Found are: tensors of several
devices, generators and autocast of another one, waits by place, launches, products and sums in too few bits, host
memory that is read or written while a copy without a wait is under way, and graphs that hold copies of the host's
memory, read numbers, or are recorded and repeated on streams that do not wait for each other.

What this cannot see: whether CUDA has a kernel for an operation, layout or dtype and computes the same with it; dtypes
of anything but products and sums (rounded too early, or kept wider than needed); memory; time; CUDA's own autocast
lists (a CPU's are used); streams and events outside of a graph's recording; pinned memory that NumPy writes to, or
that was pinned by others; what happens in other threads that do not enter it; whether `cuda:0` is another rank's GPU
(only `gpu_rehearsal/test_ranks.py` has a second one); what a library moves to the GPU by itself; TF32; what 16 bits
are too short a range for; copies that an operation makes within; and operations inside the kernels that stand in here
for those of CUDA (`varlen_attn`) and of Triton.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import types
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from recorded_graph import READS, Recording
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftune.model.train import cross_entropy

SHORT_SUMS = {"model/train/layers.py:summed (sum)", "model/loss.py:hidden (native_layer_norm)"}
"""Where 16 bits are summed in 16 bits: two terms of a matrix; norms that CUDA's own autocast has in fp32."""
TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "peftune"

_ALLOCATIONS = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
    "detach",
    "detach_",
}
_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "linear", "matmul"}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_SUMS = {
    "sum", "mean", "cumsum", "_softmax", "_log_softmax", "native_layer_norm", "linalg_vector_norm", "_foreach_norm",
    "nll_loss_forward", "var_mean", "softmax", "log_softmax", "layer_norm",
}  # fmt: skip
"""The last three are seen in inference mode only."""
_CAST = (torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu)
_BY_THE_HOST = (
    torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.tolist, torch.Tensor.data_ptr, torch.Tensor.__reduce_ex__,
)  # fmt: skip
"""Read a CPU tensor without an operation that could be seen."""


class WrongDevice(RuntimeError):
    """An operation whose tensors are on several devices, which CUDA refuses."""


class _OfThread(threading.local):
    """What each thread is about: one may record a graph while another goes on."""

    place: str | None = None
    paused = capturing = False


def _own(name: str) -> Any:
    here = _OfThread()
    return property(lambda cuda: getattr(here, name), lambda cuda, value: setattr(here, name, value))


class PretendedCUDA(TorchFunctionMode):
    """While entered, `cuda` is a device; what happened on it is in the counters, since `forget`."""

    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.device = torch.device("cuda", index)
        self._seen = _Operations(self)
        self._memory: dict[str, set[int]] = {kind: set() for kind in ("cuda", "pinned", "sent", "due")}
        self.stream = _Stream(self)
        self.place: str | None = None
        """Where what is made now lies, whatever the inputs."""
        self.paused = False
        self.forget()

    place, paused, capturing = (_own(name) for name in ("place", "paused", "capturing"))

    def forget(self) -> None:
        """Begin to count anew."""
        self.checks = 0
        """How often it waits besides to compare a graph with its kernels, as it does at first."""
        self.operations = 0
        """All that Python asks for, views too."""
        self.launches: Counter[str] = Counter()
        """Kernels by the operation's name; views and allocations launch none."""
        self.waits: Counter[str] = Counter()
        """How often the host waits for the GPU, by `file:function`."""
        self.products: Counter[tuple[str, torch.dtype]] = Counter()
        """Matrix products by place in the code and dtype."""
        self.sums: Counter[str] = Counter()
        """Sums, norms and softmaxes whose result has 16 bits, by place in the code."""
        self.faults: list[str] = []
        """What CUDA would refuse; also raised as WrongDevice, which code may have caught."""

    def __enter__(self) -> PretendedCUDA:
        super().__enter__()
        self._seen.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._seen.__exit__(*error)
        super().__exit__(*error)

    @contextlib.contextmanager
    def python_again(self) -> Iterator[None]:
        """See what Python asks of tensors also inside a function of torch that this mode is being asked about."""
        if self in _get_current_function_mode_stack():
            yield
            return
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on the pretended GPU."""
        return self.is_marked(tensor, "cuda")

    def is_marked(self, tensor: torch.Tensor, kind: str) -> bool:
        """Whether a tensor's memory was marked so."""
        return tensor.layout is torch.strided and tensor.untyped_storage()._cdata in self._memory[kind]

    @property
    def has_copies_under_way(self) -> bool:
        """Whether memory of the host is being read or filled."""
        return bool(self._memory["sent"] or self._memory["due"])

    def mark(self, tensor: torch.Tensor, kind: str = "cuda") -> None:
        """Let the tensor's memory be on the GPU; or page-locked memory of the host, which a copy is reading or filling.

        The last two, `sent` and `due`, hold until the host waits.
        """
        storage, marks = tensor.untyped_storage(), self._memory[kind]
        if storage._cdata not in marks:
            marks.add(storage._cdata)
            weakref.finalize(storage, marks.discard, storage._cdata)

    @contextlib.contextmanager
    def one_kernel(self, name: str) -> Iterator[None]:
        """What happens inside counts as one launch, and its results are on the GPU."""
        self.launches[name] += not self.paused
        before, self.paused = (self.paused, self.place), True
        self.place = "cuda"
        try:
            yield
        finally:
            self.paused, self.place = before

    def kernel(self, name: str, function: Any, *tensors: torch.Tensor) -> torch.Tensor:
        """`function(*tensors)`, differentiable, as one kernel."""
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return _Kernel.apply(self, name, function, *tensors)  # type: ignore[no-any-return,no-untyped-call]
        with self.one_kernel(name):
            return function(*tensors)  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def recorded(self, graph: _Graph, *given: Any, **named: Any) -> Iterator[None]:
        """As `torch.cuda.graph`: records in software what is launched, of this thread alone."""
        found = _GRAPH.bind(graph, *given, **named).arguments
        graph.stream = found.get("stream")
        if found.get("capture_error_mode") != "thread_local" or graph.stream is None:
            self.refuse("a graph is recorded on a stream of its own, and other threads may go on")
        if self.stream not in graph.stream.after:
            self.refuse("a graph is recorded on a stream that has not waited for what its inputs are made on")
        graph.stream.after.clear()
        self.stream.after.discard(graph.stream)
        self.capturing = True
        try:
            with Recording() as graph.recording:
                yield
        finally:
            self.capturing = False

    def assert_clean(self, dtype: torch.dtype, waits: Mapping[str, int]) -> None:
        """Nothing failed, matrix products were in `dtype`, and the host waited where it may, at most so often."""
        assert not self.faults
        more = {place: count for place, count in self.waits.items() if count > waits.get(place, 0)}
        assert not more, f"the host waits for the GPU: {more}"
        tried = {("device.py:why_no_kernel", torch.float32)}  # whether it computes at all
        others = {
            place: count for place, count in self.products.items() if place[1] is not dtype and place not in tried
        }
        assert not others, f"matrix products that are not in {dtype}: {others}"
        short = {place: count for place, count in self.sums.items() if place not in SHORT_SUMS}
        assert not short, f"sums in 16 bits: {short}"

    def wait(self, why: str) -> None:
        """The host waits here; copies that were under way are done."""
        if self.paused:
            return
        for kind in ("sent", "due"):
            self._memory[kind].clear()
        if self.capturing:
            self.refuse(f"{why} while a graph is recorded")
        if caller().startswith("model/decode/captured_steps.py:"):
            self.checks += 1
        else:
            self.waits[f"{caller()} ({why})"] += 1

    def under_way(self, host: torch.Tensor, kind: str) -> None:
        """A copy from or to page-locked memory of the host, for which nobody waits."""
        if self.capturing:
            self.refuse("a copy of the host's memory is recorded, which is gone or another when it is repeated")
        self.mark(host, kind)

    def refuse(self, message: str) -> None:
        """CUDA would raise here."""
        self.faults.append(f"{caller()}: {message}")
        raise WrongDevice(self.faults[-1])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensor = args[0] if args and isinstance(args[0], torch.Tensor) else None
        here = tensor is not None and self.holds(tensor)
        if func == torch.Tensor.device.__get__ and here:  # type: ignore[attr-defined]
            return self.device
        if func in (torch.Tensor.is_cuda.__get__, torch.Tensor.is_cpu.__get__) and here:  # type: ignore[attr-defined]
            return func == torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]
        if func is torch.Tensor.get_device and here:
            return self.device.index
        if func is torch.Tensor.pin_memory:
            if here:
                self.refuse("only CPU memory can be pinned")
            pinned = tensor.clone()
            self.mark(pinned, "pinned")
            return pinned
        if func in _BY_THE_HOST and tensor is not None and self.is_marked(tensor, "due"):
            self.refuse("the host reads what a copy has yet to bring")
        on_gpu = here or ("cuda" in str(kwargs.get("device")))
        if isinstance(kwargs.get("generator"), torch._C.Generator) and (
            isinstance(kwargs["generator"], _Generator) is not on_gpu
        ):
            self.refuse(f"{func.__name__} with the generator of another device")
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and here:
            self.refuse("a tensor on the GPU cannot become an array")
        if func is torch.Tensor.tolist and here:
            self.wait("tolist")
        if func is _SDPA and here and not self.paused:
            return self._attention(*args, **kwargs)
        if func in _CAST and tensor is not None:
            return self._moved(func, tensor, here, args[1:], kwargs)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            return self._made(func, args, kwargs)
        return func(*args, **kwargs)

    def _attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, **named: Any
    ) -> torch.Tensor:
        mask = named.pop("attn_mask", mask)
        if not all(self.holds(tensor) for tensor in (q, k, v, mask) if tensor is not None):
            self.refuse("attention to tensors on the GPU and on the CPU")
        return self.kernel("SDPA", partial(_SDPA, attn_mask=mask, **named), q, k, v)

    def _made(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What `func` makes, on the GPU; from numbers of the host it is copied there."""
        self._refuse_other(torch.device(kwargs["device"]))
        copies = func in (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)
        before, self.place = self.place, "cuda"
        try:
            result = func(*args, **kwargs | {"device": "cpu"})
        finally:
            self.place = before
        self.mark(result)
        if copies:
            self.wait(f"{func.__name__} of numbers")
        return result

    def _refuse_other(self, device: torch.device) -> None:
        if device.type == "cuda" and device.index not in (None, self.device.index):
            self.refuse(f"{device} is not this process's GPU")

    def _moved(self, func: Any, tensor: torch.Tensor, here: bool, rest: Any, kwargs: dict[str, Any]) -> Any:
        """`to`, `cuda` and `cpu`."""
        given = [*rest, *kwargs.values()]
        asked = [a for a in given if isinstance(a, torch.device | str)]
        others = [a for a in given if isinstance(a, torch.Tensor)]
        to = "cuda" if func is torch.Tensor.cuda else "cpu" if func is torch.Tensor.cpu else None
        if asked:
            self._refuse_other(torch.device(asked[0]))
        to = to or (torch.device(asked[0]).type if asked else None)
        to = to or (("cuda" if self.holds(others[0]) else "cpu") if others else None)
        if to not in ("cuda", "cpu") or (to == "cuda") == here or tensor.device.type == "meta":
            dtypes = [a for a in given if isinstance(a, torch.dtype)] + [other.dtype for other in others]
            stays = to in (None, "cuda", "cpu") and tensor.device.type != "meta"
            if not stays:
                return func(tensor, *rest, **kwargs)
            kept = {k: v for k, v in kwargs.items() if k in ("copy", "memory_format")}
            return tensor.to(dtypes[0], **kept) if dtypes else tensor.to(tensor.dtype, **kept)
        dtypes = [a for a in given if isinstance(a, torch.dtype)] + [other.dtype for other in others]
        unhurried = kwargs.get("non_blocking", any(a is True for a in rest))
        if not here and unhurried and not dtypes and self.is_marked(tensor, "pinned"):
            self.under_way(tensor, "sent")
        elif not (here and unhurried):  # torch pins what it copies to without waiting
            self.wait("copy to the host" if here else "copy from memory that is not pinned")
        before, self.place = self.place, to
        try:
            made = tensor.to(dtypes[0], copy=True) if dtypes else tensor.clone()
        finally:
            self.place = before
        if here and unhurried:
            self.under_way(made, "due")
        return made


class _Graph:
    """What was recorded; a replay counts as one launch."""

    def __init__(self, cuda: PretendedCUDA) -> None:
        self._cuda, self.recording = cuda, Recording()
        self.stream: _Stream | None = None

    def pool(self) -> tuple[int, int]:
        """Memory that other graphs may use too."""
        return 0, 1

    def replay(self) -> None:
        """All again."""
        if self.stream not in self._cuda.stream.after:
            self._cuda.refuse("a graph is repeated by a stream that has not waited for the one that recorded it")
        with self._cuda.one_kernel("graph"):
            self.recording.replay()


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation below autograd."""

    def __init__(self, pretence: PretendedCUDA) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pretence = pretence

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cuda, kwargs = self._pretence, kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        there = [t for t in tensors if cuda.holds(t)]
        name, on_gpu = func.overloadpacket.__name__, bool(there) or cuda.place == "cuda"
        by_gpu = cuda.place is not None or (name == "copy_" and there)  # it comes after the copies before it
        if len(there) < len(tensors) and cuda.has_copies_under_way and not by_gpu:
            self._check_host(func, name, args, kwargs, tensors)
        if there and len(there) < len(tensors) and not cuda.paused and cuda.place is None:
            self._check(func, name, args, kwargs, tensors)
        cuda.operations += on_gpu and not cuda.paused
        before = {tensor.untyped_storage()._cdata for tensor in tensors if tensor.layout is torch.strided}
        made = func(*args, **kwargs)
        if on_gpu and not cuda.paused:
            views = all(o.untyped_storage()._cdata in before for o in tree_leaves(made) if isinstance(o, torch.Tensor))
            self._count(func, name, tensors, there, views and not func._schema.is_mutable)
            of_numbers = name in _SUMS and next((t for t in tree_leaves(made) if isinstance(t, torch.Tensor)), None)
            if isinstance(of_numbers, torch.Tensor) and of_numbers.dtype in (torch.bfloat16, torch.float16):
                cuda.sums[f"{caller()} ({name})"] += 1
        new = (t for t in tree_leaves(made) if isinstance(t, torch.Tensor) and t.device.type == "cpu")
        for tensor in new if on_gpu and cuda.place != "cpu" else ():
            if tensor.layout is not torch.strided or tensor.untyped_storage()._cdata not in before:
                cuda.mark(tensor)
        return made

    def _check(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> None:
        """Tensors of both devices: numbers may come from the host, indices are copied, all else fails."""
        cuda = self._pretence
        strangers = [t for t in tensors if not cuda.holds(t) and t.numel()]
        if name == "copy_":
            host, kind = (args[1], "sent") if cuda.holds(args[0]) else (args[0], "due")
            if len(args) > 2 and args[2] and cuda.is_marked(host, "pinned"):
                return cuda.under_way(host, kind)
            return cuda.wait("copy_ between host and GPU")
        if name in _INDEXED and cuda.holds(args[0]):
            return cuda.wait("indices from the host")
        numbers = torch.Tag.pointwise in func.tags and all(map(cuda.holds, _written(func, args, kwargs)))
        if (numbers or name == "fill_") and all(t.ndim == 0 for t in strangers):
            return None
        return cuda.refuse(f"{name} of tensors on the GPU and on the CPU, {[tuple(t.shape) for t in strangers]}")

    def _check_host(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> None:
        """Memory of the host that a copy fills is not to be read, and what a copy reads is not to be written to."""
        cuda, aliases = self._pretence, [one.alias_info for one in func._schema.returns]
        looks = not any(alias is not None and not alias.is_write for alias in aliases)  # a view reads nothing
        if looks and any(cuda.is_marked(t, "due") for t in tensors):
            cuda.refuse(f"{name} of what a copy has yet to bring")
        if any(cuda.is_marked(t, "sent") for t in _written(func, args, kwargs)):
            cuda.refuse(f"{name} writes to what a copy has yet to read")

    def _count(self, func: Any, name: str, tensors: list[torch.Tensor], there: list[torch.Tensor], views: bool) -> None:
        cuda = self._pretence
        masks = any(t.dtype is torch.bool for t in tensors[1:]) if name in _INDEXED else False
        if there and (name in READS or masks):
            cuda.wait(name)
        if name in _PRODUCTS:
            cuda.products.update((caller(), t.dtype) for t in there[-1:])
        if (not views or name in READS) and name not in _ALLOCATIONS:
            cuda.launches[name] += 1


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Those of an operation's arguments that it writes to."""
    if not func._schema.is_mutable:
        return []
    given = {one.name: value for one, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    to = [given.get(one.name) for one in func._schema.arguments if one.alias_info and one.alias_info.is_write]
    return [tensor for tensor in tree_leaves(to) if isinstance(tensor, torch.Tensor)]


def caller() -> str:
    """The innermost function of the package, or else of these tests, that runs now, as `file:function`."""
    frame: types.FrameType | None = sys._getframe(1)
    of_tests = "?"
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE)}:{frame.f_code.co_name}"
        if of_tests == "?" and path.is_relative_to(TESTS) and path != Path(__file__):
            of_tests = f"{path.name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return of_tests


class _Stream:
    """A stream, or an event on it: work is done when it is enqueued, so only who waits for whom is of interest."""

    def __init__(self, cuda: PretendedCUDA) -> None:
        self._cuda = cuda
        self.after: set[_Stream | None] = set()
        """Streams whose work it has waited for."""

    def synchronize(self) -> None:
        """The host waits."""
        self._cuda.wait("synchronize")

    def query(self) -> bool:
        """Whether all is done."""
        return True

    def record(self, *_: Any) -> None:
        """A stream waits for nothing here."""

    def wait_stream(self, other: _Stream) -> None:
        """What comes next comes after all of the other's work."""
        self.after.add(other)

    wait = wait_event = record


class _Generator(torch.Generator):
    """One of the GPU, which draws nothing for tensors of a CPU, nor a CPU's for those of a GPU."""


class _Kernel(torch.autograd.Function):
    """A function of tensors that counts as one kernel in each direction, whatever a CPU makes of it."""

    @staticmethod
    def forward(ctx: Any, cuda: PretendedCUDA, name: str, function: Any, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.cuda, ctx.name, ctx.function = cuda, name, function
        ctx.save_for_backward(*tensors)
        with cuda.one_kernel(name):
            return function(*tensors)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[Any, ...]:
        with ctx.cuda.one_kernel(f"{ctx.name} backward"), torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            return None, None, None, *torch.autograd.grad(ctx.function(*leaves), leaves, upstream)


def _by_document(lengths: list[int], scale: float, *qkv: torch.Tensor) -> torch.Tensor:
    """Causal attention of documents that lie end to end; q, k and v (N, H, W)."""
    parts = zip(*(torch.split(tensor.transpose(0, 1), lengths, dim=1) for tensor in qkv), strict=True)
    return torch.cat([_SDPA(*part, is_causal=True, scale=scale) for part in parts], dim=1).transpose(0, 1)


def cross_entropy_kernel(
    logits: torch.Tensor, targets: torch.Tensor, shares: torch.Tensor | None, nats: torch.Tensor, wanted: bool
) -> None:
    """Computes what `cross_entropy_kernel.launch` computes."""
    share = torch.zeros(len(logits), 1) if shares is None else shares
    surprise, chosen = -torch.log_softmax(logits.float(), 1), targets[:, None]
    nats.copy_((1 - share) * surprise.gather(1, chosen) + share * surprise.mean(1, keepdim=True))
    if wanted:
        gradient = torch.exp(-surprise) - share / logits.shape[1]
        logits.copy_(gradient.scatter_add_(1, chosen, share - 1))


def _about_cpu(asked: Any, other: Any, device: str = "cuda", *_: Any) -> Any:
    """What a CPU really does is what the GPU is said to do; of the CPU itself nothing is said."""
    return asked("cpu") if "cuda" in device else other


_GRAPH = inspect.signature(torch.cuda.graph)
_SDPA = torch.nn.functional.scaled_dot_product_attention


def pretend(
    patch: pytest.MonkeyPatch, flash: bool = True, index: int = 0, count: int = 1, triton: bool = True
) -> PretendedCUDA:
    """Let torch have GPUs with bf16 while `patch` lasts, of which this process has number `index`.

    Without `flash` there is no attention over documents that lie end to end, without `triton` no kernel for the cross
    entropy.
    """
    pytest.importorskip("torch.nn.attention.varlen")  # an older torch has none
    cuda = PretendedCUDA(index)

    def varlen_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        ends, other, longest = given[0], given[1], given[2]
        if not flash:
            raise RuntimeError("no kernel image is available for execution on the device")
        if not all(cuda.holds(t) for t in (q, k, v, ends, other)) or ends.dtype != torch.int32:
            cuda.refuse("varlen_attn takes q, k, v and int32 offsets, all on the GPU")
        if q.dtype not in (torch.bfloat16, torch.float16) or named["window_size"] != (-1, 0):
            cuda.refuse(f"varlen_attn of {q.dtype}, window {named['window_size']}")
        cuda.paused = True
        lengths = ends.diff().tolist()
        cuda.paused = False
        if max(lengths) != longest:
            cuda.refuse(f"varlen_attn is told {longest}, the longest document has {max(lengths)}")
        return cuda.kernel("varlen_attn", partial(_by_document, lengths, named["scale"]), q, k, v)

    def launch(logits: torch.Tensor, targets: torch.Tensor, shares: torch.Tensor | None, *given: Any) -> None:
        tensors = [t for t in (logits, targets, shares, given[0]) if t is not None]
        if not all(cuda.holds(t) for t in tensors) or not all(t.is_contiguous() for t in tensors[1:]):
            cuda.refuse("the kernel of the cross entropy takes tensors on the GPU, dense but for the logits' rows")
        with cuda.one_kernel("cross entropy"):
            cross_entropy_kernel(logits, targets, shares, *given)

    properties = types.SimpleNamespace(total_memory=80 << 30, name="pretended", major=9, minor=0)
    functions: dict[str, Any] = {
        "is_available": True, "device_count": count, "current_device": index, "set_device": None,
        "is_initialized": True, "is_bf16_supported": True,
        "get_device_properties": properties, "get_device_name": "pretended", "get_device_capability": (9, 0),
        "mem_get_info": (70 << 30, 80 << 30), "max_memory_allocated": 0,
        "memory_allocated": 0, "memory_reserved": 0, "reset_peak_memory_stats": None, "empty_cache": None,
        "is_current_stream_capturing": False, "manual_seed_all": None, "_lazy_init": None,
    }  # fmt: skip
    for name, value in functions.items():
        patch.setattr(torch.cuda, name, lambda *_, _value=value, **__: _value)
    patch.setattr(torch.cuda, "graph", cuda.recorded)
    patch.setattr(torch.cuda, "CUDAGraph", lambda: _Graph(cuda))
    patch.setattr(torch.cuda, "synchronize", lambda *_: cuda.wait("synchronize"))
    for name in ("Stream", "Event"):  # all that is enqueued runs at once, whatever the stream
        patch.setattr(torch.cuda, name, lambda *_, **__: _Stream(cuda))
    for name in ("current_stream", "default_stream"):
        patch.setattr(torch.cuda, name, lambda *_, **__: cuda.stream)
    for name in ("range_push", "range_pop"):
        patch.setattr(torch.cuda.nvtx, name, lambda *_: 0)
    patch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    patch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    patch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    kernels = types.SimpleNamespace(launch=launch) if triton else None  # None: it cannot be imported
    patch.setitem(sys.modules, "peftune.model.train.cross_entropy_kernel", kernels)
    patch.setattr(cross_entropy, "reason_against", cache(cross_entropy.reason_against.__wrapped__))
    made = torch.Generator
    patch.setattr(torch, "Generator", lambda device="cpu": (_Generator if "cuda" in str(device) else made)())
    for name, other in (("is_autocast_enabled", False), ("get_autocast_dtype", torch.bfloat16)):
        patch.setattr(torch, name, partial(_about_cpu, getattr(torch, name), other))

    def grouped(*given: Any) -> dict[tuple[torch.device, torch.dtype], Any]:
        """Below Python every tensor is the CPU's."""
        found = by_device(*given)
        first = [next(t for t in lists[0] if t is not None) for lists, _ in found.values()]
        return {
            (cuda.device if cuda.holds(t) else d, kind): v
            for t, ((d, kind), v) in zip(first, found.items(), strict=True)
        }

    by_device: Any = torch._C._group_tensors_by_device_and_dtype
    patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", grouped)
    backward: Any = torch.autograd.graph._engine_run_backward

    def seen_backward(*given: Any, **named: Any) -> Any:
        """Torch calls `autograd.grad` with this mode off, as it does everything that the mode is asked about."""
        for of, upstream in zip(given[0], given[1], strict=True):
            if upstream is not None and cuda.holds(of) is not cuda.holds(upstream):
                cuda.refuse("a gradient on another device than what it is the gradient of")
        with cuda.python_again():
            return backward(*given, **named)

    for module in (torch.autograd, torch.autograd.graph):
        patch.setattr(module, "_engine_run_backward", seen_backward)
    # Recomputed tensors are compared with those kept before, now and then where this mode is off.
    kept = torch.utils.checkpoint._allowed_determinism_checks_to_fns
    patch.setitem(kept, "default", lambda tensor: {"shape": tensor.shape, "dtype": tensor.dtype})
    begin = torch.autocast.__init__

    def autocast(
        self: Any, device_type: str, dtype: Any = None, enabled: bool = True, *given: Any, **named: Any
    ) -> None:
        begin(self, "cpu", dtype, enabled and "cuda" in device_type, *given, **named)

    patch.setattr(torch.autocast, "__init__", autocast)
    return cuda
