# %% [markdown]
# # From GPipe to zero bubble: in which order does a pipeline work?
#
# A model is cut along its depth into stages, one for each device, and a batch into microbatches,
# which go through all stages, there and back. The order in which a device takes them decides how
# long it is idle, and how much it holds meanwhile. This notebook goes through the orders that have
# been published, each made by `passes.pipeline`, and counted by one simulator: no jax, no
# hardware.
#
# What a planner learns here: the order alone saves memory, and no time. Smaller pieces save time
# for more sends, and a backward that is taken apart saves more of it, the most for more memory.
# What is left over goes away with more microbatches.
#
# **F** is forward, **B** backward for the gradients of the inputs, which the stage before waits
# for, **W** backward for the gradients of the weights, which nobody waits for; **BW** is both as
# one. All words, and how makespan and bubble are counted: docs/schedules.md. `autoshard schedule`
# prints the same comparison in a terminal.

# %%
import matplotlib.pyplot as plt
import plot_style as style
from IPython.display import Image, display

from autoshard.timeline_picture import picture
from passes.pipeline.published import Setting, schedules
from passes.pipeline.timeline import Timeline

P, M = 4, 8  # devices, microbatches


def made(setting: Setting) -> dict[str, Timeline]:
    """Every schedule that can be made, by its name."""
    return {each.name: each.timeline for each in schedules(setting) if each.timeline is not None}


def show(*timelines: Timeline) -> None:
    """One below the other on the same scale: tasks over time, and what activations take."""
    display(Image(picture(timelines, ".png")))


def idle(timeline: Timeline) -> float:
    """Time that even the busiest device is idle."""
    return timeline.makespan - max(timeline.busy)


unit = made(Setting(P, M, forward=1, backward=1, weight=1))

# %% [markdown]
# ## GPipe and 1F1B: the same bubble, less memory
#
# GPipe takes all microbatches forward, then all backward: at the turn all activations lie there.
# 1F1B begins backward as soon as it can, and then takes both in turn: at most as many microbatches
# are under way as there are devices. Neither is faster: a device waits for the first microbatch to
# go down and come back, (p-1)(F+B+W) in all.

# %%
show(unit["GPipe"], unit["1F1B"])

# %%
assert idle(unit["GPipe"]) == idle(unit["1F1B"]) == (P - 1) * 3
assert (max(unit["GPipe"].peaks), max(unit["1F1B"].peaks)) == (M, P)

# %% [markdown]
# ## Interleaved: smaller pieces
#
# Each device holds several chunks of the model. The first microbatch comes back to a device after
# less work, so that the bubble is divided by their number; what is sent is multiplied by it, and a
# little more lies in memory. The second chunk is lighter in the picture.

# %%
show(unit["interleaved 1F1B"])

# %%
chunked = unit["interleaved 1F1B"]
assert idle(chunked) == (P - 1) * 3 / 2
assert chunked.sends > 2 * unit["1F1B"].sends

# %% [markdown]
# ## Zero bubble: backward taken apart
#
# Qi et al. (arXiv 2401.10241) do B first and W later. The stage before need not wait for W, and W
# fill the gaps. ZB-H1 keeps to the memory of 1F1B; ZB-H2 lets twice as many microbatches be under
# way, and no device waits once it has begun. (A step takes as long as the busiest span of one
# device: each may begin the next step when it is done.)

# %%
show(unit["ZB-H1"], unit["ZB-H2"])

# %%
assert idle(unit["ZB-H1"]) == P - 1
assert idle(unit["ZB-H2"]) == 0
assert max(unit["ZB-H1"].peaks) == max(unit["1F1B"].peaks)
assert max(unit["ZB-H2"].peaks) == 2 * P - 1

# %% [markdown]
# ## Bubble against memory
#
# The times of a GPT of 1.5 billion parameters on 8 devices, as Qi et al. measured them (their
# table 9): F 18.5, B 18.1, W 9.3 and 0.6 ms to send, 24 microbatches. What is further down is
# faster, what is further left needs less memory. W is shorter than F and B here, so that it no
# longer fills all gaps: even ZB-H2 has a bubble.

# %%
P, M = 8, 24
real = made(Setting(P, M, 18.522, 18.086, 9.337, send=0.601))
short = {
    m: made(Setting(P, m, 18.522, 18.086, 9.337, send=0.601)) for m in (8, 16, 24, 32, 48, 64, 96)
}
saved = 1 - real["ZB-H2"].makespan / real["1F1B"].makespan
figure, axes = style.panels(f"Zero bubble saves {saved:.0%} of a step of 1F1B", 2)
SHOWN = ("GPipe", "1F1B", "eager 1F1B", "interleaved 1F1B", "2BP", "ZB-H1", "ZB-H2")
for name, colour in zip(SHOWN, style.COLOURS, strict=True):
    timeline = real[name]
    marker = {"GPipe": "s", "1F1B": "^"}.get(name, "o")
    axes[0].plot(max(timeline.peaks), timeline.bubble, marker, ms=12, color=colour, label=name)
    if name in ("1F1B", "interleaved 1F1B", "ZB-H1", "ZB-H2"):
        bubbles = [found[name].bubble for found in short.values()]
        axes[1].plot(list(short), bubbles, marker="o", color=colour, label=name)
axes[0].set(
    title="24 microbatches",
    xlabel="activations on the worst device [microbatches]",
    ylabel="bubble",
    xlim=(0, 26),
    ylim=(0, 0.3),
)
axes[1].set(title="any number of them", xlabel="microbatches", ylim=(0, None))
axes[0].legend(loc="lower right", ncols=2)
axes[1].legend(loc="upper right")
for ax in axes:
    ax.yaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
plt.show()

# %%
for name, published in {"1F1B": 0.2431, "ZB-H1": 0.1585, "ZB-H2": 0.1083}.items():
    print(f"{name}: bubble {real[name].bubble:.4f}, in their table {published}")
    assert abs(real[name].bubble - published) < 1e-3
for found in short.values():
    assert found["ZB-H2"].bubble <= found["ZB-H1"].bubble <= found["1F1B"].bubble

# %% [markdown]
# ## What sending costs
#
# In 1F1B a device needs what its neighbour has just made, and waits for each send. With more
# microbatches under way (eager 1F1B, and ZB-H2 likewise) each send has time until it is needed.
# Interleaved 1F1B sends twice as often and still loses less than 1F1B: there too more is under way.

# %%
SENDS = [0, 0.5, 1, 1.5, 2, 3, 4]
slow = [made(Setting(P, M, 18.522, 18.086, 9.337, send=send)) for send in SENDS]
loss = {
    name: slow[-1][name].makespan / slow[0][name].makespan - 1
    for name in ("1F1B", "eager 1F1B", "interleaved 1F1B", "ZB-H1", "ZB-H2")
}
figure, (ax,) = style.panels(
    f"Sends of {SENDS[-1]} ms make 1F1B {loss['1F1B']:.0%} slower, eager 1F1B "
    f"{loss['eager 1F1B']:.0%}"
)
for name, colour in zip(SHOWN, style.COLOURS, strict=True):
    if name in loss:
        ax.plot(SENDS, [found[name].makespan for found in slow], marker="o", color=colour,
                label=name)  # fmt: skip
ax.set(xlabel="time of a send [ms]", ylabel="makespan [ms]", xlim=(0, 4.1), ylim=(1100, None))
ax.legend(loc="upper left", ncols=2)
plt.show()

# %%
assert loss["eager 1F1B"] < loss["1F1B"] / 2
assert loss["interleaved 1F1B"] < loss["1F1B"]
assert loss["ZB-H2"] < loss["ZB-H1"]
