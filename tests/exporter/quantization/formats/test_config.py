"""``quantization_config``: each key is honoured, has no effect, is refused by name, or is reported as unused."""

from __future__ import annotations

from typing import Any

import pytest

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.exporter.checkpoint import open_checkpoint
from llava_deploy.exporter.layouts.fields import Fields
from llava_deploy.exporter.quantization.formats.awq import AwqPacking
from llava_deploy.exporter.quantization.formats.compressed_tensors import CompressedPacking
from llava_deploy.exporter.quantization.formats.config import Taken, take_packing
from llava_deploy.exporter.quantization.formats.gptq import GptqPacking, ZeroPoints

METHODS = """
    bitsandbytes hqq aqlm eetq torchao quanto vptq spqr higgs fp_quant bitnet quark fp8 fbgemm_fp8 mxfp4 gguf auto-round
    novel
""".split()


def taken(config: Any, **rest: Any) -> Taken:
    return take_packing(Fields({"quantization_config": config, **rest}, "config.json"))


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_are_refused_by_name(make_llava: Any, edit_json: Any, method: str) -> None:
    saved = make_llava()
    config = {"quant_method": method, "bits": 4}
    edit_json(saved.directory / "config.json", lambda values: values.update(quantization_config=config))
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(saved.directory)
    message = str(error.value)
    assert "config.json, quantization_config.quant_method: want 'awq', 'gptq', 'compressed-tensors', found" in message
    assert f"{method} checkpoints are not read: " in message
    assert "take the unquantised checkpoint" in message
    assert "\n" not in message


