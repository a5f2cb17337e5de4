# %% [markdown]
# # What does a collective cost, and along which axis?
#
# A mesh axis is laid on wires: on a ring or a part of one on a TPU's torus, inside NVLink or across
# InfiniBand on GPUs. This notebook shows how fast each collective runs along an axis, by its size
# and by where the axis lies. Everything is computed by `cost_models`, without jax.
#
# What a planner learns here: small messages cost their latency and large ones their bytes; which
# mesh axis lies where matters as much as how many bytes are sent.
#
# Plots show *bus bandwidth*, as NCCL's tests print it: the bytes that each device has to send by a
# ring, for each second. An ideal ring gives the same number for any number of devices, so that
# curves can be compared with a data sheet.

# %%
import csv
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import plot_style as style

from cost_models.cluster import cluster
from cost_models.collectives import COLLECTIVES, Collective, chosen, seconds, sent_bytes
from cost_models.topology import AxisLink, join, lay

KiB, MiB, GiB = 2.0**10, 2.0**20, 2.0**30
SIZES = 2.0 ** np.arange(12, 34.25, 0.25)  # bytes of the whole array, 4 KiB to 16 GiB


def bus_bandwidth(kind: Collective, nbytes: float, link: AxisLink) -> float:
    """GB/s that each device sends; nbytes: of the larger of local operand and local result."""
    return sent_bytes(kind, nbytes, link.size) / seconds(kind, nbytes, link) / 1e9


def curve(link: AxisLink, kind: Collective = "all_reduce") -> list[float]:
    """Over SIZES."""
    return [bus_bandwidth(kind, size, link) for size in SIZES]


# %% [markdown]
# ## A torus: rings, open lines, and several dims at once
#
# On a TPU each chip has links in two or three dims. An axis over a whole dim that is wrapped is a
# ring and uses both directions; where the ends are open it gets half of that. v5e wraps a dim of 16
# only, v5p every dim of a multiple of 4. An axis over several dims uses all their links at once.

# %%
v5e, pod = cluster("tpu-v5e:8x8"), cluster("tpu-v5e:16x16")
cube = cluster("tpu-v5p:4x4x4")
LINKS = {
    "v5e 8x8": {
        "1 dim, 8 chips, open": lay(v5e, (8, 8))[1],
        "2 dims, 64 chips, open": join(v5e, (8, 8), (0, 1)),
    },
    "v5e 16x16": {
        "1 dim, 16 chips, ring": lay(pod, (16, 16))[1],
        "2 dims, 256 chips, rings": join(pod, (16, 16), (0, 1)),
    },
    "v5p 4x4x4": {
        "1 dim, 4 chips, ring": lay(cube, (4, 4, 4))[2],
        "2 dims, 16 chips, rings": join(cube, (4, 4, 4), (1, 2)),
        "3 dims, 64 chips, rings": join(cube, (4, 4, 4), (0, 1, 2)),
    },
}
open_line, ring = (
    LINKS["v5e 8x8"]["1 dim, 8 chips, open"],
    LINKS["v5e 16x16"]["1 dim, 16 chips, ring"],
)
gain = bus_bandwidth("all_reduce", GiB, ring) / bus_bandwidth("all_reduce", GiB, open_line)
figure, axes = style.panels(
    f"A wrapped dim is {gain:.1f} times an open one; every further dim adds its links", 3
)
for ax, (where, links) in zip(axes, LINKS.items(), strict=True):
    for label, link in links.items():
        ax.plot(SIZES, curve(link), label=label)
    style.byte_axis(ax.xaxis, 2**12, 2**32, 32)
    ax.set(title=where, xlabel="array to be summed")
    ax.legend(loc="upper left")
for ax in axes[:2]:
    ax.set_ylim(0, 250)
axes[2].set_ylim(0, 800)
axes[0].set_ylabel("bus bandwidth of all-reduce [GB/s]")
plt.show()

# %%
assert 1.9 < gain <= 2.1
one, two, three = (bus_bandwidth("all_reduce", GiB, k) for k in LINKS["v5p 4x4x4"].values())
assert 1.8 < two / one <= 2.05
assert 2.7 < three / one <= 3.05
for link in LINKS["v5p 4x4x4"].values():
    full = next(s for s in SIZES if bus_bandwidth("all_reduce", s, link) > link.bandwidth / 2e9)
    print(f"{link.size:3} chips: {full / MiB:.2f} MiB for half of {link.bandwidth / 1e9:.0f} GB/s")

