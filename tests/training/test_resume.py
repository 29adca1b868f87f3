"""What a run goes on with: the same files wherever they lie, and no others. Folders are opened; nothing is trained."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import debug
from rlver_jax.config.validate import flatten
from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.hf_weights import save_params
from rlver_jax.models.qwen import Qwen2, init_params
from rlver_jax.runs import fingerprints
from rlver_jax.training.loop import fingerprints_of
from rlver_jax.training.workdir import Contents, RunFolder

MODELS = ("policy", "user", "critic", "reference")


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A folder with four models of different weights, profiles in train.jsonl and eval.jsonl, and prompts/."""
    folder = tmp_path_factory.mktemp("origin")
    config = Qwen2Config.from_hf(debug.WORLD)
    for seed, name in enumerate(MODELS):
        params = init_params(Qwen2(config), jax.random.key(seed))
        save_params(folder / name, params, config, tokenizer_from=debug.WORLD)
    shutil.copytree(debug.WORLD / "prompts", folder / "prompts")
    lines = (debug.WORLD / "profiles.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:6]))
    (folder / "eval.jsonl").write_text("".join(lines[6:]))
    return folder


@pytest.fixture
def world(origin, tmp_path):
    return shutil.copytree(origin, tmp_path / "world")


def config_of(world, **fields):
    """PPO with a KL penalty: every model that a run can have, each from a folder of its own."""
    config = debug.get_config("ppo")
    for name in MODELS:
        config[name].path = str(world / name)
    config.policy.init = config.user.init = config.critic.init = "path"
    config.user.prompts, config.loss.kl = str(world / "prompts"), 0.1
    config.data.train, config.data.eval = str(world / "train.jsonl"), str(world / "eval.jsonl")
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


def opened(workdir, config):
    """(the run's folder, what was said)."""
    reports = []
    contents = Contents(lambda gone: fingerprints_of(config, gone), lambda name: fingerprints.described(name, config))
    folder = RunFolder.open(workdir, config, contents=contents, report=reports.append)
    return folder, reports


@pytest.fixture
def begun(world, tmp_path):
    """A run's folder, as if its second step had been saved."""
    folder, reports = opened(tmp_path / "run", config_of(world))
    assert reports == []
    (folder.checkpoints / "000002").mkdir(parents=True)
    return tmp_path / "run"


def refusal(workdir, config) -> str:
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds a run that began with others than these") as error:
        opened(workdir, config)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
    assert "give what it began with, at whatever path" in str(error.value)
    return str(error.value)


def test_everything_may_move(world, begun, tmp_path):
    moved = world.rename(tmp_path / "elsewhere")
    folder, reports = opened(begun, config_of(moved))
    assert reports == []
    assert folder.config()["user.path"] == str(moved / "user")
    (moved / "user").rename(tmp_path / "once_more")
    assert opened(begun, config_of(moved, user__path=str(tmp_path / "once_more")))[1] == []


def test_the_same_profiles_may_be_cut_into_other_files(world, begun):
    """And written with other white space, in SAGE's words or ours: what is read is compared."""
    lines = (world / "train.jsonl").read_text().splitlines(keepends=True)
    (world / "a.jsonl").write_text("\n".join(lines[:2]))
    (world / "b.jsonl").write_text(
        "".join(json.dumps(json.loads(line), ensure_ascii=True) + "\n" for line in lines[2:])
    )
    assert opened(begun, config_of(world, data__train=f"{world / 'a.jsonl'},{world / 'b.jsonl'}"))[1] == []
    message = refusal(begun, config_of(world, data__train=f"{world / 'b.jsonl'},{world / 'a.jsonl'}"))
    assert "the training profiles (data.train=" in message


def edit_text(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def edit_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name].flat[tensors[name].size // 3] += np.float32(0.01)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def reorder(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[1], lines[0], *lines[2:]]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda w: edit_text(w / "train.jsonl", '"player": "', '"player": "not '),
            "the training profiles (data.train=",
        ),
        (lambda w: reorder(w / "train.jsonl"), "the training profiles (data.train="),
        (lambda w: edit_text(w / "eval.jsonl", '"player": "', '"player": "not '), "the held-out profiles (data.eval="),
        (lambda w: edit_text(w / "prompts/reply.script", ":", " then:"), "the prompts of the user (user.prompts="),
        (lambda w: edit_text(w / "prompts/user_system.j2", "{{", "So {{"), "the prompts of the user (user.prompts="),
        (lambda w: (w / "prompts/policy_think.j2").write_text("Else."), "the prompts of the policy (user.prompts="),
        (lambda w: edit_weights(w / "user"), "the weights of the user model (user.path="),
        (lambda w: edit_weights(w / "policy"), "the weights of the policy model (policy.path="),
        (lambda w: edit_weights(w / "critic"), "the weights of the critic model (critic.path="),
        (lambda w: edit_weights(w / "reference"), "the weights of the reference model (reference.path="),
        (lambda w: (w / "user/tokenizer.model").write_bytes(b"x"), "the tokenizer of the user model"),
        (lambda w: edit_text(w / "user/config.json", '"rope_theta": 10', '"rope_theta": 20'), "the config of the user"),
    ],
    ids=lambda x: x if isinstance(x, str) else "change",
)
def test_what_has_changed_is_named(world, begun, change, says):
    change(world)
    message = refusal(begun, config_of(world))
    assert says in message
    assert ";" not in message.split("than these: ")[1].split("; give")[0], "nothing else is blamed"


