"""Layers that are alike may decide together: at which price, and with which freedom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo

import autoshard
from autoshard.state import state_pairs
from autoshard.trace import Traced, trace
from passes import repeats, rounds, search
from passes.compiler import scheduler
from passes.decisions import decide
from passes.entries import Setting, layers_alike, price_on
from passes.fusion import fuse
from passes.ir.graph import Graph, Hint
from passes.ir.mesh import Mesh
from passes.liveness import liveness
from passes.plan_cost import cost_of
from passes.priced import Priced
from passes.reshard_table import PICO
from passes.solve.ilp import solve
from passes.untie import carried_over

f32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)


def llama(layers: int) -> Any:
    return zoo.llama_unrolled(
        layers, width=256, heads=8, groups=2, hidden=512, sequence=128, vocab=1024
    )


def experts(layers: int) -> Any:
    """Every layer with four experts of its own, no two layers of the same kind side by side."""
    shapes = [{"gate": f32((64, 4)), "up": f32((4, 64, 128)), "down": f32((4, 128, 64))}] * layers

    def loss(params: Any, x: Any) -> Any:
        for k, p in enumerate(params):
            share = jax.nn.softmax(x @ p["gate"])
            y = jnp.einsum("bd,edh->ebh", x, p["up"])
            y = jax.nn.relu(y) if k % 2 else jnp.tanh(y)
            x = x + jnp.einsum("be,ebd->bd", share, jnp.einsum("ebh,ehd->ebd", y, p["down"]))
        return jnp.square(x).mean()

    return zoo.train_job(loss, shapes, f32((32, 64)), optax.chain(optax.adam(1e-3)))


MODELS: dict[str, Callable[[int], Any]] = {
    "gpt": lambda layers: zoo.gpt2_small_unrolled(layers, batch=8, sequence=128),
    "llama": llama,
    "experts": experts,
    "mlp": lambda layers: zoo.mlp(128, 2 * layers, 64),
}


def traced_of(model: str, layers: int) -> Traced:
    fn, args = MODELS[model](layers)
    return trace(fn, *args, donate_argnums=(0,))


def setting_of(traced: Traced, cluster: str, hints: tuple[Hint, ...] = ()) -> Setting:
    graph, on = traced.graph, autoshard.cluster(cluster)
    state = tuple(state_pairs(traced))
    fusion = fuse(graph, on.platform)
    given = [p for p in state if p[0] in graph.donated]
    live = liveness(graph, fusion.stored, given, fusion.filled, scheduler(on), fusion.casts)
    tied = replace(graph, ties=(*graph.ties, *state))
    decisions = decide(tied, hints)
    return Setting(graph, on, hints, on.memory_limit, decisions, live, fusion, state, ())


@pytest.fixture(autouse=True)
def small_programs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "_LARGE", 0)


def roles_of(graph: Graph, hints: tuple[Hint, ...] = ()) -> tuple[int, ...]:
    return repeats.roles(graph, decide(graph, hints), hints)


@pytest.mark.parametrize("model", MODELS)
def test_more_layers_have_no_more_roles(model: str) -> None:
    few, more = (traced_of(model, layers).graph for layers in (10, 16))
    assert len(set(roles_of(few))) == len(set(roles_of(more)))
    assert len(more.ops) > 1.3 * len(few.ops)


@pytest.mark.parametrize("model", MODELS)
def test_one_role_is_one_type_and_one_kind_of_weight(model: str) -> None:
    graph = traced_of(model, 12).graph
    kinds: dict[int, set[str]] = {}
    for v, role in enumerate(roles_of(graph)):
        assert graph.values[v].type == graph.values[role].type
        if graph.values[v].name:
            name = graph.values[v].name.replace(".nu", ".mu")  # two moments of one weight may
            letters = "".join(c for c in name if not c.isdigit())
            kinds.setdefault(role, set()).add(letters)
    assert max(len(k) for k in kinds.values()) == 1


def test_layers_of_two_kinds_have_roles_of_their_own() -> None:
    graph = traced_of("experts", 16).graph
    roles = roles_of(graph)
    middle = [
        {v for v in graph.inputs if f"['params'][{k}]['up']" in graph.values[v].name}
        for k in range(4, 12)
    ]
    assert all(len(found) == 1 for found in middle)
    even, odd = ({roles[v] for found in middle[k::2] for v in found} for k in (0, 1))
    assert len(even) == len(odd) == 1
    assert even != odd


def test_a_hint_on_one_layer_gives_it_a_role_of_its_own() -> None:
    graph = traced_of("llama", 12).graph
    weight = next(v for v in graph.inputs if "[6]['w1']" in graph.values[v].name)
    free = Counter(roles_of(graph))[roles_of(graph)[weight]]
    hint = Hint(weight, (("data",), None), "here")
    roles = roles_of(graph, (hint,))
    assert free > 4
    assert Counter(roles)[roles[weight]] == 1


def both(model: str, layers: int, cluster: str, mesh: str) -> tuple[Priced, Priced]:
    """The problem with layers alike, and with each by itself."""
    setting = setting_of(traced_of(model, layers), cluster)
    alike = layers_alike(setting)
    assert alike.same
    on = Mesh.parse(mesh)
    return price_on(alike, on), price_on(setting, on)


CASES = [
    ("gpt", "h100:8", "data=4,model=2"),
    ("gpt", "v5e:2x4", "data=2,fsdp=2,model=2"),
    ("llama", "v5e:2x4", "data=4,model=2"),
    ("llama", "h100:8", "data=8"),
    ("experts", "v5e:2x4", "data=2,model=4"),
    ("mlp", "h100:8", "data=4,model=2"),
]


@pytest.mark.parametrize(("model", "cluster", "mesh"), CASES)
def test_a_choice_for_all_layers_costs_what_it_costs(model: str, cluster: str, mesh: str) -> None:
    alike, free = both(model, 12, cluster, mesh)
    assert len(alike.problem.nodes) < 0.7 * len(free.problem.nodes)
    random = np.random.default_rng(0)
    sizes = [len(n.costs) for n in alike.problem.nodes]
    choices = [tuple(int(random.integers(n)) for n in sizes) for _ in range(5)]
    for choice in (solve(alike.problem).choice, *choices):
        carried = carried_over(alike, choice, free)
        ours = alike.problem.cost(choice) / PICO + alike.constant
        if alike.problem.cost(choice) < 1e18:
            assert free.problem.cost(carried) / PICO + free.constant == pytest.approx(ours, 1e-6)
            exact, same = cost_of(alike, choice), cost_of(free, carried)
            assert exact.step_time == pytest.approx(ours, rel=1e-6)
            assert exact.step_time == pytest.approx(same.step_time, rel=1e-9)
            assert exact.comm_bytes == pytest.approx(same.comm_bytes, rel=1e-9)
            assert exact.peak_memory == same.peak_memory
        ours_at, theirs = alike.problem.memory(choice), free.problem.memory(carried)
        np.testing.assert_allclose(ours_at, theirs, rtol=1e-9)


@pytest.mark.parametrize(("model", "cluster", "mesh"), CASES)
def test_little_is_lost_by_deciding_for_all_layers_at_once(
    model: str, cluster: str, mesh: str
) -> None:
    alike, free = both(model, 12, cluster, mesh)
    together, alone = solve(alike.problem), solve(free.problem)
    ours = together.cost / PICO + alike.constant
    best = alone.bound / PICO + free.constant
    assert best <= ours * (1 + 1e-6)  # costs are rounded to picoseconds
    assert ours <= 1.01 * best


@pytest.mark.parametrize("mesh", [None, {"data": 2, "model": 2}])
def test_a_plan_is_as_good_as_without(mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fn, args = llama(8)
    plan = partial(autoshard.plan, fn, *args, cluster="v5e:2x2", mesh=mesh, donate_argnums=0)
    alike = plan()
    assert any("repeat others" in note for note in alike.data.notes)
    monkeypatch.setattr(repeats, "_LARGE", 1_000_000)
    free = plan()
    assert not any("repeat others" in note for note in free.data.notes)
    assert alike.cost.step_time <= free.cost.step_time * (1 + 1e-6)


def test_a_baseline_is_not_searched_and_says_nothing_of_layers() -> None:
    fn, args = llama(8)
    plan = autoshard.plan(fn, *args, cluster="v5e:2x2", solver="fsdp", donate_argnums=0)
    assert not any("repeat others" in note for note in plan.data.notes)


def test_what_fits_nowhere_with_layers_alike_is_searched_with_each_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings: list[Setting] = []

    def none_if_alike(setting: Setting, *rest: Any) -> rounds.Searched:
        settings.append(setting)
        found = rounds.search_all(setting, *rest)
        if not setting.same:
            return found
        nothing = {k: replace(a, cost=None) for k, a in found.answers.items()}
        return replace(found, answers=nothing)

    monkeypatch.setattr(search, "search_all", none_if_alike)
    fn, args = llama(8)
    plan = autoshard.plan(fn, *args, cluster="v5e:2x2", donate_argnums=0)
    assert [bool(s.same) for s in settings] == [True, False]
    assert plan.data.status == "optimal"
    assert not any("repeat others" in note for note in plan.data.notes)


@pytest.mark.parametrize(
    ("when", "said"),
    [
        ("mesh data=4, each layer", "repeat others: repeated layers are split alike"),
        ("mesh data=2", "interrupted: 1 of 2 meshes were not searched"),
    ],
)
def test_an_interrupt_leaves_layers_alike_and_claims_nothing(when: str, said: str) -> None:
    def interrupt(message: str) -> None:
        if message.startswith(when):
            raise KeyboardInterrupt

    fn, args = llama(8)
    call = partial(autoshard.plan, fn, *args, cluster="v5e:2x2", donate_argnums=0)
    assert call().mesh == {"data": 4}
    plan = call(progress=interrupt)
    assert plan.mesh == {"data": 4}
    assert plan.data.status == "feasible"
    assert "how far above the optimum is not known" in str(plan)
    assert any("not searched further" in note for note in plan.data.notes)
    assert any(said in note for note in plan.data.notes)
