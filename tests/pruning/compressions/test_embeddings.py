"""Embeddings in another form: low rank and hashed, tied to an LM head, scaled, saved, loaded and trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertForMaskedLM,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from hf_sparse import RecipeError, SparsityCallback, SparsityError, sparsify
from hf_sparse.modeling.forms import HashedEmbedding, LowRankEmbedding, LowRankLinear
from hf_sparse.pruning.compressions import LowRank
from hf_sparse.pruning.compressions.saved_forms import forms_of
from tests.helpers.tiny import config

LOW_RANK = {"name": "low_rank", "rank": 6, "weighted": False}
HASHED = {"name": "hashed", "ratio": 0.5}
IDS = torch.tensor([[5, 6, 7, 8, 9, 3]])


def llama(**changes: Any) -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    kind = LlamaConfig(vocab_size=40, num_key_value_heads=2, **sizes, **{"tie_word_embeddings": True, **changes})
    return LlamaForCausalLM(kind).eval()


def gemma() -> Any:
    return Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )).eval()  # fmt: skip


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32,
                                      bos_token_id=1, eos_token_id=2)).eval()  # fmt: skip


def t5(kind: Any = T5Config, build: Any = T5ForConditionalGeneration) -> Any:
    return build(kind(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0,
                      tie_word_embeddings=True)).eval()  # fmt: skip


def bart() -> Any:
    return AutoModelForSeq2SeqLM.from_config(BartConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, scale_embedding=True,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32,
    )).eval()  # fmt: skip


def bert() -> Any:
    return BertForMaskedLM(config()).eval()


TIED = {"bert": bert, "llama": llama, "gemma": gemma, "gpt2": gpt2, "t5": t5, "bart": bart}
TARGETS = {"bert": "*word_embeddings", "llama": "*embed_tokens", "gemma": "*embed_tokens", "gpt2": "transformer.wte",
           "t5": "shared", "bart": "model.shared"}  # fmt: skip


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    found: torch.Tensor = model.eval()(input_ids=IDS, **more).logits
    return found


def with_table(model: Any, table: torch.Tensor) -> Any:
    """Put a matrix in the place of the embeddings and what is tied to them."""
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(table)
    return model


@pytest.mark.parametrize("compress", [LOW_RANK, HASHED], ids=["low_rank", "hashed"])
@pytest.mark.parametrize("family", TIED)
def test_tied_embeddings_share_their_parts_and_load_exactly(family: str, compress: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, plain = TIED[family](), TIED[family]()
    plain.load_state_dict(model.state_dict())
    before = sum(p.numel() for p in model.parameters())
    sparsify(model, {"targets": [TARGETS[family]], "compress": compress})
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    part = "up" if compress is LOW_RANK else "buckets"
    assert getattr(table, part) is getattr(head, part)
    assert sum(p.numel() for p in model.parameters()) < before
    # The same as the plain model with the matrix that the form stands for; of hashed tables, padding is zero.
    matrix = table.weight.detach().clone()
    with_table(plain, matrix)
    torch.testing.assert_close(outputs(model), outputs(plain), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "one")
    loaded = type(model).from_pretrained(tmp_path / "one")
    assert forms_of(loaded) == forms_of(model)
    assert getattr(loaded.get_input_embeddings(), part) is getattr(loaded.get_output_embeddings(), part)
    assert torch.equal(outputs(loaded), outputs(model))
    loaded.tie_weights()
    assert torch.equal(outputs(loaded), outputs(model))
    loaded.save_pretrained(tmp_path / "two")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_the_whole_table_at_full_rank_is_exact() -> None:
    torch.manual_seed(0)
    model = gemma()
    before = outputs(model)
    sparsify(model, {"targets": "*embed*", "compress": {**LOW_RANK, "rank": 16}})
    assert isinstance(model.lm_head, LowRankLinear)
    torch.testing.assert_close(outputs(model), before, rtol=1e-4, atol=1e-5)


def test_by_hand_frequent_tokens_decide() -> None:
    # Two tokens in two directions; the smaller one occurs a hundred times as often.
    table, counts = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, 100.0])
    down, up = LowRank(rank=1, damping=0.0).fit_table(table, counts)
    torch.testing.assert_close(up @ down, torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    down, up = LowRank(rank=1).fit_table(table, None)
    torch.testing.assert_close(up @ down, torch.tensor([[3.0, 0.0], [0.0, 0.0]]))


def test_no_other_product_of_the_rank_is_nearer_on_the_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(20, 6, generator=generator).double()
    counts = torch.randint(0, 50, (20,), generator=generator).double()
    down, up = LowRank(rank=2, damping=0.0).fit_table(table, counts)

    def error(up: torch.Tensor, down: torch.Tensor) -> float:
        return float((counts[:, None] * (table - up @ down).square()).sum())

    best = error(up, down)
    values = torch.linalg.svdvals(counts.sqrt()[:, None] * table)
    assert best == pytest.approx(float(values[2:].square().sum()))
    for _ in range(100):
        change_up, change_down = (1e-2 * torch.randn(part.shape, generator=generator) for part in (up, down))
        assert error(up + change_up, down + change_down) >= best


@torch.no_grad()
def test_fitted_to_the_tokens_of_batches_without_padding() -> None:
    torch.manual_seed(0)
    model, other = llama(), llama()
    other.load_state_dict(model.state_dict())
    table = model.get_input_embeddings().weight.clone()
    ids, mask = torch.tensor([[5, 6, 5, 5, 2]]), torch.tensor([[1, 1, 1, 1, 0]])
    rank = {"targets": "*embed*", "compress": {"name": "low_rank", "rank": 2, "damping": 0.0}}
    seen: list[Any] = []
    sparsify(model, rank, [{"input_ids": ids, "attention_mask": mask}], on_layer=seen.append)
    # Two tokens were seen, so two directions give them exactly; the padding was not fitted to.
    found = model.get_input_embeddings().weight
    torch.testing.assert_close(found[[5, 6]], table[[5, 6]], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[2], table[2], atol=1e-3)
    assert (seen[0].name, round(seen[0].error, 6)) == ("model.embed_tokens", 0.0)
    assert 0 < seen[0].change < 1
    longer = {"input_ids": torch.tensor([[5, 6] * 9])}
    runs: list[int] = []
    counted: list[Any] = []
    model = llama()
    model.lm_head.register_forward_pre_hook(lambda *_: runs.append(1))
    sparsify(model, rank, [longer, longer, longer], on_layer=counted.append)
    assert (len(runs), len(counted)) == (1, 1)  # one whole run; then it stops behind the look-up
    both = {"groups": [rank, {"targets": "*mlp*", "sparsity": 0.5, "scorer": "wanda"}]}
    sparsify(other, both, [{"input_ids": ids, "attention_mask": mask}])
    assert torch.equal(other.get_input_embeddings().weight, found)
    assert int((other.model.layers[0].mlp.up_proj.weight == 0).sum()) == 128


def test_a_pruned_and_an_untied_model(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=False)
    sparsify(model, {"groups": [{"targets": "*embed*", "compress": LOW_RANK}, {"targets": "*mlp*", "sparsity": 0.5}]})
    assert isinstance(model.lm_head, nn.Linear)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded.get_input_embeddings(), LowRankEmbedding)
    assert torch.equal(outputs(loaded), outputs(model))


def test_trains_resumes_and_generates(tmp_path: Path) -> None:
    rows: Any = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8

    def run(steps: int, checkpoint: str | None = None) -> Any:
        torch.manual_seed(0)
        model = llama()
        args = TrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=steps, save_steps=2, learning_rate=1e-2, use_cpu=True,
            report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        callbacks: Any = [SparsityCallback({"targets": "*embed*", "compress": LOW_RANK})]
        trainer = Trainer(model=model, args=args, train_dataset=rows, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=checkpoint)
        return model

    model = run(4)
    assert model.get_input_embeddings().up is model.lm_head.up
    again = run(4, str(tmp_path / "run/checkpoint-2"))
    assert torch.equal(outputs(again), outputs(model))
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint-4")
    made = [each.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0) for each in (model.eval(), loaded)]
    assert torch.equal(*made)


def test_base_model_of_a_file_with_a_head(tmp_path: Path) -> None:
    model = sparsify(bert(), {"targets": "*word_embeddings", "compress": LOW_RANK})
    model.save_pretrained(tmp_path)
    base = BertModel.from_pretrained(tmp_path)
    assert isinstance(base.get_input_embeddings(), LowRankEmbedding)
    with torch.no_grad():
        expected = model.bert(IDS).last_hidden_state
        assert torch.equal(base.eval()(IDS).last_hidden_state, expected)


class Normed(nn.Embedding):
    """Computes something that no form of ours does."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(super().forward(ids), dim=-1)


