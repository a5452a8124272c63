"""Bundle to answer: preprocessing, splice, sessions, KV cache, sampling and chat. Never imports torch, transformers or onnx."""
