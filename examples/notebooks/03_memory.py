# %% [markdown]
# # How much memory does a device need, the more devices there are?
#
# A train step of a GPT with 1.3 billion parameters (GPT-3 XL; 32 texts of 2048 tokens, adamw,
# rematerialised, bfloat16 over float32 parameters) on 1 to 64 chips of TPU v5e, split in the ways
# that people write by hand, and in the way that the search finds. Nothing is allocated: shapes are
# enough.
#
# What a planner learns here: more devices help only what is split over them. What every device
# holds whole stays as large as it was.

# %%
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import plot_style as style

import autoshard

sys.path.append("..")  # the models of examples/zoo.py
import zoo

GiB = 2.0**30
LAYOUTS = {1: "1x1", 4: "2x2", 16: "4x4", 64: "8x8"}
SOLVERS = {
    "dp": "data parallel",
    "fsdp": "FSDP",
    "tp": "tensor parallel",
    "ilp": "the search",
}
step, arguments = zoo.gpt_1p3b()

# %% [markdown]
# ## What is held at the fullest moment
#
# The plan says how every argument is stored, and so how many bytes of parameters and of optimizer
# state a device holds; they live through the whole step, since the state is donated and updated in
# place. The rest of the peak is what the step makes: gradients, activations, gathered weights,
# temporaries.

# %%


@dataclass(frozen=True)
class Held:
    """Bytes on one device at the peak, and seconds of a step; fits: whether memory is enough."""

    parameters: float
    optimizer: float
    rest: float
    seconds: float
    fits: bool

    @property
    def peak(self) -> float:
        """All together."""
        return self.parameters + self.optimizer + self.rest


def stored(plan: autoshard.Plan, start: str) -> float:
    """Bytes on one device of the arguments whose names start so."""
    sizes = plan.mesh
    return sum(
        a.nbytes / np.prod([sizes[axis] for dim in a.spec for axis in dim])
        for a in plan.data.arguments
        if a.name.startswith(start)
    )


def mesh_for(solver: str, chips: int) -> Mapping[str, int]:
    """One axis for the plans by hand; the search gets a second one where 32 texts are too few."""
    data = min(chips, 32) if solver == "ilp" else chips
    return {"data": data, "model": chips // data} if data < chips else {"data": data}


def held(solver: str, chips: int) -> Held | None:
    """By the best plan of a solver; None where the search proves that nothing fits."""
    where = {"cluster": f"tpu-v5e:{LAYOUTS[chips]}", "mesh": mesh_for(solver, chips)}
    try:
        plan = autoshard.plan(step, *arguments, solver=solver, donate_argnums=0, **where)
    except autoshard.NoFeasiblePlan:
        return None
    parameters, optimizer = stored(plan, "state['params']"), stored(plan, "state['opt']")
    peak = plan.cost.peak_memory
    fits = peak <= plan.data.memory_limit
    return Held(parameters, optimizer, peak - parameters - optimizer, plan.cost.step_time, fits)


alone = held("dp", 1)  # on one chip all plans by hand are the same
found = {
    solver: {n: alone if n == 1 and solver != "ilp" else held(solver, n) for n in LAYOUTS}
    for solver in SOLVERS
}

# %%
limit = autoshard.cluster("tpu-v5e:1x1").memory_limit / GiB
TOP = 3 * limit
figure, axes = style.panels("Data parallelism does not shrink the state; FSDP and the search do", 4)
parts = (("parameters", style.BLUE), ("optimizer", style.SKY), ("rest", style.ORANGE))
for ax, (solver, label) in zip(axes, SOLVERS.items(), strict=True):
    for at, by in enumerate(found[solver].values()):
        if by is None:
            ax.text(at, 0.5, "nothing\nfits", ha="center", va="bottom", color=style.RED)
            continue
        bottom = 0.0
        for part, colour in parts:
            ax.bar(at, getattr(by, part) / GiB, 0.75, bottom, color=colour)
            bottom += getattr(by, part) / GiB
        ax.text(at, bottom, f"{bottom:.1f}", ha="center", va="bottom", fontsize=11)
    ax.axhline(limit, color=style.RED, linestyle="--", linewidth=1.5)
    ax.set_xticks(range(len(LAYOUTS)), LAYOUTS)
    ax.set(title=label, xlabel="chips", ylim=(0, TOP))
    ax.grid(axis="x", visible=False)
axes[0].set_ylabel("peak memory of a device [GiB]")
axes[-1].text(
    3.4, limit + 0.4, f"a v5e has {limit:.1f} GiB", ha="right", color=style.RED, fontsize=11
)
for part, colour in parts:
    axes[-1].bar(0, 0, color=colour, label="made by the step" if part == "rest" else part)
axes[-1].legend(loc="upper right")
plt.show()

# %%
state = {s: [h.parameters + h.optimizer for h in by.values() if h] for s, by in found.items()}
assert state["dp"][0] == state["dp"][-1], "data parallelism: every device holds all of it"
assert state["fsdp"][-1] < state["fsdp"][0] / 50, (
    "FSDP: each holds a 64th, but for what is too small to split"
)
assert not any(h.fits for h in found["dp"].values() if h), "so it never fits"
assert found["ilp"][1] is None, "one chip is too small, whatever is done"
assert all(h.fits for n, h in found["ilp"].items() if n > 1)

# %% [markdown]
# 32 texts can not be split over 64 chips: written by hand along one axis, the batch stays whole
# there, and what the step makes grows back. (Tensor parallelism meets the same wall at its 16
# heads.) The search splits the batch along one axis of 32 and something else along the axis of 2
# that is left.
#
# ## Memory is not the aim
#
# The search minimises the time of a step *within* the memory of a device. Hatched bars are plans
# that do not fit: they would be quick in vain.

# %%
figure, [ax] = style.panels("Only plans that fit count, and of these the quickest")
for k, ((solver, label), colour) in enumerate(zip(SOLVERS.items(), style.COLOURS, strict=False)):
    for at, h in enumerate(found[solver].values()):
        if h is not None:
            look = (
                {"color": colour}
                if h.fits
                else {"color": "white", "edgecolor": colour, "hatch": "///"}
            )
            bar = ax.bar(at + 0.2 * (k - 1.5), h.seconds, 0.18, **look)
            ax.bar_label(bar, [f"{h.seconds:.2g}"], fontsize=11)
    ax.bar(0, 0, color=colour, label=label)
style.second_axis(ax.yaxis, 0.1, 10)
ax.set_xticks(range(len(LAYOUTS)), LAYOUTS)
ax.set(xlabel="chips", ylabel="time of a step", ylim=(0.1, 20))
ax.grid(axis="x", visible=False)
ax.legend(ncols=4, loc="upper right")
plt.show()

# %%
for n in LAYOUTS:
    fitting = {s: found[s][n] for s in SOLVERS if found[s][n] and found[s][n].fits}
    if fitting:
        quickest = min(fitting, key=lambda s: fitting[s].seconds)
        print(f"{n:2} chips: {SOLVERS[quickest]}, {fitting[quickest].seconds:.3f} s")
        assert fitting["ilp"].seconds <= 1.001 * fitting[quickest].seconds