@pytest.mark.parametrize("compress", [LOW_RANK, HASHED], ids=["low_rank", "hashed"])
def test_embeddings_that_compute_more_are_refused(compress: Any) -> None:
    for table in (Normed(8, 8), nn.Embedding(8, 8, max_norm=1.0)):
        model = nn.ModuleDict({"embed": table})
        with pytest.raises(RecipeError, match=r"'embed'.*exclude it"):
            sparsify(model, {"targets": "embed", "compress": compress})


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(RecipeError, match="at most the smaller side"):
        sparsify(llama(), {"targets": "*embed*", "compress": {**LOW_RANK, "rank": 17}})
    with pytest.raises(RecipeError, match="leave `sparsity` out"):
        sparsify(llama(), {"targets": "*embed*", "sparsity": 0.5, "compress": LOW_RANK}, [{"input_ids": IDS}])
    with pytest.raises(RecipeError, match="fitted to the inputs"):
        sparsify(llama(), {"targets": "*embed*", "compress": {"name": "low_rank", "rank": 2}})
    states = torch.ones(1, 2, 16)
    with pytest.raises(SparsityError, match="took no part"):
        sparsify(
            llama(), {"targets": "*embed*", "compress": {"name": "low_rank", "rank": 2}}, [{"inputs_embeds": states}]
        )
    model = sparsify(llama(), {"targets": "*embed*", "compress": HASHED})
    assert isinstance(model.get_input_embeddings(), HashedEmbedding)
