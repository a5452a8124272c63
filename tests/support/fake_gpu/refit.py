"""Refitting on the fake GPU: an engine's graph gives way to another one, with the same weights by name and form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import tensorrt_rtx as real

from fake_gpu.signatures import held_against

if TYPE_CHECKING:
    from fake_gpu.tensorrt import FakeEngine


def weights(path: Path) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Dtype and shape of what is a weight to TensorRT: scalars are constants of the network."""
    values = ir.load(path).graph.initializers.items()
    return {name: (value.dtype, tuple(value.shape.numpy())) for name, value in values if value.shape.rank()}


@held_against(real.ISerializationConfig)
class FakeSerializationConfig:
    def __init__(self) -> None:
        self._flags: set[Any] = set()

    def set_flag(self, flag: Any) -> bool:
        if not isinstance(flag, real.SerializationFlag):
            raise TypeError("set_flag(): incompatible function arguments: want a SerializationFlag")
        self._flags.add(flag)
        return True


@held_against(real.ICudaEngine)
class Refittable:
    """The part of a fake engine that gives its plan out again."""

    _gpu: Any
    _plan: dict[str, Any]

    refittable = property(lambda self: bool(self._plan.get("refittable")))

    def create_serialization_config(self) -> FakeSerializationConfig:
        return FakeSerializationConfig()

    def serialize_with_config(self, config: FakeSerializationConfig) -> bytes | None:
        self._gpu.calls["serialize_with_config"] += 1
        if self._gpu.asked_to_fail("serialize_with_config"):
            return None
        remains = self.refittable and real.SerializationFlag.INCLUDE_REFIT in config._flags
        return json.dumps({**self._plan, "refittable": remains}).encode()


@held_against(real.Refitter)
class FakeRefitter:
    def __init__(self, engine: FakeEngine, logger: Any) -> None:
        if not isinstance(logger, real.ILogger):
            raise TypeError("Refitter: incompatible constructor arguments: want an ILogger")
        self._engine, self._logger, self._gpu = engine, logger, engine._gpu
        self._wanted = {
            name: form
            for name, form in weights(Path(engine._plan["onnx"])).items()
            if name not in self._gpu.unknown_weights
        }
        self._given: set[str] = set()
        self._graph: Path | None = None

    def get_all_weights(self) -> list[str]:
        return list(self._wanted)

    def get_missing_weights(self) -> list[str]:
        return [name for name in self._wanted if name not in self._given] if self._graph is not None else []

    def refit_cuda_engine(self) -> bool:
        self._gpu.calls["refit_cuda_engine"] += 1
        if self._gpu.asked_to_fail("refit_cuda_engine") or self.get_missing_weights() or self._graph is None:
            self._logger.log(real.ILogger.ERROR, "Error Code 4: API Usage Error (refit: weights are missing)")
            return False
        # The weights are the engine's own from now on, whatever becomes of the file.
        place = self._gpu.new_place()
        for path in self._graph.parent.iterdir():
            shutil.copyfile(path.resolve(), place / path.name)
        self._engine._plan["onnx"] = str(place / self._graph.name)
        return True


class FakeParserError:
    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text


@held_against(real.OnnxParserRefitter)
class FakeOnnxParserRefitter:
    def __init__(self, refitter: FakeRefitter, logger: Any) -> None:
        if not isinstance(logger, real.ILogger):
            raise TypeError("OnnxParserRefitter: incompatible constructor arguments: want an ILogger")
        self._refitter, self._errors = refitter, list[FakeParserError]()

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index: int) -> FakeParserError:
        return self._errors[index]

    def refit_from_file(self, model: str) -> bool:
        if type(model) is not str:
            raise TypeError(f"refit_from_file(): incompatible function arguments: want a str, got {model!r}")
        gpu = self._refitter._gpu
        gpu.calls["refit_from_file"] += 1
        if gpu.asked_to_fail("refit_from_file"):
            self._errors.append(FakeParserError("Failed to refit the weights"))
            return False
        for name, form in weights(Path(model)).items():
            if self._refitter._wanted.get(name, form) != form:
                self._errors.append(FakeParserError(f"{name}: count or type of the weights differ"))
                return False
            self._refitter._given.add(name)
        self._refitter._graph = Path(model)
        return True
