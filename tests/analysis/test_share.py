"""`hf-sparse report`, `compare` and `sensitivity`: figures by hand, hostile names, nothing left changed."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification

from hf_sparse import RecipeError, SparsityConfig, compact, sparsify
from hf_sparse.analysis.ablation import head_losses, layer_losses, mean_loss
from hf_sparse.analysis.model_report import groups_left, shrink
from hf_sparse.analysis.pareto import _front, _logarithmic, pareto
from hf_sparse.analysis.results import Result, add_results
from hf_sparse.analysis.robustness import Stress, ece, shortened, with_typos
from hf_sparse.analysis.runs import read_latency
from hf_sparse.cli.main import main
from hf_sparse.reporting import html as page
from hf_sparse.reporting.plotting import new_figure, write_labels
from tests.helpers import tiny
from tests.helpers.speeds import speed_file

EVIL = '<script>alert("x")</script>'


class Checked(HTMLParser):
    """Fails on whatever runs or fetches something, and on tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object", "form", "a")
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value is not None
                assert value.startswith("data:image/png;base64,")
        if tag not in ("meta", "img", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "img", "wbr"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return tiny.save_bert(tmp_path / "dense", head=True)


@pytest.fixture
def sparse(dense: Path, tmp_path: Path) -> Path:
    model = AutoModelForSequenceClassification.from_pretrained(dense)
    sparsify(
        model, SparsityConfig(groups=[{"pattern": "head", "sparsity": 0.5}, {"pattern": "neuron", "sparsity": 0.5}])
    )
    model.save_pretrained(tmp_path / "sparse")
    tiny.save_tokenizer(tmp_path / "sparse")
    return tmp_path / "sparse"


def test_report_is_one_safe_page_with_every_section(dense: Path, sparse: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"{text} {EVIL}", "label": label}) for text, label in tiny.sentences()]
    (tmp_path / "dev.jsonl").write_text("\n".join(rows) + "\n")
    log: list[Any] = [
        {"step": step, "sparsity": step / 10, "eval_accuracy": 0.5 + step / 20, f"eval_{EVIL}": 1} for step in (1, 2)
    ]
    log += [{"step": 3, "sparsity": float("nan"), "eval_accuracy": "high"}, "no row"]
    (sparse / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    (sparse / "eval_results.json").write_text(json.dumps({f"eval_{EVIL}": 0.5}))
    (tmp_path / "bench.json").write_text(json.dumps(speed_file(machine=EVIL)))
    command = ["report", str(sparse), "--against", str(dense), "--data", str(tmp_path / "dev.jsonl"), "--length", "16"]
    assert main([*command, "--html", str(tmp_path / "out.html"), "--bench", str(tmp_path / "bench.json")]) == 0
    text = (tmp_path / "out.html").read_text()
    Checked(text)
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")
    assert "&lt;script&gt;" in text
    titles = re.findall("<h2>(.*?)</h2>", text)
    assert titles[:7] == [
        "Size",
        "Speed",
        "Sparsity per layer",
        "Heads left",
        "Neurons left",
        "Weights",
        "Over training",
    ]
    assert len(titles) == 11
    assert "bert.encoder.layer.1.attention: 2 of 4" in text
    assert "4.00 ms [3.90, 4.10]" in text
    assert text.count("<img") == 12
    assert "as they are" in text


def test_report_says_what_is_left_out_and_why(dense: Path) -> None:
    assert main(["report", str(dense)]) == 0
    text = (dense / "report.html").read_text()
    Checked(text)
    reasons = re.findall("Left out: (.*?)</p>", text)
    assert len(reasons) == 3
    assert any("no trainer_state.json" in reason for reason in reasons)
    assert any("--bench FILE" in reason for reason in reasons)


def test_report_refuses_texts_without_a_dense_model(dense: Path, capsys: Any) -> None:
    assert main(["report", str(dense), "--data", "x.jsonl"]) == 2
    assert "add --against DENSE_DIR" in capsys.readouterr().err


def test_heads_that_were_cut_out_count_as_removed(sparse: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(sparse)
    before = [block.left.gt(0).tolist() for block in groups_left(model)]
    compact(model)
    assert [block.left.gt(0).tolist() for block in groups_left(model)] == before
    assert [sum(alive) for alive in before] == [32, 2, 32, 2]


def test_block_map_is_the_mean_of_what_it_stands_for() -> None:
    weight = torch.zeros(128, 256)
    weight[:4, :2] = 1.0
    small = shrink(weight)
    assert small.shape == (32, 64)
    assert small[0, 0] == 0.5
    assert float(small.sum()) == 0.5


def test_calibration_by_hand() -> None:
    # Confidences 0.6 (wrong), 0.65 (right) in (0.6, 0.7] and (0.5, 0.6]; 0.95 right, 0.91 wrong in the last bin of ten.
    high = torch.tensor([0.6, 0.65, 0.95, 0.91])
    labels = torch.tensor([1, 0, 0, 1])
    expected = (abs(0 - 0.6) + abs(1 - 0.65) + abs(1 - 0.95 + 0 - 0.91)) / 4
    assert ece(torch.stack([high, 1 - high], 1), labels, bins=10) == pytest.approx(expected, abs=1e-6)


def test_flips_and_classes_by_hand() -> None:
    def answers(*classes: int) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(classes), 2).float()

    labels = torch.tensor([0, 0, 1, 1])
    found = Stress(("no", "yes"), ("a", "b", "c", "d"), labels, answers(0, 1, 1, 1), answers(1, 0, 1, 1), {})
    assert found.counts() == {"became wrong": 1, "became right": 1, "another wrong class": 0}
    assert found.flips() == [0, 1]
    name, texts, precision, recall, _ = found.classes()[1]
    assert (name, texts, precision, recall) == ("yes", 2, (2 / 3, 2 / 3), (1.0, 1.0))
    assert Stress(("no", "yes"), ("a",), labels[:1], answers(0), answers(0), {}).flips() == []


def test_typos_swap_inner_neighbours_the_same_way_each_time() -> None:
    text = "wonderful film of the century"
    changed = with_typos(text, 1.0)
    assert changed == with_typos(text, 1.0) != text
    assert with_typos(text, 0.0) == text
    for before, after in zip(text.split(), changed.split(), strict=True):
        assert sorted(before) == sorted(after)
        assert (before[0], before[-1]) == (after[0], after[-1])
    assert shortened("a", 0.25) == "a"


def test_sensitivity_restores_weights_to_the_bit_also_after_an_error(dense: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(dense)
    model.train()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, :2] = torch.tensor([-0.0, 0.0])
    before = {
        name: tensor.clone().view(torch.int32)
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }
    layers = {"out": model.bert.encoder.layer[0].output.dense}
    batch = {"input_ids": torch.tensor([[2, 5, 3], [2, 6, 3]]), "labels": torch.tensor([0, 1])}
    loss, losses = layer_losses(model, layers, [batch], [0.5, 0.9])
    assert model.training
    assert len(losses["out"]) == 2
    assert losses["out"][0] != loss
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("in the middle")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        layer_losses(model, layers, [batch], [0.5, 0.9])
    after = model.state_dict()
    assert all(torch.equal(bits, after[name].view(torch.int32)) for name, bits in before.items())
    with pytest.raises(RecipeError, match="ascending"):
        layer_losses(model, layers, [batch], [0.9, 0.5])


def test_sensitivity_loss_is_that_of_a_model_pruned_there(dense: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(dense)
    name = "bert.encoder.layer.1.intermediate.dense"
    batch = {"input_ids": torch.tensor([[2, 5, 3], [2, 6, 3]]), "labels": torch.tensor([0, 1])}
    _, losses = layer_losses(model, {name: model.get_submodule(name)}, [batch], [0.7])
    sparsify(model, SparsityConfig(targets=name, sparsity=0.7))
    assert losses[name][0] == pytest.approx(float(model(**batch).loss.detach()), abs=1e-7)


def test_loss_without_a_head_is_that_of_a_model_in_which_it_is_pruned(dense: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(dense)
    batch = {"input_ids": torch.tensor([[2, 5, 3], [2, 6, 3]]), "labels": torch.tensor([0, 1])}
    name = "bert.encoder.layer.1.attention"
    alone, (none, half, most) = head_losses(model, [batch], [0.1, 0.5, 0.9])[name]
    assert none == mean_loss(model, [batch])
    order = sorted(range(4), key=alone.__getitem__)
    for heads, loss in [*(([head], alone[head]) for head in range(4)), (order[:2], half), (order[:3], most)]:
        other = AutoModelForSequenceClassification.from_pretrained(dense)
        with torch.no_grad():
            for head in heads:
                other.bert.encoder.layer[1].attention.output.dense.weight[:, 8 * head : 8 * head + 8] = 0.0
        assert loss == pytest.approx(mean_loss(other, [batch]), abs=1e-6)
    assert not model.bert.encoder.layer[1].attention.output.dense._forward_pre_hooks


def test_sensitivity_command_suggests_groups_that_a_recipe_takes(dense: Path, tmp_path: Path, capsys: Any) -> None:
    texts = tiny.write_sentences(tmp_path / "texts.jsonl")
    command = ["sensitivity", str(dense), "--data", str(texts), "--length", "16", "--sparsity", "0.8"]
    assert main([*command, "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    for way in ("sensitivity", "erdos_renyi"):
        block = out.split(f"# {way}, 0.8 in total\n")[1].split("\n# ")[0]
        model = AutoModelForSequenceClassification.from_pretrained(dense)
        config = SparsityConfig.from_dict(yaml.safe_load(block)["sparsity"])
        sparsify(model, config)
        weights = [model.get_submodule(group.targets[0]).weight for group in config.groups if group.targets]
        total = sum(weight.numel() for weight in weights)
        assert sum(int(weight.count_nonzero()) for weight in weights) == total // 5
    assert "# heads" not in out  # two attentions of four heads: one head would be left for both
    assert main([*command[:-1], "0.5"]) == 0
    out = capsys.readouterr().out
    block = out.split("# heads, 0.5 in total\n")[1]
    model = AutoModelForSequenceClassification.from_pretrained(dense)
    sparsify(model, SparsityConfig.from_dict(yaml.safe_load(block)["sparsity"]))
    assert sum(int(left.left.gt(0).sum()) for left in groups_left(model) if left.kind == "attention") == 4
    assert "one head masked alone" in out
    assert main([*command, "--json"]) == 0
    out = capsys.readouterr().out
    assert len(json.loads(out)["losses"]) == 12
    assert {name: len(found["alone"]) for name, found in json.loads(out)["masked_heads"].items()} == {
        "bert.encoder.layer.0.attention": 4,
        "bert.encoder.layer.1.attention": 4,
    }


def write_run(folder: Path, accuracy: float, sparsity: Any = None, seed: int = 0, steps: int = 10) -> str:
    folder.mkdir()
    recipe = {"model": {"name": "m"}, "data": {"text": "t"}, "training": {"max_steps": steps}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "sparsity": sparsity, "seed": seed}))
    (folder / "eval_results.json").write_text(json.dumps({"eval_accuracy": accuracy}))
    return str(folder)


def test_pareto_keeps_equals_and_drops_the_beaten() -> None:
    assert pareto([(2, 0.9), (1, 0.5), (2, 0.8), (3, 0.9), (0.5, 0.5), (2, 0.9)]) == [4, 0, 5]
    assert pareto([]) == []


def test_compare_draws_what_is_known(dense: Path, sparse: Path, tmp_path: Path, capsys: Any) -> None:
    runs = [
        write_run(tmp_path / EVIL.replace("/", "!"), 0.9),
        write_run(tmp_path / "b", 0.8, {"sparsity": 0.5}, steps=5),
    ]
    for run, model in zip(runs, (dense, sparse), strict=True):
        (Path(run) / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    (tmp_path / "bench.json").write_text(json.dumps(speed_file(model=Path(runs[0]).name, against="b")))
    page, picture = tmp_path / "c.html", tmp_path / "c.png"
    command = ["compare", *runs, "--bench", str(tmp_path / "bench.json")]
    assert main([*command, "--html", str(page), "--plot", str(picture)]) == 0
    assert "| 2 | b | magnitude | 0.8000 |" in capsys.readouterr().out
    text = page.read_text()
    Checked(text)
    assert "<script" not in text
    assert text.count("<svg") == 3
    assert "not trained alike" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


CROWD = [(50 + 0.05 * place, 0.8 + 0.001 * (place % 3)) for place in range(7)] + [(60.0, 0.9)]


def test_labels_of_a_picture_cover_neither_each_other_nor_marks() -> None:
    text_of = pytest.importorskip("matplotlib.text").Text.get_window_extent  # without the line to the mark
    figure = new_figure(4, 4)
    axes = figure.subplots()
    axes.scatter(*zip(*CROWD, strict=True))
    texts = [f"{10 * place} %" for place in range(7)] + [""]
    write_labels(figure, axes, CROWD, texts, ["C0"] * 8)
    figure.draw_without_rendering()
    boxes = [text_of(text) for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == texts[:-1]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for box in boxes:
        assert not box.count_contains(axes.transData.transform(CROWD))
        assert axes.get_window_extent().count_contains([box.min, box.max]) == 2


def test_numbers_of_a_chart_cover_neither_each_other_nor_marks() -> None:
    picture = page.scatter(CROWD, [0], "x", "y", range(10, 18))
    marks = [(float(x), float(y)) for x, y in re.findall(r'<circle [^>]*cx="(.+?)" cy="(.+?)"', picture)]
    found = re.findall(r'<text x="([0-9.]+)" y="([0-9.]+)" text-anchor="middle">(1[0-7])</text>', picture)
    assert [int(number) for _, _, number in found] == [*range(10, 18)]
    places = [(float(x), float(y) - 4) for x, y, _ in found]
    for (x, y), (other_x, other_y) in itertools.combinations(places, 2):
        assert abs(x - other_x) >= 14.9 or abs(y - other_y) >= 11.9
    for x, y in places:
        assert 46 + 7.5 <= x <= 360 - 7.5
        assert not any(abs(x - mark_x) < 7.4 and abs(y - mark_y) < 5.9 for mark_x, mark_y in marks)
    alone = (places[-1][0] - marks[-1][0], places[-1][1] - marks[-1][1])
    assert max(map(abs, alone)) < 15  # what has room lies close to its mark
    assert picture.count('class="lead"') == sum(
        max(abs(x - mark_x) - 7.5, abs(y - mark_y) - 6) > 8
        for (x, y), (mark_x, mark_y) in zip(places, marks, strict=True)
    )


def test_logarithmic_axis_of_a_chart_has_equal_ratios_at_equal_distances() -> None:
    points = [(0.01, 0.8), (0.1, 0.8), (1.0, 0.9)]
    picture = page.scatter(points, [0], "left", "y", "abc", {0.001: "0.1 %", 0.1: "10 %", 1.0: "100 %"})
    marks = [float(x) for x in re.findall(r'<circle [^>]*cx="(.+?)"', picture)]
    assert marks[1] - marks[0] == pytest.approx(marks[2] - marks[1], abs=0.2)
    ticks = {text: float(x) for x, text in re.findall(r'<text x="([0-9.]+)" y="196" [^>]*>([0-9.]+ %)<', picture)}
    assert ticks == {"10 %": marks[1], "100 %": marks[2]}  # and none outside
    assert _logarithmic("left", points)
    assert not _logarithmic("left", [(0.0, 0.8), (1.0, 0.8)])
    assert not _logarithmic("left", [(0.3, 0.8), (0.5, 0.8)])  # one tick makes no axis
    assert not _logarithmic("megabytes", points)


def test_compare_names_what_is_missing(tmp_path: Path, capsys: Any) -> None:
    run = write_run(tmp_path / "a", 0.9)
    assert main(["compare", run, "--metric", "f1"]) == 2
    assert "has no metric 'f1'; it has accuracy" in capsys.readouterr().err
    assert main(["compare", str(tmp_path)]) == 2
    assert "is no finished run" in capsys.readouterr().err


def test_compare_takes_a_file_of_results_with_the_means_over_seeds(tmp_path: Path, capsys: Any) -> None:
    def result(name: str, seed: int, value: float, **more: Any) -> Result:
        facts = {"task": "t", "model": "m", "method": name, "sparsity": 0.0 if name == "dense" else 0.5}
        return Result(name, seed=seed, metrics={"wer": value}, **{**facts, **more})

    results = [
        result("dense", 0, 0.1, bytes=4_000_000),
        result("magnitude", 0, 0.2, bytes=2_000_000, reached=0.5, speed=speed_file(gain=4.0)),
        result("magnitude", 1, 0.4, bytes=2_000_000, reached=0.5),
        result("other", 0, 0.4, bytes=3_000_000, compact_bytes=2_500_000),
    ]
    path, picture = tmp_path / "results.json", tmp_path / "c.png"
    add_results(path, results)
    assert (
        main(["compare", str(path), "--metric", "wer", "--plot", str(picture), "--html", str(tmp_path / "c.html")]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == [
        "| 1 | dense | dense | 0.1000 | 4.00 | 1.0000 | - | 1.00 |",
        "| 2 | magnitude | magnitude | 0.3000 | 2.00 | 0.5000 | - | 0.25 |",
        "| 3 | other | other | 0.4000 | 2.50 | 0.5000 | - | - |",
    ]
    assert _front([(4.0, 0.1), (2.0, 0.3), (2.5, 0.4)], "wer") == [1, 0]
    first = picture.read_bytes()
    assert main(["compare", str(path), "--metric", "wer", "--plot", str(picture)]) == 0
    assert picture.read_bytes() == first  # the same results, the same picture
    capsys.readouterr()
    assert main(["compare", str(path)]) == 2
    assert "no result of these has metric 'accuracy'; there are wer" in capsys.readouterr().err
    add_results(path, [result("else", 0, 0.1, task="u")])
    assert main(["compare", str(path), "--metric", "wer"]) == 2
    assert "name one with --task: t, u" in capsys.readouterr().err
    add_results(path, [result("larger", 0, 0.1, model="n")])
    assert main(["compare", str(path), "--metric", "wer", "--task", "t"]) == 2
    assert "name one with --model: m, n" in capsys.readouterr().err
    assert main(["compare", str(path), "--metric", "wer", "--task", "t", "--model", "m"]) == 0
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize("value", ["NaN", "null", '"high"', "1" + "0" * 400])
def test_compare_refuses_what_is_no_number(tmp_path: Path, capsys: Any, value: str) -> None:
    run = write_run(tmp_path / "a", 0.9)
    (tmp_path / "a" / "eval_results.json").write_text(f'{{"eval_accuracy": {value}}}')
    assert main(["compare", run]) == 2
    assert "which cannot be compared" in capsys.readouterr().err


def test_compare_refuses_a_recipe_without_groups(tmp_path: Path, capsys: Any) -> None:
    assert main(["compare", write_run(tmp_path / "a", 0.9, {"groups": []})]) == 2
    assert "is no recipe" in capsys.readouterr().err


def test_timings_are_of_their_own_folder_and_not_of_another_with_its_name(tmp_path: Path) -> None:
    folders = [tmp_path / "one" / "same", tmp_path / "two" / "same", tmp_path / "dense"]
    for folder in folders:
        folder.mkdir(parents=True)
    (folders[0] / "speed.json").write_text(json.dumps(speed_file(model="same", against="dense")))
    assert read_latency(folders) == [4.0, None, 8.0]
    (tmp_path / "bench.json").write_text(json.dumps(speed_file(model="same", against="dense")))
    assert read_latency([folders[1]], [tmp_path / "bench.json"]) == [4.0]
    (folders[0] / "speed.json").unlink()
    with pytest.raises(RecipeError, match="several runs are called same"):
        read_latency(folders, [tmp_path / "bench.json"])


def test_compare_takes_times_of_one_machine_from_a_file_of_results(tmp_path: Path, capsys: Any) -> None:
    facts: dict[str, Any] = {"task": "t", "model": "m", "sparsity": 0.5, "metrics": {"accuracy": 0.5}, "seed": 0}
    machines = {"a": "Box 9", "b": "Box 9", "c": "Another"}
    results = [Result(n, method=n, speed=speed_file(machine=machine), **facts) for n, machine in machines.items()]
    add_results(tmp_path / "r.json", results)
    assert main(["compare", str(tmp_path / "r.json")]) == 0
    said = capsys.readouterr()
    assert [line.split("|")[8].strip() for line in said.out.splitlines()[2:]] == ["0.50", "0.50", "-"]
    assert "measured on another machine than most: c\n" in said.err


def test_compare_tells_runs_of_another_length_apart(tmp_path: Path, capsys: Any) -> None:
    facts: dict[str, Any] = {"task": "t", "model": "m", "sparsity": 0.5, "metrics": {"accuracy": 0.5}, "seed": 0}
    lengths = {"a": 1400, "b": 1400, "c": 5600, "d": None}
    results = [Result(name, method="magnitude", steps=steps, **facts) for name, steps in lengths.items()]
    add_results(tmp_path / "r.json", results)
    assert main(["compare", str(tmp_path / "r.json")]) == 0
    rows = {
        (cells := line.split("|"))[2].strip(): cells[3].strip() for line in capsys.readouterr().out.splitlines()[2:]
    }
    assert rows == {"a": "magnitude", "b": "magnitude", "c": "magnitude, 5,600 steps", "d": "magnitude"}


def test_report_draws_values_as_far_apart_as_floats_can_be(dense: Path) -> None:
    log = [{"step": 1, "loss": 1e308}, {"step": 2, "loss": -1e308}]
    (dense / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert main(["report", str(dense)]) == 0


def test_models_whose_answers_are_not_finite_are_no_result(dense: Path, tmp_path: Path, capsys: Any) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(dense)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    tiny.save_tokenizer(tmp_path / "nan")
    data = ["--data", str(tiny.write_sentences(tmp_path / "dev.jsonl", slice(4))), "--length", "16"]
    assert main(["heads", str(tmp_path / "nan"), *data]) == 2
    assert "importance of its heads is not known" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nan"), "--against", str(dense), *data]) == 2
    assert "probabilities that are not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--sparsity", "0.95"], "the highest level to measure is 0.9"),
        (["--sparsity", "1.5"], "below 1, not 1.5"),
        (["--plot", "x.xyz"], "its ending is none of"),
        (["--plot", "no/x.png"], "there is no folder no"),
    ],
)
def test_what_cannot_be_answered_or_drawn_is_refused_before_anything_is_loaded(
    capsys: Any, option: list[str], said: str
) -> None:
    for command in ("sensitivity", "heads"):
        if command == "sensitivity" or "--plot" in option:
            assert main([command, "no/model", "--data", "no.jsonl", *option]) == 2
            assert said in capsys.readouterr().err


def test_report_finds_out_first_that_there_is_no_folder_for_the_page(capsys: Any) -> None:
    assert main(["report", "no/model", "--html", "no/page.html"]) == 2
    assert "there is no folder no" in capsys.readouterr().err
