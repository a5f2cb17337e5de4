"""How would an expert split these train steps by hand?  Plain jax, and nothing of autoshard.

Each dim of a weight and of an activation has a name that says what it is, `rows` or `batch`; a
version says along which mesh axis each of these is split. Some dims of weights are gathered before
use, and the gradients scattered: the heart of FSDP. Activations are held to their places by
constraints throughout, without which XLA un-shards the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import zoo
from accuracy_programs import moe, vit
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from zoo import Job

Dims = tuple[str | None, ...]
Table = Mapping[str, Dims]

# Megatron's split (arXiv 1909.08053): heads and the hidden dim; the vocabulary of the embedding.
TRANSFORMER_WEIGHTS: Table = {
    **dict.fromkeys(("wq", "wk", "wv", "w1"), ("stored", "tensor")),
    **dict.fromkeys(("wo", "w2"), ("tensor", "stored")),
    "b1": ("tensor",),
    "embed": ("tensor", "stored"),
    "unembed": ("stored", "tensor"),
    "position": (None, "stored"),
    "patch": (None, "stored"),
    "head": ("stored", None),
}
TRANSFORMER_VALUES: Table = {
    "stream": ("batch", "sequence", None),
    "normed": ("batch", None, None),
    "heads": ("batch", None, "tensor", None),
    "hidden": ("batch", None, "tensor"),
    "scores": ("batch", None, "tensor"),
}

# GShard's split (arXiv 2006.16668): experts lie on the axis of the groups, between all-to-alls.
# An expert that is on every device has its tokens there too.
MOE_WEIGHTS: Table = {
    "dense1": ("stored", "tensor"),
    "dense2": ("tensor", "stored"),
    "router": ("stored", None),
    "w1": ("expert", "expert_stored", "tensor"),
    "w2": ("expert", "tensor", "expert_stored"),
}
MOE_VALUES: Table = {
    "stream": ("batch", "sequence", None),
    "normed": ("batch", None, None),
    "hidden": ("batch", None, "tensor"),
    "gates": ("batch", None, None),
    # Both, and an all-to-all between them: with one alone XLA gathers all tokens.
    "of_groups": (None, "batch", None, None),
    "of_experts": ("expert", "expert_batch", None, None),
    "wide": ("expert", "expert_batch", None, "tensor"),
}

# The small tables, and the dense layers, lie whole on every device.
DLRM_WEIGHTS: Table = {"tables": ("row", "column")}
DLRM_VALUES: Table = {"ids": ("looker", None), "vectors": ("batch", None)}
SMALL_TABLE = 4096  # rows


@dataclass(frozen=True, slots=True)
class Version:
    """One way to split a train step by hand.

    mesh: sizes of the axes data and model. splits: the name of a dim to the axes that split it;
    dims of other names are whole. gathered: those dims of weights that are whole where they are
    used.
    """

    name: str
    mesh: tuple[int, int]
    splits: Mapping[str, str | tuple[str, ...]]
    gathered: tuple[str, ...] = ("stored", "expert_stored")

    def spec(self, dims: Dims, whole: tuple[str, ...] = ()) -> PartitionSpec:
        """Of an array with dims of these names."""
        return PartitionSpec(*[None if d in whole else self.splits.get(d or "") for d in dims])


@dataclass(frozen=True, slots=True)
class Program:
    """A train step by `make(use)`, its tables of dims, and the versions that suit it."""

    make: Callable[..., Job]
    weights: Table
    values: Table
    versions: tuple[Version, ...]


def lowered(program: Program, version: Version, devices: list[Any]) -> jax.stages.Lowered:
    """The train step as this version splits it, for these devices; its state is given away."""
    grid = mesh_utils.create_device_mesh(version.mesh, devices, allow_split_physical_axes=True)
    mesh = Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    fn, (state, batch) = program.make(use=partial(use, program, version, mesh))
    at_rest = jax.tree_util.tree_map_with_path(partial(placed, program, version, mesh), state)
    rows = NamedSharding(mesh, version.spec(("batch",)))
    one = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(fn, in_shardings=(at_rest, rows), out_shardings=(at_rest, one), donate_argnums=0)
    return step.trace(state, batch).lower(lowering_platforms=(devices[0].platform,))


def placed(program: Program, version: Version, mesh: Mesh, path: Any, x: Any) -> NamedSharding:
    """Where a parameter lies, and the optimizer's numbers for it: by the last name on its path."""
    names = [str(key.key) for key in path if hasattr(key, "key")]
    name = next((n for n in reversed(names) if n in program.weights), "")
    return NamedSharding(mesh, fitting(version.spec(dims_of(program, name, x.shape)), x, mesh))


def dims_of(program: Program, name: str, shape: tuple[int, ...]) -> Dims:
    """The dims of a weight; those of stacked layers have one more in front."""
    if name == "tables" and shape[0] < SMALL_TABLE:
        return (None,) * len(shape)
    dims = program.weights.get(name, ())
    return (None,) * (len(shape) - len(dims)) + dims


