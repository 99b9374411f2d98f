"""`hf-sparse export`: write a saved model for another inference runtime."""

from __future__ import annotations

import argparse

from ..options import add_model, add_revision, given
from ..verb import VERBS, Verb


@VERBS.register("export")
class Export(Verb):
    """Export a model."""

    summary = "export a saved model to another runtime and verify its outputs"
    example = "sparse --to onnx --output onnx"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_model(parser)
        parser.add_argument("--to", required=True, metavar="RUNTIME", help="onnx, openvino, executorch or torch")
        parser.add_argument("--output", metavar="DIR", help="output folder (DIR/RUNTIME)")
        parser.add_argument(
            "--batch", type=int, default=2, metavar="N", help="batch size to trace with; executorch: the maximum (2)"
        )
        parser.add_argument(
            "--length", type=int, metavar="N", help="sequence length to trace with; executorch: the maximum (128)"
        )
        parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the weights (as saved)")
        parser.add_argument("--opset", type=int, metavar="N", help="ONNX opset version (that of the exporter)")
        add_revision(parser)

    def run(self, options: argparse.Namespace) -> None:
        from ...hf.export.exporter import export

        keys = ("output", "revision", "dtype", "batch", "length", "opset")
        print(export(options.model, options.to, **given(options, *keys)))
