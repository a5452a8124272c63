"""TensorRT sessions, for the full TensorRT and for TensorRT for RTX: device memory and streams through cuda-python.

:class:`~llava_deploy.runtime.tensorrt.cuda.Device` is the GPU with its one stream; ``plans.open_plans`` makes an
:class:`~llava_deploy.runtime.tensorrt.engine.Engine` of a plan; ``vision`` and ``decoder`` (``growing``) are the
sessions of :mod:`llava_deploy.runtime.backend` over them. All work is queued on one stream, in order, and the host
waits for it once a step: for the logits.
"""
