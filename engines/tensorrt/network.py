"""A lowered graph as a network of TensorRT's, and what its parser says where it cannot make one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_deploy.engines.errors import BackendError
from llava_deploy.engines.tensorrt.adapter import network_flags
from llava_deploy.engines.tensorrt.constructs import construct_of, explain
from llava_deploy.engines.tensorrt.messages import Messages, make_logger, one_line
from llava_deploy.engines.tensorrt_module import SPOKEN, TensorRtModule

_WEIGHT = re.compile(r"Failed to import initializer: (\S+)$")


@dataclass(frozen=True)
class ParsedNetwork:
    """A network with all that must live as long as it: its weights are maps of files that the parser holds open."""

    builder: Any
    network: Any
    parser: Any
    logger: Any


def parse_network(module: TensorRtModule, path: Path, messages: Messages) -> ParsedNetwork:
    """Parse the ONNX file ``path``, its external data beside it.

    Raises:
        BackendError: the parser refuses a node, or takes one for something else than it is.
    """
    api = module.api
    logger = make_logger(api, messages)
    builder = api.Builder(logger)
    network = builder.create_network(network_flags(module))
    parser = api.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        raise _parser_error(module, parser, path, messages)
    messages.require_no_loss(path)
    return ParsedNetwork(builder, network, parser, logger)


def title(module: TensorRtModule) -> str:
    """The module for people, with its version."""
    return f"{SPOKEN[module.backend]} {module.version}"


def module_path(node_name: str) -> str:
    """Module of the model that a node was made for, as checkpoints name it.

    The exporter names a node ``language_model/layers.0/mlp/MatMul_node_3``, a pass
    ``language_model.layers.0.mlp.up_proj.weight.lowered.MatMul_1``.
    """
    separator = "/" if "/" in node_name else "."
    return node_name.rpartition(separator)[0].replace("/", ".")


def _parser_error(module: TensorRtModule, parser: Any, path: Path, messages: Messages) -> BackendError:
    where = f"{path.name}: {title(module)} cannot read it"
    if parser.num_errors == 0:
        return BackendError(f"{where}: {messages.cause()}; use another version of TensorRT")
    error = parser.get_error(0)
    reason, operator = one_line(error.desc()), error.node_operator()
    if weight := _WEIGHT.search(reason):
        return BackendError(
            f"{where}: it has no weights such as {weight[1]}, by its type; use another version of TensorRT"
        )
    if not operator:
        return BackendError(f"{where}: {reason}; use another version of TensorRT")
    construct = construct_of(operator)
    known = "" if construct is None else f" ({explain(construct)})"
    return BackendError(
        f"{where}: node {error.node()}, {operator} of {module_path(error.node_name()) or 'the graph itself'}: "
        f"{reason}{known}; use another version of TensorRT, or lower for an older one with --trt-version"
    )
