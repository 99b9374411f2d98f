"""Pushes and pulls that are refused: what is said, and that nothing is sent."""

from __future__ import annotations

import os
import traceback

import pytest
from huggingface_hub import HfApi

from hf_sparse import CheckpointError, HubError, RecipeError
from hf_sparse.cli.main import main
from hf_sparse.hf.hub.push import push_folder
from tests.hf.hub.faulty_server import Fault
from tests.hf.hub.server import READER, WRITER
from tests.hf.hub.small_model import REPO, assert_same, pulled


@pytest.mark.parametrize(
    ("pattern", "status", "says"),
    [
        ("/api/repos/create", 401, "hf auth login"),
        ("/api/repos/create", 429, "fewer requests"),
        ("/preupload/", 403, "role 'write'"),
        ("/preupload/", 404, "check the name"),
        ("objects/batch", 403, "role 'write'"),
        ("PUT /lfs/", 403, "role 'write'"),
        ("/verify/", 404, "check the name"),
        ("/commit/", 409, "push again"),
        ("/commit/", 500, "the Hub has a problem: push again"),
    ],
)
def test_refusal_says_what_to_do_and_leaves_the_repository_as_it_was(hub, saved, waits, pattern, status, says):
    hub.faults.append(Fault(pattern, status=status, times=99))
    with pytest.raises(HubError, match=says) as caught:
        push_folder(saved, REPO)
    assert f"{status}" in str(caught.value)
    assert REPO not in hub.repos or set(hub.files(REPO)) == {".gitattributes"}


def test_tokens(hub, saved, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    with pytest.raises(HubError, match=r"401.*hf auth login"):
        push_folder(saved, REPO)
    monkeypatch.setenv("HF_TOKEN", READER)
    assert main(["push", str(saved), REPO]) == 2
    assert "role 'write'" in capsys.readouterr().err


def test_offline_and_unreachable_hubs_are_told_apart(hub, saved, monkeypatch, waits):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        push_folder(saved, REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="the connection was lost"):
        push_folder(saved, REPO)


def test_nothing_is_sent_of_a_folder_that_is_no_whole_model(hub, saved):
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        push_folder(saved, REPO)
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError):
        push_folder(saved, REPO)
    with pytest.raises(RecipeError, match="not a name of a repository"):
        push_folder(saved, "a/b/c")
    assert hub.seen == []


@pytest.mark.parametrize(
    "name", ["LICENSE", "README.md", "recipe.yaml", "config.json", "model.safetensors", "tokenizer.json"]
)
def test_link_out_of_the_folder_is_refused_and_nothing_is_sent(hub, saved, tmp_path, name):
    secret = tmp_path / "secret"
    if (saved / name).is_file():
        (saved / name).rename(secret)
    else:
        secret.write_text("secret")
    (saved / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match=f"{name} is a link to .*secret, outside of its folder"):
        push_folder(saved, REPO)
    assert hub.seen == []


def test_pipe_is_refused_and_nothing_is_sent(hub, saved):
    os.mkfifo(saved / "LICENSE")
    with pytest.raises(CheckpointError, match=r"LICENSE: .*not a regular file"):
        push_folder(saved, REPO)
    assert hub.seen == []


def test_one_shard_of_several_and_an_index_of_other_folders_are_refused(hub, saved, capsys):
    pulled(saved).save_pretrained(saved, max_shard_size="4KB")
    shards = sorted(saved.glob("model-*.safetensors"))
    assert len(shards) > 2
    index = saved / "model.safetensors.index.json"
    good = index.read_text(encoding="utf-8")
    index.write_text(good.replace(shards[0].name, f"../{shards[0].name}"), encoding="utf-8")
    with pytest.raises(CheckpointError, match="which is not a file of its folder"):
        push_folder(saved, REPO)
    index.write_text(good, encoding="utf-8")
    for shard in shards[1:]:
        shard.unlink()
    for verb in (["push", str(saved), REPO], ["card", str(saved)]):
        assert main(verb) == 2
        assert f"1 of {len(shards)} shards are there" in capsys.readouterr().err
    assert hub.seen == []


def test_weights_with_a_name_that_is_not_pushed_are_refused(hub, saved):
    (saved / "model.safetensors").rename(saved / "weights.safetensors")
    with pytest.raises(CheckpointError, match="no weights with a name that is pushed"):
        push_folder(saved, REPO)
    assert hub.seen == []


@pytest.mark.parametrize("token", ["hf_secret\nX: y", "hf_ secret", "hf_sécret", ""])
def test_token_that_is_none_is_refused_and_not_shown(hub, saved, token):
    with pytest.raises(RecipeError, match="`token` must be one word") as refused:
        push_folder(saved, REPO, token=token)
    assert "ret" not in str(refused.value)
    assert hub.seen == []


def test_token_with_the_line_feed_of_its_file_is_taken(hub, saved):
    push_folder(saved, REPO, token=f"{WRITER}\n")
    assert_same(saved)


@pytest.mark.parametrize(
    "text", ["Illegal header value b'Bearer hf_secret\\n'", "Bearer secret", "token hf_jwt_secret."]
)
def test_token_in_an_error_of_the_client_is_not_shown(hub, saved, monkeypatch, text):
    def refuse(*_, **__):
        raise ValueError(text)

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(HubError, match=r"\*\*\*") as refused:
        push_folder(saved, REPO)
    shown = "".join(traceback.format_exception(refused.value))
    assert "secret" not in shown


def test_what_is_not_there_or_private_cannot_be_loaded(hub, saved, monkeypatch):
    push_folder(saved, REPO, private=True)
    with pytest.raises(OSError, match="is not a local folder"):
        pulled("user/other")
    with pytest.raises(OSError, match="v9"):
        pulled(revision="v9")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match="private repository"):
        pulled()


def test_weights_damaged_on_the_way_are_refused(hub, saved):
    push_folder(saved, REPO)
    [oid] = hub.objects
    hub.objects[oid] = hub.objects[oid][:-1] + bytes([hub.objects[oid][-1] ^ 1])
    with pytest.raises(CheckpointError):
        pulled()
