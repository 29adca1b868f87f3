"""Writes a trained policy as a Hugging Face folder, for transformers, vLLM or evaluate --checkpoint.

    rlver export --workdir=DIR --out=NEW_DIR [--step=best|last|N] [--dtype=bfloat16|float32]
                 [--merged] [--config.policy.path=FOLDER]

Without --step the checkpoint with the best eval/score is taken, or the last one where the run had no evaluations.
Config and tokenizer are those of the base model, which the run keeps, or those of FOLDER. A SentencePiece model is also
written as a tokenizer.json, which AutoTokenizer reads with the same ids. README.md, a model card, says of which run and
step the folder is, with which system prompt the policy was trained, and how to serve it.
Of a run with LoRA it writes the adapter, as a folder of `peft`; with --merged the whole model, adapter and base as one.
Exit status: 0 done, 2 bad usage, 130 interrupted.
"""

import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh

from rlver_jax.config.flags import define_path, parse_flags
from rlver_jax.config.validate import ConfigError
from rlver_jax.models.hf_weights import save_params
from rlver_jax.models.lora import merged
from rlver_jax.models.peft_files import save_adapter
from rlver_jax.models.quantization import unrounded
from rlver_jax.models.qwen import Qwen2
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.rollout.agents import make_model
from rlver_jax.text.command import Command, run_command
from rlver_jax.text.for_transformers import as_tokenizers, write_for_transformers
from rlver_jax.text.tokenizer import SentencePieceTokenizer, load_tokenizer
from rlver_jax.training.learners import lora_of
from rlver_jax.training.model_card import write_card
from rlver_jax.training.trained_policy import TrainedPolicy

POLICY_PATH = "config.policy.path"  # spelled as the commands do that read a config
DTYPES = ("bfloat16", "float32")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_command("export", _export, argv)


def _export(command: Command, argv: Sequence[str]) -> int:
    options = _arguments(argv)
    policy = TrainedPolicy.open(options.workdir, options.step, options[POLICY_PATH].value or "")
    model = make_model(policy.config.policy, "policy")
    if model.param_dtype == jnp.int8:
        model = unrounded(model)  # an adapter is written, or merged into the base as it was before it was rounded
    mesh = make_mesh(**policy.config.mesh) if jax.device_count() > 1 else None
    lora = lora_of(policy.config)
    if options.merged and lora is None:
        raise ConfigError(f"--merged: {options.workdir} trained all parameters, so there is no adapter; leave it out")
    if lora is not None and not options.merged:
        dtype = options.dtype or "float32"
        with command.console.status(f"writing {options.out}"):
            adapter = policy.adapter(model, lora, mesh)
            save_adapter(options.out, adapter, model.config, lora, base=policy.base, dtype=jnp.dtype(dtype))
    else:
        dtype = options.dtype or "bfloat16"
        _write_model(command, policy, model, mesh, options.out, dtype)
    if jax.process_index() == 0:
        write_card(options.out, policy)
    command.print(f"step {policy.step} of {options.workdir} → {options.out} ({dtype})")
    return 0


def _write_model(
    command: Command, policy: TrainedPolicy, model: Qwen2, mesh: Mesh | None, out: str, dtype: str
) -> None:
    path = policy.config.policy.path
    tokenizer = load_tokenizer(path)
    if isinstance(tokenizer, SentencePieceTokenizer):
        as_tokenizers(tokenizer)  # what can't be written is said before anything slow
    with command.console.status(f"reading step {policy.step}"):
        params = merged(policy.weights(model, mesh))
    with command.console.status(f"writing {out}"):
        save_params(out, params, model.config, dtype=dtype, tokenizer_from=path)
        if isinstance(tokenizer, SentencePieceTokenizer) and jax.process_index() == 0:
            write_for_transformers(tokenizer, out)


def _arguments(argv: Sequence[str]) -> flags.FlagValues:
    def define(values: flags.FlagValues) -> None:
        define_path("workdir", None, "folder of a training run", values)
        define_path("out", None, "folder to be written; new or empty", values, new="folder")
        flags.DEFINE_string("step", "", "best | last | a number", flag_values=values)
        define_path(POLICY_PATH, "", "folder to take config and tokenizer from, instead of the run's own", values)
        dtype = "of the weights written; default: bfloat16, of an adapter float32"
        flags.DEFINE_enum("dtype", None, DTYPES, dtype, flag_values=values)
        merge = "of a run with LoRA: write the whole model, its adapter merged into the base"
        flags.DEFINE_boolean("merged", False, merge, flag_values=values)

    options, rest = parse_flags(argv, __doc__, define)
    if rest:
        raise ConfigError(f"found {rest[0]!r}, expected flags only, such as --out=DIR; --help lists them")
    for name, what in (("workdir", "a training run's folder"), ("out", "the folder to be written")):
        if not options[name].value:
            raise ConfigError(f"no --{name} was given; name {what}")
    return options


if __name__ == "__main__":
    sys.exit(main())
