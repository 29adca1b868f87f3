"""Only local paths are taken, in every flag and field that holds one; anything else is refused before anything else."""

import importlib
import os
from pathlib import Path

import pytest
from absl import flags
from ml_collections.config_flags import config_flags

from configs.base import get_config
from rlver_jax.config import fields
from rlver_jax.config import flags as command_line
from rlver_jax.config.fields import FIELDS, PATHS
from rlver_jax.config.paths import (
    PathError,
    cache_folder,
    check_file_to_write,
    check_folder_to_write,
    fault,
    local,
    nearest,
)
from rlver_jax.config.validate import ConfigError, flatten, validate

PACKAGE = Path(command_line.__file__).parents[1]
COMMANDS = sorted(
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    for file in PACKAGE.rglob("*.py")
    if 'if __name__ == "__main__":' in file.read_text(encoding="utf-8") and file.name != "__main__.py"
)
WORDS = {"step", "name", "host", "profile", "topology", "coordinator", "adapter"}  # text that is no path; NAME=FOLDER
TEXTS = {
    "log.wandb",
    "reward.function",
    "metrics.functions",
    "eval.judge",
    "lora.targets",
    "sft.weights",
    *(f"remote.{s}.{n}" for s in ("policy", "user") for n in ("url", "model", "key_env", "extra")),
}
URLS = [
    "gs://bucket/run",
    "gs:/bucket/run",
    "s3://b/x",
    "hf://a/b",
    "HTTPS://h/x",
    "file:///x",
    "x-y+z.1://h",
    " gs://b",
    "'gs://b/x'",  # quotes that no shell took away
    '"s3://b/x"',
    "/home/me/gs://b/x",  # what joining a folder and a URL gives
    "./gs:/b/x",
]


def flags_of(command, monkeypatch):
    """All flags of an entry point, as it defines them."""
    calls = []
    monkeypatch.setattr(command_line, "_help", lambda usage, values: calls.append(values) or "")
    with pytest.raises(SystemExit):
        importlib.import_module(command).main(["--help"])
    return {name: calls[0][name] for name in calls[0]}


@pytest.fixture(autouse=True)
def nothing_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(os.listdir())
    yield
    assert not {name for name in set(os.listdir()) - before if ":" in name or "~" in name}


def test_there_are_commands():
    assert {"rlver_jax.train", "rlver_jax.serve", "rlver_jax.miniature.build"} <= set(COMMANDS)
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_with_text_takes_a_path_or_is_known_not_to(command, monkeypatch, capsys):
    """A flag that is added as plain text fails here: either it is a path, or it is named above."""
    known_flags = flags_of(command, monkeypatch)
    texts = {
        name
        for name, flag in known_flags.items()
        if type(flag.parser) is flags.ArgumentParser or isinstance(flag.parser, flags.ListParser)
    } - {"flagfile", "undefok"}
    assert texts <= WORDS
    if "config" in known_flags:
        assert isinstance(known_flags["config"].parser, config_flags.ConfigFileFlagParser)
    main = importlib.import_module(command).main
    paths = [name for name, flag in known_flags.items() if isinstance(flag.parser, command_line.PathParser)]
    for name in [*paths, *({"config"} & set(known_flags))]:
        capsys.readouterr()
        assert main([f"--{name}=gs://bucket/x"]) == 2
        assert f"--{name}=gs://bucket/x: is a URL" in (told := capsys.readouterr().err)
        assert "gcsfuse" in told


def test_fields_with_text_are_paths_or_known_not_to_be():
    texts = {name for name, value in flatten(fields.get_config()).items() if isinstance(value, str)}
    named = {name for name, field in FIELDS.items() if field.choices or field.registry}
    assert texts - named - TEXTS == set(PATHS)


@pytest.mark.parametrize("command", ["verify", "report", "miniature.compare"])
def test_words_that_are_paths(command, capsys, tmp_path):
    more = {"verify": ["--config=configs/debug.py"], "report": [f"--out={tmp_path}/r.html"]}.get(command, [])
    assert importlib.import_module(f"rlver_jax.{command}").main(["s3://bucket/x", *more]) == 2
    assert "s3://bucket/x: is a URL" in capsys.readouterr().err


@pytest.mark.parametrize("url", URLS)
def test_urls_are_refused_with_a_remedy(url):
    assert "is a URL" in fault(url)
    with pytest.raises(PathError, match="is a URL"):
        local(url)


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("gs://bucket/a/b", "gcsfuse --implicit-dirs bucket FOLDER"),
        ("gs:/bucket/a/b", "gcloud storage cp -r gs://bucket/a/b FOLDER"),
        ("gs://bucket/a/b", "launch/tpu_pod.sh"),
        ("file:///data/x", "write the path itself, /data/x"),
        ("file://localhost/data/x", "write the path itself, /data/x"),
        ("hf://Qwen/Qwen2.5-7B", "by its name alone, Qwen/Qwen2.5-7B;"),
        ("https://huggingface.co/Qwen/Qwen2.5-7B/tree/main", "by its name alone, Qwen/Qwen2.5-7B;"),
        ("https://example.com/a/b", "Mount what holds it, or download it"),
        ("s3://b/x", "Mount what holds it, or download it"),
    ],
)
def test_the_remedy_fits_the_scheme(url, remedy):
    assert remedy in fault(url)


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "/",
        "runs/a b",
        "a:b",
        "runs/x:y",
        "C:/x",
        'it\'s "so"',
        "-dash",
        "中文/路径",
        "new\nline",
        "a~b",
        "./~x",
        "gs",
        "gs:",
    ],
)
def test_local_paths_stay_as_they_are(path):
    assert local(path) == path


