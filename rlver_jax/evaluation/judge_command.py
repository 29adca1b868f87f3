"""The parts of `evaluate` that judge: flags, the judges they name, and what is done with finished dialogues."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track

from rlver_jax.config.datasets import profile_files
from rlver_jax.config.fields import get_config
from rlver_jax.config.flags import config_from_flags, define_path, define_paths, import_remote, parse_flags
from rlver_jax.config.hub import is_name, short_name
from rlver_jax.config.validate import ConfigError, endpoint_sides, validate
from rlver_jax.dialogues.known_profiles import KnownProfiles
from rlver_jax.dialogues.log import REMEDY, Record, write_dialogues
from rlver_jax.endpoints.errors import EndpointError, Unavailable
from rlver_jax.evaluation import contexts, sage_option
from rlver_jax.evaluation.folder import DIALOGUES, PROGRESS, SUMMARY
from rlver_jax.evaluation.forms import load_forms
from rlver_jax.evaluation.judge import Judge
from rlver_jax.evaluation.judge_folder import Fingerprint
from rlver_jax.evaluation.judge_on_device import DeviceJudge
from rlver_jax.evaluation.judge_settings import judge_settings
from rlver_jax.evaluation.measures import summarize
from rlver_jax.evaluation.play import Tally
from rlver_jax.evaluation.rater import DeviceRater, Rater
from rlver_jax.evaluation.score import judge_transcripts, measure, measure_agreement, measure_record
from rlver_jax.evaluation.show import show_agreement, show_judges, show_scores
from rlver_jax.evaluation.statistics import mean_with_interval
from rlver_jax.evaluation.transcripts import (
    LazySequence,
    Transcript,
    TranscriptFiles,
    faults,
    turns_of,
    with_profile,
    with_profiles,
)
from rlver_jax.parallel.mesh import make_sampling_mesh
from rlver_jax.profiles.schema import Profile
from rlver_jax.profiles.sources import open_each
from rlver_jax.runs.files import write_json
from rlver_jax.runs.lock import LostLockError, hold
from rlver_jax.text.command import Command, Ending, run_command
from rlver_jax.text.console import plain_line
from rlver_jax.text.strict_json import half_character

SHOWN = 20  # faults that are printed
ENDINGS = {
    EndpointError: Ending(2),
    Unavailable: Ending(1),
    LostLockError: Ending(1),
    KeyboardInterrupt: Ending(130, "interrupted; with --out the same command resumes"),
}


def define_flags(values: flags.FlagValues) -> None:
    """Flags about judges; --judge and --measures also serve dialogues that are yet to be played."""
    kinds = "config files FILE[:ARG] or model folders"
    helps = {
        "judge": f"further users to score the same dialogues: {kinds}, comma-separated",
        "measures": "judge model for capabilities, relationship and qualities: a config file or a model folder",
    }
    define_paths("from", "", "score these finished dialogues (ours or SAGE's results)", values)
    sage_option.define_flag(values)
    define_paths("agreement", "", "compare the user's changes with the recorded ones in these files", values)
    contexts.define_flags(values)
    for name, text in helps.items():
        define_paths(name, "", text, values)


def of_finished(argv: Sequence[str]) -> bool:
    """Whether the arguments ask for dialogues that have been played."""
    return any(re.fullmatch(r"--?(from|agreement)(=.*)?", arg, re.DOTALL) for arg in argv) and "--help" not in argv


@dataclasses.dataclass(frozen=True)
class Judges:
    """The configs of what --judge and --measures name, checked; models are loaded one after another, when needed."""

    users: dict[str, ConfigDict]
    measurer: tuple[str, ConfigDict] | None

    @classmethod
    def of_flags(cls, options: flags.FlagValues, config: ConfigDict | None) -> "Judges":
        """Judges by name.

        Args:
            config: whose settings a judge has that is only a model's folder.

        Raises:
            ValueError: one that cannot be used, or two of one name.
        """
        users: dict[str, ConfigDict] = {}
        for arg in _split(options.judge):
            name, judge = _judge_config(arg, config, options.sage or None)
            if name in users:
                raise ConfigError(f"--judge={options.judge}: two judges are called {name!r}; rename a file or folder")
            users[name] = judge
        without = "" if options.sage else None  # a judge model asks by forms of its own
        return cls(users, _judge_config(options.measures, config, without) if options.measures else None)

    def judge(
        self, dialogues: Sequence[Transcript], folder: Path | None, console: Console
    ) -> tuple[dict[str, Any], Sequence[Record]]:
        """(what they add to the summary, the records with measures where there are any)."""
        summary: dict[str, Any] = {}
        records: Sequence[Record] = LazySequence(dialogues, lambda _, dialogue: dialogue.record)
        if self.users:
            summary["judges"] = {
                name: judge_transcripts(_load_judge(name, config, folder), dialogues, folder, console)
                for name, config in self.users.items()
            }
        if self.measurer:
            name, config = self.measurer
            rater = _load_rater(name, config, folder)
            forms, source = load_forms(config.data.language), config.eval.relationship
            records, usage = measure(rater, forms, dialogues, folder, console, source)
            settings = rater.settings | {"relationship": source}
            summary["measures"] = summarize(records) | usage | {"settings": settings}
        return summary, records

    @property
    def profiles(self) -> Iterator[Sequence[Profile]]:
        """Sets of all configs, where a log of ours finds its own."""
        return (one for config in self.users.values() for one in open_each(config))


def _sets(config: ConfigDict | None, judges: Judges) -> Iterator[Sequence[Profile]]:
    """Profiles of the config and of the judges', opened when one is asked for."""
    yield from open_each(config) if config else ()
    yield from judges.profiles


