"""The example server and its load generator on tiny models: outputs are those of the model, errors have a reason."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_sparse import SparsityConfig, save_runtime, sparsify, to_runtime
from hf_sparse.kernels import KERNELS
from scripts.serving import load, server
from scripts.serving.served_model import Model
from tests.helpers import sentence, tiny

TEXTS = sentence.TEXTS[:6]
BACKEND = "csr" if KERNELS["cpu"].unavailable() else "cpu"


@contextmanager
def serving(folder: Path, backend: str = BACKEND, **options: Any) -> Iterator[str]:
    made = server.Server(("127.0.0.1", 0), Model(str(folder), backend), **options)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield "{}:{}".format(*made.server_address[:2])
    finally:
        made.shutdown()
        thread.join()
        made.server_close()


def call(address: str, path: str, body: Any = None, method: str = "POST") -> tuple[int, Any]:
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request(method, path, body if isinstance(body, str) else json.dumps(body))
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedder")
    model = sentence.sentence_transformer(folder)
    sparsify(model, SparsityConfig(sparsity=0.8))
    model.save_pretrained(str(folder / "model"))
    return folder / "model"


def classifier(folder: Path, labels: int) -> Path:
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny.config(initializer_range=0.3, num_labels=labels, **sentence.NO_DROPOUT))
    sparsify(model, SparsityConfig(sparsity=0.8))
    model.save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return folder


def test_embeddings_are_those_of_the_model_also_for_many_callers(embedder: Path, tmp_path: Path) -> None:
    st = sentence.package()
    model = st.SentenceTransformer(str(embedder), device="cpu")
    expected = {text: model.encode(text, convert_to_tensor=True, normalize_embeddings=True) for text in TEXTS}
    to_runtime(model, BACKEND)
    save_runtime(model, tmp_path)
    with serving(embedder) as address, serving(tmp_path) as mapped:
        wrong: list[str] = []

        def work(text: str, where: str) -> None:
            for _ in range(5):
                status, found = call(where, "/embed", {"inputs": text})
                if status != 200 or not torch.allclose(torch.tensor(found[0]), expected[text], atol=1e-4):
                    wrong.append(text)

        threads = [threading.Thread(target=work, args=(text, each)) for text in TEXTS for each in (address, mapped)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        status, both = call(address, "/embed", {"inputs": TEXTS[:2], "normalize": False})
        assert (status, len(both)) == (200, 2)
        assert call(mapped, "/info", method="GET")[1]["runtime"] is True
        assert call(mapped, "/info", method="GET")[1]["model_type"] == "embedding"
        assert call(mapped, "/health", method="GET") == (200, {})
        assert call(address, "/rerank", {"query": "a", "texts": ["b"]})[0] == 424
        assert call(address, "/predict", {"inputs": "a"})[0] == 424


def test_reranker_sorts_by_score(tmp_path: Path) -> None:
    folder = classifier(tmp_path, 1)
    with serving(folder) as address:
        status, found = call(address, "/rerank", {"query": TEXTS[0], "texts": TEXTS[1:4], "return_text": True})
        assert status == 200
        assert sorted(each["index"] for each in found) == [0, 1, 2]
        assert [each["score"] for each in found] == sorted((each["score"] for each in found), reverse=True)
        assert all(each["text"] == TEXTS[1:4][each["index"]] for each in found)
        status, raw = call(address, "/rerank", {"query": TEXTS[0], "texts": TEXTS[1:4], "raw_scores": True})
        assert [each["index"] for each in raw] == [each["index"] for each in found]
        logits = torch.tensor([each["score"] for each in raw])
        torch.testing.assert_close(logits.sigmoid(), torch.tensor([each["score"] for each in found]))
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        model, tokenizer = (
            AutoModelForSequenceClassification.from_pretrained(folder),
            AutoTokenizer.from_pretrained(folder),
        )
        with torch.no_grad():
            expected = model(**tokenizer(TEXTS[0], TEXTS[1], return_tensors="pt")).logits
        score = next(each["score"] for each in raw if each["index"] == 0)
        assert score == pytest.approx(float(expected), abs=1e-4)


def test_predictions_of_texts_pairs_and_batches(tmp_path: Path) -> None:
    with serving(classifier(tmp_path, 3)) as address:
        status, one = call(address, "/predict", {"inputs": TEXTS[0]})
        assert status == 200
        assert sum(each["score"] for each in one) == pytest.approx(1.0, abs=1e-5)
        assert {each["label"] for each in one} == {"LABEL_0", "LABEL_1", "LABEL_2"}
        pair = call(address, "/predict", {"inputs": TEXTS[:2]})[1]
        assert len(pair) == 3
        batch = call(address, "/predict", {"inputs": [[TEXTS[0]], [TEXTS[1]]]})[1]
        assert batch[0][0]["score"] == pytest.approx(one[0]["score"], abs=1e-5)
        assert len(batch) == 2


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/embed", "{", 400),
        ("/embed", "[1]", 400),
        ("/embed", {"inputs": 3}, 422),
        ("/embed", {"inputs": []}, 422),
        ("/embed", {"inputs": ["a"] * 33}, 422),
        ("/embed", {"inputs": "a", "normalize": "yes"}, 422),
        ("/embed", {"inputs": "a " * 3000}, 413),
        ("/embed", {"inputs": "a" * 3_000_000}, 413),
        ("/nothing", {"inputs": "a"}, 404),
    ],
)
def test_bad_requests_get_a_reason_and_the_server_goes_on(embedder: Path, path: str, body: Any, status: int) -> None:
    with serving(embedder) as address:
        try:
            found, answer = call(address, path, body)
        except (BrokenPipeError, ConnectionResetError):  # it answers before all of a body that is too large is sent
            assert status == 413
        else:
            assert found == status
            assert answer["error"]
        assert call(address, "/embed", {"inputs": "a " * 3000, "truncate": True})[0] == 200


def test_more_requests_than_may_wait_are_told_to_come_again(embedder: Path) -> None:
    with serving(embedder, callers=1, waiting=0) as address:
        results: list[int] = []

        def work() -> None:
            results.extend(call(address, "/embed", {"inputs": TEXTS[:6]})[0] for _ in range(20))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(results) == {200, 429}


def test_load_generator_compares_and_counts(embedder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    out = tmp_path / "out.json"
    with serving(embedder, "dense") as dense, serving(embedder) as sparse, serving(classifier(tmp_path, 1)) as other:
        arguments = ["load", f"dense={dense}", f"sparse={sparse}", "--examples", str(texts), "--clients", "1", "3"]
        monkeypatch.setattr("sys.argv", [*arguments, "--rounds", "2", "--json", str(out)])
        load.main()
        rows = json.loads(out.read_text(encoding="utf-8"))
        assert [(row["server"], row["clients"]) for row in rows] == [
            ("dense", 1), ("sparse", 1), ("dense", 3), ("sparse", 3),
        ]  # fmt: skip
        assert all(0 < row["p50"] <= row["p90"] <= row["p99"] for row in rows)
        assert "6 requests of 1 examples to /embed" in capsys.readouterr().out
        bodies = load.requests_of("reranker", TEXTS, 3)
        assert len(bodies) == 2
        embeds = load.requests_of("embedding", TEXTS, 3)
        with pytest.raises(RuntimeError, match="outputs of dense differ from those of dense by 0"):
            load.compare({"dense": dense, "sparse": sparse}, "/embed", embeds, -1.0)
        with pytest.raises(RuntimeError, match="424"):
            load.send(dense, "/rerank", bodies, 2)
        assert len(load.send(other, "/rerank", bodies, 2).seconds) == 2


def test_percentiles_by_hand() -> None:
    results = [load.Result([index / 1000 for index in range(1, 102)], 2.0)]
    found = load.summary(results, 101)
    assert found == {"p50": pytest.approx(51), "p90": pytest.approx(91), "p99": pytest.approx(100), "requests/s": 50.5}
