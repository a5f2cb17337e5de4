# %% [markdown]
# # Which mesh is the best one for a GPT?
#
# A train step of a GPT with 1.3 billion parameters (GPT-3 XL; 32 texts of 2048 tokens, adamw,
# rematerialised, bfloat16 over float32 parameters) on TPU v5e. First all meshes of 16 chips under
# each way of splitting, then every mesh of two axes up to 32 chips.
#
# What a planner learns here: the mesh and the way to split belong together, and have to be chosen
# together. What does not fit into memory is no choice at all.

# %%
import sys
from itertools import product
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import plot_style as style

import autoshard

sys.path.append("..")  # the models of examples/zoo.py
import zoo

GiB = 2.0**30
step, arguments = zoo.gpt_1p3b()

# %% [markdown]
# ## Every mesh of 16 chips, every way to split
#
# One search looks at all meshes, and at what experts write by hand, each on the meshes that suit
# it. The plan keeps those that lost as `plan.alternatives`; the others are asked for by name. A
# hatched cell does not fit into memory; its text says how much it would take. Meshes that are the
# same wires under other names are left out.

# %%
plan = autoshard.plan(step, *arguments, cluster="tpu-v5e:4x4", donate_argnums=0)
limit = plan.data.memory_limit
SOLVERS = {"ilp": "the search", "fsdp": "FSDP", "dp": "data parallel", "tp": "tensor parallel"}
SOLVERS |= {"fsdp+tp": "FSDP + tensor"}
Axes = tuple[tuple[str, int], ...]


def text_of(mesh: Axes) -> str:
    """`4 x 2 x 2`."""
    return " x ".join(str(size) for _, size in mesh)


costs = {(a.solver, a.mesh): a.cost for a in plan.alternatives}
costs["ilp", plan.data.mesh] = plan.cost
meshes = sorted({mesh for _, mesh in costs}, key=lambda m: (len(m), [-size for _, size in m]))
for solver, mesh in product(list(SOLVERS)[1:], meshes):
    if (solver, mesh) not in costs:
        costs[solver, mesh] = autoshard.plan(
            step, *arguments, cluster="tpu-v5e:4x4", mesh=dict(mesh), solver=solver,
            donate_argnums=0,
        ).cost  # fmt: skip
seconds = np.full((len(SOLVERS), len(meshes)), np.nan)
texts = [[""] * len(meshes) for _ in SOLVERS]
for i, solver in enumerate(SOLVERS):
    for j, mesh in enumerate(meshes):
        cost = costs.get((solver, mesh))
        if cost is None:
            texts[i][j] = "slower"  # the search left it when it could not win any more
        elif cost.peak_memory > limit:
            texts[i][j] = f"{cost.peak_memory / GiB:.0f} GiB"
        else:
            seconds[i, j] = cost.step_time
            texts[i][j] = f"{cost.step_time:.2f} s"
fit = np.isfinite(seconds).sum()
figure, [ax] = style.panels(
    f"{fit} of {seconds.size} plans for 16 chips fit, and the slowest takes"
    f" {np.nanmax(seconds) / np.nanmin(seconds):.1f} times as long", height=4.4
)  # fmt: skip
style.heat_map(ax, seconds, texts, list(SOLVERS.values()), [text_of(m) for m in meshes])
ax.set(xlabel="mesh of 16 TPU v5e", title="time of a step; hatched: memory it would take, of "
       f"{limit / GiB:.1f} GiB")  # fmt: skip
plt.show()

# %%
assert plan.cost.step_time <= np.nanmin(seconds)
assert all(costs["dp", m].peak_memory > limit for m in meshes), (
    "a device can not hold all the state"
)
hand = {
    m: np.nanmin(seconds[1:, j]) for j, m in enumerate(meshes) if np.isfinite(seconds[1:, j]).any()
}
for mesh, best in hand.items():
    cost = costs.get(("ilp", mesh))
    searched = f"the search {cost.step_time:.2f} s" if cost else "the search gave up on it"
    print(f"{text_of(mesh):10} by hand {best:.2f} s, {searched}")
    assert cost is None or cost.step_time <= 1.001 * best, "it starts from what experts write"

# %% [markdown]
# ## Two axes, up to 32 chips
#
# The search on each mesh of data x model chips. Diagonals from lower left to upper right have the
# same number of chips. Names of axes mean nothing to the search (1 x 4 is 4 x 1): what counts is
# how many chips there are and on which wires an axis lies.