def _split(text: str) -> list[str]:
    """At commas, but not at those within a config's argument: `a.py:ppo,direct,b.py`."""
    parts: list[str] = []
    for part in text.split(",") if text else []:
        whole = not parts or ".py" in part or "/" in part or Path(part).is_dir() or ":" not in parts[-1]
        parts[len(parts) - (not whole) :] = [part if whole else f"{parts[-1]},{part}"]
    return parts


def _judge_config(arg: str, config: ConfigDict | None, prompts: str | None) -> tuple[str, ConfigDict]:
    """(name, config) of a judge: its config file, or `config` with the folder as its user.

    Args:
        prompts: of the user, in place of the config's; None: the config's.
    """
    if Path(arg).is_dir() or is_name(arg):
        if config is None:
            raise ConfigError(
                f"judge {arg}: a model's folder needs settings: give --config=FILE too, or a config file for the judge"
            )
        judge, name = config.copy_and_resolve_references(), short_name(arg)
        judge.user.path, judge.user.adapter, judge.user.init, judge.remote.user.url = arg, "", "path", ""
    else:
        judge, _, _ = config_from_flags([f"--config={arg}"], "")
        file, _, argument = arg.partition(":")
        name = re.sub(r"\W+", "_", f"{Path(file).stem}_{argument}").strip("_")
    if prompts is not None:
        judge.user.prompts = prompts
    try:
        validate(judge, jax.device_count(), ["user"], plays=())
        _check_there(judge)
    except (ValueError, OSError) as error:
        raise ConfigError(f"judge {arg}: {error}") from error
    return name, judge


def _check_there(config: ConfigDict) -> None:
    """Finds out now, not after the dialogues, that there is no model, no key or no package."""
    judge_settings(config)
    if "user" in endpoint_sides(config):
        _remote().endpoint_of(config, "user")


def _load_judge(name: str, config: ConfigDict, folder: Path | None) -> Judge:
    if "user" in endpoint_sides(config):
        return _remote().RemoteJudge.load(config, name, folder)
    return DeviceJudge.load(config, name, _mesh(config))


