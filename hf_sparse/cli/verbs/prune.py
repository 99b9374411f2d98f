"""`hf-sparse prune`: one-shot pruning of a saved model."""

from __future__ import annotations

import argparse
from typing import Any

from ...errors import RecipeError
from ..data_options import add_data, data_section
from ..options import add_model, add_revision, given, glob, name_or_mapping, separate_output, spec
from ..verb import VERBS, Verb

GROUP = ("sparsity", "scorer", "pattern", "selection", "targets", "exclude", "reconstruction", "compress")
"""Options that are keys of the sparsity section."""
EXAMPLES = 512


@VERBS.register("prune")
class Prune(Verb):
    """Prune in one shot."""

    summary = "prune a model in one shot, without training"
    example = "models/bert --sparsity 0.5 --output sparse"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_model(parser, "folder for the pruned model")
        parser.add_argument(
            "--sparsity", type=float, metavar="S", help="fraction of weights that are pruned, as in 0.5"
        )
        parser.add_argument("--scorer", type=spec, help="importance of a weight (magnitude)")
        parser.add_argument(
            "--pattern", type=spec, help='weights pruned together (element); "2:4" needs no --sparsity; "4x1": blocks'
        )
        parser.add_argument("--selection", type=spec, help="which weights compete (uniform, per_row, global, owl, ...)")
        parser.add_argument("--reconstruction", type=spec, help="how the kept weights make up for the others (cg)")
        parser.add_argument(
            "--compress",
            type=spec,
            help="another form of the layers: {name: low_rank, rank: 16} or {name: hashed, ratio: 1/8}",
        )
        names: dict[str, Any] = {"action": "append", "type": glob, "metavar": "GLOB"}
        parser.add_argument("--targets", **names, help="names of layers; may be repeated")
        parser.add_argument("--exclude", **names, help="layers kept dense; may be repeated")
        add_revision(parser)
        purpose = "examples for the scorers wanda, sparsegpt, gradient, taylor and head_importance"
        add_data(parser, purpose, required=False, samples=None, batch=True, plain=True)
        parser.add_argument("--seed", type=int, default=0, help="of the places where sequences of text begin (0)")
        parser.add_argument(
            "--bos", choices=("auto", "always", "never"), default="auto", help="BOS before each sequence of text (auto)"
        )

        parser.add_argument(
            "--device-map",
            type=_devices,
            metavar="MAP",
            help="prune from file to file with one block in memory, calibrated on auto, cpu, cuda:1, or by a mapping "
            "from modules to devices: '{model.layers: 0, \"\": cpu}'",
        )

    def run(self, options: argparse.Namespace) -> None:
        from ...recipe.prune import SEQUENCES, CalibrationText, prune, prune_files

        group = {key: value for key, value in given(options, *GROUP).items() if value is not None}
        output = separate_output(options.model, options.output)
        section = text = None
        columns = [f"--{key}" for key in ("text", "label") if getattr(options, key) is not None]
        if options.data is None and columns:
            raise RecipeError(f"{columns[0]} names a column of the examples, and there are none: give --data FILE too")
        if options.data is not None:
            named: dict[str, Any] = {"column": options.text[0]} if options.text else {}
            text = CalibrationText(
                options.data,
                samples=SEQUENCES if options.samples is None else options.samples,
                **given(options, "length", "seed", "bos"),
                **named,
                unread=_unread_in_text(options),
            )
            if text.plain and columns:
                raise RecipeError(
                    f"{' and '.join(columns)} would name columns of a file of examples, and {options.data} is plain "
                    "text, which has none: leave out what names them"
                )
            options.samples = EXAMPLES if options.samples is None else options.samples
            section = data_section(options)
        if options.device_map is not None:
            summary: object = prune_files(
                options.model, group, output, options.device_map, options.revision, section, options.batch, text
            )
        else:
            summary = prune(options.model, group, output, options.revision, section, options.batch, text)
        print(f"{summary}\n\nSaved in {output}")


def _unread_in_text(options: argparse.Namespace) -> list[str]:
    """Return the options for columns that are not read where one column is a text, without labels."""
    second = ["the second --text"] if len(options.text or ()) > 1 else []
    return second + (["--label"] if options.label is not None else [])


def _devices(text: str) -> Any:
    """Return a device map: a number is that of an accelerator."""
    wanted = "auto, a device as in cpu or cuda:1, or a mapping as in '{model.layers: 0, \"\": cpu}'"
    return int(text) if text.isdecimal() else name_or_mapping(text, wanted)