# %%
LAYOUTS = {1: "1x1", 2: "1x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8"}
DATA, MODEL = (1, 2, 4, 8), (1, 2, 4)
searched: dict[tuple[int, ...], Any] = {
    tuple(size for _, size in mesh): cost for (solver, mesh), cost in costs.items()
    if solver == "ilp" and cost is not None
}  # fmt: skip


def cost_on(*sizes: int) -> Any:
    """Of the search on a mesh of this shape; None where nothing fits."""
    split = tuple(size for size in sizes if size > 1)
    if split not in searched:
        mesh = dict(zip(("data", "model"), split, strict=False)) or {"data": 1}
        spec = f"tpu-v5e:{LAYOUTS[int(np.prod(sizes))]}"
        try:
            found = autoshard.plan(step, *arguments, cluster=spec, mesh=mesh, donate_argnums=0)
            searched[split] = found.cost
        except autoshard.NoFeasiblePlan:
            searched[split] = None
    return searched[split]


plans = {(data, model): cost_on(data, model) for data in DATA for model in MODEL}

# %%
grid = np.array([[plans[d, m].step_time if plans[d, m] else np.nan for m in MODEL] for d in DATA])
share = {mesh: c.comm_time / (c.comm_time + c.compute_time) for mesh, c in plans.items() if c}
texts = [
    [f"{plans[d, m].step_time:.2f} s" if plans[d, m] else "does not fit" for m in MODEL]
    for d in DATA
]
parts = np.array([[share.get((d, m), np.nan) for m in MODEL] for d in DATA])
part_texts = [[f"{share[d, m]:.0%}" if (d, m) in share else "" for m in MODEL] for d in DATA]
enough = min(d * m for (d, m), c in plans.items() if c)
figure, axes = style.panels(
    f"From {enough} chips on it fits; more chips are quicker, and talk more", 2
)
for ax, values, words, title in (
    (axes[0], grid, texts, "time of a step"),
    (axes[1], parts, part_texts, "communication, of all work"),
):
    style.heat_map(ax, values, words, list(map(str, DATA)), list(map(str, MODEL)))
    ax.set(xlabel="model axis [chips]", ylabel="data axis [chips]", title=title)
plt.show()

# %%
fits = {mesh: cost is not None for mesh, cost in plans.items()}
assert all(fits[d, m] == (d * m >= enough) for d, m in fits), "the number of chips decides"
by_chips = {n: [c for (d, m), c in plans.items() if c and d * m == n] for n in LAYOUTS}
best = {n: min(c.step_time for c in found) for n, found in by_chips.items() if found}
assert list(best.values()) == sorted(best.values(), reverse=True)
busy = {n: best[enough] * enough / (t * n) for n, t in best.items()}
print({f"{n} chips": f"{x:.0%} of the work per chip" for n, x in busy.items()})

# %% [markdown]
# ## What a step consists of, and how sure that is
#
# A step takes its compute, and the communication that it waits for. How much of the communication
# runs beside compute is the compiler's affair, and hard to foretell. So a plan states both bounds:
# all of it hidden, and none. Where two plans' bounds overlap, compile both: `plan.verify(top=3)`.

# %%
shown = sorted((mesh for mesh, cost in plans.items() if cost), key=lambda m: (m[0] * m[1], m))
figure, [ax] = style.panels(
    "The more chips, the more of a step is waiting, and the wider the bounds"
)
for at, mesh in enumerate(shown):
    cost = plans[mesh]
    low, high = cost.bounds
    waiting = cost.step_time - cost.compute_time
    ax.bar(at, cost.compute_time, 0.7, color=style.BLUE, label="compute" if at == 0 else "")
    ax.bar(at, waiting, 0.7, cost.compute_time, color=style.ORANGE,
           label="waiting for communication" if at == 0 else "")  # fmt: skip
    error = [[cost.step_time - low], [high - cost.step_time]]
    ax.errorbar(at, cost.step_time, error, color="black", capsize=6, linewidth=1.5,
                label="all of it hidden, none hidden" if at == 0 else "")  # fmt: skip
ax.set_xticks(range(len(shown)), [f"{d} x {m}\n{d * m} chips" for d, m in shown])
ax.set(xlabel="mesh data x model of TPU v5e", ylabel="time of a step [s]")
ax.grid(axis="x", visible=False)
ax.legend(loc="upper right")
plt.show()

# %%
few, many = shown[0], shown[-1]
width = {mesh: (c.bounds[1] - c.bounds[0]) / c.step_time for mesh, c in plans.items() if c}
print(f"bounds: {width[few]:.0%} of a step on {few}, {width[many]:.0%} on {many}")
assert all(c.bounds[0] <= c.step_time <= c.bounds[1] for c in plans.values() if c)
assert share[many] > share[few]
