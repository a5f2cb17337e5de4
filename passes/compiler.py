"""What does a platform's compiler make of a plan?  Its options, chosen by rule, and its habits.

A plan keeps the options that make the program what it was priced as: they are given to
`Lowered.compile`, and hold for one program.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from cost_models.cluster import Cluster

# XLA:TPU may turn a product of a gathered operand into a loop that gathers the next part while it
# multiplies this one ("windowed einsum"). It prices the many small products at up to twice the
# cycles of the one large product: on v5e:4x4, a ViT-L step split as FSDP takes 31.8 ms of compute
# with it and 26.9 without, an MLP split as TP 7.2 and 4.9 (XLA:TPU's estimated cycles; jax 0.10.2,
# libtpu 0.0.42.1). Gathers of whole operands run beside compute too. No operand is as large as
# this.
_NEVER_MIB = "1000000"

# XLA:TPU can gather a weight piece by piece inside the kernels that run before it is needed. For
# v5e it does by itself; for v2 to v4, v5p and v6e only when told to, by all three together; for v7
# they change nothing. An FSDP step then takes 21 % less of ViT-L (v6e), 16 % less of RetNet (v6e)
# and 3 % less of GPT-2 small (v6e and v5p): the compiled schedules, replayed (jax 0.10.2, libtpu
# 0.0.42.1). Sums wait all the same.
_GATHERS_INSIDE = (
    "xla_enable_async_all_gather",
    "xla_tpu_enable_async_collective_fusion",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
)


def compiler_options(cluster: Cluster) -> Mapping[str, str]:
    """Option to value, for `jax.stages.Lowered.compile(compiler_options=...)`."""
    if cluster.platform == "tpu":
        options = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": _NEVER_MIB}
        if cluster.compiler.get("topology") != "v5e":
            options |= dict.fromkeys(_GATHERS_INSIDE, "true")
        return options
    return {}


def sums_whole(platform: str) -> bool:
    """Whether a scattered sum is made as an all-reduce, of which each device keeps its part.

    XLA:TPU makes every sum so, also the one that `jax.lax.psum_scatter` asks for: on 16 devices of
    v5e, v5p and v6e, products of 1024 to 8192 columns (jax 0.10.2, libtpu 0.0.42.1).
    """
    return platform == "tpu"


def quotients_kept(cluster: Cluster) -> bool:
    """Whether what is divided and made narrower is kept for all who read it.

    For v5p XLA keeps the weights of an attention in bfloat16, for v5e and v6e each reader computes
    them again, for v6e but for `exchanged_quotients_kept` (steps of GPT and LLaMA, of long
    attention; jax 0.10.2, libtpu 0.0.42.1).
    """
    fitted = cluster.chip.fitted
    return fitted is not None and fitted.quotients_kept == 1


def exchanged_quotients_kept(cluster: Cluster) -> bool:
    """Whether it is kept where an all-to-all sends what is made of it (`passes.quotients`)."""
    fitted = cluster.chip.fitted
    return fitted is not None and fitted.quotients_kept == 2


# FLOP that XLA:GPU takes a tanh for: between 80 and 160, as what it keeps on H100 and A100 shows.
_TANH = 120.0


def tanh_bytes(cluster: Cluster) -> float:
    """How many bytes XLA:GPU holds moving to be as fast as computing one tanh; 0 for others.

    It computes a tanh of 16 bits once and keeps it for the backward half, on H100 and on A100; one
    of 32 bits on A100, and on H100 each reader computes it again (GELU by tanh, and tanh alone, in
    bfloat16, float16 and float32). It computes exp, erf and logistic again on both, and log, sqrt
    and quotients on H100, as if they took nothing (jax 0.10.2).
    """
    chip = cluster.chip
    return _TANH * chip.hbm_bandwidth / chip.vector_flops if cluster.platform == "gpu" else 0.0


class Scheduler(NamedTuple):
    """How a compiler orders a program. hides_latencies: constants come first, and gradients of
    weights last. updates_late: new state outside loops comes after all of them. frees_first:
    products that free more than they make come first.
    """

    hides_latencies: bool = False
    updates_late: bool = False
    frees_first: bool = False


PLAIN = Scheduler()


def scheduler(cluster: Cluster) -> Scheduler:
    """The scheduler of XLA for a cluster.

    XLA:GPU hides latencies on H100, H200 and B200, where there is more than one device: it makes
    constants first, as they wait for nothing, and gradients of weights last, beside collectives: in
    loops (steps of GPT, LLaMA and RetNet on 8 H100), and outside as `passes.late_gradients` says.
    On one H100, and on A100, both are made when it needs least memory (MLP, GPT, DLRM). XLA:TPU
    keeps the gradient of a head, whole, while the loop over the layers runs backward, and updates
    the head after it (steps of GPT and LLaMA for v5e, v5p and v6e; jax 0.10.2, libtpu 0.0.42.1).
    """
    major = str(cluster.compiler.get("cuda_compute_capability", "0")).partition(".")[0]
    tpu = cluster.platform == "tpu"
    hides = int(major) >= 9 and cluster.devices > 1
    return Scheduler(hides_latencies=hides, updates_late=tpu, frees_first=tpu)
