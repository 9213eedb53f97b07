"""What PyTorch's caching allocator would reserve for a trace, with and without expandable segments.

Follows c10/cuda/CUDACachingAllocator.cpp (`malloc`, `get_free_block`, `should_split`, `alloc_block`, `free_block`,
`try_merge_blocks`, `release_cached_blocks`; `find_expandable_block`, `map_block`, `unmap_block`) with its default
settings: no max_split_size, no garbage_collection_threshold, no rounding to powers of two.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from tersor.formats.memory_trace import Trace

MIN_BLOCK = 512  # kMinBlockSize: sizes are rounded up to it
SMALL = 1 << 20  # kSmallSize: the largest size that the small pool serves
SMALL_BUFFER = 2 << 20  # kSmallBuffer: what the small pool asks the device for, and a page of its expandable segment
LARGE_BUFFER = 20 << 20  # kLargeBuffer: the same for sizes from 1 to 10 MiB, and a page of the large expandable segment
MIN_LARGE = 10 << 20  # kMinLargeAlloc: from here on a segment is as large as the request,
ROUND_LARGE = 2 << 20  # kRoundLarge: rounded up to this
ADDRESS_SPACE = 1 << 52  # of one expandable segment


@dataclass
class Simulated:
    """What a run of the allocator came to.

    `reserved` and `allocated` are the bytes after each event, `retries` how often the cache was given back to the device
    to make room, `out_of_memory_event` the event that could not be served even so (the run ends there).
    """

    reserved_peak_bytes: int = 0
    allocated_peak_bytes: int = 0
    reserved: list[int] = field(default_factory=list)
    allocated: list[int] = field(default_factory=list)
    retries: int = 0
    out_of_memory_event: int | None = None

    @property
    def fragmentation(self) -> float:
        """Share of the reserved peak that the allocated peak does not explain."""
        return 1 - self.allocated_peak_bytes / self.reserved_peak_bytes if self.reserved_peak_bytes else 0.0


def rounded(nbytes: int) -> int:
    """Bytes that an allocation takes; one of zero bytes takes none."""
    return -(-nbytes // MIN_BLOCK) * MIN_BLOCK


def simulate(trace: Trace, expandable: bool = False, capacity_bytes: int | None = None) -> Simulated:
    """Serve `trace` on a device of `capacity_bytes` (None: without end)."""
    allocator = CachingAllocator(expandable, capacity_bytes)
    result = Simulated()
    starts = {block.start: block for block in trace.blocks}
    ends = {block.end: block for block in trace.blocks if block.end < trace.events}
    held: dict[int, _Block | None] = {}
    allocated = 0
    for event in range(trace.events):
        if block := starts.get(event):
            try:
                held[event] = allocator.malloc(block.bytes, block.stream)
            except MemoryError:
                result.out_of_memory_event = event
                break
            allocated += rounded(block.bytes)
        else:
            block = ends[event]
            allocator.free(held.pop(block.start))
            allocated -= rounded(block.bytes)
        result.reserved.append(allocator.reserved)
        result.allocated.append(allocated)
    result.reserved_peak_bytes = allocator.peak
    result.allocated_peak_bytes = max(result.allocated, default=0)
    result.retries = allocator.retries
    return result


class _Block:
    """A run of addresses in a segment; `previous` and `next` are its neighbours there."""

    __slots__ = ("address", "allocated", "mapped", "next", "pool", "previous", "size")

    def __init__(self, pool: _Pool, address: int, size: int, mapped: bool = True):
        self.pool, self.address, self.size, self.mapped = pool, address, size, mapped
        self.allocated = False
        self.previous: _Block | None = None
        self.next: _Block | None = None

    def split(self, size: int) -> _Block:
        """Keep the first `size` bytes, return the rest as a block of its own."""
        rest = _Block(self.pool, self.address + size, self.size - size, self.mapped)
        rest.previous, rest.next = self, self.next
        if self.next:
            self.next.previous = rest
        self.next, self.size = rest, size
        return rest

    @property
    def whole(self) -> bool:
        """It is all of its segment."""
        return self.previous is None and self.next is None

    @property
    def growable(self) -> int:
        """Its size and that of unmapped addresses right behind it."""
        return self.size + (self.next.size if self.next and not self.next.mapped else 0)


class _Pool:
    """Free blocks of one stream and kind, by size and then address; unmapped ones of expandable segments by address."""

    def __init__(self, small: bool):
        self.small = small
        self.page = SMALL_BUFFER if small else LARGE_BUFFER
        self._keys: list[tuple[int, int]] = []
        self._at: dict[int, _Block] = {}
        self.unmapped: list[_Block] = []

    def insert(self, block: _Block) -> None:
        if block.mapped:
            insort(self._keys, (block.size, block.address))
            self._at[block.address] = block
        else:
            insort(self.unmapped, block, key=lambda other: other.address)

    def remove(self, block: _Block) -> None:
        if block.mapped:
            del self._keys[bisect_left(self._keys, (block.size, block.address))]
            del self._at[block.address]
        else:
            self.unmapped.remove(block)

    def free_blocks(self) -> list[_Block]:
        return [self._at[address] for _, address in self._keys]

    def best_fit(self, size: int, expandable: bool) -> _Block | None:
        """The smallest free block of at least `size`. One that can grow counts with all that it can grow to."""
        index = bisect_left(self._keys, (size, 0))
        if index == len(self._keys):
            return None
        found = self._at[self._keys[index][1]]
        while expandable and index + 1 < len(self._keys):
            index += 1
            other = self._at[self._keys[index][1]]
            if other.growable >= found.growable:
                break
            found = other
        return found


class CachingAllocator:
    """`reserved` is what the device has given, `peak` its maximum. Raises MemoryError when `capacity_bytes` is exceeded
    even after what is cached was given back."""

    def __init__(self, expandable: bool = False, capacity_bytes: int | None = None):
        self.expandable, self.capacity = expandable, capacity_bytes
        self.reserved = self.peak = self.retries = 0
        self._pools: dict[tuple[int, bool], _Pool] = {}
        self._next_address = 0

    def malloc(self, nbytes: int, stream: int = 0) -> _Block | None:
        size = rounded(nbytes)
        if not size:
            return None  # PyTorch asks for nothing either
        small = size <= SMALL
        pool = self._pools.setdefault((stream, small), _Pool(small))
        block = pool.best_fit(size, self.expandable)
        if block:
            pool.remove(block)
        else:
            block = self._from_device(pool, size)
            if block is None:
                self.retries += 1
                self.release_cached()
                block = self._from_device(pool, size)
            if block is None:
                raise MemoryError
        remaining = block.size - size
        if remaining >= MIN_BLOCK if pool.small or self.expandable else remaining > SMALL:
            pool.insert(block.split(size))
        block.allocated = True
        return block

    def free(self, block: _Block | None) -> None:
        if block is None:
            return
        block.allocated = False
        self._give(block)

    def _give(self, block: _Block) -> None:
        """Insert a free (or unmapped) block into its pool, merged with its neighbours of the same kind."""
        before, after = block.previous, block.next
        if before and not before.allocated and before.mapped == block.mapped:
            block.pool.remove(before)
            block.address, block.size, block.previous = before.address, before.size + block.size, before.previous
            if block.previous:
                block.previous.next = block
        if after and not after.allocated and after.mapped == block.mapped:
            block.pool.remove(after)
            block.size, block.next = block.size + after.size, after.next
            if block.next:
                block.next.previous = block
        block.pool.insert(block)

    def release_cached(self) -> None:
        """Give back to the device what is wholly free: segments, and pages of expandable ones."""
        for pool in self._pools.values():
            for block in pool.free_blocks():
                if self.expandable:
                    self._unmap(block)
                elif block.whole:
                    pool.remove(block)
                    self.reserved -= block.size

    def _from_device(self, pool: _Pool, size: int) -> _Block | None:
        if self.expandable:
            return self._expand(pool, size)
        if pool.small:
            wanted = SMALL_BUFFER
        else:
            wanted = LARGE_BUFFER if size < MIN_LARGE else -(-size // ROUND_LARGE) * ROUND_LARGE
        if not self._reserve(wanted):
            return None
        block = _Block(pool, self._next_address, wanted)
        self._next_address += wanted
        return block

    def _reserve(self, nbytes: int) -> bool:
        if self.capacity is not None and self.reserved + nbytes > self.capacity:
            return False
        self.reserved += nbytes
        self.peak = max(self.peak, self.reserved)
        return True

    def _expand(self, pool: _Pool, size: int) -> _Block | None:
        """Map pages at the lowest address where `size` bytes of free and unmapped blocks lie side by side."""
        block = self._expandable_run(pool, size)
        if not block.mapped and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            following = block.next
            if not self._map(following, min(size - block.size, following.size)):
                return None
            block = following  # what was before it was merged into it
        pool.remove(block)
        return block

    def _expandable_run(self, pool: _Pool, size: int) -> _Block:
        for block in pool.unmapped:
            first = block.previous if block.previous and not block.previous.allocated else block
            length, at = 0, first
            while at is not None and not at.allocated and length < size:
                length += at.size
                at = at.next
            if length >= size:
                return first
        start = -(-self._next_address // pool.page) * pool.page
        block = _Block(pool, start, ADDRESS_SPACE // pool.page * pool.page, mapped=False)
        self._next_address = start + block.size
        pool.insert(block)
        return block

    def _map(self, block: _Block, size: int) -> bool:
        """Back the first `size` bytes of an unmapped block, in whole pages, and merge them with free neighbours."""
        size = min(-(-size // block.pool.page) * block.pool.page, block.size)
        if not self._reserve(size):
            return False
        block.pool.remove(block)
        if size < block.size:
            block.pool.insert(block.split(size))
        block.mapped = True
        self._give(block)
        return True

    def _unmap(self, block: _Block) -> None:
        """Give the whole pages inside a free block back."""
        page = block.pool.page  # segments start at a multiple of it
        first = -(-block.address // page) * page
        last = (block.address + block.size) // page * page
        if first >= last:
            return
        block.pool.remove(block)
        if first > block.address:
            inner = block.split(first - block.address)
            block.pool.insert(block)
            block = inner
        if last < block.address + block.size:
            block.pool.insert(block.split(last - block.address))
        block.mapped = False
        self.reserved -= block.size
        self._give(block)
