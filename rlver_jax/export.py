"""Writes a trained policy as a Hugging Face folder, for transformers, vLLM or evaluate --checkpoint.

    rlver export --workdir=DIR --out=NEW_DIR [--step=best|last|N] [--dtype=bfloat16|float32]
                 [--config.policy.path=FOLDER]

Without --step the checkpoint with the best eval/score is taken, or the last one where the run had no evaluations.
Config and tokenizer are those of the base model, which the run keeps, or those of FOLDER. A SentencePiece model is also
written as a tokenizer.json, which AutoTokenizer reads with the same ids.
Exit status: 0 done, 2 bad usage, 130 interrupted.
"""

import sys
from collections.abc import Sequence

import jax
from absl import flags

from rlver_jax.config.flags import define_path, parse_flags
from rlver_jax.config.validate import ConfigError
from rlver_jax.models.hf_weights import save_params
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.rollout.agents import make_model
from rlver_jax.text.command import Command, run_command
from rlver_jax.text.for_transformers import as_tokenizers, write_for_transformers
from rlver_jax.text.tokenizer import SentencePieceTokenizer, load_tokenizer
from rlver_jax.training.restore import TrainedPolicy

POLICY_PATH = "config.policy.path"  # spelled as the commands do that read a config
DTYPES = ("bfloat16", "float32")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_command("export", _export, argv)


def _export(command: Command, argv: Sequence[str]) -> int:
    options = _arguments(argv)
    policy = TrainedPolicy.open(options.workdir, options.step, options[POLICY_PATH].value or "")
    model = make_model(policy.config.policy, "policy")
    tokenizer = load_tokenizer(policy.config.policy.path)
    if isinstance(tokenizer, SentencePieceTokenizer):
        as_tokenizers(tokenizer)  # what can't be written is said before anything slow
    mesh = make_mesh(**policy.config.mesh) if jax.device_count() > 1 else None
    with command.console.status(f"reading step {policy.step}"):
        params = policy.weights(model, mesh)
    with command.console.status(f"writing {options.out}"):
        save_params(options.out, params, model.config, dtype=options.dtype, tokenizer_from=policy.config.policy.path)
        if isinstance(tokenizer, SentencePieceTokenizer) and jax.process_index() == 0:
            write_for_transformers(tokenizer, options.out)
    command.print(f"step {policy.step} of {options.workdir} → {options.out} ({options.dtype})")
    return 0


def _arguments(argv: Sequence[str]) -> flags.FlagValues:
    def define(values: flags.FlagValues) -> None:
        define_path("workdir", None, "folder of a training run", values)
        define_path("out", None, "folder to be written; new or empty", values, new="folder")
        flags.DEFINE_string("step", "", "best | last | a number", flag_values=values)
        define_path(POLICY_PATH, "", "folder to take config and tokenizer from, instead of the run's own", values)
        flags.DEFINE_enum("dtype", "bfloat16", DTYPES, "of the weights written", flag_values=values)

    options, rest = parse_flags(argv, __doc__, define)
    if rest:
        raise ConfigError(f"found {rest[0]!r}, expected flags only, such as --out=DIR; --help lists them")
    for name, what in (("workdir", "a training run's folder"), ("out", "the folder to be written")):
        if not options[name].value:
            raise ConfigError(f"no --{name} was given; name {what}")
    return options


if __name__ == "__main__":
    sys.exit(main())
