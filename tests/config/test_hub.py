"""Models by their names on the hub: from a cache as Hugging Face's tools leave it, and from a stand-in of the hub."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import huggingface_hub.constants
import jax
import numpy as np
import pytest

from rlver_jax import evaluate, train
from rlver_jax.config import fields, hub
from rlver_jax.config.hub import HubError, fault, is_name, local_folder, short_name
from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.hf_weights import load_params, save_params
from rlver_jax.models.qwen import Qwen2, init_params
from rlver_jax.runs.fingerprints import model_fingerprint
from rlver_jax.text.tokenizer import load_tokenizer
from tests.config.hub_server import Hub, serve
from tests.quick import QUICK

NAME = "some-org/Tiny.Model-0.1B"
HASH, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40


@pytest.fixture(scope="module")
def plain(tmp_path_factory, bpe_folder):
    """A random tiny model's plain folder, in two shards, with a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "plain"
    config = Qwen2Config(load_tokenizer(bpe_folder).vocab_size, 16, 24, 2, 2, 1, 8, tie_embeddings=True)
    params = init_params(Qwen2(config), jax.random.key(0))
    save_params(folder, params, config, tokenizer_from=bpe_folder, max_shard_bytes=30_000)
    assert len(list(folder.glob("model-*.safetensors"))) == 2
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty HF_HOME."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    hub._fetched.cache_clear()
    return tmp_path / "hf"


@pytest.fixture
def online(home, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return home


def cached(home, source, commit=HASH, refs=("main",)):
    """What `hf download` leaves: blobs by their hashes, and relative links to them in a snapshot."""
    top = home / "hub" / f"models--{NAME.replace('/', '--')}"
    snapshot = top / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (top / "blobs").mkdir(exist_ok=True)
    for file in source.iterdir():
        blob = top / "blobs" / f"{commit[:4]}{abs(hash(file.name)):x}"
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    for ref in refs:
        (top / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (top / "refs" / ref).write_text(commit)
    return snapshot


def equal(name, plain):
    """The model, its weights and its tokenizer by that name are those of the plain folder."""
    model = Qwen2(Qwen2Config.from_hf(plain))
    assert Qwen2Config.from_hf(name) == model.config
    jax.tree.map(np.testing.assert_array_equal, load_params(name, model), load_params(plain, model))
    assert load_tokenizer(name).fingerprint == load_tokenizer(plain).fingerprint


@pytest.mark.parametrize("revision", ["", "@main", "@v1.0", "@refs/pr/3", f"@{HASH}"])
def test_a_cached_model_by_its_name_offline(home, plain, revision):
    snapshot = cached(home, plain, refs=("main", "v1.0", "refs/pr/3"))
    equal(NAME + revision, plain)
    assert local_folder(NAME + revision) == snapshot


def test_revisions_are_told_apart(home, plain):
    one, other = cached(home, plain), cached(home, plain, OTHER, ("v2",))
    assert [local_folder(f"{NAME}{r}") for r in ("", "@v2", f"@{OTHER}")] == [one, other, other]
    with pytest.raises(HubError, match="doesn't hold config.json"):
        local_folder(f"{NAME}@v3")


def test_the_folder_of_the_cache_itself_is_told_what_to_name(home, plain):
    snapshot = cached(home, plain)
    top = snapshot.parent.parent
    for folder in (top, top / "snapshots"):
        assert fault(str(folder)).endswith(f"name {NAME}, or its folder {snapshot}")
        with pytest.raises(HubError, match=f"name {NAME}, or its folder .*/{HASH}"):
            Qwen2Config.from_hf(folder)
    equal(snapshot, plain)
    (top / "refs" / "main").unlink()
    assert str(snapshot) in fault(str(top))


def test_snapshots_with_something_missing(home, plain):
    """A download that was interrupted: a shard has no link yet, or its link leads nowhere."""
    snapshot = cached(home, plain)
    shard = snapshot / "model-00002-of-00002.safetensors"
    shard.resolve().unlink()
    assert local_folder(NAME) == snapshot, "config and tokenizer are there"
    with pytest.raises(HubError, match="doesn't hold config.json, a tokenizer and safetensors of it.*hf download"):
        local_folder(NAME, weights=True)
    shard.unlink()
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        local_folder(NAME, weights=True)
    (snapshot / "tokenizer.json").unlink()
    hub._fetched.cache_clear()
    with pytest.raises(HubError, match="doesn't hold config.json and a tokenizer"):
        local_folder(NAME)


def test_what_is_local_is_never_taken_for_a_name(home, plain, tmp_path):
    shutil.copytree(plain, tmp_path / NAME)
    assert not is_name(NAME)
    assert local_folder(NAME) == Path(NAME)
    equal(NAME, plain)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/such", "no such folder"),
        ("runs", "no such folder, and no name on the Hugging Face hub"),
        ("a/b/c", "no such folder"),
        ("../org/name", "no such folder"),
        ("./org/name", "no such folder"),
        ("~/org", "no such folder"),
        ("org/a..b", "no such folder"),
        ("org/name@../../x", "no such folder"),
        ("org/name@", "no such folder"),
        ("org/name.git", "no such folder"),
        ("gs://bucket/model", "no such folder"),
        (
            "Qwen/Qwen2.5-7B/",
            "no such folder; for the model of that name on the Hugging Face hub write Qwen/Qwen2.5-7B",
        ),
        ("hf.co/Qwen/Qwen2.5-7B", "name on the Hugging Face hub, Qwen/Qwen2.5-7B"),
        ("https://huggingface.co/Qwen/Qwen2.5-7B/tree/main", "name on the Hugging Face hub, Qwen/Qwen2.5-7B"),
        ("hf://Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B"),
    ],
)
def test_what_is_no_name(home, path, message):
    assert not is_name(path)
    assert message in fault(path)


