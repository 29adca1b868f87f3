"""Reading, checking and rendering the prompt files.

Templates are jinja2 in a sandbox, with undefined variables an error. A profile's text is a *value* of a
template, never part of one, so braces in it mean nothing. The profile comes first in the user's system
prompt: in every style and scenario, the prompts of one profile share its tokens and so its KV cache.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import jinja2
import jinja2.meta
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlver_jax.config.languages import LANGUAGES
from rlver_jax.config.paths import sage_folder
from rlver_jax.decoding.script import Part, check_appraisal, check_reply, parse_script
from rlver_jax.profiles.intentions import Kind, published_intention
from rlver_jax.profiles.schema import Profile
from rlver_jax.user import sage_clone, sage_user
from rlver_jax.user.emotion import TRAINING, EmotionRules
from rlver_jax.user.sage_clone import SagePrompts

STYLES = ("vanilla", "challenging")
SCENARIOS = ("heart_to_heart", "chit_chat")
MODES = ("think", "direct")
_POLICY = ("policy_think.j2", "policy_direct.j2")
POLICY_PROMPTS = ("sage", "friend", "coach")  # what the policy is told to be; see docs/reproducing.md

# Each template with the variables that it may use. The policy never sees a profile, hence none there.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "user_system.j2": ("persona", "scene", "hidden_intention", "intention", "style", "scenario", "rules"),
    "policy_think.j2": ("prompt",),
    "policy_direct.j2": ("prompt",),
    "form.j2": ("say", "form", "missing"),  # how a user behind an endpoint is asked to fill in a script
}
FILES = (*TEMPLATES, "opening.txt", "appraisal.script", "reply.script", "hidden_intentions.json")

_ENV = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True
)


@dataclass(frozen=True)
class Intention:
    """One kind of hidden intention.

    key: short English identifier; kind: "rational" or "emotional"; sentence: what the user wants, said to the
    user; reaction: how a person who wants this reacts; raises / lowers: what moves the emotion up / down;
    aliases: other sentences for the same kind; of the eight published ones theirs in both languages.
    """

    key: str
    kind: str
    sentence: str
    reaction: str
    raises: str
    lowers: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompts:
    """All prompts of one language, checked.

    appraisal, reply: the guided scripts, parsed; opening: the cue before the user's first words;
    intentions: the known hidden intentions by key; origins: for each file name, where it was read; sage: of a
    user at an endpoint that plays by SAGE's own prompts, with its scripts' field names in `appraisal` and `reply`.
    """

    language: str
    appraisal: tuple[Part, ...]
    reply: tuple[Part, ...]
    opening: str
    intentions: Mapping[str, Intention]
    origins: Mapping[str, str]
    templates: Mapping[str, jinja2.Template]
    sage: SagePrompts | None = None

    def intention(self, text: str) -> Intention | None:
        """Find the hidden intention that `text` names by its key, its sentence or an alias; else None."""
        wanted = text.strip().rstrip("。.")
        for known in self.intentions.values():
            if wanted in (name.rstrip("。.") for name in (known.key, known.sentence, *known.aliases)):
                return known
        return None

    def user_system(
        self,
        persona: str,
        scene: str,
        hidden_intention: str,
        *,
        style: str = "vanilla",
        scenario: str = "heart_to_heart",
        rules: EmotionRules = TRAINING,
    ) -> str:
        """Render the simulated user's system prompt, beginning with the profile.

        hidden_intention: a key of `intentions`, which stands for its sentence, or any sentence, taken as it
        is; a known one is followed by what raises and lowers the emotion. rules: give the bands' borders.
        Raises ValueError for an unknown style or scenario, or an empty part of the profile.
        """
        _check_choice("style", style, STYLES)
        _check_choice("scenario", scenario, SCENARIOS)
        profile = {"persona": persona, "scene": scene, "hidden_intention": hidden_intention}
        for name, text in profile.items():
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"the profile's {name} is empty: the simulated user can't be played without it")
        known = self.intention(hidden_intention)
        if known is not None and hidden_intention.strip() == known.key:
            profile["hidden_intention"] = known.sentence
        values = {name: text.strip() for name, text in profile.items()}
        return self._render("user_system.j2", **values, intention=known, style=style, scenario=scenario, rules=rules)

    def before_first_turn(
        self, profile: Profile, *, style: str, scenario: str, rules: EmotionRules
    ) -> list[Mapping[str, str]]:
        """What the simulated user reads before anything is said: its system prompt, and the cue for its first words."""
        texts = profile.persona, profile.background, profile.hidden_intention
        system = self.user_system(*texts, style=style, scenario=scenario, rules=rules)
        return [{"role": "system", "content": system}, {"role": "user", "content": self.opening}]

    @property
    def tells_guidance(self) -> bool:
        """Whether the user's system prompt says what raises and lowers the emotion of a known hidden intention."""
        if self.sage:
            return False
        one = Intention("key", "rational", "wish", "<reaction>", "<raises>", "<lowers>")
        told = {"style": STYLES[0], "scenario": SCENARIOS[0], "rules": TRAINING}
        profile = {"persona": "persona", "scene": "scene", "hidden_intention": "wish"}
        with_it, without = (self._render("user_system.j2", **profile, **told, intention=i) for i in (one, None))
        return with_it != without

    def policy_system(self, mode: str, prompt: str = "sage") -> str:
        """Render the policy's system prompt for `mode`, "think" or "direct", and `prompt`, one of POLICY_PROMPTS.

        A folder's own policy prompts need not look at `prompt`. Raises ValueError for an unknown mode or prompt.
        """
        _check_choice("mode", mode, MODES)
        _check_choice("prompt", prompt, POLICY_PROMPTS)
        return self._render(f"policy_{mode}.j2", prompt=prompt)

    def form(self, form: str, *, say: str | None = None, missing: str = "") -> str:
        """Render the request to fill in a form, perhaps after the policy's reply.

        missing: "change" or "reply" where an answer lacked it; then it asks for that alone, in words of its own. (A
            weak model that is shown a heading once more answers with the heading.)
        """
        return self._render("form.j2", form=form, say=say, missing=missing)

    def _render(self, name: str, **values: Any) -> str:
        try:
            return self.templates[name].render(**values).strip()
        except jinja2.TemplateError as error:
            raise ValueError(f"{self.origins[name]}: can't be rendered: {error.message}") from error


