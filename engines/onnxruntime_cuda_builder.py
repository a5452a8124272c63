"""Bundle to an engine for ONNX Runtime's CUDA provider: both graphs lowered, in float16 throughout.

It needs neither a GPU nor ONNX Runtime, and what it makes is for no GPU and no release in particular: ONNX Runtime
chooses its kernels when it loads a graph. Weights that no pass changes are the bundle's own files under a second name,
where the file system has hard links.
"""

from __future__ import annotations

from pathlib import Path

from llava_deploy.engines.engine_manifest import graphs_size, is_current, write_engine_manifest
from llava_deploy.engines.errors import OptionError, lacks_onnx_ir
from llava_deploy.engines.integrity import Integrity, check_files
from llava_deploy.engines.manifest import DECODER_GRAPH, VISION_GRAPH, read_manifest
from llava_deploy.engines.onnxruntime_cuda import cuda_key, cuda_refusal
from llava_deploy.engines.rewriting import link_or_copy
from llava_deploy.engines.staging import require_space, staged_directory, write_error


def build_onnxruntime_cuda(bundle: Path, *, replace: bool = False) -> Path:
    """Build the engine and return its directory; one that is there already, for the same graphs and whole, is kept.

    Args:
        bundle: a bundle's directory.
        replace: build it even so.

    Raises:
        BundleError: the bundle is damaged.
        OptionError: a bundle for which the provider's attention has no kernel: of float32, or of heads whose size is no
            multiple of 16.
        BackendError: onnx-ir is missing.
        LlavaDeployError: the bundle's directory cannot be written to, or its disk is full.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest.files, Integrity.FULL, remedy="export the bundle again")
    if (reason := cuda_refusal(manifest)) is not None:
        raise OptionError("backend", reason)
    key = cuda_key(manifest)
    output = bundle / key.directory
    if not replace and is_current(output, key):
        return output
    for name in (VISION_GRAPH, DECODER_GRAPH):
        manifest.entry(name)  # an archive may have been packed without them
    is_quantised = manifest.quantization is not None
    require_space(bundle, graphs_size(manifest) if is_quantised else 0)
    try:
        with staged_directory(output, replace=True) as staging:
            write_engine_manifest(staging, key, _lowered(bundle, staging, is_quantised=is_quantised))
    except OSError as error:
        raise write_error(output, error) from error
    return output


def _lowered(bundle: Path, staging: Path, *, is_quantised: bool) -> list[str]:
    """Both graphs with their weights; names of the files that were written."""
    try:
        from llava_deploy.engines.lowering.files import external_files, lower_file, lower_in_memory
        from llava_deploy.engines.lowering.onnxruntime_cuda import decoder_passes, vision_passes
    except ImportError as error:
        raise lacks_onnx_ir(error) from error
    files = []
    for name, passes in ((VISION_GRAPH, vision_passes()), (DECODER_GRAPH, decoder_passes())):
        if name == DECODER_GRAPH and is_quantised:  # products were put together: their weights are new
            lower_file(bundle / name, staging, passes)
            weights = [f"{name}.data"]
        else:
            (staging / name).write_bytes(lower_in_memory(bundle / name, passes))
            weights = external_files(bundle / name)
            for each in weights:
                link_or_copy(bundle / each, staging / each)
        files += [name, *weights]
    return files