def test_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/some/home")
    assert local("~/runs") == "/some/home/runs"
    assert local("~") == "/some/home"
    with pytest.raises(PathError, match="there is no home folder ~no_such_user"):
        local("~no_such_user/runs")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("  ", "blank"),
        ("a\0b", "zero byte"),
        ("\udcff", "PYTHONUTF8"),
        ("x" * 256, "256 bytes"),
        ("路" * 86, "258 bytes"),
        ("x/" * 2100, "too long"),
    ],
)
def test_what_can_be_no_path(path, says):
    assert says in fault(path)


@pytest.mark.parametrize("name", PATHS)
def test_every_field_is_checked_and_its_home_folder_found(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config, _, _ = command_line.config_from_flags(["--config=configs/debug.py", f"--config.{name}=~/x"], "")
    assert flatten(config)[name] == f"{tmp_path}/x"
    config.update_from_flattened_dict({name: "gs://bucket/x"})
    with pytest.raises(ConfigError, match=rf"{name}='gs://bucket/x': is a URL"):
        validate(config)


def test_each_of_several_files_is_checked(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--config=configs/debug.py", "--config.data.train=~/a.jsonl,~/b.jsonl", "--config.data.eval=a,s3://b/c"]
    config, _, _ = command_line.config_from_flags(words, "")
    assert config.data.train == f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl"
    with pytest.raises(ConfigError, match=r"data.eval='a,s3://b/c': is a URL"):
        validate(config)


def test_addresses_of_endpoints_are_no_paths():
    config = fields.get_config()
    config.remote.user.url, config.remote.user.model = "http://127.0.0.1:8000/v1", "m"
    validate(config)


def test_a_config_file_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.py").write_text("from configs import debug\nget_config = debug.get_config\n")
    assert command_line.config_from_flags(["--config=~/a.py:ppo"], "")[0].algorithm.estimator == "gae"


def test_folders_to_write(tmp_path):
    (tmp_path / "file").write_text("x")
    check_folder_to_write(tmp_path)
    check_folder_to_write(tmp_path / "a" / "b")
    with pytest.raises(PathError, match="file: is no folder"):
        check_folder_to_write(tmp_path / "file")
    with pytest.raises(PathError, match=r"cannot be made, since .*file is no folder"):
        check_folder_to_write(tmp_path / "file" / "a" / "b")


def test_files_to_write(tmp_path):
    check_file_to_write(tmp_path / "a")
    for path, says in [
        (tmp_path, "is a folder"),
        (tmp_path / "a" / "b", "its folder does not exist"),
        (tmp_path / ("x" * 252), "too long"),  # NAME_MAX, less what is written beside
    ]:
        with pytest.raises(PathError, match=says):
            check_file_to_write(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_permissions(tmp_path):
    tmp_path.chmod(0o555)
    for check in (check_file_to_write, check_folder_to_write):
        with pytest.raises(PathError, match="may not be written"):
            check(tmp_path / "a")


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_file_in_the_folders_place(command, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    flag = {"train": "--workdir", "evaluate": "--out"}[command]
    main = importlib.import_module(f"rlver_jax.{command}").main
    assert main(["--config=configs/debug.py", f"{flag}={tmp_path}/file"]) == 2
    assert "file: is no folder; name another one" in capsys.readouterr().err


def test_no_home_and_no_place_for_a_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder("a") == tmp_path / "cache" / "rlver_jax" / "a"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "rlver_jax"
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert cache_folder() is None


@pytest.mark.parametrize("home", ["gs://bucket/home", "relative"])
def test_a_home_that_is_no_path_gets_no_folder(home, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", home)
    assert cache_folder("a") is None
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("given", "is_meant"),
    [
        ("support/trian.jsonl", "support/train.jsonl"),
        ("suport/train.jsonl", "support/train.jsonl"),
        ("suport/tran.jsonl", "support/train.jsonl"),
        ("support/prompt", None),  # a folder, but a file is wanted
        ("elsewhere/train.jsonl", None),
        ("/no/such/folder/train.jsonl", None),
    ],
)
def test_what_is_nearly_called_so_is_found(given, is_meant, tmp_path):
    (tmp_path / "support/prompts").mkdir(parents=True)
    (tmp_path / "support/train.jsonl").touch()
    assert nearest(tmp_path / given) == (is_meant and tmp_path / is_meant)
    assert nearest(tmp_path / "support/prompt", Path.is_dir) == tmp_path / "support/prompts"


def test_a_config_says_what_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "support/prompts").mkdir(parents=True)
    (tmp_path / "support/train.jsonl").touch()
    config = get_config()
    config.data.train, config.data.eval = "support/trian.jsonl", "none.jsonl"
    config.user.prompts = "support/prompt"
    with pytest.raises(ConfigError) as caught:
        validate(config)
    for line in (
        "data.train='support/trian.jsonl': support/trian.jsonl is not a file; did you mean support/train.jsonl?",
        "data.eval='none.jsonl': none.jsonl is not a file; expected JSONL profiles",
        "user.prompts='support/prompt': no such folder; did you mean support/prompts?",
    ):
        assert line in str(caught.value)
