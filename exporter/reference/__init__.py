"""The PyTorch classes that every graph and the NumPy splice are checked against."""

from llava_deploy.exporter.reference.llava_llama import LlavaLlamaConfig, LlavaLlamaForCausalLM, LlavaLlamaModel
from llava_deploy.exporter.reference.meta import LlavaMetaForCausalLM, LlavaMetaModel
from llava_deploy.exporter.reference.vision_tower import CLIPVisionTower
from llava_deploy.exporter.reference.weights import from_checkpoint, save_hf, save_original

__all__ = [
    "CLIPVisionTower",
    "LlavaLlamaConfig",
    "LlavaLlamaForCausalLM",
    "LlavaLlamaModel",
    "LlavaMetaForCausalLM",
    "LlavaMetaModel",
    "from_checkpoint",
    "save_hf",
    "save_original",
]
