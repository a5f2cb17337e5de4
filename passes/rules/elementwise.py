"""What may an operation split that treats every element alike?  Every dim.

Operands may be scalars, or have dims of length one that are repeated along the result; such an
operand is then the same on all devices. What an element costs is a convention, good to a factor
of a few: one FLOP for what a vector unit does in one instruction, ten for the transcendental
functions, which are evaluated as polynomials of about that degree, a hundred for special
functions with an inner series or loop. (XLA's own HloCostAnalysis counts transcendentals apart
from FLOPs, without a weight.)
"""

from __future__ import annotations

from passes.ir.graph import Signature
from passes.ir.rule import Dim, Rule
from passes.rules.factors import Factors, is_complex, is_float
from passes.rules.registry import rule

_FREE = (
    "autoshard_annotate", "conj", "copy", "create_linear", "device_put", "imag",
    "inspect_sharding", "layout_constraint", "mesh_cast", "multiple_of", "name",
    "optimization_barrier", "pin", "pvary", "real", "relayout", "reshard", "sharding_constraint",
    "stage", "stop_gradient", "unpin", "with_memory_space_constraint", "xla_metadata_value",
)  # fmt: skip

_CHEAP = (
    "abs", "and", "ceil", "clamp", "clz", "eq", "eq_to", "floor", "ge", "gt", "is_finite", "le",
    "le_to", "lt", "lt_to", "max", "min", "mulhi", "ne", "nextafter", "not", "or",
    "population_count", "reciprocal", "reduce_precision", "rem", "round", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "sign", "square", "xor",
)  # fmt: skip

_TRANSCENDENTAL = (
    "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "cos", "cosh", "erf",
    "erf_inv", "erfc", "exp", "exp2", "expm1", "log", "log1p", "log2", "logistic", "pow", "rsqrt",
    "sin", "sinh", "sqrt", "tan", "tanh",
)  # fmt: skip

_SPECIAL = (
    "bessel_i0e", "bessel_i1e", "digamma", "igamma", "igamma_grad_a", "igammac", "lgamma",
    "polygamma", "regularized_incomplete_beta", "zeta",
)  # fmt: skip

_TRANSCENDENTAL_FLOPS = 10.0
_SPECIAL_FLOPS = 100.0


def _aligned(shape: tuple[int, ...], out: tuple[int, ...], dims: tuple[Dim, ...]) -> list[Dim]:
    """The result's dims that an operand of this shape has: its last ones, where it is that long."""
    skip = len(out) - len(shape)
    return [dims[skip + d] if n == out[skip + d] else () for d, n in enumerate(shape)]


def elementwise(
    s: Signature, flops_per_element: float, linear: tuple[tuple[int, ...], ...] = ()
) -> Rule:
    """`i j, i j -> i j`; an operand is repeated along dims it lacks or has with length one."""
    out = s.results[0].shape
    f = Factors()
    dims = f.parallel_dims(out)
    operands = [_aligned(t.shape, out, dims) for t in s.operands]
    flops = flops_per_element * s.results[0].size * (4.0 if is_complex(s.results[0]) else 1.0)
    return f.rule(operands, [dims] * len(s.results), linear=linear, flops=flops, fuses=True)


@rule("add", "add_any", "sub", "complex")
def add(s: Signature) -> Rule:
    """A sum of partial sums is the partial sum of the sums."""
    return elementwise(s, 0.0 if s.name == "complex" else 1.0, linear=((0, 1),))


@rule("bitcast_convert_type", "from_edtype", "to_edtype")
def bitcast_convert_type(s: Signature) -> Rule:
    """Where the width changes, the narrower side has one more dim, which stays in one piece."""
    operand, result = s.operands[0].shape, s.results[0].shape
    shared = min(len(operand), len(result))
    f = Factors()
    dims = f.parallel_dims(operand[:shared])
    return f.rule(
        [dims + f.whole_dims(operand[shared:])],
        [dims + f.whole_dims(result[shared:])],
        fuses=True,
    )


@rule(*_CHEAP)
def cheap(s: Signature) -> Rule:
    """One instruction an element; partial sums do not pass."""
    return elementwise(s, 1.0)


@rule("convert_element_type")
def convert_element_type(s: Signature) -> Rule:
    """Partial sums pass where the new type still holds them: between wide enough floats.

    Not so for integers, which may have wrapped around, nor for types of eight bits, whose range a
    partial sum may leave though the sum does not.
    """
    source, target = s.operands[0], s.results[0]
    wide = is_float(source) and is_float(target) and target.bits >= 16
    return elementwise(s, 1.0, linear=((0,),) if wide else ())


@rule("dce_sink")
def dce_sink(s: Signature) -> Rule:
    """Keeps its operand alive and gives nothing."""
    f = Factors()
    return f.rule([f.parallel_dims(t.shape) for t in s.operands], [], fuses=True)


@rule("div")
def div(s: Signature) -> Rule:
    """Linear in the numerator, unless it is a whole number and rounds."""
    return elementwise(s, 1.0, linear=((0,),) if is_float(s.results[0]) else ())


@rule(*_FREE)
def free(s: Signature) -> Rule:
    """Result n is operand n as it stands; all of them may be partial together.

    Operands of one shape are split alike: an axis splits one factor of an operation, and that of a
    barrier between a value and its gradient, which lie alike, would else split only one of them.
    """
    f = Factors()
    of_shape = {
        shape: f.parallel_dims(shape) for shape in dict.fromkeys(t.shape for t in s.operands)
    }
    dims = tuple(of_shape[t.shape] for t in s.operands)
    together = (tuple(range(len(dims))),)
    return f.rule(dims, dims[: len(s.results)], linear=together, fuses=True)


@rule("integer_pow")
def integer_pow(s: Signature) -> Rule:
    """x**n by repeated squaring."""
    power = int(s.params["y"])
    return elementwise(s, float(max(1, abs(power).bit_length())), ((0,),) if power == 1 else ())


@rule("mul")
def mul(s: Signature) -> Rule:
    """Linear in either operand, the other one being known in full."""
    return elementwise(s, 1.0, linear=((0,), (1,)))


@rule("neg")
def neg(s: Signature) -> Rule:
    """Linear."""
    return elementwise(s, 1.0, linear=((0,),))


@rule("one_minus_square")
def one_minus_square(s: Signature) -> Rule:
    """(1 + x)(1 - x)."""
    return elementwise(s, 3.0)


@rule("polynomial")
def polynomial(s: Signature) -> Rule:
    """Horner's rule in operand 0; the others are the coefficients, in which it is linear."""
    count = len(s.operands) - 1
    return elementwise(s, 2.0 * count, linear=(tuple(range(1, count + 1)),))


@rule("select_n")
def select_n(s: Signature) -> Rule:
    """Linear in the cases, all of them together; the choice must be known in full."""
    return elementwise(s, 1.0, linear=(tuple(range(1, len(s.operands))),))


@rule(*_SPECIAL)
def special(s: Signature) -> Rule:
    """A series or continued fraction for each element."""
    return elementwise(s, _SPECIAL_FLOPS)


@rule("tie")
def tie(s: Signature) -> Rule:
    """The second operand as it stands; the first is only waited for."""
    f = Factors()
    waited, passed = (f.parallel_dims(t.shape) for t in s.operands)
    return f.rule([waited, passed], [passed], linear=((1,),), fuses=True)


@rule(*_TRANSCENDENTAL)
def transcendental(s: Signature) -> Rule:
    """A polynomial or a table for each element."""
    return elementwise(s, _TRANSCENDENTAL_FLOPS)
