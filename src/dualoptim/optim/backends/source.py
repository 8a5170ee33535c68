"""The rule in another language: torch functions → traced graph → lines of source.

`rule.update`, `state.decode` and `state.encode` are traced with torch.fx, and every operation in the graph becomes one
line. A backend's kernel is a template with loads, loops and stores; its mathematics comes from here, so that it is the
same everywhere by construction.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from ..rule import Coefficients, Moments, update
from ..state import Code, decode, encode, fourth_root

Dialect = Mapping[Any, str]
UNIFORM = (*Coefficients._fields, "scale")  # inputs that are the same for a whole block; the others differ by element

# Operation → expression. {0}, {1}, … are its arguments. `fma` rounds once, as torch's own vectorized lerp and add do.
CPP: Dialect = {
    float: "{0!r}f",
    operator.add: "({0} + {1})",
    operator.sub: "({0} - {1})",
    operator.mul: "({0} * {1})",
    operator.truediv: "({0} / {1})",
    "division by a uniform number": "quotient({0}, {1})",
    operator.neg: "(-{0})",
    operator.ge: "({0} >= {1})",
    torch.add: "fma({alpha}, {1}, {0})",
    torch.sub: "fma(-{alpha}, {1}, {0})",
    torch.addcmul: "fma({value} * {1}, {2}, {0})",
    torch.lerp: "lerped({0}, {1}, {2})",
    torch.abs: "std::fabs({0})",
    torch.sqrt: "std::sqrt({0})",
    torch.round: "std::nearbyint({0})",
    torch.copysign: "std::copysign({0}, {1})",
    torch.where: "({0} ? {1} : {2})",
    torch.clamp: "clamped({0}, {1}, {2})",
    torch.maximum: "larger({0}, {1})",
    torch.sign: "sign_of({0})",
    fourth_root: "root4({0})",
}
TRITON: Dialect = {
    **CPP,
    float: "{0!r}",
    operator.truediv: "tl.div_rn({0}, {1})",
    torch.add: "tl.fma({alpha}, {1}, {0})",
    torch.sub: "tl.fma(-{alpha}, {1}, {0})",
    torch.addcmul: "tl.fma({value} * {1}, {2}, {0})",
    torch.abs: "tl.abs({0})",
    torch.sqrt: "tl.sqrt_rn({0})",
    torch.round: "nearest({0})",
    torch.copysign: "signed_like({0}, {1})",
    torch.where: "tl.where({0}, {1}, {2})",
}


@functools.cache
def rule_graph(*, with_base: bool) -> tuple[Graph, dict[str, Node]]:
    """`rule.update` as a graph of operations on param, grad, moments and coefficients, and its results, `new_…`."""
    graph, named = _graph()
    param, grad = named("param", "grad")
    delta = Moments(*named("delta_exp_avg", "delta_exp_avg_sq"))
    base = Moments(*named("base_exp_avg", "base_exp_avg_sq")) if with_base else None
    new_param, new_delta, new_base = update(param, grad, delta, base, Coefficients(*named(*Coefficients._fields)))
    results = {"new_param": new_param, "new_delta_exp_avg": new_delta[0], "new_delta_exp_avg_sq": new_delta[1]}
    if new_base is not None:
        results |= {"new_base_exp_avg": new_base[0], "new_base_exp_avg_sq": new_base[1]}
    return graph, {name: proxy.node for name, proxy in results.items()}


def rule_lines(dialect: Dialect, *, with_base: bool, declare: str = "") -> list[str]:
    """`rule.update` as lines that read param, grad, the moments and the coefficients by name and set `new_…`."""
    return _lines(*rule_graph(with_base=with_base), dialect, declare)


def code_lines(dialect: Dialect, map: Code, *, encoding: bool, declare: str = "") -> list[str]:
    """`state.encode` or `state.decode` as lines that read `x` and `scale` and set `result`."""
    graph, named = _graph()
    x, scale = named("x", "scale")
    result = (encode if encoding else decode)(x, scale, map)
    return _lines(graph, {"result": result.node}, dialect, declare)


def _graph() -> tuple[Graph, Callable[..., list[Proxy]]]:
    """An empty graph, and a function that makes its inputs."""
    graph = Graph()
    tracer = GraphAppendingTracer(graph)
    return graph, lambda *names: [Proxy(graph.placeholder(name), tracer) for name in names]


def _lines(graph: Graph, results: Mapping[str, Node], dialect: Dialect, declare: str) -> list[str]:

    def term(argument: Any) -> str:
        return argument.name if isinstance(argument, Node) else dialect[float].format(float(argument))

    lines, varying = [], {node for node in graph.nodes if node.op == "placeholder" and node.name not in UNIFORM}
    for node in graph.nodes:
        if node.op == "call_function":
            operation: Any = node.target
            if operation is operator.truediv and node.args[1] not in varying:
                operation = "division by a uniform number"
            if not varying.isdisjoint(node.all_input_nodes):
                varying.add(node)
            terms = {name: term(argument) for name, argument in node.kwargs.items()}
            lines.append(f"{declare}{node.name} = {dialect[operation].format(*map(term, node.args), **terms)}")
    return lines + [f"{declare}{name} = {node.name}" for name, node in results.items()]
