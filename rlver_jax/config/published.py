"""RLVER's published settings by config field, with their sources: what `rlver config --diff=rlver` compares with.

Code: github.com/Tencent/digitalhuman, RLVER/code, commit 057e269; script: its train_rlver.sh. Paper: arXiv 2507.03112.
Its code with thoughts does not run as published, so its settings are what its text says (docs/reproducing.md).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

RUNS = ("ppo,think", "ppo,direct", "grpo,think", "grpo,direct")


class Published(NamedTuple):
    """A setting of RLVER's.

    Attributes:
        value: of all four runs, or by a word or two of the run's name ("think", "grpo", "grpo,think").
        source: where it stands.
        ours: why a config of ours may hold another value; empty: it may not.
    """

    value: Any
    source: str
    ours: str = ""

    def of(self, run: str) -> Any:
        """The value of a run, one of RUNS."""
        if not isinstance(self.value, Mapping):
            return self.value
        words = run.split(",")
        return next(value for name, value in self.value.items() if set(name.split(",")) <= set(words))


UNKNOWN = "not published"
RLVER: dict[str, Published] = {
    "policy.size": Published("7b", "paper 3.1: Qwen2.5-7B-Instruct"),
    "policy.mode": Published({"think": "think", "direct": "direct"}, "script: actor_rollout_ref.thinking"),
    "policy.prompt": Published("friend", "VR/system_prompt.py, in our words"),
    "policy.enforce_format": Published(False, "no such rule"),
    "policy.dtype": Published("bfloat16", "fsdp_workers.py: mixed precision"),
    "policy.param_dtype": Published("float32", "fsdp_workers.py"),
    "policy.remat": Published("full", "script: enable_gradient_checkpointing"),
    "user.style": Published("vanilla", "paper 3.1; the file that the script imports is the challenging user"),
    "user.scenario": Published("heart_to_heart", "VR/hard_player_simulator_dsv3.py: eq"),
    "user.readout": Published(
        UNKNOWN, "a number parsed from sampled text", "argmax: the same log gives the same reward again"
    ),
    "user.reply_temperature": Published(UNKNOWN, "an unused request says 0.5", "1: as the model was trained"),
    "data.language": Published("zh", "prompts and profiles are Chinese"),
    "data.shuffle": Published(
        "with replacement", "VR/hard_player_simulator_dsv3.py: unseeded draws", "every profile once an epoch, seeded"
    ),
    "rollout.batch": Published({"ppo": 32, "grpo": 128}, "script: train_batch_size 32 x rollout.n; paper B.3"),
    "rollout.group": Published({"ppo": 1, "grpo": 4}, "script and README: rollout.n; paper B.3"),
    "rollout.max_turns": Published(
        9, "script: 8, compared with > after counting (vllm_rollout_spmd*.py); paper: 8 (B.3) and 10 (3.1)"
    ),
    "rollout.context": Published(15000, "script: max_prompt_length 5,000 + max_response_length 10,000"),
    "rollout.think_tokens": Published(
        {"think": 5000, "direct": UNKNOWN},
        "script: per_turn_length 5,000, thought and reply together",
        "a limit each: 4,000 and 1,000",
    ),
    "rollout.say_tokens": Published(
        5000,
        "script: per_turn_length 5,000; without thoughts a dialogue is cut at 10,000",
        "1,000: with thoughts they have the other 4,000; without, nine replies share the 10,000",
    ),
    "rollout.param_dtype": Published("", "script: dtype bfloat16, as the model's"),
    "rollout.temperature": Published(1.0, "script; paper B.3"),
    "rollout.top_p": Published(1.0, "script"),
    "rollout.top_k": Published(0, "script: -1, off"),
    "emotion.initial": Published(30, "VR/hard_player_simulator_dsv3.py"),
    "emotion.floor": Published(0, "vllm_rollout_spmd*.py; paper 2.2"),
    "emotion.ceiling": Published(101, "no end at 100 (vllm_rollout_spmd*.py)"),
    "emotion.max_change": Published(10, "paper E.1; the challenging user's change is not bounded in the code"),
    "emotion.thresholds": Published((100, 70, 40, 10), "VR/hard_player_simulator_dsv3.py; paper E.1"),
    "reward.kind": Published("final", "url_environment.py; paper 2.1"),
    "algorithm.estimator": Published({"ppo": "gae", "grpo": "grpo"}, "script: adv_estimator; README"),
    "algorithm.credit": Published(
        {"ppo,think": "turn", "ppo,direct": "dialogue", "grpo": "dialogue"},
        "url_environment.py: with thoughts the final reward ends each turn's row",
    ),
    "algorithm.gamma": Published(1.0, "ppo_trainer.yaml"),
    "algorithm.lam": Published(1.0, "ppo_trainer.yaml"),
    "algorithm.whiten": Published(True, "core_algos.py: compute_gae_advantage_return"),
    "algorithm.scale": Published(
        True, "core_algos.py: by the group's deviation; with thoughts over turns, so that long dialogues count more"
    ),
    "loss.ratio": Published("token", "core_algos.py: compute_policy_loss"),
    "loss.clip_low": Published(0.2, "ppo_trainer.yaml: clip_ratio"),
    "loss.clip_high": Published(0.2, "ppo_trainer.yaml: clip_ratio"),
    "loss.dual_clip": Published(0.0, "core_algos.py has none"),
    "loss.normalization": Published(
        {"think": "turn_mean", "direct": "dialogue_mean"},
        "dp_actor.py: token mean of a GPU's rows (PPO 1, GRPO 4), then the mean over 32 GPUs",
    ),
    "loss.entropy": Published(0.001, "ppo_trainer.yaml: entropy_coeff"),
    "loss.kl": Published(0.0, "script: use_kl_loss False, kl_coef 0"),
    "loss.value_clip": Published(0.5, "ppo_trainer.yaml: cliprange_value"),
    "loss.recompute": Published(True, "ray_trainer*.py: compute_log_prob before every update"),
    "loss.importance_cap": Published(0.0, "none"),
    "critic.kind": Published("separate", "main_ppo.py"),
    "critic.learning_rate": Published(5e-6, "script"),
    "critic.rate_warmup_steps": Published(
        {"think": 400, "direct": 50}, "script: 0.05 x 1,000 training steps, with thoughts of about 8 updates"
    ),
    "critic.warmup_steps": Published(0, "ppo_trainer.yaml: critic_warmup"),
    "critic.head_init": Published("random", "fsdp_workers.py: a new token classification head"),
    "critic.param_dtype": Published("float32", "fsdp_workers.py"),
    "train.steps": Published(1000, "script's cap; the paper's curves end at 350 (PPO) and 210 (GRPO)"),
    "train.learning_rate": Published(1e-6, "script; paper B.3"),
    "train.warmup_steps": Published(
        {"think": 160, "direct": 20},
        "script: 0.02 x 1,000 training steps, with thoughts of about 8 updates; paper B.3: 50",
    ),
    "train.grad_clip": Published(1.0, "ppo_trainer.yaml"),
    "train.beta1": Published(0.9, "fsdp_workers.py: AdamW"),
    "train.beta2": Published(0.999, "fsdp_workers.py: AdamW"),
    "train.adam_eps": Published(1e-8, "PyTorch's default"),
    "train.weight_decay": Published(0.01, "fsdp_workers.py: AdamW"),
    "train.moment_dtype": Published("float32", "follows the parameters"),
    "train.epochs": Published(1, "ppo_trainer.yaml: ppo_epochs"),
    "train.minibatches": Published(1, "without thoughts: ppo_mini_batch_size is the batch"),
    "train.turns_per_update": Published(
        {"ppo,think": 32, "grpo,think": 128, "direct": 0}, "script: ppo_mini_batch_size 32, times rollout.n"
    ),
    "checkpoint.every": Published(5, "script: save_freq", "20: each holds weights and moments of two models"),
    "eval.every": Published(0, "script: test_freq 999999", "25: the held-out score tells when to stop"),
    "eval.initial_emotion": Published(40, "SAGE's simulator_response.py"),
    "eval.max_turns": Published(9, "SAGE's test_npc.py: the tenth reply is not appraised"),
    "eval.num_profiles": Published(100, "paper 3.1"),
}
