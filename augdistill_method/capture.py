"""A function recorded once as a CUDA graph, and replayed: all its kernels are launched by one call.

At ten images a batch a student's step on a GPU takes as long as Python needs to launch its hundreds of small kernels.
A recorded step needs one launch, on buffers that always have the same addresses.

`OnCuda` has **not been run yet**, for want of a CUDA device. The tests run all else here on the CPU, with a stand-in
that calls the function again where a GPU would replay it.
"""

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WARM_UP = 3  # calls before the recording, in which libraries choose their algorithms and inductor compiles


class NotCapturable(RuntimeError):
    """A function does what cannot be replayed; the message names the operation."""


class CaptureCheck(TorchDispatchMode):
    """Raises `NotCapturable` at an operation that draws, or that needs a value or a size on the host.

    For example `item()`, a branch on a tensor, `nonzero`, a boolean mask as an index, or a copy between devices.
    """

    forbidden = torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(tag in function.tags for tag in self.forbidden):
            raise NotCapturable(f"it calls {function}")
        out = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        if function.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
            host = any(t.dtype in (torch.bool, torch.uint8) for t in args[1] if t is not None)  # asks for its length
        else:
            host = torch.Tag.dynamic_output_shape in function.tags
        if host:
            raise NotCapturable(f"it calls {function}")
        copies = function.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten._to_copy)
        devices = {t.device for t in tensors if t.ndim or copies}  # a number on the CPU is an argument of a kernel
        if len(devices) > 1:
            raise NotCapturable(f"{function} copies between {' and '.join(sorted(map(str, devices)))}")
        return out


class OnCuda:
    """Records functions as CUDA graphs, which share the memory of what is not an output: only one runs at a time."""

    def __init__(self):
        self.pool = None

    def __call__(self, run: Callable[[], object]) -> tuple[Callable[[], None], object]:
        """Record `run`; returns a function that replays it, and the outputs that each replay overwrites."""
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        current, side, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # torch's rule: what is recorded has run before, on another stream
            for _ in range(WARM_UP):
                run()
        current.wait_stream(side)
        # the outer block gives the current stream back if the recording fails
        with torch.cuda.stream(current), torch.cuda.graph(graph, pool=self.pool):
            outputs = run()
        return graph.replay, outputs


@functools.cache
def warn_once(reason: str) -> None:
    warnings.warn(f"a student's step runs without a CUDA graph, so it is slower: {reason}", stacklevel=4)


class Captured:
    """`function` of tensors, recorded once for each combination of their shapes and types.

    Its outputs are tensors that **the next call overwrites**. What cannot be recorded is called as it is, with one
    warning that says why.
    """

    def __init__(self, function: Callable, record: Callable | None = None):
        self.function, self.record = function, record or OnCuda()
        self.recorded: dict[tuple, tuple | None] = {}

    def prepare(self, *given: Tensor) -> tuple | None:
        """(static inputs, replay, static outputs) for inputs of these shapes; None if it cannot be recorded."""
        key = tuple((t.shape, t.dtype, t.device) for t in given)
        if key not in self.recorded:
            static = [t.detach().clone() for t in given]
            try:
                with CaptureCheck():
                    self.function(*static)
                self.recorded[key] = (static, *self.record(lambda: self.function(*static)))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # NotCapturable, or CUDA's own refusal
                warn_once(str(error).split("\n")[0])
                self.recorded[key] = None
        return self.recorded[key]

    def __call__(self, *given: Tensor):
        found = self.prepare(*given)
        if found is None:
            return self.function(*given)
        static, replay, outputs = found
        for own, value in zip(static, given, strict=True):
            own.copy_(value)
        replay()
        return outputs


def launched(function: Callable, device: torch.device) -> Callable:
    """`function` of tensors as it is best called on this device: `Captured` on a CUDA device, elsewhere as it is."""
    return Captured(function) if device.type == "cuda" else function