# %% [markdown]
# ## Where an axis lies
#
# 64 chips of v5p, an array of 64 MiB on each, summed along one axis of a mesh of two. An axis takes
# whole dims of the torus where it can, and is a ring then; a part of a dim is an open line, and
# where two axes share a dim one of them steps over chips, and gets half of each link or less.

# %%
MESHES = [(64 // m, m) for m in (2, 4, 8, 16, 32)]
times = {mesh: [seconds("all_reduce", 64 * MiB, k) for k in lay(cube, mesh)] for mesh in MESHES}
rates = {
    mesh: [bus_bandwidth("all_reduce", 64 * MiB, k) for k in lay(cube, mesh)] for mesh in MESHES
}
slow = max(max(t) for t in times.values()) / min(min(t) for t in times.values())
figure, axes = style.panels(
    f"The same bytes take up to {slow:.1f} times as long on an axis with few links", 2
)
for k, (name, colour) in enumerate(
    (("first axis, data", style.BLUE), ("last axis, model", style.ORANGE))
):
    at = np.arange(len(MESHES)) + 0.4 * (k - 0.5)
    axes[0].bar(at, [times[m][k] * 1e6 for m in MESHES], 0.38, color=colour, label=name)
    axes[1].bar(at, [rates[m][k] for m in MESHES], 0.38, color=colour, label=name)
for ax, what in zip(axes, ("all-reduce of 64 MiB [us]", "bus bandwidth [GB/s]"), strict=True):
    ax.set_xticks(range(len(MESHES)), [f"{d} x {m}" for d, m in MESHES])
    ax.set(xlabel="mesh data x model on v5p 4x4x4", ylabel=what)
    ax.grid(axis="x", visible=False)
axes[0].set_ylim(0, 1.35 * max(max(t) for t in times.values()) * 1e6)
axes[0].legend(loc="upper left", ncols=2)
plt.show()

# %%
data, model = lay(cube, (16, 4))
assert data.hops[0].wires != model.hops[0].wires, "they have dims of their own"
assert slow > 2

# %% [markdown]
# ## Which algorithm runs
#
# Libraries choose: few steps for small arrays, all the bandwidth for large ones. The colour of the
# line is the algorithm that is quickest by the model. Dots are published measurements of NCCL
# (github.com/stas00/ml-engineering): 8 H200 on one NVSwitch, and 4 nodes of 8 B200 on EFA. Across
# nodes a tree takes fewer steps than a ring; a *switch tree* is hierarchical: NVSwitches add up
# inside the nodes, a tree across them. A100's switches can not add, so that a ring wins in the end.
# (The protocols LL and LL128 trade bandwidth for shorter steps.)

# %%


def measured(name: str) -> tuple[list[float], list[float]]:
    """Bytes and GB/s of a published sweep."""
    text = (Path("..") / ".." / "tests" / "data" / name).read_text().splitlines()
    rows = list(csv.DictReader(line for line in text if not line.startswith("#")))
    return [float(r["payload_KiB"]) * KiB for r in rows], [float(r["busbw_GBps"]) for r in rows]


def whole(spec: str) -> AxisLink:
    """One axis over all devices."""
    c = cluster(spec)
    return lay(c, (c.devices,))[0]


PANELS = {
    "8 x H200, NVLink": ("h200:8", "h200_all_reduce.csv"),
    "4 x 8 B200, NVLink + EFA": ("b200:4x8", "b200_nodes_all_reduce.csv"),
    "4 x 8 A100, NVLink + InfiniBand": ("a100:4x8", ""),
}
used = {
    title: [chosen("all_reduce", s, whole(spec)) for s in SIZES]
    for title, (spec, _) in PANELS.items()
}
every = dict.fromkeys(name for names in used.values() for name in names)
colours = dict(zip(every, style.COLOURS, strict=False))
figure, axes = style.panels("Small arrays take few steps, large ones all the bandwidth", 3)
off = {}
for ax, (title, (spec, file)) in zip(axes, PANELS.items(), strict=True):
    link, line = whole(spec), np.array(curve(whole(spec)))
    for algorithm in dict.fromkeys(used[title]):
        mine = np.array([a == algorithm for a in used[title]])
        mine[1:] |= mine[:-1]  # up to where the next one begins
        ax.plot(SIZES, np.where(mine, line, np.nan), color=colours[algorithm], label=algorithm)
    if file:
        sizes, found = measured(file)
        ax.plot(sizes, found, "o", color="black", markersize=5, alpha=0.6, label="measured")
        ratios = [
            bus_bandwidth("all_reduce", s, link) / f for s, f in zip(sizes, found, strict=True)
        ]
        off[title] = float(np.median(np.abs(np.log(ratios))))
    style.byte_axis(ax.xaxis, 2**12, 2**32, 32)
    ax.set(title=title, xlabel="array to be summed")
    ax.legend(loc="upper left")
axes[0].set_ylabel("bus bandwidth of all-reduce [GB/s]")
plt.show()

# %%
for title, error in off.items():
    print(f"{title}: off by {error:.0%} in the median, {' -> '.join(dict.fromkeys(used[title]))}")
    assert error < 0.3
first, last = ({title: found[k].split()[0] for title, found in used.items()} for k in (0, -1))
assert list(last.values()) == ["switch", "switch", "ring"]
assert first["4 x 8 A100, NVLink + InfiniBand"] == "tree"

# %% [markdown]
# ## NVLink and InfiniBand
#
# Four nodes of eight H100. An axis inside a node has NVLink. Across nodes an axis leaves by as many
# network cards as it has GPUs in each node: where it steps over GPUs it has fewer of them for
# itself (and leaves the others to the axes beside it).

# %%
nodes = cluster("h100:4x8")
AXES = {
    "8, one node": lay(nodes, (4, 8))[1],
    "32, all of four nodes": join(nodes, (4, 8), (0, 1)),
    "16, 4 in each node (step 2)": lay(nodes, (16, 2))[0],
    "8, 2 in each node (step 4)": lay(nodes, (8, 4))[0],
    "4, 1 in each node (step 8)": lay(nodes, (4, 8))[0],
}
inside, across = (
    bus_bandwidth("all_reduce", GiB, AXES[k]) for k in ("8, one node", "4, 1 in each node (step 8)")
)
figure, axes = style.panels(
    f"Inside a node an axis is {inside / across:.0f} times as fast as one card across", 2
)
for label, link in AXES.items():
    axes[0].plot(SIZES, curve(link), label=label)
    axes[1].plot(SIZES, [seconds("all_reduce", s, link) for s in SIZES], label=label)
for ax in axes:
    style.byte_axis(ax.xaxis, 2**12, 2**32, 32)
    ax.set_xlabel("array to be summed")
style.second_axis(axes[1].yaxis, 1e-5, 1e-1)
axes[0].set(
    ylabel="bus bandwidth [GB/s]", title="all-reduce over 4 nodes of 8 H100", ylim=(0, None)
)
axes[1].set(ylabel="time of an all-reduce")
axes[0].legend(title="GPUs on the axis", loc="upper left")
plt.show()

# %%
large = [bus_bandwidth("all_reduce", GiB, link) for link in AXES.values()]
print([f"{label}: {rate:.0f} GB/s" for label, rate in zip(AXES, large, strict=True)])
assert large == sorted(large, reverse=True), "each step over GPUs costs bandwidth"
assert inside / across > 5

# %% [markdown]
# ## Every collective
#
# An array of 64 MiB in all. An all-gather makes it whole on every device, a reduce-scatter adds up
# partial values and leaves each device a part, an all-reduce is both: twice the bytes. An
# all-to-all moves the split to another dim, and a permute to other devices: each device has only
# its own part to send. So where two layouts of an array disagree, changing the split beats making
# it whole.

# %%
WHERE = {"v5e, a ring of 16": ring, "8 x H100, NVLink": AXES["8, one node"]}


def of_array(kind: Collective, link: AxisLink, nbytes: float = 64 * MiB) -> float:
    """Seconds for an array of so many bytes in all."""
    return seconds(kind, nbytes / link.size if kind in ("all_to_all", "permute") else nbytes, link)


share = {
    where: of_array("all_to_all", link) / of_array("all_gather", link)
    for where, link in WHERE.items()
}
figure, axes = style.panels(
    f"Splitting another dim takes {min(share.values()):.0%} to {max(share.values()):.0%}"
    " of gathering the array", 2, 4.4
)  # fmt: skip
for ax, (title, link) in zip(axes, WHERE.items(), strict=True):
    values = [of_array(kind, link) * 1e6 for kind in COLLECTIVES]
    bars = ax.barh([kind.replace("_", "-") for kind in COLLECTIVES], values, color=style.BLUE)
    ax.bar_label(bars, [f" {v:.0f}" for v in values])
    ax.invert_yaxis()
    ax.set(title=title, xlabel="array of 64 MiB [us]", xlim=(0, 1.15 * max(values)))
    ax.grid(axis="y", visible=False)
plt.show()

# %%
assert max(share.values()) < 0.4
assert of_array("all_reduce", ring) > 1.8 * of_array("all_gather", ring)