def fitting(spec: PartitionSpec, x: Any, mesh: Mesh) -> PartitionSpec:
    """The spec without axes that do not divide a dim evenly."""

    def devices(axes: Any) -> int:
        names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
        return math.prod(mesh.shape[n] for n in names)

    each = zip(x.shape, spec, strict=True)
    return PartitionSpec(*[axes if size % devices(axes) == 0 else None for size, axes in each])


def use(program: Program, version: Version, mesh: Mesh, x: jax.Array, name: str) -> jax.Array:
    """A value held to its place; a weight gathered, and its gradient scattered."""
    if name in program.values:
        spec = version.spec(program.values[name])
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
    dims = dims_of(program, name, x.shape)
    at_rest = NamedSharding(mesh, fitting(version.spec(dims), x, mesh))
    at_work = version.spec(dims, whole=version.gathered)
    return gathered(x, at_rest, NamedSharding(mesh, fitting(at_work, x, mesh)))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(x: jax.Array, at_rest: NamedSharding, at_work: NamedSharding) -> jax.Array:
    """A weight where it is used. By itself jax would put its gradient there too."""
    x = jax.lax.with_sharding_constraint(x, at_rest)  # cast before it is sent
    return jax.lax.with_sharding_constraint(x, at_work)


def _forward(
    x: jax.Array, at_rest: NamedSharding, at_work: NamedSharding
) -> tuple[jax.Array, None]:
    return gathered(x, at_rest, at_work), None


def _backward(
    at_rest: NamedSharding, at_work: NamedSharding, _: None, gradient: jax.Array
) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(gradient, at_rest),)


gathered.defvjp(_forward, _backward)


# The versions.

DATA: Mapping[str, str] = {"batch": "data"}
FSDP = {**DATA, "stored": "data"}
TENSOR = {**DATA, "tensor": "model"}


def transformer_versions(most: int) -> Iterator[Version]:
    """Of a transformer whose heads and batch `most` devices can share, and no more."""
    yield Version("dp", (16, 1), DATA)
    yield Version("fsdp", (16, 1), FSDP)
    meshes = [mesh for mesh in ((1, 16), (2, 8), (4, 4), (8, 2)) if mesh[1] <= most]
    yield from (Version("tp", mesh, TENSOR) for mesh in meshes if mesh != (8, 2))
    both = FSDP | TENSOR
    yield from (Version("fsdp+tp", mesh, both) for mesh in meshes if mesh[0] > 1)
    split = both | {"sequence": "model"}
    yield from (Version("fsdp+tp+sequence", mesh, split) for mesh in meshes if mesh[0] > 1)


def moe_versions() -> Iterator[Version]:
    """Each of the transformer's, experts' tokens split as the batch; then GShard's."""
    for v in transformer_versions(16):
        own = {"expert_batch": "data"}
        if "stored" in v.splits:
            own["expert_stored"] = "data"
        yield Version(v.name, v.mesh, {**v.splits, **own})
    yield Version("experts", (16, 1), {**DATA, "expert": "data"})
    yield Version("fsdp+experts", (16, 1), {**FSDP, "expert": "data"})
    for mesh in ((8, 2), (4, 4)):
        yield Version("experts+tp", mesh, {**TENSOR, "expert": "data"})
        yield Version("fsdp+experts+tp", mesh, {**FSDP, **TENSOR, "expert": "data"})


def dlrm_versions() -> Iterator[Version]:
    """Batch over all devices; the tables by row, by column, or both, as torchrec names it.

    Whole tables on different devices, its third way, are not what one program for all can say.
    """
    here = {**DATA, "looker": "data"}
    yield Version("dp", (16, 1), here)
    yield Version("fsdp", (16, 1), {**here, "row": "data"}, gathered=("row",))
    yield Version("rows", (16, 1), {**DATA, "row": "data"})
    yield Version("columns", (16, 1), {**DATA, "column": "data"})
    both = {"batch": ("data", "model")}
    yield Version("rows+columns", (4, 4), {**both, "row": "data", "column": "model"})
    yield Version("dp+rows", (4, 4), {**both, "looker": "data", "row": "model"})
    yield Version("dp+columns", (4, 4), {**both, "looker": "data", "column": "model"})


EXPERTS: Mapping[str, Program] = {
    "gpt_1p3b": Program(
        partial(zoo.gpt_1p3b, layers=24, batch=32),
        TRANSFORMER_WEIGHTS,
        TRANSFORMER_VALUES,
        tuple(transformer_versions(16)),
    ),
    "gpt2_small": Program(
        partial(zoo.gpt2_small_scan, layers=12, batch=64),
        TRANSFORMER_WEIGHTS,
        TRANSFORMER_VALUES,
        tuple(transformer_versions(4)),
    ),
    "vit": Program(vit, TRANSFORMER_WEIGHTS, TRANSFORMER_VALUES, tuple(transformer_versions(16))),
    "moe": Program(moe, MOE_WEIGHTS, MOE_VALUES, tuple(moe_versions())),
    "dlrm": Program(zoo.dlrm, DLRM_WEIGHTS, DLRM_VALUES, tuple(dlrm_versions())),
}