def load_prompts(language: str, folder: str | Path | None = None) -> Prompts:
    """Read and check the prompts of `language`, one of LANGUAGES.

    folder: your own prompt files, each replacing ours of the same name (FILES); a file that isn't there is
    taken from ours. Names that begin with a dot are passed over. Or a clone of SAGE's repository: then the policy's
    system prompt and the prompts of a user at an endpoint are SAGE's. Raises ValueError for an unknown language, a
    name that isn't one of FILES (a misspelt file would else be ignored silently), or a file that doesn't hold
    what it must; FileNotFoundError where `folder` is no folder.
    """
    _check_choice("language", language, LANGUAGES)
    if folder is not None and sage_folder(folder):
        return _of_sage(load_prompts(language), Path(folder))
    texts, origins = _read(language, None if folder is None else Path(folder))
    appraisal = parse_script(texts["appraisal.script"], origins["appraisal.script"])
    reply = parse_script(texts["reply.script"], origins["reply.script"])
    check_appraisal(appraisal, origins["appraisal.script"])
    check_reply(reply, origins["reply.script"])
    opening = texts["opening.txt"].strip()
    if not opening:
        raise ValueError(f"{origins['opening.txt']}: is empty; write the cue that asks the user for its first words")
    return Prompts(
        language=language,
        appraisal=appraisal,
        reply=reply,
        opening=opening,
        intentions=_intentions(texts["hidden_intentions.json"], origins["hidden_intentions.json"], language),
        origins=origins,
        templates={name: _template(texts[name], origins[name], allowed) for name, allowed in TEMPLATES.items()},
    )


