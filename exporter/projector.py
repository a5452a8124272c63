"""The projector between tower and decoder (LLaVA, ``llava/model/multimodal_projector/builder.py``)."""

from __future__ import annotations

import itertools

import onnx_ir as ir
from onnxscript import nn

from llava_deploy.exporter.blocks import Linear, OpBuilder, activation
from llava_deploy.exporter.config import ProjectorConfig


class Projector(nn.Sequential):
    """Linears with an activation between them; none at all for ``identity``."""

    def __init__(self, config: ProjectorConfig, dtype: ir.DataType) -> None:
        super().__init__(*(Linear(i, o, config.bias, dtype) for i, o in itertools.pairwise(config.sizes)))
        self.hidden_act = config.hidden_act
        self.dtype = dtype

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        for index, linear in enumerate(self):
            if index:
                x = activation(op, self.hidden_act, x, self.dtype)
            x = linear(op, x)
        return x
