"""What follows from a few hints, on small programs that a person can check."""

from __future__ import annotations

import cProfile

from passes.ir.graph import Graph, Hint
from passes.ir.mesh import Mesh
from passes.ir.parse import parse_graph
from passes.ir.verify import verify
from passes.propagate import propagate

MESH = Mesh.parse("data=4,model=2")


def shardings(text: str, mesh: Mesh = MESH) -> str:
    graph = parse_graph("graph f\n" + text)
    verify(graph)
    return "\n".join(" ".join(line.split()) for line in str(propagate(graph, mesh)).splitlines())


def expect(text: str, wanted: str, mesh: Mesh = MESH) -> None:
    assert shardings(text, mesh).split("\n") == [line.strip() for line in wanted.split(" | ")]


# Small programs.


def test_forwards_backwards_and_sideways() -> None:
    expect(
        """
        arg x  f32[8,16]
        arg w  f32[16,32]
        arg v  f32[32,16]
        hint %1  [data, model]  a.py:1
        %0 = dot_general x w  f32[8,32]  b k, k n -> b n  add(k)
        %1 = tanh %0  f32[8,32]  i j -> i j
        %2 = dot_general %1 v  f32[8,16]  b k, k n -> b n  add(k)
        """,
        "x f32[8{data},16] | w f32[16,32{model}] | v f32[32{model},16] |"
        " %0 f32[8{data},32{model}] | %1 f32[8{data},32{model}] | %2 f32[8{data},16]",
    )


def test_a_closed_dim_stays_unsplit_and_an_open_one_does_not() -> None:
    text = """
        arg x  f32[8,16]
        hint x   [data, {}]  a.py:1
        hint %1  [., {}]  a.py:2
        hint %2  [?, model]  a.py:3
        %0 = tanh x  f32[8,16]  i j -> i j
        %1 = tanh %0  f32[8,16]  i j -> i j
        %2 = tanh %1  f32[8,16]  i j -> i j
    """
    expect(
        text.replace("{}", "?"),
        "x f32[8{data},16{model}] | %0 f32[8{data},16{model}] | %1 f32[8,16{model}] |"
        " %2 f32[8,16{model}]",
    )
    expect(
        text.replace("{}", "."),
        "x f32[8{data},16] | %0 f32[8{data},16] | %1 f32[8,16] | %2 f32[8,16{model}]",
    )


def test_a_value_that_one_axis_would_split_twice_is_split_once() -> None:
    expect(
        """
        arg x  f32[8,4]
        arg w  f32[4,16]
        hint x  [data, .]  a.py:1
        hint w  [., data]  a.py:2
        %0 = dot_general x w  f32[8,16]  b k, k n -> b n  add(k)
        """,
        # w is the larger one: it is cheaper to reshard x.
        "x f32[8{data},4] | w f32[4,16{data}] | %0 f32[8,16{data}]",
    )


def test_the_lower_priority_number_goes_first() -> None:
    text = """
        arg x  f32[8,8]
        arg y  f32[8,8]
        hint x  [data, ?]  a.py:1  priority={}
        hint y  [?, data]  a.py:2  priority={}
        %0 = tanh x  f32[8,8]  i j -> i j
        %1 = tanh y  f32[8,8]  i j -> i j
        %2 = add %0 %1  f32[8,8]  i j, i j -> i j
    """
    first = "x f32[8{data},8] | y f32[8,8{data}] | %0 f32[8{data},8] | %1 f32[8{data},8]"
    second = "x f32[8{data},8] | y f32[8,8{data}] | %0 f32[8,8{data}] | %1 f32[8,8{data}]"
    expect(text.format(0, 1), first + " | %2 f32[8{data},8]")
    expect(text.format(1, 0), second + " | %2 f32[8,8{data}]")
    expect(text.format(7, 3), second + " | %2 f32[8,8{data}]")


def test_a_later_hint_keeps_its_dims_and_axes() -> None:
    expect(
        """
        arg x  f32[8,8]
        hint x  [data, ?]  a.py:1
        hint %0  [?, data]  a.py:2  priority=1
        %0 = tanh x  f32[8,8]  i j -> i j
        %1 = tanh %0  f32[8,8]  i j -> i j
        """,
        "x f32[8{data},8] | %0 f32[8,8{data}] | %1 f32[8,8{data}]",
    )


def test_elementwise_operations_go_before_products() -> None:
    expect(
        """
        arg x  f32[8,8]
        arg w  f32[8,8]
        arg y  f32[8,8]
        hint x  [data, .]  a.py:1
        hint y  [?, data]  a.py:2
        %0 = dot_general x w  f32[8,8]  b k, k n -> b n  add(k)
        %1 = add %0 y  f32[8,8]  i j, i j -> i j
        """,
        "x f32[8{data},8] | w f32[8,8{data}] | y f32[8,8{data}] | %0 f32[8,8{data}] |"
        " %1 f32[8,8{data}]",
    )


