"""Push and pull over loopback with the real client: what goes up, what comes back, and every way it can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoTokenizer, Trainer

from hf_sparse import HubError, SparsityCallback
from hf_sparse.cli.main import main
from hf_sparse.hf.hub.push import push_folder
from hf_sparse.recipe.recipe import Recipe
from hf_sparse.recipe.train import run
from tests.helpers.ranks import ROOT
from tests.helpers.tiny import save_bert, write_sentences
from tests.helpers.training import Rows, arguments, bert
from tests.hf.hub.faulty_server import Fault
from tests.hf.hub.server import LocalHub, Repo
from tests.hf.hub.small_model import REPO, assert_same, logits, pruned, pulled


def test_only_what_belongs_to_the_model_goes_up_and_it_comes_back_bit_for_bit(hub, saved):
    push_folder(saved, REPO)
    files = hub.files(REPO)
    assert set(files) == {
        ".gitattributes", "README.md", "config.json", "model.safetensors", "recipe.yaml", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert files["model.safetensors"] == (saved / "model.safetensors").read_bytes()
    assert b"somebody" not in b"".join(files.values())
    assert yaml.safe_load(files["recipe.yaml"])["model"]["name"] == "bert"
    assert_same(saved)
    assert AutoTokenizer.from_pretrained(REPO)("the film is great").input_ids


def test_model_push_to_hub_is_packed_and_has_a_card(hub, tmp_path):
    model = pruned(tmp_path)
    model.push_to_hub(REPO, private=True, tags=["tiny"])
    assert hub.repos[REPO].private
    assert "hf_sparse" in pulled().config.quantization_config.to_dict()["quant_method"]
    assert torch.equal(logits(pulled()), logits(model))
    card = hub.files(REPO)["README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1])["tags"] == ["hf_sparse", "sparse", "pruning", "tiny"]


def test_model_push_keeps_a_card_that_somebody_wrote(hub, tmp_path):
    model = pruned(tmp_path)
    api = HfApi()
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b"# By hand\n", path_in_repo="README.md", repo_id=REPO)
    model.push_to_hub(REPO)
    assert hub.files(REPO)["README.md"] == b"# By hand\n"


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "end"])
def test_trainer_pushes_the_model_and_no_pickle(hub, tmp_path, strategy):
    model = bert()
    args = arguments(
        tmp_path / "out", max_steps=4, push_to_hub=True, hub_model_id=REPO, hub_strategy=strategy,
        save_strategy="steps", save_steps=2,
    )  # fmt: skip
    callback = SparsityCallback({"sparsity": 0.5, "schedule": "constant"})
    trainer = Trainer(model=model, args=args, train_dataset=Rows(), callbacks=[callback])
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "out" / "training_args.bin").is_file()
    assert set(hub.files(REPO)) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert "Pruned with hf_sparse" in hub.files(REPO)["README.md"].decode()
    assert torch.equal(logits(pulled()), logits(model))


def test_command_pushes_to_a_branch_and_as_a_pull_request(hub, saved, capsys):
    assert main(["push", str(saved), REPO, "--private", "--revision", "v1"]) == 0
    assert hub.repos[REPO].private
    assert "config.json" in hub.files(REPO, "v1")
    assert "config.json" not in hub.files(REPO)
    assert main(["push", str(saved), REPO, "--create-pr"]) == 0
    assert f"{hub.url}/{REPO}/discussions/1" in capsys.readouterr().out
    assert "config.json" in hub.files(REPO, "refs/pr/1")
    assert "config.json" not in hub.files(REPO)
    assert_same(saved, revision="v1")


def test_model_of_somebody_else_takes_a_pull_request_and_nothing_more(hub, saved, capsys):
    theirs = hub.repos["other/model"] = Repo()
    theirs.commit("main", {"README.md": b"# Theirs\n"})
    theirs.branches["v1"] = list(theirs.branches["main"])
    assert main(["push", str(saved), "other/model"]) == 2
    assert "another repository, or --create-pr" in capsys.readouterr().err
    assert main(["push", str(saved), "other/model", "--create-pr"]) == 0
    assert f"{hub.url}/other/model/discussions/1" in capsys.readouterr().out
    assert main(["push", str(saved), "other/model", "--create-pr", "--revision", "v1"]) == 0
    for branch in ("main", "v1"):
        assert hub.files("other/model", branch) == {"README.md": b"# Theirs\n"}
    assert_same(saved, "other/model", revision="refs/pr/1")
    assert main(["push", str(saved), "other/new", "--create-pr"]) == 2
    assert "403" in capsys.readouterr().err
    assert "other/new" not in hub.repos


def test_run_of_a_recipe_pushes_what_it_measured_and_no_pickle(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    save_bert(tmp_path / "bert")
    recipe = {
        "model": str(tmp_path / "bert"),
        "data": {
            "train": str(write_sentences(tmp_path / "train.jsonl", slice(0, 18))),
            "validation": str(write_sentences(tmp_path / "validation.jsonl", slice(18, None))),
            "max_length": 8,
        },
        "sparsity": {"sparsity": 0.5, "schedule": "constant"},
        "training": {
            "output_dir": str(tmp_path / "out"), "max_steps": 4, "save_steps": 2, "use_cpu": True, "disable_tqdm": True,
            "push_to_hub": True, "hub_model_id": REPO, "hub_private_repo": True,
        },
    }  # fmt: skip
    result = run(Recipe.from_dict(recipe))
    files = hub.files(REPO)
    assert set(files) == {
        ".gitattributes", "README.md", "config.json", "eval_results.json", "model.safetensors", "recipe.yaml",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert hub.repos[REPO].private
    assert len(hub.repos[REPO].commits) == 2  # one for the empty repository, one at the end
    assert f"{result.metrics['eval_accuracy']:.4f}" in files["README.md"].decode()
    assert str(tmp_path).encode() not in b"".join(files.values())
    assert_same(tmp_path / "out")


def test_weights_in_parts_arrive_whole(hub, saved):
    hub.multipart_above, hub.part = 1000, 7000
    push_folder(saved, REPO)
    assert hub.count("PUT /part/") > 2
    assert hub.files(REPO)["model.safetensors"] == (saved / "model.safetensors").read_bytes()


def test_second_push_sends_no_weights(hub, saved):
    push_folder(saved, REPO)
    push_folder(saved, REPO)
    assert hub.count("PUT /lfs/") == 1
    assert len(hub.repos[REPO].commits) == 2


@pytest.mark.slow  # starts two interpreters, one to be killed
def test_push_killed_in_mid_upload_leaves_no_commit_and_a_retry_is_whole(hub, saved):
    fault = Fault("PUT /lfs/", after=2000, block=threading.Event())
    hub.faults.append(fault)
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "tests.hf.hub.pusher", str(saved), REPO]
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        assert fault.block is not None
        assert fault.block.wait(60)
    finally:
        process.kill()
        process.wait()
    assert set(hub.files(REPO)) == {".gitattributes"}
    assert subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0
    assert_same(saved)


def test_connection_lost_in_mid_upload_is_tried_again(hub, saved, waits):
    hub.faults.append(Fault("PUT /lfs/", after=2000, times=2))
    push_folder(saved, REPO)
    assert hub.count("PUT /lfs/") == 3
    assert len(waits) == 2
    assert_same(saved)


def test_connection_that_stays_lost_says_push_again_and_then_it_works(hub, saved, waits):
    fault = Fault("PUT /lfs/", after=2000, times=99)
    hub.faults.append(fault)
    with pytest.raises(HubError, match="the connection was lost: push again"):
        push_folder(saved, REPO)
    assert set(hub.files(REPO)) == {".gitattributes"}
    fault.times = 0
    push_folder(saved, REPO)
    assert_same(saved)


def test_download_lost_in_the_middle_goes_on_where_it_was(hub, saved, waits):
    push_folder(saved, REPO)
    hub.faults.append(Fault("GET /cdn/", after=3000))
    assert_same(saved)
    assert hub.count("GET /cdn/") == 2


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("pattern", ["/preupload/", "objects/batch", "PUT /lfs/", "/verify/"])
def test_busy_hub_is_waited_for(hub, saved, waits, pattern, status):
    hub.faults.append(Fault(pattern, status=status, headers={"Retry-After": "7"}))
    push_folder(saved, REPO)
    assert waits == [8.0]  # the client adds a second
    assert_same(saved)


def test_snapshot_in_the_cache_of_the_hub_is_pushed(hub, saved, tmp_path):
    push_folder(saved, REPO)
    snapshot = Path(hf_hub_download(REPO, "config.json")).parent
    hf_hub_download(REPO, "model.safetensors")
    assert (snapshot / "config.json").is_symlink()
    push_folder(snapshot, "user/again")
    assert hub.files("user/again")["model.safetensors"] == (saved / "model.safetensors").read_bytes()


def test_server_keeps_to_the_protocol_where_the_client_looks(hub):
    api = HfApi()
    api.create_repo(REPO)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    assert api.whoami()["name"] == "user"
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="a/b.json", repo_id=REPO)
    assert [file.path for file in api.list_repo_tree(REPO, "a")] == ["a/b.json"]
    assert api.model_info(REPO).sha == hub.repos[REPO].branches["main"][-1]
    with open(hf_hub_download(REPO, "a/b.json"), encoding="utf-8") as file:
        assert json.load(file) == {}
    assert isinstance(hub, LocalHub)