def _of_sage(ours: Prompts, clone: Path) -> Prompts:
    """Our prompts with SAGE's in place of those that it has."""
    sage = sage_clone.read(clone)
    policy = _ENV.from_string("{{ text }}", globals={"text": sage.policy})
    templates = {**ours.templates, **{f"policy_{mode}.j2": policy for mode in MODES}}
    return dataclasses.replace(
        ours, sage=sage, templates=templates, appraisal=sage_user.APPRAISAL, reply=sage_user.REPLY
    )


def _check_choice(what: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} {value!r} is unknown: use one of {', '.join(allowed)}")


def _read(language: str, folder: Path | None) -> tuple[dict[str, str], dict[str, str]]:
    ours = resources.files("rlver_jax.user.prompts") / language
    texts = {name: (ours / name).read_text(encoding="utf-8") for name in FILES}
    origins = {name: f"{language}/{name}" for name in FILES}
    if folder is None:
        return texts, origins
    if not folder.is_dir():
        raise FileNotFoundError(f"prompt folder {folder} doesn't exist or is no folder: name a folder holding {FILES}")
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.name not in FILES:
            raise ValueError(f"{path}: is no prompt file; rename or remove it. Allowed names: {', '.join(FILES)}")
        try:
            texts[path.name], origins[path.name] = path.read_text(encoding="utf-8-sig"), str(path)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
            ) from error
    return texts, origins


def _template(text: str, source: str, allowed: tuple[str, ...]) -> jinja2.Template:
    try:
        tree = _ENV.parse(text, filename=source)
        template = _ENV.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"{source}, line {error.lineno}: {error.message}") from error
    unknown = jinja2.meta.find_undeclared_variables(tree) - set(allowed)
    for name in tree.find_all(jinja2.nodes.Name):
        if name.name in unknown:
            known = ", ".join(allowed) + " (the policy never sees the profile)" * source.endswith(_POLICY)
            raise ValueError(f"{source}, line {name.lineno}: unknown variable {name.name!r}; allowed: {known}")
    return template


def _intentions(text: str, source: str, language: str) -> dict[str, Intention]:
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}, line {error.lineno}: not JSON: {error.msg}") from error
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{source}: must be a JSON object that maps each intention's key to its entry")
    return {key: _intention(key, entry, source, language) for key, entry in entries.items()}


def _intention(key: str, entry: Any, source: str, language: str) -> Intention:
    """One entry; of a published intention the table holds the kind, and a sentence for where the entry has none."""
    needed, aliases = ("kind", "sentence", "reaction", "raises", "lowers"), list[str]()
    published = published_intention(key)
    if published and isinstance(entry, dict):
        sentence = published.sentence(language)
        entry = {"kind": published.kind} | ({"sentence": sentence} if sentence else {}) | entry
        aliases = [published.chinese, published.english]
    if not isinstance(entry, dict) or not set(needed) <= set(entry) <= {*needed, "aliases"}:
        got = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f"{source}: intention {key!r} has {got}; expected {', '.join(needed)} and perhaps aliases")
    if any(not isinstance(entry[name], str) or not entry[name].strip() for name in needed):
        raise ValueError(f"{source}: intention {key!r}: {', '.join(needed)} must be text and not empty")
    if entry["kind"] not in get_args(Kind):
        raise ValueError(f"{source}: intention {key!r} has kind {entry['kind']!r}; expected rational or emotional")
    own = entry.get("aliases", [])
    if not isinstance(own, list) or any(not isinstance(alias, str) for alias in own):
        raise ValueError(f"{source}: intention {key!r}: aliases must be a list of sentences")
    texts = {name: entry[name] for name in needed}
    return Intention(key=key, **texts, aliases=tuple(dict.fromkeys([*aliases, *own])))
