"""Fields of the models that a config names: policy, simulated user and critic."""

from dataclasses import replace

from rlver_jax.config.schema import COUNT, POSITIVE, AllBut, Field

CHALLENGING = "challenging"
SIZES = (
    *("", "0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b"),
    *("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b"),
)
FLOATS = ("bfloat16", "float32")
NO_CRITIC = {"algorithm.estimator": AllBut("gae", "ppo")}
NO_THOUGHTS = {"policy.mode": ("direct",)}


def model(**own: Field) -> dict[str, Field]:
    """Fields that the policy, the simulated user and the critic have in common; `own` replaces and adds."""
    common = {
        "path": Field(
            "", "Hugging Face folder of a Qwen2.5 or Qwen3 model with its tokenizer, or ORG/NAME[@REVISION]", path=True
        ),
        "adapter": Field(
            "",
            "folder of a LoRA adapter (peft) that is merged into the weights as they are read; empty: none",
            path=True,
        ),
        "size": Field("", "published size that `plan` takes where path is empty", choices=SIZES),
        "init": Field(
            "path",
            "weights: path (of the folder) | random (only its config.json and tokenizer are read)",
            ("path", "random"),
        ),
        "dtype": Field("bfloat16", "of activations and caches", FLOATS),
        "param_dtype": Field("bfloat16", "of weights", FLOATS),
        "scan_layers": Field(True, "compile one layer and scan it (TPU); False unrolls: faster decoding on CPU"),
        "attention": Field("dense", "dense | chunked (less memory for long rows, equal result)", ("dense", "chunked")),
        "attention_chunk": Field(512, "queries at a time with attention=chunked", range=POSITIVE, unit="queries"),
    }
    return common | own


def trained_model(**own: Field) -> dict[str, Field]:
    """Fields of a model that is trained: the policy, the critic."""
    return model(
        param_dtype=Field(
            "float32",
            "of weights: updates of 1e-6 vanish in bfloat16; the sampler reads a copy in dtype; int8: under adapters "
            "(lora.rank)",
            (*FLOATS, "int8"),
        ),
        attention=Field(
            "dense",
            "dense | chunked (less memory for long rows, equal result) | splash (TPU kernels, skip what is masked)",
            ("dense", "chunked", "splash"),
        ),
        remat=Field(
            "none",
            "what the backward pass keeps: none (all) | dots (weight products) | full (layer inputs)",
            ("none", "dots", "full"),
            free=True,
        ),
        **own,
    )


POLICY = trained_model(
    mode=Field(
        "think", "think: <think>thought</think> before each reply (RLVER's main setting) | direct", ("think", "direct")
    ),
    prompt=Field(
        "sage",
        "of its system prompt: sage (SAGE's one sentence in our words) | friend (RLVER's in our words) | coach (ours, "
        "says how to be empathetic); own policy prompts in user.prompts replace all three",
        ("sage", "friend", "coach"),
    ),
    enforce_format=Field(
        False, "close a thought at its limit, no end of message before a visible reply", unused=NO_THOUGHTS
    ),
)

USER = model(
    param_dtype=Field("bfloat16", "of weights; int8: docs/performance.md", (*FLOATS, "int8")),
    style=Field("vanilla", "vanilla | challenging (never hints at what it hopes for)", ("vanilla", CHALLENGING)),
    scenario=Field("heart_to_heart", "of the prompts", ("heart_to_heart", "chit_chat")),
    readout=Field(
        "argmax", "of the change's distribution: argmax (deterministic) | sample | mean", ("argmax", "sample", "mean")
    ),
    prompts=Field(
        "", "folder of own prompt files, replacing those of rlver_jax/user/prompts with the same name", path=True
    ),
    reply_temperature=Field(1.0, "of the user's spoken replies; 0: greedy. Appraisals are always greedy", range=COUNT),
    field_tokens=Field(
        64,
        "at most, for each field of the appraisal and each consideration of the reply",
        range=POSITIVE,
        unit="tokens",
    ),
    reply_tokens=Field(128, "at most, for the spoken reply", range=POSITIVE, unit="tokens"),
)

_CRITIC = trained_model(
    kind=Field(
        "separate",
        "separate (a trunk of its own, from critic.path or else policy.path) | shared",
        ("separate", "shared"),
    ),
    learning_rate=Field(5e-6, "RLVER's", range=COUNT),
    rate_warmup_steps=Field(
        -1, "updates over which its learning rate rises; -1: as train.warmup_steps", range=(-1, None), unit="updates"
    ),
    head_init=Field(
        "zero",
        "of the value head's weights: zero (and as bias what a user earns whom nothing moves) | random (RLVER's)",
        ("zero", "random"),
    ),
    warmup_steps=Field(0, "training steps in which only the critic learns", range=COUNT, unit="steps"),
)
CRITIC = {name: replace(field, unused=NO_CRITIC) for name, field in _CRITIC.items()}
