"""A module as one ONNX file that other runtimes read, with a free batch axis.

    size = export_onnx(cnn, pixels, "digits.onnx")              # bytes of the file

Needs the extra `remanence[onnx]`; running the file needs a runtime such as onnxruntime.

Axes: B batch, C classes or channels, H, W pixels.
"""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from remanence.errors import MissingExtra

__all__ = ["export_onnx"]


def export_onnx(module: nn.Module, example: Tensor, path: str | Path) -> int:
    """Write a module as ONNX: input `pixels` (B, C, H, W); output `logits`, or one output per key where it answers with a dict.

    Args:
        module: in eval mode, one tensor in, a tensor or a dict of tensors out, each with the batch axis first.
        example: pixels to trace it with, B at least 1; the file takes any B.

    Returns:
        Bytes of the file, which holds all weights.

    Raises:
        MissingExtra: onnx or onnxscript is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtra(f"{error.name} is not installed; pip install 'remanence[onnx]'.") from error
    if len(example) == 1:
        example = example.repeat(2, 1, 1, 1)  # an axis of length 1 would be taken for a constant
    with torch.no_grad():
        answer = module(example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's exporter calls what torch deprecates
        torch.onnx.export(
            module,
            (example,),
            str(path),
            input_names=["pixels"],
            output_names=list(answer) if isinstance(answer, dict) else ["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    return Path(path).stat().st_size
