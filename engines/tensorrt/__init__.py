"""Bundle to TensorRT engines, of the full TensorRT or of TensorRT for RTX: one builder for both."""
