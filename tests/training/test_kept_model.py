"""What a run keeps of its base model: whole, enough to go on without it, and told apart from another model's."""

import json
import shutil

import jax
import pytest

from configs import debug
from rlver_jax.config.flags import config_from_flags, path_override
from rlver_jax.config.validate import ConfigError, flatten
from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.hf_weights import load_params, save_params
from rlver_jax.models.qwen import Qwen2, init_params
from rlver_jax.text.tokenizer import load_tokenizer
from rlver_jax.training.kept_model import check_same_model, keep_model, kept_model
from rlver_jax.training.trained_policy import TrainedPolicy, take_checkpoint
from rlver_jax.training.workdir import RunFolder
from tests.text.conftest import TEMPLATE, write_bpe


@pytest.fixture
def base(tmp_path):
    return shutil.copytree(debug.WORLD, tmp_path / "base")


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


def opened(workdir, base, **fields):
    """A run's folder; with `steps`, as if so many had been saved."""
    config = debug.get_config("")
    config.update_from_flattened_dict({"policy.path": str(base)} | fields)
    return RunFolder.open(workdir, config, free_fields=())


def saved(folder, step=2):
    (folder.checkpoints / f"{step:06d}").mkdir(parents=True)


def test_everything_but_weights_is_kept(base, tmp_path):
    (base / "chat_template.jinja").write_text(TEMPLATE)
    (base / "generation_config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "model.tmp").mkdir()
    (tmp_path / "model.tmp" / "half").write_text("of an interrupted copy")
    keep_model(tmp_path, base)
    stored = kept_model(tmp_path)
    left_out = {file.name for file in base.iterdir()} - {file.name for file in stored.iterdir()}
    assert left_out == {"profiles.jsonl", "prompts", "model.safetensors"}
    for file in stored.iterdir():
        assert file.read_bytes() == (base / file.name).read_bytes()
    assert Qwen2Config.from_hf(stored) == Qwen2Config.from_hf(base)
    assert load_tokenizer(stored).fingerprint == load_tokenizer(base).fingerprint
    assert not (tmp_path / "model.tmp").exists()


def test_templates_in_a_folder_of_their_own_are_kept_and_exported(base, tmp_path):
    """Where `default` is among them it is what AutoTokenizer takes."""
    plain = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    (base / "additional_chat_templates").mkdir()
    text = plain + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (base / "additional_chat_templates" / "default.jinja").write_text(text)
    (base / "additional_chat_templates").chmod(0o555)
    keep_model(tmp_path, base)
    config = Qwen2Config.from_hf(base)
    save_params(tmp_path / "out", init_params(Qwen2(config), jax.random.key(0)), config, tokenizer_from=base)
    for folder in (kept_model(tmp_path), tmp_path / "out"):
        assert load_tokenizer(folder).template.source == text


def test_a_run_is_no_model_and_a_model_no_run(base, tmp_path):
    """Each message says what to do with what was given."""
    saved(opened(tmp_path / "run", base))
    with pytest.raises(ValueError, match=r"config of a training run.*--checkpoint=.*run.*export --workdir=.*run"):
        Qwen2Config.from_hf(tmp_path / "run")
    model_folder = tmp_path / "run" / "model"
    with pytest.raises(ValueError, match=r"what a training run keeps.*--checkpoint=.*run .*export --workdir=.*run"):
        load_params(model_folder, Qwen2(Qwen2Config.from_hf(model_folder)))
    (base / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(ValueError, match=r"base/checkpoints: no such folder.*holds a model, which needs no export"):
        TrainedPolicy.open(base)
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"other/checkpoints: no such folder.*holds nothing"):
        TrainedPolicy.open(tmp_path / "other")


def test_a_sentencepiece_file_of_any_name_is_kept(base, tmp_path):
    (base / "tokenizer.model").rename(base / "spm.model")
    keep_model(tmp_path, base)
    assert load_tokenizer(kept_model(tmp_path)).encode("a") == load_tokenizer(base).encode("a")


def test_files_behind_links_are_kept_as_files(base, tmp_path):
    """As in a Hugging Face cache: snapshots hold links to blobs."""
    (tmp_path / "blobs").mkdir()
    for file in [*base.iterdir()]:
        file.rename(tmp_path / "blobs" / file.name)
        file.symlink_to(tmp_path / "blobs" / file.name)
    keep_model(tmp_path, base)
    assert not any(file.is_symlink() for file in kept_model(tmp_path).iterdir())
    shutil.rmtree(tmp_path / "blobs")
    assert load_tokenizer(kept_model(tmp_path)).vocab_size


def test_an_older_run_gets_it_when_it_goes_on(base, tmp_path):
    opened(tmp_path / "run", base)
    shutil.rmtree(tmp_path / "run" / "model")
    assert kept_model(opened(tmp_path / "run", base).path)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_hidden_layers": 7}, "num_layers is 7, not"),
        ({"rope_theta": 123.0}, "rope_theta is 123.0, not"),
        ({"max_position_embeddings": 123_456}, ""),
    ],
)
def test_another_architecture_is_refused_with_both_names(base, tmp_path, fields, says):
    keep_model(tmp_path, base)
    change_config(base, **fields)
    if not says:  # a longer context is no other model
        return check_same_model(base, kept_model(tmp_path))
    with pytest.raises(ValueError, match=says) as error:
        check_same_model(base, kept_model(tmp_path))
    assert str(base) in str(error.value)
    assert str(kept_model(tmp_path)) in str(error.value)


