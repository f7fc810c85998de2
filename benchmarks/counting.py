"""Operations and bytes of a piece of code, and the least time that a machine can take for them."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .timing import synchronize

# Operations for each of a decomposition's n³, by LAPACK's own counts; PyTorch counts those of products alone.
DECOMPOSITIONS = {
    torch.ops.aten._linalg_eigh: 9.0,
    torch.ops.aten.linalg_cholesky_ex: 1 / 3,
    torch.ops.aten.cholesky_inverse: 2 / 3,
    torch.ops.aten.linalg_inv_ex: 2.0,
    torch.ops.aten.linalg_qr: 4 / 3,
}


class Call(NamedTuple):
    """What a call of one of PyTorch's operations does: operations in products and decompositions, and bytes."""

    operations: int
    bytes: int
    is_half: bool
    is_decomposition: bool


@dataclass(frozen=True)
class Peaks:
    """What a device reaches: operations a second in float32 products, bytes a second from its cache and its memory."""

    operations: float
    cache: float
    memory: float
    half: float | None = None  # operations a second in products of 16-bit numbers, where they are faster
    decompositions: float = 1.0  # part of `operations` that a decomposition of matrices reaches
    in_cache: int = 2**20  # bytes of a call up to which its tensors are taken to be in the cache
    call: float = 0.0  # seconds that a call takes at least

    def least_seconds(self, one: Call) -> float:
        """Return the least time of a call: that of its operations or of its bytes, whichever is longer."""
        speed = self.operations
        if one.is_decomposition:
            speed *= self.decompositions
        elif one.is_half:
            speed = self.half or speed
        bandwidth = self.cache if one.bytes <= self.in_cache else self.memory
        return max(one.operations / speed, one.bytes / bandwidth, self.call)


# An H100 on paper, from data sheets and public reports: products reach 45 and 600 Tflop/s of the 67 and 990 of the data
# sheet, `eigh` less than 3 % of the former (pytorch#175585), and PyTorch calls a kernel every five microseconds.
PAPER = {"h100": Peaks(45e12, 5.5e12, 3e12, half=600e12, decompositions=0.03, in_cache=2**24, call=5e-6)}


def best_seconds(call: Callable[[], object], device: torch.device, times: int = 20) -> float:
    """Time a call, after one to warm up, and return the least of the seconds that it took."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def measure_peaks(device: torch.device, size: int = 1024, bytes_in_memory: int = 2**28) -> Peaks:
    """Measure a device's peaks, with the threads that are set: products of matrices of a `size`, and copies."""
    square = torch.randn(size, size, device=device)
    product = torch.empty_like(square)

    def bandwidth(number: int) -> float:
        source = torch.zeros(number // 8, device=device)  # read and written: half each
        target = torch.empty_like(source)
        return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device)

    operations = 2 * size**3 / best_seconds(lambda: torch.mm(square, square, out=product), device)
    memory = bandwidth(bytes_in_memory)
    return Peaks(operations, max(memory, bandwidth(Peaks.in_cache)), memory)


class Counting(TorchDispatchMode):
    """Context that counts the operations and the bytes of what is computed in it, backward passes too.

    An operation's bytes are those of its tensors, each read or written once; views have none, and are no calls of a
    kernel.

    Attributes:
        operations, bytes, calls: sums over all operations.
        kernels: the calls but for views, and how often each was made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = self.calls = 0
        self.kernels = Counter[Call]()

    def least_seconds(self, peaks: Peaks) -> float:
        """Return the sum of the calls' least times on a device."""
        return sum(times * peaks.least_seconds(one) for one, times in self.kernels.items())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.calls += 1
        places = {tensor.untyped_storage().data_ptr() for tensor in given}
        name = func.overloadpacket.__name__
        if made and not name.endswith("_") and all(one.untyped_storage().data_ptr() in places for one in made):
            return result  # a view
        operations = count_operations(func.overloadpacket, args, kwargs, result)
        number = sum(tensor.nbytes for tensor in [*given, *made])
        self.operations += operations
        self.bytes += number
        is_half = bool(given) and given[0].dtype in (torch.bfloat16, torch.float16)
        self.kernels[Call(operations, number, is_half, func.overloadpacket in DECOMPOSITIONS)] += 1
        return result


def count_operations(packet: Any, args: tuple, kwargs: dict, result: Any) -> int:
    """Count the floating-point operations of one of PyTorch's: 0 unless it multiplies or decomposes matrices."""
    if packet in DECOMPOSITIONS:
        return round(DECOMPOSITIONS[packet] * args[0].numel() * args[0].shape[-1])
    return flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0
