# %% [markdown]
# # Are the predictions true?
#
# XLA's compiler for TPUs runs without a TPU. `plan.verify()` compiles a plan for its cluster and
# reads from the program what it does: memory, seconds by the compiler's own estimate, bytes sent.
# Here predicted stands beside compiled: first for a record of many plans, then for one that is
# compiled now, if the compiler is installed.
#
# The record is `tests/data/accuracy.jsonl`, as `make accuracy` writes it: programs from GPTs and
# LLaMA to convolutions and recommenders, on TPUs, each split by the search and in the ways that
# people write by hand. Plots and titles are made from whatever the record says; the tables are in
# `docs/accuracy.md`.
#
# What a planner learns here: how much to trust a number, and what to compile before believing it.

# %%
import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import plot_style as style

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # this machine's own devices are not asked for

Row = dict[str, float | str]
BAND = 0.10  # what we would like to be within

# %%


def flat(row: dict) -> Row:
    """Predicted and compiled under names alike."""
    predicted, compiled = row["predicted"], row["compiled"]
    return {
        "program": row["program"],
        "solver": row["solver"],
        "step": compiled["step"], "predicted step": predicted["step_time"],
        "compute": compiled["compute"], "predicted compute": predicted["compute_time"],
        "sent": compiled["sent"], "predicted sent": predicted["comm_bytes"],
        "memory": compiled["memory"]["peak"], "predicted memory": predicted["peak_memory"],
    }  # fmt: skip


file = Path("..") / ".." / "tests" / "data" / "accuracy.jsonl"
record = [json.loads(line) for line in file.read_text().splitlines()]
made = [row for row in record if "refused" not in row and row["cluster"].startswith("tpu")]
rows = [flat(row) for row in made if row["compiled"]]
names = list(dict.fromkeys(row["program"] for row in rows))
solvers = list(dict.fromkeys(row["solver"] for row in rows))
colour_of = dict(zip(solvers, style.COLOURS, strict=False))
print(
    f"{len(rows)} compiled plans of {len(names)} programs; {len(made) - len(rows)} more did not fit"
)
assert len(rows) >= 15
assert len(names) >= 5


def ratios(what: str, some: list[Row]) -> np.ndarray:
    """Predicted over compiled, where there is anything to compare."""
    pairs = [(row[f"predicted {what}"], row[what]) for row in some if row[what]]
    return np.array([p / c for p, c in pairs if p])


def median_error(what: str) -> float:
    """How far off, as a share, up or down."""
    return float(np.exp(np.median(np.abs(np.log(ratios(what, rows))))) - 1)


# %% [markdown]
# ## Predicted against compiled
#
# Each dot is a plan. On the line the prediction is true; the band is 10 % to either side.

# %%
QUANTITIES = {
    "step": "time of a step [s]",
    "compute": "compute [s]",
    "sent": "bytes sent [GiB]",
    "memory": "peak memory [GiB]",
}
SCALE = {"step": 1.0, "compute": 1.0, "sent": 2.0**30, "memory": 2.0**30}
errors = {what: median_error(what) for what in QUANTITIES}
figure, axes = style.panels(
    f"Half of the plans' steps are foretold within {errors['step']:.0%},"
    f" their memory within {errors['memory']:.0%}", 4, 4
)  # fmt: skip
for ax, (what, label) in zip(axes, QUANTITIES.items(), strict=True):
    for solver in solvers:
        some = [r for r in rows if r["solver"] == solver and r[what] and r[f"predicted {what}"]]
        x, y = ([r[key] / SCALE[what] for r in some] for key in (what, f"predicted {what}"))
        ax.plot(x, y, "o", color=colour_of[solver], alpha=0.75, label=solver)
    ax.set(xscale="log", yscale="log")
    if what == "memory":
        for axis in (ax.xaxis, ax.yaxis):
            style.size_axis(axis, [0.25, 0.5, 1, 2, 4, 8])
    ends = np.array(
        [min(ax.get_xlim()[0], ax.get_ylim()[0]), max(ax.get_xlim()[1], ax.get_ylim()[1])]
    )
    ax.plot(ends, ends, color=style.GREY, linewidth=1)
    ax.fill_between(ends, ends * (1 - BAND), ends * (1 + BAND), color=style.GREY, alpha=0.3)
    inside = np.mean(np.abs(ratios(what, rows) - 1) <= BAND)
    ax.set(title=f"{label}\n{inside:.0%} in the band", xlabel="compiled", xlim=ends, ylim=ends)
axes[0].set_ylabel("predicted")
axes[0].legend(loc="lower right")
plt.show()

