"""Products of the Triton kernel with numpy in and out: pinned buffers that are used again, and CUDA graphs.

With few rows, launching takes longer than computing. So copying in, the kernel and copying out are captured once for
each matrix and number of rows, and replayed. The graphs hold the addresses of their buffers and of the weights: a room
never moves, and a replay keeps its weights alive. For the compute thread only.

All of this but `capture` ran on CPU tensors, with the kernel in Triton's interpreter. Nothing has run on a device yet.
"""

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from gpu_worker.kernels import triton_ring

GRAPH_ROWS = 16  # beyond them launching is a small part, and there would be a graph for every length of a prompt
MOST_GRAPHS = 2048  # a model of 28 layers has 114 matrices
WARM_ROWS = (4, 16, 32, 64, 256)

I32 = npt.NDArray[np.int32]


@torch.inference_mode()  # always: captures share a tensor of torch's generator, which is of one kind or the other
def capture(work: Callable[[], None]) -> Callable[[], None]:
    """What does the work again, on the same addresses. It is done once here, which compiles and loads kernels."""
    work()
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
    replay: Callable[[], None] = graph.replay
    return replay


def _repeat(work: Callable[[], None]) -> Callable[[], None]:
    """In the place of `capture` where there are no graphs."""
    return work


class Room:
    """Buffers for products of up to `rows` rows, k inputs and n outputs, on the device and, pinned, beside it."""

    @torch.inference_mode(False)  # a tensor that is made in that mode cannot be written outside
    def __init__(self, rows: int, k: int, n: int, device: str) -> None:
        pinned = device != "cpu"
        self.sent = torch.empty((rows, k), dtype=torch.int32, pin_memory=pinned)
        self.received = torch.empty((rows, n), dtype=torch.int32, pin_memory=pinned)
        self.words, self.answer = self.sent.numpy(), self.received.numpy()  # the same memory
        self.z = torch.empty((rows, k), dtype=torch.int32, device=device)
        self.y = torch.empty((rows, n), dtype=torch.int32, device=device)
        self.planes = torch.empty((4 * rows, k), dtype=torch.int8, device=device)

    def multiply(self, b: torch.Tensor, m: int) -> None:
        """received[:m] = sent[:m].b, once the device has come that far. Allocates nothing."""
        z, y = self.z[:m], self.y[:m]
        z.copy_(self.sent[:m], non_blocking=True)
        how = triton_ring.plan(m, len(b), b.shape[1], triton_ring.device_of(b))
        triton_ring.multiply(z, b, y, self.planes[: 4 * m], how)
        self.received[:m].copy_(y, non_blocking=True)


class TritonProducts:
    """Ring products on one device."""

    name = "triton with CUDA graphs"

    def __init__(self, device: str) -> None:
        self._device = device
        self._capture = _repeat if device == "cpu" else capture
        self._rooms: dict[tuple[int, int, int], Room] = {}
        self._replays: OrderedDict[tuple[int, ...], tuple[Callable[[], None], torch.Tensor]] = OrderedDict()

    def matmul(self, z: I32, w: torch.Tensor) -> I32:
        """z int32[m, k], w int8[n, k] on the device -> z.w^T modulo 2^32 as int32[m, n]. The caller checked shapes."""
        return self._product(z, w.t())

    def lookup(self, z: I32, table: torch.Tensor) -> I32:
        """z int32[m, v], table int8[v, d] on the device -> z.table modulo 2^32 as int32[m, d]."""
        return self._product(z, table)

    def warm_up(self, w: torch.Tensor) -> None:
        """Compile what products with w need, or fetch it from disk: minutes the first time on a machine."""
        for m in WARM_ROWS:
            triton_ring.ring_product(torch.zeros((m, w.shape[1]), dtype=torch.int32, device=w.device), w.t())

    def _product(self, z: I32, b: torch.Tensor) -> I32:
        m, room = len(z), self._room(len(z), len(b), b.shape[1])
        np.copyto(room.words[:m], z)
        if m > GRAPH_ROWS:
            room.multiply(b, m)
        else:
            self._replay(room, b, m)()
        if self._device != "cpu":
            torch.cuda.current_stream().synchronize()
        return room.answer[:m].copy()  # the room is used again before this answer is sent

    def _room(self, m: int, k: int, n: int) -> Room:
        """Of a power of two of rows, so that there are few."""
        rows = max(GRAPH_ROWS, 1 << (m - 1).bit_length())
        if (rows, k, n) not in self._rooms:
            self._rooms[rows, k, n] = Room(rows, k, n, self._device)
        return self._rooms[rows, k, n]

    def _replay(self, room: Room, b: torch.Tensor, m: int) -> Callable[[], None]:
        """The graph of this product; the one that was not used for longest makes room for a new one."""
        key = (b.data_ptr(), *b.shape, *b.stride(), m)
        if key not in self._replays:
            self._replays[key] = self._capture(lambda: room.multiply(b, m)), b
            if len(self._replays) > MOST_GRAPHS:
                self._replays.popitem(last=False)
        self._replays.move_to_end(key)
        return self._replays[key][0]