def _load_rater(name: str, config: ConfigDict, folder: Path | None) -> Rater:
    if "user" in endpoint_sides(config):
        return _remote().RemoteRater.load(config, name, folder)
    return DeviceRater.load(config, name, _mesh(config))


def _remote() -> ModuleType:
    return import_remote("rlver_jax.evaluation.judge_at_endpoint")


def _mesh(config: ConfigDict) -> Mesh | None:
    return make_sampling_mesh(config.mesh, config.mesh_sampling)


def main(argv: Sequence[str], usage: str | None) -> int:
    """`evaluate --from=…` and `evaluate --agreement=…`; returns the exit status."""

    def judge(command: Command, argv: Sequence[str]) -> int:
        config, options = _arguments(argv, usage)
        return (_agreement if options.agreement else _scores)(config, options, command.console)

    return run_command("evaluate", judge, argv, ENDINGS)


def _arguments(argv: Sequence[str], usage: str | None) -> tuple[ConfigDict | None, flags.FlagValues]:
    def define(values: flags.FlagValues) -> None:
        define_flags(values)
        define_path("out", "", "folder for the results", values, new="folder")

    config = None
    if any(arg.lstrip("-").startswith("config") for arg in argv):
        config, options, rest = config_from_flags(argv, usage, define)
        sage_option.take(config if options.agreement else None, options)
        validate(config, jax.device_count(), ["user"], plays=())
    else:
        options, rest = parse_flags(argv, usage, define)
        sage_option.take(None, options)
    if rest:
        raise ConfigError(f"found {rest[0]!r}, expected flags only; several files are joined by commas: --from=A,B")
    if bool(options["from"].value) == bool(options.agreement):
        raise ConfigError("found --from and --agreement together, or one without a file; expected one of them")
    contexts.check_flags(options)
    return config, options


@contextlib.contextmanager
def _folder(options: flags.FlagValues, console: Console) -> Iterator[tuple[Path | None, Callable[[], None]]]:
    """(the folder that --out names, locked; what to call before results are written there)."""
    folder = Path(options.out) if options.out else None
    if folder is None:
        yield None, lambda: None
        return
    if (folder / PROGRESS).exists():
        raise ConfigError(f"--out={folder}: holds an evaluation that played dialogues; name another folder")
    notify = lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)  # noqa: E731
    with hold(folder, "--out", notify) as lock:
        yield folder, lock.check


def _scores(config: ConfigDict | None, options: flags.FlagValues, console: Console) -> int:
    """Scores finished dialogues, has them judged, and checks their arithmetic."""
    paths = profile_files(options["from"].value or "")
    judges, files = Judges.of_flags(options, config), TranscriptFiles(paths)
    known = KnownProfiles.of_sets(_sets(config, judges)) if judges.users else None
    seen = _Seen(paths)
    for path, one in track(files.scan(), "reading", console=console, transient=True, disable=not console.is_terminal):
        if judges.users or judges.measurer:
            _check_texts(one)
        seen.add(path, with_profile(one, known) if known else one)
    if not files:
        raise ConfigError(f"--from={options['from'].value}: no dialogue in it; expected files of dialogues")
    dialogues = LazySequence(files, lambda _, one: with_profile(one, known)) if known else files
    with _folder(options, console) as (folder, check):
        each = {path: _scored(tally) for path, tally in seen.each.items()}
        summary: dict[str, Any] = _scored(seen.all) | {
            "faults": seen.faults,
            "settings": {"from": paths, "fingerprint.dialogues": seen.fingerprint.text},
        }
        judge_summary, records = judges.judge(dialogues, folder, console)
        summary |= ({"files": each} if len(each) > 1 else {}) | judge_summary
        if folder:
            check()
            write_dialogues(folder / DIALOGUES, records)
            write_json(folder / SUMMARY, summary)
    show_scores({"all": summary} | each if len(each) > 1 else each, console)
    show_judges(summary, console)
    _show_faults(seen.first_faults, seen.faults, console)
    console.print(
        f"score {summary['score']:.2f} of 100 · success {summary['success']} · failure {summary['failure']} · "
        f"n {summary['n']} · {seen.changes} changes checked, {seen.faults} faults",
        highlight=False,
        soft_wrap=True,
    )
    return 1 if seen.faults else 0