# %%
for what, error in errors.items():
    low, high = np.percentile(ratios(what, rows), (10, 90))
    print(f"{what:8} off by {error:4.0%} in the median; 80 % of plans at {low:.2f} to {high:.2f} x")
    assert error < 1, "a prediction is of the right size"

# %% [markdown]
# ## Which programs are foretold badly
#
# The same plans, by program. One column of dots far from 1 is something that the prices do not know
# of: an operation that the compiler does otherwise, or a reshard that its partitioner does not
# follow. `plan.verify()` prints it with the line of your code.

# %%
off = {
    name: np.abs(np.log(ratios("step", [r for r in rows if r["program"] == name])))
    for name in names
}
order = sorted(names, key=lambda name: float(np.median(off[name])))
figure, axes = style.panels(f"Best foretold: {order[0]}; worst: {order[-1]}", 2, 5.2)
for ax, what in zip(axes, ("step", "memory"), strict=True):
    for row in rows:
        if row[what]:
            ratio = row[f"predicted {what}"] / row[what]
            ax.plot(
                ratio, order.index(row["program"]), "o", color=colour_of[row["solver"]], alpha=0.75
            )
    ax.axvspan(1 - BAND, 1 + BAND, color=style.GREY, alpha=0.3)
    style.size_axis(ax.xaxis, [0.125, 0.25, 0.5, 1, 2, 4])
    ax.set_yticks(range(len(order)), order if what == "step" else [])
    ax.invert_yaxis()
    ax.set(title={"step": "time of a step", "memory": "peak memory"}[what])
    ax.set(xlabel="predicted / compiled")
for solver in solvers:
    axes[1].plot([], [], "o", color=colour_of[solver], label=solver)
axes[1].legend(loc="lower right")
plt.show()

# %% [markdown]
# ## Does it choose well?
#
# For choosing, what counts is the order of plans, not their seconds. Of each program's plans, by
# the compiler: how much longer does the search's choice take than the best of them?

# %%
by_program = {
    name: {r["solver"]: r["step"] for r in rows if r["program"] == name} for name in names
}
contests = {n: steps for n, steps in by_program.items() if len(steps) > 1 and "ilp" in steps}
regret = {n: steps["ilp"] / min(steps.values()) for n, steps in contests.items()}
ranked = sorted(regret, key=lambda n: regret[n])
near = sum(r <= 1 + BAND for r in regret.values())
figure, [ax] = style.panels(
    f"For {near} of {len(regret)} programs the search is within 10 % of the best compiled plan"
)
for at, name in enumerate(ranked):
    best = min(contests[name].values())
    for solver, seconds in contests[name].items():
        size = 13 if solver == "ilp" else 8
        ax.plot(at, seconds / best, "o", color=colour_of[solver], markersize=size, alpha=0.75)
ax.axhspan(1, 1 + BAND, color=style.GREY, alpha=0.3)
style.size_axis(ax.yaxis, [1, 2, 4, 8, 16])
ax.set_xticks(range(len(ranked)), ranked, rotation=35, ha="right", fontsize=11)
ax.set_ylabel("compiled step / best one")
for solver in solvers:
    ax.plot([], [], "o", color=colour_of[solver], label="the search" if solver == "ilp" else solver)
ax.legend(loc="upper left")
plt.show()

# %%
assert min(regret.values()) == 1.0, "for some program it is the best"
assert float(np.median(list(regret.values()))) < 1.5
print({n: f"{r:.2f}" for n, r in regret.items() if r > 1 + BAND} or "never worse by more than 10 %")

# %% [markdown]
# ## One plan, compiled now
#
# A step of a small network on four chips. Without the compiler the cell says what to install.

# %%
import jax
import jax.numpy as jnp

import autoshard


def step(weights, x):
    """Gradient descent on one hidden layer."""

    def loss(weights):
        hidden = jax.nn.gelu(x @ weights["in"])
        return jnp.mean(jnp.square(hidden @ weights["out"]).astype(jnp.float32))

    value, slope = jax.value_and_grad(loss)(weights)
    return jax.tree.map(lambda w, s: w - 0.1 * s, weights, slope), value


def bf16(*dims):
    """An array that is only talked about."""
    return jax.ShapeDtypeStruct(dims, jnp.bfloat16)


weights = {"in": bf16(512, 2048), "out": bf16(2048, 512)}
plan = autoshard.plan(step, weights, bf16(1024, 512), cluster="tpu-v5e:2x2", donate_argnums=0)
try:
    found = plan.verify()
    print(found)
except autoshard.NoCompiler as missing:
    found = None
    print(f"Not compiled: {missing}")

# %%
assert plan.cost.comm_bytes > 0
if found is not None:
    assert found.fits
    assert 0.8 < found.compiled.sent / plan.cost.comm_bytes < 1.25, "what was foreseen is sent"
