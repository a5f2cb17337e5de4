# %% [markdown]
# # How fast can a chip compute?
#
# A chip is as fast as the slower of two things: its arithmetic, and its memory. This notebook shows
# both for chips of the catalogue, and then how much of the peak a matrix product really reaches, by
# its size, its alignment and its dtype. Everything is computed by `cost_models`, without jax.
#
# What a planner learns here: which shard sizes are worth having. Splitting a product over more
# devices makes each share smaller, and below some size a share no longer gets quicker.

# %%
import csv
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import plot_style as style

from cost_models.cluster import Chip, cluster
from cost_models.product import fetched_ahead, product_seconds
from cost_models.roofline import compute_seconds, peak_flops

SPECS = ("tpu-v5e:1x1", "tpu-v5p:1x1x1", "tpu-v6e:1x1", "h100:1", "b200:1", "mi300x:1")
CHIPS = {spec.split(":")[0]: cluster(spec).chip for spec in SPECS}

# %% [markdown]
# ## The roofline
#
# Work with little arithmetic for each byte waits for memory: the slope. Work with much is bound by
# the matrix unit: the roof. The knee between them is the intensity from which a chip is kept busy.
# Both are what large operations reach, and not what the data sheet says.

# %%
intensity = np.logspace(0, 4, 200)  # FLOP for each byte of memory traffic


def rate(chip: Chip, flop_per_byte: float) -> float:
    """FLOP/s of a bfloat16 product of this intensity."""
    return flop_per_byte / compute_seconds(chip, flop_per_byte, 1.0, "bfloat16", True)


def knee(chip: Chip) -> float:
    """FLOP per byte from which a product is no longer bound by memory."""
    return rate(chip, 1e9) * compute_seconds(chip, 0.0, 1.0, "bfloat16", True)


knees = {name: knee(chip) for name, chip in CHIPS.items()}
few, many = min(knees.values()), max(knees.values())
figure, [ax] = style.panels(
    f"A product needs {few:.0f} to {many:.0f} FLOP for each byte to keep a chip busy"
)
for name, chip in CHIPS.items():
    [line] = ax.plot(intensity, [rate(chip, x) / 1e12 for x in intensity], label=name)
    ax.plot(knees[name], rate(chip, knees[name]) / 1e12, "o", color=line.get_color())
for x, y, what in (
    (8, 120, "decoding 8 texts"),
    (128, 1.2, "128 texts"),
    (4096 / 3, 1.2, "4096^3"),
):
    ax.axvline(x, color=style.GREY, linestyle=":", linewidth=1.5)
    ax.text(x * 0.98, y, what, color=style.GREY, rotation=90, ha="right", va="bottom", fontsize=11)
ax.set(xscale="log", yscale="log", xlim=(1, 1e4), ylim=(1, 3000))
ax.set(xlabel="arithmetic for each byte of memory traffic [FLOP/byte]")
ax.set(ylabel="bfloat16 product [TFLOP/s]")
ax.legend(title="the dot: its knee", loc="lower right")
plt.show()

# %%
decoding = {name: rate(chip, 8) / rate(chip, 1e9) for name, chip in CHIPS.items()}
print({name: f"{share:.1%} of its rate at batch 8" for name, share in decoding.items()})
assert max(decoding.values()) < 0.1, "decoding a small batch leaves every matrix unit idle"
assert many < 4096 / 3, "a large training product keeps all of them busy"

# %% [markdown]
# ## Efficiency against size
#
# TPU v5e, v5p and v6e carry constants fitted to the compiler's own estimates, so that small and
# narrow products are priced too. Lines are the model; dots are what XLA:TPU estimates for the same
# product when it compiles it (`tests/data/tpu_cycles.csv`; the model was fitted to part of them).

# %%
TPUS = {name: chip for name, chip in CHIPS.items() if chip.fitted is not None}
CLOCKS = {s.split(":")[0]: float(cluster(s).compiler["clock_rate_ghz"]) * 1e9 for s in SPECS[:3]}
WIDTH = {"bfloat16": 2, "float32": 4, "int8": 1, "int32": 4}
RESULT = {"int8": "int32"}
DTYPES = ("float32", "bfloat16", "int8")


