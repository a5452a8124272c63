"""What is built of a bundle: the parts of the decoder, one after the other, and the tower."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import accumulate

from llava_deploy.engines.contract import GraphSpec
from llava_deploy.engines.decoder_parts import layer_ranges, part_spec
from llava_deploy.engines.engine_manifest import VISION_PLAN, decoder_plans
from llava_deploy.engines.errors import BundleError
from llava_deploy.engines.manifest import DECODER_GRAPH, VISION_GRAPH, Manifest
from llava_deploy.engines.planner.model import PlannedModel
from llava_deploy.engines.planner.parts import part_weights, quantized_weights
from llava_deploy.engines.tensorrt.checks import with_sizes
from llava_deploy.engines.tensorrt.profiles import Profile, decoder_profiles, decoder_spec, vision_profiles
from llava_deploy.engines.tensorrt_recipe import TensorRtRecipe

WHOLE = 1000
"""Of a build's progress."""


@dataclass(frozen=True)
class EngineGraph:
    """One graph that becomes one plan.

    Attributes:
        source: its file in the bundle.
        layers: those of the decoder that are taken of it; ``None`` of the tower.
        plan: its file in the engine's directory.
        spec: its contract, with fixed sizes where the lowered graph has them.
        profiles: what may be bound, and what kernels are chosen for.
        quantized: how many of its matrices have 4 bits, how many 8.
        begins: the part of the whole build that is done before it, of :data:`WHOLE`.
        ends: likewise, after it.
    """

    source: str
    layers: range | None
    plan: str
    spec: GraphSpec
    profiles: list[Profile]
    quantized: Counter[int]
    begins: int
    ends: int

    @property
    def title(self) -> str:
        """For messages: the file, and what of it where that is not all."""
        _, _, part = self.spec.name.partition(", ")
        return f"{self.source}, {part}" if part else self.source


def engine_graphs(manifest: Manifest, model: PlannedModel, recipe: TensorRtRecipe) -> list[EngineGraph]:
    """The decoder's first: the tower, which is smaller, finds what they have left in memory.

    Raises:
        BundleError: the decoder holds more or fewer quantised weights than the manifest says.
    """
    limits, cache = recipe.limits, recipe.cache
    in_manifest = 0 if manifest.quantization is None else manifest.quantization.weights
    in_graph = len(model.decoder_weights.quantized)
    if in_graph != in_manifest:
        raise BundleError(
            f"{DECODER_GRAPH}: want {in_manifest} quantised weights, as its manifest says, found {in_graph}; "
            "export the bundle again"
        )
    parts = layer_ranges(recipe.parts)
    weights = [part_weights(model, layers) for layers in parts]
    done = [*accumulate((each.nbytes for each in (*weights, model.vision_weights)), initial=0)]
    places = [WHOLE * size // max(1, done[-1]) for size in done]
    sizes = {"max_len": limits.max_len} if cache == "in-place" else {}
    whole = with_sizes(decoder_spec(manifest.decoder, limits, cache), sizes)
    graphs = []
    for i, (layers, plan) in enumerate(zip(parts, decoder_plans(recipe), strict=True)):
        spec = part_spec(whole, manifest.decoder, layers)
        profiles, quantized = decoder_profiles(spec, limits, cache), quantized_weights(weights[i])
        graphs.append(EngineGraph(DECODER_GRAPH, layers, plan, spec, profiles, quantized, places[i], places[i + 1]))
    vision = manifest.vision.spec(limits.max_images)
    profiles = vision_profiles(vision, limits)
    return [*graphs, EngineGraph(VISION_GRAPH, None, VISION_PLAN, vision, profiles, Counter(), places[-2], WHOLE)]
