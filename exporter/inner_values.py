"""The values inside a canonical graph: its hidden states as outputs beside its own, and what they are for an input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from llava_deploy.engines.contract import HIDDEN_STATES
from llava_deploy.engines.names import ACCURACY_LEVEL_ENTRY
from llava_deploy.engines.onnxruntime_module import import_onnxruntime
from llava_deploy.exporter.halves import TOWER_FEATURES


def mark_hidden_states(model: ir.Model) -> None:
    """Make the hidden states, and the tower's features, outputs of a canonical graph, behind those that it has."""
    names = {value.name for value in model.graph.outputs}
    for node in model.graph:
        for value in node.outputs:
            named = value.name is not None and (value.name.startswith(HIDDEN_STATES) or value.name == TOWER_FEATURES)
            if named and value.name not in names:
                model.graph.outputs.append(value)


def all_outputs(path: Path, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a canonical graph in ONNX Runtime on the CPU, in float32 where it can; outputs and hidden states by name."""
    model = ir.load(path)
    mark_hidden_states(model)
    onnxruntime = import_onnxruntime()
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry(ACCURACY_LEVEL_ENTRY, "1")  # float32, as PyTorch computes
    # The graph comes as bytes; this says where its external data is.
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    graph = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    return dict(zip(outputs, session.run(outputs, feed), strict=True))
