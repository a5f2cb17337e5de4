"""What may an operation split that slides a window, or accumulates along a dim?

A sliding window reads, for a stretch of its results, a stretch of its operand and a little more on
both sides. When both stretches advance at the same rate, operand and result can be split alike and
only that little more, the halo, comes from the neighbours (GSPMD, arXiv 2105.04663, section 4.3).
With stride 2 the operand advances by two where the result advances by one, which is written
`(i a) -> i` with a=2 whole.

>>> from passes.rules.factors import Factors
>>> f = Factors()
>>> three = Window(size=3, stride=2, low=0)
>>> read, made = split_window(f, 16, 8, three)
>>> print(f.rule([[read]], [[made]]), "halo", three.halo)
(i j) -> i  {i=8 j=2}  halo(i) whole(j) halo 1

Cumulative operations need all that came before: their dim is whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from passes.ir.graph import Signature, Type
from passes.ir.rule import Dim, Rule
from passes.rules.factors import Factors
from passes.rules.registry import rule


@dataclass(frozen=True, slots=True)
class Window:
    """A sliding window along one dim, in the words of XLA's convolution and reduce_window.

    size: elements the window reads. low: padding before the operand (negative cuts it off).
    base: dilation of the operand. dilation: of the window itself.
    """

    size: int
    stride: int = 1
    low: int = 0
    base: int = 1
    dilation: int = 1

    @property
    def halo(self) -> int:
        """Elements of the operand wanted from the neighbours, both sides together.

        Result p reads the dilated operand at p * stride - low + q * dilation for each q in the
        window. A piece that starts at operand element x starts at dilated element x * base.
        """
        before = self.low // self.base
        reach = (self.size - 1) * self.dilation
        after = 1 + (reach - self.stride - self.low) // self.base
        return max(0, before) + max(0, after)

    @property
    def back_halo(self) -> int:
        """Elements wanted to send gradients back: all of every window that touches the piece.

        Only for windows without dilation: max pooling has none.
        """
        before = (self.size - 1 - self.low) // self.stride * self.stride + self.low
        after = (self.low - 1) // self.stride * self.stride - self.low + self.size
        return max(0, before) + max(0, after)

    def transposed(self, made: int) -> Window:
        """The same sums with result and window in each other's place: a weight gradient's view."""
        return Window(made, self.dilation, self.low, self.base, self.stride)

    def fits(self, read: int, made: int) -> bool:
        """Whether operand and result advance together, with a halo from the next piece of two."""
        together = read > 0 and made > 0 and made * self.stride == read * self.base
        return together and self.halo <= read // 2


def split_window(
    f: Factors, read: int, made: int, w: Window, *, back: bool = False
) -> tuple[Dim, Dim]:
    """Dims of an operand of length `read` and of a result of length `made`.

    back: the operation goes from results to operands, as the gradient of a max pooling does.
    """
    halo = w.back_halo if back else w.halo
    if not w.fits(read, made) or halo > read // 2:
        return f.whole(read), f.whole(made)
    pieces = math.gcd(read, made)
    moving = f.add(pieces, "halo" if halo else "parallel", halo=halo)
    return moving + f.whole(read // pieces), moving + f.whole(made // pieces)


def _windows(s: Signature) -> list[Window]:
    p = s.params
    ones = (1,) * len(p["window_dimensions"])
    low = (pad[0] for pad in p["padding"])
    return [
        Window(*of_dim)
        for of_dim in zip(
            p["window_dimensions"],
            p["window_strides"],
            low,
            p.get("base_dilation") or ones,
            p.get("window_dilation") or ones,
            strict=True,
        )
    ]


def _slide(
    f: Factors, s: Signature, read: Type, made: Type, back: bool = False
) -> tuple[list[Dim], list[Dim]]:
    pairs = [
        split_window(f, a, b, w, back=back)
        for a, b, w in zip(read.shape, made.shape, _windows(s), strict=True)
    ]
    return [p[0] for p in pairs], [p[1] for p in pairs]


def _window_flops(s: Signature, made: int) -> float:
    return float(made * math.prod(s.params["window_dimensions"]))


@rule("reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum")
def reduce_window(s: Signature) -> Rule:
    """Pooling. The general form takes several arrays and as many scalars to start from."""
    count = len(s.results)
    f = Factors()
    read, made = _slide(f, s, s.operands[0], s.results[0])
    return f.rule(
        [read] * count + [()] * (len(s.operands) - count),
        [made] * count,
        linear=((0,),) if s.name == "reduce_window_sum" else (),
        flops=_window_flops(s, s.results[0].size) * count,
    )


@rule("select_and_gather_add")
def select_and_gather_add(s: Signature) -> Rule:
    """The tangent of a max pooling: (tangents, operand) -> tangents, linear in the first."""
    f = Factors()
    read, made = _slide(f, s, s.operands[1], s.results[0])
    flops = _window_flops(s, s.results[0].size)
    return f.rule([read, read], [made], linear=((0,),), flops=flops)


@rule("select_and_scatter_add")
def select_and_scatter_add(s: Signature) -> Rule:
    """The gradient of a max pooling: (gradient, operand) -> gradient, linear in the first."""
    f = Factors()
    read, made = _slide(f, s, s.operands[1], s.operands[0], back=True)
    flops = _window_flops(s, s.operands[0].size)
    return f.rule([made, read], [read], linear=((0,),), flops=flops)


@rule("select_and_scatter")
def select_and_scatter(s: Signature) -> Rule:
    """(operand, source, scalar to start from) -> scattered source, by functions of the user."""
    f = Factors()
    read, made = _slide(f, s, s.operands[0], s.operands[1], back=True)
    return f.rule([read, made, ()], [read], flops=_window_flops(s, s.operands[1].size))


_CUMULATIVE_FLOPS = {
    "cumlogsumexp": 20.0,
    "cummax": 1.0,
    "cummin": 1.0,
    "cumprod": 1.0,
    "cumsum": 1.0,
}


@rule(*_CUMULATIVE_FLOPS)
def cumulative(s: Signature) -> Rule:
    """`i a -> i a`, a whole."""
    f = Factors()
    axis = s.params["axis"]
    dims = [f.whole(n) if d == axis else f.parallel(n) for d, n in enumerate(s.operands[0].shape)]
    return f.rule(
        [dims],
        [dims],
        linear=((0,),) if s.name == "cumsum" else (),
        flops=_CUMULATIVE_FLOPS[s.name] * s.operands[0].size,
    )
