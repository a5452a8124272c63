"""A GGUF model quantised again, by llama.cpp itself: python quantize_gguf.py IN.gguf OUT.gguf Q4_0"""

from __future__ import annotations

import argparse
import ctypes

import llama_cpp
from llamacpp_context import require


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("kind")
    given = parser.parse_args()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{given.kind}")
    params.allow_requantize = True
    code = llama_cpp.llama_model_quantize(given.source.encode(), given.target.encode(), ctypes.byref(params))
    require(code, "llama_model_quantize")


if __name__ == "__main__":
    main()
