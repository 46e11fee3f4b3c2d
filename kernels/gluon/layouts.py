"""Register and shared memory layouts of the Gluon kernel.

The warps that multiply, 4 or 8, have BLOCK_N weight rows, 16 or 32 to a warp, and all BLOCK_M tokens of a tile. Thread
4g + t of warp w has rows 16w + g and 16w + g + 8, and the 16 bytes from 16t on of each row: the values that thread t
holds of the first operand of a wgmma (packing/fragments.py).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def packed_layout(rows, warps):
    """int16 [rows, 32] packed weights in registers: one 16-byte read for each row of a thread."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0]] + ([[16 * warps, 0]] if rows > 16 * warps else []),
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]] + ([[64, 0]] if warps == 8 else []),
        block_bases=[],
        shape=[rows, 32],
    )


@gluon.constexpr_function
def scale_layout(rows, warps):
    """int32 [rows // 2] words of two scales, rows r and r + 8: each thread has those of its own rows."""
    return gl.DistributedLinearLayout(
        reg_bases=[[8 * warps]] if rows > 16 * warps else [],
        lane_bases=[[0], [0], [1], [2], [4]],
        warp_bases=[[8], [16]] + ([[32]] if warps == 8 else []),
        block_bases=[],
        shape=[rows // 2],
    )


@gluon.constexpr_function
def sums_layout(block_m, warps):
    """fp32 [rows, block_m] sums."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, block_m, 16])


@gluon.constexpr_function
def store_layout(rows, warps):
    """bf16 [rows, block_m] results, 16 bytes of a token's row to a thread."""
    across = rows // 8 if rows < 256 else 32
    return gl.BlockedLayout([8, 1], [across, 32 // across], [1, warps], [0, 1])


@gluon.constexpr_function
def copy_layout(lanes, warps):
    """Copies of 16 bytes of 16-bit values, `lanes` threads to a row."""
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.constexpr_function
def words_layout(warps):
    """Copies of single words."""
    return gl.BlockedLayout([1], [32], [warps], [0])


@gluon.constexpr_function
def rows_in_order(dimensions):
    """Shared memory without swizzling."""
    return gl.SwizzledSharedLayout(1, 1, 1, [1, 0][2 - dimensions :])


@gluon.constexpr_function
def tokens_layout(columns):
    """bf16 [block_m, columns] tokens in shared memory, as the second operand of a wgmma."""
    return gl.NVMMASharedLayout(swizzle_byte_width=2 * columns, element_bitwidth=16, rank=2)