def test_whole_factors_do_not_pass_and_halos_do() -> None:
    expect(
        """
        arg x  f32[8,8]
        hint x  [data, model]  a.py:1
        %0 = window x  f32[8,8]  i j -> i j  whole(i) halo(j:2)
        """,
        "x f32[8{data},8{model}] | %0 f32[8,8{model}]",
    )


def test_split_dims_take_the_major_factor_first() -> None:
    text = """
        arg x  f32[8,4]
        arg y  f32[32]
        hint x  {}  a.py:1
        hint y  {}  a.py:2
        %0 = reshape x  f32[32]  h d -> (h d)  {{h=8 d=4}}
        %1 = reshape y  f32[8,4]  (h d) -> h d  {{h=8 d=4}}
    """
    expect(
        text.format("[data, model]", "[data]"),  # h is not completely split: d can not follow
        "x f32[8{data},4{model}] | y f32[32{data}] | %0 f32[32{data}] | %1 f32[8{data},4]",
    )
    expect(
        text.format("[data+model, ?]", "[data+model]"),
        "x f32[8{data,model},4] | y f32[32{data,model}] | %0 f32[32{data,model}] |"
        " %1 f32[8{data,model},4]",
    )
    mesh = Mesh.parse("data=8,model=4")
    expect(
        text.format("[data, model]", "[data+model]"),
        "x f32[8{data},4{model}] | y f32[32{data,model}] | %0 f32[32{data,model}] |"
        " %1 f32[8{data},4{model}]",
        mesh,
    )
    # An axis that only part of the major factor can take is stuck.
    expect(
        """
        arg y  f32[32]
        hint y  [data]  a.py:1
        %0 = reshape y  f32[2,16]  (h d) -> h d  {h=2 d=16}
        """,
        "y f32[32{data}] | %0 f32[2,16]",
    )


def test_factors_of_a_dim_take_axes_in_mesh_order_only() -> None:
    # The merged dim would be split by model first, then by data: no Sharding says that.
    expect(
        """
        arg x  f32[2,16]
        hint x  [model, data]  a.py:1
        %0 = reshape x  f32[32]  h d -> (h d)  {h=2 d=16}
        """,
        "x f32[2{model},16{data}] | %0 f32[32{model}]",
    )


def test_an_axis_that_fits_no_factor_of_a_dim_is_not_lost() -> None:
    # y gets data=4, of which h=2 can take only half; then model asks for h.
    expect(
        """
        arg x  f32[32]
        arg y  f32[32]
        arg z  f32[2,16]
        hint x  [data]  a.py:1
        hint z  [model, ?]  a.py:2  priority=1
        %0 = add x y  f32[32]  i, i -> i
        %1 = reshape y  f32[2,16]  (h d) -> h d  {h=2 d=16}
        %2 = add %1 z  f32[2,16]  i j, i j -> i j
        """,
        "x f32[32{data}] | y f32[32{data}] | z f32[2{model},16] | %0 f32[32{data}] |"
        " %1 f32[2{model},16] | %2 f32[2{model},16]",
    )


def test_a_value_in_two_places_of_one_operation_takes_an_axis_once() -> None:
    expect(
        """
        arg x  f32[8,8]
        hint %0  [data, ?]  a.py:1
        %0 = symmetric x x  f32[8,8]  i j, j i -> i j
        """,
        "x f32[8{data},8] | %0 f32[8{data},8]",
    )


def test_a_value_takes_the_axes_it_has_room_for() -> None:
    expect(
        """
        arg c  f32[8,8]
        arg x  f32[8,8]
        arg y  f32[8,8]
        hint c  [., .]  a.py:1
        hint x  [data+model, .]  a.py:2
        hint y  [., model]  a.py:3
        %0 = transpose y  f32[8,8]  i j -> j i
        %1 = transpose %0  f32[8,8]  i j -> j i
        %2 = select_n c x %1  f32[8,8]  i j, i j, i j -> i j
        """,
        "c f32[8,8] | x f32[8{data,model},8] | y f32[8,8{model}] | %0 f32[8{model},8{data}] |"
        " %1 f32[8{data},8{model}] | %2 f32[8{data,model},8]",
    )


def test_a_rule_that_is_too_long_for_a_value_splits_nothing_unevenly() -> None:
    graph = parse_graph(
        "graph f\n arg x  f32[8]\n hint x  [data]  a.py:1\n %0 = cut x  f32[6]  i -> i  halo(i:2)"
    )
    assert str(propagate(graph, MESH)).split() == ["x", "f32[8{data}]", "%0", "f32[6]"]


def test_what_does_not_divide_is_not_split() -> None:
    expect(
        """
        arg x  f32[12,4]
        hint x  [data, .]  a.py:1
        %0 = reshape x  f32[2,6,4]  (h d) j -> h d j  {h=2 d=6}
        %1 = tanh x  f32[12,4]  i j -> i j
        """,
        "x f32[12{data},4] | %0 f32[2,6,4] | %1 f32[12{data},4]",
    )


