"""Checkpoint to bundle: reads LLaVA checkpoints and writes canonical ONNX graphs. The only room that imports torch."""
