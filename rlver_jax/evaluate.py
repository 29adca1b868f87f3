"""Plays held-out profiles with a policy and scores it as SAGE does, by the user's final emotion.

    rlver evaluate --config=FILE[:ARG] [--config.a.b=v …] [--checkpoint=WORKDIR|HF_FOLDER] --out=DIR
                   [--before=DIR] [--repeats=N] [--judge=FILE[:ARG]|HF_FOLDER,…] [--measures=FILE[:ARG]|HF_FOLDER]
                   [--sage=CLONE]
    rlver evaluate --from=DIALOGUES,… [--judge=…] [--measures=…] [--config=…] [--out=DIR]
    rlver evaluate --agreement=SAGE_RESULT.jsonl,… [--config=… [--judge=…]] [--held_out=SHARE] [--contexts=N]
                   [--out=DIR]

DIR/summary.json holds the score (mean final emotion, 0–100), successes (final emotion 100), failures (below 10) and
the settings; DIR/dialogues.jsonl holds every dialogue with its tokens. Of a training run the checkpoint with the best
eval/score is taken, or the last one where none has a score; --step chooses another. --before names an earlier
evaluation: its scores, and its dialogue with the same profile, are printed for comparison. An interrupted evaluation
resumes when it is started again with the same settings and DIR.

--judge has other users score the same dialogues. --measures has a model fill in questionnaires about them. --from takes
finished dialogues, ours or SAGE's, and checks their arithmetic. --agreement compares the config's user with the one of
a record, and both with what can be guessed without a look at the reply; --held_out takes that share of the profiles. A
judge runs on the device, or at an endpoint where its config sets remote.user.url. See docs/judging.md.
--sage takes the prompts of users at endpoints, and the policy's, from a clone of SAGE's repository; see docs/sage.md.

On several hosts the same command runs on each (--coordinator, --processes, --process; on TPU VMs without them). There
it only plays; see docs/pods.md.

Exit status: 0 done, 1 no score, since too many dialogues ended unreadable (alarms.unreadable_max), an emotion that is
not the one before plus the change, an endpoint that does not answer, or another process is lost or has taken DIR over,
2 bad usage (also a DIR that another process uses), 130 interrupted.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console

from rlver_jax.config.flags import config_from_flags, define_path, import_remote, path_override
from rlver_jax.config.validate import ConfigError, endpoint_sides, validate
from rlver_jax.dialogues.log import UNREADABLE, Record
from rlver_jax.dialogues.own_functions import of_functions
from rlver_jax.dialogues.render import print_comparison, print_dialogue
from rlver_jax.endpoints.errors import EndpointError, Unavailable
from rlver_jax.endpoints.usage import usage_text
from rlver_jax.evaluation import contexts, sage_option
from rlver_jax.evaluation import folder as evaluation_folder
from rlver_jax.evaluation import judge_command as judging
from rlver_jax.evaluation.folder import EvaluationFolder, read_evaluation
from rlver_jax.evaluation.play import Player, chosen_profiles, load
from rlver_jax.evaluation.show import show_judges
from rlver_jax.evaluation.spread import spread, spread_text
from rlver_jax.evaluation.transcripts import finished
from rlver_jax.miniature.gold import gold_judge
from rlver_jax.parallel import distributed
from rlver_jax.profiles.schema import Profile
from rlver_jax.rollout.agents import tokenizers_differ
from rlver_jax.rollout.spec import check_context
from rlver_jax.runs.lock import LostLockError, hold
from rlver_jax.text.command import Command, Ending, run_command
from rlver_jax.text.progress import Meter
from rlver_jax.training.trained_policy import TrainedPolicy, take_checkpoint
from rlver_jax.user.profile_warnings import profile_warnings

_NO_SCORE = (
    "no score: {} ended because the user's answers could not be read (alarms.unreadable_max); that model is too weak a "
    "user, or its prompts don't suit it"
)
_RESUMES = "\nthe same command resumes with what is in {output}"
ENDINGS = {
    EndpointError: Ending(2, "{error}" + _RESUMES),
    Unavailable: Ending(1, "{error}" + _RESUMES),
    LostLockError: Ending(1),
    KeyboardInterrupt: Ending(130, "interrupted" + _RESUMES),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if judging.of_finished(argv):
        return judging.main(argv, __doc__)
    return distributed.shutdown(run_command("evaluate", _evaluate, argv, ENDINGS))


def _evaluate(command: Command, argv: Sequence[str]) -> int:
    config, options = _arguments(argv)
    console = command.console
    console.quiet = not distributed.is_main()
    trained = _trained(config, options)
    validate(config, jax.device_count(), ["policy", "user"])
    here = [side for side in ("policy", "user") if side not in endpoint_sides(config)]
    check_context(config, *here)  # before weights are looked at
    judges = judging.Judges.of_flags(options, config)
    profiles = chosen_profiles(config)
    for odd in profile_warnings(config, None, profiles):
        command.print(f"warning: {odd}")
    before = read_evaluation(options.before) if options.before else None
    settings = evaluation_folder.settings_of(config, profiles, trained.fingerprint if trained else None)
    with hold(options.out, "--out", command.print) as lock:
        folder = EvaluationFolder.open(options.out, settings, options.repeats, check=lock.check, report=command.print)
        with console.status("loading the models"):
            evaluation = _load(config, profiles, folder, trained)
        command.output = str(folder.path)
        records = play_missing(evaluation, folder, console, options.repeats)
        summary = summarize(evaluation, records, folder)
        judge_summary, marked = judges.judge(finished(records, profiles), folder.path, console)
        summary |= judge_summary
        folder.finish(marked, summary)
    if before:
        print_comparison(before, (summary, records), console)
    else:
        print_dialogue(records[0], console)
    show_judges(summary, console)
    command.print(headline(summary, folder.path))
    return 1 if summary["score"] is None else 0


def _arguments(argv: Sequence[str]) -> tuple[ConfigDict, flags.FlagValues]:
    def define(values: flags.FlagValues) -> None:
        define_path("out", None, "folder for summary.json and dialogues.jsonl", values)
        define_path("checkpoint", None, "training run or Hugging Face folder to take the policy from", values)
        define_path("before", "", "--out of an earlier evaluation, to be compared with", values)
        flags.DEFINE_integer("repeats", 1, "dialogues of each profile, for spread", lower_bound=1, flag_values=values)
        judging.define_flags(values)
        distributed.define_flags(values)
        flags.DEFINE_string("step", "", "of a training run: best | last | a number", flag_values=values)

    config, options, rest = config_from_flags(argv, __doc__, define)
    if rest:
        raise ConfigError(f"found {rest[0]!r}, expected flags only, such as --out=DIR; --help lists them")
    if not options.out:
        raise ConfigError("no --out was given; name the folder that summary.json and dialogues.jsonl are written to")
    contexts.check_flags(options)
    sage_option.take(config, options)
    distributed.initialize(options, finish_steps=False)
    alone = [f"--{name}" for name in ("judge", "measures") if options[name].value]
    alone += [f"remote.{side}.url" for side in endpoint_sides(config)]
    if jax.process_count() > 1 and alone:
        raise ConfigError(
            f"{alone[0]}: works in one process, but there are {jax.process_count()}; play here, and judge afterwards "
            f"with evaluate --from={options.out}/dialogues.jsonl in a process alone"
        )
    return config, options


def _trained(config: ConfigDict, options: flags.FlagValues) -> TrainedPolicy | None:
    """Has --checkpoint replace the policy; what to read where it is a training run."""
    if options.checkpoint and config.remote.policy.url:
        raise ConfigError("--checkpoint and remote.policy.url both name the policy; give one of them")
    return take_checkpoint(config, options.checkpoint, options.step, path_override(options))


def _load(
    config: ConfigDict, profiles: Sequence[Profile], folder: EvaluationFolder, trained: TrainedPolicy | None
) -> Player:
    weights, gold = trained.weights if trained else None, gold_judge(config)
    separate = not endpoint_sides(config) and tokenizers_differ(config)
    if separate and jax.process_count() > 1:
        raise ConfigError(
            f"policy and user have two tokenizers: text passes between them in one process, but there are "
            f"{jax.process_count()}"
        )
    if separate or endpoint_sides(config):
        remote_evaluation = import_remote("rlver_jax.evaluation.endpoint_play")
        return remote_evaluation.load(config, profiles, folder.path, weights, gold)
    base = trained.base_section if trained else None
    return load(config, profiles, policy_weights=weights, gold=gold, policy_base=base)


def play_missing(evaluation: Player, folder: EvaluationFolder, console: Console, repeats: int = 1) -> list[Record]:
    """Plays what the folder doesn't hold yet, batch by batch; returns all records in the order of their numbers."""
    records, total = folder.records, len(evaluation.profiles) * repeats
    done = {record["dialogue"] for record in records}
    missing = [i for i in range(total) if i not in done]
    if done:
        console.print(f"{len(done)} of {total} dialogues are in {folder.path}", highlight=False)
    with Meter(console, total, "compiling and playing the first batch", completed=len(records)) as meter:
        for new, costs in evaluation.batches(missing):
            folder.add(new, costs)
            records = records + new
            emotion = float(np.mean([record["emotion"] for record in records]))
            state = f"{costs['generated'] / costs['seconds']:.1f} tokens/s · mean emotion {emotion:.1f}"
            meter.show(len(records), state, line=f"{len(records)}/{total} dialogues · {state}")
    return sorted(records, key=lambda record: record["dialogue"])