def test_another_tokenizer_is_refused_with_both_names(base, tmp_path):
    keep_model(tmp_path, base)
    (base / "tokenizer.model").unlink()
    write_bpe(base)
    with pytest.raises(ValueError, match="another tokenizer") as error:
        check_same_model(base, kept_model(tmp_path))
    assert str(base) in str(error.value)
    assert str(kept_model(tmp_path)) in str(error.value)


def test_the_base_may_move_once_there_are_checkpoints(base, tmp_path):
    """Before, and where the KL's reference is the base, its weights are needed."""
    folder = opened(tmp_path / "run", base)
    folder.metrics.write_text('{"step": 1}\n')
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"policy\.path was .*base', is .*moved'"):
        opened(tmp_path / "run", moved)
    saved(folder)
    assert opened(tmp_path / "run", moved).config()["policy.path"] == str(moved)
    config = debug.get_config("")
    config.policy.path = str(base)
    loaded = folder.to_load(config)
    assert (loaded.policy.path, loaded.policy.init, loaded.critic.init) == (
        str(tmp_path / "run" / "model"),
        "random",
        "random",
    )
    assert config.policy.path == str(base), "the run's own config stays"
    config.loss.kl = 0.1
    assert folder.to_load(config).policy.path == str(base)
    assert not folder.resumes_without_base(flatten(config))
    config.reference.path = str(moved)
    assert folder.resumes_without_base(flatten(config))


def test_a_run_does_not_go_on_with_another_model(base, tmp_path):
    folder = opened(tmp_path / "run", base)
    saved(folder)
    with pytest.raises(ValueError, match="hidden_size|intermediate_size"):
        opened(tmp_path / "run", change_config(base, intermediate_size=12))


@pytest.fixture
def run(base, tmp_path, monkeypatch):
    """(a run that says it has a checkpoint, its base model)."""
    folder = opened(tmp_path / "run", base)
    saved(folder)
    monkeypatch.setattr("rlver_jax.training.trained_policy._number", lambda checkpoints, step: 2)
    monkeypatch.setattr("rlver_jax.training.checkpoints.Checkpoints.fingerprint", lambda self, step: "f")
    return folder.path, base


def taken(run, *flags):
    config, options, _ = config_from_flags([f"--config={debug.__file__}", *flags], "")
    trained = take_checkpoint(config, str(run), "", path_override(options))
    assert trained.config.policy.path == config.policy.path
    return config.policy.path


def test_the_runs_own_is_taken_unless_the_command_line_names_another(run, tmp_path):
    workdir, base = run
    assert taken(workdir) == str(workdir / "model"), "the config file's own path is not explicit"
    assert taken(workdir, f"--config.policy.path={base}") == str(base)
    assert taken(workdir, "--config.policy.path", str(base)) == str(base)
    moved = base.rename(tmp_path / "moved")
    assert taken(workdir) == str(workdir / "model")
    with pytest.raises(ValueError, match=r"no such folder.*; leave it out to take the run's own"):
        taken(workdir, f"--config.policy.path={base}")
    with pytest.raises(ValueError, match="is another model than the run's"):
        taken(workdir, f"--config.policy.path={change_config(moved, hidden_size=1024)}")


def test_a_run_of_an_older_version_needs_its_base(run, tmp_path):
    workdir, base = run
    shutil.rmtree(workdir / "model")
    assert taken(workdir) == str(base)
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"keeps no config and tokenizer.*base' is gone; give .*--config.policy.path"):
        taken(workdir)
    assert taken(workdir, f"--config.policy.path={moved}") == str(moved)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rollout.no_such": 3}, r"rollout.no_such=3: unknown field"),
        ({"policy.dtype": "float16"}, r"policy.dtype='float16': expected one of"),
        ({"rollout.batch": "many"}, r"rollout.batch='many': is str, expected int"),
        ({"emotion.thresholds": [90, 70]}, r"emotion.thresholds=\(90, 70\): expected four"),
    ],
)
def test_a_config_of_another_version_is_named(run, change, says):
    workdir, _ = run
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=says) as error:
        TrainedPolicy.open(workdir)
    assert str(workdir / "config.json") in str(error.value)


def test_fields_that_an_older_version_did_not_have_are_named(run):
    workdir, _ = run
    config = json.loads((workdir / "config.json").read_text())
    del config["train.padding"]
    (workdir / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"config.json: .*has no train.padding .0.1 is taken.$"):
        assert TrainedPolicy.open(workdir).config.train.padding == 0.1