@pytest.mark.parametrize("path", ["Qwen/Qwen2.5-7B-Instruct", "a/b@v1.0", "a_b/c.d@refs/pr/1", f"a/b@{HASH}"])
def test_what_is_a_name(home, path):
    assert is_name(path)
    assert fault(path) == ""


def test_short_names(home, plain):
    assert short_name(f"{NAME}@v1") == "Tiny.Model-0.1B"
    assert short_name(cached(home, plain)) == "Tiny.Model-0.1B"
    assert short_name(plain) == "plain"


def test_a_mistyped_folder_is_told_what_it_was_taken_for(home, tmp_path):
    (tmp_path / "models" / "qwen-0.5b").mkdir(parents=True)
    with pytest.raises(HubError, match=r"'models/qwen-0.5': no such folder, so it was taken for a model on the"):
        local_folder("models/qwen-0.5")
    assert fault("./models/qwen-0.5") == "no such folder; did you mean models/qwen-0.5b?"


def of_folder(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def more(plain):
    """A repository as they are published: other formats, pictures and subfolders beside what is needed."""
    others = ("README.md", "pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx", "model.fp16.safetensors")
    return of_folder(plain) | dict.fromkeys(others, b"not needed")


@pytest.fixture
def published(online, plain, monkeypatch):
    with serve(Hub({NAME: {"main": more(plain), "v1": of_folder(plain)}})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def test_downloads_once_and_only_what_is_needed(published, online, plain, monkeypatch):
    small = local_folder(NAME)
    assert {file.name for file in small.iterdir()} == {f for f in of_folder(plain) if not f.endswith(".safetensors")}
    equal(NAME, plain)
    assert {file.name for file in small.iterdir()} == set(of_folder(plain))
    asked = len(published.asked)
    hub._fetched.cache_clear()  # as another process would begin
    equal(NAME, plain)
    assert len(published.asked) == asked, published.asked[asked:]
    published.repositories[NAME]["main"] = {"config.json": b"{}"}  # a new commit: the cached one stays
    equal(NAME, plain)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub._fetched.cache_clear()
    equal(NAME, plain)
    assert len(published.asked) == asked


def test_downloads_chat_templates_in_a_folder_of_their_own(published):
    text = b"{{ messages }}"
    published.repositories[NAME]["main"]["additional_chat_templates/default.jinja"] = text
    assert (local_folder(NAME) / "additional_chat_templates" / "default.jinja").read_bytes() == text


def test_downloads_a_revision(published, plain):
    sha = published.commit(NAME, "v1")
    assert local_folder(f"{NAME}@v1").name == sha
    equal(f"{NAME}@v1", plain)
    hub._fetched.cache_clear()
    equal(f"{NAME}@{sha}", plain)


def test_goes_on_with_an_interrupted_download(published, online, plain, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)  # the library waits between its attempts
    published.cut = "model-00002-of-00002.safetensors"
    with pytest.raises(HubError, match="didn't send it .*The same command resumes it"):
        local_folder(NAME, weights=True)
    published.cut = ""
    before = len(published.asked)
    equal(NAME, plain)
    assert not any("model-00001" in request for request in published.asked[before:] if request.startswith("GET"))


def test_what_the_hub_does_not_give(published, online, plain, monkeypatch):
    for name, parts in (
        ("nobody/none", ["no such folder, so it was taken for", "has none of that name", "HF_TOKEN"]),
        (f"{NAME}@v9", ["has no branch, tag or commit 'v9'"]),
    ):
        with pytest.raises(HubError) as error:
            local_folder(name)
        assert all(part in str(error.value) for part in parts), error.value
    published.gated.add(NAME)
    with pytest.raises(HubError, match=f"gives access on request; ask at {published.url}/{NAME}, and set HF_TOKEN"):
        local_folder(NAME)
    published.gated.clear()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 10))
    with pytest.raises(HubError, match="GB are still to be fetched.*HF_HUB_CACHE"):
        local_folder(NAME, weights=True)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json", "tokenizer.json", "pytorch_model.bin"], "PyTorch weights"),
        (["model-q4.gguf"], "llama.cpp"),
        (["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"], "LoRA adapter"),
        (["README.md"], "doesn't hold config.json, a tokenizer and safetensors, but README.md"),
        (["config.json", "model.safetensors"], "doesn't hold config.json, a tokenizer and safetensors"),
    ],
)
def test_repositories_of_another_kind(published, files, message):
    published.repositories["an/other"] = {"main": dict.fromkeys(files, b"{}")}
    with pytest.raises(HubError, match=message):
        local_folder("an/other", weights=True)


