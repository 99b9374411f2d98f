from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification

import hf_sparse
from hf_sparse import CheckpointError, SparsityConfig
from hf_sparse.analysis.results import read_results
from hf_sparse.cli.main import main
from hf_sparse.formats.inspection import inspect
from hf_sparse.hf.hub.model_card import CardFacts, card_text, facts_of
from hf_sparse.profiling.speed_record import SPEED, Speed
from tests.helpers.ranks import ROOT
from tests.helpers.speeds import speed_file
from tests.helpers.tiny import save_bert

EVIL = "x\n---\nlicense: mit\n# Owned | <script>alert(1)</script> [a](http://b) `c` ``` \"' {y: &z"


@pytest.fixture
def saved(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(save_bert(tmp_path / "dense", head=True))
    hf_sparse.sparsify(model, SparsityConfig(sparsity=0.75))
    model.save_pretrained(tmp_path / "small")
    recipe = {"model": {"name": "org/base"}, "data": {"name": "glue", "config": "sst2"}, "sparsity": {"sparsity": 0.75}}
    (tmp_path / "small" / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    for name, accuracy in (("small", 0.8125), ("dense", 0.875)):
        text = json.dumps({"eval_accuracy": accuracy, "eval_runtime": 3.0, "epoch": 1.0})
        (tmp_path / name / "eval_results.json").write_text(text, encoding="utf-8")
    return tmp_path / "small"


def test_card_says_what_the_files_say(saved, tmp_path):
    assert main(["card", str(saved), "--against", str(tmp_path / "dense"), "--license", "apache-2.0"]) == 0
    card = ModelCard.load(saved / "README.md")
    assert card.data.base_model == "org/base"
    assert card.data.datasets == ["glue"]
    assert card.data.license == "apache-2.0"
    assert card.data.tags == ["hf_sparse", "sparse", "pruning"]
    [result] = card.data.eval_results
    assert (result.task_type, result.metric_type, result.metric_value) == ("text-classification", "accuracy", 0.8125)
    assert "| accuracy | 0.8750 | 0.8125 |" in card.text
    assert "| bert.encoder.layer.\\*.attention.self.query.weight | 2,048 | 75.00% |" in card.text
    assert inspect(saved).size_line() in card.text
    assert "## Speed\n\nNot measured." in card.text
    load = card.text.index("import hf_sparse")
    assert load < card.text.index("from transformers import AutoModelForSequenceClassification")
    assert "  sparsity: 0.75" in card.text


def test_card_is_what_the_hub_validates(saved, hub):
    ModelCard(card_text(facts_of(saved))).validate()
    assert hub.count("/api/validate-yaml") == 1
    with pytest.raises(ValueError, match="license"):
        ModelCard("---\nlicense: [3]\n---\n").validate()


def test_speed_is_told_with_all_that_it_depends_on(saved):
    (saved / SPEED).write_text(json.dumps(speed_file()), encoding="utf-8")
    text = card_text(facts_of(saved))
    for row in (
        "dense | 8.00 ms \\[8.00, 8.00\\]", "this model | 4.00 ms \\[3.90, 4.10\\]", "machine | Box 9", "threads | 2",
        "gain | 2.00x as fast \\[1.80, 2.20\\]", "dtype | float32", "batch | 8", "length | 64", "against | dense",
        "in memory | 2.0 MB, dense 4.0 MB",
    ):  # fmt: skip
        assert f"| {row} |" in text
    assert "no speed-up" in card_text(CardFacts("a", speed=Speed.from_dict(speed_file(gain=1.01))))
    (saved / SPEED).write_text("[]", encoding="utf-8")
    with pytest.raises(CheckpointError, match="is not what `hf-sparse bench` writes"):
        facts_of(saved)


def test_text_from_files_stays_text():
    facts = CardFacts(
        EVIL, base_model=EVIL, data=EVIL, dataset=EVIL, metrics={EVIL: 0.5}, groups=[(EVIL, 1, 0.5)], recipe=EVIL,
        speed=Speed.from_dict(speed_file(machine=EVIL)), architecture=EVIL, note=EVIL,
    )  # fmt: skip
    card = ModelCard(card_text(facts))
    assert card.data.to_dict().keys() == {"library_name", "tags", "model-index"}
    outside = card.text.replace(f"````yaml\n{EVIL}\n````", "")
    assert outside != card.text
    assert "<script" not in outside
    assert not re.search(r"(?<!\\)\]\(", outside)
    assert not any(line.startswith(("license:", "# Owned")) for line in outside.splitlines())
    rows = [line for line in outside.splitlines() if line.startswith("| x ")]
    assert rows
    assert all(row.replace("\\|", "").count("|") == 4 for row in rows)


def test_text_from_files_is_not_a_template():
    evil = "{{ 7 * 7 }} {% if x %} {# note #}"
    text = card_text(CardFacts(evil, note=evil, data=evil, recipe=evil, metrics={evil: 0.5}))
    assert f"```yaml\n{evil}\n```" in text
    assert "49" not in text
    assert text.count("7 \\* 7") == 4


def test_text_from_files_cannot_command_the_terminal_that_shows_the_card():
    text = card_text(CardFacts("a\x1b[2J", note="\x9b", data="\u202e", groups=[("\x07", 1, 0.5)]))
    assert all(character.isprintable() or character == "\n" for character in text)


def test_dense_model_is_not_called_pruned(tmp_path):
    text = card_text(facts_of(save_bert(tmp_path / "dense", head=True)))
    assert "nothing was pruned" in text
    assert "pruning" not in ModelCard(text).data.to_dict()["tags"]


def test_folder_without_model_or_with_a_recipe_that_is_none_is_refused(saved, capsys):
    (saved / "recipe.yaml").write_text("- a\n", encoding="utf-8")
    assert main(["card", str(saved)]) == 2
    assert "must be a mapping with the sections" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="no file or folder"):
        facts_of(saved / "nothing")
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        facts_of(saved)


def test_card_of_a_compacted_model_says_what_is_left_and_what_was_measured_before(saved, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    groups = [{"pattern": "head", "sparsity": 0.5}, {"pattern": "neuron", "sparsity": 0.25}]
    hf_sparse.sparsify(model, SparsityConfig(groups=groups)).save_pretrained(saved)
    assert main(["compact", str(saved), "--output", str(tmp_path / "compact")]) == 0
    assert main(["card", str(tmp_path / "compact"), "--against", str(tmp_path / "dense")]) == 0
    card = ModelCard.load(tmp_path / "compact" / "README.md")
    assert "Compaction kept 4 of 8 heads and 96 of 128 neurons" in card.text
    assert "Metrics were measured before compaction" in card.text
    assert "| accuracy | 0.8750 | 0.8125 |" in card.text
    assert card.data.base_model == "org/base"
    (tmp_path / "compact" / "eval_results.json").write_text(json.dumps({"eval_accuracy": 0.5}), encoding="utf-8")
    assert "before compaction" not in card_text(facts_of(tmp_path / "compact"))  # trained on, and measured anew


def test_card_that_somebody_wrote_or_edited_is_kept(saved, capsys):
    path = saved / "README.md"
    assert main(["card", str(saved)]) == 0
    ours = path.read_text(encoding="utf-8")
    assert main(["card", str(saved), "--license", "mit"]) == 0  # as it was written, so it may be written anew
    assert path.read_text(encoding="utf-8") != ours
    for text in ("# By hand\n", ours.replace("not recorded", "mit"), ours + "More.\n", ""):
        path.write_text(text, encoding="utf-8")
        assert main(["card", str(saved)]) == 2
        assert "add --force" in capsys.readouterr().err
        assert path.read_text(encoding="utf-8") == text
    assert main(["card", str(saved), "--force"]) == 0
    assert path.read_text(encoding="utf-8") == ours


def test_figures_that_are_none_and_a_dense_run_that_is_none_are_not_passed_over(saved, tmp_path, capsys):
    (saved / "eval_results.json").write_text(f'{{"eval_accuracy": NaN, "eval_f1": 1{"0" * 400}}}', encoding="utf-8")
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    (saved / "config.json").write_text(json.dumps({**config, "architectures": 5}), encoding="utf-8")
    assert main(["card", str(saved)]) == 0
    text = (saved / "README.md").read_text(encoding="utf-8")
    assert "## Metrics\n\nNot measured." in text
    assert "nan" not in text
    assert main(["card", str(saved), "--against", str(tmp_path / "typing-error")]) == 2
    assert "has to be the folder of a dense run" in capsys.readouterr().err


def test_card_that_cannot_be_written_is_no_traceback(saved, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    assert main(["card", str(saved)]) == 0
    before = (saved / "README.md").read_text(encoding="utf-8")
    monkeypatch.setattr(Path, "write_text", full)
    assert main(["card", str(saved), "--license", "mit"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert (saved / "README.md").read_text(encoding="utf-8") == before


def test_committed_cards_are_what_the_script_writes(tmp_path):
    script = [sys.executable, "scripts/reference/make_cards.py", "--output", str(tmp_path)]
    subprocess.run(script, cwd=ROOT, check=True, capture_output=True)
    made, committed = (
        {path.name: path.read_bytes() for path in folder.iterdir()} for folder in (tmp_path, Path(ROOT, "model_cards"))
    )
    assert made == committed
    results = read_results(Path(ROOT, "recipes", "reference", "results.json"))
    assert set(made) == {"template.md", *(f"{run.name}.md" for run in results)}
    for run in results:  # every run is in its card, by its own figures
        text = made[f"{run.name}.md"].decode()
        assert all(f"{name} {value:.4f}" in text.replace("\\_", "_") for name, value in run.metrics.items())
        assert f"seed {run.seed}:" in text
    for name, text in made.items():
        assert ModelCard(text.decode()).data.to_dict()["library_name"] == "transformers", name
