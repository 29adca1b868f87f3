"""Every field of a config, with its unit, its default and where the default comes from.

Use: python -m rlver_jax.evaluate --config=configs/base.py --config.policy.path=DIR --config.user.path=DIR …

RLVER: arXiv 2507.03112 and its published code; SAGE: arXiv 2505.02847. Other configs call `get_config` and change a
few fields. A field that is not here does not exist: an unknown name is an error.
"""

from ml_collections import ConfigDict

CHALLENGING = "challenging"


def words(arg: str, *known: str) -> list[str]:
    """The words of a config's argument, "a,b"; raises ValueError for one that the config doesn't know."""
    found = [word for word in arg.split(",") if word]
    for word in found:
        if word not in known:
            raise ValueError(f"config argument {word!r}; expected any of {', '.join(known)}, joined by commas")
    return found


def get_model() -> ConfigDict:
    """Fields that the policy and the simulated user have in common."""
    c = ConfigDict()
    c.path = ""  # Hugging Face folder of a Qwen2.5 model with its tokenizer files, or ORG/NAME[@REVISION] on the hub
    c.size = ""  # published size that `plan` takes where path is empty: 0.5b | 1.5b | 3b | 7b | 14b | 32b | 72b
    c.init = "path"  # weights: path (of the folder) | random (only the folder's config.json and tokenizer are read)
    c.dtype = "bfloat16"  # of activations and caches: bfloat16 | float32
    c.param_dtype = "bfloat16"  # of weights: bfloat16 | float32; of the user also int8 (docs/performance.md)
    c.scan_layers = True  # compile one layer and scan it (TPU); False unrolls: faster decoding on CPU
    # policy and critic also splash: on TPU, training rows are read by kernels that leave out what is masked
    c.attention = "dense"  # dense | chunked (less memory for long rows, equal result)
    c.attention_chunk = 512  # queries at a time with attention=chunked
    return c


def get_endpoint() -> ConfigDict:
    """Fields of a model behind an OpenAI-compatible endpoint (evaluate only)."""
    c = ConfigDict()
    c.url = ""  # base address, such as http://127.0.0.1:8000/v1; empty: the model is on the device
    c.model = ""  # its name there
    c.key_env = ""  # environment variable that holds the API key; empty: none is sent
    c.extra = ""  # JSON object added to each request, such as {"reasoning_effort": "low"}; null removes a field of ours
    c.price_in = 0.0  # of a million tokens read, in any currency; for the summary's cost
    c.price_out = 0.0  # of a million tokens generated
    return c