def test_bitsandbytes_of_old_configs() -> None:
    with pytest.raises(CheckpointError, match=r"load_in_4bit: .* bitsandbytes checkpoints are not read.*dequantize"):
        taken({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}


def compressed(
    top: dict[str, Any] | None = None, group: dict[str, Any] | None = None, **weights: Any
) -> dict[str, Any]:
    scheme = {"targets": ["Linear"], "weights": {**WEIGHTS, **weights}, **(group or {})}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": scheme}}
    return {**config, **(top or {})}


REFUSED = [
    ({**AWQ, "version": "gemv"}, "version: want 'gemm', found 'gemv'"),
    ({**AWQ, "version": "GEMV_fast"}, "version: want 'gemm'"),
    ({**AWQ, "version": "marlin"}, "version: want 'gemm'"),
    ({**AWQ, "backend": "llm-awq"}, "backend: .*--quantized FILE"),
    ({**AWQ, "bits": 8}, "bits: want 4, found 8"),
    ({**AWQ, "zero_point": "yes"}, "zero_point: want bool"),
    ({**AWQ, "group_size": "128"}, "group_size: want int"),
    ({**GPTQ, "bits": 3}, "bits: want 4, found 3"),
    ({"quant_method": "gptq"}, "bits: want this field"),
    ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format: want 'gptq' or 'gptq_v2', found 'marlin'"),
    ({**GPTQ, "format": "bitblas"}, "format: want 'gptq'"),
    ({**GPTQ, "checkpoint_format": "gptq", "format": "gptq_v2"}, "format: want 'gptq' as in checkpoint_format"),
    ({**GPTQ, "is_marlin_format": True}, "is_marlin_format: want False"),
    ({**GPTQ, "pack_dtype": "int64"}, "pack_dtype: want 'int32'"),
    ({**GPTQ, "dynamic": {"+:.*": {"bits": 8}}}, "dynamic: want it absent"),
    ({**GPTQ, "rotation": "hadamard"}, "rotation: want"),
    ({**GPTQ, "desc_act": "no"}, "desc_act: want bool"),
    (compressed({"format": "int-quantized"}), "format: want 'pack-quantized', found 'int-quantized'"),
    (compressed({"format": "marlin-24"}), "format: want 'pack-quantized'"),
    (compressed({"kv_cache_scheme": {"num_bits": 8}}), "kv_cache_scheme: want"),
    (compressed({"transform_config": {"config_groups": {"u": {}}}}), "transform_config: want"),
    (compressed({"sparsity_config": {"format": "sparse-24-bitmask"}}), r"sparsity_config\.format: want 'dense'"),
    (compressed({"config_groups": {}}), "config_groups: want a group"),
    (compressed({"ignore": ["re:("]}), "ignore: want regular expressions"),
    (compressed({"ignore": [3]}), "ignore: want names"),
    (compressed(None, {"input_activations": {"num_bits": 8}}), r"group_0\.input_activations: want"),
    (compressed(None, {"format": "nvfp4-pack-quantized"}), r"group_0\.format: want"),
    (compressed(num_bits=8), r"weights\.num_bits: want 4, found 8"),
    (compressed(type="float"), r"weights\.type: want 'int'"),
    (compressed(strategy="tensor"), r"weights\.strategy: want 'group' or 'channel'"),
    (compressed(strategy="channel"), r"weights\.group_size: want"),
    (compressed(actorder="random"), r"weights\.actorder: want"),
    (compressed(dynamic=True), r"weights\.dynamic: want"),
    ("awq", ": want dict"),
    ({"bits": 4}, "quant_method: want this field"),
]


@pytest.mark.parametrize(("config", "match"), REFUSED, ids=[f"{i}-{m[:24]}" for i, (_, m) in enumerate(REFUSED)])
def test_refused_by_name(config: Any, match: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^config\.json, quantization_config.*{match}"):
        taken(config)


def test_what_is_honoured() -> None:
    assert taken(AWQ).packing == AwqPacking(128, symmetric=False)
    assert taken({**AWQ, "zero_point": False, "group_size": -1}).packing == AwqPacking(-1, symmetric=True)
    packing = taken({**GPTQ, "desc_act": True, "sym": False, "checkpoint_format": "gptq_v2"}).packing
    assert packing == GptqPacking(128, False, True, ZeroPoints.AS_THEY_ARE)
    writers = {"quantizer": ["optimum:1.24.0", "gptqmodel:1.4.4"]}
    assert taken({**GPTQ, "meta": writers}).packing == GptqPacking(128, True, False, ZeroPoints.LESS_ONE_IN_WORDS)
    assert taken(GPTQ).packing == GptqPacking(128, True, False, ZeroPoints.LESS_ONE_EACH)


def test_groups_of_compressed_tensors_by_name_then_pattern_then_class() -> None:
    def group(targets: list[str], size: int) -> dict[str, Any]:
        return {"targets": targets, "weights": {**WEIGHTS, "group_size": size}}

    groups = {"a": group(["Linear"], 128), "b": group([r"re:.*\.v_proj"], 64), "c": group(["model.o_proj"], 32)}
    packing = taken(compressed({"config_groups": groups})).packing
    assert isinstance(packing, CompressedPacking)
    names = ("model.q_proj", "model.v_proj", "model.o_proj", "model.o_proj_2")
    assert [packing.schemes.of(name, "file").group_size for name in names] == [128, 64, 32, 128]


# As the tools write them, whole.
WRITTEN = [
    {
        **AWQ,
        "backend": "autoawq",
        "do_fuse": False,
        "exllama_config": None,
        "fuse_max_seq_len": None,
        "modules_to_fuse": None,
        "modules_to_not_convert": ["vision_tower"],
    },
    {
        **GPTQ,
        "damp_percent": 0.01,
        "desc_act": True,
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "checkpoint_format": "gptq",
    },
    {
        **GPTQ,
        "checkpoint_format": "gptq",
        "desc_act": False,
        "dynamic": {"-:.*vision.*": {}},
        "lm_head": False,
        "meta": {"damp_auto_increment": 0.0025, "damp_percent": 0.01, "quantizer": ["gptqmodel:1.8.0"]},
        "pack_dtype": "int32",
        "sym": True,
        "true_sequential": True,
    },
    compressed(
        {
            "global_compression_ratio": 1.9,
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "version": "0.12.2",
        },
        {"input_activations": None, "output_activations": None, "format": "pack-quantized"},
        actorder="weight",
        block_structure=None,
        dynamic=False,
        observer="minmax",
        observer_kwargs={},
        symmetric=True,
        scale_dtype=None,
        zp_dtype=None,
    ),
]


@pytest.mark.parametrize("config", WRITTEN, ids=["awq", "gptq", "gptqmodel", "llm-compressor"])
def test_configs_as_the_tools_write_them(config: dict[str, Any]) -> None:
    result = taken(config, model_type="llava")
    assert result.unused == ()
    assert result.fields.values == {"model_type": "llava"}


@pytest.mark.parametrize("config", [AWQ, GPTQ, compressed()], ids=["awq", "gptq", "compressed-tensors"])
def test_a_key_that_nothing_knows_of_is_reported(config: dict[str, Any]) -> None:
    assert taken({**config, "novel": 1}).unused == ("quantization_config.novel",)


def test_reported_by_the_checkpoint(make_packed: Any, edit_json: Any) -> None:
    packed = make_packed("awq")
    edit_json(packed.directory / "config.json", lambda values: values["quantization_config"].update(novel=1))
    assert open_checkpoint(packed.directory).unused_keys == ("quantization_config.novel",)


def test_a_key_below() -> None:
    assert taken(compressed(novel=1)).unused == ("quantization_config.config_groups.group_0.weights.novel",)


def test_beside_and_in_text_config() -> None:
    text = {"hidden_size": 64, "quantization_config": AWQ}
    result = taken(AWQ, text_config=text)
    assert result.packing == AwqPacking(128, symmetric=False)
    assert result.fields.values == {"text_config": {"hidden_size": 64}}
    with pytest.raises(CheckpointError, match=r"text_config\.quantization_config: want it absent, or equal"):
        taken(GPTQ, text_config=text)


def test_of_the_tower_alone_is_refused(make_llava: Any, edit_json: Any) -> None:
    saved = make_llava()
    edit_json(saved.directory / "config.json", lambda v: v["vision_config"].update(quantization_config=AWQ))
    with pytest.raises(CheckpointError, match=r"vision_config\.quantization_config: want it absent"):
        open_checkpoint(saved.directory)


def test_absent() -> None:
    result = take_packing(Fields({"model_type": "llava"}, "config.json"))
    assert result.packing is None
    assert result.unused == ()
