"""The command line: `hf-sparse --help` lists its commands."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import RecipeError, SparsityError
from .data_options import add_data, data_section
from .share import add_commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 for what the user can put right, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        command(options)
    except SparsityError as error:
        print(f"hf-sparse: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a folder that cannot be written, a full disk
        print(f"hf-sparse: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hf-sparse: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-sparse", description="Train, prune and look at sparse transformers.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="fine-tune the model of a recipe, sparse or dense, or run all its stages")
    train.add_argument("recipe", help="YAML file, see recipes/")
    train.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY.PATH=VALUE",
        help="change a value of the recipe, as in sparsity.groups.0.sparsity=0.97; may be repeated",
    )
    train.add_argument("--output", metavar="DIR", help="output folder; by default training.output_dir, or runs/RECIPE")
    train.add_argument(
        "--resume", action="store_true", help="go on from the last complete checkpoint in the output folder"
    )
    train.set_defaults(command=_train)

    teach = commands.add_parser("teach", help="write what a recipe's teacher says to every training example, once")
    teach.add_argument("recipe", help="YAML file with a distillation section")
    teach.add_argument("--output", metavar="DIR", help="folder for the cache; by default distillation.cache")
    teach.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32", help="of the logits on disk (fp32)")
    teach.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY.PATH=VALUE", help="as for train"
    )
    teach.set_defaults(command=_teach)

    prune = commands.add_parser("prune", help="remove weights of a model in one shot, without training")
    prune.add_argument("model", help="folder or Hub name")
    prune.add_argument("--output", required=True, metavar="DIR", help="folder for the pruned model")
    prune.add_argument("--sparsity", type=float, metavar="S", help="fraction of weights removed, as in 0.5")
    prune.add_argument("--scorer", type=_spec, help="how important a weight is (magnitude)")
    prune.add_argument("--pattern", type=_spec, help='which weights go together (element); "2:4" needs no --sparsity')
    prune.add_argument("--selection", type=_spec, help="compared with whom (uniform, global, threshold)")
    prune.add_argument("--targets", action="append", metavar="GLOB", help="names of layers; may be repeated")
    prune.add_argument("--exclude", action="append", metavar="GLOB", help="layers left dense; may be repeated")
    prune.add_argument("--revision", default="main", help="branch, tag or commit on the Hub")
    _add_data(prune, required=False)
    prune.set_defaults(command=_prune)

    compact = commands.add_parser("compact", help="cut removed heads, neurons and sub-blocks out of a saved model")
    compact.add_argument("model", help="folder or Hub name")
    compact.add_argument("--output", required=True, metavar="DIR", help="folder for the smaller model")
    compact.add_argument("--revision", default="main", help="branch, tag or commit on the Hub")
    compact.set_defaults(command=_compact)

    heads = commands.add_parser("heads", help="measure how important each attention head is for a task")
    heads.add_argument("model", help="folder or Hub name, with a head for the task")
    _add_data(heads, required=True)
    heads.add_argument("--plot", metavar="FILE", help="write a heatmap: png, pdf or svg")
    heads.add_argument("--json", action="store_true", help="print JSON instead of a table")
    heads.add_argument("--revision", default="main", help="branch, tag or commit on the Hub")
    heads.set_defaults(command=_heads)

    convert = commands.add_parser("convert", help="store a checkpoint in another way: packed, dense, in other shards")
    convert.add_argument("source", help="folder, or one safetensors file; dense, packed or compressed-tensors < 0.15")
    convert.add_argument("output", help="folder (or file) that is written")
    convert.add_argument("--format", default="packed", help="packed (default), smallest or dense")
    convert.add_argument("--codec", type=_spec, help="one codec for all weights, instead of the smallest of each")
    convert.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="of a file (2GB)")
    convert.set_defaults(command=_convert)

    inspect = commands.add_parser("inspect", help="show what a file holds, from the file alone")
    inspect.add_argument("path", help="safetensors file, or a folder with some")
    inspect.add_argument("--json", action="store_true", help="print JSON instead of a table")
    inspect.set_defaults(command=_inspect)

    export = commands.add_parser("export", help="write a saved model for another runtime, after comparing outputs")
    export.add_argument("model", metavar="DIR", help="folder or Hub name")
    export.add_argument("--to", required=True, metavar="RUNTIME", help="onnx, openvino, executorch or torch")
    export.add_argument("--output", metavar="DIR", help="output folder; by default DIR/RUNTIME")
    export.add_argument("--batch", type=int, default=2, metavar="N", help="rows to trace with; executorch: at most (2)")
    export.add_argument("--length", type=int, metavar="N", help="tokens to trace with; executorch: at most (128)")
    export.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the weights (as saved)")
    export.add_argument("--opset", type=int, metavar="N", help="version of the ONNX operators (that of the exporter)")
    export.add_argument("--revision", default="main", help="branch, tag or commit on the Hub")
    export.set_defaults(command=_export)

    add_commands(commands)
    return parser


def _add_data(parser: argparse.ArgumentParser, required: bool) -> None:
    use = "" if required else "; for scorers gradient, taylor and head_importance"
    add_data(
        parser,
        f"json, jsonl, csv, tsv or parquet{use}",
        required=required,
        label=", or the text to write",
        samples=512,
        texts="texts to measure on (512)",
    )
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="texts at once (16)")


def _spec(text: str) -> Any:
    """A part of a recipe on the command line: a name, or a YAML mapping as in '{name: block, rows: 32, cols: 32}'."""
    import yaml

    from ..utils.strict_yaml import parse_yaml

    try:
        return parse_yaml(text) if text.startswith("{") else text
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not YAML: {error}") from error


def _train(options: argparse.Namespace) -> None:
    from ..recipe.recipe import Recipe
    from ..recipe.stages import has_stages, load_stages, run_stages
    from ..recipe.train import run

    overrides = list(options.overrides)
    if options.output is not None:
        overrides.append(f"training.output_dir={json.dumps(options.output)}")
    if has_stages(options.recipe):
        result = run_stages(load_stages(options.recipe, overrides), resume=options.resume)
    else:
        result = run(Recipe.load(options.recipe, overrides), resume=options.resume)
    print(f"{result.summary}\n\nModel, metrics and report.md are in {result.output}")


def _teach(options: argparse.Namespace) -> None:
    from ..recipe.cache_teacher import teach
    from ..recipe.recipe import Recipe

    recipe = Recipe.load(options.recipe, options.overrides)
    output = options.output or (recipe.distillation.cache if recipe.distillation is not None else None)
    if output is None:
        raise RecipeError("there is no folder for the cache: give --output DIR, or distillation.cache in the recipe")
    count = teach(recipe, output, options.dtype)
    print(f"Logits for {count} examples are in {output}; train with distillation.cache={output}")


def _prune(options: argparse.Namespace) -> None:
    from ..recipe.prune import prune

    keys = ("sparsity", "scorer", "pattern", "selection", "targets", "exclude")
    group = {key: getattr(options, key) for key in keys if getattr(options, key) is not None}
    output = Path(options.output)
    if output.resolve() == Path(options.model).resolve():
        raise RecipeError(f"--output {output} is the folder of the dense model, which would be lost; choose another")
    section = data_section(options) if options.data is not None else None
    summary = prune(options.model, group, output, options.revision, section, options.batch)
    print(f"{summary}\n\nSaved in {output}")


def _compact(options: argparse.Namespace) -> None:
    from ..recipe.prune import compact_saved

    output = Path(options.output)
    if output.resolve() == Path(options.model).resolve():
        raise RecipeError(f"--output {output} is the folder of the model as it is, which would be lost; choose another")
    print(f"{compact_saved(options.model, output, revision=options.revision)}\n\nSaved in {output}")


def _heads(options: argparse.Namespace) -> None:
    from ..analysis.head_table import heads
    from ..reporting.plotting import check_picture

    if options.plot is not None:
        check_picture(options.plot)
    table = heads(options.model, data_section(options), options.batch, options.revision)
    print(json.dumps(table.to_dict(), indent=2) if options.json else table)
    if options.plot is not None:
        table.plot(options.plot)


def _convert(options: argparse.Namespace) -> None:
    from ..hf.quantization.convert import convert

    done = convert(options.source, options.output, options.format, options.codec, options.max_shard_size)
    print(f"{done}\n\nSaved in {options.output}")


def _inspect(options: argparse.Namespace) -> None:
    from ..formats.inspection import inspect

    inspection = inspect(options.path)
    print(json.dumps(inspection.to_dict(), indent=2) if options.json else inspection)


def _export(options: argparse.Namespace) -> None:
    from ..hf.export.exporter import export

    keys = ("output", "revision", "dtype", "batch", "length", "opset")
    print(export(options.model, options.to, **{key: getattr(options, key) for key in keys}))
