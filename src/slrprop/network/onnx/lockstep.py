"""Batches in lockstep through an ONNX model: the graph in pieces from one dense layer to the next."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from onnx import helper
from torch import Tensor

from slrprop.data import Data
from slrprop.forms import Dense
from slrprop.memory import bound
from slrprop.network.lockstep import Changed, Lockstep
from slrprop.network.onnx.feed import unpadded
from slrprop.network.onnx.file import Feed, Session
from slrprop.network.onnx.network import OnnxNetwork, layer_input


class Piece(NamedTuple):
    """The nodes that lead to a layer from the dense layers before it; no session where there are none."""

    nodes: frozenset[int]
    reads: tuple[str, ...]
    session: Session | None


class OnnxLockstep(Lockstep):
    """See :class:`Lockstep`; dense layers are computed here, what is between them by ONNX Runtime."""

    network: OnnxNetwork

    def __init__(self, network: OnnxNetwork, data: Data) -> None:
        super().__init__(network)
        self._parts = [part for batch in data for part in network.parts(batch)]
        self._tensors: list[Feed] = [dict(part.feed) for part in self._parts]
        self._done: set[int] = set()

    def _go(self, name: str, between: Mapping[str, Changed | None]) -> list[Tensor] | None:
        graph = self.network.graph
        for layer in (*between, name):
            if not self._run(layer):
                return None
            dense = graph.layers[layer]
            if layer != name:
                self._pass(layer, between[layer])
        if sum(value.nbytes for tensors in self._tensors for value in tensors.values()) > bound() // 2:
            return None
        rows, first = [], 0
        for tensors, part in zip(self._tensors, self._parts, strict=True):
            rows.append(dense.operator.inputs(unpadded(layer_input(dense, tensors), part), first))
            first += part.samples
        return rows

    def _pass(self, name: str, form: Changed | None) -> None:
        """Compute a layer that all batches stand before."""
        network, dense = self.network, self.network.graph.layers[name]
        weight, bias = (network.weight(name), network.bias(name)) if form is None else (form.weight, form.bias)
        weight = weight.to(network.dtype(name))
        bias = None if bias is None else bias.to(weight)
        for tensors in self._tensors:
            x = layer_input(dense, tensors)
            y = dense.operator.compute(Dense(weight), bias, x.to(weight) if x.is_floating_point() else x)
            tensors[dense.y] = np.ascontiguousarray(y.numpy(), self.network.graph.constants[dense.weight].dtype)
        self._done |= {dense.index} if dense.adder is None else {dense.index, dense.adder}
        self._forget()

    def _run(self, name: str) -> bool:
        """Compute what a layer reads; False where something that is no tensor would have to be handed on."""
        network = self.network
        if name not in network.pieces:
            network.pieces[name] = self._piece(name)
        piece = network.pieces[name]
        for tensors in self._tensors if piece.session is not None else ():
            assert piece.session is not None
            made = network.run(piece.session, {read: tensors[read] for read in piece.reads})
            if not all(isinstance(value, np.ndarray) for value in made.values()):
                return False
            tensors |= made
        self._done |= piece.nodes
        return True

    def _forget(self) -> None:
        """Drop the tensors that nothing ahead reads."""
        graph = self.network.graph
        for tensors in self._tensors:
            for name in [name for name in tensors if self._done.issuperset(graph.readers.get(name, ()))]:
                del tensors[name]

    def _piece(self, name: str) -> Piece:
        graph = self.network.graph
        target = graph.layers[name].x
        varying = graph.after({value.name for value in graph.inputs})
        nodes = (graph.before(target) & varying) - self._done
        if not nodes:
            return Piece(frozenset(), (), None)
        made = {output for index in nodes for output in graph.nodes[index].output if output}
        known = self._tensors[0]
        kinds = {
            name: helper.np_dtype_to_tensor_dtype(known[name].dtype)
            for name in sorted(graph.needs(nodes) & known.keys())
        }
        ahead = {tensor for tensor in made if not (self._done | nodes).issuperset(graph.readers.get(tensor, ()))}
        return Piece(frozenset(nodes), tuple(kinds), graph.part(nodes, kinds, sorted(ahead | {target})))

    def close(self) -> None:
        self._tensors, self._inputs = [], []