def get_config(arg: str = "") -> ConfigDict:
    """The base config; `arg` "challenging" picks the challenging simulated user (RLVER, section 4.3)."""
    c = ConfigDict()

    c.policy = get_model()
    c.policy.param_dtype = "float32"  # updates of 1e-6 vanish in bfloat16; the sampler reads a copy in policy.dtype
    c.policy.remat = "none"  # what the backward pass keeps: none (all) | dots (weight products) | full (layer inputs)
    c.policy.mode = "think"  # think: <think>thought</think> before each reply (RLVER's main setting) | direct
    c.policy.enforce_format = False  # think: close a thought at its limit, no end of message before a visible reply

    c.user = get_model()
    c.user.style = "".join(words(arg, CHALLENGING)) or "vanilla"  # vanilla | challenging (never hints at it)
    c.user.scenario = "heart_to_heart"  # heart_to_heart | chit_chat
    c.user.readout = "argmax"  # of the change's distribution: argmax (deterministic) | sample | mean
    c.user.prompts = ""  # folder of own prompt files, replacing those of rlver_jax/user/prompts with the same name
    c.user.reply_temperature = 1.0  # of the user's spoken replies; 0: greedy. Appraisals are always greedy
    c.user.field_tokens = 64  # at most, for each field of the appraisal and each consideration of the reply
    c.user.reply_tokens = 128  # at most, for the spoken reply

    c.data = ConfigDict()
    c.data.language = "zh"  # of the prompts: zh (RLVER's published profiles) | en
    c.data.train = ""  # JSONL file(s) of profiles, comma-separated, or tfds:rlver_profiles[:VERSION][?split=NAME]
    c.data.eval = ""  # the same, held out; empty: data.train
    c.data.dir = ""  # TFDS's data_dir, of prepared data sets (docs/data.md); empty: TFDS's default
    c.data.seed = 0  # of the order of profiles
    c.data.shuffle = True  # False: profiles come in the order of the files

    c.rollout = ConfigDict()
    c.rollout.batch = 32  # dialogues of a step = profiles x group (RLVER: 32)
    c.rollout.rows = 0  # of them played at a time: where one ends, the next begins (docs/performance.md); 0: all
    c.rollout.group = 1  # dialogues of one profile (RLVER: 1 with PPO, 4 with GRPO)
    c.rollout.max_turns = 8  # policy replies in a dialogue (RLVER: 8)
    c.rollout.context = 8192  # slots of each row's cache, in tokens, policy and user alike
    c.rollout.think_tokens = 512  # at most, of a thought with its closing tag
    c.rollout.say_tokens = 512  # at most, of a reply
    c.rollout.temperature = 1.0  # of the policy (RLVER: 1); 0: greedy
    c.rollout.top_k = 0  # keep the k most likely tokens; 0: all
    c.rollout.top_p = 1.0  # keep the smallest set with this probability

    c.emotion = ConfigDict()
    c.emotion.initial = 30  # points of 0..100 at the start of a dialogue (RLVER's training; SAGE's evaluation: 40)
    c.emotion.floor = 9  # a dialogue ends at or below it, as a failure (SAGE: below 10)
    c.emotion.ceiling = 100  # a dialogue ends at or above it, as a success (SAGE: 100)
    c.emotion.max_change = 10  # points by which one reply can move the emotion (SAGE: 10)
    c.emotion.thresholds = (100, 70, 40, 10)  # lower bounds of bands S, A, B, C; F lies below (SAGE)

    c.reward = ConfigDict()
    c.reward.kind = "final"  # final (emotion/100) | per_turn (change/10) | mixed
    c.reward.discount = 1.0  # of later turns in `mixed`
    c.reward.final_weight = 0.5  # of the final emotion in `mixed`; the per-turn changes get the rest

    c.algorithm = ConfigDict()
    c.algorithm.estimator = "gae"  # of advantages: gae (PPO) | grpo | rloo | reinforce_pp; all but gae have no critic
    # turn: gae ends each turn with the final reward (RLVER's form); grpo gives each its own and what follows
    c.algorithm.credit = "dialogue"  # dialogue | turn (gae, and grpo: arXiv 2402.03300, 4.1.3)
    c.algorithm.turn_discount = 1.0  # grpo with credit=turn: of the rewards of later turns
    c.algorithm.gamma = 1.0  # discount a token (RLVER: 1)
    c.algorithm.lam = 1.0  # GAE's lambda (RLVER: 1)
    c.algorithm.whiten = True  # gae: advantages to mean 0 and deviation 1 over the batch's tokens
    c.algorithm.scale = True  # grpo: divide by the group's standard deviation; False: Dr. GRPO (arXiv 2503.20783)

    c.loss = ConfigDict()
    c.loss.ratio = "token"  # token (PPO) | sequence (GSPO, arXiv 2507.18071: one ratio a dialogue)
    c.loss.clip_low = 0.2  # ratios below 1 - clip_low earn no more (RLVER: 0.2)
    c.loss.clip_high = 0.2  # ratios above 1 + clip_high earn no more (RLVER: 0.2; DAPO, arXiv 2503.14476: 0.28)
    c.loss.dual_clip = 0.0  # most that a bad token's ratio can cost, e.g. 3 (arXiv 1912.09729); 0: off
    c.loss.normalization = "token_mean"  # token_mean | dialogue_mean (GRPO) | dr_grpo (sum over a constant length)
    c.loss.entropy = 0.0  # weight of the entropy bonus
    c.loss.kl = 0.0  # weight of the KL penalty to the reference model; 0: no such model is loaded (RLVER: 0)
    c.loss.kl_estimator = "k3"  # k1 | k2 | k3
    c.loss.value_clip = 0.5  # how far a value may move in one update, in units of reward (RLVER: 0.5); 0: off
    c.loss.value_weight = 1.0  # of the critic's loss; matters only where critic and policy share a trunk
    c.loss.recompute = False  # ratios start from the trainer's own log-probs (one more forward pass), not the sampler's
    c.loss.importance_cap = 0.0  # with recompute: truncated importance weights sampler -> trainer, e.g. 2; 0: off
    c.loss.vocab_chunk = 8192  # logits of each position that exist at a time

    c.critic = get_model()  # gae only
    c.critic.param_dtype = "float32"  # as policy.param_dtype
    c.critic.remat = "none"  # as policy.remat
    c.critic.kind = "separate"  # separate (a trunk of its own, from critic.path or else policy.path) | shared
    c.critic.learning_rate = 5e-6  # RLVER
    c.critic.warmup_steps = 0  # training steps in which only the critic learns

    c.reference = ConfigDict()
    c.reference.path = ""  # Hugging Face folder, or name on the hub, for the KL penalty; empty: policy.path

    c.train = ConfigDict()
    c.train.steps = 500  # batches played and learned from
    c.train.seed = 0  # of all that is drawn in training
    c.train.learning_rate = 1e-6  # of the policy (RLVER)
    c.train.warmup_steps = 50  # updates over which both learning rates rise (RLVER)
    c.train.grad_clip = 1.0  # largest norm of a gradient (RLVER); 0: any
    c.train.beta1 = 0.9  # AdamW
    c.train.beta2 = 0.999  # AdamW
    c.train.adam_eps = 1e-8  # AdamW; 1e-5 keeps weights with next to no gradient (rare tokens' rows) where they are
    c.train.weight_decay = 0.01  # AdamW, times the learning rate
    c.train.moment_dtype = "float32"  # of Adam's first moment: float32 | bfloat16; the second is float32
    c.train.epochs = 1  # passes over each batch (RLVER: 1)
    c.train.minibatches = 1  # optimizer steps a pass
    c.train.microbatches = 1  # parts of a minibatch whose gradients are summed: less memory, same result
    # Rows are shared by dialogues and read one at a time by each device, as often as it takes (docs/performance.md)
    c.train.share_rows = True  # less padding, same result; False: one dialogue a row, microbatches as given above
    c.train.padding = 0.1  # share of padding in shared rows that is little: the shortest rows with less are taken
    c.train.length_buckets = 8  # lengths of packed rows that may be compiled, between a length and its double

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 20  # steps; the last step and an interrupted one are always saved
    c.checkpoint.keep_last = 2  # newest checkpoints that stay
    c.checkpoint.keep_best = 1  # by eval/score

    c.log = ConfigDict()
    c.log.tensorboard = True  # write WORKDIR/tensorboard
    c.log.wandb = ""  # project of Weights & Biases (extra `wandb`); empty: off
    c.log.dialogues_every = 10  # steps between files of all dialogues of a step; 0: never

    c.alarms = ConfigDict()  # a figure beyond its limit stops the run; see rlver_jax/training/alarms.py
    c.alarms.readable_min = 0.5  # least share of replies that are valid text, end by themselves, don't go in circles
    c.alarms.reply_tokens_min = 1.0  # least mean length of a reply, in tokens
    c.alarms.reply_tokens_max = 0.0  # largest; 0: no limit
    c.alarms.entropy_min = 0.0  # least mean entropy of the policy, in nats
    c.alarms.entropy_max = 8.0  # largest (uniform over Qwen's vocabulary: 11.9)
    c.alarms.ratio_max = 100.0  # largest ratio of any token within an update; 0: no limit
    c.alarms.kl_max = 1.0  # largest KL that one step may move the policy by, in nats a token

    c.eval = ConfigDict()
    c.eval.every = 0  # steps between evaluations in training, step 0 included; 0: never
    c.eval.num_profiles = 100  # profiles played (SAGE: 100); fewer if the file has fewer
    c.eval.initial_emotion = 40  # SAGE
    c.eval.max_turns = 10  # SAGE
    c.eval.batch = 32  # dialogues played by one call of the sampler
    c.eval.rows = 0  # of them played at a time, as rollout.rows, where both models are on the device; 0: all
    c.eval.temperature = 1.0  # of the policy; 0: greedy
    c.eval.seed = 0
    c.eval.gold = ""  # judge beside the user: miniature (its grammar's rule, eval/rule_score); empty: none

    c.remote = ConfigDict()  # evaluate: models that are not on the device; extra `remote`
    c.remote.policy = get_endpoint()
    c.remote.user = get_endpoint()
    c.remote.concurrency = 8  # requests at once, to each endpoint
    c.remote.timeout = 120.0  # seconds for one attempt
    c.remote.deadline = 600.0  # seconds for a request with all its attempts; then the evaluation stops, to be resumed
    c.remote.asks = 3  # times that an answer is asked for until it can be read; then the dialogue ends as unreadable
    c.remote.cache = ""  # file that keeps answers by request; empty: answers.sqlite in --out

    c.mesh = ConfigDict()
    c.mesh.replica = 1  # copies of the weights, e.g. one a TPU slice
    c.mesh.fsdp = -1  # devices over which weights and batch are split; -1: all that are left
    c.mesh.tensor = 1  # devices over which heads, MLP columns and vocabulary are split

    c.mesh_sampling = ConfigDict()  # the same devices while dialogues are played (docs/pods.md); 0: as in mesh
    c.mesh_sampling.replica = 0  # copies of both models' weights; with fsdp 1 no decode step gathers weights
    c.mesh_sampling.fsdp = 0  # as mesh.fsdp; -1 here or above: all that are left
    c.mesh_sampling.tensor = 0  # as mesh.tensor
    return c