class _Seen:
    """What is noted of dialogues while they are read for the first time, each alone."""

    def __init__(self, paths: Sequence[str]):
        self.each = {path: Tally() for path in paths}
        self.all, self.fingerprint = Tally(), Fingerprint()
        self.changes = self.faults = 0
        self.first_faults: list[str] = []  # as many as are printed

    def add(self, path: str, one: Transcript) -> None:
        self.each[path].add(one.record)
        self.all.add(one.record)
        self.fingerprint.add(one)
        self.changes += len(turns_of(one.record))
        faulty = faults([one])
        self.faults += len(faulty)
        self.first_faults += faulty[: SHOWN - len(self.first_faults)]


def _check_texts(one: Transcript) -> None:
    """That a model can read the messages: half characters have no bytes, so no tokens."""
    for index, message in enumerate(one.record["messages"]):
        if half := half_character(message["content"] or ""):
            raise ConfigError(
                f"{one.source}: messages[{index}] holds half of a surrogate pair (\\u{ord(half):04x}), which no "
                f"judge can read; {REMEDY}"
            )


def _scored(tally: Tally) -> dict[str, Any]:
    spread = mean_with_interval(tally.emotions, tally.profiles)
    return tally.scores() | {"score_std": spread["std"], "score_interval": spread["interval"]}


def _agreement(config: ConfigDict | None, options: flags.FlagValues, console: Console) -> int:
    """Compares the config's user, and further judges, with what a record says; without a config the record alone."""
    judges = _agreeing(config, options)
    files = TranscriptFiles(profile_files(options.agreement))
    counts, profiles = [], []
    for _, one in files.scan():
        _check_texts(one)
        counts.append(len(turns_of(one.record)))
        profiles.append(one.record["profile"])
    wanted = contexts.chosen(counts, profiles, options, (config or get_config()).eval.seed)
    dialogues: Sequence[Transcript] = LazySequence(wanted, lambda _, i: files[i])
    if config:
        dialogues = with_profiles(dialogues, KnownProfiles.of_sets(open_each(config)))
    faulty = faults(dialogues)
    with _folder(options, console) as (folder, check):
        results = {
            name: measure_agreement(_load_judge(name, one, folder), dialogues, folder, console)
            for name, one in judges.items()
        } or {"record": measure_record(dialogues)}
        if folder:
            check()
            write_json(folder / "agreement.json", results)
    for name, result in results.items():
        show_agreement(name, result, console)
    if not config:
        console.print("no --config was given: only what needs no model", markup=False, highlight=False)
    _show_faults(faulty[:SHOWN], len(faulty), console)
    return 1 if faulty else 0


def _agreeing(config: ConfigDict | None, options: flags.FlagValues) -> dict[str, ConfigDict]:
    """Configs of the judges that are compared with the record, by name, checked; none without --config."""
    if options.measures:
        raise ConfigError("--measures belongs to --from or to playing, not to --agreement")
    if config is None:
        if options.judge:
            raise ConfigError("--agreement with --judge tests the simulated user of a config: give --config=FILE too")
        return {}
    judges = Judges.of_flags(options, config)
    _check_there(config)
    if "user" in judges.users:
        raise ConfigError("a judge is called 'user', as the config's own user is here; rename its file or folder")
    return {"user": config} | judges.users


def _show_faults(first: Sequence[str], count: int, console: Console) -> None:
    for line in first:
        console.print(f"fault: {plain_line(line)}", markup=False, highlight=False, soft_wrap=True)
    if count > len(first):
        console.print(f"… and {count - len(first)} more faults")
