"""Builds the miniature world in a folder: tokenizer, profiles, simulated user, policy, and a config that uses them.

    python -m rlver_jax.miniature.build --out=DIR [--user_steps=N] [--policy_steps=N]

The user learns to appraise and answer from dialogues of the grammar; the policy to reply in every style, on its topic
most of the time, without knowing which style helps. Exit status: 0 done, 2 bad usage.
"""

import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags
from rich.console import Console

from rlver_jax.command_line import parse_flags
from rlver_jax.config import ConfigError
from rlver_jax.miniature import assets, rule, texts
from rlver_jax.miniature.fit import fit, small_model
from rlver_jax.miniature.rows import Packer, Row, Rows, sample_dialogues, stack
from rlver_jax.miniature.world import people
from rlver_jax.models.hf_weights import save_params
from rlver_jax.text.tokenizer import SentencePieceTokenizer, train_sentencepiece
from rlver_jax.user.prompts import Prompts, load_prompts

VOCABULARY = 1400
SYMBOLS = ("\n", "<think>", "</think>")
PEOPLE = 20_000  # from whom the training dialogues are drawn


class Shape(NamedTuple):
    """Of a batch: dialogues of so many turns, rows, tokens. Short ones teach as much a turn and cost less attention."""

    turns: int
    rows: int
    length: int


def train_tokenizer(path: Path, prompts: Prompts) -> SentencePieceTokenizer:
    """A tokenizer for which most of the grammar's words are one token."""
    draw, corpus = random.Random(1), []
    for dialogue in sample_dialogues(3000, draw, people(PEOPLE, seed=1, held_out=False), texts.HEARD, assets.TURNS):
        person = dialogue.person
        corpus += [*map(str, person.to_json().values()), prompts.opening, "system\n", "user\n", "assistant\n"]
        for turn in dialogue.turns:
            corpus += [texts.thought(person, turn.reply), turn.answer or ""]
            corpus += rule.appraisal(person, turn.verdict).values()
            corpus += [] if turn.verdict.kind == "garbled" else [turn.reply.text]
            corpus += [part.value for part in (*prompts.appraisal, *prompts.reply) if part.kind == "text"]
    corpus += [prompts.policy_system("think"), prompts.policy_system("direct")] * 100
    return train_sentencepiece([text for text in corpus if text], path, VOCABULARY, symbols=SYMBOLS)


def batches(make: Callable[[random.Random, int], Row], shapes: Sequence[Shape], seed: int) -> Callable[[int], Rows]:
    """Rows of step i, of its shape in turn, from a stream of its own: a build can be repeated."""

    def batch_of(step: int) -> Rows:
        draw, shape = random.Random(f"{seed} {step}"), shapes[step % len(shapes)]
        return stack([make(draw, shape.turns) for _ in range(shape.rows)], shape.length)

    return batch_of


def user_batches(packer: Packer, seed: int) -> Callable[[int], Rows]:
    """What the simulated user learns from."""
    crowd = people(PEOPLE, seed=seed, held_out=False)
    make = lambda draw, turns: packer.user(sample_dialogues(1, draw, crowd, texts.HEARD, turns)[0])  # noqa: E731
    return batches(make, (Shape(3, 16, 416), Shape(3, 16, 416), Shape(assets.TURNS, 8, 768)), seed)


def policy_batches(packer: Packer, seed: int) -> Callable[[int], Rows]:
    """What the policy learns from: both modes in turn."""
    crowd = people(PEOPLE, seed=seed, held_out=False)

    def make(draw: random.Random, turns: int) -> Row:
        mode = draw.choice(("think", "direct"))
        return packer.policy(sample_dialogues(1, draw, crowd, texts.BASE, turns)[0], mode)

    return batches(make, (Shape(3, 16, 232), Shape(assets.TURNS, 8, 432)), seed)


def build(out: Path, user_steps: int, policy_steps: int, console: Console) -> None:
    """Writes everything into a new folder."""
    prompts = load_prompts("en", assets.PROMPTS)
    tokenizer = train_tokenizer(out / "tokenizer.model", prompts)
    packer, rows = Packer(tokenizer, prompts), -(-tokenizer.vocab_size // 8) * 8
    assets.write_config(out)
    for name, count, held_out in ((assets.TRAIN, assets.TRAIN_COUNT, False), (assets.EVAL, assets.EVAL_COUNT, True)):
        assets.write_profiles(out / name, people(count, seed=assets.SEED, held_out=held_out))
    for name, source, steps, seed in (
        (assets.USER, user_batches(packer, 2), user_steps, 2),
        (assets.POLICY, policy_batches(packer, 3), policy_steps, 3),
    ):
        lm, loss = fit(small_model(rows), source, steps, console=console, name=name, seed=seed)
        save_params(out / name, lm.params, lm.model.config)
        tokenizer.save(out / name)
        console.print(f"{name}: loss {loss:.4f} a token → {out / name}", highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("out", None, "folder to be written; new or empty", flag_values=values)
        flags.DEFINE_integer("user_steps", 2500, "steps of the simulated user", flag_values=values)
        flags.DEFINE_integer("policy_steps", 1500, "steps of the policy", flag_values=values)

    console, errors = Console(), Console(stderr=True, soft_wrap=True)
    try:
        options, rest = parse_flags(sys.argv[1:] if argv is None else argv, __doc__, define)
        if rest or not options.out:
            raise ConfigError("expected --out=DIR; --help lists the flags")
        build(Path(options.out), options.user_steps, options.policy_steps, console)
    except (ValueError, OSError) as error:
        errors.print(f"build: {error}", markup=False, highlight=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
