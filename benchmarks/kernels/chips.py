"""What a multiprocessor of each chip has room for: CUDA C++ Programming Guide, table "Technical
Specifications per Compute Capability".
"""

from dataclasses import dataclass

REGISTERS = 65536  # of a multiprocessor, on every chip since compute capability 5.0
_ALLOCATED = 256  # registers are given out to a warp in this many at a time
_RESERVED = 1024  # bytes of shared memory that CUDA keeps in each block
_WARP = 32


@dataclass(frozen=True)
class Chip:
    """name        what it is sold as
    block          bytes of shared memory that a block may ask for
    shared         bytes of shared memory that all blocks on a multiprocessor have
    warps, blocks  how many of them fit on a multiprocessor
    matrix         the tensor cores' instructions in machine code, on their newest path
    tma            whether our products load through its copy engine
    """

    name: str
    block: int
    shared: int
    warps: int
    blocks: int
    matrix: tuple[str, ...]
    tma: bool = False

    def occupancy(self, registers: int, shared: int, warps: int) -> float:
        """The share of the multiprocessor's warps that are there if it is full of such blocks:
        `registers` of each thread, `shared` bytes and `warps` of each block.
        """
        a_warp = -(-max(registers, 1) * _WARP // _ALLOCATED) * _ALLOCATED
        fit = (
            REGISTERS // a_warp // warps,
            self.shared // (shared + _RESERVED),
            self.warps // warps,
            self.blocks,
        )
        return min(fit) * warps / self.warps


_SMALL = 101_376, 102_400, 48  # 99 KB for a block, 48 warps

CHIPS = {
    80: Chip("A100", 166_912, 167_936, 64, 32, ("HMMA",)),
    86: Chip("RTX 30, A10, A40", *_SMALL, 16, ("HMMA",)),
    89: Chip("RTX 40, L4, L40", *_SMALL, 24, ("HMMA",)),
    90: Chip("H100, H200", 232_448, 233_472, 64, 32, ("HGMMA",), tma=True),
    100: Chip("B200", 232_448, 233_472, 64, 32, ("UTCHMMA", "UTCQMMA", "UTCMMA"), tma=True),
    120: Chip("RTX 50", *_SMALL, 24, ("HMMA",)),
}
DEFAULT = (80, 90, 100)  # what the gate compiles for unless told otherwise
