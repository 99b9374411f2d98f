"""A model in runtime form in a file: the same bits once it is mapped, one copy for all processes, what is refused."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_sparse import SparsityConfig, load_runtime, save_runtime, sparsify, to_dense_runtime, to_runtime
from hf_sparse.formats.aligned_file import FILLER
from hf_sparse.formats.model_folder import SINGLE as FILE
from hf_sparse.hf.embedding.wrapper import inner_model
from hf_sparse.kernels import KERNELS
from hf_sparse.modeling.class_swap import Swapped
from hf_sparse.profiling.timer import Run
from hf_sparse.runtime import SpeedTable, is_runtime
from hf_sparse.runtime.autotune import Measurement, Trial
from hf_sparse.runtime.packed_linear import PackedLinear
from tests.helpers import decoders, sentence, structures
from tests.helpers.kernels import all_present
from tests.helpers.runtime_models import answers, sparse, sparse_decoder


@pytest.fixture(autouse=True)
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    all_present(monkeypatch)


def parts(model: nn.Module) -> list[str]:
    """Return the class of every module, with what the runtime has made of it."""
    return [type(module).__name__ for module in model.modules()]


def mapped_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        for own, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and (
                own not in module._non_persistent_buffers_set or isinstance(module, PackedLinear)
            ):
                yield f"{name}.{own}", tensor


@pytest.mark.parametrize("backend", [name for name, kernel in KERNELS.backends.items() if kernel.device == "cpu"])
@pytest.mark.parametrize("family", ["bert", "t5-gated", "modernbert"])
def test_outputs_and_structure_are_those_after_to_runtime(family: str, backend: str, tmp_path: Path) -> None:
    model, inputs = sparse(family), structures.batch(family)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    to_runtime(model, backend)
    save_runtime(model, tmp_path)
    loaded = load_runtime(tmp_path)
    assert parts(loaded) == parts(model)
    assert torch.equal(answers(loaded, inputs), answers(model, inputs))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    to_dense_runtime(loaded)
    assert not any(isinstance(module, (Swapped, PackedLinear)) for module in loaded.modules())
    assert loaded.state_dict().keys() == dense.keys()
    assert all(torch.equal(value, dense[name]) for name, value in loaded.state_dict().items())
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_short_calls_compute_with_dense_weights_after_loading_too(tmp_path: Path) -> None:
    model, inputs = sparse("bert"), structures.batch("bert")
    dense = copy.deepcopy(model)

    def clock(trial: Trial, plain: Run, packed: Run) -> Measurement:
        return Measurement(1.0, 2.0, 0.5) if trial.tokens <= 9 else Measurement(1.0, 0.5, 2.0)

    to_runtime(model, "auto", table=SpeedTable(tmp_path / "times.json", clock))
    save_runtime(model, tmp_path / "saved")
    loaded = load_runtime(tmp_path / "saved")
    assert {module.dense_up_to for module in loaded.modules() if isinstance(module, PackedLinear)} == {14}
    short = {name: value[:1, :9] if value.dim() > 1 else value[:1] for name, value in inputs.items()}
    assert torch.equal(answers(loaded, short), answers(dense, short)), "the operations of the dense model"
    assert torch.equal(answers(loaded, inputs), answers(model, inputs))
    to_dense_runtime(loaded)
    state = dense.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("pattern", [{"name": "block", "rows": 4, "cols": 1}, "element"])
def test_zeros_with_a_sign_and_block_heights_are_kept(pattern: Any, tmp_path: Path) -> None:
    model = sparse("bert", pattern=pattern)
    layer = model.bert.encoder.layer[0].attention.output.dense
    with torch.no_grad():
        layer.weight[layer.weight == 0] = -0.0
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    report = to_runtime(model, "cpu")
    save_runtime(model, tmp_path)
    loaded = load_runtime(tmp_path)
    rows = [module.rows for module in loaded.modules() if isinstance(module, PackedLinear)]
    assert rows == [module.rows for module in model.modules() if isinstance(module, PackedLinear)]
    assert (4 in rows) == (pattern != "element")
    assert len(report.sparse) == len(rows)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value.view(torch.int32), wanted[name].view(torch.int32)), name


@pytest.mark.parametrize("backend", ["bitmask", "bitmask-int8"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-neox"])
def test_decoders_generate_the_same_with_the_copy_of_the_lm_head(family: str, backend: str, tmp_path: Path) -> None:
    model = sparse_decoder(family)
    to_runtime(model, backend)
    save_runtime(model, tmp_path)
    loaded = load_runtime(tmp_path)
    assert parts(loaded) == parts(model)
    head = loaded.get_output_embeddings()
    if (copied := getattr(model.get_output_embeddings(), "few_token_copy", None)) is not None:
        assert head.few_token_copy[0] == copied[0]
        assert head.few_token_stamp.fits(head.weight)
    inputs = decoders.batch()
    assert torch.equal(answers(loaded, inputs), answers(model, inputs))
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (loaded.get_input_embeddings().weight is head.weight) == tied


def test_everything_is_mapped_aligned_and_nothing_is_copied(tmp_path: Path) -> None:
    if not Path("/proc/self/smaps").is_file():
        pytest.skip("needs /proc/self/smaps of Linux")
    model = sparse("bert")
    to_runtime(model, "cpu")
    save_runtime(model, tmp_path)
    loaded, inputs = load_runtime(tmp_path), structures.batch("bert")
    answers(loaded, inputs)
    regions = list(mappings(tmp_path / FILE))
    inside = [(start, end) for start, end, _ in regions]
    for name, tensor in mapped_tensors(loaded):
        address = tensor.data_ptr()
        assert tensor.numel() == 0 or any(start <= address < end for start, end in inside), name
        assert address % 64 == 0, name
    assert all(sizes["Anonymous"] == 0 for _, _, sizes in regions), "a page was copied for this process alone"
    with torch.no_grad():
        loaded.classifier.bias.add_(1.0)  # by the process that does so, for itself
    assert not torch.equal(load_runtime(tmp_path).classifier.bias, loaded.classifier.bias)


def mappings(path: Path) -> Iterator[tuple[int, int, dict[str, int]]]:
    """Yield begin, end and sizes in kB of each mapping of a file in this process."""
    entry = re.compile(r"([0-9a-f]+)-([0-9a-f]+) .* (/\S+)\n((?:\w+: .*\n)+)")
    for found in entry.finditer(Path("/proc/self/smaps").read_text(encoding="utf-8")):
        if found[3] == str(path):
            sizes = {key: int(value) for key, value in re.findall(r"(\w+): +(\d+) kB", found[4])}
            yield int(found[1], 16), int(found[2], 16), sizes


_SECOND = """
import sys, torch, hf_sparse
model = hf_sparse.load_runtime(sys.argv[1])
with torch.inference_mode():
    model(input_ids=torch.ones(1, 20, dtype=torch.long))
