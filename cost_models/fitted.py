"""What has been learnt of a chip by compiling for it?  Constants of `product` and `vector`.

They are fitted to XLA:TPU's own `estimated_cycles` by tests/accuracy/fit_compute.py, and stand in
[chip.fitted] of a cluster file. How XLA:TPU counts, as far as its answers tell:

* A kernel takes the longer of its arithmetic and its traffic, and a start of about a microsecond.
* Traffic is bytes over a bandwidth that is the same for reads and writes, of any dtype.
* A kernel that stores no whole array of 32 bits (because its result is bfloat16, or a sum) takes
  longer, by as much as reading one more float32 array of that size. This is why a bfloat16 chain is
  hardly quicker than a float32 one. On v6e a product's result costs nothing of this where it stays
  in VMEM; what a kernel without a product makes does, and so does a product's on v5e.
* One operation that nothing is fused with (a sum of what a caller gave, a stored conversion or
  broadcast) works in smaller pieces than a fused chain, which costs it a little per element.
* A product works in blocks of the matrix unit: of m, n, k the two that the unit holds are rounded
  up to it. Reading a product's operands and writing its result takes a little longer per element.
* While a kernel computes, the next one's operands are fetched into memory on the chip; a product
  that computes longer than it reads has one operand there. `product.fetched_ahead` says which.
* A product whose kernel computes both operands as it reads them (weights that it converts, what a
  layer norm makes) takes longer: it reads one of them again for each block of the other, and none
  was fetched ahead.
* On v6e a product's kernel that also reduces what it makes is counted without its traffic, even
  where that is more than the memory can move in the time. Here it takes at least as long as that.
* Transposes are copies, or what the layout of a neighbour absorbs. Gathers, scatters and sorts have
  no estimate at all: they are priced by their traffic, which is a lower bound.
* A product with a side of one does not use the matrix unit. It is a multiplication and a sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Elements of a row of a tile, on every TPU: jax-ml.github.io/scaling-book/tpus
LANES = 128

# What is no loop over an array, and has a price per element of its own.
MOVES = ("concatenate", "cumulative")


@dataclass(frozen=True, slots=True)
class Fitted:
    """Seconds, bytes/s, and shares of `Chip.peak_flops`.

    stream: bytes/s of kernels. start: of a kernel that is no product. element: per element that a
    kernel works on; narrow: the same, more, where it writes no whole array of 32 bits; alone: the
    same, more, where it is one operation that nothing is fused with. product_start,
    product_element, product_narrow: the same of a product, per element of operands and result, and
    of the result. product_narrow_near: the share of product_narrow that a result costs, too, which
    stays in VMEM. product_softmax: per element of a result that its kernel turns into exponentials
    of rows, less their maxima, however long that takes otherwise. product_computed: by what share
    of its arithmetic a product takes longer whose kernel computes both operands.
    product_sum_stream: bytes/s of a product's kernel that also reduces what it makes, whose
    elements then cost nothing more; 0: as of others. turned_stream: bytes/s of a copy from rows to
    columns, or back, where the compiler swaps the operands of a product (`passes.turned`); 0: it
    swaps none. tile_folded: for a tile whose rows a lone kernel adds up, or spreads one row over
    (`passes.bags`); 0: as of others. tile_turned: for a tile of picked rows that is laid anew with
    its rows along the lanes (`passes.reshard_copies`). filled_inside: bytes of a table up to which
    the kernel that adds rows to it fills it with zeros, too (`passes.zeros`). unit: elements along
    a side of the matrix unit. vmem: bytes of memory on the chip. handed_on: the share of it up to
    which copies and sums stay there; 0 where kernels hand on nothing (`passes.handed_on` tells how
    much of their results they do). quotients_kept: 1 where a quotient that is made narrower is kept
    for all who read it, 2 where only beside an all-to-all (`passes.quotients`), 0 where each
    computes it. gather_inside: by how much the kernels take longer inside which a weight is
    gathered. efficiency: per dtype of the operands the share of bfloat16's peak. conv_efficiency:
    the share of that which convolutions reach. moves: seconds per element by kind, one of MOVES.
    """

    stream: float
    start: float
    element: float
    narrow: float
    alone: float
    product_start: float
    product_element: float
    product_narrow: float
    product_narrow_near: float
    product_softmax: float
    product_computed: float
    product_sum_stream: float
    turned_stream: float
    tile_folded: float
    tile_turned: float
    filled_inside: float
    unit: int
    vmem: float
    handed_on: float
    quotients_kept: int
    gather_inside: float
    conv_efficiency: float
    efficiency: Mapping[str, float] = field(hash=False)
    moves: Mapping[str, float] = field(hash=False)