def test_prompts_for_other_settings_and_notes_may_change(world, begun):
    """Only what the models read counts: not the prompt of the other mode, nor what a config.json says beside."""
    (world / "prompts" / "policy_direct.j2").write_text("Something else.")
    config = json.loads((world / "user" / "config.json").read_text())
    (world / "user" / "config.json").write_text(json.dumps(config | {"transformers_version": "9.9", "note": "x"}))
    (world / "user" / "README.md").write_text("x")
    (world / "user" / "trainer_state.json").write_text("{}")
    assert opened(begun, config_of(world))[1] == []


def test_weights_cut_into_shards_are_the_same(world, begun):
    file = world / "user" / "model.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for part, members in parts.items():
        save_file({name: tensors[name] for name in members}, world / "user" / part, {"format": "pt"})
    weight_map = {name: part for part, members in parts.items() for name in members}
    (world / "user" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    file.unlink()
    assert opened(begun, config_of(world))[1] == []


def test_a_base_model_that_is_gone_or_kept_only(world, begun):
    """With checkpoints its weights are not needed, unless the KL's reference is it."""
    gone = config_of(world, policy__path=str(world / "nowhere"))
    folder, reports = opened(begun, gone)
    assert reports == []
    assert folder.to_load(gone).policy.init == "random"
    stored = config_of(world, policy__path=str(begun / "model"))
    assert opened(begun, stored)[0].to_load(stored).policy.init == "random"
    assert opened(begun, config_of(world))[1] == [], "what it began with is still known"
    edit_weights(world / "policy")
    assert "the weights of the policy model" in refusal(begun, config_of(world))


def test_an_older_run_takes_the_present_files_and_says_so(world, begun):
    (begun / "fingerprints.json").unlink()
    with pytest.raises(ValueError, match=r"data.train was .*no fingerprints tell what lay there"):
        opened(begun, config_of(world, data__train=str(world / "eval.jsonl")))
    (report,) = opened(begun, config_of(world))[1]
    assert "no fingerprint of" in report
    assert "and 11 more (begun by an older version, or removed): taken as they are now" in report
    assert opened(begun, config_of(world))[1] == []


def test_before_anything_is_computed_files_may_be_corrected(world, tmp_path):
    """The command that was refused for a profile can be given again with a better one."""
    opened(tmp_path / "run", config_of(world))
    reorder(world / "train.jsonl")
    folder, reports = opened(tmp_path / "run", config_of(world))
    assert reports == []
    folder.metrics.write_text('{"step": 0}\n')
    reorder(world / "train.jsonl")
    assert "training profiles" in refusal(tmp_path / "run", config_of(world))


def test_a_broken_record_is_named(world, begun):
    for text, says in (("{", "cannot be read"), ('{"version": 7, "contents": {}}', "has version 7, expected 1")):
        (begun / "fingerprints.json").write_text(text)
        with pytest.raises(ValueError, match=rf"fingerprints.json: {says}.*remove it to take the files as they are"):
            opened(begun, config_of(world))


def change_record(workdir, **fields):
    """The run's config.json as another version wrote it; None: without the field."""
    record = json.loads((workdir / "config.json").read_text())
    record |= {name.replace("__", "."): value for name, value in fields.items()}
    (workdir / "config.json").write_text(json.dumps({n: value for n, value in record.items() if value is not None}))


def test_fields_of_newer_and_older_versions(world, begun):
    """The default of a new field is what was done before; what a removed one did cannot be done."""
    change_record(begun, rollout__top_k=None, reward__final_weight=None, eval__rows=None)
    folder, (report,) = opened(begun, config_of(world))
    assert "settings lack rollout.top_k=0, reward.final_weight=0.5: as here" in report or (
        "settings lack reward.final_weight=0.5, rollout.top_k=0: as here" in report
    )
    assert folder.config()["rollout.top_k"] == 0
    assert folder.config() == json.loads(json.dumps(flatten(config_of(world))))
    change_record(begun, rollout__top_k=None)
    with pytest.raises(ValueError, match=r"rollout.top_k did not exist, which was as 0, is 7"):
        opened(begun, config_of(world, rollout__top_k=7))
    change_record(begun, rollout__top_k=0, train__momentum=0.5)
    with pytest.raises(ValueError, match=r"train.momentum was 0.5, but this version of rlver_jax has no such field"):
        opened(begun, config_of(world))


def test_a_finish_that_says_nothing_is_named(world, begun):
    (begun / "finished.json").write_text("{}")
    with pytest.raises(ValueError, match=r"finished.json: says no step .*remove it to resume"):
        opened(begun, config_of(world))


def test_an_older_run_goes_on_with_other_spellings_of_its_paths(world, begun, tmp_path, monkeypatch):
    """No fingerprints tell what lay there, but it is the same place."""
    (begun / "fingerprints.json").unlink()
    monkeypatch.chdir(tmp_path)
    change_record(begun, user__path="world/user", data__train=f"./world/train.jsonl,{world}/../world/eval.jsonl")
    (report,) = opened(begun, config_of(world, data__train=f"{world}/train.jsonl,world/eval.jsonl"))[1]
    assert "taken as they are now" in report
    (begun / "fingerprints.json").unlink()
    with pytest.raises(ValueError, match=r"user.path was .*, is '.*/policy'"):
        opened(begun, config_of(world, user__path=str(world / "policy"), data__train=f"{world}/train.jsonl"))


def test_broken_metrics_are_named_before_anything_is_loaded(world, begun):
    (begun / "metrics.jsonl").write_text('{"step": 1}\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2 is of step 1, after one of step 1"):
        opened(begun, config_of(world))