print("ready", flush=True)
sys.stdin.read()
"""


def test_processes_share_one_copy(tmp_path: Path) -> None:
    if not Path("/proc/self/smaps").is_file():
        pytest.skip("needs /proc/self/smaps of Linux")
    model = sparse("bert", hidden_size=128, intermediate_size=512)
    to_runtime(model, "cpu")
    save_runtime(model, tmp_path)
    second = subprocess.Popen(
        [sys.executable, "-c", _SECOND, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert second.stdout is not None
        assert second.stdout.readline() == "ready\n"
        loaded = load_runtime(tmp_path)
        answers(loaded, structures.batch("bert"))
        (sizes,) = (sizes for _, _, sizes in mappings(tmp_path / FILE))
    finally:
        second.communicate("")
    assert sizes["Rss"] >= (tmp_path / FILE).stat().st_size // 1024 - 8  # the checksums have read all of it
    assert sizes["Pss"] <= sizes["Rss"] * 0.55, sizes
    assert sizes["Anonymous"] == 0


def test_compacted_model_loads_with_what_is_left(tmp_path: Path) -> None:
    from hf_sparse import compact

    model = structures.build("bert")
    with torch.no_grad():
        block = model.bert.encoder.layer[0]
        block.intermediate.dense.weight[:5] = 0
        block.intermediate.dense.bias[:5] = 0
        block.output.dense.weight[:, :5] = 0
    sparsify(model, SparsityConfig(sparsity=0.5))
    compact(model)
    model.eval()
    assert model.bert.encoder.layer[0].intermediate.dense.out_features <= 7
    to_runtime(model, "cpu")
    save_runtime(model, tmp_path)
    inputs = structures.batch("bert")
    assert torch.equal(answers(load_runtime(tmp_path), inputs), answers(model, inputs))


def test_from_pretrained_saves_packed_again(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model, inputs = sparse("bert"), structures.batch("bert")
    wanted = answers(model, inputs)
    to_runtime(model, "cpu")
    save_runtime(model, tmp_path / "runtime")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "runtime")
    assert is_runtime(loaded)
    loaded.save_pretrained(tmp_path / "packed")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")
    assert not is_runtime(again)
    assert torch.equal(answers(again, inputs), wanted)
    again.train()
    again(**inputs).loss.backward()
    weight = again.bert.encoder.layer[0].output.dense.weight
    assert not weight.grad[weight == 0].any()


@pytest.mark.parametrize("kind", ["sentence", "cross"])
def test_models_of_sentence_transformers(kind: str, tmp_path: Path) -> None:
    model = sentence.sentence_transformer(tmp_path) if kind == "sentence" else sentence.cross_encoder(tmp_path)
    sparsify(model, SparsityConfig(sparsity=0.8))
    model.eval()
    to_runtime(model, "cpu")
    save_runtime(model, tmp_path / "runtime")
    loaded = load_runtime(tmp_path / "runtime")
    assert type(loaded) is type(model)
    assert is_runtime(loaded)
    texts = sentence.TEXTS[:4]
    if kind == "sentence":
        assert torch.equal(loaded.encode(texts, convert_to_tensor=True), model.encode(texts, convert_to_tensor=True))
    else:
        pairs = list(zip(texts, texts[::-1], strict=True))
        assert (loaded.predict(pairs) == model.predict(pairs)).all()
    assert vars(inner_model(model))["save_pretrained"].func.__name__ == "_save_pretrained"  # as it was before


def test_tensors_begin_at_multiples_of_a_cache_line(tmp_path: Path) -> None:
    model = sparse("bert")
    to_runtime(model, "cpu")
    save_runtime(model, tmp_path)
    with (tmp_path / FILE).open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    assert (8 + size) % 64 == 0
    starts = [entry["data_offsets"][0] for key, entry in header.items() if not key.startswith(("__", FILLER))]
    assert all(start % 64 == 0 for start in starts)