def test_without_a_network(online, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    began = time.monotonic()
    with pytest.raises(HubError, match="could not be reached .*hf download some-org.*or name a local folder"):
        local_folder(NAME)
    assert time.monotonic() - began < 10


@pytest.mark.slow
def test_a_hub_that_never_answers(online, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(HubError, match="could not be reached"):
            local_folder(NAME)
        assert time.monotonic() - began < 60


def test_folders_of_another_kind(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(HubError, match="no config.json, but adapter_model.safetensors is there: a LoRA adapter"):
        Qwen2Config.from_hf(tmp_path)


@pytest.mark.slow
def test_commands_take_names(home, plain, tmp_path):
    """In a process of its own, as a user starts it: HF_HOME, and nothing else, tells where the model is."""
    cached(home, plain)
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment |= {"HF_HOME": str(home), "XLA_FLAGS": QUICK}
    rounds = ("--config.eval.num_profiles=1", "--config.eval.max_turns=1", "--config.rollout.context=2048")
    command = [sys.executable, "-m", "rlver_jax.evaluate", f"--config={root}/configs/debug.py", *rounds]
    options = [f"--config.user.path={NAME}", f"--checkpoint={NAME}@main", f"--judge={NAME}", "--out=out"]
    done = subprocess.run([*command, *options], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["settings"]["policy.path"] == f"{NAME}@main"
    assert summary["n"] == 1
    assert (tmp_path / "out" / "judges" / "Tiny.Model-0.1B.jsonl").exists()


@pytest.mark.parametrize("command", [train, evaluate])
def test_commands_say_what_a_name_was_taken_for(home, tmp_path, command, capsys):
    """Before anything is compiled, and in one line."""
    config = Path(__file__).resolve().parents[2] / "configs" / "debug.py"
    folder = "workdir" if command is train else "out"
    assert command.main([f"--config={config}", f"--{folder}=new", "--config.user.path=some-org/none"]) == 2
    error_text = capsys.readouterr().err
    assert (
        f"{command.__name__.rpartition('.')[2]}: 'some-org/none': no such folder, so it was taken for a model"
        in error_text
    )
    assert "hf download some-org/none" in error_text
    assert not (tmp_path / "new").exists()


def test_a_fingerprint_is_that_of_the_files(home, plain):
    """So an evaluation goes on whether its model is given by name or by folder."""
    cached(home, plain)
    config = fields.get_config().user
    config.path = NAME
    named = model_fingerprint(config, "user")
    config.path = str(plain)
    assert model_fingerprint(config, "user") == named


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_a_cache_that_is_no_local_folder(variable, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv(variable, "gs://bucket/cache")
    with pytest.raises(HubError, match=r"HF_HOME or HF_HUB_CACHE names the cache gs://bucket/cache.* is a URL"):
        local_folder("Org/Model")
    assert list(tmp_path.iterdir()) == []