LOOP = """
        arg w  f32[3,16,16]
        arg x  f32[8,16]
        tie %0 %3
        {}
        %0 = loop_enter x  f32[8,16]  i j -> i j
        scan x3 {{
          %1 = scan_slice w  f32[16,16]  l j k -> j k  whole(l)
          %2 = dot_general %0 %1  f32[8,16]  b k, k n -> b n  add(k)  a.py:9
          %3 = loop_next %2  f32[8,16]  i j -> i j
          %4 = scan_stack %2  f32[3,8,16]  i j -> l i j  whole(l)
        }}
"""


def test_through_loops_and_ties() -> None:
    expect(
        LOOP.format("hint x  [data, ?]  a.py:1"),
        "w f32[3,16,16] | x f32[8{data},16] | %0 f32[8{data},16] | %1 f32[16,16] |"
        " %2 f32[8{data},16] | %3 f32[8{data},16] | %4 f32[3,8{data},16]",
    )
    expect(
        LOOP.format("hint w  [., ?, model]  a.py:1"),
        "w f32[3,16,16{model}] | x f32[8,16{model}] | %0 f32[8,16{model}] | %1 f32[16,16{model}] |"
        " %2 f32[8,16{model}] | %3 f32[8,16{model}] | %4 f32[3,8,16{model}]",
    )


def test_no_hints_split_nothing() -> None:
    graph = parse_graph("graph f\n arg x  f32[8]\n %0 = neg x  f32[8]  i -> i")
    assert set(str(propagate(graph, MESH)).split()) == {"x", "%0", "f32[8]"}
    assert propagate(graph, MESH).why(1, "data") == ()
    assert propagate(graph, MESH).explain(1, "data") == ""


def test_given_hints_take_the_place_of_the_graphs() -> None:
    graph = parse_graph("graph f\n arg x  f32[8]\n hint x  [data]  a.py:1")
    assert propagate(graph, MESH).shardings[0].axes == (0, -1)
    assert propagate(graph, MESH, ()).shardings[0].axes == (-1, -1)
    other = Hint(0, (("model",),), "b.py:2")
    assert propagate(graph, MESH, [other]).shardings[0].axes == (-1, 0)


# Why.


def test_the_chain_leads_back_to_the_hint() -> None:
    graph = parse_graph("graph f\n" + LOOP.format("hint w  [., ?, model]  a.py:1"))
    result = propagate(graph, MESH)
    x = graph.inputs[1]
    names = [graph.ops[s.op].name for s in result.why(x, "model") if s.op is not None]
    assert names == ["loop_enter", "loop_next", "dot_general", "scan_slice"]
    assert result.explain(x, "model").splitlines() == [
        "x, f32[8,16]: model splits dim 1",
        "  from the result of loop_enter, f32[8,16], through loop_enter",
        "  as the result of loop_next, f32[8,16], which it is tied to",
        "  from the result of dot_general (a.py:9), f32[8,16], through loop_next",
        "  from the result of scan_slice, f32[16,16], through dot_general (a.py:9)",
        "  from w, f32[3,16,16], through scan_slice",
        "  w, f32[3,16,16]: model splits dim 2, hinted by a.py:1 as [., ?, model]",
    ]
    assert result.why(x, 1) == result.why(x, "model")
    assert result.why(x, "data") == ()


def chain_of(count: int) -> Graph:
    """So many layers of product, elementwise and reduction operations, a tenth of them hinted."""
    lines = ["graph f", " arg x0  f32[8,16]"]
    last = "x0"
    for n in range(count // 3):
        lines += [
            f" arg w{n}  f32[16,16]",
            f" %{3 * n} = dot_general {last} w{n}  f32[8,16]  b k, k n -> b n  add(k)",
            f" %{3 * n + 1} = tanh %{3 * n}  f32[8,16]  i j -> i j",
            f" %{3 * n + 2} = reduce_sum %{3 * n + 1}  f32[8]  i j -> i  add(j)",
        ]
        if n % 4 == 0:
            lines.append(f" hint w{n}  [?, model]  a.py:{n}")
        last = f"%{3 * n + 1}"
    lines.append(f" hint {last}  [data, ?]  a.py:1")
    return parse_graph("\n".join(lines))


def test_four_times_the_operations_are_about_four_times_the_work() -> None:
    """In calls of functions, which no other process on the machine can slow down."""

    def calls(count: int) -> int:
        graph = chain_of(count)
        profile = cProfile.Profile()
        result = profile.runcall(propagate, graph, MESH)
        assert result.shardings[graph.inputs[0]].axes[0] == 0  # data came all the way up
        return sum(entry.callcount for entry in profile.getstats())

    assert calls(6000) < 4.5 * calls(1500)