def summarize(evaluation: Player, records: Sequence[Record], folder: EvaluationFolder) -> dict[str, Any]:
    """What summary.json holds."""
    uncertainty = spread(records, len(evaluation.profiles))
    scores = evaluation.scores(records)
    unread, most = scores["end_reasons"][UNREADABLE] / scores["n"], evaluation.config.alarms.unreadable_max
    if most and unread > most:
        uncertainty, scores["score"] = {"unreadable": f"{unread:.0%} of the dialogues, of {most:.0%} at most"}, None
    return (
        scores
        | uncertainty
        | {
            "tokens": {name: int(folder.spent(name)) for name in ("generated", "prefilled")},
            "seconds": round(folder.spent("seconds"), 3),
            "settings": folder.settings,
        }
        | ({"occupancy": folder.spent("turns") / room} if (room := folder.spent("row_turns")) else {})
    )


def headline(summary: dict[str, Any], path: Path) -> str:
    """The summary in a few lines."""
    reasons = ", ".join(f"{name} {count}" for name, count in summary["end_reasons"].items() if count)
    gold = f" ({summary['rule_score']:.2f} by the gold judge)" if "rule_score" in summary else ""
    unread = summary.get("unreadable", "")
    rate = summary["tokens"]["generated"] / summary["seconds"] if summary["seconds"] else 0.0
    scored = (
        f"score {summary['score']:.2f} of 100{gold}{spread_text(summary)}" if not unread else _NO_SCORE.format(unread)
    )
    return (
        f"{scored} · success {summary['success']} · "
        f"failure {summary['failure']} · n {summary['n']} · {summary['turns_mean']:.2f} turns · ends: {reasons}\n"
        f"{summary['tokens']['generated']} tokens generated, {summary['tokens']['prefilled']} prefilled, "
        f"{summary['seconds']:.1f} s ({rate:.1f} tokens/s)\n"
        f"{_remote_text(summary)}{_own_text(summary)}"
        f"{path / 'summary.json'} · {path / 'dialogues.jsonl'}"
    )


def _own_text(summary: dict[str, Any]) -> str:
    """A line of what a user's own functions have measured, where there are any."""
    numbers = of_functions(summary)
    return " · ".join(f"{name} {number:.3g}" for name, number in numbers.items()) + "\n" * bool(numbers)


def _remote_text(summary: dict[str, Any]) -> str:
    """A line for each endpoint: its requests, and what they cost where prices are known."""
    return "".join(f"{side} at its endpoint: {usage_text(used)}\n" for side, used in summary.get("remote", {}).items())


if __name__ == "__main__":
    sys.exit(main())
