"""Memory of the compiled training step, from the graphs that torch.compile would generate code for.

Dynamo and AOTAutograd run on fake tensors, up to the forward and the backward graph, with the
partitioner that chooses which activations to keep. What the code generator then does is modelled:
pointwise operations run inside the kernel that needs their result, so that only matmuls,
reductions and what those read are ever in memory; a kernel writes over a buffer that it reads for
the last time. Against the profiler this is within 5 % on the CPU (tests/foresight/test_memory.py).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from preflight.device.runtime import Runtime
from preflight.models.base import TokenModel
from preflight.models.loss import Targets

_aten = torch.ops.aten
_VIEWS = {
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.reshape.default,
    _aten.permute.default,
    _aten.t.default,
    _aten.transpose.int,
    _aten.alias.default,
    _aten.detach.default,
    _aten.expand.default,
    _aten.unsqueeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.slice.Tensor,
    _aten.select.int,
    _aten.as_strided.default,
}
# By parts of their names: calls into libraries, and operations whose result is always written.
_LIBRARY = ("mm", "attention", "embedding_dense_backward")
_WRITTEN = (
    "sum.",
    "amax",
    "var_mean",
    "mean.",
    "argmax",
    "scatter",
    "cat.",
    "index_put",
    "constant_pad",
)


class _Graph:
    """Which buffers a graph writes, in order, and when each is read for the last time."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.nodes = list(module.graph.nodes)
        self.inputs = [node for node in self.nodes if node.op == "placeholder"]
        results = tree_leaves(next(node for node in self.nodes if node.op == "output").args)
        self.outputs = {_base(node) for node in results if isinstance(node, fx.Node)}
        written = set(self.outputs)
        for node in self.nodes:
            if node.op != "call_function" or node.target in _VIEWS:
                continue
            if node.target is operator.getitem:
                written.add(node)
            elif _is_one_of(node, _WRITTEN) or _is_one_of(node, _LIBRARY):
                # A library reads from memory; so does a copy to a place found at run time.
                written.add(node)
                if not _is_one_of(node, ("sum.", "amax", "mean")):
                    written.update(map(_base, node.all_input_nodes))
        self.buffers = [n for n in self.nodes if n in written and n.op == "call_function"]
        self._last_read = self._find_last_reads(written)

    def _find_last_reads(self, written: set[fx.Node]) -> dict[fx.Node, int]:
        """For each buffer and input, the last of `buffers` whose kernel reads it.

        A kernel reads what is in memory. A fused operation is not: whoever reads it reads, in its
        place, everything that it was computed from.
        """
        place = {node: index for index, node in enumerate(self.buffers)}
        reads: dict[fx.Node, frozenset[fx.Node]] = {}  # of written nodes, through fused ones
        last: dict[fx.Node, int] = {}
        for node in self.nodes:
            found: set[fx.Node] = set()
            for source in node.all_input_nodes:
                whole = source in written or source.op == "placeholder"
                found |= {source} if whole else reads[source]
            reads[node] = frozenset(found)
            if node in place:
                last.update(dict.fromkeys(found, place[node]))
        return last

    def trace(
        self, kept: dict[fx.Node, int], item_of: Callable[[fx.Node], str]
    ) -> list[dict[str, int]]:
        """Bytes in memory by item while each buffer is written.

        Args:
            kept: sizes of the inputs that are freed after their last use.
            item_of: what a buffer is for.
        """
        sizes = {node: _count_bytes(node) for node in self.buffers} | kept
        ends: dict[int, list[fx.Node]] = {}
        for node, index in self._last_read.items():
            if node in sizes and node not in self.outputs:
                ends.setdefault(index, []).append(node)
        now: dict[str, int] = {}
        for node, size in kept.items():
            now[item_of(node)] = now.get(item_of(node), 0) + size
        moments = []
        for index, node in enumerate(self.buffers):
            item, last_read = item_of(node), ends.get(index, [])
            now[item] = now.get(item, 0) + sizes[node]
            moment = dict(now)
            moment[item] += _count_bytes(node, several=True)
            if not _is_one_of(node, _LIBRARY):
                # The result goes in the place of an input of the same size that ends here.
                over = next(
                    (n for n in last_read if n is not node and sizes[n] == sizes[node]), None
                )
                if over is not None:
                    moment[item_of(over)] -= sizes[over]
            moments.append(moment)
            for freed in last_read:
                now[item_of(freed)] -= sizes[freed]
        return moments


def _base(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and node.target in _VIEWS:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _is_one_of(node: fx.Node, names: tuple[str, ...]) -> bool:
    return node.target is not operator.getitem and any(name in str(node.target) for name in names)


def _count_bytes(node: fx.Node, *, several: bool = False) -> int:
    """Bytes of a node's result; of `several` results, which later nodes take one by one."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)) != several:
        return 0
    return sum(
        int(v.numel()) * v.element_size() for v in tree_leaves(value) if isinstance(v, Tensor)
    )


def capture_graphs(
    model: TokenModel, runtime: Runtime, batch: tuple[Tensor, Targets]
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Forward and backward graph of one step, as torch.compile's own backend would receive them.

    On a CPU the loss is in neither.

    Raises:
        RuntimeError: the model does not make one graph of each.
    """
    # Imported here: the compiler takes a second to load, and few runs compile.
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    graphs: dict[str, list[fx.GraphModule]] = {"forward": [], "backward": []}

    def keep(name: str) -> Callable[[fx.GraphModule, Any], Callable[..., Any]]:
        def compiler(module: fx.GraphModule, _: Any) -> Callable[..., Any]:
            graphs[name].append(module)
            return make_boxed_func(module.forward)

        return compiler

    backend = aot_autograd(
        fw_compiler=keep("forward"),
        bw_compiler=keep("backward"),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table,
    )
    torch._dynamo.reset()
    compiled = model.compile_for_training(backend=backend, dynamic=False)
    with runtime.autocast():
        loss = compiled(*batch)
    if not graphs["backward"]:
        loss.backward()
    torch._dynamo.reset()
    if [len(found) for found in graphs.values()] != [1, 1]:
        raise RuntimeError("the model is not compiled as one graph")
    return graphs["forward"][0], graphs["backward"][0]


def trace_compiled_step(
    forward: fx.GraphModule, backward: fx.GraphModule
) -> dict[str, list[dict[str, int]]]:
    """Bytes by item, besides weights and optimizer, at the moments of each stretch of a step.

    Of the loss, between the two graphs, there is what the forward graph leaves.
    """
    ahead, back = _Graph(forward), _Graph(backward)
    given = {node.name for node in ahead.inputs}
    kept = {
        node: _count_bytes(node)
        for node in back.inputs
        if node.name not in given and not node.name.startswith("tangent")
    }
    moments = back.trace(
        kept,
        lambda node: (
            "gradients"
            if node in back.outputs
            else "activations kept"
            if node in kept
            else "temporary"
        ),
    )
    half = len(moments) // 2
    return {
        "forward": ahead.trace(
            {}, lambda node: "activations kept" if node in ahead.outputs else "temporary"
        ),
        "loss": [{"activations kept": sum(map(_count_bytes, ahead.outputs - set(ahead.inputs)))}],
        "backward, first half": moments[:half],
        "backward, second half": moments[half:],
    }