def seconds(chip: Chip, m: int, n: int, k: int, dtype: str = "bfloat16") -> float:
    """Of a product [m, k] x [k, n], alone in a program."""
    operands = [m * k * WIDTH[dtype], k * n * WIDTH[dtype]]
    moved = sum(operands) + m * n * WIDTH[RESULT.get(dtype, dtype)]
    moved -= fetched_ahead(chip, 2.0 * m * n * k, dtype, moved, operands)
    return product_seconds(chip, 1, m, n, k, dtype, moved, RESULT.get(dtype, dtype))


def efficiency(chip: Chip, m: int, n: int, k: int, dtype: str = "bfloat16") -> float:
    """The share of the data sheet's peak."""
    return 2.0 * m * n * k / seconds(chip, m, n, k, dtype) / peak_flops(chip, dtype)


def compiled(name: str) -> dict[tuple[int, int, int], float]:
    """Seconds that XLA:TPU estimates, by (m, n, k): plain products of bfloat16."""
    column = name.removeprefix("tpu-")
    with (Path("..") / ".." / "tests" / "data" / "tpu_cycles.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if r["op"] == "mk,kn->mn" and r[column]]
    plain = [r for r in rows if r["dtypes"] == "bfloat16>bfloat16>bfloat16"]
    cycles = {r["sizes"]: sum(map(int, r[column].split("+"))) for r in plain}
    sizes = {text: tuple(map(int, text.split("x"))) for text in cycles}
    return {(m, n, k): cycles[s] / CLOCKS[name] for s, (_, m, n, k) in sizes.items()}


ESTIMATES = {name: compiled(name) for name in TPUS}


def dots(name: str, fixed: dict[str, int]) -> tuple[list[int], list[float]]:
    """Sizes and efficiencies of what was compiled with these of m, n, k; the others alike."""
    found = []
    for m, n, k in ESTIMATES[name]:
        size = dict(zip("mnk", (m, n, k), strict=True))
        free = {value for letter, value in size.items() if letter not in fixed}
        if len(free) == 1 and all(size[letter] == value for letter, value in fixed.items()):
            share = 2 * m * n * k / ESTIMATES[name][m, n, k] / peak_flops(TPUS[name], "bfloat16")
            found.append((free.pop(), share))
    return tuple(map(list, zip(*sorted(found), strict=True)))


# %%
def size_for(name: str, wanted: float) -> int:
    """The smallest power of two from which a square product reaches this efficiency."""
    return next(n for n in 2 ** np.arange(5, 15) if efficiency(TPUS[name], n, n, n) >= wanted)


half = {name: size_for(name, 0.5) for name in TPUS}
figure, axes = style.panels(
    f"Half of the peak takes a product of {min(half.values())} to {max(half.values())} on a side", 2
)
squares, rows = 2 ** np.arange(6, 14), 2 ** np.arange(3, 15)
for name, colour in zip(TPUS, style.COLOURS, strict=False):
    for ax, sizes, fixed in (
        (axes[0], squares, {}),
        (axes[1], rows, {"n": 4096, "k": 4096}),
    ):
        line = [efficiency(TPUS[name], *(fixed.get(c, int(s)) for c in "mnk")) for s in sizes]
        ax.plot(sizes, [100 * share for share in line], color=colour, label=name)
        at, share = dots(name, fixed)
        ax.plot(at, [100 * s for s in share], "o", color=colour, markersize=7, alpha=0.7)
for ax, what in zip(axes, ("n x n x n", "n x 4096 x 4096"), strict=True):
    style.size_axis(ax.xaxis, [8, 32, 128, 512, 2048, 8192])
    ax.set(xlabel="n", ylabel="efficiency [% of peak]", ylim=(0, 100), title=what)
axes[1].set_xlim(rows[0], rows[-1])
axes[0].set_xlim(squares[0], squares[-1])
axes[0].legend(title="line: model, dots: XLA:TPU")
plt.show()

# %%
for name, chip in TPUS.items():
    ratios = [
        seconds(chip, *size) / found for size, found in ESTIMATES[name].items() if min(size) > 1
    ]
    off = float(np.median(np.abs(np.log(ratios))))
    print(f"{name}: {len(ratios)} bfloat16 products, off by {off:.1%} in the median")
    assert off < 0.15
    assert efficiency(chip, 128, 128, 128) < 0.05 < 0.75 < efficiency(chip, 8192, 8192, 8192)

# %% [markdown]
# ## Alignment
#
# The matrix unit takes blocks of 128 x 128 (of 256 x 256 on v6e). Of m, n and k it holds the
# contracted one and the longer of the other two: they are filled up to whole blocks, and what is
# filled up is computed all the same. So efficiency has teeth, and a share of 2056 columns takes as
# long as one of 2176 (v6e: 2304).

# %%
figure, axes = style.panels("A share that fills no whole block pays for the rest of it", 3, 4.4)
widths = np.arange(2048, 3080, 8)
teeth = {}
for ax, (name, chip) in zip(axes, TPUS.items(), strict=True):
    unit = chip.fitted.unit
    shares = np.array([efficiency(chip, 2048, int(n), 8192) for n in widths])
    whole = widths % unit == 0
    ax.plot(widths, 100 * shares, color=style.BLUE)
    ax.plot(widths[whole], 100 * shares[whole], "o", color=style.GREEN, label="whole blocks")
    ax.set_xticks(range(2048, 3073, 256))
    ax.set(title=f"{name}: blocks of {unit}", ylim=(60, 100), xlabel="n, of 2048 x n x 8192")
    teeth[name] = seconds(chip, 2048, 2056, 8192) / seconds(chip, 2048, 2048, 8192)
axes[0].set(ylabel="efficiency [% of peak]")
axes[0].legend(loc="lower right")
plt.show()

# %%
print({name: f"8 columns more than 2048: {x - 1:.0%} longer" for name, x in teeth.items()})
assert min(teeth.values()) > 1.04
# And as the compiler has it:
odd, even = (ESTIMATES["tpu-v5e"][n, n, n] for n in (1000, 1024))
print(f"XLA:TPU gives 1000 x 1000 x 1000 {odd / even:.0%} of the time of 1024 x 1024 x 1024")
assert odd / even > (1000 / 1024) ** 3 * 1.03, "it has 7 % less arithmetic"

# %% [markdown]
# ## Dtype
#
# A float32 product on a TPU is one bfloat16 pass over wider operands (at jax's default precision):
# it costs little more arithmetic and twice the memory traffic. int8 has twice the peak; no int8
# product was compiled, so it is taken to reach the same share of its peak as bfloat16.

# %%
figure, axes = style.panels("bfloat16 helps where memory is the limit, int8 everywhere", 2, 4.4)
shapes = {
    "4096 x 4096 x 4096, arithmetic": (4096, 4096, 4096),
    "64 x 4096 x 4096, memory": (64, 4096, 4096),
}
for ax, (what, size) in zip(axes, shapes.items(), strict=True):
    for k, dtype in enumerate(DTYPES):
        times = [seconds(chip, *size, dtype) * 1e6 for chip in TPUS.values()]
        bars = ax.bar(np.arange(len(TPUS)) + 0.27 * (k - 1), times, 0.25, label=dtype)
        ax.bar_label(bars, [f"{t:.0f}" for t in times], fontsize=11)
    ax.set_xticks(range(len(TPUS)), TPUS)
    ax.set(title=what, ylabel="time [us]")
    ax.grid(axis="x", visible=False)
axes[1].legend()
plt.show()

# %%
for chip in TPUS.values():
    large, thin = ([seconds(chip, *size, d) for d in DTYPES] for size in shapes.values())
    assert large[0] >= large[1] > large[2], "float32, bfloat16, int8"
    assert thin[0] > 1.2 * thin[1], "a thin product reads its weights, twice as many bytes"
